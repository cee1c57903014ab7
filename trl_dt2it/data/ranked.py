"""Ranked prompts: rows of a prompt with several answers, and the pairs that their scores or ranks make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers.utils import logging

from ..utils import check_value
from .columns import as_python, has_transform
from .mixing import with_columns
from .rows import (
    ANSWERS,
    RANKS,
    SCORES,
    RowError,
    answer_scores,
    differ_for_any_tokenizer,
    marked,
    message_text,
    named_errors,
    row_name,
    summarize,
    text_message,
    to_json,
    without_empty,
)


logger = logging.get_logger(__name__)

AnySet = TypeVar("AnySet", Dataset, IterableDataset)
How = Literal["all", "adjacent", "best_vs_rest"]

_OF_ANSWERS = (ANSWERS, SCORES, RANKS)
_WAYS = ("all", "adjacent", "best_vs_rest")


class RankedPair(NamedTuple):
    """Two answers of a prompt, by their index, and how much better the first is."""

    chosen: int
    rejected: int
    gap: float


def to_pairs(dataset: AnySet, how: How = "all", *, min_gap: float = 0.0, ties: bool = False) -> AnySet:
    """
    Make preference pairs of ranked prompts.

    Prompts and images are not copied: the pairs are views of the rows. Pairs of a prompt are neighbors, from the best
    answer down.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows with `completions`, a list of answers (strings, or lists of messages), and either `scores`, a number
            for each, of which higher is better, or `ranks`, of which 1 is best; equal ones are ties, and an answer
            with `None` is left out. All other columns, such as `prompt` and `images`, are those of pairs.
        how (`str`, *optional*, defaults to `"all"`):
            `"all"`: every two answers; `"adjacent"`: those next to each other in the ranking; `"best_vs_rest"`: the
            best answer and each of the others.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Least difference of scores, or of ranks, of a pair.
        ties (`bool`, *optional*, defaults to `False`):
            Whether answers that are tied make a pair too, of strength 0, for the losses `btt` and `ordinal`.

    Returns:
        The same kind of set, with `chosen` and `rejected`; `strength`, their difference of scores, or of ranks;
        `pair_id`, `<row>:<index of chosen>><index of rejected>`; and `group_id`, by default the name of the row.

    Raises:
        [`~trl_dt2it.data.rows.RowError`]: `bad_rating`, if a row has under two answers, or not one score or rank for
        each; the message names the row.
        `ValueError`: if a column is missing, `how` is unknown, or no pair is left.
    """
    check_value("`how`", how, how in _WAYS, f"choose one of {', '.join(_WAYS)}")
    check_value("`min_gap`", min_gap, min_gap >= 0, "give a difference of at least 0")
    if isinstance(dataset, IterableDataset):
        return _stream_pairs(dataset, how, min_gap, ties)
    names = dataset.column_names
    if missing := _missing(names):
        raise ValueError(f"The data set has no column {missing}; ranked prompts need it.")
    rows, counts = _readable(dataset), Counter[str]()
    read = rows.select_columns([name for name in (*_OF_ANSWERS, "pair_id", "group_id", "prompt") if name in names])
    made = [(i, pair) for i, row in enumerate(read) for pair in _pairs_of(row, i, how, min_gap, ties, counts)]
    if not made:
        raise ValueError(f"No pair can be made of {len(rows):,} ranked prompts ({summarize(+counts) or 'empty set'}).")
    logger.info(f"{len(made):,} pairs of {len(rows):,} ranked prompts; left out: {summarize(+counts) or 'none'}.")
    return _views(rows, made)


def cover_answers(dataset: Dataset) -> tuple[Dataset | None, list[list[tuple[int, int]]]]:
    """Make as few pairs of ranked prompts as hold all of their answers, `None` if there are none, and return the pair
    and the side, 0 or 1, at which each answer of each prompt is."""
    rows, made = _readable(dataset), list[tuple[int, dict[str, Any]]]()
    places: list[list[tuple[int, int]]] = []
    names = [name for name in (ANSWERS, "pair_id", "group_id", "prompt") if name in rows.column_names]
    for index, row in enumerate(rows.select_columns(names)):
        first: dict[str, int] = {}  # of equal answers
        with named_errors(row, index):
            answers = row[ANSWERS]
            if not isinstance(answers, list) or not all(isinstance(one, str) or _is_messages(one) for one in answers):
                raise RowError("not_conversational", f"`{ANSWERS}` is no list of texts or of messages; give one.")
            keys = [to_json(without_empty(answer)) for answer in answers]
            for number, key in enumerate(keys):
                first.setdefault(key, number)
            left, at = list(first.values()), dict[int, tuple[int, int]]()
            while left:
                one = left.pop(0)
                # Beside an answer that is alone, or almost equal to the next, the same with a mark.
                is_clear = bool(left) and differ_for_any_tokenizer(_text(answers[one]), _text(answers[left[0]]))
                other = left.pop(0) if is_clear else None
                at[one] = len(made), 0
                if other is not None:
                    at[other] = len(made), 1
                sides = [answers[one], marked(answers[one], ".") if other is None else answers[other]]
                made.append((index, _pair(row, index, sides, f"{one}>{'' if other is None else other}")))
        places.append([at[first[key]] for key in keys])
    return (_views(rows, made) if made else None), places


def _readable(dataset: Dataset) -> Dataset:
    if has_transform(dataset):
        raise ValueError("The data set has a transform, through which pairs are not found; take it off, or apply it.")
    return as_python(dataset)


def _is_messages(answer: Any) -> bool:
    return isinstance(answer, list) and bool(answer) and all(isinstance(message, Mapping) for message in answer)


def _pair(row: Mapping[str, Any], index: int | None, sides: Sequence[Any], which: str) -> dict[str, Any]:
    """Return the columns of two answers of a row."""
    name = row.get("pair_id") or (f"row {index}" if index is not None else row_name(row))
    if isinstance(sides[0], str) and not isinstance(row.get("prompt"), str):
        sides = [[text_message("assistant", side)] for side in sides]
    names = {"pair_id": f"{name}:{which}", "group_id": row.get("group_id") or name}
    return {"chosen": sides[0], "rejected": sides[1], **names}


def _views(rows: Dataset, made: Sequence[tuple[int, dict[str, Any]]]) -> Dataset:
    """Return pairs in the order of their rows, given by index, as views of these."""
    # The n-th pairs of all rows are a set of their own, which shares the rows' images.
    parts: list[list[tuple[int, dict[str, Any]]]] = []
    seen = Counter[int]()
    for index, pair in made:
        if seen[index] == len(parts):
            parts.append([])
        parts[seen[index]].append((index, pair))
        seen[index] += 1
    kept = rows.remove_columns([name for name in _OF_ANSWERS if name in rows.column_names])
    sets = [_beside(kept.select([index for index, _ in part]), [pair for _, pair in part]) for part in parts]
    order = np.argsort(np.concatenate([[index for index, _ in part] for part in parts]), kind="stable")
    return concatenate_datasets(sets).select(order)


def rank_pairs(order: list[float | None], how: How, min_gap: float, ties: bool) -> list[RankedPair]:
    """Return the pairs of answers with these numbers, of which higher is better, from the best down."""
    numbers = {index: number for index, number in enumerate(order) if number is not None}
    levels = sorted(set(numbers.values()), reverse=True)
    level = {index: levels.index(number) for index, number in numbers.items()}
    found = []
    for one, other in combinations(sorted(numbers, key=level.__getitem__), 2):
        gap, steps = numbers[one] - numbers[other], level[other] - level[one]
        is_wanted = {"all": True, "adjacent": steps <= 1, "best_vs_rest": level[one] == 0}[how]
        if is_wanted and (gap >= min_gap if steps else ties):
            found.append(RankedPair(one, other, gap))
    return found


def compare_answers(dataset: Dataset, rewards: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the difference of rewards, given in a column, of every two answers whose scores differ; none
    where the rows have no scores."""
    numbers = [name for name in (SCORES, RANKS) if name in dataset.column_names]
    if not numbers:
        return np.empty(0, dtype=np.int64), np.empty(0)
    found = [
        (index, row[rewards][pair.chosen] - row[rewards][pair.rejected])
        for index, row in enumerate(dataset.select_columns([ANSWERS, rewards, *numbers]))
        for pair in rank_pairs(answer_scores(row), "all", 0.0, False)
    ]
    rows, gaps = np.array(found).reshape(-1, 2).T
    return rows.astype(np.int64), gaps


