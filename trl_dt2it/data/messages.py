"""Messages with image blocks: canonical rows built from texts, and prompts without their answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from .columns import uncached
from .images import ImageOptions, as_image, placed_image
from .rows import (
    ANSWERS,
    SCORES,
    SIDES,
    RowError,
    blocks,
    check_row,
    content_group,
    row_images,
    row_name,
    text_block,
    text_message,
)


IMAGE_MARKER = "<image>"
_MARKER = re.compile(f"({IMAGE_MARKER})")
_ONLY_MARKER = re.compile(r"\A\s*<image>\n?|\n?<image>\s*\Z")  # the newline of "<image>\nquestion" belongs to it
_IMAGE = {"type": "image", "text": None}

MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
PROVENANCE = ("pair_id", "group_id", "source", "source_id")  # `source_id` is the source's own name for the row
_ANNOTATIONS = {"strength": Value("float64"), **dict.fromkeys(PROVENANCE, Value("string"))}

# Canonical rows, whatever the source.
FEATURES = Features({**dict.fromkeys(("prompt", *SIDES), MESSAGES), "images": List(Image()), **_ANNOTATIONS})
VIDEO_FEATURES = Features({**FEATURES, "videos": List(List(Image()))})  # of the sources that have videos

# Ranked prompts; a score is `None` where the source has none.
_RANKED = {"prompt": MESSAGES, ANSWERS: List(MESSAGES), SCORES: List(Value("float64"))}
RANKED_FEATURES = Features(
    {**_RANKED, "images": List(Image()), "videos": List(List(Image())), **dict.fromkeys(PROVENANCE, Value("string"))}
)

# The pair behind a two-image question, whatever its wording and the order of its images: the caption, the answer that
# prefers the image shown first, and, of a pair that is asked about in both orders on request, "ab" where the better
# image came first when the row was made, and "ba" where it came second.
T2I_IDENTITY = Features(dict.fromkeys(("t2i_caption", "t2i_first", "t2i_order"), Value("string")))

# A text-to-image pair after `reformulate_t2i`.
REFORMULATED_FEATURES = Features({**FEATURES, **T2I_IDENTITY})

# A text-to-image pair before `reformulate_t2i`: each image is an answer to the caption.
_IMAGES = {"chosen_image": Image(), "rejected_image": Image()}
T2I_FEATURES = Features({"caption": Value("string"), **_IMAGES, **_ANNOTATIONS})


def preference(
    prompt: str | Sequence[tuple[str, str]],
    chosen: str,
    rejected: str,
    images: Sequence[Any] = (),
    *,
    videos: Sequence[Any] = (),
    strength: float | None = None,
    group: str | None = None,
    source_id: str | int | None = None,
) -> dict[str, Any]:
    """Make a canonical row of a question with its turns, two answers, images and videos."""
    turns = [("user", prompt)] if isinstance(prompt, str) else list(prompt)
    for field, text in (*(("prompt", text) for _, text in turns), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str):
            raise RowError("not_conversational", f"`{field}` has a text of type {type(text).__name__}; give a string.")
    images = list(map(as_image, images))
    messages = _messages(turns, len(images), len(videos))
    row = {
        "prompt": messages,
        "chosen": [text_message("assistant", chosen)],
        "rejected": [text_message("assistant", rejected)],
        "images": images,
        "strength": strength,
        "group_id": group or content_group(messages, images, videos),
        "source_id": None if source_id is None else str(source_id),
    }
    return {**row, "videos": list(videos)} if videos else row


def ranked_prompt(
    prompt: str | Sequence[tuple[str, str]],
    answers: Sequence[str],
    scores: Sequence[float | None],
    images: Sequence[Any] = (),
    *,
    source_id: str | int | None = None,
) -> dict[str, Any]:
    """Make a canonical row of a question with its turns, answers with scores, and images."""
    row = preference(prompt, answers[0], answers[1], images, source_id=source_id)
    return as_ranked(row, [[text_message("assistant", answer)] for answer in answers], scores)


def as_ranked(pair: Mapping[str, Any], answers: Sequence[Any], scores: Sequence[float | None]) -> dict[str, Any]:
    """Make a ranked prompt of a pair, with answers in place of its own."""
    kept = {name: value for name, value in pair.items() if name not in (*SIDES, "strength")}
    return {**kept, ANSWERS: list(answers), SCORES: list(scores)}


def _messages(turns: Sequence[tuple[str, str]], num_images: int, num_videos: int) -> list[dict[str, Any]]:
    num_markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    if num_markers not in (0, num_images):
        message = f"the prompt has {num_markers} `{IMAGE_MARKER}` markers, but the row has {num_images} images."
        raise RowError("placeholder_count", message)
    kinds = ["image"] * (num_images - num_markers) + ["video"] * num_videos
    leading, messages = [{"type": kind, "text": None} for kind in kinds], []
    for role, text in turns:
        content = [text_block(text)] if text else []
        if role == "user":
            text = _ONLY_MARKER.sub(IMAGE_MARKER, text, count=1) if num_markers == 1 else text
            pieces = filter(None, _MARKER.split(text))
            content = leading + [dict(_IMAGE) if piece == IMAGE_MARKER else text_block(piece) for piece in pieces]
            leading = []
        messages.append({"role": role, "content": content})
    return messages


@dataclass(frozen=True)
class Prompt:
    """The prompt of a row."""

    row: int  # index of the row in its data set
    name: str  # of the row, in errors and logs
    messages: list[dict[str, Any]]  # contents as blocks of `type` and `text`; the last message is the user's
    images: list[Any]  # still encoded, one for each image block
    content: str  # hash of messages and images
    group_id: str  # shared by all pairs about the prompt
    source_id: str | None


def read_prompt(row: Mapping[str, Any], index: int, *, source: str) -> Prompt:
    """Read and check the prompt of a row, from `prompt` or `question`."""
    prompt = row.get("question") if row.get("prompt") is None else row["prompt"]
    images = list(map(as_image, row_images(row)))
    if prompt is None:
        raise RowError("missing_column", "the row has neither `prompt` nor `question`; give one of them.")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("missing_column", "the question is empty; give one.")
        prompt = preference(prompt, "a", "b", images)["prompt"]
    sides = {side: [{"role": "assistant", "content": side}] for side in SIDES}
    check_row({"prompt": prompt, **sides, "images": images})
    whole = with_image_blocks(prompt, len(images))
    messages = [{key: message[key] for key in ("role", "content")} for message in whole]
    if (role := messages[-1]["role"]) != "user":
        raise RowError("not_conversational", f"`prompt` ends with a {role} message; end it with a user's.")
    content = content_group(messages, images, [])
    named = next((str(row[key]) for key in ("source_id", "pair_id") if row.get(key) is not None), None)
    group = row.get("group_id") or f"{source}-{content}"
    return Prompt(index, row_name(row, index), messages, images, content, group, named)


def with_image_blocks(messages: Sequence[Mapping[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Turn all contents into blocks of `type` and `text`; the images of strings come first, as in TRL."""
    made = [
        {
            **{key: value for key, value in message.items() if value is not None},
            "content": [{"type": block["type"], "text": block.get("text")} for block in blocks(message)],
        }
        for message in messages
    ]
    if num_images and not any(block["type"] == "image" for message in made for block in message["content"]):
        user = next(message for message in made if message["role"] == "user")
        user["content"][:0] = [dict(_IMAGE) for _ in range(num_images)]
    return made


def with_images(
    rows: Dataset,
    positions: list[int],
    columns: list[dict[str, Any]],
    image_options: ImageOptions,
    features: Features,
) -> Dataset:
    """Make a data set of pairs out of their other columns and the images of the rows at these positions."""
    if not columns:
        return Dataset.from_dict({name: [] for name in features}, features=features)

    def pair(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {**columns[index], "images": [placed_image(image, image_options) for image in row_images(row)]}

    kept = [name for name in ("images", "image") if name in rows.column_names]
    # Without a column, `map` would not know how many rows there are.
    chosen = rows.select_columns(kept or rows.column_names[:1]).select(positions)
    return chosen.map(
        pair,
        with_indices=True,
        remove_columns=chosen.column_names,
        features=features,
        writer_batch_size=100,
        desc="Writing pairs",
        **uncached(),
    )
