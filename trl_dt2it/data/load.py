"""Loading of raw files and Hub sets as canonical rows, by one call for every source."""

from __future__ import annotations

import codecs
import contextlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ijson
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download
from transformers.utils import logging

from .. import __version__
from .columns import (
    AnyDataset,
    batch_rows,
    column_names,
    column_of,
    group_codes,
    group_rows,
    leave_images_encoded,
    mark_checked,
    rows_at_once,
)
from .convert import VERDICT, Conversion, find_own_columns
from .rows import RowError, is_milestone
from .sources import SOURCES
from .sources.fields import FOLDER_COLUMN, JSON_COLUMN, Source
from .t2i import reformulate_t2i
from .validation import take_out


logger = logging.get_logger(__name__)

_JSON_ROWS = Features({JSON_COLUMN: Value("string")})

_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")

_LISTS = ("data", "rows", "pairs", "examples", "train")  # keys of the rows in an object, as in `{"data": [...]}`

_BYTE_ORDERS = (b"\xff\xfe", b"\xfe\xff")

_HEAD = 1 << 20  # bytes at the beginning of a file that tell its kind

_BATCH = 100  # rows of a stream at a time; each may hold images of some megabytes


def read_raw(
    source: Source,
    path_or_id: str | os.PathLike | None = None,
    *,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
) -> AnyDataset:
    """Read the rows of a source as they are, images encoded."""
    if path_or_id is None and source.hub_id is None:
        raise ValueError("This is a format and not a data set; pass `path_or_id`.")
    path_or_id = os.fspath(path_or_id or str(source.hub_id))
    path = Path(path_or_id).expanduser()
    if path.exists():
        is_saved, files = _local_files(path, source, split)
        raw = _from_disk(path, split, streaming) if is_saved else _read_files(files, streaming)
    elif path.is_absolute() or path_or_id.startswith((".", "~")) or path.suffix in (*_SUFFIXES, ".zip"):
        raise ValueError(f"There is no file or folder {path_or_id} to read preferences from.")
    elif source.files:
        # The repository has a loading script, which `datasets` no longer runs, or holds more than its rows.
        patterns = [pattern.format(split=split) for pattern in source.files]
        folder = snapshot_download(path_or_id, repo_type="dataset", revision=revision, allow_patterns=patterns)
        raw = _read_files(_files_of(Path(folder), source, split), streaming)
    else:
        raw = load_dataset(path_or_id, source.config, split=split, streaming=streaming, revision=revision)
    return leave_images_encoded(raw)


def raw_files(
    source: Source, path_or_id: str | os.PathLike | None, *, split: str = "train"
) -> list[tuple[str, int, int]]:
    """List the files of a local set with their sizes and times, which tell whether they have changed."""
    if path_or_id is None or not (path := Path(path_or_id).expanduser()).exists():
        return []
    _, files = _local_files(path, source, split)
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def _local_files(path: Path, source: Source, split: str) -> tuple[bool, list[Path]]:
    """Tell whether a path is a set that `datasets` has saved, and list its files."""
    if not path.is_dir():
        return False, [path]
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return True, sorted(path.rglob("*.arrow"))
    return False, _files_of(path, source, split)


def raw_rows(raw: AnyDataset) -> Iterator[dict[str, Any]]:
    """Yield rows as the source has them, JSON lines parsed, without blank lines."""
    for row in raw:
        if JSON_COLUMN not in row:
            yield row
        elif row[JSON_COLUMN].strip():
            yield json.loads(row[JSON_COLUMN])


def _from_disk(path: Path, split: str, streaming: bool) -> AnyDataset:
    loaded = load_from_disk(path)
    if not isinstance(loaded, Dataset):
        if split not in loaded:
            raise ValueError(f"{path} has the splits {', '.join(loaded)}, and not {split!r}.")
        loaded = loaded[split]
    return _as_asked(loaded, streaming)


