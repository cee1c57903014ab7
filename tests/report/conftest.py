"""A run's folder, made once, and copies of it to write into."""

import shutil

import pytest

from .run_folder import write_run


@pytest.fixture(scope="session")
def written_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report"))


@pytest.fixture
def run(written_run, tmp_path):
    """A copy whose ledger may be changed; its pool and images lie where they were."""
    return shutil.copytree(written_run, tmp_path / "run")
