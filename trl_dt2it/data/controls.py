"""Controls: a set with other images, to find out whether a model looks at them.

A control is the same `Dataset` with the same rows but for their images (or frames of videos), which are made when a
row is read. So nothing is copied or held in memory, and the workers of a data loader make the images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from PIL import Image
from transformers.utils import logging

from .columns import as_python, batch_rows, column_names, has_transform, leave_images_encoded
from .images import ImageOptions, change_images, check_image, load_image
from .mixing import TEXTS, with_columns
from .rows import RowError, blocks, image_identity, named_errors, row_images, row_videos


logger = logging.get_logger(__name__)

MEDIA = ("image", "images", "videos")

GRAY = (128, 128, 128)

# The row whose images are shown; `None` if a row has no images, or none can take their place.
DONOR_COLUMN = "image_row"


def blank(dataset: Dataset, *, image_options: ImageOptions | None = None) -> Dataset:
    """
    Show a gray image of the same size in place of each image.

    Args:
        dataset (`Dataset`):
            Preference rows, with images in `image`, `images` or `videos`.
        image_options ([`~trl_dt2it.data.images.ImageOptions`], *optional*):
            Allowed origins and sizes of the images whose size is read.

    Returns:
        `Dataset`: of the same rows. An image that cannot be read stays as it is, so that its reader names it.
    """
    return _changed(dataset, partial(_with_media, change=partial(_blank, options=image_options or ImageOptions())))


def low_resolution(dataset: Dataset, pixels: float = 0.5, *, image_options: ImageOptions | None = None) -> Dataset:
    """
    Scale each image down.

    Args:
        dataset, image_options (*optional*):
            As in [`blank`].
        pixels (`float`, *optional*, defaults to `0.5`):
            Share of the pixels that is left, in (0, 1]. The ratio of the sides stays.

    Returns:
        `Dataset`: as of [`blank`].

    Raises:
        `ValueError`: if `pixels` is not in (0, 1].
    """
    if not 0 < pixels <= 1:
        raise ValueError(f"`pixels` is {pixels!r}; give the share of the pixels that is left, in (0, 1].")
    shrink = partial(_shrunk, pixels=pixels, options=image_options or ImageOptions())
    return _changed(dataset, partial(_with_media, change=shrink))


def without_images(dataset: Dataset) -> Dataset:
    """
    Take images and videos out of the rows and out of their prompts.

    Args:
        dataset (`Dataset`):
            As in [`blank`].

    Returns:
        `Dataset`: of rows without the columns `image`, `images` and `videos`, which a text model can read.
    """
    return _changed(dataset, row_without_media)


def swapped(dataset: Dataset, *, seed: int = 0) -> Dataset:
    """
    Show each row the images of another row, drawn at random.

    The other row is of the same `source` where one is left to draw, has as many images and videos, and shares none
    with the row: equal bytes, paths or pixels count as the same.

    Args:
        dataset (`Dataset`):
            As in [`blank`]. Its encoded images are read once, to compare them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Returns:
        `Dataset`: of the same rows, with the column `image_row` (int64), the row whose images are shown. It is null
        where a row keeps its own: because it has none, or because no other row has as many others, which is logged.

    Raises:
        `ValueError`: if no row can show the images of another, or if a row's images are of no known kind.
    """
    donors = leave_images_encoded(as_python(dataset))
    partners = _draw_partners(donors, np.random.default_rng(seed))
    plain = donors.with_format(None) if has_transform(donors) else donors
    marked = with_columns(plain, {DONOR_COLUMN: pa.array(partners, pa.int64())})
    return marked.with_transform(_Transform(partial(_with_media_of, donors=donors), _transform_of(donors)))


@dataclass(frozen=True)
class _Transform:
    """A transform of `datasets`, which makes rows when they are read, after one of the user's."""

    change: Callable[[dict[str, Any]], dict[str, Any]]
    before: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.before is not None:
            added = {name: batch.pop(name) for name in (DONOR_COLUMN,) if name in batch}
            batch = {**self.before(batch), **added}
        rows = [self.change(row) for row in batch_rows(batch)]
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else batch)}


