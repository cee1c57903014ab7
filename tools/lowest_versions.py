"""Print the lower bound of each dependency in pyproject.toml, extras given as arguments included, as `name==bound`.

python tools/lowest_versions.py dev > constraints.txt
pip install --constraint constraints.txt --editable '.[dev]'
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest_versions(requirements: list[str]) -> dict[str, str]:
    """Lower bounds of requirements such as `"trl>=1.16,<2"`, by name; of a name that is there twice the higher one."""
    bounds: dict[str, str] = {}
    for text in requirements:
        requirement = Requirement(text)
        lower = [one.version for one in requirement.specifier if one.operator in (">=", "==", "~=")]
        if not lower:
            raise ValueError(f"{text!r} has no lower bound; give one, such as `{requirement.name}>=1.0`.")
        bounds[requirement.name] = max([*lower, bounds.get(requirement.name, lower[0])], key=Version)
    return bounds


def main(extras: list[str]) -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    for name, bound in lowest_versions(requirements).items():
        print(f"{name}=={bound}")


if __name__ == "__main__":
    main(sys.argv[1:])
