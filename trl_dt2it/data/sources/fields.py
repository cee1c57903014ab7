"""Description of a source, and readers of the fields of its rows, which refuse what is missing or malformed."""

from __future__ import annotations

import ast
import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ..messages import IMAGE_MARKER
from ..rows import Reason, RowError


JSON_COLUMN = "_json"  # column of a raw row as JSON
FOLDER_COLUMN = "_folder"  # column of the folder that a row's image paths start from

Row: TypeAlias = Mapping[str, Any]

# Canonical rows, and a `RowError` for each pair that the source holds and that cannot be used.
Pairs: TypeAlias = Iterator[dict[str, Any] | RowError]

# A function of a row as the source has it (of a grouped source, of all rows of a group), with options as keywords.
Adapter: TypeAlias = Callable[..., Pairs]

# A function of the fields that a set has and of the options: the fields among them that the adapter reads or refuses.
Reads: TypeAlias = Callable[[Collection[str], Mapping[str, Any]], set[str]]

Turns: TypeAlias = list[tuple[str, str]]  # role and text

_CALLS = ("function_call", "function_response", "observation", "tool", "tool_call", "tool_response")


@dataclass(frozen=True)
class Source:
    """A public preference set, or a format: its adapter, and the facts that the loader needs."""

    convert: Adapter
    licence: str = "unknown"  # SPDX identifier, if the publisher states one
    hub_id: str | None = None  # repository on the Hub; a format has none
    is_non_commercial: bool = False
    is_t2i: bool = False  # the adapter yields text-to-image pairs
    ranked: Adapter | None = None  # yields ranked prompts, where a prompt has several answers and their scores
    group_by: str | None = None  # column whose equal values make a group, where pairs are formed from several rows
    has_videos: bool = False
    has_weights: bool = False  # rows may have a `weight`
    # Fields that the adapter reads or refuses, "a.b" for the field b of the field a. All other fields stay columns.
    reads: tuple[str, ...] | Reads = ()
    is_checked: bool = False  # the adapter calls [`check_row`], which others leave to the loader
    # Published rows have a `source` that names a part of the set. The set's own name, by which licences and rows of
    # benchmarks are found, stays the source.
    has_parts: bool = False
    config: str | None = None  # configuration to load
    # Patterns of the files that hold the rows, in a repository that needs a loading script or holds other files too;
    # "{split}" stands for the split.
    files: tuple[str, ...] = ()
    note: str = ""  # for users: images that are not shipped, unclear terms

    def image_advice(self, reason: str) -> str:
        """Quote the sentences of the note on where the images are, behind the message of a row without its image."""
        told = [sentence for sentence in re.split(r"(?<=[.]) ", self.note) if "`image_root`" in sentence]
        return "".join(f" {sentence}" for sentence in told) if reason in _NOT_FOUND else ""


class Tags(NamedTuple):
    """Keys and roles of the messages of a layout, and the roles of calls and results of tools, which are refused."""

    role_keys: tuple[str, ...]
    content_keys: tuple[str, ...]
    roles: Mapping[str, str]
    calls: tuple[str, ...] = _CALLS


# ShareGPT's names and OpenAI's.
TAGS = Tags(
    ("from", "role"),
    ("value", "content"),
    {"human": "user", "user": "user", "system": "system", **dict.fromkeys(("gpt", "bot", "assistant"), "assistant")},
)

# Fields of messages, besides the text, that a canonical message cannot hold.
_MESSAGE_EXTRAS = {
    *("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking", "tools"),
    *(f"{kind}{ending}" for kind in ("image", "video", "audio") for ending in ("", "s", "_url")),
}
_NOT_FOUND = ("image_missing", "image_outside_root")
_PLACEHOLDERS = (IMAGE_MARKER, "<video>", "<audio>")
_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_IMAGE_IN_TEXT = re.compile(r"<(img|image)>\s*[^<>\s][^<>]*</\1>")  # as Qwen-VL's first files had it
_IMAGE_FILE = re.compile(
    r"(?:\S+|[^\s/\\]*[/\\][^\n]*)\.(?:png|jpe?g|webp|gif|bmp|tiff?|ppm|avif|heic)(?:[?#]\S*)?", re.IGNORECASE
)


