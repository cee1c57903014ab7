"""What pyproject.toml cannot say: `recipes/` is part of the installed package, as `trl_dt2it/recipes`."""

from setuptools import find_namespace_packages, setup


setup(
    packages=[*find_namespace_packages(include=["trl_dt2it*"], exclude=["*.__pycache__"]), "trl_dt2it.recipes"],
    package_dir={"trl_dt2it.recipes": "recipes"},
)
