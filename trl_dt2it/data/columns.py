"""Arrow columns read and written without decoding an image."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, Json, LargeList, List, Value
from datasets.fingerprint import generate_random_fingerprint

from ..utils import ENGINE, run_parts


AnyDataset: TypeAlias = Dataset | IterableDataset
Data = TypeVar("Data", Dataset, IterableDataset)

_SCALARS = {"str": "string", "int": "int64", "float": "float64", "bool": "bool"}

# Column types by the kinds of values in JSON; any other combination is kept as text.
_TYPES: dict[frozenset[str], Any] = {
    **{frozenset({kind}): Value(dtype) for kind, dtype in _SCALARS.items()},
    frozenset({"int", "float"}): Value("float64"),
    **{frozenset({f"list of {kind}"}): List(Value(dtype)) for kind, dtype in _SCALARS.items()},
    **{frozenset({f"list of {kind}", "list of "}): List(Value(dtype)) for kind, dtype in _SCALARS.items()},
    frozenset({"list of int", "list of float"}): List(Value("float64")),
}

_STRETCH = 10_000  # rows that an engine's worker is given at a time
_SLICE = 20  # rows turned into Python objects at a time
_MESSAGES = ("prompt", "chosen", "rejected")  # strings in some sets, which cannot be joined with messages


def arrow_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow table, images as bytes and paths, and JSON parsed."""
    # Without the metadata, in which an image may have a type that decodes.
    features = Features.from_arrow_schema(table.schema.remove_metadata())
    coded = Features({name: feature for name, feature in features.items() if holds(feature, Json)})
    for start in range(0, len(table), _SLICE):
        for row in table.slice(start, _SLICE).to_pylist():
            if coded:
                row.update(coded.decode_example({name: row[name] for name in coded}))
            yield row


def holds(feature: Any, kind: type) -> bool:
    """Tell whether a column type is of a kind, such as `Image`, or has it inside."""
    if isinstance(feature, dict):
        return any(holds(part, kind) for part in feature.values())
    return isinstance(feature, kind) or holds(getattr(feature, "feature", {}), kind)


