"""The canonical preference row: what a row may look like, what its images are, and which row it is.

A row is TRL's vision preference row (`prompt`, `chosen`, `rejected`, `images`) plus a few optional columns. Data sets
come from anywhere, so a row is checked before it meets a chat template: a template takes every block for an image that
has an `image`, `url` or `path` key, and a tokenizer takes every `<|im_end|>` in an answer for the real one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase


Reason = Literal[
    "missing_column",  # `chosen` or `rejected` is absent, or the prompt is empty
    "not_conversational",  # neither strings nor well-formed messages, or images without messages
    "empty_answer",  # nothing but white space to judge
    "equal_answers",  # nothing to prefer
    "placeholder_count",  # as many image or video blocks as images or videos
    "image_in_answer",  # images belong to the prompt
    "block_type",  # a content block that is not a bare placeholder or text
    "special_token",  # text that the tokenizer would read as control tokens
    "bad_strength",
    "bad_weight",
    "bad_margin",
    "image_missing",  # no such file, no such address, or `None`
    "image_corrupt",  # does not decode
    "image_too_large",  # too many pixels or bytes
    "image_outside_root",  # leaves the folder that images may come from
    "image_url",  # an address that is not allowed
    "image_type",  # not a kind of object that holds an image
    "too_long",  # reserved: more tokens than `max_length`
]
REASONS: tuple[str, ...] = get_args(Reason)

_ROLES = ("system", "user", "assistant", "tool")
_SIDES = ("chosen", "rejected")


class RowError(ValueError):
    """
    A row that cannot be used.

    The message is one sentence without the row's name; whoever knows the row puts [`row_name`] in front.

    Args:
        reason (`str`):
            One of [`REASONS`].
        message (`str`):
            What is wrong, in which field, and what to do.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        # Both go into `args`, so that the error survives the trip back from a worker process.
        super().__init__(reason, message)
        self.reason: Reason = reason

    def __str__(self) -> str:
        return self.args[1]


def check_row(row: Mapping[str, Any], *, special_tokens: re.Pattern | None = None) -> None:
    """
    Checks everything about a row but the images themselves, and returns if nothing is wrong.

    A row has an explicit prompt (`prompt`, `chosen`, `rejected`) or an implicit one (whole conversations in `chosen`
    and `rejected`), as messages or as plain strings. Images are in `images` or `image`, videos in `videos`. Keys that
    are `None` count as absent, because Arrow gives every block every key.

    Args:
        row (`Mapping[str, Any]`):
            The row.
        special_tokens (`re.Pattern`, *optional*):
            What no text may contain, from [`special_token_pattern`].

    Raises:
        [`RowError`]: for the first problem.
    """
    prompt = row.get("prompt")
    for side in _SIDES:
        if row.get(side) is None:
            raise RowError("missing_column", f"`{side}` is missing or None; a preference row needs both answers.")
    images, videos = row_images(row), row.get("videos") or []
    for index, image in enumerate(images):
        if image is None:
            raise RowError("image_missing", f"`images[{index}]` is None; remove it or give the image.")

    if isinstance(row["chosen"], str):
        _check_plain(row, prompt, has_images=bool(images or videos))
    else:
        for field in ("prompt", *_SIDES):
            if field != "prompt" or prompt is not None:
                _check_messages(field, row[field])
        for side in _SIDES:
            _check_answer(side, row[side], prompt_is_explicit=prompt is not None)
        for kind, given in (("image", images), ("video", videos)):
            for field in _SIDES if prompt is None else ("prompt",):
                _check_placeholders(field, row[field], kind, len(given))
    if _canonical_text(row["chosen"]) == _canonical_text(row["rejected"]):
        raise RowError("equal_answers", "`chosen` and `rejected` are equal; drop the row, there is nothing to learn.")
    if special_tokens is not None:
        _check_special_tokens(row, special_tokens)
    _check_numbers(row)


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """
    The row's images, from `images` or `image`, as they are.

    Args:
        row (`Mapping[str, Any]`):
            The row.

    Returns:
        `list`: empty if the row has none.

    Raises:
        [`RowError`]: `image_type` if `images` is not a list, or if both columns hold images.
    """
    images, image = row.get("images"), row.get("image")
    if images is None:
        images = []
    if not isinstance(images, (list, tuple)):
        raise RowError(
            "image_type", f"`images` is of type {type(images).__name__}; it must be a list, also of a single image."
        )
    if image is None:
        return list(images)
    if images:
        raise RowError("image_type", "both `images` and `image` hold images; keep one of the two columns.")
    return [image]


