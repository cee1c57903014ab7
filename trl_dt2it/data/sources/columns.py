"""Any other table: which column is what, said by the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..canonical import preference
from ..errors import RowError
from .fields import (
    answer_field,
    image_field,
    images_field,
    name_field,
    prompt_field,
    strength_field,
    text_field,
    with_system,
)
from .source import Source


def columns(
    row: Mapping[str, Any],
    *,
    question: str,
    chosen: str,
    rejected: str,
    image: str | None = None,
    images: str | None = None,
    strength: str | None = None,
    source_id: str | None = None,
    group: str | None = None,
    system: str | None = None,
) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of any table with a question and two answers.

    All options are names of columns. `"a.b"` is the field `b` in the column `a`, unless a column has that very name.

    Args:
        row (`Mapping`):
            The row.
        question (`str`):
            The question, or a list of messages that ends with the user's. `<image>` is where an image goes.
        chosen (`str`):
            The better answer, or the message that holds it.
        rejected (`str`):
            The worse answer, or the message that holds it.
        image (`str`, *optional*):
            The image; a row without is an error.
        images (`str`, *optional*):
            A list of images, which may be empty or `None`.
        strength (`str`, *optional*):
            How much better the chosen answer is: a number that is not negative, or `None`.
        source_id (`str`, *optional*):
            The table's own name of the row.
        group (`str`, *optional*):
            What all pairs about one prompt have in common; by default a hash of prompt and images.
        system (`str`, *optional*):
            A system prompt, which may be empty or `None`.

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `missing_column` if a column is not there; `bad_strength`; `image_missing`; or if a text is of
            another type.
        `ValueError`: if both `image` and `images` are given.
    """
    if image and images:
        raise ValueError("`image` and `images` are both given; name one column.")
    named = (question, chosen, rejected, image, images, strength, source_id, group, system)
    # Every field under the name that the user knows, so that errors name it, too.
    found = {path: _value(row, path) for path in named if path}
    prompt = prompt_field(found, question) if isinstance(found[question], (list, tuple)) else None
    turns = prompt or [("user", text_field(found, question))]
    yield preference(
        with_system(turns, found, system) if system else turns,
        answer_field(found, chosen),
        answer_field(found, rejected),
        image_field(found, image) if image else images_field(found, images) if images else (),
        strength=strength_field(found, strength) if strength else None,
        group=name_field(found, group) if group else None,
        source_id=name_field(found, source_id) if source_id else None,
    )


def _value(row: Mapping[str, Any], path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(map(str, row))
            raise RowError("missing_column", f"there is no column `{path}`; the row has {there:.200}.")
        value = value[part]
    return value


COLUMNS = Source(columns, licence="unknown", note="The licence is that of your data set.")
