"""Arrow columns read and written without decoding an image."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import datasets
import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Image, IterableDataset, Json, LargeList, List, Value
from datasets.fingerprint import generate_random_fingerprint


_SLICE = 20


def arrow_rows(table: pa.Table, json_columns: Features) -> Iterator[dict[str, Any]]:
    """Rows of a table of a data set in the format "arrow", images as bytes and paths; `json_columns` come from
    [`find_json_columns`].
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
    """Collect what a function finds in the rows of a data set, anew at every call: files that paths point to may
    change. It takes part of the set as an Arrow table (and the places of its rows), `json_columns` for [`arrow_rows`]
    and `kwargs`, and gives a table of as many rows with the columns `features`.
    """
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
    user's.
    """
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
    no other process.
    """
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


AnyDataset: TypeAlias = Dataset | IterableDataset

Data = TypeVar("Data", Dataset, IterableDataset)

_MESSAGES = ("prompt", "chosen", "rejected")  # which are strings in some sets and cannot be joined with messages


def has_transform(dataset: AnyDataset) -> bool:
    """Whether a function of the user's makes the rows, given to `with_transform` or `set_transform`."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def as_python(dataset: AnyDataset) -> AnyDataset:
    """Makes rows hold plain Python values instead of tensors or arrays, and only the columns that they show.

    A transform stays: it makes the rows.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if has_transform(dataset):
        return dataset
    shown = dataset.format["columns"]
    if dataset.format["type"] is not None:
        shown = dataset.column_names if dataset.format["output_all_columns"] else shown
        dataset = dataset.with_format(None)
    return dataset if set(shown) == set(dataset.column_names) else dataset.with_format(None).select_columns(shown)


def leave_images_encoded(dataset: AnyDataset) -> AnyDataset:
    """Makes rows hold bytes and paths instead of decoded images, without touching the data.

    `datasets` decodes whatever a row points to, paths outside of the data set included; the collator's own loader
    does not. Where a transform makes the rows, they stay as they are: it may need decoded images.
    """
    if has_transform(dataset):
        return dataset
    for name, feature in (dataset.features or {}).items():
        encoded = _encoded(feature)
        if encoded == feature:
            continue
        if isinstance(dataset, IterableDataset):
            dataset = dataset.cast_column(name, encoded)
        else:
            # `cast_column` would write the whole set, images and all, into a new file, though nothing in it changes.
            dataset = copy.deepcopy(dataset)
            dataset.info.features[name] = encoded
    return dataset


def _encoded(feature: Any) -> Any:
    """A feature whose images stay encoded."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_encoded(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_encoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _encoded(part) for name, part in feature.items()}
    return feature


def mark_checked(dataset: Data, before: AnyDataset | None = None) -> Data:
    """Note on a data set that [`check_row`] has passed its rows; with `before`, only if that data set has the note."""
    if before is None or is_checked(before):
        dataset._checked = getattr(dataset, "_fingerprint", None)
    return dataset


def is_checked(dataset: AnyDataset) -> bool:
    """Tell whether [`mark_checked`] has noted a data set, and nothing in it has changed since."""
    return getattr(dataset, "_checked", "") == getattr(dataset, "_fingerprint", None)


def select_rows(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """Select rows of a data set, which stay checked if they were."""
    return mark_checked(dataset.select(rows), dataset)


def column_names(dataset: AnyDataset) -> list[str]:
    """Columns that the rows of a data set have; where a transform makes the rows, or a stream does not tell, those of
    the first row.
    """
    if isinstance(dataset, Dataset) and not (has_transform(dataset) and len(dataset) > 0):
        return as_python(dataset).column_names
    return (dataset.column_names if isinstance(dataset, IterableDataset) else None) or list(next(iter(dataset), {}))


def batch_rows(batch: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """The rows of a batch, which `datasets` gives as a list for each column."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def column_of(dataset: Dataset, name: str) -> pa.Array:
    """One column of a data set, with a string or number per row, without reading the others, images among them."""
    column = dataset.data.column(name)
    # Through its public interface, `datasets` gathers rows that were selected one by one: a thousand times slower, and
    # with hundreds of bytes of memory for each.
    indices = dataset._indices
    if indices is not None:
        column = column.take(indices.column(0))
    return column.combine_chunks()


def group_codes(values: pa.Array) -> tuple[np.ndarray, list[Any]]:
    """Number equal values from 0, in the order in which they come up, and return the values by their numbers. A null
    is a group by itself; these come last.
    """
    encoded = (values.cast(pa.string()) if pa.types.is_null(values.type) else values).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone = np.flatnonzero(codes < 0)
    codes[alone] = len(encoded.dictionary) + np.arange(len(alone))
    return codes, encoded.dictionary.to_pylist()


def group_rows(codes: np.ndarray) -> list[np.ndarray]:
    """Rows of each group, ascending, out of the number of the group of each row."""
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])


def unify_types(datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Give columns of one name one type in all sets, so that these can be joined: where types differ, numbers are
    floats, and other values strings, in JSON where they are lists or objects. Messages and images stay as they are.
    """
    types: dict[str, list[Any]] = {}
    for dataset in datasets.values():
        for name, feature in dataset.features.items():
            types.setdefault(name, []).append(feature)
    unified = dict(datasets)
    for name, features in types.items():
        kinds = [feature for feature in features if feature != Value("null")]  # which may become any other
        if name in _MESSAGES or any(map(has_images, kinds)) or all(feature == kinds[0] for feature in kinds):
            continue
        dtype = "float64" if all(map(_is_number, kinds)) else "string"
        for key, dataset in unified.items():
            if name in dataset.column_names and dataset.features[name] != Value(dtype):
                values = [_as_type(value, dtype) for value in dataset[name]]
                column = pa.array(values, pa.float64() if dtype == "float64" else pa.string())
                order = dataset.column_names
                unified[key] = dataset.remove_columns(name).add_column(name, column).select_columns(order)
    return unified


def _is_number(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float", "bool"))


def _as_type(value: Any, dtype: str) -> Any:
    if value is None or isinstance(value, str):
        return value
    return float(value) if dtype == "float64" else json.dumps(value, ensure_ascii=False, default=str)


def has_images(feature: Any) -> bool:
    """Whether a column of this type holds images, as a whole or in part."""
    if isinstance(feature, dict):
        return any(map(has_images, feature.values()))
    return isinstance(feature, Image) or has_images(getattr(feature, "feature", {}))


def rows_at_once(dataset: Dataset) -> int:
    """Number of rows of a data set to hold at once, from 20 to 1000, for a batch of some 32 MB: photographs take
    megabytes each; but of small rows, small batches are slow, and every batch that is written takes some kilobytes of
    memory as long as its file is open.
    """
    bytes_per_row = dataset.data.nbytes / max(1, len(dataset.data))
    return int(min(1000, max(20, 2**25 / max(1.0, bytes_per_row))))
