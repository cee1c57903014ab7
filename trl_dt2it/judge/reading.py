"""One endpoint and how it is asked, out of the mapping that a configuration file has for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .budget import Budget
from .endpoint import Endpoint


# `max_tokens` is the endpoint's limit of one reply.
_BUDGET = {"max_calls": "max_calls", "budget_tokens": "max_tokens", "max_cost": "max_cost"}
_OTHERS = ("max_concurrency", "max_retries")


def read_endpoint(role: str, given: Mapping[str, Any] | str) -> tuple[Endpoint, dict[str, Any]]:
    """
    An endpoint, and the other arguments of its client.

    Args:
        role (`str`):
            What the configuration calls it, such as `"judge"`, for messages.
        given (`Mapping` or `str`):
            The arguments of [`Endpoint`]; for its budget `max_calls`, `budget_tokens` and `max_cost`; and
            `max_concurrency` and `max_retries`. As a mapping, or as JSON.

    Returns:
        `tuple[Endpoint, dict]`: the endpoint, and keywords of [`JudgeClient`], `budget` among them.

    Raises:
        `ValueError`: if a key is not known, `base_url` or `model` is missing, or a value is out of range.
    """
    rest = dict(json.loads(given) if isinstance(given, str) else given)
    names = {one.name for one in dataclasses.fields(Endpoint)}
    if unknown := sorted(set(rest) - names - set(_BUDGET) - set(_OTHERS)):
        raise ValueError(f"`{role}` has the unknown key `{unknown[0]}`.")
    if missing := [name for name in ("base_url", "model") if name not in rest]:
        raise ValueError(f"`{role}` has no `{missing[0]}`.")
    limits = {field: rest.pop(name) for name, field in _BUDGET.items() if name in rest}
    others = {name: rest.pop(name) for name in _OTHERS if name in rest}
    return Endpoint(**rest), {"budget": Budget(**limits), **others}
