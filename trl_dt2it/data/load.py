"""Raw files and Hub sets read as canonical rows, by one call for every source."""

from __future__ import annotations

import codecs
import contextlib
import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
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
    fit_json,
    json_columns,
    leave_images_encoded,
    mark_checked,
    named_groups,
    retype_images,
    rows_at_once,
    uncached,
    without_parts,
)
from .images import ImageOptions, is_address, placed_image, with_image_root
from .messages import FEATURES, PROVENANCE, RANKED_FEATURES, T2I_FEATURES, VIDEO_FEATURES
from .rows import RowError, check_answers, check_confidence, check_log_odds, check_row, is_milestone
from .sources import SOURCES, Adapter
from .sources.fields import FOLDER_COLUMN, JSON_COLUMN, Source, checked_field, is_given, name_field, strength_field
from .t2i import Columns, collapse, find_bad_pair, reformulate_t2i
from .validation import NOTES, take_out


logger = logging.get_logger(__name__)

_JSON_ROWS = Features({JSON_COLUMN: Value("string")})
_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_LISTS = ("data", "rows", "pairs", "examples", "train")  # keys of the rows in an object, as in `{"data": [...]}`
_HEAD = 1 << 20  # bytes at the beginning of a file that tell its kind
_BATCH = 100  # rows of a stream at a time; each may hold images of some megabytes
_FIRST_ROWS = 1000  # of a stream, which tell its columns

# Columns that mean the same in any source that has them.
_SHARED = ("strength", "margin", "weight", "label_confidence", "blind_margin", *PROVENANCE)

# Columns that mean something in canonical rows; a source's own columns of these names are renamed.
_TAKEN = {
    *(*VIDEO_FEATURES, *T2I_FEATURES, *NOTES, *_SHARED, "image", "tools", "chat_template_kwargs", "row_index"),
    *(f"{side}_{ids}" for side in ("chosen", "rejected") for ids in ("ids", "input_ids")),
}

_PLAIN = ("string", "int64", "int32", "int16", "int8", "float64", "float32", "bool", "uint8", "uint16", "uint32")


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
    if is_saved(path):
        raw = _as_asked(load_saved(path, split), streaming)
    elif path.exists():
        raw = _read_files(path, source, split, streaming)
    elif path.is_absolute() or path_or_id.startswith((".", "~")) or path.suffix in (*_SUFFIXES, ".zip"):
        raise ValueError(f"There is no file or folder {path_or_id} to read preferences from.")
    elif source.files:
        # The repository has a loading script, which `datasets` no longer runs, or holds more than its rows.
        patterns = [pattern.format(split=split) for pattern in source.files]
        folder = snapshot_download(path_or_id, repo_type="dataset", revision=revision, allow_patterns=patterns)
        raw = _read_files(Path(folder), source, split, streaming)
    else:
        raw = load_dataset(path_or_id, source.config, split=split, streaming=streaming, revision=revision)
    return leave_images_encoded(raw)