def _changed(dataset: Dataset, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Dataset:
    dataset = leave_images_encoded(as_python(dataset))
    return dataset.with_transform(_Transform(change, _transform_of(dataset)))


def _transform_of(dataset: Dataset) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    return dataset.format["format_kwargs"]["transform"] if has_transform(dataset) else None


def _with_media(row: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {**row, **{name: change_images(row[name], change) for name in MEDIA if row.get(name) is not None}}


def _blank(image: Any, options: ImageOptions) -> Any:
    try:
        return Image.new("RGB", check_image(image, options), GRAY)
    except RowError:
        return image


def _shrunk(image: Any, pixels: float, options: ImageOptions) -> Any:
    try:
        loaded = load_image(image, options)
    except RowError:
        return image
    width, height = (max(1, round(side * pixels**0.5)) for side in loaded.size)
    return loaded.resize((width, height), Image.Resampling.BICUBIC)


def row_without_media(row: dict[str, Any]) -> dict[str, Any]:
    """Take images and videos out of a row and out of its texts."""
    texts = {name: _without_blocks(row[name]) for name in TEXTS if isinstance(row.get(name), list)}
    return {**{name: value for name, value in row.items() if name not in MEDIA}, **texts}


def _without_blocks(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [block for block in blocks(message) if block["type"] == "text"]}
        if isinstance(message.get("content"), (list, tuple))
        else message
        for message in messages
    ]


def _with_media_of(row: dict[str, Any], donors: Dataset) -> dict[str, Any]:
    if row[DONOR_COLUMN] is None:
        return row
    donor = donors[row[DONOR_COLUMN]]
    return {**row, **{name: donor[name] for name in MEDIA if name in donor}}


def _draw_partners(dataset: Dataset, rng: np.random.Generator) -> list[int | None]:
    """Draw for each row another whose images it can show, from its source if possible."""
    needed = [name for name in (*MEDIA, "source") if name in column_names(dataset)]
    media: list[frozenset[str]] = []
    pools: dict[tuple[Any, ...], list[int]] = {}
    keys: list[list[tuple[Any, ...]]] = []  # of the pools of each row, the best first
    for index, row in enumerate(dataset if has_transform(dataset) else dataset.select_columns(needed)):
        with named_errors(row, index):
            images, videos = row_images(row), row_videos(row)
            shown = [*images, *(frame for video in videos for frame in video.frames)]
            media.append(frozenset(repr(image_identity(image)) for image in shown))
        counts = (len(images), *(len(video.frames) for video in videos))
        keys.append([(row.get("source"), counts), (counts,)] if media[-1] else [])
        for key in keys[-1]:
            pools.setdefault(key, []).append(index)
    shuffled = {key: rng.permutation(rows) for key, rows in pools.items() if len({media[row] for row in rows}) > 1}

    def draw(row: int) -> int | None:
        for pool in (shuffled[key] for key in keys[row] if key in shuffled):
            start = int(rng.integers(len(pool)))
            order = (int(pool[position % len(pool)]) for position in range(start, start + len(pool)))
            found = next((other for other in order if media[other].isdisjoint(media[row])), None)
            if found is not None:
                return found
        return None

    partners = [draw(row) for row in range(len(media))]
    alone = sum(partner is None and bool(own) for partner, own in zip(partners, media, strict=True))
    if all(partner is None for partner in partners):
        raise ValueError(
            f"None of the {len(media)} rows can show the images of another: "
            f"{'no other row has as many, and different ones' if alone else 'they have no images'}."
        )
    if alone:
        logger.warning(f"{alone} of {len(media)} rows keep their own images: no other row has as many others.")
    return partners