def row_name(row: Mapping[str, Any], index: int | None = None) -> str:
    """
    How an error names a row.

    Args:
        row (`Mapping[str, Any]`):
            The row.
        index (`int`, *optional*):
            Its place in the data set.

    Returns:
        `str`: the row's `pair_id` if it has one, otherwise `"row {index}"`, or `"row"` where the place is not known.
    """
    pair_id = row.get("pair_id")
    if pair_id is not None and pair_id != "":
        return str(pair_id)
    return "row" if index is None else f"row {index}"


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """
    A pattern that finds the special tokens of a tokenizer in a text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.

    Returns:
        `re.Pattern` or `None`: an alternation, longest token first; `None` if the tokenizer has no special token.
    """
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens.discard("")
    if not tokens:
        return None
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=lambda t: (-len(t), t))))


def content_id(row: Mapping[str, Any]) -> str:
    """
    A stable identity of a row: a hash of what the model reads.

    It covers the messages (roles, texts, block types, tool calls), `tools`, `chat_template_kwargs`, images and videos;
    not `strength`, `source` and the like. A string content and one text block are the same. Bytes and paths survive an
    Arrow round trip; a decoded image is another image than the bytes that it came from.

    Args:
        row (`Mapping[str, Any]`):
            A row that [`check_row`] accepts.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        [`RowError`]: if an image has a type without identity, or does not decode.
    """
    content: dict[str, Any] = {field: _canonical(row.get(field)) for field in ("prompt", *_SIDES)}
    content["images"] = [_image_identity(image) for image in row_images(row)]
    content["videos"] = [_image_identity(video) for video in row.get("videos") or []]
    for field in ("tools", "chat_template_kwargs"):
        content[field] = _without_empty(row.get(field)) or None
    return hashlib.sha256(_to_json(content).encode()).hexdigest()


def _check_plain(row: Mapping[str, Any], prompt: Any, *, has_images: bool) -> None:
    if not isinstance(row["rejected"], str) or not (prompt is None or isinstance(prompt, str)):
        raise RowError(
            "not_conversational", "`chosen` is a string and another field is not; give all as strings or as messages."
        )
    if has_images:
        raise RowError(
            "not_conversational",
            "a row of plain strings cannot have images; give `prompt`, `chosen` and `rejected` as messages, with one "
            '{"type": "image"} block for each image in the prompt.',
        )
    for side in _SIDES:
        if not row[side].strip():
            raise RowError("empty_answer", f"`{side}` is empty; drop the row.")


def _check_messages(field: str, messages: Any) -> None:
    if not isinstance(messages, (list, tuple)):
        raise RowError(
            "not_conversational",
            f"`{field}` is of type {type(messages).__name__}; give all fields as strings or as lists of messages.",
        )
    if not messages:
        raise RowError("missing_column" if field == "prompt" else "empty_answer", f"`{field}` has no messages.")
    for index, message in enumerate(messages):
        where = f"`{field}` message {index}"
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise RowError("not_conversational", f"{where} is not a dict with a `role` out of {', '.join(_ROLES)}.")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            for block in content:
                _check_block(where, message["role"], block)
        elif not isinstance(content, str) and not (content is None and message["role"] == "assistant"):
            raise RowError(
                "not_conversational",
                f"{where} has content of type {type(content).__name__}; give a string or a list of blocks.",
            )


def _check_block(where: str, role: str, block: Any) -> None:
    if not isinstance(block, Mapping):
        raise RowError("block_type", f"{where} has a block of type {type(block).__name__}; a block is a dict.")
    kind = block.get("type")
    extra = sorted(str(key) for key, value in block.items() if value is not None and key not in ("type", "text"))
    if kind in ("image", "video"):
        if extra or block.get("text") is not None:
            keys = ", ".join(f"`{key}`" for key in extra or ["text"])
            raise RowError(
                "block_type",
                f'{where} has {keys} in its {kind} block; leave {{"type": "{kind}"}} alone and put the {kind} in the '
                f"`{kind}s` column.",
            )
        if role == "tool":
            raise RowError("block_type", f"{where} is a tool's and has an {kind} block; move it to a user's message.")
    elif kind != "text" or not isinstance(block.get("text"), str):
        # The kind comes from the data: shown, but not at any length.
        raise RowError(
            "block_type",
            f"{where} has a block of type {kind!r:.40} that is neither text with a string `text`, nor an image or a "
            'video; use {"type": "text", "text": ...}, or {"type": "image"} and the `images` column.',
        )
    elif extra:
        keys = ", ".join(f"`{key}`" for key in extra)
        raise RowError(
            "block_type", f"{where} has {keys} in a text block; remove it, and put an image in the `images` column."
        )


