"""Raw rows of sources whose pairs are formed from several rows: which rows make a group."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .encoded import column_of
from .reading import JSON_COLUMN


def rows_by_group(raw: Dataset, column: str) -> list[np.ndarray]:
    """
    Which rows make a group.

    Args:
        raw (`Dataset`):
            Rows as [`read_raw`] gives them.
        column (`str`):
            Column whose equal values make a group.

    Returns:
        `list[np.ndarray]`: row indices of each group, groups in the order of their first rows. A row without a value
        is a group of its own, of which the adapter says what is wrong.

    Raises:
        `ValueError`: if there is no such column.
    """
    if JSON_COLUMN in raw.column_names:
        keys = pa.array([_key(text.as_py(), column) for text in column_of(raw, JSON_COLUMN)], pa.string())
    elif column in raw.column_names:
        keys = column_of(raw, column)
    else:
        raise ValueError(f"The rows have no column `{column}`, by which pairs are formed from several of them.")
    groups: dict[object, list[int]] = {}
    for index, key in enumerate(keys.to_pylist()):
        groups.setdefault(index if key in (None, "") else (key,), []).append(index)
    return [np.array(indices) for indices in groups.values()]


def _key(text: str, column: str) -> str | None:
    try:
        value = json.loads(text)[column]
    except (ValueError, KeyError, TypeError):
        return None
    return None if value is None else str(value)
