"""Reading the fields of a row as its source has them: what is missing, or is something else, is a [`RowError`].

A row comes from Parquet, where every column is there and may be `None`, or from a JSON file, where keys may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import Reason, RowError


Turns = list[tuple[str, str]]  # role and text

# ShareGPT's names and OpenAI's.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def text_field(row: Mapping[str, Any], field: str) -> str:
    """A field that has to be a string."""
    value = row.get(field)
    if value is None:
        raise RowError("missing_column", f"`{field}` is missing or None; give it, or drop the row.")
    if not isinstance(value, str):
        raise RowError("not_conversational", f"`{field}` is of type {type(value).__name__}; give a string.")
    return value


def answer_field(row: Mapping[str, Any], field: str) -> str:
    """An answer: a string, or a message of which the text counts, whoever it says is speaking."""
    value = row.get(field)
    return text_field({field: _either(value, "value", "content") if isinstance(value, Mapping) else value}, field)


def json_field(row: Mapping[str, Any], field: str) -> Any:
    """What a string field holds as JSON; a field that is parsed already comes as it is."""
    value = row.get(field)
    if isinstance(value, (Mapping, list)):
        return value
    text = text_field(row, field)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"`{field}` is not JSON ({type(error).__name__}); mend the string."
        raise RowError("unparsed_verdict", problem) from error


def name_field(row: Mapping[str, Any], field: str) -> str | None:
    """A name or a number as a string, for columns that only say where a row comes from."""
    value = row.get(field)
    return str(value) if isinstance(value, (str, int, float)) and value != "" else None


def strength_field(row: Mapping[str, Any], field: str, reason: Reason = "bad_strength") -> float | None:
    """A finite number that is not negative, also in a string; `None` if it is not known."""
    value = row.get(field)
    if value is None:
        return None
    number = to_number(value)
    if number is None or number < 0:
        raise RowError(
            reason, f"`{field}` is {value!r:.40}; give a finite number that is not negative, or None if unknown."
        )
    return number


def to_number(value: Any) -> float | None:
    """A finite number, also in a string; `None` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None  # which not-a-number is not, either


def images_field(row: Mapping[str, Any], field: str) -> list[Any]:
    """The images of a field that holds one, a list of them, or none."""
    value = row.get(field)
    if not isinstance(value, (list, tuple)):
        return [] if _is_missing(value) else [value]
    for index, image in enumerate(value):
        if _is_missing(image):
            raise RowError("image_missing", f"`{field}[{index}]` is None or empty; give the image or drop the row.")
    return list(value)


def image_field(row: Mapping[str, Any], *fields: str) -> list[Any]:
    """The one image of a row, as a list, from the first of some fields that holds any."""
    for field in fields:
        images = images_field(row, field)
        if len(images) > 1:
            raise RowError("image_type", f"`{field}` holds {len(images)} images; the source has one in each row.")
        if images:
            return images
    names = " and ".join(f"`{field}`" for field in fields)
    raise RowError("image_missing", f"there is no image in {names}; give it or drop the row.")


def turns_field(row: Mapping[str, Any], field: str) -> Turns:
    """The messages of a conversation as pairs of role and text, under ShareGPT's names or OpenAI's."""
    messages = row.get(field)
    if messages is None:
        raise RowError("missing_column", f"`{field}` is missing or None; give the conversation, or drop the row.")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RowError("not_conversational", f"`{field}` is no list of messages; give at least one.")
    turns = []
    for index, message in enumerate(messages):
        where = f"`{field}` message {index}"
        role = _either(message, "from", "role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise RowError("not_conversational", f"{where} is by {role!r:.40}; only {', '.join(_ROLES)} are read.")
        text = _either(message, "value", "content")
        if not isinstance(text, str):
            raise RowError("not_conversational", f"{where} has a text of type {type(text).__name__}; give a string.")
        turns.append((_ROLES[role], text))
    return turns


def prompt_field(row: Mapping[str, Any], field: str) -> Turns:
    """A conversation that waits for an answer."""
    turns = turns_field(row, field)
    check_prompt(turns, field)
    return turns


def answered_field(row: Mapping[str, Any], field: str) -> tuple[Turns, str]:
    """A whole conversation as its prompt and the answer at its end."""
    *turns, (role, answer) = turns_field(row, field)
    if role != "assistant":
        raise RowError("not_conversational", f"`{field}` ends with a {role} message; end it with the answer.")
    check_prompt(turns, field)
    return turns, answer


def check_prompt(turns: Turns, field: str) -> None:
    """A prompt ends with what the user says."""
    if not turns or turns[-1][0] != "user":
        raise RowError("not_conversational", f"`{field}` has no user message right before the answer; add it.")


def with_system(turns: Turns, row: Mapping[str, Any], field: str) -> Turns:
    """The turns with a row's system prompt in front, unless they begin with their own."""
    if row.get(field) is None or row[field] == "" or turns[0][0] == "system":
        return turns
    return [("system", text_field(row, field)), *turns]


def same_prompt(first: Turns, second: Turns, names: Sequence[str]) -> Turns:
    """The prompt of two conversations, which has to be the same: both answers are compared as answers to it."""
    if first != second:
        raise RowError(
            "not_conversational",
            f"`{names[0]}` and `{names[1]}` differ before their last answer, so that there is no common prompt; drop "
            "the row.",
        )
    return first


def without_markers(text: str) -> str:
    """A text without its image markers and the line breaks that go with them."""
    for marker in ("<image>\n", "\n<image>", "<image>"):
        text = text.replace(marker, "")
    return text


def _is_missing(image: Any) -> bool:
    if isinstance(image, Mapping):
        return image.get("bytes") is None and _is_missing(image.get("path"))
    return image is None or (isinstance(image, str) and not image)


def _either(message: Mapping[str, Any], first: str, second: str) -> Any:
    value = message.get(first)
    return message.get(second) if value is None else value
