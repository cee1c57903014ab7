"""Candidates generated, judged listwise and pointwise, and made different where they are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...judge.prompts import listwise_messages, pointwise_messages
from ...judge.replies import ListwiseVerdict, PointwiseVerdict
from ...judge.rubric import UNANSWERED, JudgeReply, JudgeRequest, Rubric
from ..reports import DistillReport
from .candidates import ListScores, Pool, candidate_messages, generation_messages, needed_candidate
from .position_bias import balanced_orders


if TYPE_CHECKING:
    from ...judge.client import JudgeClient


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
) -> None:
    """Generate and judge candidates; where all are alike, add one and judge again."""
    empty = [pool for pool in pools if not (pool.candidates or pool.dropped.total())]
    if generator is not None and empty:
        _generate(empty, settings, generator, report)
    for pool in pools:
        if not pool.candidates and pool.failure is None:
            pool.failure = "no_candidates"
    _ask_judge([(pool, 0) for pool in pools if pool.failure is None], settings, judge, report)
    changed = _diversify([pool for pool in pools if pool.failure is None], settings, generator, report)
    _ask_judge([(pool, len(pool.candidates) - 1) for pool in changed], settings, judge, report)


# A pool, the stage, its target (a sample, an order, a candidate or a need), and the request.
_Asked = tuple[Pool, str, Any, JudgeRequest]


def _ask(
    client: JudgeClient, asked: Sequence[_Asked], report: DistillReport
) -> Iterator[tuple[Pool, str, Any, JudgeReply]]:
    """Replies to requests, counted by stage and status. An endpoint that answers none of them ends the run."""
    replies = client.ask([request for *_, request in asked], stop_early=True) if asked else []
    for (pool, stage, target, _), reply in zip(asked, replies, strict=True):
        report.count_call(stage, reply.status)
        if reply.status in UNANSWERED:
            pool.unanswered = f"{stage}: {reply.status}"
        yield pool, stage, target, reply


def _generate(pools: Sequence[Pool], settings: JudgingSettings, generator: JudgeClient, report: DistillReport) -> None:
    asked = [
        (pool, "generation", sample, JudgeRequest(generation_messages(pool.question), sample=sample))
        for pool in pools
        for sample in range(settings.num_candidates)
    ]
    for pool, stage, _, reply in _ask(generator, asked, report):
        if reply.status == "ok":
            pool.add(reply.text or "", "generated")
        else:  # a cut answer is worse for that, whatever it says
            report.candidates[f"{stage}: {reply.status}"] += 1
            pool.generation_status = reply.status
    for pool in pools:
        # Without the candidates that are still to come, the lists of this run would be paid for and not be used again.
        pool.failure = pool.unanswered
        if pool.failure is None and pool.generation_status is not None and not pool.candidates:
            pool.failure = f"generation: {pool.generation_status}"


def _ask_judge(
    pools: Sequence[tuple[Pool, int]], settings: JudgingSettings, judge: JudgeClient, report: DistillReport
) -> None:
    """Ask for listwise scores of all candidates, and for pointwise scores of those from an index on."""
    asked: list[_Asked] = []
    for pool, first in pools:
        count, seed = len(pool.candidates), f"{settings.seed} {pool.key} {len(pool.rounds)}"
        orders = balanced_orders(count, settings.num_shuffles, seed) if count > 1 else []
        pool.rounds.append([])
        asked += [(pool, "listwise", order, listwise_request(pool, order, settings)) for order in orders]
        asked += [(pool, "pointwise", one, pointwise_request(pool, one, settings)) for one in range(first, count)]
    failed: dict[int, list[str]] = defaultdict(list)
    for pool, stage, target, reply in _ask(judge, asked, report):
        if isinstance(reply.verdict, ListwiseVerdict):
            pool.rounds[-1].append(ListScores(target, reply.verdict.scores))
        elif isinstance(reply.verdict, PointwiseVerdict):
            pool.criteria[target] = reply.verdict.scores
            report.candidates["judged"] += 1
        elif stage == "listwise":
            failed[id(pool)].append(reply.status)
        else:
            report.candidates[f"{stage}: {reply.status}"] += 1
            pool.pointwise_status = reply.status
    for pool, _ in pools:
        # With fewer lists than half, a single bad score would decide.
        if len(pool.rounds[-1]) < len(failed[id(pool)]):
            pool.rounds[-1] = []
            if not any(pool.rounds):
                pool.failure = f"listwise: {failed[id(pool)][-1]}"


def listwise_request(pool: Pool, order: Sequence[int], settings: JudgingSettings) -> JudgeRequest:
    """All candidates together, in an order."""
    question, texts = pool.question, [pool.candidates[index].text for index in order]
    messages = listwise_messages(question.text, [], texts, rubric=settings.rubric, language=settings.language)
    messages = _with_images(messages, question.image_blocks)
    return JudgeRequest(messages, ListwiseVerdict, num_scores=len(texts), rubric=settings.rubric)


def pointwise_request(pool: Pool, candidate: int, settings: JudgingSettings) -> JudgeRequest:
    """One candidate alone, against the reference answer if there is one."""
    question, text, rubric = pool.question, pool.candidates[candidate].text, settings.rubric
    options: dict[str, Any] = {"reference": question.reference, "rubric": rubric, "language": settings.language}
    messages = _with_images(pointwise_messages(question.text, [], text, **options), question.image_blocks)
    return JudgeRequest(messages, PointwiseVerdict, rubric=rubric)


def _with_images(messages: list[dict], blocks: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Prepend to the last message the images that every request about a prompt shares, encoded and in memory once."""
    *others, last = messages
    return [*others, {**last, "content": [*blocks, *last["content"]]}]


