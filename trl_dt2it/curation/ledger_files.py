"""The files of a ledger: `ledger.json`, which names every round file with its hash and says what was undone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers.utils import logging

from ..data.contents import CONTENT_COLUMNS
from ..utils import read_json, whole_file, write_json
from .ledger_tables import STATE_COLUMNS, merge_rounds


logger = logging.get_logger(__name__)

MANUAL = "manual"
_VERSION = 1
_CODED = ["source", "action", "reason"]


class LedgerFiles:
    """The folder of a ledger, made if it is not there, and refused if a file of it is missing or changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self._trusted: set[str] = set()
        for entry in self.read()["rounds"]:
            self.verified(entry)

    def read(self) -> dict[str, Any]:
        """Read `ledger.json`, anew each time: another process may have written meanwhile."""
        path = self.directory / "ledger.json"
        record = read_json(path)
        if record is None:
            return {"version": _VERSION, "source_set": None, "rounds": [], "events": []}
        if record.get("version") != _VERSION:
            raise ValueError(f"{path} has version {record.get('version')!r}; this release reads version {_VERSION}.")
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Replace `ledger.json`."""
        write_json(self.directory / "ledger.json", record)

    def add(self, record: dict[str, Any], entry: dict[str, Any], table: pa.Table) -> None:
        """Write a round, its table first, so that `ledger.json`, which gets the entry, names nothing that is not
        there."""
        attempt = sum(round_key(other) == round_key(entry) for other in record["rounds"]) + 1
        file = f"round-{entry['round']:05d}-{entry['stage']}{'' if attempt == 1 else f'.{attempt}'}.parquet"
        with whole_file(self.directory / file) as part:
            pq.write_table(table, part, use_dictionary=_CODED, compression="zstd")
            digest = _digest(part)
        self._trusted.add(digest)
        place = {name: entry[name] for name in ("round", "stage")}
        record["rounds"].append({**place, "file": file, "sha256": digest, "pairs": len(table), **entry})
        self.write(record)

    def table(self, entry: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of a round, all by default."""
        return pq.read_table(self.verified(entry), columns=None if columns is None else list(columns))

    def merged(self, record: dict[str, Any], numbers: Sequence[int], contents: pa.Table | None = None) -> pa.Table:
        """Return the last word of some rounds on every pair, as [`merge_rounds`] does."""

        def tables() -> Iterator[tuple[int, pa.Table]]:
            for number in numbers:
                entry = record["rounds"][number]
                columns = list(STATE_COLUMNS)
                if contents is not None:
                    if self.has_contents(entry):
                        columns += CONTENT_COLUMNS
                    else:
                        logger.warning_once(
                            f"The ledger in {self.directory} does not know what was in the pairs that {entry['file']} "
                            "decided about (it is of an earlier release, or was written without `contents`): that "
                            "rows were changed since then goes unnoticed."
                        )
                yield number, self.table(entry, columns)

        return merge_rounds(tables(), contents)

    def has_contents(self, entry: dict[str, Any]) -> bool:
        """Tell a round that knows what was in the pairs that it decided about."""
        return set(CONTENT_COLUMNS) <= set(pq.read_schema(self.verified(entry)).names)

    def contents(self, record: dict[str, Any], names: pa.Array) -> pa.Table:
        """Return what was in pairs by the last round that knows, undone ones too, as [`pair_contents`] does."""
        found: dict[str, Sequence[str | None]] = dict.fromkeys(names.to_pylist(), (None, None))
        for entry in record["rounds"]:
            if self.has_contents(entry):
                table = self.table(entry, ["pair_id", *CONTENT_COLUMNS])
                table = table.filter(pc.is_in(table["pair_id"], value_set=names))
                for name, *hashes in zip(*(column.to_pylist() for column in table.columns), strict=True):
                    found[name] = hashes if any(hashes) else found[name]
        columns = zip(*found.values(), strict=True) if found else ((), ())
        named = dict(zip(CONTENT_COLUMNS, (pa.array(column, pa.string()) for column in columns), strict=True))
        return pa.table({"pair_id": pa.array(found, pa.string()), **named})

    def verified(self, entry: Mapping[str, Any]) -> Path:
        """Return the file of a round, whose hash is checked once."""
        path = self.directory / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing, and the ledger needs it; put it back from a copy.")
        if entry["sha256"] not in self._trusted:
            if _digest(path) != entry["sha256"]:
                raise ValueError(f"{path} is not what the ledger wrote; put it back from a copy.")
            self._trusted.add(entry["sha256"])
        return path


def standing_rounds(record: dict[str, Any]) -> list[int]:
    """Return the positions of the rounds that count in the list of all, those of persons last."""
    undone: set[str] = set()
    for event in record["events"]:
        undone = (undone | set(event.get("undo", ()))) - set(event.get("redo", ()))
    standing = [number for number, entry in enumerate(record["rounds"]) if entry["file"] not in undone]
    return sorted(standing, key=lambda number: is_manual(record["rounds"][number]["stage"]))


def record_event(record: dict[str, Any], kind: Literal["undo", "redo"], round: int, stage: str | None) -> None:
    """Note in the content of `ledger.json` that a round, or a stage of it, is undone, or counts again."""
    rounds, standing = record["rounds"], set(standing_rounds(record))
    meant = [
        number
        for number, entry in enumerate(rounds)
        if entry["round"] == round and stage in (None, entry["stage"]) and (number in standing) == (kind == "undo")
    ]
    if kind == "redo":  # of several attempts the last, unless another stands
        taken = {round_key(rounds[number]) for number in standing}
        latest = {round_key(rounds[number]): number for number in meant}
        meant = [number for key, number in latest.items() if key not in taken]
    if not meant:
        what = f"round {round}" + ("" if stage is None else f", stage {stage!r}")
        raise ValueError(f"Nothing of {what} {'stands' if kind == 'undo' else 'is undone'}, so there is no {kind}.")
    record["events"].append({kind: [rounds[number]["file"] for number in meant]})


def round_key(entry: dict[str, Any]) -> tuple[int, str]:
    """Return number and stage of a round."""
    return entry["round"], entry["stage"]


def is_manual(stage: str) -> bool:
    """Tell a stage in which a person decided."""
    return stage == MANUAL or stage.startswith(f"{MANUAL}-")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
