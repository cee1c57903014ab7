"""Reading a row, before and after it is checked: its images, its name, the blocks of a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import RowError


SIDES = ("chosen", "rejected")
DEFAULT_FPS = 2.0


class Video(NamedTuple):
    """
    A video as its frames.

    Parameters:
        frames (`list`):
            The frames in their order, each as an image may be given.
        fps (`float`):
            How many of them make a second; above 0.
    """

    frames: list[Any]
    fps: float


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """
    The row's images, from `images` or `image`, as they are.

    Args:
        row (`Mapping[str, Any]`):
            The row.

    Returns:
        `list`: empty if the row has none.

    Raises:
        [`RowError`]: `image_type` if `images` is not a list, or if both columns hold images.
    """
    images, image = row.get("images"), row.get("image")
    if images is None:
        images = []
    if not isinstance(images, (list, tuple)):
        raise RowError(
            "image_type", f"`images` is of type {type(images).__name__}; it must be a list, also of a single image."
        )
    if image is None:
        return list(images)
    if images:
        raise RowError("image_type", "both `images` and `image` hold images; keep one of the two columns.")
    return [image]


def row_videos(row: Mapping[str, Any]) -> list[Video]:
    """
    The row's videos, which are given as frames: decoding and sampling a file is left to who makes the data set.

    Args:
        row (`Mapping[str, Any]`):
            The row. A video in `videos` is a list of frames, which come `2` a second, or a dict
            `{"frames": [...], "fps": ...}`.

    Returns:
        `list[Video]`: empty if the row has none.

    Raises:
        [`RowError`]: `video_type` if `videos` is no list, or a video is something else.
    """
    given, videos = row.get("videos") or [], []
    if not isinstance(given, (list, tuple)):
        raise RowError("video_type", f"`videos` is of type {type(given).__name__}; it must be a list of videos.")
    for index, video in enumerate(given):
        frames, fps = (video.get("frames"), video.get("fps")) if isinstance(video, Mapping) else (video, None)
        fps = DEFAULT_FPS if fps is None else fps
        if not isinstance(frames, (list, tuple)) or not frames:
            raise RowError(
                "video_type",
                f"`videos[{index}]` is of type {type(video).__name__}; give a list of frames, or a dict with `frames` "
                "and `fps`.",
            )
        if not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
            raise RowError("video_type", f"`videos[{index}]` has {fps!r:.40} as `fps`; give a positive number.")
        videos.append(Video(list(frames), float(fps)))
    return videos


def row_name(row: Mapping[str, Any], index: int | None = None) -> str:
    """
    How an error names a row.

    Args:
        row (`Mapping[str, Any]`):
            The row.
        index (`int`, *optional*):
            Its place in the data set.

    Returns:
        `str`: the row's `pair_id` if it has one, otherwise `"row {index}"`, or `"row"` where the place is not known.
    """
    pair_id = row.get("pair_id")
    if pair_id is not None and pair_id != "":
        return str(pair_id)
    return "row" if index is None else f"row {index}"


def blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The content of a message as blocks; a string is one text block."""
    content = message.get("content")
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
