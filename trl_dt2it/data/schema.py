"""The canonical preference row: what a row may look like.

A row is TRL's vision preference row (`prompt`, `chosen`, `rejected`, `images`) plus a few optional columns. Data sets
come from anywhere, so a row is checked before it meets a chat template: a template takes every block for an image that
has an `image`, `url` or `path` key, and a tokenizer takes every `<|im_end|>` in an answer for the real one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import REASONS, Reason, RowError
from .identity import canonical_text, content_id
from .rows import SIDES, blocks, row_images, row_name, row_videos


__all__ = [
    "REASONS",
    "Reason",
    "RowError",
    "check_row",
    "content_id",
    "row_images",
    "row_name",
    "row_videos",
    "special_token_pattern",
]

_ROLES = ("system", "user", "assistant", "tool")

# White space, and characters that show nothing at all: controls, joiners, marks of direction, fillers.
_BLANK = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]*"
)
# What is larger becomes infinite in the loss, which is computed in float32.
_LARGEST = 3.4028234663852886e38


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
    for side in SIDES:
        if row.get(side) is None:
            raise RowError("missing_column", f"`{side}` is missing or None; a preference row needs both answers.")
    images, videos = row_images(row), row_videos(row)
    for index, image in enumerate(images):
        if image is None:
            raise RowError("image_missing", f"`images[{index}]` is None; remove it or give the image.")

    if isinstance(row["chosen"], str):
        _check_plain(row, prompt, has_images=bool(images or videos))
    else:
        for field in ("prompt", *SIDES):
            if field != "prompt" or prompt is not None:
                check_messages(field, row[field])
        for side in SIDES:
            check_answer(side, row[side], prompt_is_explicit=prompt is not None)
        for kind, given in (("image", images), ("video", videos)):
            for field in SIDES if prompt is None else ("prompt",):
                _check_placeholders(field, row[field], kind, len(given))
    if canonical_text(_stripped(row["chosen"])) == canonical_text(_stripped(row["rejected"])):
        raise RowError("equal_answers", "`chosen` and `rejected` are equal; drop the row, there is nothing to learn.")
    if special_tokens is not None:
        check_special_tokens(row, special_tokens)
    _check_numbers(row)


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
    for field in ("prompt", *SIDES):
        _check_unicode(f"`{field}`", row.get(field))
    for side in SIDES:
        if _BLANK.fullmatch(row[side]):
            raise RowError("empty_answer", f"`{side}` is empty; drop the row.")


def check_messages(field: str, messages: Any) -> None:
    """Refuse what is no list of messages with blocks or strings as contents."""
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
                _check_unicode(where, block.get("text"))
        elif isinstance(content, str):
            _check_unicode(where, content)
        elif not (content is None and message["role"] == "assistant"):
            raise RowError(
                "not_conversational",
                f"{where} has content of type {type(content).__name__}; give a string or a list of blocks.",
            )


def _check_unicode(where: str, text: str | None) -> None:
    """Half of a surrogate pair, as JSON may have where a text was cut, fits into no file and no tokenizer."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise RowError(
            "not_conversational", f"{where} has half a character (a lone surrogate) in its text; cut it off."
        ) from None


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


def check_answer(side: str, messages: Any, *, prompt_is_explicit: bool) -> None:
    """Refuse a side that shows images, does not end with an answer, or ends with an empty one."""
    for index, message in enumerate(messages):
        is_answer = prompt_is_explicit or message["role"] == "assistant"
        if is_answer and any(block["type"] != "text" for block in blocks(message)):
            raise RowError(
                "image_in_answer",
                f"`{side}` message {index} has an image or video block; only the prompt may show images, so ask about "
                "them there.",
            )
    answer = messages[-1]
    if answer["role"] != "assistant":
        raise RowError("not_conversational", f"`{side}` ends with a {answer['role']} message; end it with the answer.")
    text = "".join(block["text"] for block in blocks(answer) if block["type"] == "text")
    if _BLANK.fullmatch(text) and not answer.get("tool_calls"):
        raise RowError("empty_answer", f"`{side}` is empty; drop the row.")


def _stripped(answer: Any) -> Any:
    """An answer without the white space around its last message, which is nothing to prefer."""
    if isinstance(answer, str):
        return answer.strip()
    *others, last = answer
    return [*others, {**last, "content": "".join(block["text"] for block in blocks(last)).strip()}]


def _check_placeholders(field: str, messages: Any, kind: str, given: int) -> None:
    """TRL puts the images before the first user turn that is a string, and otherwise counts the blocks."""
    count = sum(block["type"] == kind for message in messages for block in blocks(message))
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


def check_special_tokens(row: Mapping[str, Any], pattern: re.Pattern) -> None:
    """Refuse a row with a text that contains a special token, as [`check_row`] does."""
    for field in ("prompt", *SIDES):
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
        return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) <= _LARGEST
    except OverflowError:  # an integer beyond the floats
        return False


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
