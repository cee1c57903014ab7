"""Raw rows of sources whose pairs are formed from several rows: which rows make a group."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .encoded import column_of, group_codes, group_rows
from .sources.source import JSON_COLUMN


def rows_by_group(raw: Dataset, column: str) -> list[np.ndarray]:
    """Rows of each group of equal values in a column, groups in the order of their first rows; a row without a value
    is a group of its own, of which the adapter says what is wrong."""
    if JSON_COLUMN in raw.column_names:
        keys = pa.array([_key(text.as_py(), column) for text in column_of(raw, JSON_COLUMN)], pa.string())
    elif column in raw.column_names:
        keys = column_of(raw, column)
    else:
        raise ValueError(f"The rows have no column `{column}`, by which pairs are formed from several of them.")
    return named_groups(keys)


def named_groups(names: pa.Array) -> list[np.ndarray]:
    """Rows of each group in the order of its first row; those without a name are groups by themselves."""
    if pa.types.is_string(names.type) or pa.types.is_large_string(names.type):
        names = pc.if_else(pc.equal(names, ""), None, names)
    return sorted(group_rows(group_codes(names)[0]), key=lambda rows: rows[0]) if len(names) else []


def _key(text: str, column: str) -> str | None:
    try:
        value = json.loads(text)[column]
    except (ValueError, KeyError, TypeError):
        return None
    return None if value is None else str(value)
