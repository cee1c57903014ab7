"""Where the judge is and how it is called. No secret is in here: the key is known by the name of its variable."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .failures import JudgeError


_OWN_FIELDS = frozenset(
    ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "response_format", "stream", "n")
)


@dataclass(frozen=True)
class Endpoint:
    """
    An OpenAI-compatible endpoint.

    Parameters:
        base_url (`str`):
            Its address, such as `"http://localhost:8000/v1"`.
        model (`str`):
            The model's name there.
        api_key_env (`str`, *optional*):
            The name of the environment variable that holds the key, read at every run. Without it, no key is sent.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Most tokens of a reply, thoughts included.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds for one call as a whole.
        input_price (`float`, *optional*, defaults to `0.0`):
            USD per million tokens of prompts.
        output_price (`float`, *optional*, defaults to `0.0`):
            USD per million tokens of replies.
        extra_body (`Mapping`, *optional*):
            More fields of every request, for what servers name in their own ways, such as
            `{"chat_template_kwargs": {"enable_thinking": False}}` or `{"reasoning_effort": "low"}`. No secrets: it is
            written into reports.
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
        parts = urlsplit(self.base_url)
        # No part of a bad address is quoted, because it may hold a secret.
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("`base_url` must be an address such as 'http://localhost:8000/v1'.")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("`base_url` must not hold a user, a password or a query; give the key by `api_key_env`.")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            raise ValueError(
                "`api_key_env` must be the name of an environment variable in capitals, not the key itself."
            )
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
        """Host, port and path, without the scheme."""
        parts = urlsplit(self.base_url)
        return parts.netloc.lower() + parts.path.rstrip("/")

    def api_key(self) -> str | None:
        """
        The key, from the environment.

        Raises:
            [`JudgeError`]: if the variable is not set, or holds what no HTTP header can.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise JudgeError(f"The environment variable {self.api_key_env} is not set; put the endpoint's key in it.")
        if not re.fullmatch("[!-~]+", key):
            raise JudgeError(f"The environment variable {self.api_key_env} holds more than a key; set it again.")
        return key

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Cost of a call in USD."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6
