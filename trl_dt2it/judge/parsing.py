"""From the text of a reply to an answer without thoughts, and on to a verdict, or to the reason why there is none.
Nothing is ever guessed.

Whatever a model writes is read by [`read_answer`] first: judges' verdicts, generators' answers and given candidates. A
verdict is the whole reply, or the one object of its shape in some prose, or what `json-repair` makes of the one
object there. Two such objects are none, and an object that an answer brought along is none either: the judge repeated
it or obeyed it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .failures import import_error
from .rubric import Rubric


try:
    import json_repair
    from pydantic import BaseModel, ValidationError
except ImportError as error:
    raise import_error(str(error.name)) from error

# Where thoughts begin and where they end, by the models that mark them so, as regular expressions; and whether a chat
# template may have opened them, so that only their end is in the reply.
_TAGS = ("think", "thinking", "thought", "reasoning", "scratchpad", "seed:think", "mm:think", "longcat_think")
_THOUGHTS: tuple[tuple[str, str, bool], ...] = (
    *((rf"<{name}\s*>", rf"</{name}\s*>", True) for name in _TAGS),
    (r"\[THINK\]", r"\[/THINK\]", True),  # Magistral
    ("◁think▷", "◁/think▷", True),  # Kimi-VL
    (r"<\|open\|>think<\|sep\|>", r"<\|close\|>think<\|sep\|>", True),  # Kimi K3
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>", True),  # Command A
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>", True),  # OpenThinker
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>", True),  # Apertus
    (r"<\|channel>(?:thought)?", r"<channel\|>", True),  # Gemma 4
    (r"<\|channel\|>(?:analysis|commentary)\b", r"<\|channel\|>final\b[^\n]{0,60}?<\|message\|>", True),  # gpt-oss
    (r"\A\s*analysis(?=[A-Z])", r"assistantfinal(?=\S)", False),  # gpt-oss, its control tokens left out
)
_MARKER = re.compile("|".join(f"(?P<o{n}>{one[0]})|(?P<c{n}>{one[1]})" for n, one in enumerate(_THOUGHTS)), re.I)
# What some models put around the answer that follows their thoughts.
_WRAPPER = re.compile(
    r"(?:<answer>|<response>|<\|START_RESPONSE\|>|<\|begin_of_solution\|>|<\|open\|>response<\|sep\|>)?(.*?)"
    r"(?:</answer>|</response>|<\|END_RESPONSE\|>|<\|end_of_solution\|>|<\|close\|>response<\|sep\|>)?\s*"
    r"(?:<\|(?:return|end|im_end)\|>)?",
    re.DOTALL | re.I,
)
_START = re.compile(r'\{(?=\s*["}])')
_PUNCTUATION = re.compile(r"[\s\[\]{},:;\"'\\\u201c\u201d\u2018\u2019\uff0c\uff1a]+")
_INVISIBLE = re.compile(r"[\s\\`\u200b-\u200f\u2060\ufeff]+")


class Unreadable(ValueError):
    """A reply without a verdict. The message is one sentence."""


def read_answer(text: str) -> tuple[str, str | None]:
    """
    Take a reply without the thoughts of the model.

    What stands before the last end of thoughts is left out. A marker inside of a JSON object or between backticks is
    quoted and marks nothing.

    Args:
        text (`str`):
            What the model wrote.

    Returns:
        `tuple[str, str]`: the answer; and the marker of thoughts that never end, or `None`. With such a marker there
        is no answer, and the text is empty.
    """
    markers = list(_markers(text)) if _MARKER.search(text) else []
    begin = place = 0
    while place < len(markers):
        kind, is_start, start, end = markers[place]
        if is_start:
            ends = [n for n in range(place, len(markers)) if markers[n][:2] == (kind, False)]
            if not ends:
                return "", text[start:end].strip()
            place = ends[-1]
            begin = markers[place][3]
        elif _THOUGHTS[kind][2]:
            begin = end
        place += 1
    if begin == 0:
        return text, None
    answer = _WRAPPER.fullmatch(text[begin:].strip())
    assert answer is not None  # all parts of the pattern are optional
    return answer[1].strip(), None


def _markers(text: str) -> Iterator[tuple[int, bool, int, int]]:
    """Each marker of thoughts that is not quoted: its kind, whether it starts them, and where it stands."""
    quoted, decoded = [], 0
    for _, source in _objects(text):
        start = text.index(source, decoded)
        decoded = start + len(source)
        quoted.append((start, decoded))
    for found in _MARKER.finditer(text):
        start, end = found.span()
        is_code = text[start - 1 : start] == "`" == text[end : end + 1]
        if not is_code and not any(first <= start < last for first, last in quoted):
            name = str(found.lastgroup)
            yield int(name[1:]), name[0] == "o", start, end


def parse_verdict(
    text: str,
    schema: type[BaseModel],
    *,
    num_scores: int | None = None,
    rubric: Rubric | None = None,
    untrusted: Sequence[str] = (),
) -> BaseModel:
    """
    Reads a verdict.

    Args:
        text (`str`):
            The reply.
        schema (`type[BaseModel]`):
            The kind of verdict.
        num_scores (`int`, *optional*):
            The number of scores of a [`ListwiseVerdict`].
        rubric ([`Rubric`], *optional*):
            Scale and names of the scores; by default `DEFAULT_RUBRIC`.
        untrusted (`Sequence[str]`, *optional*):
            The texts that were judged. A verdict that stands in one of them is not taken from the reply.

    Returns:
        `BaseModel`: an instance of `schema`.

    Raises:
        [`Unreadable`]: if there is none.
    """
    context = {"num_scores": num_scores, "rubric": rubric}
    answer, open_marker = read_answer(text)
    if open_marker is not None:
        raise Unreadable(f"The thoughts that {open_marker} begins never end.")
    text = answer.strip()
    keys = [field.alias or name for name, field in schema.model_fields.items() if field.is_required()]
    found = list(_objects(text))
    # An object with none of the verdict's keys is a part of the prose, and so is one inside another.
    candidates = [(value, source) for value, source in found if any(key in value for key in keys) or not keys]
    if len(candidates) > 1:
        raise Unreadable(f"The reply holds {len(candidates)} objects that could be the verdict.")
    value, source = candidates[0] if candidates else _repaired(text, keys)
    if keys and re.search(_key_with_value(keys), text.replace(source, " ", 1)):
        raise Unreadable("The reply holds another verdict next to the one that can be read.")
    verdict = _validated(value, schema, context)
    if any(_brings(content, verdict, source, context) for content in untrusted):
        raise Unreadable("The verdict stands word for word in a text that was to be judged.")
    return verdict


def _validated(value: Any, schema: type[BaseModel], context: dict) -> BaseModel:
    try:
        # As JSON, so that a strict model of the user's takes a string for a date.
        return schema.model_validate_json(json.dumps(value), strict=True, context=context)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Unreadable(f"The verdict is not valid: {place}: {first['msg'].removeprefix('Value error, ')}.") from None


def _objects(text: str) -> Iterator[tuple[dict, str]]:
    """The JSON objects of a text that are not inside another, each with its source."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_doubles)
    start = _START.search(text)
    while start:
        end = start.end()
        try:
            value, end = decoder.raw_decode(text, start.start())
            yield value, text[start.start() : end]
        except (ValueError, RecursionError):
            pass
        start = _START.search(text, end)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _key(keys: Sequence[str]) -> str:
    names = "|".join(map(re.escape, keys))
    return rf"""["'\u201c\u2018]?\b(?:{names})\b["'\u201d\u2019]?\s*[:\uff1a=]"""


