"""Asking the judge about pools: all candidates together in several orders, and each alone.

What is asked depends on the pool and the seed alone, so that a run after a kill asks the same and finds the replies in
the client's store.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..judge.prompts import listwise_messages, pointwise_messages
from ..judge.rubric import UNANSWERED, JudgeReply, JudgeRequest, ListwiseVerdict, PointwiseVerdict, Rubric
from .candidates import Pool
from .distill_report import DistillReport
from .position_bias import balanced_orders


if TYPE_CHECKING:
    from ..judge.client import JudgeClient


@dataclass(frozen=True)
class ListScores:
    """
    One list as the judge scored it.

    Parameters:
        order (`list[int]`):
            The candidates from the first place to the last.
        scores (`list[float]`):
            Their scores, in this order.
    """

    order: list[int]
    scores: list[float]


@dataclass
class JudgedPool:
    """
    A pool and what was said of it.

    Parameters:
        pool ([`Pool`]):
            The pool.
        rounds (`list[list[ListScores]]`, *optional*):
            Lists that were scored, for each round of asking; the second has one more candidate.
        criteria (`dict[int, dict[str, float]]`, *optional*):
            Scores of each candidate by criterion.
        generation_status (`str`, *optional*):
            Status of the last reply of the generator that was no candidate.
        pointwise_status (`str`, *optional*):
            Status of the last reply about a single candidate that was not `"ok"`.
        unanswered (`str`, *optional*):
            Stage and status of a question about it that nobody has answered yet, so that nothing may be concluded from
            there being no pair.
        failure (`str`, *optional*):
            Why no pair can be made of it.
    """

    pool: Pool
    rounds: list[list[ListScores]] = field(default_factory=list)
    criteria: dict[int, dict[str, float]] = field(default_factory=dict)
    generation_status: str | None = None
    pointwise_status: str | None = None
    unanswered: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class JudgingSettings:
    """
    How pools are judged.

    Parameters:
        num_candidates, num_shuffles, rubric, min_spread, language, seed:
            As in [`distill`].
    """

    num_candidates: int
    num_shuffles: int
    rubric: Rubric
    min_spread: float
    language: str | None
    seed: int

    @property
    def middle(self) -> float:
        """Middle of the scale."""
        return (self.rubric.low + self.rubric.high) / 2


def ask(
    client: JudgeClient, requests: Sequence[JudgeRequest], stages: Sequence[str], report: DistillReport
) -> list[JudgeReply]:
    """Replies to requests, counted by stage and status. An endpoint that answers none of them ends the run."""
    replies = client.ask(requests, stop_early=True) if requests else []
    for stage, reply in zip(stages, replies, strict=True):
        report.count_call(stage, reply.status)
    return replies


def ask_judge(
    asked: Sequence[tuple[JudgedPool, int]], settings: JudgingSettings, judge: JudgeClient, report: DistillReport
) -> None:
    """Listwise scores of all candidates, and pointwise scores of those from a number on."""
    requests, stages, takers = [], [], list[tuple[JudgedPool, Any]]()
    for one, first in asked:
        pool, number = one.pool, len(one.rounds)
        one.rounds.append([])
        count = len(pool.candidates)
        seed = f"{settings.seed} {pool.key} {number}"
        for order in balanced_orders(count, settings.num_shuffles, seed) if count > 1 else []:
            requests.append(listwise_request(pool, order, settings))
            stages.append("listwise")
            takers.append((one, order))
        for candidate in range(first, count):
            requests.append(pointwise_request(pool, candidate, settings))
            stages.append("pointwise")
            takers.append((one, candidate))
    failed: dict[int, list[str]] = defaultdict(list)
    for (one, what), reply in zip(takers, ask(judge, requests, stages, report), strict=True):
        if reply.status != "ok":
            if reply.status in UNANSWERED:
                one.unanswered = f"{'listwise' if isinstance(what, list) else 'pointwise'}: {reply.status}"
            if isinstance(what, list):
                failed[id(one)].append(reply.status)
            else:
                report.candidates[f"pointwise: {reply.status}"] += 1
                one.pointwise_status = reply.status
        elif isinstance(reply.verdict, ListwiseVerdict):
            one.rounds[-1].append(ListScores(what, reply.verdict.scores))
        elif isinstance(reply.verdict, PointwiseVerdict):
            one.criteria[what] = reply.verdict.scores
            report.candidates["judged"] += 1
    for one, _ in asked:
        # With fewer lists than half, a single bad score would decide.
        if len(one.rounds[-1]) < len(failed[id(one)]):
            one.rounds[-1] = []
            if not any(one.rounds):
                one.failure = f"listwise: {failed[id(one)][-1]}"


def listwise_request(pool: Pool, order: Sequence[int], settings: JudgingSettings) -> JudgeRequest:
    """All candidates together, in an order."""
    question, texts = pool.question, [pool.candidates[one].text for one in order]
    messages = listwise_messages(question.text, [], texts, rubric=settings.rubric, language=settings.language)
    messages = _with_images(messages, question.image_blocks)
    return JudgeRequest(messages, ListwiseVerdict, num_scores=len(texts), rubric=settings.rubric)


def pointwise_request(pool: Pool, candidate: int, settings: JudgingSettings) -> JudgeRequest:
    """One candidate alone, against the reference answer if there is one."""
    question = pool.question
    messages = pointwise_messages(
        question.text,
        [],
        pool.candidates[candidate].text,
        reference=question.reference,
        rubric=settings.rubric,
        language=settings.language,
    )
    return JudgeRequest(_with_images(messages, question.image_blocks), PointwiseVerdict, rubric=settings.rubric)


def _with_images(messages: list[dict], blocks: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Puts in front of the last message what every request about a prompt shares: encoded once, in memory once."""
    *others, last = messages
    return [*others, {**last, "content": [*blocks, *last["content"]]}]


def raw_scores(one: JudgedPool, settings: JudgingSettings) -> dict[int, float]:
    """For each candidate with all its scores the mean of both kinds, position bias included."""
    totals = {candidate: settings.rubric.total(scores) for candidate, scores in one.criteria.items()}
    if len(one.pool.candidates) == 1:
        return totals
    lists = np.full((len(one.pool.candidates), len(one.rounds[-1])), np.nan)
    for place, given in enumerate(one.rounds[-1]):
        lists[given.order, place] = given.scores
    return {candidate: (total + float(lists[candidate].mean())) / 2 for candidate, total in totals.items()}