def _pairs_of(
    row: Mapping[str, Any], index: int | None, how: How, min_gap: float, ties: bool, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the columns of the pairs of a row, and count answers and pairs that are left out."""
    with named_errors(row, index):
        order = answer_scores(row)
    answers = row[ANSWERS]
    counts["unscored answers"] += order.count(None)
    made = 0
    for pair in rank_pairs(order, how, min_gap, ties):
        sides = [answers[side] for side in pair[:2]]
        if _text(sides[0]) == _text(sides[1]):
            counts["pairs of equal answers"] += 1
            continue
        made += 1
        yield {**_pair(row, index, sides, f"{pair.chosen}>{pair.rejected}"), "strength": pair.gap}
    counts["prompts without a pair"] += not made


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else "\n".join(map(message_text, answer))


def _missing(names: Any) -> str | None:
    if ANSWERS not in names:
        return f"`{ANSWERS}`"
    return None if SCORES in names or RANKS in names else f"`{SCORES}` or `{RANKS}`"


def _beside(rows: Dataset, pairs: list[dict[str, Any]]) -> Dataset:
    """Set the columns of a pair for each row."""
    return with_columns(rows, {name: pa.array([pair[name] for pair in pairs]) for name in pairs[0]})


def _stream_pairs(dataset: IterableDataset, how: How, min_gap: float, ties: bool) -> IterableDataset:
    def explode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        if missing := _missing(batch):
            raise ValueError(f"The data set has no column {missing}; ranked prompts need it.")
        made: dict[str, list[Any]] = {}
        for number, index in enumerate(indices):
            row = {name: values[number] for name, values in batch.items()}
            kept = {name: value for name, value in row.items() if name not in _OF_ANSWERS}
            for pair in _pairs_of(row, index, how, min_gap, ties, Counter()):
                for name, value in {**kept, **pair}.items():
                    made.setdefault(name, []).append(value)
        return made

    return dataset.map(explode, batched=True, batch_size=16, with_indices=True, remove_columns=list(_OF_ANSWERS))
