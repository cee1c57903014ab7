"""The endpoint of a judge: its address and price, the failures of its calls, and logs without its key."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from ..utils import digest


# `item`: the endpoint does not take this question. `unsupported`: it does not take one of the parameters.
# `over_budget`: the call was not made.
Kind = Literal["retry", "item", "refused", "unsupported", "over_budget", "fatal"]

_LONGEST_RETRY_AFTER = 300.0  # seconds
_SHOWN = 300  # characters of an endpoint's message

_OWN_FIELDS = frozenset("model messages max_tokens max_completion_tokens temperature response_format stream n".split())
_FILTERS = ("content_filter", "content_policy_violation", "data_inspection_failed", "responsibleaipolicyviolation")
_NO_MONEY = (
    *("insufficient_quota", "billing_hard_limit_reached", "insufficient balance", "insufficient_balance"),
    *("insufficient credit", "insufficient_credit", "credit balance is too low", "billing_not_active", "arrearage"),
)

# Loggers that may show the key; a filter works on one logger alone. Version 3 of `openai` came with the second
# generation of HTTPX.
_HTTP = ("connection", "http11", "http2", "proxy", "socks")
_LOGGERS = (
    *("openai", "openai._base_client", "httpx", "httpx2"),
    *(f"httpcore{generation}.{part}" for generation in ("", "2") for part in _HTTP),
)


class JudgeError(RuntimeError):
    """The run cannot go on: the endpoint, its key or the store is at fault. The message is one sentence."""


def import_error(name: str) -> ImportError:
    """Make the error for a missing package of the extra `judge`, with the command that installs it."""
    return ImportError(f"The judge needs `{name}`; run `pip install 'trl-dt2it[judge]'`.", name=name)


@dataclass(frozen=True)
class Endpoint:
    """
    An OpenAI-compatible endpoint.

    Parameters:
        base_url, model (`str`):
            Address, such as `"http://localhost:8000/v1"`, and name of the model there.
        api_key_env (`str`, *optional*):
            Name of the environment variable that holds the key, read at every run. Without it, no key is sent.
        temperature, max_tokens (`float` and `int`, *optional*, default to `0.0` and `1024`):
            Sampling temperature, and most tokens of a reply, thoughts included.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds for one call as a whole.
        input_price, output_price (`float`, *optional*, defaults to `0.0`):
            USD per million tokens of prompts and of replies.
        extra_body (`Mapping`, *optional*):
            More fields of every request, such as `{"chat_template_kwargs": {"enable_thinking": False}}` or
            `{"reasoning_effort": "low"}`. No secrets: reports hold it.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    timeout: float = 120.0
    input_price: float = 0.0
    output_price: float = 0.0
    extra_body: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)  # not quoted if it is bad, because it may hold a secret
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("`base_url` must be an address such as 'http://localhost:8000/v1'.")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("`base_url` must not hold a user, a password or a query; pass the key by `api_key_env`.")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            raise ValueError("`api_key_env` must name an environment variable in capitals, not the key itself.")
        if self.max_tokens < 1 or not self.timeout > 0:
            raise ValueError(f"`max_tokens` and `timeout` must be above 0, got {self.max_tokens} and {self.timeout}.")
        if own := sorted(set(self.extra_body or ()) & _OWN_FIELDS):
            raise ValueError(f"`extra_body` holds `{own[0]}`, which the client sets itself; take it out.")
        for name in ("temperature", "input_price", "output_price"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be a number of at least 0, got {value}.")

    @property
    def location(self) -> str:
        """Host, port and path of the address."""
        parts = urlsplit(self.base_url)
        return parts.netloc.lower() + parts.path.rstrip("/")

    def api_key(self) -> str | None:
        """Read the key from the environment, `None` without `api_key_env`; raise [`JudgeError`] if there is none."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise JudgeError(f"The environment variable {self.api_key_env} is not set; put the endpoint's key in it.")
        if not re.fullmatch("[!-~]+", key):
            raise JudgeError(f"The environment variable {self.api_key_env} holds more than a key; set it again.")
        return key

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Compute the price of a call in USD."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


@dataclass(frozen=True)
class UsageReport:
    """
    Calls, tokens and cost over the life of a store.

    Parameters:
        calls, cached, by_status (`int`, `int` and `Mapping[str, int]`):
            Calls, including failures; and replies of this client: those from the store, and all by status.
        input_tokens, output_tokens (`int`):
            Tokens of prompts with a reply, and of replies.
        cost (`float`):
            USD for calls with a known price.
        unsettled_calls, unsettled_cost (`int` and `float`):
            Calls without an answer, because of a timeout, a lost connection or a killed run, and the most USD that the
            endpoint may have charged for them, which the budget counts.
    """

    calls: int
    cached: int
    by_status: Mapping[str, int]
    input_tokens: int
    output_tokens: int
    cost: float
    unsettled_calls: int
    unsettled_cost: float

    def as_dict(self) -> dict[str, Any]:
        """Convert the report to what JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        statuses = ", ".join(f"{count} {status}" for status, count in self.by_status.items()) or "none"
        text = (
            f"replies: {statuses} ({self.cached} from the store); calls: {self.calls}; "
            f"tokens: {self.input_tokens} in, {self.output_tokens} out; cost: ${self.cost:.4f}"
        )
        if self.unsettled_calls:
            text += f", and up to ${self.unsettled_cost:.4f} for {self.unsettled_calls} calls without a reply"
        return text


@dataclass(frozen=True)
class Failure:
    """A call without a usable reply."""

    kind: Kind
    message: str  # one sentence, without secrets
    retry_after: float | None = None  # seconds that the endpoint asks to wait
    parameter: str | None = None  # that the endpoint does not take
    # of a question with failures like this, where the endpoint may have done the work, and bill it, all the same
    most_tries: int | None = None


def redacted(text: str, secret: str | None) -> str:
    """Replace the key in a text, whatever an endpoint repeats."""
    return text.replace(secret, "[key]") if secret else text


def classify(error: Exception, sent: dict[str, Any], secret: str | None, key_name: str | None) -> Failure:
    """Classify an error of the `openai` client."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError

    if isinstance(error, (APITimeoutError, asyncio.TimeoutError)):
        return Failure("retry", "The endpoint did not reply in time.", most_tries=3)
    if isinstance(error, APIConnectionError):
        name = type(error.__cause__ or error).__name__
        problem = f"The connection to the endpoint failed ({name})."
        # Only what failed before anything was sent is free for certain.
        if name in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol"):
            return Failure("retry", problem)
        return Failure("retry", problem, most_tries=3)
    if not isinstance(error, APIStatusError):
        problem = f"The reply of the endpoint is no chat completion ({type(error).__name__})."
        return Failure("retry", problem, most_tries=2)
    status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
    words = str(body.get("message") or body.get("detail") or error.message).split()
    said = redacted(" ".join(words)[:_SHOWN], secret)
    told = f"{error.code or ''} {error.type or ''} {said}".lower()
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


def _unsupported(text: str, sent: dict[str, Any]) -> str | None:
    """Find the parameter of a call that a refusal names."""
    for name in ("max_tokens", "temperature"):
        if name in sent and name in text and ("unsupported" in text.lower() or "not support" in text.lower()):
            return name
    is_named = any(word in text.lower() for word in ("response_format", "json_schema", "structured output", "guided"))
    return "response_format" if is_named and "response_format" in sent else None


def _retry_after(error: Any) -> float | None:
    """Read the seconds of a `Retry-After` header, which holds seconds or a date."""
    value, milliseconds = map(error.response.headers.get, ("retry-after", "retry-after-ms"))
    try:
        seconds = float(value) if milliseconds is None else float(milliseconds) / 1000
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER) if math.isfinite(seconds) else None


def delay(tries: int, key: str, retry_after: float | None, first: float, longest: float) -> float:
    """Compute the seconds until the next try, doubled each time and spread by a hash so that calls get out of step."""
    fraction = int(digest(f"{key}:{tries}")[:8], 16) / 2**32
    if retry_after is not None:
        return retry_after + first * fraction
    return min(first * 2.0 ** min(tries - 1, 60), longest) * (0.5 + 0.5 * fraction)


@contextmanager
def redacted_logs(secret: str | None) -> Iterator[None]:
    """Take the key out of log records inside the context."""

    def redact(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if secret is not None and secret in message:
            record.msg, record.args = redacted(message, secret), ()
        return True

    with ExitStack() as stack:
        for logger in map(logging.getLogger, _LOGGERS if secret is not None else ()):
            logger.addFilter(redact)
            stack.callback(logger.removeFilter, redact)
        yield
