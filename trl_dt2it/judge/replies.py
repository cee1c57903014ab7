"""From a chat completion to a record of the store, and from the records of a request to its reply.

A reply counts only if it is whole. Servers hand out what was cut like any other text, thoughts among it, and a draft
of a verdict in such thoughts reads like a verdict. So the reason why a reply ended is looked at first, then whether
its thoughts end, and only then what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .budget import Spending
from .endpoint import Endpoint
from .failures import Failure, redacted
from .fence import fenced_texts
from .parsing import Unreadable, parse_verdict, read_answer
from .requests import JudgeReply, JudgeRequest, Status


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
    status is not `"ok"`."""

    status: Status
    verdict: Any
    text: str | None
    error: str | None = None


def read_completion(
    completion: Any, request: JudgeRequest, endpoint: Endpoint, most: Spending, secret: str | None
) -> dict[str, Any] | Failure:
    """
    The part of a record that says what came back.

    Args:
        completion (`ChatCompletion`):
            What the `openai` client returned, which checks nothing.
        request ([`JudgeRequest`]):
            What was asked.
        endpoint ([`Endpoint`]):
            For the prices.
        most ([`Spending`]):
            What counts where the endpoint does not say how many tokens there were.
        secret (`str`, *optional*):
            The key, to be kept out of the record.

    Returns:
        `dict` or [`Failure`]
    """
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
    """
    The reply that the records of a request amount to.

    A reply that an earlier version took for a verdict and that is none does not count, so that it is asked for again.
    What is cut is not: with the same `max_tokens` it would be cut again.

    Args:
        request ([`JudgeRequest`]):
            What was asked.
        endpoint ([`Endpoint`]):
            Who was asked.
        records (`Sequence[Mapping]`):
            The store's records of replies to it, in order.
        max_reasks (`int`):
            How often a reply that cannot be read is asked for again, if another one may come back.

    Returns:
        [`JudgeReply`], *optional*: `None` as long as it has to be asked again. It counts as cached.
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
    """
    The reply to a request that could not be asked to the end, and will be asked again by the next run.

    Args:
        status (`str`):
            `"transport"` or `"over_budget"`.
        records (`Sequence[Mapping]`):
            The store's records of replies to it, none of which can be read.
        error (`str`):
            Why.

    Returns:
        [`JudgeReply`]
    """
    tokens = _sums(records)
    return JudgeReply(status, None, records[-1]["text"] if records else None, *tokens, False, error)
