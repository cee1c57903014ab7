"""Rows of an Arrow table as Python objects, a few at a time, because each may hold images of some megabytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Features, Json


_SLICE = 20


def arrow_rows(table: pa.Table, json_columns: Features) -> Iterator[dict[str, Any]]:
    """
    The rows of a table, images as bytes and paths.

    Args:
        table (`pa.Table`):
            Part of a data set in the format "arrow".
        json_columns (`Features`):
            What [`find_json_columns`] gave for the data set.

    Yields:
        `dict`: a row.
    """
    coded = Features({name: feature for name, feature in json_columns.items() if name in table.column_names})
    for start in range(0, len(table), _SLICE):
        for row in table.slice(start, _SLICE).to_pylist():
            if coded:
                row.update(coded.decode_example({name: row[name] for name in coded}))
            yield row


def find_json_columns(features: Features) -> Features:
    """The columns that Arrow holds as JSON text, as a whole or in part."""
    return Features({name: feature for name, feature in features.items() if _holds_json(feature)})


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    return isinstance(feature, Json) or _holds_json(getattr(feature, "feature", {}))
