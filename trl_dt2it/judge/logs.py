"""Keeps the key out of the loggers of `openai` and of the HTTP client below it, which at the level DEBUG write down
what a server sends back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .failures import redacted


# A filter works on one logger alone, so each is named. With version 3 of `openai` came the second generation of HTTPX.
_HTTP = ("connection", "http11", "http2", "proxy", "socks")
_NAMES = (
    "openai",
    "openai._base_client",
    "httpx",
    "httpx2",
    *(f"httpcore{generation}.{part}" for generation in ("", "2") for part in _HTTP),
)


class _Redact(logging.Filter):
    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if self._secret in message:
            record.msg, record.args = redacted(message, self._secret), ()
        return True


@contextmanager
def redacted_logs(secret: str | None) -> Iterator[None]:
    """
    Takes the key out of log records for as long as it lasts.

    Args:
        secret (`str`, *optional*):
            The key.
    """
    if secret is None:
        yield
        return
    redact = _Redact(secret)
    loggers = [logging.getLogger(name) for name in _NAMES]
    for logger in loggers:
        logger.addFilter(redact)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(redact)
