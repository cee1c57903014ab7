"""Reports on style, text, balance and distillation: figures, tables on screen, JSON and metrics to log."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..judge.rubric import UNANSWERED
from ..utils import printable, screen_table


# Pairs with less than this, in units of the mean weight, hardly count.
SMALL = 1e-3

_ACTIONS = {"leave": "and is left out of the balance", "drop": "and its pairs have weight 0"}

_BLUE, _GREY = "#2b6cb0", "#718096"


@dataclass(frozen=True)
class FeatureLeakage:
    """Leakage of a single feature."""

    auc: float  # chance that the chosen answer has more of it, ties counted half; 0.5 tells nothing
    difference: float  # mean of chosen minus rejected, in standard deviations of the feature among all answers
    # log odds per root mean square of the difference, in the probe that sees all features, fitted on all pairs
    coefficient: float


@dataclass(frozen=True)
class RewardStyle:
    """Dependence of a model's rewards on style beyond the label; intervals are of 95 %."""

    accuracy: float  # share of pairs whose chosen answer has the higher reward, ties counted half
    # share of the variance of reward margins that style explains in held-out pairs; about 0, or below, is none
    r_squared: float | None
    follows: float | None  # correlation of reward margins with the votes of style, from -1 to 1
    follows_interval: tuple[float, float] | None
    agree_share: float  # share of pairs in which style votes for the chosen answer
    agree_accuracy: float | None
    disagree_share: float  # share of pairs in which style votes for the rejected answer
    disagree_accuracy: float | None
    accuracy_gap: float | None  # the first accuracy less the second: 0 for a model that style does not sway
    accuracy_gap_interval: tuple[float, float] | None


@dataclass(frozen=True)
class StyleLeakage:
    """Leakage of style into the labels of some pairs, and into the rewards of a scored model."""

    num_pairs: int
    num_groups: int  # different `group_id`s among them
    auc: float | None = None  # from 0 to 1; 0.5 tells nothing; `None` where `note` says why
    # 95 % interval of the AUC that the probe of all pairs reaches on new pairs, groups as independent units
    interval: tuple[float, float] | None = None
    features: dict[str, FeatureLeakage] = field(default_factory=dict)
    reward: RewardStyle | None = None
    note: str | None = None

    def top_features(self, count: int = 8) -> list[str]:
        """The features that tell most, in falling order."""
        return sorted(self.features, key=lambda name: -abs(self.features[name].auc - 0.5))[:count]


