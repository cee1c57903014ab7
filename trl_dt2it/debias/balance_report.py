"""What balancing weights do and what they cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..utils import printable
from .pair_style import PairStyle


# Pairs with less than this, in units of the mean weight, hardly count.
SMALL = 1e-3
_ACTIONS = {
    "leave": "and is left out of the balance",
    "drop": "and its pairs have weight 0",
    "refuse": "and is refused",
}


@dataclass(frozen=True)
class OneSidedStyle:
    """
    Style that leans one way in some pairs and the other way in none, so that no weights but 0 balance them.

    Parameters:
        features (`tuple[str, ...]`):
            A feature, or several of which a combination leans so.
        side (`str`):
            The side that has more of it: `"chosen"` or `"rejected"`; `"one"` of a combination.
        num_pairs (`int`):
            Number of these pairs.
        examples (`list[str]`):
            The first of them, by `pair_id` or else by row.
    """

    features: tuple[str, ...]
    side: str
    num_pairs: int
    examples: list[str]

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
    """
    Sums up what weights do.

    Args:
        style ([`PairStyle`]):
            Style of N pairs, with the weights that they came with.
        weight (`np.ndarray` of shape `(N,)`):
            The new weights.
        parts (`dict[str, np.ndarray]`):
            Rows of each part to sum up by itself, by name.
        one_sided (`dict[str, list[OneSidedStyle]]`):
            Style that leans one way, by part.
        action (`str`):
            What was done about it.

    Returns:
        [`BalanceReport`]
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
