"""What [`IterativeCurationCallback`] knows, and how it is kept: in checkpoints and in a ledger.

```
checkpoint-100/
  curation_state.json          rounds, settings, fingerprint of the train set
  curation_state.safetensors   one entry per pair
```
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from transformers.utils import logging

from ..data.columns import column_of
from ..data.contents import source_fingerprint
from ..training.selection import STATE_FILE, Selection
from ..utils import digest, whole_file
from .ledger import CurationLedger


logger = logging.get_logger(__name__)


ARRAYS_FILE = "curation_state.safetensors"
STAGE = "epoch"


@dataclass
class CurationState:
    """
    What has been decided about the N pairs of a train set.

    Parameters:
        selection ([`Selection`]):
            How they are read.
        average (`np.ndarray` of shape `(N,)` and dtype `float64`):
            Average strength over the rounds, chosen and rejected as in the data set; NaN where not scored.
        reference (`np.ndarray` of shape `(R,)` and dtype `float64`, *optional*):
            The same for the pairs known to be right.
        round (`int`, *optional*, defaults to 0):
            Number of rounds done.
        last_epoch (`int`, *optional*, defaults to -1):
            Number of epochs that were done at the last round.
    """

    selection: Selection
    average: np.ndarray
    reference: np.ndarray | None = None
    round: int = 0
    last_epoch: int = -1

    @classmethod
    def at_start(cls, num_pairs: int, seed: int = 0, num_references: int | None = None) -> CurationState:
        """Nothing scored, and all pairs as they are in the data set."""
        reference = None if num_references is None else np.full(num_references, np.nan)
        return cls(Selection.of_all(num_pairs, seed), np.full(num_pairs, np.nan), reference)


def save_state(folder: str | os.PathLike, state: CurationState, settings: dict[str, Any], fingerprint: str) -> None:
    """
    Writes the state into a checkpoint.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint; made if it is not there.
        state ([`CurationState`]):
            The state.
        settings (`dict`):
            What the decisions depend on, as JSON holds it.
        fingerprint (`str`):
            Of the train set.
    """
    selection = state.selection
    arrays = {"flipped": selection.flipped, "kept": selection.kept, "average": state.average}
    if selection.strength is not None:
        arrays["strength"] = selection.strength
    if state.reference is not None:
        arrays["reference"] = state.reference
    record = {"round": state.round, "last_epoch": state.last_epoch, "seed": selection.seed}
    with whole_file(Path(folder) / ARRAYS_FILE) as path:
        save_file(arrays, path)
    with whole_file(Path(folder) / STATE_FILE) as path:
        path.write_text(json.dumps({**record, "settings": settings, "fingerprint": fingerprint}, indent=2) + "\n")


def load_state(folder: str | os.PathLike, settings: dict[str, Any], fingerprint: str) -> CurationState:
    """
    Reads the state out of a checkpoint.

    Args:
        folder, settings, fingerprint:
            As in [`save_state`].

    Returns:
        [`CurationState`]

    Raises:
        `ValueError`: if the checkpoint holds no state, or one of another train set or of other settings.
    """
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} was written without the curation callback; resume from it without the callback, or start anew."
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["fingerprint"] != fingerprint:
        raise ValueError(
            f"The curation of {folder} is that of another train set: its pairs, their content, sources, strengths or "
            "order differ; resume with the set that it was trained on, or start anew."
        )
    written = _with_plain_names(record["settings"])
    for name in sorted({*settings, *written}):
        before, now = written.get(name), settings.get(name)
        if before != now:
            raise ValueError(
                f"The curation of {folder} was made with `{name}` {json.dumps(before)}, which now is "
                f"{json.dumps(now)}; set it back, or start anew."
            )
    arrays = load_file(Path(folder) / ARRAYS_FILE)
    selection = Selection(arrays["flipped"], arrays["kept"], strength=arrays.get("strength"), seed=record["seed"])
    return CurationState(selection, arrays["average"], arrays.get("reference"), record["round"], record["last_epoch"])


def fingerprint_of(dataset: Dataset, contents: pa.Table) -> str:
    """A hash of a train set: the names of its pairs, what is in them, their sources and strengths, in their order."""
    parts = [source_fingerprint(contents["pair_id"].combine_chunks()), json.dumps(contents["content"].to_pylist())]
    for column in ("source", "strength"):
        if column in dataset.column_names:
            parts.append(json.dumps(column_of(dataset, column).to_pylist()))
    return digest(parts)


def describe(value: Any) -> Any:
    """A rule as JSON: its function and arguments; what the package exports goes by its plain name."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(one) for one in value]
    if isinstance(value, np.ndarray):
        return digest(np.ascontiguousarray(value).tobytes())
    if isinstance(value, partial):
        return [describe(value.func), describe(value.args), {k: describe(v) for k, v in value.keywords.items()}]
    if is_dataclass(value) and not isinstance(value, type):
        return [describe(type(value)), {field.name: describe(getattr(value, field.name)) for field in fields(value)}]
    named = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    # No module of ours, which may move; a user's may well have a function of the same name.
    is_ours = named.__module__.startswith("trl_dt2it.")
    return named.__qualname__ if is_ours else f"{named.__module__}.{named.__qualname__}"


def _with_plain_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are written now, out of files that name our rules with their modules."""
    return json.loads(re.sub(r'"trl_dt2it\.[\w.]+\.(\w+)"', r'"\1"', json.dumps(settings)))


def check_ledger(ledger: CurationLedger, settings: Mapping[str, Any]) -> None:
    """Refuse a ledger with rounds of anything but a training with these settings."""
    for entry in ledger.rounds:
        if entry["stage"] != STAGE or _with_plain_names(entry["settings"]) != settings:
            raise ValueError(
                f"The ledger in {ledger.directory} holds rounds of something else, or of other settings (round "
                f"{entry['round']}, stage {entry['stage']!r}); give `ledger` another directory."
            )


def add_round(ledger: CurationLedger, round: int, **content: Any) -> None:
    """
    Adds a round of the training to its ledger. A round that is there already is from before the training was resumed;
    if it is not the same, as on devices that do not repeat their results, it is undone, with those after it.

    Args:
        ledger ([`CurationLedger`]):
            The ledger.
        round (`int`):
            Number of the round, from 1.
        content:
            As [`CurationLedger.append`] takes it.
    """
    try:
        ledger.append(round, STAGE, orientation="source", **content)
    except ValueError:
        rounds = ledger.summary().select(["round", "undone"]).to_pylist()
        stale = {entry["round"] for entry in rounds if entry["round"] >= round and not entry["undone"]}
        if round not in stale:
            raise
        logger.warning(f"Round {round} of the resumed training is not the one in {ledger.directory}, which is undone.")
        for number in sorted(stale):
            ledger.undo(number, STAGE)
        ledger.append(round, STAGE, orientation="source", **content)