@dataclass(frozen=True)
class StyleReport:
    """
    Result of [`audit_style`].

    Parameters:
        overall, sources ([`StyleLeakage`], and a `dict` of them):
            Leakage of all pairs, and of those of each source.
    """

    overall: StyleLeakage
    sources: dict[str, StyleLeakage]

    @property
    def _parts(self) -> dict[str, StyleLeakage]:
        return _parts_of(self)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def metrics(self) -> dict[str, float]:
        """
        The report as metrics, such as for `trainer.log(report.metrics())`.

        They are `style/leakage`, with several sources also `style/leakage/<source>`; `style/feature/<name>`, the
        chance that the chosen answer has more of a feature; of a scored model `style/reward_accuracy`,
        `style/reward_follows` and `style/reward_accuracy_gap`. Metrics without a value are dropped.
        """
        values: dict[str, float | None] = {"style/leakage": self.overall.auc}
        if len(self.sources) > 1:
            values |= {f"style/leakage/{name}": part.auc for name, part in self.sources.items()}
        values |= {f"style/feature/{name}": feature.auc for name, feature in self.overall.features.items()}
        if (reward := self.overall.reward) is not None:
            names = ("accuracy", "follows", "accuracy_gap")
            values |= {f"style/reward_{name}": getattr(reward, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def show(self, console: Console | None = None) -> None:
        """Print the report, on standard output by default."""
        console = console or Console()
        rows: list[tuple[str, ...]] = []
        for name, part in self._parts.items():
            top = ", ".join(f"{feature} {part.features[feature].auc:.2f}" for feature in part.top_features(4))
            counts = f"{part.num_pairs:,}", f"{part.num_groups:,}"
            rows.append((name[:60], *counts, _shown(part.auc), _shown(part.interval), part.note or top))
        title = "Style leakage: does style alone tell which answer was chosen? 0.5 is no"
        columns: tuple[str, ...] = ("", "pairs", "groups", "AUC", "95 % interval")
        console.print(screen_table(columns, rows, last="most telling features", title=title))
        if features := self.overall.features:
            most = [(name, features[name]) for name in self.overall.top_features(12)]
            rows = [(name, f"{f.auc:.3f}", f"{f.difference:+.3f}", f"{f.coefficient:+.3f}") for name, f in most]
            columns = ("feature", "AUC", "difference, sd", "coefficient")
            console.print(screen_table(columns, rows, title="Features, all pairs"))
        rows = []
        for name, part in self._parts.items():
            if (reward := part.reward) is not None:
                accuracies = reward.accuracy, reward.agree_accuracy, reward.disagree_accuracy, reward.accuracy_gap
                others = reward.accuracy_gap_interval, reward.follows, reward.r_squared
                rows.append((name[:60], *map(_shown, (*accuracies, *others))))
        if rows:
            columns = ("", "accuracy", "style agrees", "disagrees", "gap", "95 % interval", "follows", "R²")
            console.print(screen_table(columns, rows, title="Does the reward follow style beyond the label?"))

    def plot(self, path: str | os.PathLike) -> None:
        """Draw leakage by source, and the features that carry it, to a file such as `.png` or `.svg`."""
        measured = {name: (part.auc, part.interval) for name, part in self._parts.items()}
        features = {name: self.overall.features[name].auc for name in self.overall.top_features(12)}
        title = "Leakage (AUC of a probe that sees style alone)"
        _plot(path, title, measured, "Chance that the chosen answer has more of it", features)


def _parts_of(report: Any) -> dict[str, Any]:
    """All pairs and, if there are several, each source."""
    return {"all pairs": report.overall, **(report.sources if len(report.sources) > 1 else {})}


def _plot(
    path: str | os.PathLike,
    title: str,
    measured: Mapping[str, tuple[float | None, tuple[float, float] | None]],
    title_of_chances: str,
    chances: Mapping[str, float],
) -> None:
    """Draw values with their intervals, and chances as bars from 0.5, to a file."""
    # Without pyplot, which would choose a window system and keep figures alive.
    from matplotlib.figure import Figure

    parts = [(name, *one) for name, one in measured.items() if one[0] is not None and one[1] is not None]
    figure = Figure(figsize=(11, 1.6 + 0.3 * max(len(parts), len(chances), 3)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (_, value, interval) in enumerate(parts):
        left.plot(interval, [index, index], color=_BLUE, linewidth=2)
        left.plot(value, index, "o", color=_BLUE)
        left.annotate(f"{value:.3f}", (value, index), xytext=(0, 6), textcoords="offset points", ha="center")
    left.set_yticks(range(len(parts)), [_drawn(name) for name, *_ in parts])
    left.set_ylim(max(len(parts), 3) - 0.4, -0.6)  # so that a single source stands at the top
    left.set_xlim(0.4, 1.02)
    left.set_title(title, loc="left", fontsize=11)
    right.barh(range(len(chances)), [one - 0.5 for one in chances.values()], left=0.5, color=_BLUE, height=0.6)
    right.set_yticks(range(len(chances)), map(_drawn, chances))
    right.invert_yaxis()
    right.set_xlim(0, 1)
    right.set_title(title_of_chances, loc="left", fontsize=11)
    for panel in (left, right):
        panel.axvline(0.5, color=_GREY, linewidth=1, linestyle="--")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _drawn(name: str) -> str:
    # A dollar sign would start a formula.
    return printable(name, 40).replace("$", r"\$")


def _shown(value: float | tuple[float, float] | None) -> str:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return "-" if value is None else " to ".join(map("{:.3f}".format, values))


@dataclass(frozen=True)
class BlindNgram:
    """N-gram that text gives the chosen answer away by, in pairs of which one answer has it and the other not."""

    text: str  # of the answer, in lower case if it is of words; `^` and `$` are its start and end
    question: str | None  # a word of the question that it goes with, or, in quotation marks, the whole question
    kind: str  # `"words"`, or three `"characters"` in a row
    share: float  # share of the pairs in which one answer has it and the other not
    chosen: float  # share of these in which the chosen answer has it
    log_odds: float  # for the answer that has it, in the probe that sees all n-grams, fitted on all pairs

    @property
    def contribution(self) -> float:
        """Log odds that it adds for the chosen answer, in the mean over all pairs."""
        return self.share * (2 * self.chosen - 1) * self.log_odds

    @property
    def label(self) -> str:
        """The n-gram, and the part of the question that it goes with."""
        text = f"characters '{self.text}'" if self.kind == "characters" else f"'{self.text}'"
        if self.question is None:
            return text
        asked = self.question if len(self.question) <= 40 else f'{self.question[:36]}..."'
        return f"{text} if asked {asked}"


@dataclass(frozen=True)
class BlindAccuracy:
    """Accuracy, in some pairs, of a probe that sees question and answers and no image."""

    num_pairs: int
    num_groups: int  # different `group_id`s among them
    accuracy: float | None = None  # of held-out pairs, ties counted half; `None` where `note` says why
    # 95 % interval of the accuracy that the probe of all pairs reaches on new pairs, groups as independent units
    interval: tuple[float, float] | None = None
    ngrams: list[BlindNgram] = field(default_factory=list)  # by falling contribution
    note: str | None = None


@dataclass(frozen=True)
class BlindReport:
    """
    Result of [`audit_blind`].

    Parameters:
        overall, sources ([`BlindAccuracy`], and a `dict` of them):
            Blind accuracy of all pairs with images, and of those of each source.
        num_without_image (`int`):
            Number of pairs without image and video, which are left out.
    """

    overall: BlindAccuracy
    sources: dict[str, BlindAccuracy]
    num_without_image: int = 0

    @property
    def _parts(self) -> dict[str, BlindAccuracy]:
        return _parts_of(self)

    def summary(self) -> str:
        """The report in a line."""
        part = self.overall
        text = f"Blind accuracy is not measured: {part.note}."
        if part.accuracy is not None:
            text = (
                f"Question and answers alone, without the image, name the chosen answer in {part.accuracy:.1%} of "
                f"{part.num_pairs:,} pairs (95 % interval {_shown(part.interval)}; 0.5 is chance)."
            )
        if self.num_without_image:
            text += f" {self.num_without_image:,} pairs without image are left out."
        if part.ngrams and part.interval is not None and part.interval[0] > 0.5:
            text += f" What carries it most: {'; '.join(map(_carried, part.ngrams[:3]))}."
        return text

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def metrics(self) -> dict[str, float]:
        """The report as metrics: `blind/accuracy` and, with several sources, `blind/accuracy/<source>`, as far as they
        are measured."""
        values = {"blind/accuracy": self.overall.accuracy}
        if len(self.sources) > 1:
            values |= {f"blind/accuracy/{name}": part.accuracy for name, part in self.sources.items()}
        return {name: value for name, value in values.items() if value is not None}

    def show(self, console: Console | None = None) -> None:
        """Print the report, on standard output by default."""
        console = console or Console()
        rows: list[tuple[str, ...]] = []
        for name, part in self._parts.items():
            counts = f"{part.num_pairs:,}", f"{part.num_groups:,}"
            top = ", ".join(f"{ngram.label} {ngram.chosen:.2f}" for ngram in part.ngrams[:2])
            rows.append((name[:60], *counts, _shown(part.accuracy), _shown(part.interval), part.note or top))
        title = "Blind accuracy: do question and answers alone tell which answer was chosen? 0.5 is no"
        columns: tuple[str, ...] = ("", "pairs", "groups", "accuracy", "95 % interval")
        console.print(screen_table(columns, rows, last="what carries it most", title=title))
        if self.num_without_image:
            console.print(f"{self.num_without_image:,} pairs without image are left out.", highlight=False)
        if ngrams := self.overall.ngrams[:12]:
            rows = [(n.label, f"{n.share:.3f}", f"{n.chosen:.3f}", f"{n.log_odds:+.2f}") for n in ngrams]
            columns = ("in one of the two answers", "share of pairs", "chosen has it", "log odds")
            console.print(screen_table(columns, rows, title="N-grams that carry it, all pairs"))

    def plot(self, path: str | os.PathLike) -> None:
        """Draw blind accuracy by source, and the n-grams that carry it, to a file such as `.png` or `.svg`."""
        measured = {name: (part.accuracy, part.interval) for name, part in self._parts.items()}
        carriers = {ngram.label[:40]: ngram.chosen for ngram in self.overall.ngrams[:12]}
        title = "Blind accuracy (a probe that sees text and no image)"
        _plot(path, title, measured, "Chance that, of two answers, the chosen one has it", carriers)


def _carried(ngram: BlindNgram) -> str:
    where = f"in one answer of {ngram.share:.0%} of the pairs, the chosen one in {ngram.chosen:.0%} of them"
    return f"{ngram.label}, {where}"


@dataclass(frozen=True)
class OneSidedStyle:
    """Style that leans one way in some pairs and the other way in none, so that no weights but 0 balance them."""

    features: tuple[str, ...]  # a feature, or several of which a combination leans so
    side: str  # the side that has more of it: `"chosen"` or `"rejected"`; `"one"` for a combination
    num_pairs: int
    examples: list[str]  # the first of these pairs, by `pair_id` or else by row

    def __str__(self) -> str:
        names = ", ".join(f"`{name}`" for name in self.features)
        what = names if len(self.features) == 1 else f"a combination of {names}"
        side = "on one side" if self.side == "one" else f"on the {self.side} side"
        more = ", ..." if self.num_pairs > len(self.examples) else ""
        return f"{what} {side} of {self.num_pairs:,} pairs ({', '.join(self.examples)}{more})"


@dataclass(frozen=True)
class BalanceReport:
    r"""
    Effect of weights on the style of some pairs, and their cost.

    Parameters:
        num_pairs (`int`):
            Number of pairs N.
        effective_size (`float`):
            Kish's effective number of pairs, \((\sum w)^2 / \sum w^2\), from 1 to N: the size of an unweighted set
            with the same variance.
        residual (`float`):
            Largest weighted mean difference of a feature, in the feature's own unit; 0 is balance.
        before, after (`dict[str, float]`):
            Mean of chosen minus rejected of each feature under the original and the new weights, in standard
            deviations of the feature among the answers.
        max_weight, min_weight (`float`):
            Largest weight, and smallest of the pairs whose original weight is above 0, in units of the mean weight.
        num_small, total_weight (`int` and `float`):
            Number of these pairs with less than a thousandth of the mean weight, and sum of all weights.
        one_sided, one_sided_action (`list[OneSidedStyle]` and `str`):
            Style that leans one way only, with its pairs, and the action taken about it: `"leave"` or `"drop"`.
        parts (`dict[str, BalanceReport]`):
            Report for each value of the column `by`.
    """

    num_pairs: int
    effective_size: float
    max_weight: float
    residual: float
    before: dict[str, float]
    after: dict[str, float]
    min_weight: float = 0.0
    num_small: int = 0
    total_weight: float = 0.0
    one_sided: list[OneSidedStyle] = field(default_factory=list)
    one_sided_action: str = "leave"
    parts: dict[str, BalanceReport] = field(default_factory=dict)

    @property
    def _share(self) -> str:
        return f"{self.effective_size / max(self.num_pairs, 1):.0%}"

    def summary(self) -> str:
        """The report in a line."""
        text = (
            f"Style balanced over {self.num_pairs:,} pairs: {self.effective_size:,.0f} effective pairs "
            f"({self._share}), weights from {self.min_weight:.2g} to {self.max_weight:.1f} times the mean, largest "
            f"mean difference left {self.residual:.1e}."
        )
        if self.num_small:
            text += f" {self.num_small:,} pairs have less than {SMALL:g} of the mean weight."
        if self.one_sided:
            leaning = "; ".join(map(str, self.one_sided))
            text += f" Style that leans one way only, {_ACTIONS[self.one_sided_action]}: {leaning}."
        return text

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def show(self, console: Console | None = None) -> None:
        """Print the report, on standard output by default."""
        console = console or Console()
        rows: list[tuple[str, ...]] = []
        for name, part in {"all pairs": self, **self.parts}.items():
            sizes = f"{part.num_pairs:,}", f"{part.effective_size:,.0f}", part._share
            weights = f"{part.min_weight:.2g}", f"{part.max_weight:.2f}", f"{part.num_small:,}"
            rows.append((name[:60], *sizes, *weights, f"{part.residual:.1e}"))
        columns = ("", "pairs", "effective", "share", "smallest weight", "largest", "tiny", "mean difference left")
        console.print(screen_table(columns, rows, title="Style balanced"))
        differences = [(name, before, self.after[name]) for name, before in self.before.items()]
        differences.sort(key=lambda item: -abs(item[1]))
        rows = [(name, *map("{:+.3f}".format, values)) for name, *values in differences if any(values)]
        console.print(screen_table(("chosen minus rejected, sd", "before", "after"), rows))
        for style in self.one_sided:
            console.print(Text(printable(f"Leans one way only, {_ACTIONS[self.one_sided_action]}: {style}", 400)))


@dataclass(frozen=True)
class AgreementCounts:
    """Pairs of candidates by the agreement of both ways of judging."""

    agreed: int = 0  # pairs in the same order by both
    opposed: int = 0  # pairs in opposite orders
    close: int = 0  # pairs with a gap too small to tell an order

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
    Account of a distillation: every row, pool, candidate and pair by its outcome.

    Parameters:
        prompts, pools (`int`):
            Number of rows, and of pools: one for each generator of a row's candidates, or for a row of no use.
        outcomes, examples (`Counter[str]` and `dict[str, str]`):
            Pools by outcome: `"paired"`; `"all_equal"`, `"no_order"` or `"opposed"` without an agreed pair;
            `"not_drawn"` of which no pair was drawn; `"no_candidates"`; a stage with a status of the judge, such as
            `"listwise: malformed"`; or a reason of [`~trl_dt2it.data.RowError`]. They add up to `pools`. The first row
            of each without a pair is an example, with a message where there is one.
        candidates (`Counter[str]`):
            Candidates by outcome: `"judged"`, `"equal"`, `"empty"`, `"unfinished"` (thoughts that never end), or a
            stage with a status, such as `"generation: cut"`.
        diversity (`Counter[str]`):
            Pools of alike candidates by action: `"corrupted"`, `"rewritten"`, or the reason for none.
        agreement ([`AgreementCounts`]):
            Pairs of candidates by whether both scores agree.
        pairs_by_bin, agreed_by_bin (`dict[str, list[int]]`):
            For each generator, the number of pairs drawn, and of agreed pairs, in each bin.
        bin_edges, not_drawn (`list[float]` and `Counter[str]`):
            Edges of the bins, in points, and agreed pairs that were dropped: `"prompt_is_full"` or `"bin_is_full"`.
        position_bias (`list[PositionBias]`):
            Points that positions in a list are worth to the judge, for each length of lists.
        calls, usage (`dict[str, Counter[str]]` and `dict[str, dict]`):
            Replies by status for each stage, and calls, tokens and cost of the judge and the generator.
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
        """Number of pairs drawn."""
        return sum(map(sum, self.pairs_by_bin.values()))

    @property
    def unanswered(self) -> int:
        """Number of questions without an answer yet; the next run asks them."""
        return sum(statuses[status] for statuses in self.calls.values() for status in UNANSWERED)

    def count_call(self, stage: str, status: str) -> None:
        """Count a reply."""
        self.calls.setdefault(stage, Counter())[status] += 1

    def settle(self, outcome: str, name: str, message: str = "") -> None:
        """Count the outcome of a pool, and keep the first example of each without a pair."""
        self.outcomes[outcome] += 1
        if outcome != "paired":
            self.examples.setdefault(outcome, f"{name}: {message}" if message else name)

    def to_json(self) -> str:
        """The report as JSON."""
        # Not `asdict` of the whole, which makes counters of pairs out of counters.
        agreement = {**asdict(self.agreement), "rate": self.agreement.rate}
        biases = [{**asdict(bias), "intervals": bias.intervals} for bias in self.position_bias]
        values = {**vars(self), "pairs": self.pairs, "unanswered": self.unanswered}
        return json.dumps({**values, "agreement": agreement, "position_bias": biases}, indent=2, ensure_ascii=False)

    def show(self, console: Console | None = None) -> None:
        """Print the report, on standard output by default."""
        console = console or Console()
        outcomes = self.outcomes.most_common()
        rows = [(outcome, str(count), self.examples.get(outcome, "")[:200]) for outcome, count in outcomes]
        title = f"{self.pairs} pairs from {self.prompts} prompts"
        console.print(screen_table(("what became of them", "pools"), rows, last="for example", title=title))
        for title, counts in (("Candidates", self.candidates), ("Alike candidates", self.diversity)):
            if counts:
                console.print(_counts(title, counts))
        if self.agreement.pairs:
            rate = "none in an order by both" if self.agreement.rate is None else f"{self.agreement.rate:.1%} agree"
            console.print(_counts(f"Pairs of candidates, {rate}", asdict(self.agreement)))
        if self.pairs_by_bin:
            bins = [zip(drawn, self.agreed_by_bin[name], strict=True) for name, drawn in self.pairs_by_bin.items()]
            lines = [
                (f"{low:g} to {high:g}", *(f"{drawn} of {agreed}" for drawn, agreed in pairs))
                for low, high, *pairs in zip(self.bin_edges, self.bin_edges[1:], *bins, strict=False)
            ]
            columns = ("strength, points", *(printable(name, 200) for name in self.pairs_by_bin))
            console.print(screen_table(columns, lines, title="Pairs drawn, of pairs agreed on"))
        for bias in self.position_bias:
            console.print(_of_positions(bias))
        for stage, statuses in self.calls.items():
            if set(statuses) - {"ok"}:
                console.print(_counts(f"Replies, {stage}", statuses))
        if self.usage:
            shown = "{calls:,} {input_tokens:,} {output_tokens:,} {cost:.4f} {unsettled_calls:,} {unsettled_cost:.4f}"
            lines = [(role, *shown.format(**spent).split()) for role, spent in self.usage.items()]
            columns = ("", "calls", "tokens in", "tokens out", "USD", "unsettled calls", "USD at most")
            console.print(screen_table(columns, lines, title="Calls and cost, over the life of the store"))
        if self.unanswered:
            console.print(f"{self.unanswered:,} questions have no answer yet; run it again to ask them.", markup=False)


def _of_positions(bias: PositionBias) -> Table:
    intervals = [f"{low:+.3f} to {high:+.3f}" for low, high in bias.intervals or ()] or [""] * len(bias.effects)
    effects = zip(bias.effects, intervals, strict=True)
    rows = [(str(place), f"{effect:+.3f}", interval) for place, (effect, interval) in enumerate(effects, 1)]
    title = (
        f"Position bias in lists of {bias.num_candidates} ({bias.num_lists} lists, {bias.noise_rate:.0%} of scores "
        f"noise, spread {bias.spread:.2g})"
    )
    return screen_table(("place", "points", "95 % interval"), rows, title=title)


def _counts(title: str, counts: Mapping[str, int]) -> Text:
    return Text(f"{title}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


@dataclass(frozen=True)
class PositionBias:
    """Points that each position of a list is worth to a judge."""

    num_candidates: int  # length of the lists
    num_lists: int
    effects: tuple[float, ...]  # points by which each position raises a score; they sum to 0
    standard_errors: tuple[float, ...] | None  # by a jackknife over prompts; `None` for a single prompt
    noise_rate: float  # estimated share of scores that have nothing to do with the answer, from 0 to 0.5
    spread: float  # standard deviation of the other scores around candidate and position, in points

    @property
    def intervals(self) -> tuple[tuple[float, float], ...] | None:
        """95 % interval of each effect."""
        if self.standard_errors is None:
            return None
        pairs = zip(self.effects, self.standard_errors, strict=True)
        return tuple((effect - 1.96 * error, effect + 1.96 * error) for effect, error in pairs)
