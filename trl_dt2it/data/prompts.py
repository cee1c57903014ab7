"""Prompts with images: a row's question or messages, checked, as messages whose contents are blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features
from datasets.fingerprint import generate_random_fingerprint

from .canonical import as_image, content_group, preference
from .errors import RowError
from .locations import ImageOptions, placed_image
from .rows import blocks, row_images, row_name
from .schema import check_row


@dataclass(frozen=True)
class Prompt:
    """
    What a row asks.

    Parameters:
        row (`int`):
            Place of the row in its data set.
        name (`str`):
            How messages name the row.
        messages (`list[dict]`):
            Messages with `role` and `content`, blocks with `type` and `text`, the last by the user.
        images (`list`):
            Its images, one for each image block, still encoded.
        content (`str`):
            A hash of messages and images.
        group_id (`str`):
            What all pairs about the prompt have in common.
        source_id (`str`, *optional*):
            The row's own name.
    """

    row: int
    name: str
    messages: list[dict[str, Any]]
    images: list[Any]
    content: str
    group_id: str
    source_id: str | None


def read_prompt(row: Mapping[str, Any], index: int, *, source: str) -> Prompt:
    """
    What a row asks.

    Args:
        row (`Mapping`):
            A row with `prompt` (messages, or a string) or `question` (with `<image>` where an image belongs, or with
            all images first), `images` or `image`, and optionally `group_id` and `source_id`.
        index (`int`):
            Its place in the data set.
        source (`str`):
            Beginning of a `group_id` that the row does not have.

    Returns:
        [`Prompt`]

    Raises:
        [`RowError`]: if the prompt is no prompt. Images are not looked at.
    """
    prompt = row.get("prompt")
    prompt = row.get("question") if prompt is None else prompt
    images = [as_image(image) for image in row_images(row)]
    if prompt is None:
        raise RowError("missing_column", "the row has neither `prompt` nor `question`; give one of them.")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("missing_column", "the question is empty; give one.")
        prompt = preference(prompt, "a", "b", images)["prompt"]
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    check_row({"prompt": prompt, **sides, "images": images})
    messages = [
        {"role": message["role"], "content": message["content"]} for message in with_image_blocks(prompt, len(images))
    ]
    if messages[-1]["role"] != "user":
        raise RowError(
            "not_conversational", f"`prompt` ends with a {messages[-1]['role']} message; end it with a user's."
        )
    content = content_group(messages, images, [])
    named = next((row[key] for key in ("source_id", "pair_id") if row.get(key) is not None), None)
    return Prompt(
        row=index,
        name=row_name(row, index),
        messages=messages,
        images=images,
        content=content,
        group_id=row.get("group_id") or f"{source}-{content}",
        source_id=None if named is None else str(named),
    )


def with_image_blocks(messages: Sequence[Mapping[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages with all contents as blocks of `type` and `text`. Where they were strings, the images come first, as in
    TRL."""
    made = [
        {
            **{key: value for key, value in one.items() if value is not None},
            "content": [{"type": block["type"], "text": block.get("text")} for block in blocks(one)],
        }
        for one in messages
    ]
    if num_images and not any(block["type"] == "image" for one in made for block in one["content"]):
        user = next(one for one in made if one["role"] == "user")
        user["content"][:0] = [{"type": "image", "text": None} for _ in range(num_images)]
    return made


def with_images(
    rows: Dataset,
    positions: list[int],
    columns: list[dict[str, Any]],
    image_options: ImageOptions,
    features: Features,
) -> Dataset:
    """Pairs, by their other columns, with the images of the rows at these positions, copied a few at a time."""
    if not columns:
        return Dataset.from_dict({name: [] for name in features}, features=features)

    def pair(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {
            **columns[index],
            "images": [placed_image(as_image(image), image_options) for image in row_images(row)],
        }

    kept = [name for name in ("images", "image") if name in rows.column_names]
    # Without a column, `map` would not know how many rows there are.
    chosen = rows.select_columns(kept or rows.column_names[:1]).select(positions)
    return chosen.map(
        pair,
        with_indices=True,
        remove_columns=chosen.column_names,
        features=features,
        load_from_cache_file=False,
        new_fingerprint=generate_random_fingerprint(),
        writer_batch_size=100,
        desc="Writing pairs",
    )
