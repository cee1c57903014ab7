"""A source, and the fields that its rows are read by."""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ..messages import IMAGE_MARKER
from ..rows import Reason, RowError


# The column that holds a raw row as JSON, and the one that holds the folder that its image paths start from.
JSON_COLUMN = "_json"

FOLDER_COLUMN = "_folder"

# An adapter takes a row as the source has it (of a grouped source, all rows of a group) and its options as keywords.
# It gives canonical rows, and a `RowError` for each pair that the source holds and that cannot be used.
Adapter: TypeAlias = Callable[..., Iterator[dict[str, Any] | RowError]]

# Of the fields that a set has, and with these options, those that its adapter reads or refuses.
Reads: TypeAlias = Callable[[Collection[str], Mapping[str, Any]], set[str]]


@dataclass(frozen=True)
class Source:
    """
    A public preference set.

    Parameters:
        convert (`Callable`):
            Its adapter.
        licence (`str`):
            SPDX identifier as the publisher gives it, or `"unknown"`.
        hub_id (`str`, *optional*):
            Where it is on the Hub. A format has none.
        is_non_commercial (`bool`, *optional*, defaults to `False`):
            Whether the licence forbids commercial use.
        is_t2i (`bool`, *optional*, defaults to `False`):
            Whether the adapter gives text-to-image pairs.
        group_by (`str`, *optional*):
            Column whose equal values make a group, where pairs are formed from several rows.
        has_videos (`bool`, *optional*, defaults to `False`):
            Whether some rows have videos.
        has_weights (`bool`, *optional*, defaults to `False`):
            Whether rows may have a `weight`.
        reads (`tuple[str, ...]` or `Callable`, *optional*, defaults to `()`):
            Fields that the adapter reads or refuses, `"a.b"` for the field `b` of the field `a`; or a function of the
            fields that a set has, and of the options. All other fields stay columns.
        is_checked (`bool`, *optional*, defaults to `False`):
            Whether the adapter calls [`check_row`], which others leave to the loader.
        has_parts (`bool`, *optional*, defaults to `False`):
            Whether the published rows have a `source`, which names the part of the set that a row is from. The set
            itself, by whose name licences and rows of benchmarks are found, stays the source.
        config (`str`, *optional*):
            Configuration to load.
        files (`tuple[str, ...]`, *optional*, defaults to `()`):
            Patterns of the files that hold the rows, in a repository that needs a loading script or holds other files
            too. `{split}` stands for the split.
        note (`str`, *optional*, defaults to `""`):
            What a user has to know: images that are not shipped, unclear terms.
    """

    convert: Adapter
    licence: str
    hub_id: str | None = None
    is_non_commercial: bool = False
    is_t2i: bool = False
    group_by: str | None = None
    has_videos: bool = False
    has_weights: bool = False
    reads: tuple[str, ...] | Reads = ()
    is_checked: bool = False
    has_parts: bool = False
    config: str | None = None
    files: tuple[str, ...] = ()
    note: str = ""


Turns = list[tuple[str, str]]  # role and text


class Tags(NamedTuple):
    """How a layout writes messages down."""

    role_keys: tuple[str, ...]
    content_keys: tuple[str, ...]
    roles: Mapping[str, str]
    calls: tuple[str, ...] = (
        "function_call",
        "function_response",
        "observation",
        "tool",
        "tool_call",
        "tool_response",
    )


# ShareGPT's names and OpenAI's.
TAGS = Tags(
    ("from", "role"),
    ("value", "content"),
    {"human": "user", "user": "user", "system": "system", **dict.fromkeys(("gpt", "bot", "assistant"), "assistant")},
)

# What a message may carry besides its text, and a canonical one cannot hold.
_MESSAGE_EXTRAS = {
    *("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking", "tools"),
    *(f"{kind}{ending}" for kind in ("image", "video", "audio") for ending in ("", "s", "_url")),
}

_PLACEHOLDERS = (IMAGE_MARKER, "<video>", "<audio>")

_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")

_IMAGE_IN_TEXT = re.compile(r"<(img|image)>\s*[^<>\s][^<>]*</\1>")  # as Qwen-VL's first files had it

