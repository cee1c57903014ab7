"""File formats of other frameworks: LLaMA-Factory's and ms-swift's preference rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..canonical import IMAGE_MARKER, preference
from ..errors import RowError
from .fields import (
    Turns,
    answer_field,
    answered_field,
    images_field,
    name_field,
    prompt_field,
    same_prompt,
    strength_field,
    text_field,
    with_system,
)
from .source import Source


# What each column is called where `dataset_info.json` does not say so; the last three are named to be refused.
_COLUMNS = {
    "messages": "conversations",
    "prompt": "instruction",
    "query": "input",
    "history": "history",
    "system": "system",
    "chosen": "chosen",
    "rejected": "rejected",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
    "tools": "tools",
}


def llamafactory(
    row: Mapping[str, Any], *, columns: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any] | RowError]:
    """
    A ranking row of LLaMA-Factory, in ShareGPT's layout or in Alpaca's. All images belong to the prompt.

    Args:
        row (`Mapping`):
            `conversations` (with `from` and `value`, or `role` and `content`) or `instruction`, `input` and `history`;
            `chosen` and `rejected` (messages or strings); `images`, `system`.
        columns (`Mapping[str, str]`, *optional*):
            The `columns` of the set's entry in `dataset_info.json`, such as `{"messages": "dialogue"}`.

    Yields:
        `dict`: the pair. `id` becomes `source_id`.

    Raises:
        [`RowError`]: `image_in_answer` if each answer is an image; `video_type` if there are videos or sounds;
            `placeholder_count` if the markers are not as many as the images; or if a part is missing or of another
            type.
        `ValueError`: if `columns` has a key that is none of LLaMA-Factory's.
    """
    if unknown := (columns or {}).keys() - _COLUMNS.keys():
        raise ValueError(f"`columns` has the keys {sorted(unknown)}; it may have {', '.join(_COLUMNS)}.")
    names = {**_COLUMNS, **(columns or {})}
    _check_media(row, names["videos"], names["audios"])
    if row.get(names["tools"]):
        raise RowError("not_conversational", f"the row has `{names['tools']}`, which are not read; drop the row.")
    chosen, rejected = answer_field(row, names["chosen"]), answer_field(row, names["rejected"])
    if IMAGE_MARKER in (chosen.strip(), rejected.strip()):
        raise RowError(
            "image_in_answer",
            f"an answer is `{IMAGE_MARKER}`, so that the images belong to the answers; load the set as "
            "`omnireward_t2i`.",
        )
    is_alpaca = row.get(names["messages"]) is None and row.get(names["prompt"]) is not None
    turns = _alpaca_turns(row, names) if is_alpaca else prompt_field(row, names["messages"])
    yield preference(
        with_system(turns, row, names["system"]),
        chosen,
        rejected,
        images_field(row, names["images"]),
        source_id=name_field(row, "id"),
    )


def ms_swift(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    A preference row of ms-swift: a conversation that ends with the better answer, and the worse one.

    Args:
        row (`Mapping`):
            `messages`; `rejected_response` (a string) or `rejected_messages` (the conversation with the worse answer);
            `images`; `margin`, which becomes the strength; `system`.

    Yields:
        `dict`: the pair. `id` becomes `source_id`.

    Raises:
        [`RowError`]: `image_in_answer` if `rejected_images` are other images; `video_type` if there are videos or
            sounds; `bad_strength`; `not_conversational` if the conversations differ before their last answer; or if a
            part is missing or of another type.
    """
    _check_media(row, "videos", "audios", "rejected_videos", "rejected_audios")
    prompt, chosen = answered_field(row, "messages")
    if row.get("rejected_messages") is not None:
        other, rejected = answered_field(row, "rejected_messages")
        prompt = same_prompt(prompt, other, ("messages", "rejected_messages"))
    else:
        rejected = text_field(row, "rejected_response")
    images = images_field(row, "images")
    if images_field(row, "rejected_images") not in ([], images):
        raise RowError(
            "image_in_answer",
            "`rejected_images` are other images than `images`, so that the answers have images of their own; only the "
            "prompt may show images.",
        )
    yield preference(
        with_system(prompt, row, "system"),
        chosen,
        rejected,
        images,
        strength=strength_field(row, "margin"),
        source_id=name_field(row, "id"),
    )


def _alpaca_turns(row: Mapping[str, Any], names: Mapping[str, str]) -> Turns:
    turns: Turns = []
    history = row.get(names["history"]) or []
    for exchange in history if isinstance(history, (list, tuple)) else [history]:
        if (
            not isinstance(exchange, (list, tuple))
            or len(exchange) != 2
            or not all(isinstance(t, str) for t in exchange)
        ):
            raise RowError("not_conversational", f"`{names['history']}` is no list of pairs of strings; mend it.")
        turns += [("user", exchange[0]), ("assistant", exchange[1])]
    parts = [text_field(row, names["prompt"])]
    if row.get(names["query"]):
        parts.append(text_field(row, names["query"]))
    return [*turns, ("user", "\n".join(part for part in parts if part))]


def _check_media(row: Mapping[str, Any], *fields: str) -> None:
    for field in fields:
        if row.get(field) not in (None, "", [], ()):
            raise RowError("video_type", f"the row has `{field}`, which are not read from this format; drop the row.")


LLAMAFACTORY = Source(llamafactory, licence="unknown", note="The licence is that of your data set.")
MS_SWIFT = Source(ms_swift, licence="unknown", note="The licence is that of your data set.")
