"""Style of pairs: chosen minus rejected, read from a data set batch by batch and without its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features

from ..data.columns import arrow_rows, column_of, find_json_columns, leave_images_encoded
from ..data.rows import SIDES, blocks, row_name
from .style import STYLE_FEATURES, style_features


_BATCH = 1000


@dataclass(frozen=True)
class PairStyle:
    """
    Style of N pairs in K features.

    Parameters:
        features (`tuple[str, ...]` of length K):
            Names.
        difference (`np.ndarray` of shape `(N, K)` and dtype `float64`):
            Chosen minus rejected.
        spread (`np.ndarray` of shape `(K,)`):
            Standard deviation of each feature among the answers, both sides pooled.
        weight (`np.ndarray` of shape `(N,)` and dtype `float64`):
            The column `weight`, with 1 where there is none.
        group (`np.ndarray` of shape `(N,)` and dtype `int64`):
            A number for each `group_id`; rows without one have a number of their own.
    """

    features: tuple[str, ...]
    difference: np.ndarray
    spread: np.ndarray
    weight: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.difference)

    def take(self, rows: np.ndarray) -> PairStyle:
        """Some of the pairs; `spread` stays that of all."""
        return PairStyle(self.features, self.difference[rows], self.spread, self.weight[rows], self.group[rows])


def read_pair_style(dataset: Dataset, features: Sequence[str] | None = None) -> PairStyle:
    """
    Reads the style of all pairs.

    An answer is the text of the last message of a side, and its question the text of the last user message before it.

    Args:
        dataset (`Dataset`):
            Preference rows, canonical or any others that TRL takes: with strings, or with whole conversations in
            `chosen` and `rejected`.
        features (`Sequence[str]`, *optional*):
            Which of `STYLE_FEATURES`; all by default.

    Returns:
        [`PairStyle`]

    Raises:
        `ValueError`: if the set is streamed or empty, if a feature is not known, or if a row has no answer or a weight
            that is no number >= 0.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"Style is measured on a whole set, not on a {type(dataset).__name__}; load it first.")
    if len(dataset) == 0:
        raise ValueError("The data set has no rows.")
    for side in SIDES:
        if side not in dataset.column_names:
            raise ValueError(f"The data set has no column `{side}`; see `trl_dt2it.data.load_preferences`.")
    names = STYLE_FEATURES if features is None else tuple(features)
    for name in names:
        if name not in STYLE_FEATURES:
            raise ValueError(f"`features` names {name!r}; the style features are {', '.join(STYLE_FEATURES)}.")
    if not names:
        raise ValueError("`features` is empty; name at least one, or leave it out for all.")
    columns = [STYLE_FEATURES.index(name) for name in names]
    difference = np.empty((len(dataset), len(names)))
    total, squares, done = np.zeros(len(names)), np.zeros(len(names)), 0
    for rows in _batches(dataset):
        answers = [_answer(row, side, done + place) for side in SIDES for place, row in enumerate(rows)]
        texts, prompts = zip(*answers, strict=True)
        style = style_features(texts, prompts)[:, columns]
        chosen, rejected = style[: len(rows)], style[len(rows) :]
        difference[done : done + len(rows)] = chosen - rejected
        total, squares = total + style.sum(0), squares + (style**2).sum(0)
        done += len(rows)
    mean = total / (2 * done)
    spread = np.sqrt(np.maximum(squares / (2 * done) - mean**2, 0.0))
    return PairStyle(names, difference, spread, read_weight(dataset), read_groups(dataset))


def read_weight(dataset: Dataset) -> np.ndarray:
    """The column `weight` as fp64, with 1 where there is none. One that is no number >= 0 is a `ValueError`."""
    if "weight" not in dataset.column_names:
        return np.ones(len(dataset))
    weight = column_of(dataset, "weight").cast("float64").fill_null(1.0).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(bad):
        raise ValueError(f"Row {bad[0]} has the `weight` {weight[bad[0]]}; give a finite number that is not negative.")
    if not weight.any():
        raise ValueError("The column `weight` is 0 in every row.")
    return weight


def read_groups(dataset: Dataset) -> np.ndarray:
    """A number for each row's `group_id`; rows without one have a number of their own."""
    count = len(dataset)
    if "group_id" not in dataset.column_names:
        return np.arange(count)
    encoded = column_of(dataset, "group_id").dictionary_encode()
    group = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone = np.flatnonzero(group < 0)
    group[alone] = len(encoded.dictionary) + np.arange(len(alone))
    return group


def parts_by(dataset: Dataset, column: str | None) -> dict[str, np.ndarray]:
    """
    Rows by the values of a column.

    Args:
        dataset (`Dataset`):
            The data set.
        column (`str`, *optional*):
            A column of strings or numbers; rows where it is `None` go by the name "None".

    Returns:
        `dict[str, np.ndarray]`: row indices of each value, sorted by value; empty without a column.

    Raises:
        `ValueError`: if there is no such column.
    """
    if column is None:
        return {}
    if column not in dataset.column_names:
        raise ValueError(f"`by` is {column!r}, but the columns are {', '.join(dataset.column_names)}.")
    encoded = column_of(dataset, column).dictionary_encode()
    codes = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)
    names = [str(name) for name in [*encoded.dictionary.to_pylist(), None]]
    parts = {name: np.flatnonzero(codes == code) for code, name in enumerate(names)}
    return {name: parts[name] for name in sorted(parts) if len(parts[name])}


def with_column(dataset: Dataset, name: str, values: Any) -> Dataset:
    """
    A data set with a column set or replaced, images untouched.

    Args:
        dataset (`Dataset`):
            The data set. Rows that were selected one by one are written anew, into the cache or into memory, as
            `Dataset.add_column` does; but images stay as they are encoded.
        name (`str`):
            The column. One that is there keeps its place.
        values (`list` or `np.ndarray`):
            A value for each row.

    Returns:
        `Dataset`
    """
    features = dataset.features
    order = [*features] if name in features else [*features, name]
    if dataset._indices is not None:
        dataset = leave_images_encoded(dataset).flatten_indices()
    if name in features:
        dataset = dataset.remove_columns(name)
    dataset = dataset.add_column(name, values)
    dataset = dataset.select_columns(order)
    kept = {one: features[one] for one in order if one != name}
    dataset.info.features = Features({**dataset.features, **kept})
    return dataset


def _batches(dataset: Dataset):
    columns = [name for name in ("prompt", *SIDES) if name in dataset.column_names]
    texts = dataset.with_format(None).select_columns(columns)
    coded = find_json_columns(texts.features)
    for table in texts.with_format("arrow").iter(_BATCH):
        yield list(arrow_rows(table, coded))


def _answer(row: Mapping[str, Any], side: str, index: int) -> tuple[str, str]:
    """Text of the answer, and of the question."""
    given, prompt = row[side], row.get("prompt")
    if isinstance(given, str):
        return given, prompt if isinstance(prompt, str) else ""
    if not given:
        raise ValueError(
            f"{row_name(row, index)}: `{side}` is missing; `trl_dt2it.data.validate` quarantines such rows."
        )
    earlier = prompt if isinstance(prompt, list) else given[:-1]
    question = next((message for message in reversed(earlier) if message["role"] == "user"), None)
    return _text(given[-1]), "" if question is None else _text(question)


def _text(message: Mapping[str, Any]) -> str:
    return "".join(block.get("text") or "" for block in blocks(message))
