"""Looking at all rows of a data set as Python objects, a few at a time: each may hold images of some megabytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Json
from datasets.fingerprint import generate_random_fingerprint

from .encoded import rows_at_once


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


def look_at_all(
    dataset: Dataset,
    function: Callable[..., pa.Table],
    features: Features,
    *,
    num_proc: int | None,
    desc: str,
    with_indices: bool = False,
    **kwargs: Any,
) -> pa.Table:
    """
    What a function finds in the rows of a data set, anew at every call: files that paths point to may change.

    Args:
        dataset (`Dataset`):
            The data set.
        function (`Callable`):
            Takes part of it as an Arrow table (and the places of its rows), `json_columns` for [`arrow_rows`] and
            `kwargs`, and gives a table of as many rows.
        features (`Features`):
            Columns of what it gives.
        num_proc (`int`, *optional*):
            Number of processes.
        desc (`str`):
            What the progress bar says.
        with_indices (`bool`, *optional*, defaults to `False`):
            Whether the function takes places.
        kwargs:
            Further arguments of the function.

    Returns:
        `pa.Table`: one row for each row of the data set.
    """
    if len(dataset) == 0:
        return features.arrow_schema.empty_table()
    found = dataset.with_format("arrow").map(
        function,
        with_indices=with_indices,
        batched=True,
        batch_size=rows_at_once(dataset),
        writer_batch_size=10_000,
        remove_columns=dataset.column_names,
        features=features,
        fn_kwargs={**kwargs, "json_columns": find_json_columns(dataset.features)},
        num_proc=num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=generate_random_fingerprint(),  # hashing a processor would be slow
        desc=desc,
    )
    return found.with_format("arrow")[:]


def find_json_columns(features: Features) -> Features:
    """The columns that Arrow holds as JSON text, as a whole or in part."""
    return Features({name: feature for name, feature in features.items() if _holds_json(feature)})


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    return isinstance(feature, Json) or _holds_json(getattr(feature, "feature", {}))
