"""Reports on style and balance, as tables on screen."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..utils import printable
from .style import PairStyle


_BLUE, _GREY = "#2b6cb0", "#718096"


@dataclass(frozen=True)
class FeatureLeakage:
    """What one feature of style tells by itself."""

    auc: float  # Chance that the chosen answer has more of it, ties counted half; from 0 to 1, 0.5 tells nothing
    difference: float  # Mean of chosen minus rejected, in standard deviations of the feature among all answers
    # Of the probe that sees all features, fitted on all pairs: log odds per root mean square of the difference
    coefficient: float


@dataclass(frozen=True)
class RewardStyle:
    """How far the rewards of a model follow style beyond the label."""

    accuracy: float  # Share of pairs whose chosen answer has the higher reward, ties counted half
    # Share of the variance of the reward gap that style explains in held-out pairs; about 0, or below, is none
    r_squared: float | None
    follows: float | None  # Correlation of the reward gap with what style votes for, from -1 to 1
    follows_interval: tuple[float, float] | None  # Its 95 % interval
    agree_share: float  # Share of the pairs in which style votes for the chosen answer
    agree_accuracy: float | None  # Accuracy on them
    disagree_share: float  # Share of the pairs in which style votes for the rejected answer
    disagree_accuracy: float | None  # Accuracy on them
    accuracy_gap: float | None  # The first accuracy less the second: 0 for a model that style does not sway
    accuracy_gap_interval: tuple[float, float] | None  # Its 95 % interval


@dataclass(frozen=True)
class StyleLeakage:
    """What style tells about the labels of some pairs."""

    num_pairs: int  # Number of pairs
    num_groups: int  # Number of different `group_id`s among them
    # Leakage, from 0 to 1; 0.5 tells nothing. `None` where `note` says why there is no number
    auc: float | None = None
    # Its 95 % interval, with groups as independent units: of what the probe of all pairs reaches on new ones
    interval: tuple[float, float] | None = None
    features: dict[str, FeatureLeakage] = field(default_factory=dict)  # Each feature by itself
    reward: RewardStyle | None = None  # How far a scored model follows style
    note: str | None = None  # Why there is no number

    def top_features(self, count: int = 8) -> list[str]:
        """Names of the features that tell most by themselves, the first the most."""
        return sorted(self.features, key=lambda name: -abs(self.features[name].auc - 0.5))[:count]


@dataclass(frozen=True)
class StyleReport:
    """
    What [`audit_style`] found.

    Parameters:
        overall ([`StyleLeakage`]):
            Of all pairs.
        sources (`dict[str, StyleLeakage]`):
            Of the pairs of each source.
    """

    overall: StyleLeakage
    sources: dict[str, StyleLeakage]

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def metrics(self) -> dict[str, float]:
        """
        The report as figures to log, such as by `trainer.log(report.metrics())`.

        Returns:
            `dict[str, float]`: `style/leakage`, with several sources also `style/leakage/<source>`; for each feature
            `style/feature/<name>`, the chance that the chosen answer has more of it; of a scored model
            `style/reward_accuracy`, `style/reward_follows` and `style/reward_accuracy_gap`. Figures that there are
            none of are left out.
        """
        found: dict[str, float | None] = {"style/leakage": self.overall.auc}
        if len(self.sources) > 1:
            found |= {f"style/leakage/{name}": part.auc for name, part in self.sources.items()}
        found |= {f"style/feature/{name}": feature.auc for name, feature in self.overall.features.items()}
        if (reward := self.overall.reward) is not None:
            names = ("accuracy", "follows", "accuracy_gap")
            found |= {f"style/reward_{name}": getattr(reward, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def show(self, console: Console | None = None) -> None:
        """
        Prints the report.

        Args:
            console (`rich.console.Console`, *optional*):
                Where to; standard output by default.
        """
        console = console or Console()
        parts = {"all pairs": self.overall, **(self.sources if len(self.sources) > 1 else {})}
        table = Table("", title="Style leakage: does style alone tell which answer was chosen? 0.5 is no")
        for column in ("pairs", "groups", "AUC", "95 % interval"):
            table.add_column(column, justify="right")
        table.add_column("most telling features")
        for name, part in parts.items():
            telling = part.note or ", ".join(
                f"{feature} {part.features[feature].auc:.2f}" for feature in part.top_features(4)
            )
            auc, interval = _number(part.auc), _interval(part.interval)
            table.add_row(
                Text(printable(name, 60)), f"{part.num_pairs:,}", f"{part.num_groups:,}", auc, interval, telling
            )
        console.print(table)
        if self.overall.features:
            features = Table("feature", title="Features, all pairs")
            for column in ("AUC", "difference, sd", "coefficient"):
                features.add_column(column, justify="right")
            for name in self.overall.top_features(12):
                one = self.overall.features[name]
                features.add_row(name, f"{one.auc:.3f}", f"{one.difference:+.3f}", f"{one.coefficient:+.3f}")
            console.print(features)
        scored = {name: part.reward for name, part in parts.items() if part.reward is not None}
        if scored:
            table = Table("", title="Does the reward follow style beyond the label?")
            for column in ("accuracy", "style agrees", "disagrees", "gap", "95 % interval", "follows", "R²"):
                table.add_column(column, justify="right")
            for name, reward in scored.items():
                table.add_row(
                    Text(printable(name, 60)),
                    _number(reward.accuracy),
                    _number(reward.agree_accuracy),
                    _number(reward.disagree_accuracy),
                    _number(reward.accuracy_gap),
                    _interval(reward.accuracy_gap_interval),
                    _number(reward.follows),
                    _number(reward.r_squared),
                )
            console.print(table)

    def plot(self, path: str | os.PathLike) -> None:
        """
        Draws leakage by source and the features that carry it.

        Args:
            path (`str` or `os.PathLike`):
                File to write; its ending says in which format, such as `.png` or `.svg`.
        """
        # Without pyplot, which would choose a window system and keep figures alive.
        from matplotlib.figure import Figure

        parts = {"all pairs": self.overall, **(self.sources if len(self.sources) > 1 else {})}
        measured = {name: part for name, part in parts.items() if part.auc is not None}
        names = self.overall.top_features(12)
        height = 1.6 + 0.3 * max(len(measured), len(names), 3)
        figure = Figure(figsize=(11, height), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, part in enumerate(measured.values()):
            if part.auc is None or part.interval is None:
                continue
            left.plot(part.interval, [index, index], color=_BLUE, linewidth=2)
            left.plot(part.auc, index, "o", color=_BLUE)
            left.annotate(f"{part.auc:.3f}", (part.auc, index), xytext=(0, 6), textcoords="offset points", ha="center")
        left.set_yticks(range(len(measured)), [_label(name) for name in measured])
        left.set_ylim(max(len(measured), 3) - 0.4, -0.6)  # a single one is not in the middle of nowhere
        left.set_xlim(0.4, 1.02)
        left.set_title("Leakage (AUC of a probe that sees style alone)", loc="left", fontsize=11)
        features = [self.overall.features[name] for name in names]
        right.barh(names, [one.auc - 0.5 for one in features], left=0.5, color=_BLUE, height=0.6)
        right.invert_yaxis()
        right.set_xlim(0, 1)
        right.set_title("Chance that the chosen answer has more of it", loc="left", fontsize=11)
        for panel in (left, right):
            panel.axvline(0.5, color=_GREY, linewidth=1, linestyle="--")
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def _label(name: str) -> str:
    # A dollar sign would start a formula.
    return printable(name, 40).replace("$", r"\$")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"


# Pairs with less than this, in units of the mean weight, hardly count.
SMALL = 1e-3

_ACTIONS = {
    "leave": "and is left out of the balance",
    "drop": "and its pairs have weight 0",
    "refuse": "and is refused",
}


@dataclass(frozen=True)
class OneSidedStyle:
    """Style that leans one way in some pairs and the other way in none, so that no weights but 0 balance them."""

    features: tuple[str, ...]  # A feature, or several of which a combination leans so
    side: str  # The side that has more of it: `"chosen"` or `"rejected"`; `"one"` of a combination
    num_pairs: int  # Number of these pairs
    examples: list[str]  # The first of them, by `pair_id` or else by row

    def __str__(self) -> str:
        names = ", ".join(f"`{name}`" for name in self.features)
        what = names if len(self.features) == 1 else f"a combination of {names}"
        side = "on one side" if self.side == "one" else f"on the {self.side} side"
        more = ", ..." if self.num_pairs > len(self.examples) else ""
        return f"{what} {side} of {self.num_pairs:,} pairs ({', '.join(self.examples)}{more})"


@dataclass(frozen=True)
class BalanceReport:
    r"""
    What weights do to the style of some pairs, and what they cost.

    Parameters:
        num_pairs (`int`):
            Number of pairs N.
        effective_size (`float`):
            Kish's effective number of pairs, \((\sum w)^2 / \sum w^2\), from 1 to N: the size of an unweighted set
            with the variance of this one.
        max_weight (`float`):
            Largest weight, in units of the mean weight.
        min_weight (`float`):
            Smallest weight of a pair that came with any, in the same unit.
        num_small (`int`):
            Pairs with less than a thousandth of the mean weight, of those that came with any.
        total_weight (`float`):
            Sum of the weights.
        one_sided (`list[OneSidedStyle]`):
            Style that leans one way only, and its pairs.
        one_sided_action (`str`):
            What was done about it: `"leave"` or `"drop"`.
        residual (`float`):
            Largest weighted mean difference of a feature, in the feature's own unit; 0 is balance.
        before (`dict[str, float]`):
            Mean of chosen minus rejected of each feature under the weights that the pairs came with, in standard
            deviations of the feature among the answers.
        after (`dict[str, float]`):
            The same under the new weights.
        parts (`dict[str, BalanceReport]`):
            The same for each value of the column `by`.
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

    def summary(self) -> str:
        """The report in a line."""
        text = (
            f"Style balanced over {self.num_pairs:,} pairs: {self.effective_size:,.0f} effective pairs "
            f"({self.effective_size / max(self.num_pairs, 1):.0%}), weights from {self.min_weight:.2g} to "
            f"{self.max_weight:.1f} times the mean, largest mean difference left {self.residual:.1e}."
        )
        if self.num_small:
            text += f" {self.num_small:,} pairs have less than {SMALL:g} of the mean weight."
        if self.one_sided:
            action = _ACTIONS[self.one_sided_action]
            text += f" Style that leans one way only, {action}: {'; '.join(map(str, self.one_sided))}."
        return text

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def show(self, console: Console | None = None) -> None:
        """
        Prints the report.

        Args:
            console (`rich.console.Console`, *optional*):
                Where to; standard output by default.
        """
        console = console or Console()
        table = Table("", title="Style balanced")
        for column in ("pairs", "effective", "share", "smallest weight", "largest", "tiny", "mean difference left"):
            table.add_column(column, justify="right")
        for name, part in {"all pairs": self, **self.parts}.items():
            table.add_row(
                Text(printable(name, 60)),
                f"{part.num_pairs:,}",
                f"{part.effective_size:,.0f}",
                f"{part.effective_size / max(part.num_pairs, 1):.0%}",
                f"{part.min_weight:.2g}",
                f"{part.max_weight:.2f}",
                f"{part.num_small:,}",
                f"{part.residual:.1e}",
            )
        console.print(table)
        features = Table("chosen minus rejected, sd")
        for column in ("before", "after"):
            features.add_column(column, justify="right")
        for name in sorted(self.before, key=lambda name: -abs(self.before[name])):
            if self.before[name] or self.after[name]:
                features.add_row(name, f"{self.before[name]:+.3f}", f"{self.after[name]:+.3f}")
        console.print(features)
        for one in self.one_sided:
            console.print(Text(printable(f"Leans one way only, {_ACTIONS[self.one_sided_action]}: {one}", 400)))


