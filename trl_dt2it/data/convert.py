"""Conversion of a source's raw rows to canonical rows: names, paths under the image root, frames, checks."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from transformers.utils import logging

from .columns import AnyDataset, column_names, retype_images, uncached
from .images import ImageOptions, is_address, placed_image
from .messages import FEATURES, PROVENANCE, T2I_FEATURES, VIDEO_FEATURES
from .rows import RowError, check_row
from .sources.fields import FOLDER_COLUMN, JSON_COLUMN, Source, is_given, name_field, strength_field
from .t2i import Columns, find_bad_pair


logger = logging.get_logger(__name__)

# Columns beside those of a row: the index of its raw row, and the reason why it cannot be used ("" if it can).
VERDICT = {"row": Value("int64"), "reason": Value("string"), "message": Value("string")}

_T2I_COLUMNS = Columns("caption", "chosen_image", "rejected_image", "strength")

# Columns that mean the same in any source that has them.
_SHARED = ("strength", "margin", "weight", *PROVENANCE)

# Columns that mean something in canonical rows; a source's own columns of these names are renamed.
_TAKEN = {
    *(*VIDEO_FEATURES, *T2I_FEATURES, *VERDICT, *_SHARED, "image", "tools", "chat_template_kwargs", "row_index"),
    *(f"{side}_{ids}" for side in ("chosen", "rejected") for ids in ("ids", "input_ids")),
}

_PLAIN = ("string", "int64", "int32", "int16", "int8", "float64", "float32", "bool", "uint8", "uint16", "uint32")

_SCALARS = {"str": "string", "int": "int64", "float": "float64", "bool": "bool"}

# Column types by the kinds of values in JSON; any other combination is kept as text.
_TYPES: dict[frozenset[str], Any] = {
    **{frozenset({kind}): Value(dtype) for kind, dtype in _SCALARS.items()},
    frozenset({"int", "float"}): Value("float64"),
    **{frozenset({f"list of {kind}"}): List(Value(dtype)) for kind, dtype in _SCALARS.items()},
    **{frozenset({f"list of {kind}", "list of "}): List(Value(dtype)) for kind, dtype in _SCALARS.items()},
    frozenset({"list of int", "list of float"}): List(Value("float64")),
}

_FIRST_ROWS = 1000  # of a stream, which tell its columns

_SAID: set[str] = set()  # columns that a warning has named


@dataclass(frozen=True)
class OwnColumns:
    """Columns of a source that its adapter does not read, and that rows keep."""

    reads: tuple[str, ...] = ()  # columns or paths that the adapter reads
    shared: tuple[str, ...] = ()  # columns that mean in the source what they mean in canonical rows
    names: dict[str, str] = field(default_factory=dict)  # new name of each column that is kept
    features: dict[str, Any] = field(
        default_factory=dict
    )  # types by new name, and that of `weight` where it is shared
    is_whole: bool = True  # read from all rows, not from the first rows of a stream

    def values(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Collect the values that a pair keeps, of several raw rows those that they share."""
        kept = {}
        for name, new in self.names.items():
            value, *others = (_unread(row.get(name), name, self.reads) for row in rows)
            if all(other == value for other in others):
                kept[new] = _fitting(value, self.features[new], name)
        if not self.is_whole:
            known = {*self.reads, *self.shared, *self.names, *_SAID}
            for name in (name for name in rows[0] if name not in known and is_given(rows[0][name])):
                _SAID.add(name)
                logger.warning(
                    f"The column `{name}` is in none of the first {_FIRST_ROWS} rows of the stream and is not kept; "
                    "load the set without `streaming` to keep it."
                )
        return kept


