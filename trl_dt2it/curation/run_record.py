"""What a run of rounds was told, and with what it ran, in `run.json`: for the report, and for whoever repeats it."""

from __future__ import annotations

import json
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

from ..card_facts import run_command
from ..data.encoded import column_of
from ..data.whole_file import whole_file


if TYPE_CHECKING:
    from .curation_run import CurationRun

RUN_FILE = "run.json"
PACKAGES = ("trl-dt2it", "trl", "transformers", "torch", "accelerate", "datasets", "peft")


def record_run(run: CurationRun, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Writes `run.json` into the folder of a run.

    Args:
        run ([`CurationRun`]):
            The run.
        argv (`Sequence[str]`, *optional*):
            The command line; this process's by default. What may be secret in it is left out.

    Returns:
        `dict`: what is in the file: `command`, `started`, `machine`, `versions`, `sets`, `pairs` by set and source,
        `images` (`image_root` and `max_image_pixels`), `models`, `rounds`, `balance_style` and `training`.
    """
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
    with whole_file(run.output_dir / RUN_FILE) as part:
        part.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    return record


def _by_source(rows: Dataset) -> dict[str, int]:
    return dict(Counter(map(str, column_of(rows, "source").to_pylist())).most_common())


def read_record(directory: str | os.PathLike) -> dict[str, Any] | None:
    """
    What [`record_run`] wrote.

    Args:
        directory (`str` or `os.PathLike`):
            Folder of the run.

    Returns:
        `dict`, *optional*: `None` if there is no such file.
    """
    path = Path(directory) / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def without_secrets(command: Sequence[str]) -> list[str]:
    """
    A command line without the values of flags that name a token, a key or a password.

    Args:
        command (`Sequence[str]`):
            Its words.

    Returns:
        `list[str]`: with `***` in their places.
    """
    words: list[str] = []
    hide = False
    for word in command:
        flag, equals, _ = word.partition("=")
        is_secret = flag.startswith("--") and flag.lower().endswith(("token", "key", "password", "secret"))
        words.append("***" if hide else f"{flag}=***" if is_secret and equals else word)
        hide = is_secret and not equals
    return words


def versions() -> dict[str, str]:
    """Python and the packages that a result may depend on, with their versions."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine() -> str:
    """What is being computed on, in a few words."""
    count = PartialState().num_processes
    processes = f"{count} process" + ("es" if count > 1 else "")
    if PartialState().device.type == "cuda":
        return f"{processes}, {torch.cuda.get_device_name()}"
    return f"{processes}, {os.cpu_count()} CPU cores, {sys.platform} {platform.machine()}"
