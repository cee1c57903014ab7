"""Replies read as verdicts: complete, valid, or a status."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .endpoint import Endpoint, Failure, import_error, redacted
from .prompts import fenced_texts
from .rubric import JudgeReply, JudgeRequest, Rubric, Status
from .store import Spending


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
    """Take a reply without the thoughts of the model.

    What stands before the last end of thoughts is left out. A marker inside of a JSON object or between backticks is
    quoted and marks nothing.
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
    """Reads a verdict."""
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


# What servers call the end of a whole reply, in lower case. Whatever is in none of these sets is no whole reply.
_WHOLE = frozenset(
    ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "endoftext", "complete", "completed")
)

_AT_THE_LIMIT = frozenset(("length", "max_tokens", "max_output_tokens", "max_length"))

_OUT_OF_CONTEXT = frozenset(("model_length", "model_context_window_exceeded", "context_length_exceeded"))

_FILTERED = frozenset(
    ("content_filter", "refusal", "safety", "recitation", "blocklist", "prohibited_content", "spii", "language")
)

# The server gave up on its own work: another try may end otherwise.
_INTERRUPTED = frozenset(("abort", "aborted", "cancelled", "error", "insufficient_system_resource", "load"))

_UNSAID = frozenset(("", "none", "null"))

_DECLINED = "The model or a filter declined to reply."


@dataclass(frozen=True)
class _Reading:
    """What a record of a reply says: its status, its verdict, its text (without thoughts if it is `"ok"`), and why the
    status is not `"ok"`.
    """

    status: Status
    verdict: Any
    text: str | None
    error: str | None = None


def read_completion(
    completion: Any, request: JudgeRequest, endpoint: Endpoint, most: Spending, secret: str | None
) -> dict[str, Any] | Failure:
    """The part of a record that says what came back."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None:
        problem = "The reply of the endpoint is no chat completion."
        return Failure("retry", problem, may_be_billed=True, most_tries=2)
    finish_reason = redacted(str(getattr(choice, "finish_reason", None)), secret)[:40]
    if _plain(finish_reason) in _INTERRUPTED:
        problem = f"The endpoint broke off its reply (`finish_reason` {finish_reason!r})."
        return Failure("retry", problem, may_be_billed=True, most_tries=2)
    parts = _parts(getattr(message, "content", None))
    refusal = getattr(message, "refusal", None) or "".join(text for kind, text in parts if kind == "refusal")
    details = getattr(getattr(completion, "usage", None), "completion_tokens_details", None)
    thoughts = [getattr(message, name, None) for name in ("reasoning_content", "reasoning")]
    thoughts += [getattr(details, "reasoning_tokens", None), *(kind == "thoughts" for kind, _ in parts)]
    record: dict[str, Any] = {
        "text": redacted("".join(text for kind, text in parts if kind == "text"), secret),
        "finish_reason": finish_reason,
        "has_thoughts": any(thoughts),
        **_tokens(completion, endpoint, most),
    }
    if refusal:
        said = redacted(refusal, secret) if isinstance(refusal, str) else record["text"]
        return {**record, "text": said, "status": "refused", "error": _DECLINED}
    reading = _read(request, endpoint, record)
    return {**record, "status": reading.status, "error": reading.error}


def _parts(content: Any) -> list[tuple[str, str]]:
    """What a message consists of, kind and text: one text, or what a server sends in parts, such as Mistral's."""
    parts = list[tuple[str, str]]()
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            parts.append(("text", part))
        elif isinstance(part, Mapping):
            kind = part.get("type", "text")
            kind = {"output_text": "text", "thinking": "thoughts", "reasoning": "thoughts"}.get(kind, str(kind))
            said = part.get("refusal" if kind == "refusal" else "text")
            parts.append((kind, said if isinstance(said, str) else ""))
    return parts


def _tokens(completion: Any, endpoint: Endpoint, most: Spending) -> dict[str, Any]:
    usage = getattr(completion, "usage", None)
    read: Any = getattr(usage, "prompt_tokens", None)
    written: Any = getattr(usage, "completion_tokens", None)
    is_known = type(read) is int and type(written) is int and min(read, written) >= 0
    if not is_known:
        read, written = most.tokens - endpoint.max_tokens, endpoint.max_tokens
    tokens = {"input_tokens": read, "output_tokens": written, "tokens": read + written}
    return {**tokens, "cost": endpoint.cost(read, written), "is_estimate": not is_known}