def _files_of(folder: Path, source: Source, split: str) -> list[Path]:
    """List the files that a source's patterns name, or else all of the first kind that is there; of the split, if the
    names of files tell splits.
    """
    patterns = [pattern.format(split=split) for pattern in source.files]
    if not patterns and (folder / "dataset_info.json").is_file():  # LLaMA-Factory's
        raise ValueError(f"dataset_info.json tells which files of {folder} hold rows; pass one of them.")
    files = sorted({file for pattern in patterns for file in folder.rglob(pattern) if file.suffix in _SUFFIXES})
    for suffix in () if files else _SUFFIXES:
        files = sorted(folder.rglob(f"*{suffix}"))
        if files:
            break
    of_split = [file for file in files if split in file.relative_to(folder).as_posix()]
    if not files:
        archives = sorted(file.name for file in folder.rglob("*") if ".zip" in file.name or ".tar" in file.name)
        hint = f" Unpack {archives[0]} first." if archives else ""
        raise ValueError(f"{folder} holds no {', '.join(_SUFFIXES)} file to read preferences from.{hint}")
    return of_split or files


def _read_files(files: list[Path], streaming: bool) -> AnyDataset:
    suffix = files[0].suffix
    if suffix == ".parquet":
        return load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=streaming)
    if suffix not in _SUFFIXES:
        raise ValueError(f"{files[0]} is none of {', '.join(_SUFFIXES)}; unpack it if it is an archive.")
    read = _json_parts if suffix in (".json", ".jsonl") else _table
    parts = [part for file in files for part in read(file, streaming)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _table(file: Path, streaming: bool) -> list[AnyDataset]:
    """Read a table with a header. All is text: an answer may be a number, or `NA`."""
    separator = "\t" if file.suffix == ".tsv" else ","
    try:
        frame = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as a table ({_in_one_line(error)}); fix the file.") from error
    return [_as_asked(Dataset.from_pandas(frame, preserve_index=False), streaming)]


def _as_asked(rows: Dataset, streaming: bool) -> AnyDataset:
    return rows.to_iterable_dataset() if streaming else rows


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _json_parts(file: Path, streaming: bool) -> list[AnyDataset]:
    with file.open("rb") as stream:
        start = stream.read(_HEAD)
    if start.startswith(_BYTE_ORDERS):
        raise ValueError(f"{file} is in UTF-16 and not in UTF-8; save it as UTF-8.")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # which a character that is cut at the end passes
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from error
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start and not file.read_bytes().strip():
        raise ValueError(f"{file} is empty; there is no row in it.")
    if start.startswith(b"["):
        state = file.stat()
        # Size and time are for the cache of `datasets`, which would otherwise know the file by its name alone.
        kwargs = {"file": str(file), "state": f"{state.st_size} {state.st_mtime_ns}"}
        make = IterableDataset.from_generator if streaming else Dataset.from_generator
        return [_built(file, lambda: make(_json_list, gen_kwargs=kwargs, features=_JSON_ROWS))]
    # A line with nothing but a brace begins an object over several lines.
    is_object = start.split(b"\n", 1)[0].strip() == b"{"
    if (is_object or file.suffix == ".json") and (content := _json_object(file, must_be=is_object)) is not None:
        if annotations := _mmpr_annotations(file, content):
            return [
                part.map(_with_folder, fn_kwargs={"folder": folder})
                for annotation, folder in annotations
                for part in _json_parts(annotation, streaming)
            ]
        rows = [json.dumps(row, ensure_ascii=False) for row in _rows_of(file, content)]
        return [_as_asked(Dataset.from_dict({JSON_COLUMN: rows}, features=_JSON_ROWS), streaming)]
    lines = _built(
        file,
        lambda: load_dataset("text", data_files=str(file), split="train", streaming=streaming, encoding="utf-8-sig"),
    )
    return [lines.rename_column("text", JSON_COLUMN)]


def _built(file: Path, build: Callable[[], AnyDataset]) -> AnyDataset:
    """Build a data set, with errors that tell what is wrong with the file."""
    try:
        return build()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise _not_utf8(file, error.__cause__) from error
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _not_utf8(file: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{file} is not UTF-8 ({_in_one_line(error)}); save it as UTF-8.")


def _json_object(file: Path, *, must_be: bool) -> dict[str, Any] | None:
    """Parse the one object of a file; `None` if it holds several, in lines."""
    try:
        content = _parsed(file)
    except ValueError:
        if must_be:
            raise
        return None
    return content if isinstance(content, dict) else None


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({_in_one_line(error)}); fix the file.") from error


def _rows_of(file: Path, content: dict[str, Any]) -> list[Any]:
    """Take the list of rows out of an object, also of the Hub's data viewer, or else the object as a row."""
    names = [name for name in _LISTS if isinstance(content.get(name), list)]
    if len(names) > 1:
        shown = ", ".join(f"`{name}`" for name in names)
        raise ValueError(f"{file} has several lists of rows: {shown}; give a file of one of them.")
    rows = content[names[0]] if names else [content]
    return [row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row for row in rows]


def _with_folder(row: dict[str, Any], folder: str) -> dict[str, Any]:
    return {FOLDER_COLUMN: folder}


def _json_list(file: str, state: str) -> Iterator[dict[str, str]]:
    count = 0
    try:
        with open(file, "rb") as stream:
            for row in ijson.items(stream, "item", use_float=True):
                yield {JSON_COLUMN: json.dumps(row, ensure_ascii=False)}
                count += 1
    except ijson.JSONError:
        # `json` reads whatever Python writes, NaN included, and names the line where a file is damaged.
        for row in _parsed(Path(file))[count:]:
            yield {JSON_COLUMN: json.dumps(row, ensure_ascii=False)}


def _mmpr_annotations(file: Path, meta: dict[str, Any]) -> list[tuple[Path, str]]:
    """List annotation files and image folders of a `meta.json`, relative to its own folder or the one above."""
    entries = list(meta.values())
    if not entries or not all(isinstance(entry, dict) and "annotation" in entry for entry in entries):
        return []
    annotations = []
    for entry in entries:
        paths = [base / entry["annotation"] for base in (file.parent, file.parent.parent)]
        annotation = next((path for path in paths if path.is_file()), None)
        if annotation is None:
            raise ValueError(f"{file} names the annotations {entry['annotation']}, but there is no file {paths[0]}.")
        annotations.append((annotation, entry.get("root", "")))
    return annotations


def rows_by_group(raw: Dataset, column: str) -> list[np.ndarray]:
    """List the rows of each group of equal values in a column, as [`named_groups`] does."""
    if JSON_COLUMN in raw.column_names:
        keys = pa.array([_key(text.as_py(), column) for text in column_of(raw, JSON_COLUMN)], pa.string())
    elif column in raw.column_names:
        keys = column_of(raw, column)
    else:
        raise ValueError(f"The rows have no column `{column}`, by which pairs are formed from several of them.")
    return named_groups(keys)


def named_groups(names: pa.Array) -> list[np.ndarray]:
    """List the rows of each group, in the order of their first rows; rows without a name are groups of their own."""
    if pa.types.is_string(names.type) or pa.types.is_large_string(names.type):
        names = pc.if_else(pc.equal(names, ""), None, names)
    return sorted(group_rows(group_codes(names)[0]), key=lambda rows: rows[0]) if len(names) else []


def _key(text: str, column: str) -> str | None:
    try:
        value = json.loads(text)[column]
    except (ValueError, KeyError, TypeError):
        return None
    return None if value is None else str(value)


def load_preferences(
    name: str,
    path_or_id: str | os.PathLike | None = None,
    *,
    split: str = "train",
    image_root: str | os.PathLike | None = None,
    streaming: bool = False,
    on_bad_row: Literal["quarantine", "raise"] = "quarantine",
    quarantine_file: str | os.PathLike | None = None,
    source: str | None = None,
    reformulate: bool = True,
    seed: int = 42,
    template: str | None = None,
    both_orders: bool = False,
    max_frames: int = 32,
    shard: tuple[int, int] | None = None,
    num_proc: int | None = None,
    revision: str | None = None,
    **options: Any,
) -> AnyDataset:
    """
    Load a public preference set, or a file in a known format, as canonical rows.

    Pairs that cannot be used, such as ties, are quarantined: counted by reason in a warning, and listed in
    `quarantine_file`. Images are neither decoded nor opened; [`validate`] checks them.

    Args:
        name (`str`):
            Name of the set or format, one of [`SOURCES`], such as `"rlaif_v"`, `"hpdv3"`, `"llamafactory"`,
            `"columns"` (any table of questions and answers) or `"t2i"` (any table of captions and images).
        path_or_id (`str` or `os.PathLike`, *optional*):
            File or folder with the set's rows, or Hub id; by default that of the set.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder of the images, as in [`ImageOptions`]; a row with a path that leaves it is bad.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether rows are made while they are read.
        on_bad_row (`str`, *optional*, defaults to `"quarantine"`):
            `"raise"` makes the first bad row an error.
        quarantine_file (`str` or `os.PathLike`, *optional*):
            JSON lines file for the `pair_id`, `row`, `reason` and `message` of bad rows. Not of a streamed set.
        source (`str`, *optional*):
            Value of the column `source`, and beginning of `pair_id` and `group_id`. By default the `source` of the
            rows, if they have one, or else `name`; with this argument theirs is kept as `original_source`.
        reformulate (`bool`, *optional*, defaults to `True`):
            Whether text-to-image pairs become two-image questions, by [`reformulate_t2i`]. Otherwise they keep the
            columns `caption`, `chosen_image` and `rejected_image`.
        seed, template, both_orders (*optional*):
            As in [`reformulate_t2i`].
        max_frames (`int`, *optional*, defaults to `32`):
            Most frames of a video.
        shard (`tuple[int, int]`, *optional*):
            `(i, n)` takes the i-th of n parts, i from 0. A pair has the same `pair_id` whatever the parts.
        num_proc (`int`, *optional*):
            Number of processes.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        options:
            Options of the set's adapter, such as `min_confidence` of HPDv3 or the column names of `"columns"`.

    Returns:
        `Dataset` or `IterableDataset`: rows with the columns of [`FEATURES`], `videos` or `weight` where the source
        has such, and all columns with any value that its adapter does not read. A name that rows have already becomes
        `original_` and the name, with a warning.

    Raises:
        `ValueError`: if the name or an option is not known, if there is nothing to read, if no pair can be used, or
            if one is bad and `on_bad_row="raise"`.
    """
    if name == "columns" and {"chosen_image", "rejected_image"} & set(options):
        name = "t2i"  # a table of captions and images, named as in `reformulate_t2i`
    conversion = _conversion(name, source, options, image_root, max_frames)
    if on_bad_row not in ("quarantine", "raise"):
        raise ValueError(f'`on_bad_row` is {on_bad_row!r}; it must be "quarantine" or "raise".')
    if quarantine_file is not None and streaming:
        raise ValueError("A streamed set has no `quarantine_file`; load it without `streaming` to list its bad rows.")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` is {shard}; it must be (i, n) with 0 <= i < n.")
    known = SOURCES[name]
    if known.is_non_commercial:
        logger.warning(f"{name} is licensed under {known.licence}: not for commercial use.")
    raw = read_raw(known, path_or_id, split=split, streaming=streaming, revision=revision)
    conversion = replace(conversion, own=find_own_columns(raw, conversion))
    if streaming:
        rows: AnyDataset = _stream(raw, conversion, on_bad_row, shard)
    else:
        rows = _convert(raw, conversion, on_bad_row, quarantine_file, shard, num_proc)
    if known.is_t2i and reformulate:
        rows = reformulate_t2i(
            rows, seed=seed, template=template, both_orders=both_orders, on_bad_row=on_bad_row, num_proc=num_proc
        )
    return rows if known.is_t2i else mark_checked(rows)


def _conversion(
    name: str, source: str | None, options: dict[str, Any], image_root: str | os.PathLike | None, max_frames: int
) -> Conversion:
    if name not in SOURCES:
        raise ValueError(f"`{name}` is no known preference set or format. Known are {', '.join(sorted(SOURCES))}.")
    known = SOURCES[name]
    parameters = list(inspect.signature(known.convert).parameters.values())[1:]
    allowed = {parameter.name for parameter in parameters}
    if unknown := sorted(set(options) - allowed):
        takes = f"takes {', '.join(sorted(allowed))}" if allowed else "takes no options"
        raise ValueError(f"`{name}` has no option `{unknown[0]}`; it {takes}.")
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if missing := sorted(set(needed) - set(options)):
        raise ValueError(f"`{name}` needs the options {', '.join(missing)}.")
    with contextlib.suppress(RowError):  # options that do not fit raise another error, before anything is read
        list(known.convert([] if known.group_by else {}, **options))
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"`image_root` is {image_root}, but there is no such folder.")
    root = None if image_root is None else str(Path(image_root).resolve())
    return Conversion(known, source or name, options, root, max_frames, overrides=source is not None)


def _convert(
    raw: Dataset,
    conversion: Conversion,
    on_bad_row: str,
    quarantine_file: str | os.PathLike | None,
    shard: tuple[int, int] | None,
    num_proc: int | None,
) -> Dataset:
    name, first = conversion.name, 0
    groups = None if conversion.source.group_by is None else rows_by_group(raw, conversion.source.group_by)
    count = len(raw) if groups is None else len(groups)
    if shard is not None:
        first, last = (count * end // shard[1] for end in (shard[0], shard[0] + 1))
        raw, groups = (raw.select(range(first, last)), None) if groups is None else (raw, groups[first:last])
        count = last - first
    if count == 0:
        raise ValueError(f"There is no row in {name}{'' if shard is None else f' for the shard {shard}'}.")

    def convert(batch: dict[str, list[Any]], indices: list[int], version: str) -> dict[str, list[Any]]:
        if groups is None:
            rows = batch_rows(batch)
        else:
            rows = [{"group": [raw[int(row)] for row in groups[index]]} for index in indices]
        made = [
            pair for row, index in zip(rows, indices, strict=True) for pair in conversion.convert(row, first + index)
        ]
        return {column: [pair[column] for pair in made] for column in conversion.features}

    # The version is part of what `datasets` finds a cached result by; the code of adapters is not.
    given = raw if groups is None else Dataset.from_dict({"group": range(count)})
    converted = given.map(
        convert,
        batched=True,
        with_indices=True,
        batch_size=rows_at_once(raw) if groups is None else 10,
        writer_batch_size=rows_at_once(raw),
        remove_columns=given.column_names,
        features=conversion.features,
        fn_kwargs={"version": __version__},
        num_proc=num_proc if count >= (num_proc or 1) else None,
        desc=f"Reading {name}",
        **conversion.caching,
    )
    rows = np.flatnonzero(pc.not_equal(column_of(converted, "reason"), "").to_numpy(zero_copy_only=False))
    notes = list(converted.select(rows).select_columns(["pair_id", *VERDICT]))
    kept = converted.remove_columns(list(VERDICT))
    return take_out(kept, rows, notes, name=f"pair of {name}", on_bad_row=on_bad_row, file=quarantine_file)


def _stream(
    raw: IterableDataset, conversion: Conversion, on_bad_row: str, shard: tuple[int, int] | None
) -> IterableDataset:
    if conversion.source.group_by is not None:
        raise ValueError(
            f"Pairs of {conversion.name} are formed from several rows, which may be far apart; load it without "
            "`streaming` (it is read from disk as needed, and not held in memory)."
        )
    counts: Counter[str] = Counter()
    features = Features({name: feature for name, feature in conversion.features.items() if name not in VERDICT})

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        made = []
        for row, index in zip(batch_rows(batch), indices, strict=True):
            if shard is None or index % shard[1] == shard[0]:
                made += [pair for pair in conversion.convert(row, index) if _is_good(pair)]
        return {column: [pair[column] for pair in made] for column in features}

    def _is_good(pair: dict[str, Any]) -> bool:
        if not (reason := pair["reason"]):
            return True
        problem = f"{pair['pair_id']}, {reason}: {pair['message']}"
        if on_bad_row == "raise":
            raise ValueError(f"A pair of {conversion.name} cannot be used. {problem}")
        counts[reason] += 1
        if is_milestone(counts[reason]):
            logger.warning(f"Dropped from {conversion.name}, {counts[reason]} with this reason so far: {problem}")
        return False

    rows = raw.map(convert, batched=True, with_indices=True, batch_size=_BATCH, remove_columns=column_names(raw))
    return rows.cast(features)  # if `map` were told of them, images would come undecoded
