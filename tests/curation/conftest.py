"""What several tests of curation share."""

import pytest

from .runs import forker


@pytest.fixture(scope="session")
def round_forks():
    """A process that forks runs of the rounds' recipe; started once, because its imports take seconds."""
    with forker() as process:
        yield process
