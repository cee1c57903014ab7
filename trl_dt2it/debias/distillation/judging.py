"""Candidates judged listwise and pointwise, and the report of a distillation."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...judge.prompts import listwise_messages, pointwise_messages
from ...judge.replies import ListwiseVerdict, PointwiseVerdict
from ...judge.rubric import UNANSWERED, JudgeReply, JudgeRequest, Rubric
from ...utils import printable
from .candidates import Need, Pool, candidate_messages, generation_messages, needed_candidate
from .position_bias import PositionBias, balanced_orders


if TYPE_CHECKING:
    from ...judge.client import JudgeClient


@dataclass(frozen=True)
class AgreementCounts:
    """What became of the pairs of candidates."""

    agreed: int = 0  # Pairs in the same order by both
    opposed: int = 0  # Pairs in opposite orders
    close: int = 0  # Pairs of which one gap or both are too small to tell an order

    def __add__(self, other: AgreementCounts) -> AgreementCounts:
        return AgreementCounts(self.agreed + other.agreed, self.opposed + other.opposed, self.close + other.close)

    @property
    def pairs(self) -> int:
        """All pairs."""
        return self.agreed + self.opposed + self.close

    @property
    def rate(self) -> float | None:
        """Share of agreed pairs among those that both put in an order; `None` without any."""
        ordered = self.agreed + self.opposed
        return self.agreed / ordered if ordered else None


@dataclass
class DistillReport:
    """
    What came in, what went out, and why the rest did not.

    Parameters:
        prompts (`int`):
            Number of rows.
        pools (`int`):
            Number of pools: a row has one for each generator of its candidates, and a row that cannot be used is one.
        outcomes (`Counter[str]`):
            Pools by what became of them: `"paired"`; `"all_equal"`, `"no_order"` or `"opposed"` without an agreed
            pair; `"not_drawn"` of which no pair was drawn; `"no_candidates"`; a status of the judge with its stage,
            such as `"listwise: malformed"`; or a reason of [`~trl_dt2it.data.RowError`]. They add up to `pools`.
        examples (`dict[str, str]`):
            For each outcome without a pair, the first row that had it, and a message where there is one.
        candidates (`Counter[str]`):
            Candidates by what became of them: `"judged"`, `"equal"`, `"empty"`, `"unfinished"` (thoughts that never
            end), or a stage with a status, such as `"generation: cut"`.
        diversity (`Counter[str]`):
            Pools whose candidates were alike, by what was done: `"corrupted"`, `"rewritten"`, or why nothing.
        agreement ([`AgreementCounts`]):
            Pairs of candidates by whether both scores agree.
        pairs_by_bin (`dict[str, list[int]]`):
            For each generator, the number of pairs that were drawn in each bin.
        agreed_by_bin (`dict[str, list[int]]`):
            The same of all agreed pairs.
        bin_edges (`list[float]`):
            Where bins begin and end, in points.
        not_drawn (`Counter[str]`):
            Agreed pairs that were dropped: `"prompt_is_full"` or `"bin_is_full"`.
        position_bias (`list[PositionBias]`):
            What the places in a list are worth to the judge, for each length of lists.
        calls (`dict[str, Counter[str]]`):
            For each stage, the replies by status.
        usage (`dict[str, dict]`):
            Calls, tokens and cost of the judge and the generator.
    """

    prompts: int = 0
    pools: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    candidates: Counter[str] = field(default_factory=Counter)
    diversity: Counter[str] = field(default_factory=Counter)
    agreement: AgreementCounts = field(default_factory=AgreementCounts)
    pairs_by_bin: dict[str, list[int]] = field(default_factory=dict)
    agreed_by_bin: dict[str, list[int]] = field(default_factory=dict)
    bin_edges: list[float] = field(default_factory=list)
    not_drawn: Counter[str] = field(default_factory=Counter)
    position_bias: list[PositionBias] = field(default_factory=list)
    calls: dict[str, Counter[str]] = field(default_factory=dict)
    usage: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """Number of pairs that were drawn."""
        return sum(map(sum, self.pairs_by_bin.values()))

    @property
    def unanswered(self) -> int:
        """Number of questions that nobody has answered yet; the next run asks them."""
        return sum(statuses[status] for statuses in self.calls.values() for status in UNANSWERED)

    def count_call(self, stage: str, status: str) -> None:
        """Counts a reply."""
        self.calls.setdefault(stage, Counter())[status] += 1

    def settle(self, outcome: str, name: str, message: str = "") -> None:
        """Counts a pool's outcome, and remembers the first of those without a pair."""
        self.outcomes[outcome] += 1
        if outcome != "paired":
            self.examples.setdefault(outcome, f"{name}: {message}" if message else name)

    def to_json(self) -> str:
        """The report as JSON."""
        biases = [{**asdict(bias), "intervals": bias.intervals} for bias in self.position_bias]
        agreement = {**asdict(self.agreement), "rate": self.agreement.rate}
        # Not `asdict` of the whole, which makes counters of pairs out of counters.
        fields = {
            **vars(self),
            "pairs": self.pairs,
            "unanswered": self.unanswered,
            "agreement": agreement,
            "position_bias": biases,
        }
        return json.dumps(fields, indent=2, ensure_ascii=False)

    def show(self, console: Console | None = None) -> None:
        """
        Prints the report.

        Args:
            console (`rich.console.Console`, *optional*):
                Where to; standard output by default.
        """
        console = console or Console()
        console.print(self._of_pools())
        if self.candidates:
            console.print(_line("Candidates", self.candidates))
        if self.diversity:
            console.print(_line("Alike candidates", self.diversity))
        if self.agreement.pairs:
            rate = "none in an order by both" if self.agreement.rate is None else f"{self.agreement.rate:.1%} agree"
            counts = {name: getattr(self.agreement, name) for name in ("agreed", "opposed", "close")}
            console.print(_line(f"Pairs of candidates, {rate}", counts))
        if self.pairs_by_bin:
            console.print(self._of_bins())
        for bias in self.position_bias:
            console.print(_of_positions(bias))
        for stage, statuses in self.calls.items():
            if set(statuses) - {"ok"}:
                console.print(_line(f"Replies, {stage}", statuses))
        if self.usage:
            console.print(_of_usage(self.usage))
        if self.unanswered:
            console.print(f"{self.unanswered:,} questions have no answer yet; run it again to ask them.", markup=False)

    def _of_pools(self) -> Table:
        table = Table("what became of them", title=f"{self.pairs} pairs from {self.prompts} prompts")
        table.add_column("pools", justify="right")
        table.add_column("for example")
        for outcome, count in self.outcomes.most_common():
            table.add_row(Text(outcome), str(count), Text(printable(self.examples.get(outcome, ""), 200)))
        return table

    def _of_bins(self) -> Table:
        table = Table("strength, points", title="Pairs drawn, of pairs agreed on")
        for generator in self.pairs_by_bin:
            table.add_column(Text(printable(generator, 200)), justify="right")
        for place, (low, high) in enumerate(zip(self.bin_edges, self.bin_edges[1:], strict=False)):
            drawn = ((self.pairs_by_bin[one][place], self.agreed_by_bin[one][place]) for one in self.pairs_by_bin)
            table.add_row(f"{low:g} to {high:g}", *(f"{count} of {all_}" for count, all_ in drawn))
        return table