def _raw_scores(pool: Pool, settings: JudgingSettings) -> dict[int, float]:
    """Mean of both kinds of scores of each fully scored candidate, position bias included."""
    totals = {candidate: settings.rubric.total(scores) for candidate, scores in pool.criteria.items()}
    if len(pool.candidates) == 1:
        return totals
    lists = np.full((len(pool.candidates), len(pool.rounds[-1])), np.nan)
    for index, scored in enumerate(pool.rounds[-1]):
        lists[scored.order, index] = scored.scores
    return {candidate: (total + float(lists[candidate].mean())) / 2 for candidate, total in totals.items()}


def _diversify(
    pools: Sequence[Pool], settings: JudgingSettings, generator: JudgeClient | None, report: DistillReport
) -> list[Pool]:
    """Ask for one more candidate of each pool whose candidates are alike; return the pools that got one."""
    asked: list[_Asked] = []
    middle = (settings.rubric.low + settings.rubric.high) / 2
    for pool in pools:
        scores = _raw_scores(pool, settings)
        need = needed_candidate(list(scores.values()), min_spread=settings.min_spread, middle=middle)
        if need is None:
            continue
        if pool.unanswered is not None:  # with all its scores, it may not be alike at all
            report.diversity["unanswered"] += 1
        elif need == "rewritten" and pool.question.reference is None:
            report.diversity["no_reference"] += 1
        elif generator is None:
            report.diversity["no_generator"] += 1
        else:
            best = pool.candidates[max(scores, key=lambda index: (scores[index], -index))].text
            messages = candidate_messages(need, pool.question, best, language=settings.language)
            asked.append((pool, "diversity", need, JudgeRequest(messages)))
    changed = []
    for pool, _, need, reply in _ask(generator, asked, report) if generator is not None else ():
        if reply.status != "ok":
            report.diversity[f"failed: {reply.status}"] += 1
        elif pool.add(reply.text or "", need):
            report.diversity[need] += 1
            changed.append(pool)
        else:
            report.diversity["unchanged"] += 1
    return changed