def retype_images(feature: Any, *, decode: bool, keeps_mode: bool = True) -> Any:
    """Make every image type inside a column type one that decodes, or not, maybe without its mode."""
    retype = partial(retype_images, decode=decode, keeps_mode=keeps_mode)
    if isinstance(feature, Image):
        return Image(mode=feature.mode if keeps_mode else None, decode=decode)
    if isinstance(feature, List):
        return List(retype(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(retype(feature.feature))
    if isinstance(feature, dict):
        return {name: retype(part) for name, part in feature.items()}
    return feature


def uncached() -> dict[str, Any]:
    """Arguments of `Dataset.map` that keep it from answering out of its cache: files that rows point to may change,
    and hashing a processor is slow."""
    return {"load_from_cache_file": False, "new_fingerprint": generate_random_fingerprint()}


def map_tables(dataset: Dataset, function: Callable[..., pa.Table], features: Features, **options: Any) -> pa.Table:
    """Collect the results of a function of Arrow tables, uncached: a table with the columns `features` and a row for
    every row; `options` are of `Dataset.map`. An engine in use applies it to stretches of the rows."""
    if ENGINE.get() is not None and len(dataset) > 0:
        starts = range(0, len(dataset), _STRETCH)
        stretches = [range(start, min(start + _STRETCH, len(dataset))) for start in starts]
        apply = partial(_map_stretch, dataset, function, features, options)
        made = dict(run_parts(apply, stretches, options.get("desc", "")))
        return pa.concat_tables([made[number] for number in range(len(stretches))])
    options |= {"batched": True, "batch_size": rows_at_once(dataset), "writer_batch_size": 10_000}
    return look_at_rows(dataset.with_format("arrow"), function, features, **options)


def _map_stretch(
    dataset: Dataset, function: Callable[..., pa.Table], features: Features, options: Any, rows: range
) -> pa.Table:
    """Apply [`map_tables`] to some rows, whose indices stay those of the whole set."""
    if options.get("with_indices"):
        function = partial(_with_all_indices, function, rows.start)
    return map_tables(dataset.select(rows), function, features, **{**options, "num_proc": None})


def _with_all_indices(function: Callable[..., pa.Table], start: int, table: pa.Table, indices: Any, **kwargs: Any):
    return function(table, [start + index for index in indices], **kwargs)


def look_at_rows(dataset: Dataset, function: Callable[..., Any], features: Features, **options: Any) -> pa.Table:
    """Collect as [`map_tables`] does, but row by row, through a transform of the user's."""
    if len(dataset) == 0:
        return features.arrow_schema.empty_table()
    options |= {"remove_columns": dataset.column_names, "features": features, "keep_in_memory": True, **uncached()}
    return dataset.map(function, **options).with_format("arrow")[:]


def look_in_shares(dataset: Dataset, look: Callable[..., pa.Table], *, num_proc: int | None) -> pa.Table:
    """Divide a data set among the processes of a launch, and join their results in the order of the rows. Every
    process must call it; an error of one is raised by all. `look` takes a part and `num_proc`, and waits for no other
    process."""
    from accelerate import PartialState  # heavy, and rows are also read where no process has others

    from ..processes import failing_together, gather

    state = PartialState()
    processes, index = state.num_processes, state.process_index
    if processes == 1:
        return look(dataset, num_proc=num_proc)
    if num_proc is not None:
        num_proc = max(1, num_proc // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    share = range(len(dataset) * index // processes, len(dataset) * (index + 1) // processes)
    hides = not state.is_main_process and not datasets.are_progress_bars_disabled()
    if hides:
        datasets.disable_progress_bars()
    try:
        with failing_together():
            table = look(dataset.select(share), num_proc=num_proc)
    finally:
        if hides:
            datasets.enable_progress_bars()
    return pa.concat_tables(gather(table))


def has_transform(dataset: AnyDataset) -> bool:
    """Tell whether a user's function makes the rows, passed to `with_transform` or `set_transform`."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def as_python(dataset: AnyDataset) -> AnyDataset:
    """Make rows hold plain Python values instead of tensors or arrays, in the columns shown; a transform stays."""
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if has_transform(dataset):
        return dataset
    shown = dataset.format["columns"]
    if dataset.format["type"] is not None:
        shown = dataset.column_names if dataset.format["output_all_columns"] else shown
        dataset = dataset.with_format(None)
    return dataset if set(shown) == set(dataset.column_names) else dataset.with_format(None).select_columns(shown)


def leave_images_encoded(dataset: AnyDataset, *, keeps_mode: bool = True) -> AnyDataset:
    """Make rows hold bytes and paths instead of decoded images, without touching the data; a transform stays.

    `datasets` would decode any file that a row points to, unlike the collator's own loader.
    """
    if has_transform(dataset):
        return dataset
    for name, feature in (dataset.features or {}).items():
        encoded = retype_images(feature, decode=False, keeps_mode=keeps_mode)
        if encoded != feature and isinstance(dataset, IterableDataset):
            dataset = dataset.cast_column(name, encoded)
        elif encoded != feature:
            # `cast_column` would write the whole set, images and all, into a new file, though nothing in it changes.
            dataset = copy.deepcopy(dataset)
            dataset.info.features[name] = encoded
    return dataset


def mark_checked(dataset: Data, before: AnyDataset | None = None) -> Data:
    """Note that the rows of a data set have passed [`check_row`]; with `before`, only if that set has the note."""
    if before is None or is_checked(before):
        dataset.checked_fingerprint = getattr(dataset, "_fingerprint", None)
    return dataset


def is_checked(dataset: AnyDataset) -> bool:
    """Tell whether [`mark_checked`] has noted a data set, and nothing in it has changed since."""
    return getattr(dataset, "checked_fingerprint", "") == getattr(dataset, "_fingerprint", None)


def select_rows(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """Select rows of a data set, which stay checked if they were."""
    return mark_checked(dataset.select(rows), dataset)


def column_names(dataset: AnyDataset) -> list[str]:
    """Name the columns of the rows: of the first row, where a transform makes them or a stream does not tell."""
    if isinstance(dataset, Dataset) and not (has_transform(dataset) and len(dataset) > 0):
        return as_python(dataset).column_names
    return (dataset.column_names if isinstance(dataset, IterableDataset) else None) or list(next(iter(dataset), {}))


def is_ranked(dataset: AnyDataset) -> bool:
    """Tell whether a set holds ranked prompts, see [`~trl_dt2it.data.to_pairs`], by its columns."""
    names = column_names(dataset)
    return "completions" in names and "chosen" not in names


def batch_rows(batch: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn a batch of `datasets`, which is a list per column, into rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def column_of(dataset: Dataset, name: str) -> pa.Array:
    """Read one column of strings or numbers, without reading the others, images among them."""
    column, indices = dataset.data.column(name), dataset._indices
    # Through its public interface, `datasets` gathers selected rows one by one: a thousand times slower, and with
    # hundreds of bytes of memory for each.
    return (column if indices is None else column.take(indices.column(0))).combine_chunks()


def group_codes(values: pa.Array) -> tuple[np.ndarray, list[Any]]:
    """Number equal values from 0 by first appearance, nulls behind them, each alone; return also the values."""
    encoded = (values.cast(pa.string()) if pa.types.is_null(values.type) else values).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone = np.flatnonzero(codes < 0)
    codes[alone] = len(encoded.dictionary) + np.arange(len(alone))
    return codes, encoded.dictionary.to_pylist()


def row_groups(dataset: Dataset) -> np.ndarray:
    """Number the groups of rows that are not independent, by `group_id`, and return that of each row, `(N,)` int64;
    without that column each row is its own."""
    is_grouped = "group_id" in dataset.column_names
    return group_codes(column_of(dataset, "group_id"))[0] if is_grouped else np.arange(len(dataset))


def connected(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Number the parts that edges `one` to `other`, both `(E,)`, join of so many points; return that of each point."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def group_rows(codes: np.ndarray) -> list[np.ndarray]:
    """List the rows of each group, ascending, given the group number of each row."""
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])


def named_groups(names: pa.Array) -> list[np.ndarray]:
    """List the rows of each group, in the order of their first rows; rows without a name are groups of their own."""
    if pa.types.is_string(names.type) or pa.types.is_large_string(names.type):
        names = pc.if_else(pc.equal(names, ""), None, names)
    return sorted(group_rows(group_codes(names)[0]), key=lambda rows: rows[0]) if len(names) else []


def json_columns(lines: Iterable[str], paths: Collection[str]) -> dict[str, Any]:
    """Find the types of all keys but `paths` in rows of JSON: numbers, strings and lists of them, else JSON text."""
    kinds: dict[str, set[str]] = {}
    for line in lines:
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:  # which its conversion reports
            continue
        for name, value in row.items() if isinstance(row, dict) else ():
            value = without_parts(value, name, paths)
            if value is not None and value != {}:
                kinds.setdefault(name, set()).add(_kind(value))
    # A large string tells JSON text from strings.
    large = {name: "string" if seen <= {*_SCALARS, "large"} else "large_string" for name, seen in kinds.items()}
    return {name: _TYPES.get(frozenset(seen), Value(large[name])) for name, seen in kinds.items()}


def _kind(value: Any) -> str:
    if isinstance(value, list):
        kinds = {_kind(item) for item in value} or {""}
        return f"list of {kinds.pop()}" if len(kinds) == 1 else "list"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "large"
    return "object" if isinstance(value, dict) else type(value).__name__


def without_parts(value: Any, name: str, reads: Collection[str], *, drops_empty: bool = False) -> Any:
    """Remove from the value or the type of a field the parts that are read."""
    if not isinstance(value, Mapping):
        return value
    rests = [path.partition(".")[2] for path in reads if path.startswith(f"{name}.")]
    if not rests:
        return value
    parts = {key: part for key, part in value.items() if key not in rests}
    kept = {key: without_parts(part, key, rests, drops_empty=drops_empty) for key, part in parts.items()}
    return {key: part for key, part in kept.items() if part != {}} if drops_empty else kept


def fit_json(value: Any, feature: Any, name: str) -> Any:
    """Fit a value of JSON to the type of its column; a string holds any."""
    if value is None or value == {}:
        return None
    if not isinstance(feature, Value):
        return value
    if feature.dtype in ("string", "large_string"):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return text.encode(errors="replace").decode()  # half a surrogate pair fits into no file
    if isinstance(value, (str, list, dict)) and feature.dtype in _SCALARS.values():
        message = f"`{name}` is {value!r:.40}, but {feature.dtype} in the first rows of the stream"
        raise ValueError(f"{message}; load the set without `streaming`.")
    return value


def unify_types(datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Cast columns of one name to one type in all sets, so that these can be joined: numbers to floats, and others to
    strings, lists and objects as JSON. Messages and images stay as they are."""
    unified = dict(datasets)
    for name in dict.fromkeys(name for dataset in datasets.values() for name in dataset.features):
        features = [dataset.features[name] for dataset in datasets.values() if name in dataset.features]
        kinds = [feature for feature in features if feature != Value("null")]  # which may become any other
        if name in _MESSAGES or any(holds(kind, Image) for kind in kinds) or all(kind == kinds[0] for kind in kinds):
            continue
        numbers = ("int", "uint", "float", "bool")
        are_numbers = all(isinstance(kind, Value) and kind.dtype.startswith(numbers) for kind in kinds)
        dtype = "float64" if are_numbers else "string"
        for key, dataset in unified.items():
            if name in dataset.column_names and dataset.features[name] != Value(dtype):
                column = pa.array([_as_type(value, dtype) for value in dataset[name]], Value(dtype).pa_type)
                order = dataset.column_names
                unified[key] = dataset.remove_columns(name).add_column(name, column).select_columns(order)
    return unified


def _as_type(value: Any, dtype: str) -> Any:
    if value is None or isinstance(value, str):
        return value
    return float(value) if dtype == "float64" else json.dumps(value, ensure_ascii=False, default=str)


def rows_at_once(dataset: Dataset) -> int:
    """Choose a batch size, from 20 to 1000 rows, for batches of some 32 MB."""
    # Photographs take megabytes each; but small batches of small rows are slow, and every batch that is written takes
    # some kilobytes of memory as long as its file is open.
    bytes_per_row = dataset.data.nbytes / max(1, len(dataset.data))
    return int(min(1000, max(20, 2**25 / max(1.0, bytes_per_row))))
