"""The identity of a row: a hash of what it is about, the same before and after Arrow and before and after every random
choice of wording or order."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..utils import digest
from .errors import RowError
from .rows import SIDES, blocks, row_images, row_videos
from .t2i_templates import collapse, find_caption, prefers_first


class T2IIdentity(NamedTuple):
    """
    A text-to-image pair, however it is asked about.

    Parameters:
        caption (`str`):
            What both images were to show, white space collapsed.
        chosen (`list`):
            Identity of the better image, as [`image_identity`] gives it.
        rejected (`list`):
            Identity of the worse image.
        order (`str`, *optional*):
            `"ab"` or `"ba"` if the pair is asked about in both orders on request, each in a row of its own.
    """

    caption: str
    chosen: list[Any]
    rejected: list[Any]
    order: str | None


def content_id(row: Mapping[str, Any]) -> str:
    """
    A stable identity of a row: a hash of what it is about.

    It covers the messages (roles, texts, block types, tool calls), `tools`, `chat_template_kwargs`, images and videos;
    not `strength`, `source` and the like. A string content and one text block are the same. Bytes and paths survive an
    Arrow round trip; a decoded image is another image than the bytes that it came from.

    A text-to-image pair is its caption, its better and its worse image, before and after [`reformulate_t2i`], whatever
    the wording, its language and the order of the images; [`t2i_identity`] says which rows are known to be such. The
    two rows of a pair in both orders are two rows.

    Args:
        row (`Mapping[str, Any]`):
            A row that [`check_row`] accepts, or a text-to-image pair.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        [`RowError`]: if an image has a type without identity, or does not decode.
    """
    if (pair := t2i_identity(row)) is not None:
        return digest(_to_json(pair))
    content: dict[str, Any] = {field: _canonical(row.get(field)) for field in ("prompt", *SIDES)}
    content["images"] = [image_identity(image) for image in row_images(row)]
    content["videos"] = [[video.fps, *map(image_identity, video.frames)] for video in row_videos(row)]
    for field in ("tools", "chat_template_kwargs"):
        content[field] = _without_empty(row.get(field)) or None
    return digest(_to_json(content))


def t2i_identity(row: Mapping[str, Any]) -> T2IIdentity | None:
    """
    Read the text-to-image pair that a row is about.

    A row is known to be one by its columns `caption`, `chosen_image` and `rejected_image`; or, with two images in its
    only question, by the columns of [`~trl_dt2it.data.canonical.T2I_IDENTITY`]; or, without these, by a wording and
    verdicts that [`find_caption`] and [`prefers_first`] know. In rows without these columns, a `pair_id` that ends
    with `-ab` or `-ba` tells that the pair was asked about in both orders.

    Args:
        row (`Mapping[str, Any]`):
            Any row.

    Returns:
        [`T2IIdentity`] or `None`: `None` if the row is about something else, or its two images are one.

    Raises:
        [`RowError`]: as [`image_identity`] does.
    """
    caption, images = row.get("caption"), [row.get("chosen_image"), row.get("rejected_image")]
    if isinstance(caption, str) and row.get("chosen") is None and not any(image is None for image in images):
        chosen, rejected = map(image_identity, images)
        return None if chosen == rejected else T2IIdentity(collapse(caption), chosen, rejected, None)
    images = row_images(row)
    if len(images) != 2 or any(image is None for image in images):
        return None
    if any(row.get(field) for field in ("videos", "tools", "chat_template_kwargs")):
        return None
    question = _only_question(row)
    if question is None:
        return None
    better, worse = (_only_text(row.get(side), question[1]) for side in SIDES)
    if better is None or worse is None:
        return None
    caption, first = row.get("t2i_caption"), row.get("t2i_first")
    is_marked = isinstance(caption, str) and isinstance(first, str)
    if is_marked and first in (better, worse) and better != worse:
        is_first: bool | None = better == first
    else:  # by the words: of a row without the columns, or of which somebody rewrote the verdicts
        caption = caption if is_marked else find_caption(question[0])
        is_first = prefers_first(better)
        if not isinstance(caption, str) or is_first is None or prefers_first(worse) is not (not is_first):
            return None
    named = re.search(r"-(ab|ba)(#\d+)?$", str(row.get("pair_id") or ""))
    order = row.get("t2i_order") if is_marked else named and named[1]
    chosen, rejected = map(image_identity, images if is_first else images[::-1])
    return None if chosen == rejected else T2IIdentity(collapse(str(caption)), chosen, rejected, order)


def _only_question(row: Mapping[str, Any]) -> tuple[str, int] | None:
    """The text of the only user turn, images as white space, and how many messages of both answers it takes; `None` if
    there are other turns than a system prompt."""
    prompt, length = row.get("prompt"), 0
    if prompt is None and isinstance(row.get("chosen"), (list, tuple)):  # whole conversations
        prompt = row["chosen"][:-1]
        length = len(prompt)
        if prompt != (row.get("rejected") or [])[:-1]:
            return None
    if not isinstance(prompt, (list, tuple)):
        return None
    turns = [message for message in prompt if message.get("role") != "system"]
    if len(turns) != 1 or turns[0].get("role") != "user":
        return None
    return " ".join(block.get("text") or "" for block in blocks(turns[0])), length


def _only_text(answer: Any, start: int) -> str | None:
    if not isinstance(answer, (list, tuple)) or len(answer) != start + 1:
        return None
    return "".join(block.get("text") or "" for block in blocks(answer[-1]))


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
        return ["bytes", digest(image)]
    if isinstance(image, (str, os.PathLike)):
        return ["path", os.fsdecode(image)]
    if isinstance(image, np.ndarray):
        return ["array", str(image.dtype), list(image.shape), digest(image.tobytes())]
    if isinstance(image, Image.Image):
        try:
            pixels = image.tobytes()
        except (OSError, SyntaxError, ValueError) as error:
            raise RowError("image_corrupt", f"an image does not decode ({error}); replace it.") from error
        return ["pixels", image.mode, list(image.size), digest(pixels, bytes(image.getpalette() or []))]
    raise RowError("image_type", f"an image is of type {type(image).__name__}; give bytes, a path or a PIL image.")
