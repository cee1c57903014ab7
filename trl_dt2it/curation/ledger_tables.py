"""Tables and files of the ledger. Private to [`trl_dt2it.curation.ledger`]."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers.utils import logging

from ..data.contents import CONTENT_COLUMNS
from ..utils import read_json, whole_file, write_json
from .rules import Decision, is_missing_vote


logger = logging.get_logger(__name__)

ACTIONS = ("keep", "flip", "drop")

MANUAL = "manual"

_VERSION = 1

# The state of a pair that no round covers: as the source set has it.
_INITIAL = {"flipped": False, "kept": True, "strength": np.nan}


def as_strings(values: Any, argument: str, count: int | None = None) -> pa.Array:
    """Return strings as one Arrow array, of length `count` if that is passed; messages name the `argument`."""
    column = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, from_pandas=True)
    if count is not None and len(column) != count:
        raise ValueError(f"There are {count} pairs and {len(column)} entries of `{argument}`; pass one per pair.")
    column = column.cast(pa.string())
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def round_table(
    pair_ids: pa.Array,
    decision: Decision,
    *,
    sources: pa.Array | None,
    was_flipped: np.ndarray,
    strength: np.ndarray,
    scores: npt.ArrayLike | None,
    votes: npt.ArrayLike | None,
    num_models: int,
    contents: pa.Table | None = None,
) -> pa.Table:
    """Return the table of a round; raise a `ValueError` if a shape is wrong or a name is missing or repeated."""
    count = len(pair_ids)
    if len(decision) != count:
        raise ValueError(f"There are {count} pairs and a decision about {len(decision)}; pass one per pair.")
    if pair_ids.null_count or (distinct := pc.count_distinct(pair_ids).as_py()) < count:
        problem = "is missing" if pair_ids.null_count else f"is there twice ({distinct} of {count} are distinct)"
        raise ValueError(f"A pair's name {problem}; take the names that `pair_ids` gives for the data set.")
    codes = np.where(decision.keep, np.where(decision.flip, 1, 0), 2).astype(np.int8)
    columns = {
        "pair_id": pair_ids,
        "source": (pa.nulls(count, pa.string()) if sources is None else sources).dictionary_encode(),
        "was_flipped": pa.array(was_flipped),
        "flipped": pa.array(was_flipped ^ decision.flip),
        "action": pa.DictionaryArray.from_arrays(codes, list(ACTIONS)),
        "reason": pa.DictionaryArray.from_arrays(decision.reason_code, list(decision.reason_names)),
        "strength": pa.array(np.asarray(strength, dtype=np.float64), from_pandas=True),
    }
    if contents is not None:
        columns |= contents_of(pair_ids, contents)
    if scores is not None:
        scores = np.asarray(scores)
        scores = scores[:, :, None] if scores.ndim == 2 else scores
        if scores.shape != (count, 2, num_models):
            raise ValueError(
                f"`scores` has shape {scores.shape} for {count} pairs and {num_models} models; it must be (pairs, 2, "
                "models), and `models` must name each."
            )
        for model in range(num_models):
            for side, name in enumerate(("chosen", "rejected")):
                column = np.ascontiguousarray(scores[:, side, model])
                columns[f"{name}_{model}"] = pa.array(column, from_pandas=True)  # NaN becomes null
    if votes is not None:
        votes = np.asarray(votes)
        if votes.ndim != 3 or votes.shape[0] != count or votes.shape[2] != 2:
            raise ValueError(f"`votes` has shape {votes.shape} for {count} pairs; it must be (pairs, judges, 2).")
        missing = is_missing_vote(votes)
        signs = np.where(missing, 0, votes).astype(np.int8)
        for judge, order in np.ndindex(votes.shape[1:]):
            columns[f"vote_{judge}_{order}"] = pa.array(signs[:, judge, order], mask=missing[:, judge, order])
    return pa.table(columns)


def decision_of(actions: Sequence[str] | pa.Array, reason: str, margins: np.ndarray) -> Decision:
    """Turn one of [`ACTIONS`] per pair into a decision."""
    words = as_strings(actions, "actions", len(margins))
    known = pc.index_in(words, value_set=pa.array(ACTIONS))
    if known.null_count:
        wrong = words.filter(known.is_null())[0].as_py()
        raise ValueError(f"An action is {wrong!r}; give one of {', '.join(map(repr, ACTIONS))}.")
    codes = known.to_numpy()
    flip = codes == 1
    zeros = np.zeros(len(codes), dtype=np.int16)
    return Decision(flip, codes != 2, np.where(flip, -margins, margins), zeros, (reason,))


def contents_of(names: pa.Array, contents: pa.Table) -> dict[str, pa.Array]:
    """Look up [`CONTENT_COLUMNS`] of pairs in a table of contents; null where it has none."""
    positions, is_new = find(names, contents["pair_id"].combine_chunks())
    indices = pa.array(positions, mask=is_new)
    return {name: contents[name].combine_chunks().take(indices) for name in CONTENT_COLUMNS}


def has_changed(table: pa.Table, contents: pa.Table) -> np.ndarray:
    """Mark the pairs of a round whose content is another now, if both are known."""
    if not set(CONTENT_COLUMNS) <= set(table.column_names):
        return np.zeros(len(table), dtype=bool)
    now = contents_of(table["pair_id"].combine_chunks(), contents)
    # Null where either is; where an image could not be read, the texts decide.
    differs = [pc.not_equal(table[name], now[name]) for name in CONTENT_COLUMNS]
    return pc.fill_null(pc.coalesce(*differs), False).to_numpy()


def merge_rounds(tables: Iterable[tuple[int, pa.Table]], contents: pa.Table | None = None) -> pa.Table:
    """Merge numbered rounds, later overriding earlier, into `pair_id`, `flipped`, `kept`, `strength`, `entry` (the
    number, -1 where none counts) and, with `contents`, `changed` (the last round is about other content).
    """
    initial = {**_INITIAL, "entry": -1, **({} if contents is None else {"changed": False})}
    known = pa.array([], pa.string())
    values = {name: np.empty(0, dtype=np.asarray(value).dtype) for name, value in initial.items()}
    for number, table in tables:
        names = table["pair_id"].combine_chunks()
        positions, is_new = find(names, known)
        if is_new.any():
            positions[is_new] = len(known) + np.arange(is_new.sum())
            known = pa.concat_arrays([known, names.filter(pa.array(is_new))])
            values = {name: np.r_[value, np.full(is_new.sum(), initial[name])] for name, value in values.items()}
        if contents is not None:
            changed = has_changed(table, contents)
            values["changed"][positions] = changed
            if changed.any():
                positions, table = positions[~changed], table.filter(pa.array(~changed))
        values["flipped"][positions] = table["flipped"].to_numpy()
        values["kept"][positions] = pc.not_equal(table["action"].cast(pa.string()), "drop").to_numpy()
        values["strength"][positions] = table["strength"].to_numpy()
        values["entry"][positions] = number
    return pa.table({"pair_id": known, **{name: pa.array(value, from_pandas=True) for name, value in values.items()}})


def find(names: pa.Array, known: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each name among known, distinct names, 0 where it is new, and a mask of the new names."""
    if names.equals(known):  # as from round to round; no need to hash
        return np.arange(len(names)), np.zeros(len(names), dtype=bool)
    positions = pc.index_in(names, value_set=known)
    is_new = positions.is_null().to_numpy(zero_copy_only=False)
    return positions.fill_null(0).to_numpy().astype(np.int64), is_new


