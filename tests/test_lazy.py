"""Public names of the packages: each loads, whatever was imported before, and costs nothing until then."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


PACKAGES = [
    "trl_dt2it",
    "trl_dt2it.curation",
    "trl_dt2it.data",
    "trl_dt2it.debias",
    "trl_dt2it.evaluation",
    "trl_dt2it.judge",
    "trl_dt2it.report",
    "trl_dt2it.scoring",
]


def homes(package: str) -> dict[str, str]:
    """The module of each public name, as the package's stub says."""
    stub = Path(import_module(package).__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    return {name: home for home, name in re.findall(r"^from \.([\w.]+) import \w+ as (\w+)$", stub, re.MULTILINE)}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_what_its_module_defines(package):
    module = import_module(package)
    modules = homes(package)
    assert set(module.__all__) - {"__version__"} == set(modules)
    for name in set(modules.values()):
        import_module(f".{name}", package)  # which binds the module to its name in the package
    for name, home in modules.items():
        value = getattr(module, name)
        assert not isinstance(value, ModuleType), name
        assert value is getattr(import_module(f".{home}", package), name)
    assert set(modules) <= set(dir(module))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wrong_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"No {package} attribute nothing"):
        import_module(package).nothing  # noqa: B018  (the access is what is tested)


@pytest.mark.parametrize(
    "module",
    [
        "data.prepare",
        "data.cards",
        "data.export",
        "data.validation",
        "debias.audit",
        "debias.blind",
        "judge.client",
        "judge.prompts",
    ],
)
def test_rows_style_and_judges_need_no_torch(module):
    program = f"import sys, trl_dt2it.{module}; print(*sorted({{'torch', 'trl', 'accelerate'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_large(package):
    program = (
        f"import sys, {package}; print(*sorted({{'torch', 'datasets', 'transformers', 'openai'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