def raw_files(source: Source, path_or_id: str | os.PathLike | None, split: str = "train") -> list[tuple[Any, ...]]:
    """List the files of a local set with their sizes and times, which tell whether they have changed."""
    if path_or_id is None or not (path := Path(path_or_id).expanduser()).exists():
        return []
    files = sorted(path.rglob("*.arrow")) if is_saved(path) else _files_of(path, source, split)
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def is_saved(path: Path) -> bool:
    """Tell a set that `datasets` has saved."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def raw_rows(raw: AnyDataset) -> Iterator[dict[str, Any]]:
    """Yield rows as the source has them, JSON lines parsed, without blank lines."""
    for row in raw:
        if JSON_COLUMN not in row:
            yield row
        elif row[JSON_COLUMN].strip():
            yield json.loads(row[JSON_COLUMN])


def load_saved(path: Path, split: str) -> Dataset:
    """Load a set that `datasets` has saved, or a split of several; raise a `ValueError` if there is no such split."""
    loaded = load_from_disk(path)
    if not isinstance(loaded, Dataset) and split not in loaded:
        raise ValueError(f"{path} has the splits {', '.join(loaded)}, and not {split!r}.")
    return loaded if isinstance(loaded, Dataset) else loaded[split]


def _files_of(folder: Path, source: Source, split: str) -> list[Path]:
    """List the files that a source's patterns name, or else all of the first kind that is there; of the split, if the
    names of files tell splits. A file is its own list."""
    if not folder.is_dir():
        return [folder]
    patterns = [pattern.format(split=split) for pattern in source.files]
    if not patterns and (folder / "dataset_info.json").is_file():  # LLaMA-Factory's
        raise ValueError(f"dataset_info.json tells which files of {folder} hold rows; pass one of them.")
    files = sorted({file for pattern in patterns for file in folder.rglob(pattern) if file.suffix in _SUFFIXES})
    files = files or next(filter(None, (sorted(folder.rglob(f"*{suffix}")) for suffix in _SUFFIXES)), [])
    if not files:
        archives = sorted(file.name for file in folder.rglob("*") if ".zip" in file.name or ".tar" in file.name)
        hint = f" Unpack {archives[0]} first." if archives else ""
        raise ValueError(f"{folder} holds no {', '.join(_SUFFIXES)} file to read preferences from.{hint}")
    return [file for file in files if split in file.relative_to(folder).as_posix()] or files


def _read_files(path: Path, source: Source, split: str, streaming: bool) -> AnyDataset:
    files = _files_of(path, source, split)
    suffix = files[0].suffix
    if suffix == ".parquet":
        return load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=streaming)
    if suffix not in _SUFFIXES:
        raise ValueError(f"{files[0]} is none of {', '.join(_SUFFIXES)}; unpack it if it is an archive.")
    read = _json_rows if suffix in (".json", ".jsonl") else _table
    parts = [read(file, streaming) for file in files]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _table(file: Path, streaming: bool) -> AnyDataset:
    """Read a table with a header. All is text: an answer may be a number, or `NA`."""
    separator = "\t" if file.suffix == ".tsv" else ","
    try:
        frame = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as a table ({collapse(str(error))}); fix the file.") from error
    return _as_asked(Dataset.from_pandas(frame, preserve_index=False), streaming)


def _as_asked(rows: Dataset, streaming: bool) -> AnyDataset:
    return rows.to_iterable_dataset() if streaming else rows


def _json_rows(file: Path, streaming: bool) -> AnyDataset:
    with file.open("rb") as stream:
        start = stream.read(_HEAD)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
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
        return _built(file, lambda: make(_json_list, gen_kwargs=kwargs, features=_JSON_ROWS))
    # A line with nothing but a brace begins an object over several lines.
    is_object = start.split(b"\n", 1)[0].strip() == b"{"
    content = None
    if is_object or file.suffix == ".json":
        with contextlib.nullcontext() if is_object else contextlib.suppress(ValueError):  # several objects, in lines
            content = _parsed_file(file)
    if isinstance(content, dict):
        if annotations := _mmpr_annotations(file, content):
            parts = [
                _json_rows(annotation, streaming).map(lambda row, folder: {FOLDER_COLUMN: folder}, fn_kwargs=kwargs)
                for annotation, kwargs in annotations
            ]
            return concatenate_datasets(parts)
        rows = [json.dumps(row, ensure_ascii=False) for row in _rows_of(file, content)]
        return _as_asked(Dataset.from_dict({JSON_COLUMN: rows}, features=_JSON_ROWS), streaming)
    options: dict[str, Any] = {"data_files": str(file), "split": "train", "encoding": "utf-8-sig"}
    lines = _built(file, lambda: load_dataset("text", streaming=streaming, **options))
    return lines.rename_column("text", JSON_COLUMN)


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
    return ValueError(f"{file} is not UTF-8 ({collapse(str(error))}); save it as UTF-8.")


def _parsed_file(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({collapse(str(error))}); fix the file.") from error


def _rows_of(file: Path, content: dict[str, Any]) -> list[Any]:
    """Take the list of rows out of an object, also of the Hub's data viewer, or else the object as a row."""
    names = [name for name in _LISTS if isinstance(content.get(name), list)]
    if len(names) > 1:
        shown = ", ".join(f"`{name}`" for name in names)
        raise ValueError(f"{file} has several lists of rows: {shown}; give a file of one of them.")
    rows = content[names[0]] if names else [content]
    return [row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row for row in rows]