def _check_answer(side: str, messages: Any, *, prompt_is_explicit: bool) -> None:
    for index, message in enumerate(messages):
        is_answer = prompt_is_explicit or message["role"] == "assistant"
        if is_answer and any(block["type"] != "text" for block in _blocks(message)):
            raise RowError(
                "image_in_answer",
                f"`{side}` message {index} has an image or video block; only the prompt may show images, so ask about "
                "them there.",
            )
    answer = messages[-1]
    if answer["role"] != "assistant":
        raise RowError("not_conversational", f"`{side}` ends with a {answer['role']} message; end it with the answer.")
    text = "".join(block["text"] for block in _blocks(answer) if block["type"] == "text")
    if not text.strip() and not answer.get("tool_calls"):
        raise RowError("empty_answer", f"`{side}` is empty; drop the row.")


def _check_placeholders(field: str, messages: Any, kind: str, given: int) -> None:
    """TRL puts the images before the first user turn that is a string, and otherwise counts the blocks."""
    count = sum(block["type"] == kind for message in messages for block in _blocks(message))
    all_strings = all(not isinstance(message.get("content"), (list, tuple)) for message in messages)
    user_strings = any(message["role"] == "user" and isinstance(message["content"], str) for message in messages)
    if kind == "image" and all_strings and user_strings:
        return
    if count != given:
        raise RowError(
            "placeholder_count",
            f'`{field}` has {count} {{"type": "{kind}"}} blocks, but the row has {given} {kind}s; give one block for '
            f"each {kind}.",
        )
    if kind == "image" and given and user_strings:
        raise RowError(
            "placeholder_count",
            f"`{field}` has image blocks in one user message and a string as another, where TRL adds the images a "
            "second time; give every user message as blocks.",
        )


def _check_special_tokens(row: Mapping[str, Any], pattern: re.Pattern) -> None:
    for field in ("prompt", *_SIDES):
        value = row.get(field)
        is_text = isinstance(value, str)
        for index, message in enumerate([value] if is_text else value or []):
            for text in _strings(message):
                if found := pattern.search(text):
                    token = found.group()
                    where = f"`{field}`" if is_text else f"`{field}` message {index}"
                    advice = "remove or spell it differently"
                    if token == "<image>":
                        advice = 'put an {"type": "image"} block in its place'
                    raise RowError("special_token", f"{where} contains the special token {token!r}; {advice}.")


def _check_numbers(row: Mapping[str, Any]) -> None:
    checks: tuple[tuple[str, Reason], ...] = (("strength", "bad_strength"), ("weight", "bad_weight"))
    for field, reason in checks:
        value = row.get(field)
        if value is not None and not (_is_finite(value) and value >= 0):
            raise RowError(
                reason, f"`{field}` is {value!r:.40}; give a finite number that is not negative, or None if unknown."
            )
    if "margin" in row and not _is_finite(row["margin"]):
        raise RowError(
            "bad_margin", f"`margin` is {row['margin']!r:.40}; give a finite number (0.0 for none) or drop the column."
        )


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _strings(value: Any) -> Iterator[str]:
    """All strings in a message, those in tool calls included: templates write them all."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _canonical(value: Any) -> Any:
    """Messages with their blocks as lists and without what Arrow adds; a string stays a string."""
    if value is None or isinstance(value, str):
        return value
    return [{**_without_empty(message), "content": _without_empty(_blocks(message))} for message in value]


def _canonical_text(value: Any) -> str:
    return _to_json(_canonical(value))


def _to_json(value: Any) -> str:
    # `default` for what Arrow has and JSON has not, such as dates in the arguments of a tool call.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _without_empty(value: Any) -> Any:
    # Arrow turns a missing key into None and an empty struct into either, so that none of the three may count.
    if isinstance(value, Mapping):
        items = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None and item != {} and item != []}
    return [_without_empty(item) for item in value] if isinstance(value, (list, tuple)) else value


def _image_identity(image: Any) -> list[Any]:
    if isinstance(image, Mapping):  # the bytes win, as in `load_image`
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return ["bytes", hashlib.sha256(image).hexdigest()]
    if isinstance(image, (str, os.PathLike)):
        return ["path", os.fsdecode(image)]
    if isinstance(image, np.ndarray):
        return ["array", str(image.dtype), list(image.shape), hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(image, Image.Image):
        try:
            digest = hashlib.sha256(image.tobytes())
        except (OSError, SyntaxError, ValueError) as error:
            raise RowError("image_corrupt", f"an image does not decode ({error}); replace it.") from error
        digest.update(bytes(image.getpalette() or []))
        return ["pixels", image.mode, list(image.size), digest.hexdigest()]
    raise RowError("image_type", f"an image is of type {type(image).__name__}; give bytes, a path or a PIL image.")
