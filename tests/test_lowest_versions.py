"""The lower bounds of the dependencies, as the tests of the oldest releases install them."""

import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]
lowest_versions = runpy.run_path(str(ROOT / "tools/lowest_versions.py"))["lowest_versions"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_bounds_by_hand():
    found = lowest_versions(["trl>=1.16,<2", "a[b]~=3.1; python_version > '3'", "c==2", "trl>=1.9"])
    assert found == {"trl": "1.16", "a": "3.1", "c": "2"}
    with pytest.raises(ValueError, match="'torch<3' has no lower bound; give one, such as `torch>=1.0`"):
        lowest_versions(["torch<3"])


def test_every_dependency_has_a_bound_that_is_installed_or_lower():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for name, bound in lowest_versions([one for group in groups for one in group]).items():
        if name in {Requirement(one).name for one in [*groups[0], *PROJECT["optional-dependencies"]["dev"]]}:
            assert Version(bound) <= Version(version(name)), name


def test_what_is_printed_is_what_pip_takes():
    def printed(*extras: str) -> set[str]:
        command = [sys.executable, ROOT / "tools/lowest_versions.py", *extras]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert all(re.fullmatch(r"[\w.-]+==[\d.]+", line) for line in lines)
        return {line.split("==")[0] for line in lines}

    assert {"trl", "torch"} <= printed() <= printed("dev")
    assert "pytest" in printed("dev") - printed()
