"""What several tests of curation share."""

import pytest

from trl_dt2it.curation import CurationLedger


@pytest.fixture
def ledger(tmp_path):
    """A ledger without rounds."""
    return CurationLedger(tmp_path / "ledger")