_IMAGE_FILE = re.compile(
    r"(?:\S+|[^\s/\\]*[/\\][^\n]*)\.(?:png|jpe?g|webp|gif|bmp|tiff?|ppm|avif|heic)(?:[?#]\S*)?", re.IGNORECASE
)


def text_field(row: Mapping[str, Any], field: str) -> str:
    """A field that has to be a string."""
    value = row.get(field)
    if value is None:
        raise RowError("missing_column", f"`{field}` is missing or None; give it, or drop the row.")
    if not isinstance(value, str):
        raise RowError("not_conversational", f"`{field}` is of type {type(value).__name__}; give a string.")
    return value


def answer_field(row: Mapping[str, Any], field: str, tags: Tags = TAGS) -> str:
    """An answer: a string, or a message, alone or in a list; not a user's, and no call or result of a tool."""
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
        raise RowError(
            "missing_column", f"`{field}` is a message without {' or '.join(tags.content_keys)}; give its text."
        )
    if isinstance(content, (list, tuple)):
        content = _text_of_blocks(content, f"`{field}`", [])
    return text_field({field: content}, field)


def check_is_text(row: Mapping[str, Any], fields: Sequence[str], how: str) -> None:
    """Refuses answers that are images, or the names of image files: a text-to-image pair is not read as text."""
    values = [row.get(field) for field in fields]
    for field, value in zip(fields, values, strict=True):
        items = value if isinstance(value, (list, tuple)) else [value]
        is_image = any(
            isinstance(item, (bytes, bytearray, memoryview))
            or (isinstance(item, Mapping) and any(item.get(key) is not None for key in ("bytes", "path")))
            or (items is value and isinstance(item, str) and _is_image_file(item))
            for item in items
        )
        if is_image:
            raise RowError("image_in_answer", f"`{field}` holds an image: this is a text-to-image pair; {how}")
    texts = [value.strip() for value in values if isinstance(value, str)]
    if len(texts) == len(values) and all(map(_is_image_file, texts)):
        names = " and ".join(f"`{field}`" for field in fields)
        raise RowError(
            "image_in_answer",
            f"{names} hold names of image files, such as {texts[0]!r:.60}: this is a text-to-image pair; {how}",
        )


def _is_image_file(text: str) -> bool:
    return text.startswith("data:image/") or _IMAGE_FILE.fullmatch(text) is not None


def check_placeholders(turns: Turns, answers: Mapping[str, str], placeholders: Sequence[str] = _PLACEHOLDERS) -> None:
    """Refuses placeholders of images anywhere but in what the user says, and of videos and sounds anywhere."""
    parts = [("the prompt", text, role == "user") for role, text in turns]
    for name, text, is_user in (*parts, *((f"`{field}`", text, False) for field, text in answers.items())):
        if len(placeholders) > 1 and (found := _IMAGE_IN_TEXT.search(text)):
            raise RowError(
                "placeholder_count",
                f"{name} has {found[0]!r:.60}, and images are not read from texts; put them into `images`, and "
                f"`{IMAGE_MARKER}` in their place.",
            )
        for marker in placeholders[is_user:]:
            if marker in text and marker != IMAGE_MARKER:
                raise RowError(
                    "video_type",
                    f"{name} has the placeholder `{marker}`, but videos and sounds are not read from this format; "
                    "drop the row.",
                )
            if marker in text:
                where = name if name != "the prompt" else "a message of the prompt that is not the user's"
                raise RowError(
                    "image_in_answer",
                    f"{where} has the placeholder `{marker}`, but only what the user says may show images; drop the "
                    "row.",
                )


def json_field(row: Mapping[str, Any], field: str) -> Any:
    """What a string field holds as JSON; a field that is parsed already comes as it is."""
    value = row.get(field)
    if isinstance(value, (Mapping, list)):
        return value
    text = text_field(row, field)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"`{field}` is not JSON ({type(error).__name__}); fix the string."
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
        return [] if _is_missing(value) else [_decoded(value, field)]
    for index, image in enumerate(value):
        if _is_missing(image):
            raise RowError("image_missing", f"`{field}[{index}]` is None or empty; give the image or drop the row.")
    return [_decoded(image, f"{field}[{index}]") for index, image in enumerate(value)]


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


