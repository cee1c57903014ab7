"""The canonical row: its parts, its checks, its errors and its identity.

Data sets come from anywhere, so a row is checked before it meets a chat template: a template takes every block for an
image that has an `image`, `url` or `path` key, and a tokenizer takes every `<|im_end|>` in an answer for the real one.
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from PIL import Image

from ..utils import digest


if TYPE_CHECKING:
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
    "bad_label_confidence",
    "bad_blind_margin",
    "bad_margin",
    "image_missing",  # no such file, no such address, or `None`
    "image_corrupt",  # does not decode
    "image_too_large",  # too many pixels or bytes
    "image_too_narrow",  # one side many times the other, which image processors refuse
    "image_outside_root",  # leaves the folder that images may come from
    "image_url",  # an address that is not allowed
    "image_type",  # not a kind of object that holds an image
    "video_type",  # not a list of frames
    "too_long",  # more tokens than `max_length`
    "tie",  # the source prefers neither
    "unparsed_verdict",  # a preference in words that no rule reads, or answers that cannot be found in a text
    "bad_rating",  # a rating that is not a number
    "equal_images",  # a text-to-image pair of one image twice
    "empty_caption",
    "duplicate_pair",  # the same as an earlier row
    "contradictory_pair",  # another row prefers the other answer
    "contaminated",  # in a benchmark
]

REASONS: tuple[str, ...] = get_args(Reason)

Checked = TypeVar("Checked")

SIDES = ("chosen", "rejected")
ANSWERS, SCORES, RANKS = "completions", "scores", "ranks"  # of ranked prompts
DEFAULT_FPS = 2.0
_ROLES = ("system", "user", "assistant", "tool")

# White space, and characters that show nothing at all: controls, joiners, marks of direction, fillers.
_BLANK = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]*"
)
_LARGEST = 3.4028234663852886e38  # of float32, in which the loss is computed: anything larger becomes infinite


def summarize(counts: Mapping[str, int]) -> str:
    """Write the numbers of rows by reason in one line, the largest first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(counts).most_common())


def is_milestone(count: int) -> bool:
    """Tell when to log a count: at 1, 10, 100, ..., because a stream has no end to count up to."""
    return str(count).strip("0") == "1"


class RowError(ValueError):
    """
    Error of a row that cannot be used.

    The message is one sentence without the row's name; whoever knows the row puts [`row_name`] in front.

    Args:
        reason (`str`):
            One of [`REASONS`].
        message (`str`):
            Problem, field and remedy.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        # Both go into `args`, so that the error survives the trip back from a worker process.
        super().__init__(reason, message)
        self.reason: Reason = reason

    def __str__(self) -> str:
        return self.args[1]


class Video(NamedTuple):
    """
    A video as its frames.

    Parameters:
        frames, fps (`list`, `float`):
            Frames in order, each in any form that an image may have, and their number per second, above 0.
    """

    frames: list[Any]
    fps: float


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """
    Get the images of a row, from `images` or `image`, as they are.

    Args:
        row (`Mapping[str, Any]`):
            Row of any kind.

    Returns:
        `list`: empty if the row has none.

    Raises:
        [`RowError`]: `image_type` if `images` is not a list, or if both columns hold images.
    """
    images, image = row.get("images"), row.get("image")
    images = [] if images is None else images
    if not isinstance(images, (list, tuple)):
        kind = type(images).__name__
        raise RowError("image_type", f"`images` is of type {kind}; it must be a list, also of a single image.")
    if images and image is not None:
        raise RowError("image_type", "both `images` and `image` hold images; keep one of the two columns.")
    return list(images) if image is None else [image]


def row_videos(row: Mapping[str, Any]) -> list[Video]:
    """
    Get the videos of a row as frames: decoding and sampling a file is left to whoever makes the data set.

    Args:
        row (`Mapping[str, Any]`):
            Row in whose `videos` a video is a list of frames, at 2 frames per second, or a dict
            `{"frames": [...], "fps": ...}`.

    Returns:
        `list[Video]`: empty if the row has none.

    Raises:
        [`RowError`]: `video_type` if `videos` is not a list, or a video is neither of the two.
    """
    given, videos = row.get("videos") or [], []
    if not isinstance(given, (list, tuple)):
        raise RowError("video_type", f"`videos` is of type {type(given).__name__}; it must be a list of videos.")
    for index, video in enumerate(given):
        frames, fps = (video.get("frames"), video.get("fps")) if isinstance(video, Mapping) else (video, None)
        fps = DEFAULT_FPS if fps is None else fps
        if not isinstance(frames, (list, tuple)) or not frames:
            message = f"is of type {type(video).__name__}; give a list of frames, or a dict with `frames` and `fps`."
            raise RowError("video_type", f"`videos[{index}]` {message}")
        if not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
            raise RowError("video_type", f"`videos[{index}]` has {fps!r:.40} as `fps`; give a positive number.")
        videos.append(Video(list(frames), float(fps)))
    return videos


def row_name(row: Mapping[str, Any], index: int | None = None) -> str:
    """
    Name a row in an error.

    Args:
        row, index (*optional*):
            Row of any kind, and its index in the data set.

    Returns:
        `str`: the row's `pair_id` if it has one, otherwise `"row {index}"`, or `"row"` without an index.
    """
    if (pair_id := row.get("pair_id")) not in (None, ""):
        return str(pair_id)
    return "row" if index is None else f"row {index}"


@contextmanager
def named_errors(row: Mapping[str, Any], index: int | None) -> Iterator[None]:
    """Put the name of a row in front of its errors."""
    try:
        yield
    except RowError as error:
        raise RowError(error.reason, f"{row_name(row, index)}: {error}") from error


def blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the content of a message as blocks; a string is one text block."""
    content = message.get("content")
    if content is None:
        return []
    return [text_block(content)] if isinstance(content, str) else list(content)


