"""What several tests of curation share."""

import pytest

from trl_dt2it.curation import CurationLedger

from .runs import forker


@pytest.fixture(scope="session")
def round_forks():
    """A process that forks runs of the rounds' recipe; started once, because its imports take seconds."""
    with forker() as process:
        yield process


@pytest.fixture
def ledger(tmp_path):
    """A ledger without rounds."""
    return CurationLedger(tmp_path / "ledger")