def text_field(row: Row, field: str) -> str:
    """Read a string, which must not be missing."""
    value = row.get(field)
    if value is None:
        raise RowError("missing_column", f"`{field}` is missing or None; give it, or drop the row.")
    if not isinstance(value, str):
        raise RowError("not_conversational", f"`{field}` is of type {type(value).__name__}; give a string.")
    return value


def answer_field(row: Row, field: str, tags: Tags = TAGS) -> str:
    """Read an answer: a string, or a message of the assistant, alone or in a list."""
    value = row.get(field)
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0]
    if not isinstance(value, Mapping):
        return text_field({field: value}, field)
    role = _first(value, tags.role_keys)
    if isinstance(role, str) and (role in tags.calls or tags.roles.get(role, "assistant") != "assistant"):
        raise RowError("not_conversational", f"`{field}` is by {role!r:.40} and not by the assistant; drop the row.")
    _check_extras(value, f"`{field}`")
    content = _first(value, tags.content_keys)
    if content is None and is_given(value):
        keys = " or ".join(tags.content_keys)
        raise RowError("missing_column", f"`{field}` is a message without {keys}; give its text.")
    if isinstance(content, (list, tuple)):
        content = _text_of_blocks(content, f"`{field}`", [])
    return text_field({field: content}, field)


def check_is_text(row: Row, fields: Sequence[str], how: str) -> None:
    """Refuse answers that are images or names of image files: a text-to-image pair is not read as text."""
    for field in fields:
        value = row.get(field)
        items = value if isinstance(value, (list, tuple)) else [value]
        if any(
            isinstance(item, (bytes, bytearray, memoryview))
            or (isinstance(item, Mapping) and any(item.get(key) is not None for key in ("bytes", "path")))
            or (items is value and isinstance(item, str) and _is_image_file(item))
            for item in items
        ):
            raise RowError("image_in_answer", f"`{field}` holds an image: this is a text-to-image pair; {how}")
    texts = [str(row.get(field)).strip() for field in fields]
    if all(map(_is_image_file, texts)):
        names = " and ".join(f"`{field}`" for field in fields)
        problem = f"{names} hold names of image files, such as {texts[0]!r:.60}: this is a text-to-image pair; {how}"
        raise RowError("image_in_answer", problem)


def _is_image_file(text: str) -> bool:
    return text.startswith("data:image/") or _IMAGE_FILE.fullmatch(text) is not None


def check_placeholders(turns: Turns, answers: Mapping[str, str], placeholders: Sequence[str] = _PLACEHOLDERS) -> None:
    """Refuse placeholders of images outside of user messages, and of videos and sounds anywhere."""
    parts = [("the prompt", text, role == "user") for role, text in turns]
    for name, text, is_user in (*parts, *((f"`{field}`", text, False) for field, text in answers.items())):
        if len(placeholders) > 1 and (found := _IMAGE_IN_TEXT.search(text)):
            problem = f"{name} has {found[0]!r:.60}; put the image into `images`, and `{IMAGE_MARKER}` in its place."
            raise RowError("placeholder_count", problem)
        marker = next((marker for marker in placeholders[is_user:] if marker in text), None)
        if marker == IMAGE_MARKER:
            where = name if name != "the prompt" else "a message of the prompt that is not the user's"
            problem = f"{where} has the placeholder `{marker}`, but only the user may show images; drop the row."
            raise RowError("image_in_answer", problem)
        if marker is not None:
            problem = f"{name} has the placeholder `{marker}`, but videos and sounds are not read; drop the row."
            raise RowError("video_type", problem)


def json_field(row: Row, field: str) -> Any:
    """Parse a field that holds JSON, or return it where it is parsed already."""
    value = row.get(field)
    if isinstance(value, (Mapping, list)):
        return value
    text = text_field(row, field)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"`{field}` is not JSON ({type(error).__name__}); fix the string."
        raise RowError("unparsed_verdict", problem) from error


