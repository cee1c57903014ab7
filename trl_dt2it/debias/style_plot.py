"""A picture of a style report: leakage by source, and what carries it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Without pyplot, which would choose a window system and keep figures alive.
from matplotlib.figure import Figure

from ..printable import printable


if TYPE_CHECKING:
    from .style_report import StyleReport

_BLUE, _GREY = "#2b6cb0", "#718096"


def draw(report: StyleReport, path: str | os.PathLike) -> None:
    """
    Draws a report.

    Args:
        report ([`StyleReport`]):
            What to draw.
        path (`str` or `os.PathLike`):
            File to write; its ending says in which format.
    """
    parts = {"all pairs": report.overall, **(report.sources if len(report.sources) > 1 else {})}
    measured = {name: part for name, part in parts.items() if part.auc is not None}
    names = report.overall.top_features(12)
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
    features = [report.overall.features[name] for name in names]
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
