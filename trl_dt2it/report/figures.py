"""Figures of the report, drawn by matplotlib as SVG that takes its colours and letters from the page around it.

Matplotlib, because it is the library that scientific figures are drawn with, writes SVG without a display, and adds
some ten kilobytes a figure to the page; the script that plotly or vega put into each page is several megabytes, more
than all the rest, and the page's own script has nothing to do with figures then. It is among the package's own
dependencies, because `make demo` writes a report from a bare installation.

Each colour below stands for a CSS variable, which replaces it in the SVG, so that figures follow light and dark.
Letters stay text (`svg.fonttype: none`): they are searched, copied, read aloud, and set in the page's own type.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator

from ..utils import printable
from .calibration import Calibration


INK, MUTED, LINE, ACCENT, SOFT, GREY, FAINT = (f"#0{number}0{number}0{number}" for number in range(1, 8))
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SOFT: "soft", GREY: "grey", FAINT: "faint"}
_STYLE: Any = {  # its keys are of a type that lists all of matplotlib's settings
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is no formula
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 1,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
}
SIZE = (3.9, 2.7)  # inches of 96 pixels: three fit beside each other on a wide page, one on a telephone


@dataclass(frozen=True)
class Figure:
    """
    A figure of the page.

    Parameters:
        title (`str`):
            What stands above it.
        svg (`Markup`):
            The drawing.
        label (`str`):
            What it shows, for whoever does not see it.
        narrow (`Markup`, *optional*):
            Another drawing for narrow screens.
        is_wide (`bool`, *optional*, defaults to `False`):
            Whether it takes the whole width of the page.
    """

    title: str
    svg: Markup
    label: str
    narrow: Markup | None = None
    is_wide: bool = False


def new_drawing(width: float = SIZE[0], height: float = SIZE[1]) -> tuple[Drawing, Axes]:
    """A drawing with one pair of axes; sizes in inches."""
    with rc_context(_STYLE):
        # Without pyplot, which would choose a window system and keep figures alive.
        drawing = Drawing(figsize=(width, height), layout="constrained", facecolor="none")
        axes = drawing.subplots()
        axes.set_facecolor("none")
        return drawing, axes


def as_svg(drawing: Drawing, name: str) -> Markup:
    """
    A drawing as an element of the page.

    Args:
        drawing (`matplotlib.figure.Figure`):
            The drawing.
        name (`str`):
            Makes the ids inside differ from those of other figures.

    Returns:
        `Markup`: an `<svg>` element with CSS variables for colours.
    """
    out = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # The page's own type; sizes and alignment stay.
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    width, height = (round(inches * 96) for inches in drawing.get_size_inches())
    head = (
        f'<svg viewBox="0 0 {width * 0.75:g} {height * 0.75:g}" width="{width}" height="{height}" aria-hidden="true"'
    )
    svg = re.sub(r"<svg[^>]*>", f'{head} xmlns="http://www.w3.org/2000/svg">', svg, count=1)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|PolyC)\w*"', "", svg)
    return Markup(svg)  # noqa: S704  (matplotlib has escaped all text)


def histogram(name: str, title: str, series: Mapping[str, np.ndarray], *, xlabel: str, zero: bool = True) -> Figure:
    """
    Two distributions over each other: the first an outline, the second filled.

    Args:
        name (`str`):
            Makes ids unique.
        title (`str`):
            Title.
        series (`Mapping[str, np.ndarray]`):
            Names and values; of an empty one there is nothing to see.
        xlabel (`str`):
            What the values are.
        zero (`bool`, *optional*, defaults to `True`):
            Whether 0 gets a line.

    Returns:
        [`Figure`]
    """
    values = np.concatenate([np.asarray(one, dtype=np.float64) for one in series.values()])
    # Single values far out would leave no room for the others; they count in the outermost bins.
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    low, high = (low - 0.5, high + 0.5) if high <= low else (low, high)
    edges = np.linspace(low, high, 41)
    drawing, axes = new_drawing()
    for place, one in enumerate(series.values()):
        counts, _ = np.histogram(np.clip(one, low, high), edges)
        if place == 0:
            axes.stairs(counts, edges, color=MUTED, linewidth=1.4, zorder=3)
        else:
            axes.stairs(counts, edges, color=ACCENT, fill=True, alpha=0.55, zorder=2)
    if zero and low < 0 < high:
        axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    label = "; ".join(f"{key}: {_summary(one)}" for key, one in series.items())
    return Figure(title, as_svg(drawing, name), f"Histogram of {xlabel}. {label}")


def reliability(name: str, title: str, found: Calibration) -> Figure:
    """
    Predicted win probability against the observed share, with the number of pairs of each bin below.

    Args:
        name (`str`):
            Makes ids unique.
        title (`str`):
            Title.
        found ([`Calibration`]):
            The bins.

    Returns:
        [`Figure`]
    """
    drawing, axes = new_drawing(SIZE[0], 3.4)
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    lowest = 0.5
    for one in found.bins:
        if one.predicted is None or one.observed is None or one.interval is None:
            continue
        axes.plot([one.predicted] * 2, one.interval, color=ACCENT, linewidth=1.4, zorder=2)
        axes.plot(one.predicted, one.observed, "o", color=ACCENT, markersize=4.5, zorder=3)
        lowest = min(lowest, one.interval.low)
    axes.set_xlim(0.485, 1.015)
    axes.set_ylim(max(0.0, lowest - 0.05), 1.03)
    axes.set_ylabel("observed")
    axes.set_xlabel("predicted win probability")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    label = f"Reliability over {found.count} pairs; expected calibration error {found.error:.3f}"
    return Figure(title, as_svg(drawing, name), label)


def bars(name: str, title: str, series: Mapping[str, Mapping[str, float]], *, xlabel: str, middle: float) -> Figure:
    """
    For each name one bar from the middle for the last series, and a mark for the first.

    Args:
        name (`str`):
            Makes ids unique.
        title (`str`):
            Title.
        series (`Mapping[str, Mapping[str, float]]`):
            One or two series, each with values by name; names of the first count.
        xlabel (`str`):
            What the values are.
        middle (`float`):
            Where bars begin.

    Returns:
        [`Figure`]
    """
    names = list(next(iter(series.values())))
    drawing, axes = new_drawing(SIZE[0], 0.9 + 0.24 * max(3, len(names)))
    values = list(series.values())
    rows = np.arange(len(names))
    last = [values[-1].get(one, middle) for one in names]
    axes.barh(rows, [one - middle for one in last], left=middle, color=ACCENT, alpha=0.75, height=0.55, zorder=2)
    if len(values) > 1:
        axes.plot(
            [values[0][one] for one in names], rows, "|", color=INK, markersize=10, markeredgewidth=1.6, zorder=3
        )
    axes.axvline(middle, color=MUTED, linewidth=0.8, zorder=1)
    axes.set_yticks(rows, [_short(one) for one in names])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    reach = max([0.05, *(abs(one - middle) for single in values for one in single.values())]) * 1.08
    axes.set_xlim(middle - reach, middle + reach)
    axes.set_xlabel(xlabel)
    return Figure(title, as_svg(drawing, name), f"Bars of {xlabel} for {', '.join(map(str, names))}")


def _short(text: str, most: int = 28) -> str:
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _summary(values: Sequence[float] | np.ndarray) -> str:
    return f"{len(values):,} values, mean {np.mean(values):.2f}" if len(values) else "no values"
