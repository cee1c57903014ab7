"""From a raw row of a source to finished canonical rows: identity, paths under the image root, frames, checks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Features, Value
from datasets.fingerprint import generate_random_fingerprint

from .canonical import FEATURES, T2I_FEATURES, VIDEO_FEATURES
from .errors import RowError
from .locations import ImageOptions, allowed_path
from .reading import FOLDER_COLUMN, JSON_COLUMN
from .schema import check_row
from .sources.source import Source
from .t2i_rows import Columns, find_bad_pair


# Beside a row: which raw row it comes from, and why it cannot be used ("" if it can).
VERDICT = {"row": Value("int64"), "reason": Value("string"), "message": Value("string")}
_T2I_COLUMNS = Columns("caption", "chosen_image", "rejected_image", "strength")


@dataclass(frozen=True)
class Conversion:
    """
    What turns raw rows of one source into canonical rows. It can be pickled, for worker processes.

    Parameters:
        source ([`Source`]):
            The source.
        name (`str`):
            What the column `source` says, and the beginning of `pair_id` and `group_id`.
        options (`dict`, *optional*):
            Options of the adapter.
        image_root (`str`, *optional*):
            Folder that relative image paths start from, and that no path may leave.
        max_frames (`int`, *optional*, defaults to `32`):
            Most frames of a video, taken evenly from its folder.
        overrides (`bool`, *optional*, defaults to `False`):
            Whether `name` stands in place of a `source` that rows bring.
    """

    source: Source
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    image_root: str | None = None
    max_frames: int = 32
    overrides: bool = False

    @property
    def features(self) -> Features:
        """Columns of a converted row and of its verdict."""
        return Features(_columns(self.source))

    @property
    def caching(self) -> dict[str, Any]:
        """Arguments of `Dataset.map` that keep it from answering out of its cache where files on disk decide: where
        links under `image_root` lead, and which frames of a video are there."""
        if self.image_root is None and not self.source.has_videos:
            return {}
        return {"load_from_cache_file": False, "new_fingerprint": generate_random_fingerprint()}

    def convert(self, raw: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
        """
        The canonical rows that a raw row holds.

        Args:
            raw (`Mapping`):
                The row as [`read_raw`] gives it, or `{"group": [...]}` of a grouped source.
            index (`int`):
                Its place in the source.

        Yields:
            `dict`: the columns of `features`. Of a pair that cannot be used, all but the verdict and what names it
            are `None`.
        """
        made, nothing = list(self._pairs(raw)), dict.fromkeys(_columns(self.source))
        for number, pair in enumerate(made):
            place = f"{index}-{number}" if len(made) > 1 else str(index)
            if not isinstance(pair, RowError):
                try:
                    pair = self._finished(pair, place, raw.get(FOLDER_COLUMN))
                except RowError as error:
                    pair = error
            if isinstance(pair, RowError):
                names = {"pair_id": f"{self.name}-{place}", "source": self.name}
                yield {**nothing, **names, "row": index, "reason": pair.reason, "message": str(pair)}
            else:
                yield {**nothing, **pair, "row": index, "reason": "", "message": ""}

    def _pairs(self, raw: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
        try:
            row = _parsed(raw)
            if row is not None:
                yield from self.source.convert(row, **self.options)
        except RowError as error:
            yield error

    def _finished(self, pair: dict[str, Any], place: str, folder: str | None) -> dict[str, Any]:
        named = bool(pair.get("source")) and not self.overrides  # rows of a format may bring their own names
        pair = {
            **pair,
            "source": pair["source"] if named else self.name,
            "pair_id": pair.get("pair_id") or f"{self.name}-{place}",
            "group_id": pair["group_id"] if named else f"{self.name}-{pair['group_id']}",
        }
        if self.source.is_t2i:
            # Here, where a bad pair is listed, and not only when it is reformulated.
            if (error := find_bad_pair(pair, _T2I_COLUMNS)) is not None:
                raise error
            return pair | {side: self._placed(pair[side], folder) for side in ("chosen_image", "rejected_image")}
        pair["images"] = [self._placed(image, folder) for image in pair["images"]]
        if "videos" in pair:
            pair["videos"] = [self._frames(video, folder) for video in pair["videos"]]
        check_row(pair)
        return pair

    def _placed(self, image: Any, folder: str | None) -> Any:
        """An image of which only a path is known, with the path from `image_root` on."""
        if not isinstance(image, Mapping) or image.get("bytes") is not None or not image.get("path"):
            return image
        return {"bytes": None, "path": self._path(image["path"], folder)}

    def _path(self, path: str, folder: str | None) -> str:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
            return path  # an address, which only who allows its host will read
        path = str(Path(folder, path)) if folder else path
        options = ImageOptions(image_root=self.image_root)
        return str(allowed_path(path, options)) if self.image_root is not None else path

    def _frames(self, video: Any, folder: str | None) -> list[Any]:
        """The frames of a video: given ones, or evenly taken ones of a folder in the order of their numbers."""
        if not isinstance(video, str):
            return [self._placed(frame, folder) for frame in video]
        path = Path(self._path(video, folder))
        if not path.is_dir():
            raise RowError("image_missing", f"the video {video!r:.300} is no folder of frames; check `image_root`.")
        frames = sorted((file for file in path.iterdir() if file.is_file()), key=_by_number)
        if len(frames) > self.max_frames:
            step = (len(frames) - 1) / max(1, self.max_frames - 1)
            frames = [frames[round(step * place)] for place in range(self.max_frames)]
        return [{"bytes": None, "path": str(frame)} for frame in frames]


@lru_cache
def _columns(source: Source) -> dict[str, Any]:
    columns = T2I_FEATURES if source.is_t2i else VIDEO_FEATURES if source.has_videos else FEATURES
    return {**columns, **({"weight": Value("float64")} if source.has_weights else {}), **VERDICT}


def _by_number(file: Path) -> list[tuple[int, int | str]]:
    """Sorts `frame_10` behind `frame_9`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", file.name)]


def _parsed(raw: Mapping[str, Any]) -> Any:
    """A row as the source has it, all rows of a group, or `None` for a blank line."""
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
        raise RowError("not_conversational", f"the line is not JSON ({error}); mend the file.") from error
    if not isinstance(row, dict):
        raise RowError("not_conversational", f"the line holds a {type(row).__name__} and no object; mend the file.")
    return row
