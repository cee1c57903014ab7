"""Public names of the packages: each loads, whatever was imported before, and costs nothing until then."""

import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

from trl_dt2it.lazy import lazy_names


PACKAGES = [
    "trl_dt2it",
    "trl_dt2it.curation",
    "trl_dt2it.data",
    "trl_dt2it.debias",
    "trl_dt2it.evaluation",
    "trl_dt2it.judge",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_what_its_module_defines(package):
    module = import_module(package)
    modules = module._MODULES
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
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        import_module(package).nothing  # noqa: B018  (the access is what is tested)


def test_names_of_the_package_itself_are_listed():
    assert "__name__" in lazy_names("trl_dt2it", {"a": "b"})[1]() and "a" in lazy_names("trl_dt2it", {"a": "b"})[1]()


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_large(package):
    program = (
        f"import sys, {package}; print(*sorted({{'torch', 'datasets', 'transformers', 'openai'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