def name_field(row: Row, field: str) -> str | None:
    """Read a name or a number as a string, for columns that only tell where a row comes from."""
    value = row.get(field)
    return str(value) if isinstance(value, (str, int, float)) and value != "" else None


def strength_field(row: Row, field: str, reason: Reason = "bad_strength") -> float | None:
    """Read a finite number that is not negative, also in a string; `None` if it is unknown."""
    value = _given(row, field)
    number = to_number(value)
    if value is not None and (number is None or number < 0):
        problem = f"`{field}` is {value!r:.40}; give a finite number that is not negative, or None if unknown."
        raise RowError(reason, problem)
    return number


def checked_field(row: Row, field: str, check: Callable[[str, Any], None]) -> float | None:
    """Read a number that passes a check of its name and value, also in a string; `None` if it is not given."""
    value = _given(row, field)
    number = to_number(value)
    check(field, value if number is None else number)
    return number


def _given(row: Row, field: str) -> Any:
    """Return a value, and `None` for an empty cell of a table."""
    value = row.get(field)
    return None if isinstance(value, str) and not value.strip() else value


def to_number(value: Any) -> float | None:
    """Convert to a finite number, also from a string; `None` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def images_field(row: Row, field: str) -> list[Any]:
    """Read the images of a field that holds one, a list of them, or none."""
    value = row.get(field)
    if not isinstance(value, (list, tuple)):
        return [] if _is_missing(value) else [_decoded(value, f"`{field}`")]
    for index, image in enumerate(value):
        if _is_missing(image):
            raise RowError("image_missing", f"`{field}[{index}]` is None or empty; give the image or drop the row.")
    return [_decoded(image, f"`{field}[{index}]`") for index, image in enumerate(value)]


def image_field(row: Row, *fields: str) -> list[Any]:
    """Read the single image of a row, as a list, from the first field that holds any."""
    for field in fields:
        images = images_field(row, field)
        if len(images) > 1:
            raise RowError("image_type", f"`{field}` holds {len(images)} images; the source has one in each row.")
        if images:
            return images
    names = " and ".join(f"`{field}`" for field in fields)
    raise RowError("image_missing", f"there is no image in {names}; give it or drop the row.")


def turns_field(row: Row, field: str, tags: Tags = TAGS, images: list[Any] | None = None) -> Turns:
    """Read messages as pairs of role and text. With `images`, which collects them, contents may be blocks of both."""
    messages = row.get(field)
    if messages is None:
        raise RowError("missing_column", f"`{field}` is missing or None; give the conversation, or drop the row.")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RowError("not_conversational", f"`{field}` is no list of messages; give at least one.")
    turns = []
    for index, message in enumerate(messages):
        where = f"`{field}` message {index}"
        role = _first(message, tags.role_keys) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in tags.roles:
            raise RowError("not_conversational", f"{where} is by {role!r:.40}; only {', '.join(tags.roles)} are read.")
        _check_extras(message, where)
        text = _first(message, tags.content_keys)
        if images is not None and isinstance(text, (list, tuple)):
            text = _text_of_blocks(text, where, images)
        if not isinstance(text, str):
            raise RowError("not_conversational", f"{where} has a text of type {type(text).__name__}; give a string.")
        turns.append((tags.roles[role], text))
    return turns


def prompt_field(row: Row, field: str, tags: Tags = TAGS, images: list[Any] | None = None) -> Turns:
    """Read a conversation that ends with a user message."""
    return _checked_prompt(turns_field(row, field, tags, images), field)


def answered_field(row: Row, field: str, tags: Tags = TAGS, images: list[Any] | None = None) -> tuple[Turns, str]:
    """Read a whole conversation as its prompt and the answer at its end."""
    *turns, (role, answer) = turns_field(row, field, tags, images)
    if role != "assistant":
        raise RowError("not_conversational", f"`{field}` ends with a {role} message; end it with the answer.")
    return _checked_prompt(turns, field), answer


def _checked_prompt(turns: Turns, field: str) -> Turns:
    """Refuse a prompt that does not end with a user message."""
    if not turns or turns[-1][0] != "user":
        raise RowError("not_conversational", f"`{field}` has no user message right before the answer; add it.")
    return turns


def with_system(turns: Turns, row: Row, field: str) -> Turns:
    """Put a row's system prompt in front of turns, unless they begin with their own."""
    if row.get(field) is None or row[field] == "" or turns[0][0] == "system":
        return turns
    return [("system", text_field(row, field)), *turns]


