"""One text-to-image pair: what makes it bad, which place and wording it gets, and the canonical row made of it.

Each row is a function of the pair, of the seed and of how many good pairs of its source came before it, so that a set
in memory and the same set streamed give the same rows, with any number of processes.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

from PIL import Image

from ..utils import digest
from .canonical import as_image, content_group
from .errors import RowError
from .identity import image_identity
from .locations import ImageOptions, placed_image
from .t2i_templates import CHINESE, ENGLISH, T2ITemplate, is_chinese


_BYTES = (bytes, bytearray, memoryview)
_DEFAULTS = ImageOptions()


class Columns(NamedTuple):
    """Where a set keeps its pairs."""

    caption: str
    chosen_image: str
    rejected_image: str
    strength: str | None


@dataclass(frozen=True)
class Plan:
    """How pairs become rows."""

    columns: Columns
    seed: int
    templates: tuple[T2ITemplate, ...] | None
    both_orders: bool
    extras: tuple[str, ...]
    options: ImageOptions = field(default_factory=ImageOptions)


def find_bad_pair(row: Mapping[str, Any], columns: Columns, options: ImageOptions = _DEFAULTS) -> RowError | None:
    """The reason why a pair cannot be used, or `None`. With an `image_root`, no path may leave it."""
    try:
        _check_caption(columns.caption, row.get(columns.caption))
        names = (columns.chosen_image, columns.rejected_image)
        images = [_placed(_checked_image(name, row.get(name)), options) for name in names]
        if all(isinstance(image, Mapping) for image in images):
            are_equal = images[0] == images[1]
        else:
            are_equal = image_identity(images[0]) == image_identity(images[1])
        if are_equal:
            raise RowError(
                "equal_images",
                f"`{columns.chosen_image}` and `{columns.rejected_image}` are one image; drop the row, there is "
                "nothing to prefer.",
            )
        if columns.strength is not None:
            _check_strength(columns.strength, row.get(columns.strength))
    except RowError as error:
        return error
    return None


def _check_caption(name: str, caption: Any) -> None:
    if caption is not None and not isinstance(caption, str):
        raise RowError("not_conversational", f"`{name}` is of type {type(caption).__name__}; give a string.")
    if caption is None or not caption.strip():
        raise RowError("empty_caption", f"`{name}` is empty; give the caption or drop the row.")
    try:
        caption.encode()
    except UnicodeEncodeError:
        message = f"`{name}` holds half a surrogate pair, which is no character; mend the text."
        raise RowError("not_conversational", message) from None


def _checked_image(name: str, image: Any) -> Any:
    image = _as_struct(image)
    if image is None:
        raise RowError("image_missing", f"`{name}` is missing or empty; give the image or drop the row.")
    if not isinstance(image, (Mapping, Image.Image)):
        raise RowError("image_type", f"`{name}` is of type {type(image).__name__}; give bytes, a path or a PIL image.")
    return image


def _placed(image: Any, options: ImageOptions) -> Any:
    """A path made whole by the image root; anything else as it is."""
    return placed_image(image, options) if isinstance(image, Mapping) else image


def _check_strength(name: str, value: Any) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= sys.float_info.max):
        raise RowError(
            "bad_strength",
            f"`{name}` is {value!r:.40}; give a finite number that is not negative, or None if unknown.",
        )


def canonical_rows(row: Mapping[str, Any], plan: Plan, chosen_first: bool | None) -> list[dict[str, Any]]:
    """The row of a good pair, or its two rows with `both_orders`."""
    columns = plan.columns
    caption = row[columns.caption]
    sides = (columns.chosen_image, columns.rejected_image)
    chosen, rejected = (_placed(_as_struct(row[side]), plan.options) for side in sides)
    strength = None if columns.strength is None else row.get(columns.strength)
    pair_id = _name(row.get("pair_id")) or content_group(caption, [chosen, rejected], [])
    templates = plan.templates or (CHINESE if is_chinese(caption) else ENGLISH)
    template = templates[_draw(plan.seed, "wording", pair_id) % len(templates)]
    common = {
        "prompt": [{"role": "user", "content": template.question(caption)}],
        "strength": None if strength is None else float(strength),
        "group_id": _name(row.get("group_id")) or content_group(caption, [], []),
        "source": _name(row.get("source")),
        "source_id": _name(row.get("source_id")),
        "t2i_caption": caption,
        "t2i_first": template.first_is_better,
        **{name: row.get(name) for name in plan.extras},
    }
    rows = []
    for is_first in (True, False) if plan.both_orders else (chosen_first,):
        verdicts = (template.first_is_better, template.second_is_better)
        better, worse = verdicts if is_first else verdicts[::-1]
        order = "ab" if is_first else "ba"
        rows.append(
            {
                **common,
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": better}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": worse}]}],
                "images": [chosen, rejected] if is_first else [rejected, chosen],
                "pair_id": f"{pair_id}-{order}" if plan.both_orders else pair_id,
                "t2i_order": order if plan.both_orders else None,
            }
        )
    return rows


def shows_chosen_first(seed: int, source: str | None, index: int) -> bool:
    """
    Whether a row shows the better image first.

    Rows 2k and 2k + 1 of a source show it in different places, and a coin says which row shows it first.

    Args:
        seed (`int`):
            The seed.
        source (`str`, *optional*):
            The row's source.
        index (`int`):
            How many good rows of the source come before it.

    Returns:
        `bool`
    """
    block, place = divmod(index, 2)
    return (_draw(seed, "position", source, block) + place) % 2 == 0


def next_position(seed: int, source: Any, seen: Counter[str | None]) -> bool:
    """Whether the next good row shows the better image first; `seen` counts the rows of each source."""
    name = _name(source)
    seen[name] += 1
    return shows_chosen_first(seed, name, seen[name] - 1)


def _draw(*parts: Any) -> int:
    """An integer of 64 bits that looks random and depends on nothing but `parts`."""
    return int(digest(repr(parts))[:16], 16)


def _name(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _as_struct(image: Any) -> Any:
    """
    An encoded image as `{"bytes": ..., "path": ...}` with one of the two, or `None`; anything else as it is.

    A path beside bytes goes, because `datasets` would read the file of that name in the working directory instead of
    the bytes, if there is one.
    """
    if isinstance(image, Mapping):
        content = image.get("bytes")
        is_empty = content is None or (isinstance(content, _BYTES) and len(content) == 0)
        image = image.get("path") if is_empty else content
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if isinstance(image, (*_BYTES, str)):
        return as_image(image) if len(image) else None
    return image
