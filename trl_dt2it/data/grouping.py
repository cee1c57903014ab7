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
        `list[np.ndarray]`: row indices of each group, groups in the order of their first rows.

    Raises:
        `ValueError`: if there is no such column.
    """
    if JSON_COLUMN in raw.column_names:
        keys = pa.array([_key(text.as_py(), column) for text in column_of(raw, JSON_COLUMN)])
    elif column in raw.column_names:
        keys = column_of(raw, column)
    else:
        raise ValueError(f"The rows have no column `{column}`, by which pairs are formed from several of them.")
    codes = keys.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def _key(text: str, column: str) -> str:
    try:
        return str(json.loads(text)[column])
    except (ValueError, KeyError, TypeError):
        return ""  # the adapter says what is wrong with such rows