def _of_positions(bias: PositionBias) -> Table:
    title = (
        f"Position bias in lists of {bias.num_candidates} ({bias.num_lists} lists, {bias.noise_rate:.0%} of scores "
        f"noise, spread {bias.spread:.2g})"
    )
    table = Table("place", title=title)
    table.add_column("points", justify="right")
    table.add_column("95 % interval", justify="right")
    for place, effect in enumerate(bias.effects):
        interval = "" if bias.intervals is None else "{:+.3f} to {:+.3f}".format(*bias.intervals[place])
        table.add_row(str(place + 1), f"{effect:+.3f}", interval)
    return table


def _of_usage(usage: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("", title="Calls and cost, over the life of the store")
    for column in ("calls", "tokens in", "tokens out", "USD", "unsettled calls", "USD at most"):
        table.add_column(column, justify="right")
    for role, one in usage.items():
        counts = (f"{one[name]:,}" for name in ("calls", "input_tokens", "output_tokens"))
        table.add_row(
            role, *counts, f"{one['cost']:.4f}", f"{one['unsettled_calls']:,}", f"{one['unsettled_cost']:.4f}"
        )
    return table


def _line(title: str, counts: Mapping[str, int]) -> Text:
    return Text(f"{title}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


@dataclass(frozen=True)
class ListScores:
    """One list as the judge scored it."""

    order: list[int]  # The candidates from the first place to the last
    scores: list[float]  # Their scores, in this order


@dataclass
class JudgedPool:
    """A pool and what was said of it."""

    pool: Pool  # The pool
    # Lists that were scored, for each round of asking; the second has one more candidate
    rounds: list[list[ListScores]] = field(default_factory=list)
    criteria: dict[int, dict[str, float]] = field(default_factory=dict)  # Scores of each candidate by criterion
    generation_status: str | None = None  # Status of the last reply of the generator that was no candidate
    pointwise_status: str | None = None  # Status of the last reply about a single candidate that was not `"ok"`
    # Stage and status of a question about it that nobody has answered yet, so that nothing may be concluded from there
    # being no pair
    unanswered: str | None = None
    failure: str | None = None  # Why no pair can be made of it


@dataclass(frozen=True)
class JudgingSettings:
    """How pools are judged."""

    num_candidates: int  # As in `distill`
    num_shuffles: int  # As in `distill`
    rubric: Rubric  # As in `distill`
    min_spread: float  # As in `distill`
    language: str | None  # As in `distill`
    seed: int  # As in `distill`

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


def judge_pools(
    pools: Sequence[Pool],
    settings: JudgingSettings,
    *,
    judge: JudgeClient,
    generator: JudgeClient | None,
    report: DistillReport,
) -> list[JudgedPool]:
    """Generates, judges, and where all candidates are alike adds one and judges again."""
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