def state_of(names: pa.Array, state: pa.Table) -> dict[str, np.ndarray]:
    """Look up pairs in a state, as [`CurationLedger.labels`] does."""
    if not len(state):
        nothing = np.zeros(len(names), dtype=bool)
        initial = {name: np.full(len(names), value) for name, value in _INITIAL.items()}
        return {**initial, "is_known": nothing, "has_changed": nothing}
    positions, is_new = find(names, state["pair_id"].combine_chunks())
    changed = state["changed"].to_numpy()[positions] if "changed" in state.column_names else False
    return {
        **{name: np.where(is_new, value, state[name].to_numpy()[positions]) for name, value in _INITIAL.items()},
        "is_known": ~is_new & (state["round"].to_numpy()[positions] > 0),
        "has_changed": ~is_new & changed,
    }


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

    def add(self, record: dict[str, Any], key: tuple[int, str], table: pa.Table, about: Mapping[str, Any]) -> None:
        """Write a round: its table first, so that `ledger.json` never names a file that is not there."""
        round, stage = key
        attempt = sum(round_key(entry) == key for entry in record["rounds"]) + 1
        file = f"round-{round:05d}-{stage}{'' if attempt == 1 else f'.{attempt}'}.parquet"
        with whole_file(self.directory / file) as part:
            pq.write_table(table, part, use_dictionary=["source", "action", "reason"], compression="zstd")
            digest = _digest(part)
        self._trusted.add(digest)
        entry = {"round": round, "stage": stage, "file": file, "sha256": digest, "pairs": len(table), **about}
        record["rounds"].append(entry)
        self.write(record)

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

    def table(self, entry: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of a round, all by default."""
        return pq.read_table(self.verified(entry), columns=None if columns is None else list(columns))

    def state(self, record: dict[str, Any], numbers: Sequence[int], contents: pa.Table | None = None) -> pa.Table:
        """Merge some rounds of `record` into the table of [`CurationLedger.state`]."""

        def tables() -> Iterator[tuple[int, pa.Table]]:
            for number in numbers:
                entry = record["rounds"][number]
                columns = ["pair_id", "flipped", "action", "strength"]
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

        merged = merge_rounds(tables(), contents)
        entries = merged["entry"].to_numpy()
        # Entry -1, of which nothing counts, takes the last value.
        rounds = np.array([*(entry["round"] for entry in record["rounds"]), 0], dtype=np.int32)
        stages = np.array([*(entry["stage"] for entry in record["rounds"]), ""], dtype=object)
        columns = {name: merged[name] for name in ("pair_id", *_INITIAL)}
        columns |= {"round": pa.array(rounds[entries]), "stage": pa.array(stages[entries], pa.string())}
        return pa.table(columns if contents is None else {**columns, "changed": merged["changed"]})

    def has_contents(self, entry: dict[str, Any]) -> bool:
        """Tell a round that recorded the content of the pairs that it decided about."""
        return set(CONTENT_COLUMNS) <= set(pq.read_schema(self.verified(entry)).names)

    def contents(self, record: dict[str, Any], names: pa.Array) -> pa.Table:
        """Return what [`pair_contents`] did for pairs, by the last round that knows, undone rounds too."""
        last: dict[str, Sequence[str | None]] = dict.fromkeys(names.to_pylist(), (None, None))
        for entry in record["rounds"]:
            if self.has_contents(entry):
                table = self.table(entry, ["pair_id", *CONTENT_COLUMNS])
                table = table.filter(pc.is_in(table["pair_id"], value_set=names))
                for name, *hashes in zip(*(column.to_pylist() for column in table.columns), strict=True):
                    last[name] = hashes if any(hashes) else last[name]
        columns = {name: [hashes[place] for hashes in last.values()] for place, name in enumerate(CONTENT_COLUMNS)}
        schema = pa.schema([(name, pa.string()) for name in ("pair_id", *CONTENT_COLUMNS)])
        return pa.table({"pair_id": list(last), **columns}, schema=schema)


def standing_rounds(record: dict[str, Any]) -> list[int]:
    """Return the indices of the rounds that count, those of persons last."""
    undone: set[str] = set()
    for event in record["events"]:
        undone = (undone | set(event.get("undo", ()))) - set(event.get("redo", ()))
    standing = [number for number, entry in enumerate(record["rounds"]) if entry["file"] not in undone]
    return sorted(standing, key=lambda number: is_manual(record["rounds"][number]["stage"]))


def round_key(entry: Mapping[str, Any]) -> tuple[int, str]:
    """Return number and stage of a round."""
    return entry["round"], entry["stage"]


def is_manual(stage: str) -> bool:
    """Tell a stage in which a person decided."""
    return stage == MANUAL or stage.startswith(f"{MANUAL}-")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
