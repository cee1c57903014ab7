"""What `distill` did: what became of every prompt, candidate and pair, what the judge is like, and what it cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..judge.rubric import UNANSWERED
from ..utils import printable
from .position_bias import PositionBias


@dataclass(frozen=True)
class AgreementCounts:
    """
    What became of the pairs of candidates.

    Parameters:
        agreed (`int`, *optional*, defaults to `0`):
            Pairs in the same order by both.
        opposed (`int`, *optional*, defaults to `0`):
            Pairs in opposite orders.
        close (`int`, *optional*, defaults to `0`):
            Pairs of which one gap or both are too small to tell an order.
    """

    agreed: int = 0
    opposed: int = 0
    close: int = 0

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
