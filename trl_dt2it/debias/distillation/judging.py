"""Candidates read or generated, judged listwise and pointwise, and made different where they are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.images import ImageOptions
from ...data.rows import RowError, row_name
from ...judge.prompts import listwise_messages, pointwise_messages
from ...judge.replies import ListwiseVerdict, PointwiseVerdict
from ...judge.rubric import UNANSWERED, JudgeReply, JudgeRequest, Rubric
from ..reports import DistillReport
from .candidates import (
    ListScores,
    Pool,
    candidate_messages,
    generation_messages,
    needed_candidate,
    read_pools,
    read_question,
)
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


def listwise_request(pool: Pool, order: Sequence[int], settings: JudgingSettings) -> JudgeRequest:
    """All candidates together, in an order."""
    question, texts = pool.question, [pool.candidates[index].text for index in order]
    messages = listwise_messages(question.text, [], texts, rubric=settings.rubric, language=settings.language)
    messages = _with_images(messages, question.images)
    return JudgeRequest(messages, ListwiseVerdict, num_scores=len(texts), rubric=settings.rubric)


def pointwise_request(pool: Pool, candidate: int, settings: JudgingSettings) -> JudgeRequest:
    """One candidate alone, against the reference answer if there is one."""
    question, text, rubric = pool.question, pool.candidates[candidate].text, settings.rubric
    options: dict[str, Any] = {"reference": question.reference, "rubric": rubric, "language": settings.language}
    messages = _with_images(pointwise_messages(question.text, [], text, **options), question.images)
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


# A pool, the stage, its target (a sample, an order, a candidate or a need), and the request.
_Asked = tuple[Pool, str, Any, JudgeRequest]


@dataclass(frozen=True)
class Judging:
    """A run's judge and generator, asked by its settings and counted in its report."""

    settings: JudgingSettings
    judge: JudgeClient
    generator: JudgeClient | None
    report: DistillReport

    def read(self, row: Mapping[str, Any], index: int, source: str, options: ImageOptions) -> list[Pool]:
        """Read the pools of a row; what cannot be used is settled at once."""
        try:
            question = read_question(row, index, source=source, image_options=options)
            pools = read_pools(question, row.get("candidates"))
        except RowError as error:
            self.report.pools += 1
            self.report.settle(error.reason, row_name(row, index), str(error))
            return []
        if not pools and self.generator is not None:
            pools = [Pool(question, self.generator.endpoint.model)]
        self.report.pools += max(1, len(pools))
        if not pools:
            self.report.settle("no_candidates", question.name)
        return pools

    def judge_pools(self, pools: Sequence[Pool]) -> None:
        """Generate and judge candidates; where all are alike, add one and judge again."""
        empty = [pool for pool in pools if not (pool.candidates or pool.dropped.total())]
        if self.generator is not None:
            self._generate(empty)
        for pool in pools:
            if not pool.candidates and pool.failure is None:
                pool.failure = "no_candidates"
        self._ask_judge([(pool, 0) for pool in pools if pool.failure is None])
        changed = self._diversify([pool for pool in pools if pool.failure is None])
        self._ask_judge([(pool, len(pool.candidates) - 1) for pool in changed])

    def _ask(self, client: JudgeClient | None, asked: Sequence[_Asked]) -> Iterator[tuple[Pool, str, Any, JudgeReply]]:
        """Replies to requests, counted by stage and status. An endpoint that answers none of them ends the run."""
        replies = client.ask([request for *_, request in asked], stop_early=True) if client and asked else []
        for (pool, stage, target, _), reply in zip(asked, replies, strict=True):
            self.report.count_call(stage, reply.status)
            if reply.status in UNANSWERED:
                pool.unanswered = f"{stage}: {reply.status}"
            yield pool, stage, target, reply

    def _generate(self, pools: Sequence[Pool]) -> None:
        asked = [
            (pool, "generation", sample, JudgeRequest(generation_messages(pool.question), sample=sample))
            for pool in pools
            for sample in range(self.settings.num_candidates)
        ]
        for pool, stage, _, reply in self._ask(self.generator, asked):
            if reply.status == "ok":
                pool.add(reply.text or "", "generated")
            else:  # a cut answer is worse for that, whatever it says
                self.report.candidates[f"{stage}: {reply.status}"] += 1
                pool.generation_status = reply.status
        for pool in pools:
            # Without the candidates that are still to come, this run's lists would be paid for and not be used again.
            pool.failure = pool.unanswered
            if pool.failure is None and pool.generation_status is not None and not pool.candidates:
                pool.failure = f"generation: {pool.generation_status}"

    def _ask_judge(self, pools: Sequence[tuple[Pool, int]]) -> None:
        """Ask for listwise scores of all candidates, and for pointwise scores of those from an index on."""
        asked: list[_Asked] = []
        for pool, first in pools:
            count, seed = len(pool.candidates), f"{self.settings.seed} {pool.key} {len(pool.rounds)}"
            orders = balanced_orders(count, self.settings.num_shuffles, seed) if count > 1 else []
            pool.rounds.append([])
            asked += [(pool, "listwise", order, listwise_request(pool, order, self.settings)) for order in orders]
            alone = ((one, pointwise_request(pool, one, self.settings)) for one in range(first, count))
            asked += [(pool, "pointwise", one, request) for one, request in alone]
        failed: dict[int, list[str]] = defaultdict(list)
        for pool, stage, target, reply in self._ask(self.judge, asked):
            if isinstance(reply.verdict, ListwiseVerdict):
                pool.rounds[-1].append(ListScores(target, reply.verdict.scores))
            elif isinstance(reply.verdict, PointwiseVerdict):
                pool.criteria[target] = reply.verdict.scores
                self.report.candidates["judged"] += 1
            elif stage == "listwise":
                failed[id(pool)].append(reply.status)
            else:
                self.report.candidates[f"{stage}: {reply.status}"] += 1
                pool.pointwise_status = reply.status
        for pool, _ in pools:
            # With fewer lists than half, a single bad score would decide.
            if len(pool.rounds[-1]) < len(failed[id(pool)]):
                pool.rounds[-1] = []
                if not any(pool.rounds):
                    pool.failure = f"listwise: {failed[id(pool)][-1]}"

    def _diversify(self, pools: Sequence[Pool]) -> list[Pool]:
        """Ask for one more candidate of each pool whose candidates are alike; return the pools that got one."""
        asked: list[_Asked] = []
        middle = (self.settings.rubric.low + self.settings.rubric.high) / 2
        for pool in pools:
            scores = _raw_scores(pool, self.settings)
            need = needed_candidate(list(scores.values()), min_spread=self.settings.min_spread, middle=middle)
            if need is None:
                continue
            if pool.unanswered is not None:  # with all its scores, it may not be alike at all
                self.report.diversity["unanswered"] += 1
            elif need == "rewritten" and pool.question.reference is None:
                self.report.diversity["no_reference"] += 1
            elif self.generator is None:
                self.report.diversity["no_generator"] += 1
            else:
                best = pool.candidates[max(scores, key=lambda index: (scores[index], -index))].text
                messages = candidate_messages(need, pool.question, best, language=self.settings.language)
                asked.append((pool, "diversity", need, JudgeRequest(messages)))
        changed = []
        for pool, _, need, reply in self._ask(self.generator, asked):
            if reply.status != "ok":
                self.report.diversity[f"failed: {reply.status}"] += 1
            elif pool.add(reply.text or "", need):
                self.report.diversity[need] += 1
                changed.append(pool)
            else:
                self.report.diversity["unchanged"] += 1
        return changed