@dataclass(frozen=True)
class Conversion:
    """Conversion of the raw rows of one source. Picklable, for worker processes."""

    source: Source
    name: str  # for the column `source`, and at the beginning of `pair_id` and `group_id`
    options: dict[str, Any] = field(default_factory=dict)  # of the adapter
    image_root: str | None = None  # folder that relative image paths start from, and that no path may leave
    max_frames: int = 32  # most frames of a video, taken evenly from its folder
    overrides: bool = False  # `name` replaces a `source` in the rows
    own: OwnColumns = field(default_factory=OwnColumns)

    @property
    def features(self) -> Features:
        """Columns of a converted row and of its verdict."""
        return Features({**_columns(self.source), **self.own.features})

    @property
    def caching(self) -> dict[str, Any]:
        """Arguments of `Dataset.map`, uncached where files decide: links under `image_root`, or frames of a video."""
        return {} if self.image_root is None and not self.source.has_videos else uncached()

    def convert(self, raw: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
        """Yield the canonical rows of a raw row."""
        made, nothing = list(self._pairs(raw)), dict.fromkeys([*_columns(self.source), *self.own.features])
        for number, pair in enumerate(made):
            suffix = f"{index}-{number}" if len(made) > 1 else str(index)
            if not isinstance(pair, RowError):
                try:
                    if len(made) > 1 and pair.get("pair_id"):
                        pair["pair_id"] += f"-{number}"
                    pair = self._finished(pair, suffix, raw.get(FOLDER_COLUMN))
                except RowError as error:
                    pair = error
            if isinstance(pair, RowError):
                names = {"pair_id": f"{self.name}-{suffix}", "source": self.name}
                yield {**nothing, **names, "row": index, "reason": pair.reason, "message": str(pair)}
            else:
                yield {**nothing, **pair, "row": index, "reason": "", "message": ""}

    def _pairs(self, raw: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
        try:
            row = _parsed(raw)
            if row is not None:
                rows = row if isinstance(row, list) else [row]
                shared, own = self._shared(rows), self.own.values(rows)
                for pair in self.source.convert(row, **self.options):
                    yield pair if isinstance(pair, RowError) else {**pair, **shared, **own}
        except RowError as error:
            yield error

    def _shared(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Collect the values of columns that mean the same everywhere, where all raw rows of a pair share them."""
        row = {name: rows[0].get(name) for name in self.own.shared}
        row = {name: value for name, value in row.items() if all(other.get(name) == value for other in rows)}
        values: dict[str, Any] = {name: name_field(row, name) for name in PROVENANCE}
        values["strength"] = strength_field(row, "strength" if row.get("strength") is not None else "margin")
        values["weight"] = strength_field(row, "weight", "bad_weight")
        return {name: value for name, value in values.items() if value is not None}

    def _finished(self, pair: dict[str, Any], suffix: str, folder: str | None) -> dict[str, Any]:
        is_named = bool(pair.get("source")) and not self.overrides  # rows may bring their own names
        is_hash = "source" in self.own.shared and "group_id" not in self.own.shared  # made by the adapter
        pair = {
            **pair,
            "source": pair["source"] if is_named else self.name,
            "pair_id": pair.get("pair_id") or f"{self.name}-{suffix}",
            "group_id": pair["group_id"] if is_named and not is_hash else f"{self.name}-{pair['group_id']}",
        }
        if self.source.is_t2i:
            # Here, where a bad pair is listed, and not only when it is reformulated.
            if (error := find_bad_pair(pair, _T2I_COLUMNS, ImageOptions())) is not None:
                raise error
            return pair | {side: self._placed(pair[side], folder) for side in ("chosen_image", "rejected_image")}
        pair["images"] = [self._placed(image, folder) for image in pair["images"]]
        if "videos" in pair:
            pair["videos"] = [self._frames(video, folder) for video in pair["videos"]]
        if not self.source.is_checked:
            check_row(pair)
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
            step = (len(frames) - 1) / max(1, self.max_frames - 1)
            frames = [frames[round(step * index)] for index in range(self.max_frames)]
        return [{"bytes": None, "path": str(frame)} for frame in frames]


def find_own_columns(raw: AnyDataset, conversion: Conversion) -> OwnColumns:
    """Find the columns of a source that its adapter does not read."""
    is_json, is_whole = JSON_COLUMN in column_names(raw), True
    if is_json:
        is_whole = isinstance(raw, Dataset)
        paths = {path for path in conversion.options.values() if isinstance(path, str) and "." in path}
        types = _json_columns(_lines(raw), paths)
    else:
        types = _features(raw)
    given = conversion.source.reads
    reads = set(given if isinstance(given, tuple) else given(set(types), conversion.options))
    unread = {
        name: _unread(feature, name, reads, drops_empty=True)
        for name, feature in types.items()
        if name not in (*reads, FOLDER_COLUMN)
    }
    shared = {name for name in _SHARED if isinstance(feature := unread.get(name), Value) and feature.dtype in _PLAIN}
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
    features = {names[name]: retype_images(feature, Image()) for name, feature in own.items()}
    features |= {"weight": Value("float64")} if "weight" in shared else {}
    return OwnColumns(tuple(sorted(reads - own.keys())), tuple(sorted(shared)), names, features, is_whole)


def _lines(raw: AnyDataset) -> Iterator[str]:
    """Yield the JSON lines of a set, of a stream the first."""
    if isinstance(raw, Dataset):
        for chunk in raw.data.column(JSON_COLUMN).chunks:
            yield from chunk.to_pylist()
    else:
        yield from (row[JSON_COLUMN] for row in raw.take(_FIRST_ROWS))


def _features(raw: AnyDataset) -> dict[str, Any]:
    """Collect the types of the columns that have any value."""
    if not isinstance(raw, Dataset):  # which may have them from its first rows alone
        return dict(raw.features or Dataset.from_list(list(raw.take(_FIRST_ROWS // 10))).features)
    counts = {name: raw.data.column(name).null_count for name in raw.column_names}
    return {name: raw.features[name] for name, count in counts.items() if count < len(raw.data)}


def _json_columns(lines: Iterable[str], paths: Collection[str]) -> dict[str, Any]:
    """Collect the types of all keys in rows of JSON, apart from `paths`: numbers, strings and lists of them as they
    are, others as JSON text.
    """
    kinds: dict[str, set[str]] = {}
    for line in lines:
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:  # which its conversion reports
            continue
        for name, value in row.items() if isinstance(row, dict) else ():
            value = _unread(value, name, paths)
            if value is not None and value != {}:
                kinds.setdefault(name, set()).add(_kind(value))
    # A large string tells JSON text from strings.
    return {
        name: _TYPES.get(frozenset(seen), Value("string" if seen <= {*_SCALARS, "large"} else "large_string"))
        for name, seen in kinds.items()
    }


def _kind(value: Any) -> str:
    if isinstance(value, list):
        kinds = {_kind(item) for item in value} or {""}
        return f"list of {kinds.pop()}" if len(kinds) == 1 else "list"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "large"
    return "object" if isinstance(value, dict) else type(value).__name__


def _unread(value: Any, name: str, reads: Collection[str], *, drops_empty: bool = False) -> Any:
    """Remove from the value or the type of a field the parts that are read."""
    if not isinstance(value, Mapping):
        return value
    rests = [path.partition(".")[2] for path in reads if path.startswith(f"{name}.")]
    if not rests:
        return value
    kept = {key: _unread(part, key, rests, drops_empty=drops_empty) for key, part in value.items() if key not in rests}
    return {key: part for key, part in kept.items() if part != {}} if drops_empty else kept


def _fitting(value: Any, feature: Any, name: str) -> Any:
    """Fit a value of JSON to the type of its column; a string holds any."""
    if value is None or value == {} or not isinstance(feature, Value):
        return value or None if value == {} else value
    if feature.dtype in ("string", "large_string"):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return text.encode(errors="replace").decode()  # half a surrogate pair fits into no file
    if isinstance(value, (str, list, dict)) and feature.dtype in _SCALARS.values():
        raise ValueError(
            f"`{name}` is {value!r:.40}, but {feature.dtype} in the first rows of the stream; load the set without "
            "`streaming`."
        )
    return value


@lru_cache
def _columns(source: Source) -> dict[str, Any]:
    columns = T2I_FEATURES if source.is_t2i else VIDEO_FEATURES if source.has_videos else FEATURES
    return {**columns, **({"weight": Value("float64")} if source.has_weights else {}), **VERDICT}


def _by_number(file: Path) -> list[tuple[int, int | str]]:
    """Sort `frame_10` behind `frame_9`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", file.name)]


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