def message_text(message: Mapping[str, Any]) -> str:
    """Join the text blocks of a message."""
    return "".join(block.get("text") or "" for block in blocks(message))


def differ_for_any_tokenizer(first: str, second: str) -> bool:
    """Tell whether two texts differ in more than a tokenizer may drop: spaces, case and forms of a letter."""
    one, other = ("".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in (first, second))
    return one != other


def check_row(row: Mapping[str, Any], *, special_tokens: re.Pattern | None = None) -> None:
    """
    Check everything about a row but the images themselves.

    A row has an explicit prompt (`prompt`, `chosen`, `rejected`) or an implicit one (whole conversations in `chosen`
    and `rejected`), as messages or as plain strings. Images are in `images` or `image`, videos in `videos`. Keys that
    are `None` count as absent, because Arrow gives every block every key.

    Args:
        row (`Mapping[str, Any]`):
            Preference row.
        special_tokens (`re.Pattern`, *optional*):
            Pattern that no text may contain, from [`special_token_pattern`].

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
        for field in SIDES if prompt is None else ("prompt", *SIDES):
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
    check_numbers(row)


def answer_scores(row: Mapping[str, Any]) -> list[float | None]:
    """Return the scores of a ranked prompt's answers, of which higher is better, or their ranks, negated; refuse a row
    of under two answers, or without a number or `None` for each."""
    scores, ranks = row.get(SCORES), row.get(RANKS)
    if (scores is None) == (ranks is None):
        raise RowError("bad_rating", "it has both `scores` and `ranks`, or neither; give one of them.")
    given: Any = ranks if scores is None else scores
    try:
        numbers = [None if number is None else float(number) for number in given]
        are_finite = all(number is None or math.isfinite(number) for number in numbers)
    except (TypeError, ValueError):
        are_finite = False
    if not are_finite:
        raise RowError("bad_rating", f"its scores are {given!r:.60}; give finite numbers, or None for an unknown one.")
    answers = row.get(ANSWERS)
    count = len(answers) if isinstance(answers, (list, tuple)) else 0
    if count < 2 or count != len(numbers):
        problem = f"it has {count} `{ANSWERS}` and {len(numbers)} `{SCORES}` or `{RANKS}`"
        raise RowError("bad_rating", f"{problem}; give one for each of two or more answers.")
    return [None if number is None else -number for number in numbers] if scores is None else numbers


def check_answers(row: Mapping[str, Any], check: Callable[[dict[str, Any]], Checked]) -> list[Checked]:
    """Check each answer of a ranked prompt by a check of pairs, beside itself with a mark."""
    checked = []
    for index, answer in enumerate(row[ANSWERS]):
        name = f"{ANSWERS}[{index}]"
        if not isinstance(answer, str):
            check_messages(name, answer)
        try:
            checked.append(check({**row, "chosen": answer, "rejected": marked(answer, ".")}))
        except RowError as error:
            raise RowError(error.reason, str(error).replace("`chosen`", f"`{name}`")) from None
    return checked


def marked(answer: Any, mark: str) -> Any:
    """Append a mark to the text of an answer."""
    if isinstance(answer, str):
        return answer + mark
    content = answer[-1].get("content")
    if content is None or isinstance(content, str):
        content = (content or "") + mark
    elif isinstance(content, (list, tuple)):
        content = [*content, text_block(mark)]
    return [*answer[:-1], {**answer[-1], "content": content}]


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """
    Compile a pattern that finds the special tokens of a tokenizer in a text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.

    Returns:
        `re.Pattern`, or `None` if the tokenizer has no special token.
    """
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {*map(str, tokenizer.all_special_tokens), *added} - {""}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if tokens else None


def _check_plain(row: Mapping[str, Any], prompt: Any, *, has_images: bool) -> None:
    if not isinstance(row["rejected"], str) or not (prompt is None or isinstance(prompt, str)):
        message = "`chosen` is a string and another field is not; give all as strings or as messages."
        raise RowError("not_conversational", message)
    if has_images:
        raise RowError(
            "not_conversational",
            "a row of plain strings cannot have images; give `prompt`, `chosen` and `rejected` as messages, with one "
            '{"type": "image"} block for each image in the prompt.',
        )
    for field in ("prompt", *SIDES):
        check_unicode(f"`{field}`", row.get(field))
    for side in SIDES:
        if _BLANK.fullmatch(row[side]):
            raise RowError("empty_answer", f"`{side}` is empty; drop the row.")


def check_messages(field: str, messages: Any) -> None:
    """Refuse anything but a list of messages whose contents are blocks or strings."""
    if not isinstance(messages, (list, tuple)):
        problem = f"is of type {type(messages).__name__}; give all fields as strings or as lists of messages."
        raise RowError("not_conversational", f"`{field}` {problem}")
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
                check_unicode(where, block.get("text"))
        elif isinstance(content, str):
            check_unicode(where, content)
        elif not (content is None and message["role"] == "assistant"):
            problem = f"has content of type {type(content).__name__}; give a string or a list of blocks."
            raise RowError("not_conversational", f"{where} {problem}")


def check_unicode(where: str, text: str | None) -> None:
    """Refuse half a surrogate pair, as JSON has where a text was cut: it fits into no file and no tokenizer."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        message = f"{where} has half a character (a lone surrogate) in its text; cut it off."
        raise RowError("not_conversational", message) from None