def _json_list(file: str, state: str) -> Iterator[dict[str, str]]:
    count = 0
    try:
        with open(file, "rb") as stream:
            for row in ijson.items(stream, "item", use_float=True):
                yield {JSON_COLUMN: json.dumps(row, ensure_ascii=False)}
                count += 1
    except ijson.JSONError:
        # `json` reads whatever Python writes, NaN included, and names the line where a file is damaged.
        for row in _parsed_file(Path(file))[count:]:
            yield {JSON_COLUMN: json.dumps(row, ensure_ascii=False)}


def _mmpr_annotations(file: Path, meta: dict[str, Any]) -> list[tuple[Path, dict[str, str]]]:
    """List annotation files and image folders of a `meta.json`, relative to its own folder or the one above."""
    if not all(isinstance(entry, dict) and "annotation" in entry for entry in meta.values()):
        return []
    annotations = []
    for entry in meta.values():
        paths = [base / entry["annotation"] for base in (file.parent, file.parent.parent)]
        annotation = next((path for path in paths if path.is_file()), None)
        if annotation is None:
            raise ValueError(f"{file} names the annotations {entry['annotation']}, but there is no file {paths[0]}.")
        annotations.append((annotation, {"folder": entry.get("root", "")}))
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


def _key(text: str, column: str) -> str | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if (value := json.loads(text)[column]) is not None:
            return str(value)
    return None


