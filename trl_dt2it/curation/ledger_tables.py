"""Tables and files of the ledger, and the set that they make of the source. Private to the ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from transformers.utils import logging

from ..data.columns import column_of
from ..data.contents import CONTENT_COLUMNS, FLIPPED, pair_ids
from ..data.mixing import swap_pairs, with_columns
from ..utils import read_json, whole_file, write_json
from .rules import UNREADABLE, Decision


ACTIONS = ("keep", "flip", "drop")

STATE_COLUMNS = ("pair_id", "flipped", "action", "strength")

# What nothing is known of is as the source set has it.
_BEGINNING = {"flipped": False, "kept": True, "strength": np.nan}


def as_names(names: Any, what: str, count: int | None = None) -> pa.Array:
    """Return strings as one Arrow array; `what` names the argument in messages."""
    column = names if isinstance(names, (pa.Array, pa.ChunkedArray)) else pa.array(names, from_pandas=True)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if count is not None and len(column) != count:
        raise ValueError(f"There are {count} pairs and {len(column)} entries of `{what}`; give one per pair.")
    return column.cast(pa.string())


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
    """Return the table of a round about N pairs; a `ValueError` says which shape is wrong or which name is not
    distinct.
    """
    count = len(pair_ids)
    if len(decision) != count:
        raise ValueError(f"There are {count} pairs and a decision about {len(decision)}; give one per pair.")
    if pair_ids.null_count or (distinct := pc.count_distinct(pair_ids).as_py()) < count:
        problem = "is missing" if pair_ids.null_count else f"is there twice ({distinct} of {count} are distinct)"
        raise ValueError(f"A pair's name {problem}; take the names that `pair_ids` gives for the data set.")
    codes = np.where(decision.keep, np.where(decision.flip, 1, 0), 2).astype(np.int8)
    columns = {
        "pair_id": pair_ids,
        "source": pa.nulls(count, pa.string()) if sources is None else sources,
        "was_flipped": pa.array(was_flipped),
        "flipped": pa.array(was_flipped ^ decision.flip),
        "action": pa.DictionaryArray.from_arrays(codes, list(ACTIONS)),
        "reason": pa.DictionaryArray.from_arrays(decision.reason_code, list(decision.reason_names)),
        "strength": pa.array(np.asarray(strength, dtype=np.float64), from_pandas=True),
    }
    columns["source"] = columns["source"].dictionary_encode()
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
        missing = np.isnan(votes) if votes.dtype.kind == "f" else votes == UNREADABLE
        signs = np.where(missing, 0, votes).astype(np.int8)
        for judge in range(votes.shape[1]):
            for order in range(2):
                columns[f"vote_{judge}_{order}"] = pa.array(signs[:, judge, order], mask=missing[:, judge, order])
    return pa.table(columns)


def decision_of(actions: Sequence[str] | pa.Array, reason: str, strength: np.ndarray) -> Decision:
    """Turn a word for each pair, one of [`ACTIONS`], into a decision."""
    words = as_names(actions, "actions", len(strength))
    known = pc.index_in(words, value_set=pa.array(ACTIONS))
    if known.null_count:
        wrong = words.filter(known.is_null())[0].as_py()
        raise ValueError(f"An action is {wrong!r}; give one of {', '.join(map(repr, ACTIONS))}.")
    codes = known.to_numpy()
    flip = codes == 1
    zeros = np.zeros(len(codes), dtype=np.int16)
    return Decision(flip, codes != 2, np.where(flip, -strength, strength), zeros, (reason,))


def contents_of(names: pa.Array, contents: pa.Table) -> dict[str, pa.Array]:
    """Return [`CONTENT_COLUMNS`] of pairs, from what is known of them and of others; null where nothing is."""
    places, is_new = find(names, contents["pair_id"].combine_chunks())
    indices = pa.array(places, mask=is_new)
    return {name: contents[name].combine_chunks().take(indices) for name in CONTENT_COLUMNS}


def has_changed(table: pa.Table, contents: pa.Table | None) -> np.ndarray:
    """Tell the pairs of a round that are no longer what it decided about, by their texts alone where an image could
    not be read, then or now; what is not known has not changed.
    """
    if contents is None or not set(CONTENT_COLUMNS) <= set(table.column_names):
        return np.zeros(len(table), dtype=bool)
    now = contents_of(table["pair_id"].combine_chunks(), contents)
    differs = [pc.not_equal(table[name], now[name]) for name in CONTENT_COLUMNS]  # null where one of them is
    return pc.fill_null(pc.coalesce(*differs), False).to_numpy()


def merge_rounds(tables: Iterable[tuple[int, pa.Table]], contents: pa.Table | None = None) -> pa.Table:
    """Return the last word on every pair, of numbered rounds, the last word last: `pair_id` in order of appearance,
    `flipped`, `kept`, `strength`, `entry`, the number of the round, -1 where nothing that was said counts, and with
    `contents` `changed`, where the last word is about other content, which does not count.
    """
    beginning = {**_BEGINNING, "entry": -1, **({} if contents is None else {"changed": False})}
    known = pa.array([], pa.string())
    values = {name: np.empty(0, dtype=np.asarray(value).dtype) for name, value in beginning.items()}
    for number, table in tables:
        names = table["pair_id"].combine_chunks()
        places, is_new = find(names, known)
        if is_new.any():
            places[is_new] = len(known) + np.arange(is_new.sum())
            known = pa.concat_arrays([known, names.filter(pa.array(is_new))])
            fresh = len(known) - len(values["kept"])
            values = {name: np.r_[value, np.full(fresh, beginning[name])] for name, value in values.items()}
        if contents is not None:
            changed = has_changed(table, contents)
            values["changed"][places] = changed
            if changed.any():
                places, table = places[~changed], table.filter(pa.array(~changed))
        values["flipped"][places] = table["flipped"].to_numpy()
        values["kept"][places] = pc.not_equal(table["action"].cast(pa.string()), "drop").to_numpy()
        values["strength"][places] = table["strength"].to_numpy()
        values["entry"][places] = number
    return pa.table({"pair_id": known, **{name: pa.array(value, from_pandas=True) for name, value in values.items()}})


def find(names: pa.Array, known: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each name among known, distinct ones, 0 where there is none, and a mask of these."""
    if names.equals(known):  # as from round to round; no need to hash
        return np.arange(len(names)), np.zeros(len(names), dtype=bool)
    found = pc.index_in(names, value_set=known)
    is_new = found.is_null().to_numpy(zero_copy_only=False)
    return found.fill_null(0).to_numpy().astype(np.int64), is_new.copy()


