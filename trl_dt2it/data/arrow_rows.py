"""Looking at all rows of a data set as Python objects, a few at a time: each may hold images of some megabytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Json
from datasets.fingerprint import generate_random_fingerprint

from .encoded import rows_at_once


_SLICE = 20


def arrow_rows(table: pa.Table, json_columns: Features) -> Iterator[dict[str, Any]]:
    """Rows of a table of a data set in the format "arrow", images as bytes and paths; `json_columns` come from
    [`find_json_columns`]."""
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
    """Collect what a function finds in the rows of a data set, anew at every call: files that paths point to may
    change. It takes part of the set as an Arrow table (and the places of its rows), `json_columns` for [`arrow_rows`]
    and `kwargs`, and gives a table of as many rows with the columns `features`."""
    return _map_anew(
        dataset.with_format("arrow"),
        function,
        features,
        with_indices=with_indices,
        batched=True,
        batch_size=rows_at_once(dataset),
        writer_batch_size=10_000,
        fn_kwargs={**kwargs, "json_columns": find_json_columns(dataset.features)},
        num_proc=num_proc,
        desc=desc,
    )


def look_at_rows(
    dataset: Dataset,
    function: Callable[[Mapping[str, Any]], dict[str, Any]],
    features: Features,
    *,
    num_proc: int | None,
    desc: str,
) -> pa.Table:
    """Look as [`look_at_all`] does, but a row at a time and as the data set gives it, through a transform of the
    user's."""
    return _map_anew(dataset, function, features, num_proc=num_proc, desc=desc)


def _map_anew(dataset: Dataset, function: Callable[..., Any], features: Features, **options: Any) -> pa.Table:
    """Map a data set to columns of its own without a cache, neither read nor written."""
    if len(dataset) == 0:
        return features.arrow_schema.empty_table()
    found = dataset.map(
        function,
        remove_columns=dataset.column_names,
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=generate_random_fingerprint(),  # hashing a processor would be slow
        **options,
    )
    return found.with_format("arrow")[:]


def look_in_shares(dataset: Dataset, look: Callable[..., pa.Table], *, num_proc: int | None) -> pa.Table:
    """Look at a data set of which each process of a launch takes its share, and join what they find, in the order of
    the rows. Every process must call it; what one raises, all raise. `look` takes a part and `num_proc`, and waits for
    no other process."""
    state = PartialState()
    if state.num_processes == 1:
        return look(dataset, num_proc=num_proc)
    if num_proc is not None:
        num_proc = max(1, num_proc // int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)))
    first, last = (
        len(dataset) * number // state.num_processes for number in (state.process_index, state.process_index + 1)
    )
    hides = not state.is_main_process and not datasets.are_progress_bars_disabled()
    found, failure = None, None
    if hides:
        datasets.disable_progress_bars()
    try:
        found = look(dataset.select(range(first, last)), num_proc=num_proc)
    except Exception as error:  # the others wait for this process
        failure = error
    finally:
        if hides:
            datasets.enable_progress_bars()
    outcomes = gather_object([(found, failure and f"{failure}")])
    if failure is not None:
        raise failure
    for _, problem in outcomes:
        if problem is not None:
            raise ValueError(problem)
    return pa.concat_tables([table for table, _ in outcomes])


def find_json_columns(features: Features) -> Features:
    """The columns that Arrow holds as JSON text, as a whole or in part."""
    return Features({name: feature for name, feature in features.items() if _holds_json(feature)})


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    return isinstance(feature, Json) or _holds_json(getattr(feature, "feature", {}))
