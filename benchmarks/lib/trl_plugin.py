"""A plugin of pytest that runs TRL's own tests with the classes that `CLASSES` names, and keeps what came out.

Without an accelerator, every configuration is one for the CPU.
"""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
import trl

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer


def _on_the_cpu(config_class: type) -> None:
    init = config_class.__init__

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **{"use_cpu": True, "bf16": False, **kwargs})

    config_class.__init__ = __init__


if not torch.accelerator.is_available():
    _on_the_cpu(trl.RewardConfig)
    _on_the_cpu(MultimodalRewardConfig)
if os.environ["CLASSES"] == "ours":
    trl.RewardConfig, trl.RewardTrainer = MultimodalRewardConfig, MultimodalRewardTrainer

outcomes: dict[str, str] = {}  # name of a test: nothing, or how it failed


@pytest.fixture
def lazy_shared_datadir(request) -> Path:
    return request.path.parent / "data"


def pytest_runtest_logreport(report) -> None:
    name = report.nodeid.split("::")[-1]
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        outcomes[name] = crash.message if crash is not None else str(report.longrepr)
    elif report.skipped:
        outcomes[name] = "skipped"
    elif report.when == "call":
        outcomes.setdefault(name, "")


def pytest_sessionfinish() -> None:
    Path(os.environ["OUTCOMES"]).write_text(json.dumps(outcomes))