def without_markers(text: str) -> str:
    """Remove image markers and the line breaks that go with them."""
    for marker in ("<image>\n", "\n<image>", "<image>"):
        text = text.replace(marker, "")
    return text


def _is_missing(image: Any) -> bool:
    if isinstance(image, Mapping):
        return image.get("bytes") is None and _is_missing(image.get("path")) and _is_missing(image.get("url"))
    return image is None or (isinstance(image, str) and not image)


def is_given(value: Any) -> bool:
    """Tell a field that holds anything from `None`, an empty string, list or object, and a list of these."""
    if value is None or isinstance(value, str):
        return bool(value)
    if isinstance(value, (list, tuple)):
        return any(map(is_given, value))
    return not isinstance(value, Mapping) or any(map(is_given, value.values()))


def has_tools(value: Any) -> bool:
    """Tell tools from none, which TRL, LLaMA-Factory and ms-swift may write as text."""
    return is_given(value) and value not in ("[]", "{}", "null", "None")


def check_absent(
    row: Row, reason: Reason, *fields: str, advice: str = "drop the row", is_there: Callable[[Any], Any] = is_given
) -> None:
    """Refuse a row with fields that change what the pair means and that are not read."""
    for field in fields:
        if is_there(row.get(field)):
            raise RowError(reason, f"the row has `{field}`, which is not read from this format; {advice}.")


def literal(text: str) -> Any:
    """Parse JSON, or a value as Python prints it; `None` if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(text)
    return None


def _first(message: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _check_extras(message: Mapping[str, Any], where: str) -> None:
    for key in sorted(_MESSAGE_EXTRAS & message.keys()):
        if is_given(message[key]):
            raise RowError("not_conversational", f"{where} has `{key}`, which is not read; drop the row.")


def _text_of_blocks(blocks: Sequence[Any], where: str, images: list[Any]) -> str:
    """Join the text of content blocks of OpenAI, Anthropic, ms-swift or LLaMA-Factory, with image markers."""
    parts = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
        if kind == "text" and isinstance(text := _first(block, ("text", "value", "content")), str):
            parts.append(text)
        elif kind in ("image", "image_url"):
            image = _first(block, ("image", "image_url", "value", "source", "url", "path", "base64", "bytes"))
            if isinstance(image, Mapping) and not {"bytes", "path"} & set(image):
                image = _first(image, ("url", "data"))
            images += [] if _is_missing(image) else [_decoded(image, where)]
            parts.append(IMAGE_MARKER)
        else:
            is_medium = isinstance(kind, str) and ("video" in kind or "audio" in kind)
            problem = f"{where} has a block of type {kind!r:.40}, which is not read; only text and images are."
            raise RowError("video_type" if is_medium else "block_type", problem)
    return "".join(parts)


def _decoded(image: Any, where: str) -> Any:
    """Decode an image in base64, alone, in a `data:` address or in place of bytes; return others as they are."""
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), str):
        if (content := _from_base64(image["bytes"])) is None:
            raise RowError("image_type", f"{where} has `bytes` that are text and no base64 of an image; fix it.")
        return {**image, "bytes": content}
    if isinstance(image, Mapping) and image.get("bytes") is None and _is_missing(image.get("path")):
        image = image["url"]  # given, or the image would be missing
    if not isinstance(image, str):
        return image
    if not image.startswith("data:"):
        return _from_base64(image) or image
    if (content := _from_base64(image.partition(",")[2])) is None:
        raise RowError("image_corrupt", f"{where} is a `data:` address without an image in base64; fix it.")
    return content


def _from_base64(text: str) -> bytes | None:
    """Decode an image in base64; `None` if the text is something else, such as a path."""
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return content if len(content) > 20 and content.startswith(_IMAGE_STARTS) else None