def _check_block(where: str, role: str, block: Any) -> None:
    if not isinstance(block, Mapping):
        raise RowError("block_type", f"{where} has a block of type {type(block).__name__}; a block is a dict.")
    kind = block.get("type")
    own = ("type", "text") if kind == "text" else ("type",)
    keys = ", ".join(sorted(f"`{key}`" for key, value in block.items() if value is not None and key not in own))
    if kind in ("image", "video"):
        if keys:
            advice = f'leave {{"type": "{kind}"}} alone and put the {kind} in the `{kind}s` column.'
            raise RowError("block_type", f"{where} has {keys} in its {kind} block; {advice}")
        if role == "tool":
            raise RowError("block_type", f"{where} is a tool's and has an {kind} block; move it to a user's message.")
    elif kind != "text" or not isinstance(block.get("text"), str):
        # The kind comes from the data: shown, but not at any length.
        problem = f"{where} has a block of type {kind!r:.40} that is neither text with a string `text`, nor an image"
        advice = 'use {"type": "text", "text": ...}, or {"type": "image"} and the `images` column.'
        raise RowError("block_type", f"{problem} or a video; {advice}")
    elif keys:
        message = f"{where} has {keys} in a text block; drop it, and put an image in the `images` column."
        raise RowError("block_type", message)


def check_answer(side: str, messages: Any, *, prompt_is_explicit: bool) -> None:
    """Refuse a side that shows images, does not end with an answer, or ends with an empty one."""
    for index, message in enumerate(messages):
        is_answer = prompt_is_explicit or message["role"] == "assistant"
        if is_answer and any(block["type"] != "text" for block in blocks(message)):
            problem = f"`{side}` message {index} has an image or video block; only the prompt may show images"
            raise RowError("image_in_answer", f"{problem}, so ask about them there.")
    answer = messages[-1]
    if answer["role"] != "assistant":
        raise RowError("not_conversational", f"`{side}` ends with a {answer['role']} message; end it with the answer.")
    if _BLANK.fullmatch(message_text(answer)) and not answer.get("tool_calls"):
        raise RowError("empty_answer", f"`{side}` is empty; drop the row.")


def _stripped(answer: Any) -> Any:
    """Strip the white space around the last message of an answer, which is nothing to prefer."""
    if isinstance(answer, str):
        return answer.strip()
    *others, last = answer
    return [*others, {**last, "content": message_text(last).strip()}]


def _check_placeholders(field: str, messages: Any, kind: str, given: int) -> None:
    """Refuse a number of blocks other than that of the images or videos; in strings, TRL adds the image blocks."""
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
        problem = f"`{field}` has image blocks in one user message and a string as another"
        advice = "where TRL adds the images a second time; pass every user message as blocks."
        raise RowError("placeholder_count", f"{problem}, {advice}")


def check_special_tokens(row: Mapping[str, Any], pattern: re.Pattern) -> None:
    """Refuse a row with a text that contains a special token, as [`check_row`] does."""
    for field in ("prompt", *SIDES):
        value = row.get(field)
        is_text = isinstance(value, str)
        for index, message in enumerate([value] if is_text else value or []):
            for text in _strings(message):
                if match := pattern.search(text):
                    token = match.group()
                    where = f"`{field}`" if is_text else f"`{field}` message {index}"
                    instead = 'put an {"type": "image"} block in its place'
                    advice = instead if token == "<image>" else "remove or spell it differently"
                    raise RowError("special_token", f"{where} contains the special token {token!r}; {advice}.")


