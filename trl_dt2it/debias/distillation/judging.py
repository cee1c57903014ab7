"""Candidates generated, judged listwise and pointwise, and made different where they are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...judge.prompts import listwise_messages, pointwise_messages
from ...judge.replies import ListwiseVerdict, PointwiseVerdict
from ...judge.rubric import UNANSWERED, JudgeReply, JudgeRequest, Rubric
from ..reports import DistillReport
from .candidates import Need, Pool, candidate_messages, generation_messages, needed_candidate
from .position_bias import balanced_orders


if TYPE_CHECKING:
    from ...judge.client import JudgeClient


@dataclass(frozen=True)
class ListScores:
    """One list as the judge scored it."""

    order: list[int]  # the candidates from the first position to the last
    scores: list[float]  # their scores, in this order


@dataclass
class JudgedPool:
    """A pool and its verdicts."""

    pool: Pool
    # scored lists of each round of asking; the second round has one more candidate
    rounds: list[list[ListScores]] = field(default_factory=list)
    criteria: dict[int, dict[str, float]] = field(default_factory=dict)  # scores of each candidate by criterion
    generation_status: str | None = None  # of the last reply of the generator that was no candidate
    pointwise_status: str | None = None  # of the last reply about a single candidate that was not `"ok"`
    # stage and status of an open question about it, so that nothing may be concluded from the lack of a pair
    unanswered: str | None = None
    failure: str | None = None  # reason why no pair can be made of it


@dataclass(frozen=True)
class JudgingSettings:
    """Arguments of `distill` on judging."""

    num_candidates: int
    num_shuffles: int
    rubric: Rubric
    min_spread: float
    language: str | None
    seed: int


def judge_pools(
    pools: Sequence[Pool],
    settings: JudgingSettings,
    *,
    judge: JudgeClient,
    generator: JudgeClient | None,
    report: DistillReport,
) -> list[JudgedPool]:
    """Generate and judge candidates; where all are alike, add one and judge again."""
    judged_pools = [JudgedPool(pool) for pool in pools]
    empty = [
        judged
        for judged in judged_pools
        if not judged.pool.candidates and not judged.pool.num_empty + judged.pool.num_unfinished
    ]
    if generator is not None and empty:
        _generate(empty, settings, generator, report)
    for judged in judged_pools:
        if not judged.pool.candidates and judged.failure is None:
            judged.failure = "no_candidates"
    _ask_judge([(judged, 0) for judged in judged_pools if judged.failure is None], settings, judge, report)
    alike = []
    for judged in judged_pools:
        need = _need(judged, settings)
        if need is None:
            continue
        if judged.unanswered is None:
            alike.append((judged, need))
        else:  # with all its scores, it may not be alike at all
            report.diversity["unanswered"] += 1
    changed = _diversify(alike, settings, generator, report)
    _ask_judge([(judged, len(judged.pool.candidates) - 1) for judged in changed], settings, judge, report)
    return judged_pools


# A pool, the stage, its target (a sample, an order, a candidate or a need), and the request.
_Asked = tuple[JudgedPool, str, Any, JudgeRequest]


def _ask(
    client: JudgeClient, asked: Sequence[_Asked], report: DistillReport
) -> Iterator[tuple[JudgedPool, str, Any, JudgeReply]]:
    """Replies to requests, counted by stage and status. An endpoint that answers none of them ends the run."""
    replies = client.ask([request for *_, request in asked], stop_early=True) if asked else []
    for (judged, stage, target, _), reply in zip(asked, replies, strict=True):
        report.count_call(stage, reply.status)
        if reply.status in UNANSWERED:
            judged.unanswered = f"{stage}: {reply.status}"
        yield judged, stage, target, reply


def _generate(
    judged_pools: Sequence[JudgedPool], settings: JudgingSettings, generator: JudgeClient, report: DistillReport
) -> None:
    asked = [
        (judged, "generation", sample, JudgeRequest(generation_messages(judged.pool.question), sample=sample))
        for judged in judged_pools
        for sample in range(settings.num_candidates)
    ]
    for judged, stage, _, reply in _ask(generator, asked, report):
        if reply.status == "ok":
            judged.pool.add(reply.text or "", "generated")
        else:  # a cut answer is worse for that, whatever it says
            report.candidates[f"{stage}: {reply.status}"] += 1
            judged.generation_status = reply.status
    for judged in judged_pools:
        # Without the candidates that are still to come, the lists of this run would be paid for and not be used again.
        judged.failure = judged.unanswered
        if judged.failure is None and judged.generation_status is not None and not judged.pool.candidates:
            judged.failure = f"generation: {judged.generation_status}"


def _ask_judge(
    pools: Sequence[tuple[JudgedPool, int]], settings: JudgingSettings, judge: JudgeClient, report: DistillReport
) -> None:
    """Ask for listwise scores of all candidates, and for pointwise scores of those from an index on."""
    asked: list[_Asked] = []
    for judged, first in pools:
        pool, seed = judged.pool, f"{settings.seed} {judged.pool.key} {len(judged.rounds)}"
        count = len(pool.candidates)
        orders = balanced_orders(count, settings.num_shuffles, seed) if count > 1 else []
        judged.rounds.append([])
        asked += [(judged, "listwise", order, listwise_request(pool, order, settings)) for order in orders]
        asked += [
            (judged, "pointwise", index, pointwise_request(pool, index, settings)) for index in range(first, count)
        ]
    failed: dict[int, list[str]] = defaultdict(list)
    for judged, stage, target, reply in _ask(judge, asked, report):
        if isinstance(reply.verdict, ListwiseVerdict):
            judged.rounds[-1].append(ListScores(target, reply.verdict.scores))
        elif isinstance(reply.verdict, PointwiseVerdict):
            judged.criteria[target] = reply.verdict.scores
            report.candidates["judged"] += 1
        elif stage == "listwise":
            failed[id(judged)].append(reply.status)
        else:
            report.candidates[f"{stage}: {reply.status}"] += 1
            judged.pointwise_status = reply.status
    for judged, _ in pools:
        # With fewer lists than half, a single bad score would decide.
        if len(judged.rounds[-1]) < len(failed[id(judged)]):
            judged.rounds[-1] = []
            if not any(judged.rounds):
                judged.failure = f"listwise: {failed[id(judged)][-1]}"


def listwise_request(pool: Pool, order: Sequence[int], settings: JudgingSettings) -> JudgeRequest:
    """All candidates together, in an order."""
    question, texts = pool.question, [pool.candidates[index].text for index in order]
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
    """Prepend to the last message the images that every request about a prompt shares, encoded and in memory once."""
    *others, last = messages
    return [*others, {**last, "content": [*blocks, *last["content"]]}]


def _raw_scores(judged: JudgedPool, settings: JudgingSettings) -> dict[int, float]:
    """Mean of both kinds of scores of each fully scored candidate, position bias included."""
    totals = {candidate: settings.rubric.total(scores) for candidate, scores in judged.criteria.items()}
    if len(judged.pool.candidates) == 1:
        return totals
    lists = np.full((len(judged.pool.candidates), len(judged.rounds[-1])), np.nan)
    for index, scored in enumerate(judged.rounds[-1]):
        lists[scored.order, index] = scored.scores
    return {candidate: (total + float(lists[candidate].mean())) / 2 for candidate, total in totals.items()}


def _need(judged: JudgedPool, settings: JudgingSettings) -> Need | None:
    scores = {} if judged.failure is not None else _raw_scores(judged, settings)
    if not scores:
        return None
    middle = (settings.rubric.low + settings.rubric.high) / 2
    return needed_candidate(list(scores.values()), min_spread=settings.min_spread, middle=middle)


def _diversify(
    alike: Sequence[tuple[JudgedPool, Need]],
    settings: JudgingSettings,
    generator: JudgeClient | None,
    report: DistillReport,
) -> list[JudgedPool]:
    """Ask for one more candidate of each pool; return the pools that got one."""
    asked: list[_Asked] = []
    for judged, need in alike:
        if need == "rewritten" and judged.pool.question.reference is None:
            report.diversity["no_reference"] += 1
        elif generator is None:
            report.diversity["no_generator"] += 1
        else:
            scores = _raw_scores(judged, settings)
            best = judged.pool.candidates[max(scores, key=lambda index: (scores[index], -index))].text
            messages = candidate_messages(need, judged.pool.question, best, language=settings.language)
            asked.append((judged, "diversity", need, JudgeRequest(messages)))
    changed = []
    for judged, _, need, reply in _ask(generator, asked, report) if generator is not None else ():
        if reply.status != "ok":
            report.diversity[f"failed: {reply.status}"] += 1
        elif judged.pool.add(reply.text or "", need):
            report.diversity[need] += 1
            changed.append(judged)
        else:
            report.diversity["unchanged"] += 1
    return changed
