"""What a round of the ledger says, as an Arrow table; and what several rounds together say of each pair.

Columns of a round: `pair_id`, `source`, `was_flipped` (the orientation in which the pair was scored, against the
source set), `flipped` (the orientation after the round), `action`, `reason`, `strength` (after the round), then
`chosen_0`, `rejected_0`, ... (rewards of each model, in the orientation in which they were given) and `vote_0_0`,
`vote_0_1`, `vote_1_0`, ... (votes of each judge in both orders). Where the round was told what it decides about, there
are `content` and `content_text` too, hashes of the pair as its source labels it, from [`pair_contents`].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..data.contents import CONTENT_COLUMNS
from .deciding import Decision
from .votes import UNREADABLE


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
    distinct."""
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
    not be read, then or now; what is not known has not changed."""
    if contents is None or not set(CONTENT_COLUMNS) <= set(table.column_names):
        return np.zeros(len(table), dtype=bool)
    now = contents_of(table["pair_id"].combine_chunks(), contents)
    differs = [pc.not_equal(table[name], now[name]) for name in CONTENT_COLUMNS]  # null where one of them is
    return pc.fill_null(pc.coalesce(*differs), False).to_numpy()


def merge_rounds(tables: Iterable[tuple[int, pa.Table]], contents: pa.Table | None = None) -> pa.Table:
    """Return the last word on every pair, of numbered rounds, the last word last: `pair_id` in order of appearance,
    `flipped`, `kept`, `strength`, `entry`, the number of the round, -1 where nothing that was said counts, and with
    `contents` `changed`, where the last word is about other content, which does not count."""
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
