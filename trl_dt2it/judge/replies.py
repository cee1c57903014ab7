"""Verdicts, and replies read as such: they come from complete and valid replies alone; all else has a status."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from .endpoint import Endpoint, Failure, import_error, redacted
from .rubric import DEFAULT_RUBRIC, JudgeReply, JudgeRequest, Rubric, Status, fenced_texts
from .store import Spending


try:
    import json_repair
    from pydantic import BaseModel, BeforeValidator, ValidationError, ValidationInfo, field_validator
except ImportError as error:
    raise import_error(str(error.name)) from error

# Regular expressions of where thoughts begin and end, by the models that mark them so; and whether a chat template may
# have opened them, so that only their end is in the reply.
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
    (r"\A\s*analysis(?=[A-Z])", r"assistantfinal(?=\S)", False),  # gpt-oss, without its control tokens
)
_MARKER = re.compile("|".join(f"(?P<o{n}>{one[0]})|(?P<c{n}>{one[1]})" for n, one in enumerate(_THOUGHTS)), re.I)

# The frame that some models put around the answer that follows their thoughts.
_WRAPPER = re.compile(
    r"(?:<answer>|<response>|<\|START_RESPONSE\|>|<\|begin_of_solution\|>|<\|open\|>response<\|sep\|>)?(.*?)"
    r"(?:</answer>|</response>|<\|END_RESPONSE\|>|<\|end_of_solution\|>|<\|close\|>response<\|sep\|>)?\s*"
    r"(?:<\|(?:return|end|im_end)\|>)?",
    re.DOTALL | re.I,
)

# Values of `finish_reason` in lower case, of complete replies and of others. An unknown value counts as incomplete.
_WHOLE = frozenset("stop eos eos_token end_turn stop_sequence stop_token endoftext complete completed".split())
_AT_THE_LIMIT = frozenset(("length", "max_tokens", "max_output_tokens", "max_length"))
_OUT_OF_CONTEXT = frozenset(("model_length", "model_context_window_exceeded", "context_length_exceeded"))
_FILTERED = frozenset("content_filter refusal safety recitation blocklist prohibited_content spii language".split())
# The server gave up: another try may end otherwise.
_INTERRUPTED = frozenset(("abort", "aborted", "cancelled", "error", "insufficient_system_resource", "load"))
_UNSAID = frozenset(("", "none", "null"))

_DECLINED = "The model or a filter declined to reply."

_NUMBER = re.compile(r"\s*[+-]?\d{1,9}(\.\d{1,20})?\s*", re.ASCII)
_START = re.compile(r'\{(?=\s*["}])')
_PUNCTUATION = re.compile(r"[\s\[\]{},:;\"'\\\u201c\u201d\u2018\u2019\uff0c\uff1a]+")
_INVISIBLE = re.compile(r"[\s\\`\u200b-\u200f\u2060\ufeff]+")


def _rubric(info: ValidationInfo) -> Rubric:
    return (info.context or {}).get("rubric") or DEFAULT_RUBRIC


def _score(value: Any, info: ValidationInfo) -> float:
    """Read a number on the scale, or a string that spells one; booleans, NaN and all else are refused."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a score is {value!r:.40}, which is no number")
    rubric = _rubric(info)
    if not rubric.low <= value <= rubric.high:
        raise ValueError(f"the score {value!r:.40} is not in [{rubric.low}, {rubric.high}]")
    return float(value)


Score = Annotated[float, BeforeValidator(_score)]

# The analysis decides nothing, so that any value will do.
Analysis = Annotated[str, BeforeValidator(lambda value: value if isinstance(value, str) else json.dumps(value))]


class ListwiseVerdict(BaseModel):
    """
    A score per answer.

    Parameters:
        analysis (`str`, *optional*, defaults to `""`):
            The judge's reasons, written before the scores.
        scores (`list[float]`):
            Scores on the scale of the rubric, in the order in which the answers were shown.
    """

    analysis: Analysis = ""
    scores: list[Score]

    @field_validator("scores")
    @classmethod
    def _check(cls, scores: list[float], info: ValidationInfo) -> list[float]:
        expected = (info.context or {}).get("num_scores")
        if expected is not None and len(scores) != expected:
            raise ValueError(f"there are {len(scores)} scores for {expected} answers")
        return scores