def check_numbers(row: Mapping[str, Any]) -> None:
    """Refuse a strength, weight, confidence or margins in which the loss cannot be computed."""
    check_amount("strength", row.get("strength"), "bad_strength")
    check_amount("weight", row.get("weight"), "bad_weight")
    check_confidence("label_confidence", row.get("label_confidence"))
    check_log_odds("blind_margin", row.get("blind_margin"))
    if "margin" in row and not is_finite(row["margin"]):
        message = f"`margin` is {row['margin']!r:.40}; give a finite number, 0.0 for none, or drop the column."
        raise RowError("bad_margin", message)


def check_amount(field: str, value: Any, reason: Reason, largest: float = _LARGEST) -> None:
    """Refuse a number that is negative or larger than `largest`; `None` stands for an unknown number."""
    if value is not None and not (is_finite(value, largest) and value >= 0):
        message = f"`{field}` is {value!r:.40}; give a finite number that is not negative, or None if unknown."
        raise RowError(reason, message)


def check_confidence(field: str, value: Any) -> None:
    """Refuse what is no probability; `None` stands for certainty."""
    if value is not None and not (is_finite(value, 1.0) and value >= 0):
        message = f"`{field}` is {value!r:.40}; give the probability that the label is right, in [0, 1], or None if"
        raise RowError("bad_label_confidence", f"{message} there is no doubt.")


def check_log_odds(field: str, value: Any) -> None:
    """Refuse what is no finite number; `None` stands for an unknown one."""
    if value is not None and not is_finite(value):
        message = f"`{field}` is {value!r:.40}; give the log odds that `chosen` is better, to a model without"
        raise RowError("bad_blind_margin", f"{message} the image, or None if unknown.")


def is_finite(value: Any, largest: float = _LARGEST) -> bool:
    """Tell whether a value is a number from `-largest` to `largest`."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) <= largest
    except OverflowError:  # an integer beyond the floats
        return False


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a message, those in tool calls included: templates write them all."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def canonical_text(value: Any) -> str:
    """Write messages, or a plain string, as JSON that does not depend on their form."""
    return to_json(canonical(value))


def canonical(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    return [{**without_empty(message), "content": without_empty(blocks(message))} for message in value]


def to_json(value: Any) -> str:
    # `default` for what Arrow has and JSON has not, such as dates in the arguments of a tool call.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def without_empty(value: Any) -> Any:
    # Arrow turns a missing key into None and an empty struct into either; none of the three may count.
    if isinstance(value, Mapping):
        items = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None and item != {} and item != []}
    return [without_empty(item) for item in value] if isinstance(value, (list, tuple)) else value


def encoded_content(image: Any) -> Any:
    """Take the bytes of an encoded image, or else its path; any other image stays."""
    if isinstance(image, Mapping):
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return image


def media_identity(row: Mapping[str, Any]) -> dict[str, Any]:
    """Identify the images and videos of a row."""
    videos = [[video.fps, *map(image_identity, video.frames)] for video in row_videos(row)]
    return {"images": [image_identity(image) for image in row_images(row)], "videos": videos}


def image_identity(image: Any) -> list[Any]:
    """Identify an image by its bytes, its path, or its pixels, in this order; see [`content_id`]."""
    image = encoded_content(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return ["bytes", digest(image)]
    if isinstance(image, (str, os.PathLike)):
        return ["path", os.fsdecode(image)]
    if isinstance(image, np.ndarray):
        return ["array", str(image.dtype), list(image.shape), digest(image.tobytes())]
    if isinstance(image, Image.Image):
        try:
            pixels = image.tobytes()
        except (OSError, SyntaxError, ValueError) as error:
            raise RowError("image_corrupt", f"an image does not decode ({error}); replace it.") from error
        return ["pixels", image.mode, list(image.size), digest(pixels, bytes(image.getpalette() or []))]
    raise RowError("image_type", f"an image is of type {type(image).__name__}; give bytes, a path or a PIL image.")


def text_message(role: str, text: str) -> dict[str, Any]:
    """Make a message of one text block."""
    return {"role": role, "content": [text_block(text)]}


def text_block(text: str) -> dict[str, Any]:
    """Make a text block."""
    return {"type": "text", "text": text}


def content_group(prompt: Any, images: Sequence[Any], videos: Sequence[Any]) -> str:
    """Hash the content that all pairs about one prompt share."""
    content = [prompt, [None if image is None else image_identity(image) for image in images], list(videos)]
    return digest(json.dumps(content, default=str))[:16]
