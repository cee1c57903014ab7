"""Public names that load on first use, so that importing a package is cheap and needs no extra."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    What a package binds to `__getattr__` and `__dir__`.

    No module may be called like a public name of its package: Python would bind the one over the other.

    Args:
        package (`str`):
            The package's `__name__`.
        modules (`Mapping[str, str]`):
            For each public name the module of the package that defines it.

    Returns:
        `tuple`: a function that loads a name, or raises `AttributeError`, and one that lists all names.
    """

    def load(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f".{modules[name]}", package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return load, names
