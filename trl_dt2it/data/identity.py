"""Which row it is: a hash of what the model reads, the same before and after Arrow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from .errors import RowError
from .rows import SIDES, blocks, row_images, row_videos


def content_id(row: Mapping[str, Any]) -> str:
    """
    A stable identity of a row: a hash of what the model reads.

    It covers the messages (roles, texts, block types, tool calls), `tools`, `chat_template_kwargs`, images and videos;
    not `strength`, `source` and the like. A string content and one text block are the same. Bytes and paths survive an
    Arrow round trip; a decoded image is another image than the bytes that it came from.

    Args:
        row (`Mapping[str, Any]`):
            A row that [`check_row`] accepts.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        [`RowError`]: if an image has a type without identity, or does not decode.
    """
    content: dict[str, Any] = {field: _canonical(row.get(field)) for field in ("prompt", *SIDES)}
    content["images"] = [image_identity(image) for image in row_images(row)]
    content["videos"] = [[video.fps, *map(image_identity, video.frames)] for video in row_videos(row)]
    for field in ("tools", "chat_template_kwargs"):
        content[field] = _without_empty(row.get(field)) or None
    return hashlib.sha256(_to_json(content).encode()).hexdigest()


def canonical_text(value: Any) -> str:
    return _to_json(_canonical(value))


def _canonical(value: Any) -> Any:
    """Messages with their blocks as lists and without what Arrow adds; a string stays a string."""
    if value is None or isinstance(value, str):
        return value
    return [{**_without_empty(message), "content": _without_empty(blocks(message))} for message in value]


def _to_json(value: Any) -> str:
    # `default` for what Arrow has and JSON has not, such as dates in the arguments of a tool call.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _without_empty(value: Any) -> Any:
    # Arrow turns a missing key into None and an empty struct into either, so that none of the three may count.
    if isinstance(value, Mapping):
        items = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None and item != {} and item != []}
    return [_without_empty(item) for item in value] if isinstance(value, (list, tuple)) else value


def image_identity(image: Any) -> list[Any]:
    """What tells an image from others: its bytes, its path, or its pixels, in this order; see [`content_id`]."""
    if isinstance(image, Mapping):  # the bytes win, as in `load_image`
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return ["bytes", hashlib.sha256(image).hexdigest()]
    if isinstance(image, (str, os.PathLike)):
        return ["path", os.fsdecode(image)]
    if isinstance(image, np.ndarray):
        return ["array", str(image.dtype), list(image.shape), hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(image, Image.Image):
        try:
            digest = hashlib.sha256(image.tobytes())
        except (OSError, SyntaxError, ValueError) as error:
            raise RowError("image_corrupt", f"an image does not decode ({error}); replace it.") from error
        digest.update(bytes(image.getpalette() or []))
        return ["pixels", image.mode, list(image.size), digest.hexdigest()]
    raise RowError("image_type", f"an image is of type {type(image).__name__}; give bytes, a path or a PIL image.")
