"""From pools to judged pools: candidates are generated, judged, and judged again with one more where all are alike.

Each step asks for many pools at once, so that the endpoint is kept busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..judge.rubric import UNANSWERED, JudgeRequest
from .candidates import Pool
from .distill_report import DistillReport
from .diversity import Need, candidate_messages, needed_candidate
from .judging import JudgedPool, JudgingSettings, ask, ask_judge, raw_scores
from .questions import generation_messages


if TYPE_CHECKING:
    from ..judge.client import JudgeClient


def judge_pools(
    pools: Sequence[Pool],
    settings: JudgingSettings,
    *,
    judge: JudgeClient,
    generator: JudgeClient | None,
    report: DistillReport,
) -> list[JudgedPool]:
    """
    Generates, judges, and where all candidates are alike adds one and judges again.

    Args:
        pools (`Sequence[Pool]`):
            The pools; those without candidates get some.
        settings ([`JudgingSettings`]):
            How.
        judge ([`~trl_dt2it.judge.JudgeClient`]):
            The judge.
        generator ([`~trl_dt2it.judge.JudgeClient`], *optional*):
            Writes candidates.
        report ([`DistillReport`]):
            Counts replies and candidates.

    Returns:
        `list[JudgedPool]`: one for each pool.
    """
    judged = [JudgedPool(pool) for pool in pools]
    empty = [one for one in judged if not one.pool.candidates and not one.pool.num_empty + one.pool.num_unfinished]
    if generator is not None and empty:
        _generate(empty, settings, generator, report)
    for one in judged:
        if not one.pool.candidates and one.failure is None:
            one.failure = "no_candidates"
    ask_judge([(one, 0) for one in judged if one.failure is None], settings, judge, report)
    alike = [(one, need) for one in judged if (need := _need(one, settings)) is not None]
    for one, _ in alike:
        if one.unanswered is not None:  # With all its scores, it may not be alike at all.
            report.diversity["unanswered"] += 1
    alike = [(one, need) for one, need in alike if one.unanswered is None]
    changed = _diversify(alike, settings, generator, report)
    ask_judge([(one, len(one.pool.candidates) - 1) for one in changed], settings, judge, report)
    return judged


def _generate(
    judged: Sequence[JudgedPool], settings: JudgingSettings, generator: JudgeClient, report: DistillReport
) -> None:
    requests = [
        JudgeRequest(generation_messages(one.pool.question), sample=sample)
        for one in judged
        for sample in range(settings.num_candidates)
    ]
    replies = iter(ask(generator, requests, ["generation"] * len(requests), report))
    for one in judged:
        for _ in range(settings.num_candidates):
            reply = next(replies)
            # An answer that was cut is worse for that, which says nothing about what it says.
            if reply.status == "ok":
                one.pool.add(reply.text or "", "generated")
                continue
            report.candidates[f"generation: {reply.status}"] += 1
            one.generation_status = reply.status
            if reply.status in UNANSWERED:
                one.unanswered = f"generation: {reply.status}"
        # Without the candidates that are still to come, the lists of this run would be paid for and not be used again.
        one.failure = one.unanswered
        if one.failure is None and one.generation_status is not None and not one.pool.candidates:
            one.failure = f"generation: {one.generation_status}"


def _need(one: JudgedPool, settings: JudgingSettings) -> Need | None:
    scores = {} if one.failure is not None else raw_scores(one, settings)
    if not scores:
        return None
    return needed_candidate(list(scores.values()), min_spread=settings.min_spread, middle=settings.middle)


def _diversify(
    alike: Sequence[tuple[JudgedPool, Need]],
    settings: JudgingSettings,
    generator: JudgeClient | None,
    report: DistillReport,
) -> list[JudgedPool]:
    """Asks for one more candidate of each pool, and returns the pools that got one."""
    asked, requests = [], []
    for one, need in alike:
        question = one.pool.question
        if need == "rewritten" and question.reference is None:
            report.diversity["no_reference"] += 1
        elif generator is None:
            report.diversity["no_generator"] += 1
        else:
            scores = raw_scores(one, settings)
            best = max(scores, key=lambda candidate: (scores[candidate], -candidate))
            messages = candidate_messages(
                need,
                question.text,
                question.image_blocks,
                one.pool.candidates[best].text,
                reference=question.reference,
                language=settings.language,
            )
            asked.append((one, need))
            requests.append(JudgeRequest(messages))
    changed = []
    replies = [] if generator is None else ask(generator, requests, ["diversity"] * len(requests), report)
    for (one, need), reply in zip(asked, replies, strict=True):
        if reply.status != "ok":
            report.diversity[f"failed: {reply.status}"] += 1
            if reply.status in UNANSWERED:
                one.unanswered = f"diversity: {reply.status}"
        elif one.pool.add(reply.text or "", need):
            report.diversity[need] += 1
            changed.append(one)
        else:
            report.diversity["unchanged"] += 1
    return changed