def summarize(
    style: PairStyle,
    weight: np.ndarray,
    parts: dict[str, np.ndarray],
    one_sided: dict[str, list[OneSidedStyle]],
    action: str,
) -> BalanceReport:
    """Sums up what weights do.

    Shapes: `weight` `(N,)`.
    """
    total = float(weight.sum())
    share = weight / total if total > 0 else weight
    left = share @ style.difference
    before = style.weight @ style.difference / max(float(style.weight.sum()), np.finfo(float).tiny)
    mean, came = max(total / max(len(weight), 1), np.finfo(float).tiny), weight[style.weight > 0]
    spread = np.where(style.spread > 0, style.spread, 1.0)
    return BalanceReport(
        num_pairs=len(style),
        effective_size=float(1 / (share**2).sum()) if total > 0 else 0.0,
        max_weight=float(weight.max() / weight.mean()) if total > 0 else 0.0,
        residual=float(np.abs(left).max()),
        before=dict(zip(style.features, (before / spread).tolist(), strict=True)),
        after=dict(zip(style.features, (left / spread).tolist(), strict=True)),
        min_weight=float(came.min() / mean) if len(came) else 0.0,
        num_small=int((came < SMALL * mean).sum()),
        total_weight=total,
        one_sided=[one for found in one_sided.values() for one in found],
        one_sided_action=action,
        parts={
            name: summarize(style.take(rows), weight[rows], {}, {name: one_sided.get(name, [])}, action)
            for name, rows in parts.items()
        },
    )
