"""What a store and a client have done, in figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class UsageReport:
    """
    Calls, tokens and cost.

    Parameters:
        calls (`int`):
            Calls over the whole life of the store, failed ones included.
        cached (`int`):
            Replies that this client took from the store.
        by_status (`Mapping[str, int]`):
            Replies that this client gave, by status.
        input_tokens (`int`):
            Tokens of prompts with a reply, over the life of the store.
        output_tokens (`int`):
            Tokens of replies, over the life of the store.
        cost (`float`):
            USD over the life of the store, for calls with a known price.
        unsettled_calls (`int`):
            Calls that were sent and never answered, because of a time limit, a cut connection or a killed run. The
            endpoint may have charged for them, so the budget counts them at their most.
        unsettled_cost (`float`):
            USD that they may have cost at most.
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
        """All of it, as JSON can hold it."""
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