def state_of(names: pa.Array, state: pa.Table) -> dict[str, np.ndarray]:
    """Return what a state says of pairs, as [`CurationLedger.labels`] does."""
    if not len(state):
        known = {name: np.full(len(names), value) for name, value in _BEGINNING.items()}
        return {**known, **dict.fromkeys(("is_known", "has_changed"), np.zeros(len(names), dtype=bool))}
    places, is_new = find(names, state["pair_id"].combine_chunks())
    values = {name: state[name].to_numpy()[places] for name in _BEGINNING}
    known = {name: np.where(is_new, _BEGINNING[name], value) for name, value in values.items()}
    changed = state["changed"].to_numpy()[places] & ~is_new if "changed" in state.column_names else is_new & False
    last = state["entry" if "entry" in state.column_names else "round"].to_numpy()[places]
    is_nothing = changed & (last == (-1 if "entry" in state.column_names else 0))
    return {**known, "is_known": ~is_new & ~is_nothing, "has_changed": changed}


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
        there.
        """
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


def apply_state(
    dataset: Dataset, state: pa.Table, *, refresh_strength: bool = False, num_proc: int | None = None
) -> Dataset:
    """Swap the pairs that a state flips and leave out those that it drops; refuse rows of which it knows none."""
    names = pair_ids(dataset, num_proc=num_proc)
    known = state_of(names, state)
    spoken = known["is_known"]
    if len(state) and len(names) and not (spoken | known["has_changed"]).any():
        raise ValueError(
            f"The ledger speaks of {len(state):,} pairs and of none of these {len(names):,} rows, "
            f"{names[0].as_py()!r} the first; apply it to the set that was scored."
        )
    now = np.zeros(len(dataset), dtype=bool)
    if FLIPPED in dataset.column_names:
        now = column_of(dataset, FLIPPED).fill_null(False).to_numpy(zero_copy_only=False)
    wanted = np.where(spoken, known["flipped"], now)
    warn_of_changes(names, known["has_changed"])
    columns = {"pair_id": names, FLIPPED: pa.array(wanted)}
    if refresh_strength:
        given = np.full(len(dataset), np.nan)
        if "strength" in dataset.column_names:
            given = column_of(dataset, "strength").cast(pa.float64()).to_numpy(zero_copy_only=False)
        new = np.maximum(known["strength"], 0.0)
        columns["strength"] = pa.array(np.where(np.isnan(new), given, new), from_pandas=True)
    rows = np.flatnonzero(known["kept"])
    logger.info(
        f"Of {len(dataset):,} pairs, the ledger speaks of {spoken.sum():,}, flips "
        f"{(wanted & known['kept']).sum():,} and drops {len(dataset) - len(rows):,}."
    )
    return swap_pairs(with_columns(dataset, columns), wanted != now, rows if len(rows) < len(dataset) else None)


def warn_of_changes(names: pa.Array, has_changed: np.ndarray) -> None:
    """Warn of pairs that are no longer what was decided about."""
    rows = np.flatnonzero(has_changed)
    if len(rows):
        logger.warning(
            f"{len(rows):,} of {len(names):,} pairs, {names[int(rows[0])].as_py()!r} the first, have another prompt, "
            "other answers (edited or swapped) or other images than when the ledger decided about them; this is not "
            "applied to them. Put the rows back, or decide anew: score them and append a round."
        )
