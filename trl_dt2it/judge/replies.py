"""From a chat completion to a record of the store, and from the records of a request to its reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .budget import Spending
from .endpoint import Endpoint
from .failures import Failure, redacted
from .fence import fenced_texts
from .parsing import Unreadable, parse_verdict
from .requests import JudgeReply, JudgeRequest, Status


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
        return Failure("retry", "The reply of the endpoint is no chat completion.", may_be_billed=True)
    finish_reason = getattr(choice, "finish_reason", None)
    content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    text = redacted(content, secret) if isinstance(content, str) else ""
    record: dict[str, Any] = {"text": text, "finish_reason": str(finish_reason)[:40], "status": "ok", "error": None}
    if refusal or finish_reason == "content_filter":
        text = redacted(refusal, secret) if isinstance(refusal, str) else text
        record |= {"text": text, "status": "refused", "error": "The model or a filter declined to reply."}
    else:
        _, error = _read(request, text, record["finish_reason"])
        record |= {"status": "malformed" if error else "ok", "error": error}
    return record | _tokens(completion, endpoint, most)


def _tokens(completion: Any, endpoint: Endpoint, most: Spending) -> dict[str, Any]:
    usage = getattr(completion, "usage", None)
    read: Any = getattr(usage, "prompt_tokens", None)
    written: Any = getattr(usage, "completion_tokens", None)
    is_known = type(read) is int and type(written) is int and min(read, written) >= 0
    if not is_known:
        read, written = most.tokens - endpoint.max_tokens, endpoint.max_tokens
    tokens = {"input_tokens": read, "output_tokens": written, "tokens": read + written}
    return {**tokens, "cost": endpoint.cost(read, written), "is_estimate": not is_known}


def _read(request: JudgeRequest, text: str, finish_reason: str) -> tuple[Any, str | None]:
    """The verdict of a reply, and why there is none."""
    if not text.strip():
        return None, "The reply is empty."
    if request.schema is None:
        return None, None
    try:
        verdict = parse_verdict(
            text,
            request.schema,
            num_scores=request.num_scores,
            rubric=request.rubric,
            untrusted=fenced_texts(request.messages),
        )
    except Unreadable as error:
        cut = " It is cut at `max_tokens`." if finish_reason == "length" else ""
        return None, f"{error}{cut}"
    return verdict, None


def _sums(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    return sum(record["input_tokens"] for record in records), sum(record["output_tokens"] for record in records)


def conclude(request: JudgeRequest, records: Sequence[Mapping[str, Any]], max_reasks: int) -> JudgeReply | None:
    """
    The reply that the records of a request amount to.

    Args:
        request ([`JudgeRequest`]):
            What was asked.
        records (`Sequence[Mapping]`):
            The store's records of replies to it, in order.
        max_reasks (`int`):
            How often a reply that cannot be read is asked for again.

    Returns:
        [`JudgeReply`], *optional*: `None` as long as it has to be asked again. It counts as cached.
    """
    tokens = _sums(records)
    error = None
    for record in records:
        text = record["text"]
        if record["status"] == "refused":
            return JudgeReply("refused", None, text, *tokens, True, record["error"])
        verdict, error = _read(request, text, record["finish_reason"])
        if error is None:
            is_cut = record["finish_reason"] == "length" and request.schema is None
            note = "The text is cut at `max_tokens`." if is_cut else None
            return JudgeReply("ok", verdict, text, *tokens, True, note)
    if len(records) > max_reasks:
        return JudgeReply("malformed", None, records[-1]["text"], *tokens, True, error)
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
