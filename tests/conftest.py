"""Set up before any test: no network, no telemetry, processes that do not fight over two cores."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Of each of pytest-xdist's processes, of which there is one for each core, and of what it starts.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import pytest  # noqa: E402  (after the environment is set, which the imports read)
import torch  # noqa: E402


torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
