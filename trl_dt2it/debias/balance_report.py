"""What balancing weights do and what they cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..printable import printable
from .pair_style import PairStyle


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
    parts: dict[str, BalanceReport] = field(default_factory=dict)

    def summary(self) -> str:
        """The report in a line."""
        return (
            f"Style balanced over {self.num_pairs:,} pairs: {self.effective_size:,.0f} effective pairs "
            f"({self.effective_size / max(self.num_pairs, 1):.0%}), largest weight {self.max_weight:.1f} times the "
            f"mean, largest mean difference left {self.residual:.1e}."
        )

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
        for column in ("pairs", "effective", "share", "largest weight", "mean difference left"):
            table.add_column(column, justify="right")
        for name, part in {"all pairs": self, **self.parts}.items():
            table.add_row(
                Text(printable(name, 60)),
                f"{part.num_pairs:,}",
                f"{part.effective_size:,.0f}",
                f"{part.effective_size / max(part.num_pairs, 1):.0%}",
                f"{part.max_weight:.2f}",
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


def summarize(style: PairStyle, weight: np.ndarray, parts: dict[str, np.ndarray]) -> BalanceReport:
    """
    Sums up what weights do.

    Args:
        style ([`PairStyle`]):
            Style of N pairs, with the weights that they came with.
        weight (`np.ndarray` of shape `(N,)`):
            The new weights.
        parts (`dict[str, np.ndarray]`):
            Rows of each part to sum up by itself, by name.

    Returns:
        [`BalanceReport`]
    """
    total = float(weight.sum())
    share = weight / total if total > 0 else weight
    left = share @ style.difference
    before = style.weight @ style.difference / max(float(style.weight.sum()), np.finfo(float).tiny)
    spread = np.where(style.spread > 0, style.spread, 1.0)
    return BalanceReport(
        num_pairs=len(style),
        effective_size=float(1 / (share**2).sum()) if total > 0 else 0.0,
        max_weight=float(weight.max() / weight.mean()) if total > 0 else 0.0,
        residual=float(np.abs(left).max()),
        before=dict(zip(style.features, (before / spread).tolist(), strict=True)),
        after=dict(zip(style.features, (left / spread).tolist(), strict=True)),
        parts={name: summarize(style.take(rows), weight[rows], {}) for name, rows in parts.items()},
    )
