"""What a person sees of a row: its texts as they are, and small pictures of its images.

Of a file that a stranger wrote, a row may name any path. What the report shows is given to others, so only images that
lie in the data set itself or under `image_root` get into it, and nothing is fetched.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from ..data.export import check_publishable
from ..data.images import ImageOptions, load_image
from ..data.rows import SIDES, RowError, blocks, row_images, row_videos
from ..utils import digest


SIDE = 320  # pixels of the longer side of a thumbnail; small enough for some hundreds in a page
MOST_IMAGES = 4
MOST_CHARACTERS = 6000


def conversation(row: Mapping[str, Any]) -> dict[str, str]:
    """
    The texts of a row.

    Args:
        row (`Mapping`):
            A preference row.

    Returns:
        `dict`: `prompt`, `chosen` and `rejected`, shortened where they are very long. What both sides of a row with
        an implicit prompt begin with is the prompt.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not prompt and not isinstance(chosen, str):
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    texts = (prompt or "", chosen, rejected)
    # Where the only image belongs is plain.
    marks = len(row_images(row)) + len(row_videos(row)) > 1
    return {name: _shortened(_text(value, marks)) for name, value in zip(("prompt", *SIDES), texts, strict=True)}


def thumbnails(row: Mapping[str, Any], options: ImageOptions, images: dict[str, str]) -> list[Any]:
    """
    Small pictures of a row's images, of a video its first frame.

    Args:
        row (`Mapping`):
            A preference row.
        options ([`ImageOptions`]):
            Where images may come from and how large they may be. Hosts are not asked.
        images (`dict[str, str]`):
            Thumbnails by hash; gets the new ones.

    Returns:
        `list`: for each image its place among `images`, or why it is not shown.
    """
    options = replace(options, allowed_hosts=())
    try:
        values = [*row_images(row), *(video.frames[0] for video in row_videos(row))]
    except RowError as error:
        return [error.reason]
    found: list[Any] = []
    for value in values[:MOST_IMAGES]:
        try:
            content = _thumbnail(value, options)
        except RowError as error:
            found.append(error.reason)
            continue
        name = digest(content)
        kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
        images.setdefault(name, f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
        found.append(list(images).index(name))
    if len(values) > MOST_IMAGES:
        found.append(f"and {len(values) - MOST_IMAGES} more")
    return found


def _thumbnail(value: Any, options: ImageOptions) -> bytes:
    check_publishable(value, options)
    image = load_image(value, options)
    is_small = max(image.size) <= SIDE
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if is_small and image.width * image.height <= 128 * 128:  # drawings and strips stay sharp
        image.save(out, "PNG", optimize=True)
    else:
        image.save(out, "JPEG", quality=80)
    return out.getvalue()


def _text(value: Any, marks: bool) -> str:
    if isinstance(value, str):
        return value
    parts = []
    for message in value:
        text = "".join(_block(block, marks) for block in blocks(message)).strip()
        if message.get("tool_calls"):
            text = f"{text}\n{json.dumps(message['tool_calls'], ensure_ascii=False, default=str)}".strip()
        parts.append((message["role"], text))
    if len(parts) == 1:
        return parts[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in parts)


def _block(block: Mapping[str, Any], marks: bool) -> str:
    if block.get("type") == "text":
        return block.get("text") or ""
    return f"[{block.get('type')}] " if marks else ""


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}…\n[{len(text):,} characters in all]"