def _plain(finish_reason: Any) -> str:
    """A reason to finish in lower case, without the name of an enumeration or an explanation around it."""
    return str(finish_reason).strip().lower().rpartition(".")[2].partition(":")[0]


def _read(request: JudgeRequest, endpoint: Endpoint, record: Mapping[str, Any]) -> _Reading:
    """What a record says. Nothing is parsed before the reply is known to be whole."""
    text, reason = record["text"] or "", _plain(record["finish_reason"])
    reply = f"The reply of {endpoint.model} at {endpoint.location}"
    advice = "raise `max_tokens`, or turn the model's thinking off (`extra_body`)"
    if record.get("status") == "refused":
        return _Reading("refused", None, record["text"], record["error"])
    if reason in _FILTERED:
        return _Reading("refused", None, text, _DECLINED)
    is_unsaid = reason in _UNSAID
    # Nobody says that it is cut, but it is as long as it may be.
    is_full = is_unsaid and not record.get("is_estimate") and record["output_tokens"] >= endpoint.max_tokens
    if reason in _AT_THE_LIMIT | _OUT_OF_CONTEXT or is_full:
        where = f"is cut at `max_tokens` ({endpoint.max_tokens})"
        if reason in _OUT_OF_CONTEXT:
            where, advice = "is cut where the model's context is full", "serve the model with a longer context"
        if not text.strip():
            where += (
                ", in the model's thoughts, and holds no answer" if record.get("has_thoughts") else " and is empty"
            )
        return _Reading("cut", None, text, f"{reply} {where}; {advice}.")
    if not is_unsaid and reason not in _WHOLE:
        said = f"{reply} ended with `finish_reason` {record['finish_reason']!r}, so that it may not be whole."
        return _Reading("cut", None, text, said)
    answer, open_marker = read_answer(text)
    if open_marker is not None:
        said = f"{reply} holds thoughts ({open_marker}) that never end, and no answer; {advice}."
        return _Reading("cut" if is_unsaid else "malformed", None, text, said)
    if not answer.strip():
        holds = "holds thoughts and no answer" if text.strip() or record.get("has_thoughts") else "is empty"
        return _Reading("malformed", None, text, f"{reply} {holds}.")
    if request.schema is None:
        return _Reading("ok", None, answer)
    try:
        verdict = parse_verdict(
            answer,
            request.schema,
            num_scores=request.num_scores,
            rubric=request.rubric,
            untrusted=fenced_texts(request.messages),
        )
    except Unreadable as error:
        return _Reading("malformed", None, text, str(error))
    return _Reading("ok", verdict, answer)


def _sums(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    return sum(record["input_tokens"] for record in records), sum(record["output_tokens"] for record in records)


def conclude(
    request: JudgeRequest, endpoint: Endpoint, records: Sequence[Mapping[str, Any]], max_reasks: int
) -> JudgeReply | None:
    """The reply that the records of a request amount to.

    A reply that an earlier version took for a verdict and that is none does not count, so that it is asked for again.
    What is cut is not: with the same `max_tokens` it would be cut again.
    """
    tokens = _sums(records)
    malformed = list[_Reading]()
    for record in records:
        reading = _read(request, endpoint, record)
        if record["status"] == "ok" and reading.status != "ok":
            continue
        if reading.status == "malformed" and not record["text"] and "has_thoughts" not in record:
            continue  # It may have come in parts, which an earlier version took for nothing.
        if reading.status != "malformed":
            return JudgeReply(reading.status, reading.verdict, reading.text, *tokens, True, reading.error)
        malformed.append(reading)
    # A reminder, or a draw, may bring another reply. The same words at temperature 0 bring the same one.
    may_differ = request.schema is not None or endpoint.temperature > 0
    if malformed and len(malformed) > (max_reasks if may_differ else 0):
        last = malformed[-1]
        return JudgeReply("malformed", None, last.text, *tokens, True, last.error)
    return None


def unanswered(status: Status, records: Sequence[Mapping[str, Any]], error: str) -> JudgeReply:
    """The reply to a request that could not be asked to the end, and will be asked again by the next run."""
    tokens = _sums(records)
    return JudgeReply(status, None, records[-1]["text"] if records else None, *tokens, False, error)
