"""What a row asks: its prompt with images, and a reference answer, checked and ready to be sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.canonical import as_image, content_group, preference
from ..data.errors import RowError
from ..data.locations import ImageOptions
from ..data.rows import blocks, row_images, row_name
from ..data.schema import check_row
from ..judge.fence import neutralise
from ..judge.prompts import image_block


@dataclass(frozen=True)
class Question:
    """
    What a row asks, without its candidates.

    Parameters:
        row (`int`):
            Place of the row in its data set.
        name (`str`):
            How messages name the row.
        prompt (`list[dict]`):
            Messages with image blocks.
        image_blocks (`list[dict]`):
            Its images as parts of a chat message, which all requests about it share.
        reference (`str`, *optional*):
            A correct answer.
        group_id (`str`):
            What all pairs about the prompt have in common.
        source_id (`str`, *optional*):
            The row's own name.
        content (`str`):
            A hash of prompt and images.
    """

    row: int
    name: str
    prompt: list[dict[str, Any]]
    image_blocks: list[dict[str, Any]]
    reference: str | None
    group_id: str
    source_id: str | None
    content: str

    @property
    def text(self) -> str:
        """The question as a judge reads it: one turn as it is, a conversation with the roles named."""
        turns = _turns(self.prompt)
        if len(turns) == 1:
            return turns[0][1]
        return "\n\n".join(f"[{role}]\n{text}" for role, text in turns)


def read_question(row: Mapping[str, Any], index: int, *, source: str, image_options: ImageOptions) -> Question:
    """
    What a row asks.

    Args:
        row (`Mapping`):
            A row with `prompt` (messages, or a string) or `question` (with `<image>` where an image belongs, or with
            all images first), `images`, and optionally `reference`, `group_id` and `source_id`.
        index (`int`):
            Its place in the data set.
        source (`str`):
            Beginning of a `group_id` that the row does not have.
        image_options ([`ImageOptions`]):
            Where images may come from and how large they may be.

    Returns:
        [`Question`]

    Raises:
        [`RowError`]: if the prompt is no prompt, or an image cannot be read.
    """
    prompt, reference = row.get("prompt"), row.get("reference")
    prompt = row.get("question") if prompt is None else prompt
    images = [as_image(image) for image in row_images(row)]
    if prompt is None:
        raise RowError("missing_column", "the row has neither `prompt` nor `question`; give one of them.")
    if reference is not None and not isinstance(reference, str):
        raise RowError(
            "not_conversational", f"`reference` is of type {type(reference).__name__}; give a string, or None."
        )
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("missing_column", "the question is empty; give one.")
        prompt = preference(prompt, "a", "b", images)["prompt"]
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    check_row({"prompt": prompt, **sides, "images": images})
    prompt = _with_blocks(prompt, len(images))
    if prompt[-1]["role"] != "user":
        raise RowError(
            "not_conversational", f"`prompt` ends with a {prompt[-1]['role']} message; end it with a user's."
        )
    content = content_group(prompt, images, [])
    named = next((row[key] for key in ("source_id", "pair_id") if row.get(key) is not None), None)
    return Question(
        row=index,
        name=row_name(row, index),
        prompt=prompt,
        image_blocks=[image_block(image, image_options) for image in images],
        reference=reference.strip() or None if reference is not None else None,
        group_id=row.get("group_id") or f"{source}-{content}",
        source_id=None if named is None else str(named),
        content=content,
    )


def generation_messages(question: Question) -> list[dict[str, Any]]:
    """
    The prompt as chat messages, images in their places.

    Args:
        question ([`Question`]):
            The prompt.

    Returns:
        `list[dict]`: one message for each of the prompt's.
    """
    images = iter(question.image_blocks)
    messages = []
    for message in question.prompt:
        parts = [
            next(images) if block["type"] == "image" else {"type": "text", "text": neutralise(block["text"])}
            for block in message["content"]
        ]
        # Servers want plain strings of all roles but the user's.
        plain = all(part["type"] == "text" for part in parts)
        content: Any = "".join(part["text"] for part in parts) if plain else parts
        messages.append({"role": message["role"], "content": content})
    return messages


def _turns(prompt: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Role and text of each message, with a mark where an image stands behind words."""
    turns, number = [], 0
    for message in prompt:
        text = ""
        for block in message["content"]:
            if block["type"] != "image":
                text += block["text"]
                continue
            number += 1
            text += f"[image {number}]" if text else ""
        turns.append((message["role"], text.strip()))
    return turns


def _with_blocks(prompt: Sequence[Mapping[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages with all content as blocks. Where it was strings, the images come first, as in TRL."""
    messages = [{"role": one["role"], "content": [_block(block) for block in blocks(one)]} for one in prompt]
    if num_images and not any(block["type"] == "image" for one in messages for block in one["content"]):
        user = next(one for one in messages if one["role"] == "user")
        user["content"][:0] = [{"type": "image", "text": None} for _ in range(num_images)]
    return messages


def _block(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": block["type"], "text": block.get("text")}
