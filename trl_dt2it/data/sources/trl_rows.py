"""TRL's own preference rows, in all the ways in which TRL takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..canonical import IMAGE_MARKER, as_image, content_group, preference
from ..errors import RowError
from ..rows import DEFAULT_FPS, SIDES, blocks, row_images, row_videos
from ..schema import check_answer, check_messages, check_row
from .fields import images_field, is_given, name_field, strength_field
from .source import Source


def trl(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """Convert a preference row of TRL, after one check of it; see [`as_canonical`]."""
    yield as_canonical(row)


def as_canonical(row: Mapping[str, Any], is_checked: bool = False) -> dict[str, Any]:
    """
    A preference row of TRL, canonical rows included.

    Args:
        row (`Mapping`):
            `prompt`, `chosen` and `rejected` as messages, with strings or blocks as content, or as plain strings; or
            whole conversations in `chosen` and `rejected`. A `prompt` may be a string beside answers of messages, too.
            `images` or `image`, and `videos` as lists of frames.
            `strength`, `weight`, `pair_id`, `group_id`, `source` and `source_id` are kept. A `margin` becomes the
            strength where there is none.
        is_checked (`bool`, *optional*, defaults to `False`):
            Whether [`check_row`] has passed the row before.

    Returns:
        `dict`: the pair, all contents as blocks. Images come first where the prompt is of strings, as in TRL.

    Raises:
        [`RowError`]: `bad_strength` or `bad_weight`; as [`check_row`] says; or if the row has what canonical rows
            cannot hold, such as tools.
    """
    strength = strength_field(row, "strength" if row.get("strength") is not None else "margin")
    weight = strength_field(row, "weight", "bad_weight")
    for field in ("video", "audio", "audios"):
        if is_given(row.get(field)):
            raise RowError("video_type", f"the row has `{field}`, which is not read; give frames in `videos`.")
    for field in ("tools", "chat_template_kwargs"):
        if row.get(field):
            raise RowError("not_conversational", f"the row has `{field}`, which canonical rows do not hold; drop it.")
    prompt, chosen, rejected = (row.get(field) for field in ("prompt", "chosen", "rejected"))
    videos = _videos(row)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        converted = preference(prompt, chosen, rejected, _images(row), videos=videos)
        if not is_checked:
            check_row(converted)
    else:
        converted = _converted(_with_messages(row, videos) if isinstance(prompt, str) else row, videos, is_checked)
    converted["strength"] = strength
    names = {name: name_field(row, name) for name in ("pair_id", "group_id", "source", "source_id")}
    converted |= {name: value for name, value in names.items() if value is not None}
    return converted if weight is None else {**converted, "weight": weight}


def _with_messages(row: Mapping[str, Any], videos: list[list[Any]]) -> Mapping[str, Any]:
    """A row with a string as prompt and messages as answers, with the prompt as messages; without it, if the answers
    are whole conversations that the prompt is a part of."""
    for side in SIDES:
        if row.get(side) is None:
            raise RowError("missing_column", f"`{side}` is missing or None; a preference row needs both answers.")
        if not isinstance(row[side], (list, tuple)):
            kind = type(row[side]).__name__
            raise RowError(
                "not_conversational",
                f"`{side}` is of type {kind}; give both answers as strings or as lists of messages.",
            )
        check_messages(side, row[side])
    for side in SIDES:
        check_answer(side, row[side], prompt_is_explicit=True)
    if any(row[side][0]["role"] != "assistant" for side in SIDES):
        asked, *_ = _split(row["chosen"], row["rejected"])
        texts = ["".join(block["text"] for block in blocks(m) if block["type"] == "text").strip() for m in asked]
        if row["prompt"].strip() not in texts:
            raise RowError(
                "not_conversational",
                "`prompt` is not among the messages that `chosen` and `rejected` begin with; leave one of the two.",
            )
        return {**row, "prompt": None}
    return {**row, "prompt": preference(row["prompt"], "", "", _images(row), videos=videos)["prompt"]}


def _converted(row: Mapping[str, Any], videos: list[list[Any]], is_checked: bool) -> dict[str, Any]:
    if not is_checked:
        fields = ("prompt", "chosen", "rejected", "images", "image", "videos")
        check_row({field: row.get(field) for field in fields})
    if isinstance(row["chosen"], str):
        raise RowError("missing_column", "the row has two strings and no `prompt`; give the question as `prompt`.")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None:
        prompt, chosen, rejected = _split(chosen, rejected)
        check_answer("chosen", chosen, prompt_is_explicit=True)  # images of later questions stand in neither
        check_answer("rejected", rejected, prompt_is_explicit=True)
    images = _images(row)
    messages = [_blocked(message) for message in prompt]
    if images and not any(isinstance(message.get("content"), (list, tuple)) for message in prompt):
        if any(IMAGE_MARKER in (message.get("content") or "") for message in prompt):
            raise RowError(
                "placeholder_count",
                f"`prompt` is of strings with `{IMAGE_MARKER}` in them, which TRL reads as text; give blocks, or load "
                "the set as `llamafactory` or `ms_swift`.",
            )
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [*({"type": "image", "text": None} for _ in images), *first["content"]]
    converted = {
        "prompt": messages,
        "chosen": [_blocked(message) for message in chosen],
        "rejected": [_blocked(message) for message in rejected],
        "images": images,
        "strength": None,
        "group_id": content_group(messages, images, videos),
        "source_id": None,
    }
    return {**converted, "videos": videos} if videos else converted


def _split(chosen: Sequence[Any], rejected: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The messages that two conversations begin with, and what each goes on with."""
    shared = 0
    # At least one message is left to each, also where the conversations are the same.
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if _blocked(one) != _blocked(other):
            break
        shared += 1
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise RowError("missing_column", "`chosen` and `rejected` do not begin with the same question; add `prompt`.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _blocked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with nothing but its role and its content as blocks of type and text."""
    extra = {key for key, value in message.items() if value and key not in ("role", "content")}
    if extra:
        raise RowError(
            "not_conversational",
            f"a message has {', '.join(f'`{key}`' for key in sorted(map(str, extra)))}, which canonical rows do not "
            "hold; drop the row.",
        )
    content = [{"type": block["type"], "text": block.get("text")} for block in blocks(message)]
    return {"role": message["role"], "content": content}


def _images(row: Mapping[str, Any]) -> list[Any]:
    return [as_image(image) for image in images_field({"images": row_images(row)}, "images")]


def _videos(row: Mapping[str, Any]) -> list[list[Any]]:
    videos = row_videos(row)
    if any(video.fps != DEFAULT_FPS for video in videos):
        raise RowError(
            "video_type",
            f"a video has an `fps` of its own, which canonical rows do not hold; give {DEFAULT_FPS:g} a second.",
        )
    return [[as_image(frame) for frame in video.frames] for video in videos]


TRL = Source(
    trl,
    licence="unknown",
    has_videos=True,
    has_weights=True,
    is_checked=True,
    reads=(
        *("prompt", "chosen", "rejected", "images", "image", "videos", "strength", "margin", "weight", "pair_id"),
        *("group_id", "source", "source_id", "tools", "chat_template_kwargs", "video", "audio", "audios"),
    ),
    note="The licence is that of your data set.",
)
