"""What a person decided about single pairs, in a file: what the report exports, and a ledger takes.

```json
{"format": "trl-dt2it corrections", "version": 1, "source_set": "9f1c...", "corrections": [
    {"pair_id": "rlaif-v-17", "verdict": "wrong", "flipped": false, "kept": true},
    {"pair_id": "rlaif-v-40", "verdict": "unsure"}
]}
```
An entry says how the pair has to stand against the source set, not what is to be done with it: a file that is read
twice, or after another round, does no harm.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .ledger_files import is_manual


FORMAT = "trl-dt2it corrections"
VERSION = 1
VERDICTS = ("accept", "wrong", "unsure")


@dataclass(frozen=True)
class Corrections:
    """The content of a file of corrections."""

    source_set: str | None  # its fingerprint
    wanted: dict[str, tuple[bool, bool]]  # by `pair_id`: flipped against the source set, and kept
    unsure: tuple[str, ...] = ()  # nothing is done about them


def read_corrections(path: str | os.PathLike) -> Corrections:
    """Read a file of corrections; raise a `ValueError` if it is none, or an entry is incomplete or repeated."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); export it from the report once more.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{path} is no file of corrections: its `format` has to be "{FORMAT}".')
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}; this release reads version {VERSION}.")
    wanted: dict[str, tuple[bool, bool]] = {}
    unsure: list[str] = []
    for number, entry in enumerate(content.get("corrections") or []):
        name = _checked(path, number, entry)
        if name in wanted or name in unsure:
            raise ValueError(f"Correction {number} of {path} speaks of {name!r} a second time; leave one of them.")
        if entry["verdict"] == "unsure":
            unsure.append(name)
        else:
            wanted[name] = (entry["flipped"], entry["kept"])
    return Corrections(content.get("source_set"), wanted, tuple(unsure))


def corrective_actions(given: Corrections, state: pa.Table) -> dict[str, str | None]:
    """Return what makes pairs stand as a person wants them: `keep`, `flip` or `drop`, seen from the present state of
    each, or `None` where a person has decided the same before."""
    names = pa.array(list(given.wanted), pa.string())
    places = pc.index_in(names, value_set=state["pair_id"].combine_chunks()).to_pylist()
    flipped, kept, stage = (state[name].to_pylist() for name in ("flipped", "kept", "stage"))
    actions: dict[str, str | None] = {}
    for (name, (flip, keep)), place in zip(given.wanted.items(), places, strict=True):
        # A dropped pair has a side too, but it makes no difference which.
        same_side = place is None or flipped[place] == flip
        if place is not None and is_manual(stage[place]) and kept[place] == keep and (same_side or not keep):
            actions[name] = None
        else:
            actions[name] = "drop" if not keep else "keep" if same_side else "flip"
    return actions


def _checked(path: str | os.PathLike, number: int, entry: Any) -> str:
    where = f"Correction {number} of {path}"
    if not isinstance(entry, dict) or not isinstance(entry.get("pair_id"), str):
        raise ValueError(f"{where} has no `pair_id`; name the pair.")
    if entry.get("verdict") not in VERDICTS:
        raise ValueError(f"{where} has the verdict {entry.get('verdict')!r:.40}; give one of {', '.join(VERDICTS)}.")
    if entry["verdict"] != "unsure":
        for name in ("flipped", "kept"):
            if not isinstance(entry.get(name), bool):
                raise ValueError(f"{where} has {entry.get(name)!r:.40} as `{name}`; give true or false.")
    return entry["pair_id"]