class PointwiseVerdict(BaseModel):
    """
    A score per criterion.

    Parameters:
        analysis (`str`, *optional*, defaults to `""`):
            The judge's reasons, written before the scores.
        scores (`dict[str, float]`):
            Scores on the scale of the rubric, by the name of the criterion.
    """

    analysis: Analysis = ""
    scores: dict[str, Score]

    @field_validator("scores")
    @classmethod
    def _check(cls, scores: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        names = [criterion.name for criterion in _rubric(info).criteria]
        if set(scores) != set(names):
            raise ValueError(f"the scores are of {sorted(scores)!r:.200} instead of {sorted(names)}")
        return {name: scores[name] for name in names}


class PairwiseVerdict(BaseModel):
    """
    The better of two answers.

    Parameters:
        analysis (`str`, *optional*, defaults to `""`):
            The judge's reasons, written before the verdict.
        better (`"first"`, `"second"` or `"tie"`):
            The better answer, by its position.
    """

    analysis: Analysis = ""
    better: Literal["first", "second", "tie"]


def verdict_schema(schema: type[BaseModel], num_scores: int | None = None, rubric: Rubric | None = None) -> dict:
    """Build the JSON schema of a verdict for an endpoint."""
    rubric = rubric or DEFAULT_RUBRIC
    score = {"type": "number", "minimum": rubric.low, "maximum": rubric.high}
    if schema is ListwiseVerdict:
        size = {} if num_scores is None else {"minItems": num_scores, "maxItems": num_scores}
        verdict: dict[str, dict] = {"scores": {"type": "array", "items": score, **size}}
    elif schema is PointwiseVerdict:
        verdict = {"scores": _object({criterion.name: score for criterion in rubric.criteria})}
    elif schema is PairwiseVerdict:
        verdict = {"better": {"type": "string", "enum": ["first", "second", "tie"]}}
    else:
        return schema.model_json_schema()
    return _object({"analysis": {"type": "string"}, **verdict})


def _object(properties: dict[str, dict]) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


class Unreadable(ValueError):
    """A reply without a verdict. The message is one sentence."""


def read_answer(text: str) -> tuple[str, str | None]:
    """Drop thoughts, up to their last end, from a reply; return the answer, and the marker of thoughts without end."""
    markers = list(_markers(text)) if _MARKER.search(text) else []
    begin = index = 0
    while index < len(markers):
        kind, is_start, start, end = markers[index]
        if is_start:
            ends = [n for n in range(index, len(markers)) if markers[n][:2] == (kind, False)]
            if not ends:
                return "", text[start:end].strip()
            index = ends[-1]
            begin = markers[index][3]
        elif _THOUGHTS[kind][2]:
            begin = end
        index += 1
    if begin == 0:
        return text, None
    answer = _WRAPPER.fullmatch(text[begin:].strip())
    assert answer is not None  # all parts of the pattern are optional
    return answer[1].strip(), None


def _markers(text: str) -> Iterator[tuple[int, bool, int, int]]:
    """Find markers of thoughts, unless quoted in a JSON object or between backticks: kind, is start, start, end."""
    quoted = [where for _, where in _objects(text)]
    for match in _MARKER.finditer(text):
        start, end = match.span()
        is_code = text[start - 1 : start] == "`" == text[end : end + 1]
        if not is_code and not any(where.start <= start < where.stop for where in quoted):
            name = str(match.lastgroup)
            yield int(name[1:]), name[0] == "o", start, end


def parse_verdict(
    text: str,
    schema: type[BaseModel],
    *,
    num_scores: int | None = None,
    rubric: Rubric | None = None,
    untrusted: Sequence[str] = (),
) -> BaseModel:
    """Read a verdict from a complete reply, unless it repeats an object of the `untrusted` texts."""
    context = {"num_scores": num_scores, "rubric": rubric}
    answer, open_marker = read_answer(text)
    if open_marker is not None:
        raise Unreadable(f"The thoughts that {open_marker} begins never end.")
    text = answer.strip()
    keys = [field.alias or name for name, field in schema.model_fields.items() if field.is_required()]
    # An object with none of the verdict's keys is a part of the prose, and so is one inside another.
    candidates = [one for one in _objects(text) if not keys or any(key in one[0] for key in keys)]
    if len(candidates) > 1:
        raise Unreadable(f"The reply holds {len(candidates)} objects that could be the verdict.")
    value, where = candidates[0] if candidates else _repaired(text, keys)
    source = text[where]
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
        where = ".".join(map(str, first["loc"]))
        raise Unreadable(f"The verdict is not valid: {where}: {first['msg'].removeprefix('Value error, ')}.") from None


def _objects(text: str) -> Iterator[tuple[dict, slice]]:
    """Find the JSON objects of a text that are not inside another, each with its position."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates)
    start = _START.search(text)
    while start:
        end = start.end()
        with suppress(ValueError, RecursionError):
            value, end = decoder.raw_decode(text, start.start())
            yield value, slice(start.start(), end)
        start = _START.search(text, end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _key_with_value(keys: Sequence[str]) -> str:
    """Match a key in quotes or with what looks like scores behind it, unlike "here are my scores:"."""
    names = "|".join(map(re.escape, keys))
    return rf"""["'\u201c\u2018](?:{names})["'\u201d\u2019]\s*[:\uff1a=]|\b(?:{names})\s*[:\uff1a=]\s*[\[\{{\d"']"""


def _repaired(text: str, keys: Sequence[str]) -> tuple[Any, slice]:
    """Repair the only object of a text that is nearly JSON."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or not keys:
        raise Unreadable("The reply holds no JSON object.")
    if end < start:
        # The cut may be inside a number, and 1 is not what 10 meant to be.
        raise Unreadable("The reply is cut inside its JSON object.")
    source = text[start : end + 1]
    names = "|".join(map(re.escape, keys))
    key = rf"""["'\u201c\u2018]?\b(?:{names})\b["'\u201d\u2019]?\s*[:\uff1a=]"""
    value = None
    if len(re.findall(key, source)) == len(keys):
        with suppress(ValueError, RecursionError):
            value = json_repair.loads(source)
    # A repair may add brackets, commas and quotes. If a word or a number is lost or made, it was a guess.
    if not isinstance(value, dict) or _words(json.dumps(value, ensure_ascii=False)) != _words(source):
        raise Unreadable("The reply holds no JSON object that can be read without guessing.")
    return value, slice(start, end + 1)


def _words(text: str) -> list[str]:
    return [word for word in _PUNCTUATION.split(text) if word]


def _brings(content: str, verdict: BaseModel, source: str, context: dict) -> bool:
    """Look for the verdict in a text, as an object in it or letter for letter."""
    if _INVISIBLE.sub("", source) in _INVISIBLE.sub("", content):
        return True
    without = {"analysis"}
    for value, _ in _objects(content.replace("\\", "")):
        with suppress(Unreadable):
            other = _validated(value, type(verdict), context)
            if other.model_dump(exclude=without) == verdict.model_dump(exclude=without):
                return True
    return False


def read_completion(
    completion: Any, request: JudgeRequest, endpoint: Endpoint, most: Spending, secret: str | None
) -> dict[str, Any] | Failure:
    """Make the part of a record that holds the reply, unless the call is to be tried again."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    finish_reason = redacted(str(getattr(choice, "finish_reason", None)), secret)[:40]
    if message is None or _plain(finish_reason) in _INTERRUPTED:
        problem = f"The endpoint broke off its reply (`finish_reason` {finish_reason!r})."
        if message is None:
            problem = "The reply of the endpoint is no chat completion."
        return Failure("retry", problem, most_tries=2)
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
    reply = _read(request, endpoint, record)
    return {**record, "status": reply.status, "error": reply.error}


def _parts(content: Any) -> list[tuple[str, str]]:
    """Split a message into parts of a kind and a text; most servers send one text, some, such as Mistral's, more."""
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
    """Lower a `finish_reason`, without the name of an enumeration or an explanation around it."""
    return str(finish_reason).strip().lower().rpartition(".")[2].partition(":")[0]


def _read(
    request: JudgeRequest, endpoint: Endpoint, record: Mapping[str, Any], tokens: tuple[int, int] = (0, 0)
) -> JudgeReply:
    """Read a record of a reply; nothing is parsed before the reply is known to be complete."""

    def reading(status: Status, text: str | None, error: str | None = None, verdict: Any = None) -> JudgeReply:
        return JudgeReply(status, verdict, text, *tokens, True, error)

    text, reason = record["text"] or "", _plain(record["finish_reason"])
    reply = f"The reply of {endpoint.model} at {endpoint.location}"
    advice = "raise `max_tokens`, or turn the model's thinking off (`extra_body`)"
    if record.get("status") == "refused":
        return reading("refused", record["text"], record["error"])
    if reason in _FILTERED:
        return reading("refused", text, _DECLINED)
    is_unsaid = reason in _UNSAID
    # No server says that it is cut, but it is as long as it may be.
    is_full = is_unsaid and not record.get("is_estimate") and record["output_tokens"] >= endpoint.max_tokens
    if reason in _AT_THE_LIMIT | _OUT_OF_CONTEXT or is_full:
        where = f"is cut at `max_tokens` ({endpoint.max_tokens})"
        if reason in _OUT_OF_CONTEXT:
            where, advice = "is cut where the model's context is full", "serve the model with a longer context"
        if not text.strip():
            is_thought = record.get("has_thoughts")
            where += ", in the model's thoughts, and holds no answer" if is_thought else " and is empty"
        return reading("cut", text, f"{reply} {where}; {advice}.")
    if not is_unsaid and reason not in _WHOLE:
        said = f"{reply} ended with `finish_reason` {record['finish_reason']!r}, so that it may not be whole."
        return reading("cut", text, said)
    answer, open_marker = read_answer(text)
    if open_marker is not None:
        said = f"{reply} holds thoughts ({open_marker}) that never end, and no answer; {advice}."
        return reading("cut" if is_unsaid else "malformed", text, said)
    if not answer.strip():
        holds = "holds thoughts and no answer" if text.strip() or record.get("has_thoughts") else "is empty"
        return reading("malformed", text, f"{reply} {holds}.")
    if request.schema is None:
        return reading("ok", answer)
    try:
        shown: dict[str, Any] = {"num_scores": request.num_scores, "rubric": request.rubric}
        verdict = parse_verdict(answer, request.schema, **shown, untrusted=fenced_texts(request.messages))
    except Unreadable as error:
        return reading("malformed", text, str(error))
    return reading("ok", answer, verdict=verdict)


def _sums(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    return sum(record["input_tokens"] for record in records), sum(record["output_tokens"] for record in records)


def conclude(
    request: JudgeRequest, endpoint: Endpoint, records: Sequence[Mapping[str, Any]], max_reasks: int
) -> JudgeReply | None:
    """Conclude the reply to a request from its records; `None` if it is to be asked, for the first time or again."""
    tokens = _sums(records)
    malformed = list[JudgeReply]()
    for record in records:
        reply = _read(request, endpoint, record, tokens)
        if record["status"] == "ok" and reply.status != "ok":
            continue  # an earlier version took it for a verdict
        if reply.status == "malformed" and not record["text"] and "has_thoughts" not in record:
            continue  # it may have come in parts, which an earlier version took for nothing
        if reply.status != "malformed":  # also a cut reply: with the same `max_tokens` it would be cut again
            return reply
        malformed.append(reply)
    # A reminder or a draw may bring another reply; the same words at temperature 0 do not.
    may_differ = request.schema is not None or endpoint.temperature > 0
    return malformed[-1] if len(malformed) > (max_reasks if may_differ else 0) else None


def unanswered(status: Status, records: Sequence[Mapping[str, Any]], error: str) -> JudgeReply:
    """Make the reply to a request that could not be asked to the end; the next run asks it again."""
    tokens = _sums(records)
    return JudgeReply(status, None, records[-1]["text"] if records else None, *tokens, False, error)
