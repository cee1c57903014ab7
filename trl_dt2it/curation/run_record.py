"""The record of a run of rounds in `run.json`, its settings and environment, for the report and for repeating it."""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset

from ..data.columns import column_of
from ..training.model_card import run_command
from ..utils import read_json, write_json


if TYPE_CHECKING:
    from .curation_run import CurationRun

RUN_FILE = "run.json"
PACKAGES = ("trl-dt2it", "trl", "transformers", "torch", "accelerate", "datasets", "peft")


def record_run(run: CurationRun, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write `run.json` into the folder of a run, with its command line but for secrets, and return what it holds."""
    args, earlier = run.training.args, read_record(run.output_dir)
    record = {
        "command": run_command(PartialState().num_processes, argv),
        # Run again after a kill, it is still the same run.
        "started": datetime.now(UTC).isoformat(timespec="seconds") if earlier is None else earlier["started"],
        "machine": machine(),
        "versions": versions(),
        "sets": {name: dict(specs) for name, specs in run.sets.specs.items()},
        "pairs": {name: _by_source(run.sets.raw(name)) for name in run.sets.specs},
        "images": {"image_root": args.image_root, "max_image_pixels": args.max_image_pixels},
        "models": [{"model_name_or_path": one.name_or_path, "seed": one.seed} for one in run.models],
        "rounds": [[step.settings() for step in steps] for steps in run.rounds],
        "balance_style": run.balance,
        "training": run.training.settings(),
    }
    write_json(run.output_dir / RUN_FILE, record, default=str)
    return record


def _by_source(rows: Dataset) -> dict[str, int]:
    return dict(Counter(map(str, column_of(rows, "source").to_pylist())).most_common())


def read_record(directory: str | os.PathLike) -> dict[str, Any] | None:
    """Read what [`record_run`] wrote; `None` if it has not."""
    return read_json(Path(directory) / RUN_FILE)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine() -> str:
    """Describe the hardware in a few words."""
    count = PartialState().num_processes
    processes = f"{count} process" + ("es" if count > 1 else "")
    if PartialState().device.type == "cuda":
        return f"{processes}, {torch.cuda.get_device_name()}"
    return f"{processes}, {os.cpu_count()} CPU cores, {sys.platform} {platform.machine()}"
