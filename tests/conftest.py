"""Set up before any test: processes that do not fight over two cores."""

import gc
import os


# Of each of pytest-xdist's processes, of which there is one for each core, and of what it starts.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import pytest  # noqa: E402  (after the environment is set, which the imports read)
import torch  # noqa: E402


torch.set_num_threads(THREADS)


def pytest_collection_finish():
    """Freeze all that is imported by now: each training collects garbage, at half a second with 5,000 modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
