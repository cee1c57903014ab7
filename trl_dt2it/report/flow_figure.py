"""The flow of curation as a picture: a stack of states for each stage, and ribbons from stack to stack."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from .figures import ACCENT, FAINT, GREY, INK, MUTED, SOFT, Figure, as_svg, new_drawing
from .flow import STATES, Flow


COLOURS = {"kept": GREY, "flipped": ACCENT, "relabelled": SOFT, "dropped": FAINT}
_ORDER = ("kept", "relabelled", "flipped", "dropped")  # from top to bottom
_GAP = 0.03  # between states of a stack, as a share of all pairs


def draw_flow(flow: Flow) -> Figure:
    """
    Draws the flow of curation.

    Args:
        flow ([`Flow`]):
            Where pairs stand after each stage.

    Returns:
        [`Figure`]: with a drawing for narrow screens.
    """
    counts = flow.counts()
    told = [
        f"{step}: " + ", ".join(f"{number:,} {state}" for state, number in zip(STATES, row, strict=True) if number)
        for step, row in zip(flow.steps, counts, strict=True)
    ]
    wide = _draw(flow, max(9.0, 1.9 * len(flow.steps)), 3.6, "flow-wide")
    narrow = _draw(flow, max(3.7, 0.95 * len(flow.steps)), 3.6, "flow-narrow")
    return Figure("From stage to stage", wide, "Flow of pairs. " + "; ".join(told), narrow, is_wide=True)


def _draw(flow: Flow, width: float, height: float, name: str) -> Markup:
    counts, moves = flow.counts(), flow.transitions()
    total = max(1, len(flow.pair_id))
    tops = _tops(counts / total)
    drawing, axes = new_drawing(width, height)
    bar = 0.13 / width * len(flow.steps)  # of the distance between stacks
    for step in range(len(flow.steps)):
        for state in STATES:
            share = counts[step, STATES.index(state)] / total
            if not share:
                continue
            top = tops[step][state]
            axes.add_patch(Rectangle((step, top - share), bar, share, color=COLOURS[state], linewidth=0, zorder=3))
            number = f"{counts[step, STATES.index(state)]:,}"
            axes.text(step + 1.4 * bar, top - share / 2, number, va="center", color=INK, fontsize=9, zorder=4)
        if step < len(moves):
            _ribbons(axes, step, bar, moves[step] / total, tops[step], tops[step + 1])
    axes.set_xlim(-0.02, len(flow.steps) - 1 + bar + 0.42)
    axes.set_ylim(-1 - _GAP * len(STATES), 0.02)
    for step, title in enumerate(flow.steps):
        axes.text(step, 0.05, title.replace(", ", "\n"), color=MUTED, fontsize=9, va="bottom")
    axes.set_axis_off()
    return as_svg(drawing, name)


def _tops(shares: np.ndarray) -> list[dict[str, float]]:
    """Where each state of each stack begins, from 0 downwards."""
    found = []
    for row in shares:
        place, tops = 0.0, {}
        for state in _ORDER:
            share = row[STATES.index(state)]
            tops[state] = place
            place -= share + (_GAP if share else 0)
        found.append(tops)
    return found


def _ribbons(axes, step: int, bar: float, moves: np.ndarray, left: dict, right: dict) -> None:
    left, right = dict(left), dict(right)
    x0, x1 = step + bar, step + 1
    middle = (x0 + x1) / 2
    for source in _ORDER:
        for target in _ORDER:
            share = moves[STATES.index(source), STATES.index(target)]
            if not share:
                continue
            a, b = left[source], right[target]
            left[source], right[target] = a - share, b - share
            points = [(x0, a), (middle, a), (middle, b), (x1, b), (x1, b - share)]
            points += [(middle, b - share), (middle, a - share), (x0, a - share), (x0, a)]
            codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
            # What comes back from being dropped has the colour of what it becomes.
            axes.add_patch(PathPatch(Path(points, codes), color=COLOURS[target], alpha=0.3, linewidth=0, zorder=2))