def turns_field(row: Mapping[str, Any], field: str, tags: Tags = TAGS, images: list[Any] | None = None) -> Turns:
    """The messages of a conversation as pairs of role and text.

    Where contents may be blocks, `images` collects the images that these hold, and each leaves a marker in the text.
    """
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


def prompt_field(row: Mapping[str, Any], field: str, tags: Tags = TAGS, images: list[Any] | None = None) -> Turns:
    """A conversation that waits for an answer."""
    turns = turns_field(row, field, tags, images)
    check_prompt(turns, field)
    return turns


def answered_field(
    row: Mapping[str, Any], field: str, tags: Tags = TAGS, images: list[Any] | None = None
) -> tuple[Turns, str]:
    """A whole conversation as its prompt and the answer at its end."""
    *turns, (role, answer) = turns_field(row, field, tags, images)
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
        return image.get("bytes") is None and _is_missing(image.get("path")) and _is_missing(image.get("url"))
    return image is None or (isinstance(image, str) and not image)


def is_given(value: Any) -> bool:
    """Whether a field holds anything: `None`, an empty string, list or object, and a list of these, hold nothing."""
    if value is None or isinstance(value, str):
        return bool(value)
    if isinstance(value, (list, tuple)):
        return any(map(is_given, value))
    return not isinstance(value, Mapping) or any(map(is_given, value.values()))


def literal(text: str) -> Any:
    """What a string holds, in JSON or as Python prints it; `None` if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _first(message: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _check_extras(message: Mapping[str, Any], where: str) -> None:
    for key in sorted(_MESSAGE_EXTRAS & message.keys()):
        if is_given(message[key]):
            raise RowError("not_conversational", f"{where} has `{key}`, which is not read; drop the row.")


def _text_of_blocks(blocks: Sequence[Any], where: str, images: list[Any]) -> str:
    """The text of content blocks as OpenAI, Anthropic, ms-swift or LLaMA-Factory write them, with image markers."""
    parts = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
        if kind == "text" and isinstance(text := _first(block, ("text", "value", "content")), str):
            parts.append(text)
        elif kind in ("image", "image_url"):
            image = _image_of_block(block)
            images += [] if _is_missing(image) else [_decoded(image, where)]
            parts.append(IMAGE_MARKER)
        else:
            is_medium = isinstance(kind, str) and ("video" in kind or "audio" in kind)
            raise RowError(
                "video_type" if is_medium else "block_type",
                f"{where} has a block of type {kind!r:.40}, which is not read; only text and images are.",
            )
    return "".join(parts)


def _image_of_block(block: Mapping[str, Any]) -> Any:
    """The image in a block; `None` of a bare placeholder."""
    value = _first(block, ("image", "image_url", "value", "source", "url", "path", "base64", "bytes"))
    if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
        return _first(value, ("url", "data"))
    return value


def _decoded(image: Any, where: str) -> Any:
    """An image that is base64, alone, in a `data:` address or where bytes belong, as bytes; others as they are."""
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), str):
        content = _from_base64(image["bytes"])
        if content is None:
            raise RowError("image_type", f"`{where}` has `bytes` that are text and no base64 of an image; fix it.")
        return {**image, "bytes": content}
    if isinstance(image, Mapping) and image.get("bytes") is None and _is_missing(image.get("path")):
        image = image["url"]  # which is there, or the image would be missing
    if not isinstance(image, str):
        return image
    if not image.startswith("data:"):
        return image if (content := _from_base64(image)) is None else content
    content = _from_base64(image.partition(",")[2])
    if content is None:
        raise RowError("image_corrupt", f"`{where}` is a `data:` address without an image in base64; fix it.")
    return content


def _from_base64(text: str) -> bytes | None:
    """The bytes of an image in base64, or `None` if the text is something else, such as a path."""
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return content if len(content) > 20 and content.startswith(_IMAGE_STARTS) else None
