"""What can go wrong with a call, and what is to be done: try again, give up the question, or stop the run."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from ..utils import digest


# `item`: the endpoint does not take this question. `unsupported`: the endpoint does not take one of the parameters.
# `over_budget`: the call was not made.
Kind = Literal["retry", "item", "refused", "unsupported", "over_budget", "fatal"]

LONGEST_RETRY_AFTER = 300.0  # seconds
_SHOWN = 300  # characters of what an endpoint says
_FILTERS = ("content_filter", "content_policy_violation", "data_inspection_failed", "responsibleaipolicyviolation")
_NO_MONEY = (
    *("insufficient_quota", "billing_hard_limit_reached", "insufficient balance", "insufficient_balance"),
    *("insufficient credit", "insufficient_credit", "credit balance is too low", "billing_not_active", "arrearage"),
)


class JudgeError(RuntimeError):
    """The run cannot go on: the endpoint, its key or the store is at fault. The message is one sentence."""


def import_error(name: str) -> ImportError:
    """The error for a missing package of the extra `judge`, with the command that installs it."""
    return ImportError(f"The judge needs `{name}`; run `pip install 'trl-dt2it[judge]'`.", name=name)


@dataclass(frozen=True)
class Failure:
    """
    A call without a usable reply.

    Parameters:
        kind (`str`):
            What is to be done.
        message (`str`):
            What happened, in one sentence, without secrets.
        retry_after (`float`, *optional*):
            Seconds that the endpoint asks to wait.
        may_be_billed (`bool`, *optional*, defaults to `False`):
            Whether the endpoint may have done the work all the same.
        parameter (`str`, *optional*):
            The parameter that the endpoint does not take.
        most_tries (`int`, *optional*):
            Most calls for one question that may fail like this, where each may have to be paid.
    """

    kind: Kind
    message: str
    retry_after: float | None = None
    may_be_billed: bool = False
    parameter: str | None = None
    most_tries: int | None = None


def redacted(text: str, secret: str | None) -> str:
    """A text without the key, whatever an endpoint repeats."""
    return text.replace(secret, "[key]") if secret else text


def classify(error: Exception, sent: dict[str, Any], secret: str | None, key_name: str | None) -> Failure:
    """
    Says what an error of the `openai` client means.

    Args:
        error (`Exception`):
            The error.
        sent (`dict`):
            The parameters of the call.
        secret (`str`, *optional*):
            The key, to be kept out of the message.
        key_name (`str`, *optional*):
            The environment variable of the key.

    Returns:
        [`Failure`]
    """
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, (APITimeoutError, asyncio.TimeoutError)):
        return Failure("retry", "The endpoint did not reply in time.", may_be_billed=True, most_tries=3)
    if isinstance(error, APIConnectionError):
        cause = error.__cause__
        # Only what failed before anything was sent is free for certain.
        unsent = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol")
        name = type(cause or error).__name__
        problem = f"The connection to the endpoint failed ({name})."
        return Failure("retry", problem, may_be_billed=not unsent, most_tries=None if unsent else 3)
    if not isinstance(error, APIStatusError):
        name = type(error).__name__
        problem = f"The reply of the endpoint is no chat completion ({name})."
        return Failure("retry", problem, may_be_billed=True, most_tries=2)
    status = error.status_code
    said = redacted(_said(error), secret)
    code = f"{error.code or ''} {error.type or ''}".lower()
    told = f"{code} {said}".lower()
    if status == 401:
        advice = f"check the environment variable {key_name}" if key_name else "set `api_key_env`"
        return Failure("fatal", f"The endpoint refuses the key (status 401); {advice}.")
    if status == 402 or (status < 500 and any(word in told for word in _NO_MONEY)):
        return Failure("fatal", f"The account at the endpoint is out of money or quota (status {status}): {said}")
    if status in (408, 409, 425, 429) or status >= 500:
        return Failure("retry", f"The endpoint answered with status {status}: {said}", _retry_after(error))
    if status in (400, 403) and any(word in told for word in _FILTERS):
        return Failure("refused", f"A filter of the endpoint refused the question: {said}")
    if status in (400, 404, 422):
        parameter = _unsupported(f"{error.param or ''} {said}", sent)
        if parameter is not None:
            return Failure("unsupported", f"The endpoint does not take `{parameter}`: {said}", parameter=parameter)
    if status in (400, 413, 415, 422):
        return Failure("item", f"The endpoint cannot take the request (status {status}): {said}")
    advice = "; check `base_url` and `model`" if status in (404, 405) else ""
    return Failure("fatal", f"The endpoint refuses all requests (status {status}{advice}): {said}")


def _said(error: Any) -> str:
    body = error.body
    text = body.get("message") if isinstance(body, dict) else None
    text = text or (body.get("detail") if isinstance(body, dict) else None) or error.message
    return " ".join(str(text).split())[:_SHOWN]


def _unsupported(text: str, sent: dict[str, Any]) -> str | None:
    """The parameter of a call that a refusal names."""
    for name in ("max_tokens", "temperature"):
        if name in sent and name in text and ("unsupported" in text.lower() or "not support" in text.lower()):
            return name
    is_named = any(word in text.lower() for word in ("response_format", "json_schema", "structured output", "guided"))
    return "response_format" if is_named and "response_format" in sent else None


def _retry_after(error: Any) -> float | None:
    """Seconds of a `Retry-After` header, which holds seconds or a date."""
    headers = error.response.headers
    value = headers.get("retry-after")
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            seconds = float(milliseconds) / 1000
        elif value is None:
            return None
        else:
            seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else None


def delay(tries: int, key: str, retry_after: float | None, first: float, longest: float) -> float:
    """
    Seconds until the next try: twice as many each time, spread by a hash so that calls do not come back in step.

    Args:
        tries (`int`):
            Tries that failed, at least 1.
        key (`str`):
            The key of the request.
        retry_after (`float`, *optional*):
            What the endpoint asks for, at least.
        first (`float`):
            Seconds after the first failure, at most.
        longest (`float`):
            Most seconds, unless the endpoint asks for more.

    Returns:
        `float`
    """
    step = min(first * 2.0 ** min(tries - 1, 60), longest)
    fraction = int(digest(f"{key}:{tries}")[:8], 16) / 2**32
    if retry_after is not None:
        return retry_after + first * fraction
    return step * (0.5 + 0.5 * fraction)
