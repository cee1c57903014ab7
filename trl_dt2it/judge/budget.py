"""A limit on what a store may cost, kept by setting money aside before a call is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from .endpoint import Endpoint
from .requests import data_uri_bytes


@dataclass(frozen=True)
class Budget:
    """
    Limits over the whole life of a store; a resumed run counts what was spent before.

    Parameters:
        max_calls (`int`, *optional*):
            Most calls, failed ones and repetitions included.
        max_tokens (`int`, *optional*):
            Most tokens, of prompts and replies together.
        max_cost (`float`, *optional*):
            Most USD, by the prices of the endpoint.
    """

    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_tokens", "max_cost"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")


@dataclass(frozen=True)
class Spending:
    """
    What calls took, or may take.

    Parameters:
        calls (`int`):
            Number of calls.
        tokens (`int`):
            Tokens of prompts and replies.
        cost (`float`):
            USD.
    """

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Spending) -> Spending:
        return Spending(self.calls + other.calls, self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: Spending) -> Spending:
        return Spending(self.calls - other.calls, self.tokens - other.tokens, self.cost - other.cost)

    def fits(self, budget: Budget) -> bool:
        """Whether it is within a budget."""
        limits = (budget.max_calls, budget.max_tokens, budget.max_cost)
        spent = (self.calls, self.tokens, self.cost * (1 - 1e-12))  # sums of floats are not exact
        return all(limit is None or value <= limit for limit, value in zip(limits, spent, strict=True))


def prompt_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """
    Most tokens that messages can have.

    A token of text is at least one byte. What an image becomes depends on the model: up to one token for 16 x 16
    pixels, and a fixed part for those that cut every image into tiles.

    Args:
        messages (`Sequence[Mapping]`):
            Chat messages.

    Returns:
        `int`
    """
    tokens = 64  # the chat template's own
    for message in messages:
        content = message["content"]
        tokens += 32
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                tokens += len(part["text"].encode("utf-8", "surrogatepass"))
            else:
                tokens += _image_tokens(part)
    return tokens


def _image_tokens(part: Mapping[str, Any]) -> int:
    content = data_uri_bytes(part["image_url"]["url"]) if part["type"] == "image_url" else None
    if content is None:
        return 16384  # nothing is known of it
    try:
        with Image.open(BytesIO(content)) as image:
            width, height = image.size
    except Exception:  # on hostile bytes, Pillow's plugins raise nearly anything
        return 16384
    return 1600 + math.ceil(width / 16) * math.ceil(height / 16)


def most_spending(endpoint: Endpoint, messages: Sequence[Mapping[str, Any]]) -> Spending:
    """
    What one call may take at most.

    Args:
        endpoint ([`Endpoint`]):
            Its limit on replies, and its prices.
        messages (`Sequence[Mapping]`):
            Chat messages.

    Returns:
        [`Spending`]
    """
    tokens = prompt_tokens(messages)
    return Spending(1, tokens + endpoint.max_tokens, endpoint.cost(tokens, endpoint.max_tokens))