@dataclass(frozen=True)
class Conversion:
    """Conversion of the raw rows of one source. Picklable, for worker processes."""

    source: Source
    name: str  # for the column `source`, and at the beginning of `pair_id` and `group_id`
    options: dict[str, Any] = field(default_factory=dict)  # of the adapter
    image_root: str | None = None  # folder that relative image paths start from, and that no path may leave
    max_frames: int = 32  # most frames of a video, taken evenly from its folder
    overrides: bool = False  # `name` replaces a `source` in the rows
    is_ranked: bool = False  # into ranked prompts instead of pairs
    # Columns of the source, from `with_own_columns`: those that the adapter reads, those that mean what they mean in
    # canonical rows, and others, which rows keep.
    reads: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)  # new name of each column
    kept_features: dict[str, Any] = field(default_factory=dict)  # by new name, and shared numbers
    knows_all: bool = True  # from all rows, not from the first rows of a stream

    @cached_property
    def features(self) -> Features:
        """Columns of a converted row and its notes: the index of its raw row, and why it is bad ("" if it is good)."""
        source = self.source
        columns = T2I_FEATURES if source.is_t2i else VIDEO_FEATURES if source.has_videos else FEATURES
        columns = RANKED_FEATURES if self.is_ranked else columns
        weight = {"weight": Value("float64")} if source.has_weights else {}
        return Features({**columns, **weight, **NOTES, **self.kept_features})

    def convert(self, raw: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
        """Yield the canonical rows of a raw row."""
        made, nothing = list(self._pairs(raw)), dict.fromkeys(self.features)
        for number, pair in enumerate(made):
            suffix = f"{index}-{number}" if len(made) > 1 else str(index)
            try:
                if isinstance(pair, RowError):
                    raise pair
                if len(made) > 1 and pair.get("pair_id"):
                    pair["pair_id"] += f"-{number}"
                pair = self._finished(pair, suffix, raw.get(FOLDER_COLUMN)) | {"reason": "", "message": ""}
            except RowError as error:
                names = {"pair_id": f"{self.name}-{suffix}", "source": self.name}
                message = f"{error}{self.source.image_advice(error.reason)}"
                pair = {**names, "reason": error.reason, "message": message}
            yield {**nothing, **pair, "row": index}

    def _pairs(self, raw: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
        try:
            row = _parsed(raw)
            if row is not None:
                values = self._values_beside(row if isinstance(row, list) else [row])
                for pair in _adapter(self.source, self.is_ranked)(row, **self.options):
                    yield pair if isinstance(pair, RowError) else {**pair, **values}
        except RowError as error:
            yield error

    def _values_beside(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Collect the values of shared and kept columns in which all raw rows of a pair agree."""
        row = {name: rows[0].get(name) for name in self.shared}
        row = {name: value for name, value in row.items() if all(other.get(name) == value for other in rows)}
        values: dict[str, Any] = {name: name_field(row, name) for name in PROVENANCE}
        values["strength"] = strength_field(row, "strength" if row.get("strength") is not None else "margin")
        values["weight"] = strength_field(row, "weight", "bad_weight")
        values["label_confidence"] = checked_field(row, "label_confidence", check_confidence)
        values["blind_margin"] = checked_field(row, "blind_margin", check_log_odds)
        values = {name: value for name, value in values.items() if value is not None}
        for name, new in self.kept.items():
            value, *others = (without_parts(row.get(name), name, self.reads) for row in rows)
            if all(other == value for other in others):
                values[new] = fit_json(value, self.kept_features[new], name)
        if not self.knows_all:
            known = {*self.reads, *self.shared, *self.kept}
            for name in (name for name in rows[0] if name not in known and is_given(rows[0][name])):
                logger.warning_once(
                    f"The column `{name}` is in none of the first {_FIRST_ROWS} rows of the stream and is not kept; "
                    "load the set without `streaming` to keep it."
                )
        return values

    def _finished(self, pair: dict[str, Any], suffix: str, folder: str | None) -> dict[str, Any]:
        is_named = bool(pair.get("source")) and not self.overrides  # rows may bring their own names
        is_hash = "source" in self.shared and "group_id" not in self.shared  # made by the adapter
        pair = {
            **pair,
            "source": pair["source"] if is_named else self.name,
            "pair_id": pair.get("pair_id") or f"{self.name}-{suffix}",
            "group_id": pair["group_id"] if is_named and not is_hash else f"{self.name}-{pair['group_id']}",
        }
        if self.source.is_t2i:
            # Here, where a bad pair is listed, and not only when it is reformulated.
            if (error := find_bad_pair(pair, Columns(), ImageOptions())) is not None:
                raise error
            return pair | {side: self._placed(pair[side], folder) for side in ("chosen_image", "rejected_image")}
        pair["images"] = [self._placed(image, folder) for image in pair["images"]]
        if "videos" in pair:
            pair["videos"] = [self._frames(video, folder) for video in pair["videos"]]
        if not self.source.is_checked:
            check_answers(pair, check_row) if self.is_ranked else check_row(pair)
        return pair

    def _placed(self, image: Any, folder: str | None) -> Any:
        """Resolve an image of which only a path is known; an address stays, for whoever allows its host."""
        if not isinstance(image, Mapping) or image.get("bytes") is not None or not image.get("path"):
            return image
        path = image["path"]
        if folder and not is_address(path):
            path = str(Path(folder, path))
        return placed_image(path, ImageOptions(image_root=self.image_root))

    def _frames(self, video: Any, folder: str | None) -> list[Any]:
        """Resolve the frames of a video, or take them evenly from its folder, in the order of their numbers."""
        if not isinstance(video, str):
            return [self._placed(frame, folder) for frame in video]
        path = Path(self._placed({"path": video}, folder)["path"])
        if not video or not path.is_dir():
            raise RowError("image_missing", f"the video {video!r:.300} is no folder of frames; check `image_root`.")
        frames = sorted((file for file in path.iterdir() if file.is_file()), key=_by_number)
        if len(frames) > self.max_frames:
            frames = [frames[round(at)] for at in np.linspace(0, len(frames) - 1, self.max_frames)]
        return [{"bytes": None, "path": str(frame)} for frame in frames]


def with_own_columns(conversion: Conversion, raw: AnyDataset) -> Conversion:
    """Find the columns of a source that its adapter does not read."""
    is_whole, is_json = isinstance(raw, Dataset), JSON_COLUMN in column_names(raw)
    if is_json:
        paths = {path for path in conversion.options.values() if isinstance(path, str) and "." in path}
        if isinstance(raw, Dataset):
            lines = (line for chunk in raw.data.column(JSON_COLUMN).chunks for line in chunk.to_pylist())
        else:
            lines = (row[JSON_COLUMN] for row in raw.take(_FIRST_ROWS))
        types = json_columns(lines, paths)
    elif isinstance(raw, Dataset):  # columns that have any value
        has_value = {name: raw.data.column(name).null_count < len(raw.data) for name in raw.column_names}
        types = {name: raw.features[name] for name in raw.column_names if has_value[name]}
    else:  # which may have them from its first rows alone
        types = dict(raw.features or Dataset.from_list(list(raw.take(_FIRST_ROWS // 10))).features)
    given = conversion.source.reads
    reads = set(given if isinstance(given, tuple) else given(set(types), conversion.options))
    unread = {
        name: without_parts(feature, name, reads, drops_empty=True)
        for name, feature in types.items()
        if name not in (*reads, FOLDER_COLUMN)
    }
    plain = _PLAIN if is_json else (*_PLAIN, "large_string")  # of JSON it is an object or a list, as text
    shared = {name for name in _SHARED if isinstance(feature := unread.get(name), Value) and feature.dtype in plain}
    own = {name: feature for name, feature in unread.items() if feature not in (None, {}) and name not in shared}
    if (conversion.overrides or conversion.source.has_parts) and "source" in types:
        own["source"] = types["source"]  # kept, but under another name
        shared.discard("source")
    if {"strength", "margin"} <= set(types):  # of which one is the strength
        own["margin"] = types["margin"]
    names: dict[str, str] = {}
    for name in own:
        new = name if name not in _TAKEN else f"original_{name}"
        while new in (*names.values(), *(own.keys() - {name})):
            new = f"{new}_"
        names[name] = new
    if renamed := [f"`{name}` as `{new}`" for name, new in names.items() if name != new]:
        logger.warning(
            f"{conversion.name} has columns with names that mean something else in our rows; they are kept: "
            f"{', '.join(renamed)}."
        )
    features = {names[name]: retype_images(feature, decode=True) for name, feature in own.items()}
    features |= {name: Value("float64") for name in ("weight", "label_confidence", "blind_margin") if name in shared}
    return replace(
        conversion,
        reads=tuple(sorted(reads - own.keys())),
        shared=tuple(sorted(shared)),
        kept=names,
        kept_features=features,
        knows_all=is_whole or not is_json,
    )


def _adapter(source: Source, is_ranked: bool) -> Adapter:
    return source.ranked if is_ranked and source.ranked is not None else source.convert


def _by_number(file: Path) -> list[int | str]:
    """Sort `frame_10` behind `frame_9`; texts and numbers alternate, and a text, maybe "", comes first."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]


def _parsed(raw: Mapping[str, Any]) -> Any:
    """Parse a row of the source, or all rows of a group; `None` for a blank line."""
    if "group" in raw:
        return [_parsed(row) for row in raw["group"]]
    if JSON_COLUMN not in raw:
        return raw
    text = raw[JSON_COLUMN]
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except ValueError as error:
        raise RowError("not_conversational", f"the line is not JSON ({error}); fix the file.") from error
    if not isinstance(row, dict):
        raise RowError("not_conversational", f"the line holds a {type(row).__name__} and no object; fix the file.")
    return row


def load_preferences(
    name: str,
    path_or_id: str | os.PathLike | None = None,
    *,
    split: str = "train",
    image_root: str | os.PathLike | None = None,
    ranked: bool = False,
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
        split, revision (`str`, *optional*):
            Split to load, `"train"` by default, and branch, tag or commit on the Hub.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder of the images, as in [`ImageOptions`]; a row with a path that leaves it is bad.
        ranked (`bool`, *optional*, defaults to `False`):
            Whether to load ranked prompts, as in [`~trl_dt2it.data.to_pairs`], in place of pairs: of `"vlfeedback"`,
            with mean ratings as `scores`, and of `"trl"`, rows with `completions`.
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
        shard (`tuple[int, int]`, *optional*):
            `(i, n)` takes the i-th of n parts, i from 0. A pair has the same `pair_id` whatever the parts.
        max_frames, num_proc (`int`, *optional*):
            Most frames of a video, 32 by default, and number of processes.
        options:
            Options of the set's adapter, such as `min_confidence` of HPDv3 or the column names of `"columns"`.

    Returns:
        `Dataset` or `IterableDataset`: rows with the columns of [`FEATURES`], or of ranked prompts, with `videos`,
        `weight`, `label_confidence` or `blind_margin` where the source has such, and all columns with any value that
        its adapter does not read. A name that rows have already becomes `original_` and the name, with a warning.

    Raises:
        `ValueError`: if the name or an option is not known, if there is nothing to read, if no pair can be used, or
            if one is bad and `on_bad_row="raise"`.
    """
    if name == "columns" and {"chosen_image", "rejected_image"} & set(options):
        name = "t2i"  # a table of captions and images, named as in `reformulate_t2i`
    if name not in SOURCES:
        raise ValueError(f"`{name}` is no known preference set or format. Known are {', '.join(sorted(SOURCES))}.")
    known = SOURCES[name]
    if ranked and known.ranked is None:
        others = ", ".join(sorted(name for name, source in SOURCES.items() if source.ranked is not None))
        raise ValueError(f"`{name}` has no ranked prompts; load it without `ranked`. These have: {others}.")
    check_options(name, known, options, ranked)
    try:
        root = with_image_root(None, image_root).image_root  # `None`, or a folder that is there
    except ValueError as error:
        raise ValueError(f"{error}{known.image_advice('image_missing')}") from None
    if on_bad_row not in ("quarantine", "raise"):
        raise ValueError(f'`on_bad_row` is {on_bad_row!r}; it must be "quarantine" or "raise".')
    if quarantine_file is not None and streaming:
        raise ValueError("A streamed set has no `quarantine_file`; load it without `streaming` to list its bad rows.")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` is {shard}; it must be (i, n) with 0 <= i < n.")
    if known.is_non_commercial:
        logger.warning(f"{name} is licensed under {known.licence}: not for commercial use.")
    raw = read_raw(known, path_or_id, split=split, streaming=streaming, revision=revision)
    root = None if root is None else str(Path(root).resolve())
    conversion = Conversion(known, source or name, options, root, max_frames, source is not None, ranked)
    conversion = with_own_columns(conversion, raw)
    if streaming:
        rows: AnyDataset = _stream(raw, conversion, on_bad_row, shard)
    else:
        rows = _convert(raw, conversion, on_bad_row, quarantine_file, shard, num_proc)
    if known.is_t2i and reformulate:
        rows = reformulate_t2i(
            rows, seed=seed, template=template, both_orders=both_orders, on_bad_row=on_bad_row, num_proc=num_proc
        )
    return rows if known.is_t2i or ranked else mark_checked(rows)


def check_options(name: str, source: Source, options: dict[str, Any], ranked: bool = False) -> None:
    """Refuse options that the adapter of a source does not have or take."""
    convert = _adapter(source, ranked)
    parameters = list(inspect.signature(convert).parameters.values())[1:]
    allowed = sorted(parameter.name for parameter in parameters)
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"`{name}` has no option `{unknown[0]}`; it takes {', '.join(allowed) or 'no options'}.")
    if missing := sorted({one.name for one in parameters if one.default is one.empty} - set(options)):
        raise ValueError(f"`{name}` needs the options {', '.join(missing)}.")
    with contextlib.suppress(RowError):  # options that do not fit raise another error, before anything is read
        list(convert([] if source.group_by else {}, **options))


def map_pairs(
    raw: Dataset,
    convert: Callable[[Mapping[str, Any], int], Iterator[dict[str, Any]]],
    conversion: Conversion,
    features: Features,
    **options: Any,
) -> Dataset:
    """Make a data set of all that `convert` yields for a raw row and its index; `options` are of `Dataset.map`."""

    def convert_batch(batch: dict[str, list[Any]], indices: list[int], version: str) -> dict[str, list[Any]]:
        pairs = [pair for row, at in zip(batch_rows(batch), indices, strict=True) for pair in convert(row, at)]
        return {name: [pair[name] for pair in pairs] for name in features}

    sizes = dict.fromkeys(("batch_size", "writer_batch_size"), rows_at_once(raw))
    # Files decide too: links under `image_root`, or the frames of a video.
    caching = {} if conversion.image_root is None and not conversion.source.has_videos else uncached()
    options = {**sizes, "desc": f"Reading {conversion.name}", **caching, **options}
    # The version is part of what `datasets` finds a cached result by; the code of adapters is not.
    options |= {"features": features, "remove_columns": raw.column_names, "fn_kwargs": {"version": __version__}}
    return raw.map(convert_batch, batched=True, with_indices=True, **options)


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

    def convert(row: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
        if groups is not None:
            row = {"group": [raw[int(member)] for member in groups[index]]}
        return conversion.convert(row, first + index)

    given = raw if groups is None else Dataset.from_dict({"group": range(count)})
    sizes = {} if groups is None else {"batch_size": 10, "writer_batch_size": rows_at_once(raw)}
    workers = num_proc if count >= (num_proc or 1) else None
    converted = map_pairs(given, convert, conversion, conversion.features, num_proc=workers, **sizes)
    rows = np.flatnonzero(pc.not_equal(column_of(converted, "reason"), "").to_numpy(zero_copy_only=False))
    notes = converted.select(rows).select_columns(["pair_id", *NOTES])
    kept = converted.remove_columns(list(NOTES))
    kind = "prompt" if conversion.is_ranked else "pair"
    return take_out(kept, rows, notes, name=f"{kind} of {name}", on_bad_row=on_bad_row, file=quarantine_file)


def _stream(
    raw: IterableDataset, conversion: Conversion, on_bad_row: str, shard: tuple[int, int] | None
) -> IterableDataset:
    if conversion.source.group_by is not None:
        raise ValueError(
            f"Pairs of {conversion.name} are formed from several rows, which may be far apart; load it without "
            "`streaming` (it is read from disk as needed, and not held in memory)."
        )
    counts: Counter[str] = Counter()
    features = Features({name: feature for name, feature in conversion.features.items() if name not in NOTES})

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        made: list[dict[str, Any]] = []
        for row, index in zip(batch_rows(batch), indices, strict=True):
            if shard is None or index % shard[1] == shard[0]:
                made += filter(is_good, conversion.convert(row, index))
        return {column: [pair[column] for pair in made] for column in features}

    def is_good(pair: dict[str, Any]) -> bool:
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
