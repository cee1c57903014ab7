"""What a row asks: its prompt with images, and a reference answer, checked and ready to be sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.images import ImageOptions
from ..data.messages import read_prompt
from ..data.rows import RowError
from ..judge.prompts import image_block, neutralise


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
    reference, prompt = row.get("reference"), read_prompt(row, index, source=source)
    if reference is not None and not isinstance(reference, str):
        raise RowError(
            "not_conversational", f"`reference` is of type {type(reference).__name__}; give a string, or None."
        )
    return Question(
        row=index,
        name=prompt.name,
        prompt=prompt.messages,
        image_blocks=[image_block(image, image_options) for image in prompt.images],
        reference=reference.strip() or None if reference is not None else None,
        group_id=prompt.group_id,
        source_id=prompt.source_id,
        content=prompt.content,
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
