"""What several tests of the judge share."""

import pytest

from .runs import KEY, forker


@pytest.fixture(scope="session")
def forks():
    """A process that forks runs; started once, because its imports take seconds."""
    with forker(KEY) as process:
        yield process
