"""Judges asked about pairs in both orders, and the judges of a run."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.columns import leave_images_encoded
from ..data.images import ImageOptions, with_image_root
from ..data.rows import SIDES, RowError, blocks, check_row, row_images, row_name
from ..data.t2i_templates import CHINESE, ENGLISH
from ..debias.distillation.candidates import read_question
from ..judge.prompts import both_orders
from ..judge.replies import PairwiseVerdict
from ..judge.rubric import DEFAULT_RUBRIC, UNANSWERED, JudgeReply, JudgeRequest, Rubric
from ..judge.store import Spending, most_spending
from ..utils import digest
from .rules import UNREADABLE


if TYPE_CHECKING:
    from ..judge.client import JudgeClient
    from ..judge.endpoint import Endpoint


Swap = Literal["auto", "answers", "images"]

# Status of a pair that nobody has answered yet, or that nobody can answer.
NO_ANSWER = (*UNANSWERED, "rejected", "not_asked")

_VERDICTS = [{template.first_is_better, template.second_is_better} for template in (*ENGLISH, *CHINESE)]


@dataclass
class PairVotes:
    """What J judges said of N pairs."""

    # (N, J, 2) int8: In one order and in the other: 1 if chosen is better, -1 if rejected is, 0 for a tie, and
    # `UNREADABLE` where there is no verdict
    votes: np.ndarray
    status: np.ndarray  # (N, J, 2): Status of each reply, or `"not_asked"` for a row that cannot be asked about
    problems: dict[int, str] = field(default_factory=dict)  # Rows that cannot be asked about, with the reason

    @property
    def unanswered(self) -> np.ndarray:
        """Pairs about which a judge was not asked or has not answered, `(N,)`; the next run asks about them again."""
        return np.asarray(np.isin(self.status.astype(str), UNANSWERED).any(axis=(1, 2)))

    @property
    def answered(self) -> np.ndarray:
        """Pairs about which every judge has answered in both orders, with a verdict or without, `(N,)`; about all
        others nothing may be concluded.
        """
        return ~np.asarray(np.isin(self.status.astype(str), NO_ANSWER).any(axis=(1, 2)))

    def counts(self) -> dict[str, int]:
        """Replies by status."""
        return dict(Counter(self.status.ravel().tolist()).most_common())


def judge_pairs(
    dataset: Dataset,
    judges: Sequence[JudgeClient],
    *,
    rubric: Rubric = DEFAULT_RUBRIC,
    swap: Swap = "auto",
    language: str | None = None,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
    pairs_at_once: int = 64,
    show_progress: bool = True,
) -> PairVotes:
    """Asks every judge about every pair, in both orders.

    What is asked depends on the row alone, so a run after a kill finds the replies in the clients' stores. A row that
    is flipped asks the same two questions.
    """
    rows, options = leave_images_encoded(dataset), with_image_root(image_options, image_root)
    found = PairVotes(
        np.full((len(rows), len(judges), 2), UNREADABLE, dtype=np.int8),
        np.full((len(rows), len(judges), 2), "not_asked", dtype=object),
    )
    for start in tqdm(range(0, len(rows), pairs_at_once), desc="judging", disable=None if show_progress else True):
        asked = list[tuple[int, int, int]]()  # place, order, and 1 if the first answer is then the chosen one
        requests = list[JudgeRequest]()
        for place in range(start, min(start + pairs_at_once, len(rows))):
            try:
                pair, sign = pair_requests(rows[place], place, rubric, swap, language, options)
            except RowError as error:
                found.problems[place] = f"{row_name(rows[place], place)}, {error.reason}: {error}"
                continue
            requests += pair
            asked += [(place, 0, sign), (place, 1, -sign)]
        for number, judge in enumerate(judges):
            for (place, order, sign), reply in zip(asked, judge.ask(requests, stop_early=True), strict=True):
                found.votes[place, number, order] = vote_of(reply, sign)
                found.status[place, number, order] = reply.status
    return found


def pair_requests(
    row: Mapping[str, Any], index: int, rubric: Rubric, swap: Swap, language: str | None, options: ImageOptions
) -> tuple[tuple[JudgeRequest, JudgeRequest], int]:
    """The two requests about a row, the same for a row that is flipped."""
    check_row(row)
    question, images = read_question(row, index, source="", image_options=options), row_images(row)
    chosen, rejected = (_answer(row[side]) for side in SIDES)
    if swap == "auto":
        # Their order in the image would stay, and with it whatever the judge makes of it, if answers changed places.
        swap = "images" if len(images) == 2 and {chosen, rejected} in _VERDICTS else "answers"
    elif swap == "images" and len(images) != 2:
        swap = "answers"
    # Answers that stay in their places have to be in the same ones before and after a flip.
    answers = sorted((chosen, rejected)) if swap == "images" else (chosen, rejected)
    wanted: dict[str, Any] = {"swap": swap, "rubric": rubric, "language": language, "image_options": options}
    return both_orders(question.text, images, *answers, **wanted), 1 if answers[0] == chosen else -1


def vote_of(reply: JudgeReply, sign: int) -> int:
    """What a reply says of a pair."""
    if not isinstance(reply.verdict, PairwiseVerdict):
        return UNREADABLE
    return sign * {"first": 1, "tie": 0, "second": -1}[reply.verdict.better]


def most_judging_cost(
    dataset: Dataset,
    endpoints: Sequence[Endpoint],
    *,
    rubric: Rubric = DEFAULT_RUBRIC,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
    sample: int = 32,
) -> Spending:
    """What asking about all pairs of a set takes at most, by the mean of a sample of them."""
    rows, options = leave_images_encoded(dataset), with_image_root(image_options, image_root)
    places = np.unique(np.linspace(0, len(rows) - 1, min(sample, len(rows)), dtype=int)).tolist()
    seen, total = 0, Spending()
    for place in places:
        try:
            requests, _ = pair_requests(rows[place], place, rubric, "auto", None, options)
        except RowError:
            continue
        seen += 1
        for endpoint in endpoints:
            total = sum((most_spending(endpoint, one.messages) for one in requests), total)
    factor = len(rows) / max(1, seen)
    return Spending(2 * len(rows) * len(endpoints), round(total.tokens * factor), total.cost * factor)


def _answer(side: Any) -> str:
    """The text of an answer; of several messages, the last is what was judged."""
    if isinstance(side, str):
        return side
    return "".join(block["text"] for block in blocks(side[-1]) if block["type"] == "text")


@dataclass(frozen=True)
class Judging:
    """Who is asked about dropped pairs, and what counts."""

    endpoints: tuple[Endpoint, ...]  # The judges
    client_kwargs: tuple[dict[str, Any], ...]  # Other arguments of the `JudgeClient` of each
    votes: str = "unanimous"  # `"unanimous"` or `"majority"`, as in `relabel_by_vote`
    swap: Swap = "auto"  # As in `judge_pairs`
    language: str | None = None  # As in `judge_pairs`
    # Share of the pairs that may stay without an answer, and as they were. With more, the run stops and asks about
    # them when it is started again
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
    """The judges of a configuration."""
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
