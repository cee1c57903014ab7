"""Who is asked about the pairs that the rules of a curation run drop, out of a configuration file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils import digest


if TYPE_CHECKING:  # what a run without judges does without, their extra among it
    from ..judge.client import JudgeClient
    from ..judge.endpoint import Endpoint
    from .judging import Swap


@dataclass(frozen=True)
class Judging:
    """
    Who is asked about dropped pairs, and what counts.

    Parameters:
        endpoints (`tuple[Endpoint, ...]`):
            The judges.
        client_kwargs (`tuple[dict, ...]`):
            Other arguments of the [`~trl_dt2it.judge.JudgeClient`] of each.
        votes (`str`, *optional*, defaults to `"unanimous"`):
            `"unanimous"` or `"majority"`, as in [`relabel_by_vote`].
        swap (`str`, *optional*, defaults to `"auto"`):
            As in [`judge_pairs`].
        language (`str`, *optional*):
            As in [`judge_pairs`].
        max_unanswered (`float`, *optional*, defaults to `0.0`):
            Share of the pairs that may stay without an answer, and as they were. With more, the run stops and asks
            about them when it is started again.
    """

    endpoints: tuple[Endpoint, ...]
    client_kwargs: tuple[dict[str, Any], ...]
    votes: str = "unanimous"
    swap: Swap = "auto"
    language: str | None = None
    max_unanswered: float = 0.0

    def settings(self) -> dict[str, Any]:
        """All that votes depend on. A larger budget is part of it, so that what was over it is asked."""
        names = ("model", "temperature", "max_tokens")
        judges = [{"location": one.location, **{name: getattr(one, name) for name in names}} for one in self.endpoints]
        for judge, one in zip(judges, self.endpoints, strict=True):
            if one.extra_body:
                judge["extra_body"] = dict(one.extra_body)
        budgets = [dataclasses.asdict(kwargs["budget"]) for kwargs in self.client_kwargs]
        own: dict[str, Any] = {name: getattr(self, name) for name in ("votes", "swap", "language")}
        return {"judges": judges, "budgets": budgets, **own}

    def clients(self, output_dir: Path) -> list[JudgeClient]:
        """The judges, each with a store of its own, which all rounds share."""
        from ..judge.client import JudgeClient

        clients = []
        for endpoint, kwargs in zip(self.endpoints, self.client_kwargs, strict=True):
            name = digest(f"{endpoint.location} {endpoint.model}")[:8]
            # `judge_pairs` shows how far it is.
            clients.append(
                JudgeClient(endpoint, output_dir / f"judge-{name}.jsonl", **{"show_progress": False, **kwargs})
            )
        return clients


def read_judging(given: Mapping[str, Any]) -> Judging:
    """
    The judges of a configuration.

    Args:
        given (`Mapping`):
            `votes`, `swap`, `language` and `max_unanswered`, and either one judge's keys beside them or `endpoints`, a
            list of judges. Keys of a judge are the arguments of [`~trl_dt2it.judge.Endpoint`], `max_concurrency`,
            `max_retries`, and for its budget `max_calls`, `budget_tokens` and `max_cost`.

    Returns:
        [`Judging`]

    Raises:
        `ValueError`: if a key is not known, or a value is out of range.
    """
    rest = dict(given)
    names = ("votes", "swap", "language", "max_unanswered")
    own: dict[str, Any] = {name: rest.pop(name) for name in names if name in rest}
    for name, choices in (("votes", ("unanimous", "majority")), ("swap", ("auto", "answers", "images"))):
        if own.get(name, choices[0]) not in choices:
            raise ValueError(f"`{name}` of the judge is {own[name]!r}; choose one of {', '.join(choices)}.")
    if not 0 <= own.get("max_unanswered", 0.0) <= 1:
        raise ValueError(f"`max_unanswered` of the judge is {own['max_unanswered']}; it is a share from 0 to 1.")
    judges = rest.pop("endpoints", None)
    if judges is not None and rest:
        raise ValueError(f"`judge` has `endpoints`, and the key `{next(iter(rest))}` beside it; put it into these.")
    from ..judge.store import read_endpoint

    endpoints, clients = zip(*(read_endpoint("judge", one) for one in judges or [rest]), strict=True)
    return Judging(endpoints, clients, **own)
