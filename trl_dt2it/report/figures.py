"""Figures of a report: the flow of pairs, distributions of rewards and margins, calibration, and bars.

Static SVG by matplotlib, whose placeholder colors are replaced with the variables of the page, so that a figure
follows its light or dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from scipy.special import expit

from ..curation.ledger import CurationLedger
from ..evaluation.metrics import Interval, wilson
from ..utils import printable


# As labelled at the source; swapped; brought back by judges, in either orientation; dropped.
STATES = ("kept", "flipped", "relabelled", "dropped")

SIZE = (3.9, 2.7)  # inches of 96 pixels: three fit beside each other on a wide page, one on a telephone

INK, MUTED, LINE, ACCENT, SOFT, GREY, FAINT = (f"#0{number}0{number}0{number}" for number in range(1, 8))
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SOFT: "soft", GREY: "grey", FAINT: "faint"}

_STYLE: Any = {  # its keys are of a type that lists all of matplotlib's settings
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is no formula
    "font.size": 10,
    "text.color": INK,
    "axes.linewidth": 1,
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), LINE),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
}

_DASHED: Any = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (3, 3)), "zorder": 1}

_COLORS = {"kept": GREY, "relabelled": SOFT, "flipped": ACCENT, "dropped": FAINT}  # of states, from top to bottom
_GAP = 0.03  # between states of a stack, as a share of all pairs


@dataclass(frozen=True)
class Flow:
    """The N pairs of a ledger, stage by stage."""

    pair_id: pa.Array
    steps: tuple[str, ...]  # "source", then the K stages that count, as "round 1, flip"; those of persons last
    states: np.ndarray  # (K + 1, N), of type int8: position in `STATES` after each stage; at the source, all are kept
    flipped: np.ndarray  # (N,), whether it ends swapped against its source, as some relabelled pairs do
    source: np.ndarray  # (N,), "pool" where the ledger does not know it
    margin: np.ndarray  # (N,), reward margin by the last scores, as labelled at the source; NaN where never scored

    def counts(self) -> np.ndarray:
        """Count the pairs in each state after each stage, `(K + 1, 4)`."""
        return np.stack([np.bincount(states, minlength=len(STATES)) for states in self.states])

    def transitions(self) -> np.ndarray:
        """Count the pairs that go from each state into each other one, `(K, 4, 4)`."""
        size = len(STATES)
        moves = self.states[:-1].astype(int) * size + self.states[1:]
        counts = [np.bincount(step, minlength=size**2) for step in moves]
        return np.array(counts, dtype=int).reshape(-1, size, size)

    def since(self) -> np.ndarray:
        """Return the stage of the last change of each pair, `(N,)`; 0 if it never changed."""
        changed = self.states[1:] != self.states[:-1]
        return np.where(changed, np.arange(1, len(self.states))[:, None], 0).max(axis=0, initial=0)


def read_flow(ledger: CurationLedger) -> Flow:
    """Follow all pairs through a ledger, without undone rounds."""
    entries = ledger.standing
    names = ledger.state()["pair_id"].combine_chunks()
    states = np.zeros((len(entries) + 1, len(names)), dtype=np.int8)
    flipped = np.zeros(len(names), dtype=bool)
    source = np.full(len(names), "pool", dtype=object)
    margin = np.full(len(names), np.nan)
    for step, entry in enumerate(entries, 1):
        table = ledger.table(entry)
        rows = pc.index_in(table["pair_id"].combine_chunks(), value_set=names).to_numpy()
        turned = table["flipped"].to_numpy()
        is_dropped = pc.equal(table["action"].cast(pa.string()), "drop").to_numpy()
        kept = np.where(turned, STATES.index("flipped"), STATES.index("kept"))
        if any(name.startswith("vote_") for name in table.column_names):
            # Judges may have been asked about kept pairs too, which do not come back from anywhere.
            was_out = np.isin(states[step - 1, rows], [STATES.index("dropped"), STATES.index("relabelled")])
            kept[was_out] = STATES.index("relabelled")
        states[step] = states[step - 1]
        states[step, rows] = np.where(is_dropped, STATES.index("dropped"), kept)
        flipped[rows] = turned
        named = table["source"].cast(pa.string())
        source[rows] = np.where(named.is_null().to_numpy(), source[rows], named.to_numpy())
        if "chosen_0" in table.column_names:
            value = table["strength"].to_numpy()
            margin[rows] = np.where(turned, -value, value)
    return Flow(names, ("source", *map(step_title, entries)), states, flipped, source, margin)


def step_title(entry: Mapping[str, Any]) -> str:
    """Name a stage of a round, without "decide", which is the default."""
    if CurationLedger.is_manual(entry):
        return "by hand"
    stage = entry["stage"].removesuffix("decide").rstrip("-")
    return f"round {entry['round']}" + (f", {stage}" if stage else "")


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of about the same predicted win probability."""

    low: float  # ends of the bin, from 0.5 to 1
    high: float
    count: int
    predicted: float  # mean predicted probability
    observed: float  # share of pairs in which the answer that the model prefers is the chosen one
    interval: Interval  # 95 % interval of the share


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed win probabilities."""

    bins: tuple[CalibrationBin, ...]  # of equal width, from 0.5 to 1, without empty bins
    error: float  # expected calibration error: mean of |observed - predicted| over the bins, by number of pairs
    count: int  # number of pairs with two different rewards
    ties: int  # number of the other pairs, which predict nothing


def calibrate(chosen: npt.ArrayLike, rejected: npt.ArrayLike, num_bins: int = 10) -> Calibration:
    """Compare the win probabilities that rewards predict with the labels."""
    # A pair counts from the side that the model prefers: it predicts that this answer wins with the sigmoid of the
    # absolute margin, and it has won if it is the chosen answer.
    margin = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    margin = margin[np.isfinite(margin)]
    ties = int((margin == 0).sum())
    margin = margin[margin != 0]
    predicted, won = expit(np.abs(margin)), margin > 0
    edges = np.linspace(0.5, 1, num_bins + 1)
    numbers = np.minimum(np.searchsorted(edges, predicted, side="right") - 1, num_bins - 1)
    bins = []
    for number in np.unique(numbers):
        inside = numbers == number
        count, observed = int(inside.sum()), float(won[inside].mean())
        ends, interval = (float(edges[number]), float(edges[number + 1])), wilson(observed, count)
        bins.append(CalibrationBin(*ends, count, float(predicted[inside].mean()), observed, interval))
    error = sum(abs(one.observed - one.predicted) * one.count for one in bins) / max(1, len(margin))
    return Calibration(tuple(bins), error, len(margin), ties)


@dataclass(frozen=True)
class Figure:
    """A figure of the page."""

    title: str
    svg: Markup
    label: str  # for screen readers
    narrow: Markup | None = None  # drawing for narrow screens
    is_wide: bool = False  # takes the whole width of the page


def new_drawing(width: float = SIZE[0], height: float = SIZE[1]) -> tuple[Drawing, Axes]:
    """Start a drawing with one pair of axes; sizes in inches."""
    with rc_context(_STYLE):
        # Without pyplot, which would choose a window system and keep figures alive.
        drawing = Drawing(figsize=(width, height), layout="constrained", facecolor="none")
        axes = drawing.subplots()
        axes.set_facecolor("none")
        return drawing, axes


def as_svg(drawing: Drawing, name: str) -> Markup:
    """Convert a drawing to an element of the page."""
    out = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    # The page's own type; sizes and alignment stay.
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    width, height = (round(inches * 96) for inches in drawing.get_size_inches())
    head = f'viewBox="0 0 {width * 0.75:g} {height * 0.75:g}" width="{width}" height="{height}" aria-hidden="true"'
    svg = re.sub(r"<svg[^>]*>", f'<svg {head} xmlns="http://www.w3.org/2000/svg">', svg, count=1)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|PolyC)\w*"', "", svg)
    return Markup(svg)  # noqa: S704  (matplotlib has escaped all text)


def histogram(name: str, title: str, series: Mapping[str, np.ndarray], *, xlabel: str, zero: bool = True) -> Figure:
    """Draw two distributions over each other: the first as an outline, the second filled."""
    values = np.concatenate([np.asarray(one, dtype=np.float64) for one in series.values()])
    # Single values far out would leave no room for the others; they count in the outermost bins.
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    low, high = (low - 0.5, high + 0.5) if high <= low else (low, high)
    edges = np.linspace(low, high, 41)
    drawing, axes = new_drawing()
    outline, filled = (np.histogram(np.clip(one, low, high), edges)[0] for one in series.values())
    axes.stairs(outline, edges, color=MUTED, linewidth=1.4, zorder=3)
    axes.stairs(filled, edges, color=ACCENT, fill=True, alpha=0.55, zorder=2)
    if zero and low < 0 < high:
        axes.axvline(0, **_DASHED)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    label = "; ".join(
        f"{key}: " + (f"{len(one):,} values, mean {np.mean(one):.2f}" if len(one) else "no values")
        for key, one in series.items()
    )
    return Figure(title, as_svg(drawing, name), f"Histogram of {xlabel}. {label}")


def reliability(name: str, title: str, fit: Calibration) -> Figure:
    """Draw the observed share of each bin, with its interval, against the predicted win probability."""
    drawing, axes = new_drawing(SIZE[0], 3.4)
    axes.plot([0.5, 1], [0.5, 1], **_DASHED)
    lowest = 0.5
    for one in fit.bins:
        axes.plot([one.predicted] * 2, one.interval, color=ACCENT, linewidth=1.4, zorder=2)
        axes.plot(one.predicted, one.observed, "o", color=ACCENT, markersize=4.5, zorder=3)
        lowest = min(lowest, one.interval.low)
    axes.set_xlim(0.485, 1.015)
    axes.set_ylim(max(0.0, lowest - 0.05), 1.03)
    axes.set_ylabel("observed")
    axes.set_xlabel("predicted win probability")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    label = f"Reliability over {fit.count} pairs; expected calibration error {fit.error:.3f}"
    return Figure(title, as_svg(drawing, name), label)


def bars(name: str, title: str, series: Mapping[str, Mapping[str, float]], *, xlabel: str, middle: float) -> Figure:
    """Draw for each name a bar from the middle for the last series, and a mark for the first."""
    names = list(next(iter(series.values())))
    drawing, axes = new_drawing(SIZE[0], 0.9 + 0.24 * max(3, len(names)))
    values = list(series.values())
    rows = np.arange(len(names))
    last = [values[-1].get(one, middle) for one in names]
    axes.barh(rows, [one - middle for one in last], left=middle, color=ACCENT, alpha=0.75, height=0.55, zorder=2)
    if len(values) > 1:
        first = [values[0][one] for one in names]
        axes.plot(first, rows, "|", color=INK, markersize=10, markeredgewidth=1.6, zorder=3)
    axes.axvline(middle, color=MUTED, linewidth=0.8, zorder=1)
    labels = [printable(one) for one in names]
    axes.set_yticks(rows, [label if len(label) <= 28 else f"{label[:27]}…" for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    reach = max([0.05, *(abs(one - middle) for single in values for one in single.values())]) * 1.08
    axes.set_xlim(middle - reach, middle + reach)
    axes.set_xlabel(xlabel)
    return Figure(title, as_svg(drawing, name), f"Bars of {xlabel} for {', '.join(map(str, names))}")


def accuracies(name: str, title: str, values: Mapping[str, tuple[float, Sequence[float]]]) -> Figure:
    """Draw an accuracy for each name, with its interval: the first in the color of the page, the others beside it."""
    drawing, axes = new_drawing()
    x, shares = np.arange(len(values)), np.array([value for value, _ in values.values()])
    ends = np.array([ends for _, ends in values.values()])
    colors = [ACCENT, *[SOFT] * (len(values) - 1)]
    axes.bar(x, shares, color=colors, width=0.62, zorder=2)
    axes.vlines(x, ends[:, 0], ends[:, 1], color=INK, linewidth=1.4, zorder=3)
    axes.axhline(0.5, **{**_DASHED, "zorder": 4})
    axes.set_ylim(0, 1.02)
    axes.set_xticks(x, list(values))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    label = "; ".join(f"{key} {value:.3f}, {low:.3f} to {high:.3f}" for key, (value, (low, high)) in values.items())
    return Figure(title, as_svg(drawing, name), f"Accuracy by the image shown, with 95 % intervals: {label}")


def curve(name: str, title: str, x: npt.ArrayLike, y: npt.ArrayLike, *, xlabel: str, ylabel: str) -> Figure:
    """Draw a line through points in order, from 0 upwards."""
    x, y = np.asarray(x), np.asarray(y)
    drawing, axes = new_drawing()
    axes.plot(x, y, color=ACCENT, linewidth=1.6, zorder=2)
    axes.plot(x[[0, -1]], y[[0, -1]], "o", color=ACCENT, markersize=4.5, zorder=3)
    axes.set_ylim(0, 1.08 * max(y.max(), 1e-3))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return Figure(
        title, as_svg(drawing, name), f"{ylabel} by {xlabel}, from {y[0]:g} at {x[0]} to {y[-1]:g} at {x[-1]}"
    )


def draw_flow(flow: Flow) -> Figure:
    """Draw the flow of curation, for wide and for narrow screens."""
    counts = flow.counts()
    labels = [
        f"{step}: " + ", ".join(f"{number:,} {state}" for state, number in zip(STATES, row, strict=True) if number)
        for step, row in zip(flow.steps, counts, strict=True)
    ]
    wide = _draw(flow, max(9.0, 1.9 * len(flow.steps)), "flow-wide")
    narrow = _draw(flow, max(3.7, 0.95 * len(flow.steps)), "flow-narrow")
    return Figure("From stage to stage", wide, "Flow of pairs. " + "; ".join(labels), narrow, is_wide=True)


def _draw(flow: Flow, width: float, name: str) -> Markup:
    counts, total = flow.counts(), max(1, len(flow.pair_id))
    shares, moves = counts / total, flow.transitions() / total
    order = [STATES.index(state) for state in _COLORS]
    heights = shares[:, order] + _GAP * (shares[:, order] > 0)
    tops = np.zeros_like(shares)  # of each state of a stack, from 0 downwards
    tops[:, order[1:]] = -np.cumsum(heights, axis=1)[:, :-1]
    drawing, axes = new_drawing(width, 3.6)
    bar = 0.13 / width * len(flow.steps)  # of the distance between stacks
    for step, title in enumerate(flow.steps):
        for index, state in enumerate(STATES):
            share, top = shares[step, index], tops[step, index]
            if share:
                axes.add_patch(Rectangle((step, top - share), bar, share, color=_COLORS[state], linewidth=0, zorder=3))
                number = f"{counts[step, index]:,}"
                axes.text(step + 1.4 * bar, top - share / 2, number, va="center", color=INK, fontsize=9, zorder=4)
        if step < len(moves):
            # A pair that comes back takes the color of its new state.
            left, right, middle = tops[step].copy(), tops[step + 1].copy(), step + (bar + 1) / 2
            for source, target in product(order, repeat=2):
                if share := moves[step, source, target]:
                    a, b = left[source], right[target]
                    left[source] -= share
                    right[target] -= share
                    upper = [(step + bar, a), (middle, a), (middle, b), (step + 1, b)]
                    lower = [(x, y - share) for x, y in upper[::-1]]
                    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
                    look: Any = {"color": _COLORS[STATES[target]], "alpha": 0.3, "linewidth": 0, "zorder": 2}
                    axes.add_patch(PathPatch(Path([*upper, *lower, upper[0]], codes), **look))
        axes.text(step, 0.05, title.replace(", ", "\n"), color=MUTED, fontsize=9, va="bottom")
    axes.set_xlim(-0.02, len(flow.steps) - 1 + bar + 0.42)
    axes.set_ylim(-1 - _GAP * len(STATES), 0.02)
    axes.set_axis_off()
    return as_svg(drawing, name)