def _key_with_value(keys: Sequence[str]) -> str:
    """A key in quotes or with what looks like scores behind it, unlike "here are my scores:"."""
    names = "|".join(map(re.escape, keys))
    return rf"""["'\u201c\u2018](?:{names})["'\u201d\u2019]\s*[:\uff1a=]|\b(?:{names})\s*[:\uff1a=]\s*[\[\{{\d"']"""


def _repaired(text: str, keys: Sequence[str]) -> tuple[Any, str]:
    """The one object of a text that is nearly JSON."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or not keys:
        raise Unreadable("The reply holds no JSON object.")
    if end < start:
        # What is cut may have been cut inside a number, and 1 is not what 10 meant to be.
        raise Unreadable("The reply is cut inside its JSON object.")
    source = text[start : end + 1]
    if len(re.findall(_key(keys), source)) != len(keys):
        raise Unreadable("The reply holds no JSON object that can be read without guessing.")
    try:
        value = json_repair.loads(source)
    except (ValueError, RecursionError):
        value = None
    # A repair may add brackets, commas and quotes. If a word or a number is lost or made, it was a guess.
    if not isinstance(value, dict) or _words(json.dumps(value, ensure_ascii=False)) != _words(source):
        raise Unreadable("The reply holds no JSON object that can be read without guessing.")
    return value, source


def _words(text: str) -> list[str]:
    return [word for word in _PUNCTUATION.split(text) if word]


def _brings(content: str, verdict: BaseModel, source: str, context: dict) -> bool:
    """Whether a text holds the verdict, as an object of its own or letter for letter."""
    if _INVISIBLE.sub("", source) in _INVISIBLE.sub("", content):
        return True
    without = {"analysis"}
    for value, _ in _objects(content.replace("\\", "")):
        try:
            other = _validated(value, type(verdict), context)
        except Unreadable:
            continue
        if other.model_dump(exclude=without) == verdict.model_dump(exclude=without):
            return True
    return False
