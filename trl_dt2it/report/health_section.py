"""The first section of a report: how far the model that judged labels can be believed, and what it saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..curation.health import health_cells, source_title, tell_accuracy, tell_health, tell_reading
from ..curation.ledger import CurationLedger
from .figures import ACCENT, FAINT, INK, MUTED, Figure, as_svg, new_drawing, step_title
from .page import Section, Table


MOST_CURVES = 6  # sources with a figure; the others are in the table
MOST_NAMED = 6  # sources in a sentence, likewise
_PAIRS_PER_DOT = 40  # of fewer pairs, a share says little

_COLUMNS = ("source", "pairs", "contradicted", "accuracy, 90 %", "wrong labels, 95 %", "flipped", "reading")


def health_section(ledger: CurationLedger | None) -> Section | None:
    """Show what the last decision rests on, and earlier decisions below; `None` where no rule has estimated noise."""
    entries = [] if ledger is None else [entry for entry in ledger.standing if entry.get("health")]
    if not entries:
        return None
    health = entries[-1]["health"]
    sources: Mapping[str, Mapping[str, Any]] = health["sources"]
    largest = sorted(sources, key=lambda name: -sources[name]["pairs"])
    drawn = [name for name in largest if "curves" in sources[name]]
    figures = [
        _draw_source(f"noise-{number}", source_title(name, health), sources[name])
        for number, name in enumerate(drawn[:MOST_CURVES])
    ]
    if health["reference"] is not None:
        figures.insert(0, _draw_reference(health["reference"], [sources[name] for name in drawn[:MOST_CURVES]]))
    notes = []
    if len(drawn) > MOST_CURVES:
        notes.append(f"Figures of the {MOST_CURVES} largest sources; all {len(sources):,} are in the table.")
    title = f"By source, at the last decision ({step_title(entries[-1])})"
    tables = [Table(title, _COLUMNS, [_row(health, name) for name in largest], "lrrrrrl")]
    if earlier := [[step_title(entry), *row] for entry in entries[:-1] for row in _rows(entry["health"])]:
        tables.append(Table("Earlier decisions", ("decision", *_COLUMNS), earlier, "llrrrrrl", is_folded=True))
    told = tell_health(health)
    is_bad = any(source["reading"] == "not read" for source in sources.values())
    reversed_ = [source_title(name, health) for name in largest if (sources[name]["rate"] or 0) > 0.5]
    return Section(
        "health",
        "Can the model be believed?",
        lead=" ".join([*([] if is_bad else [told]), tell_accuracy(health)]),
        warnings=[*([told] if is_bad else []), *([_tell_reversed(reversed_)] if reversed_ else [])],
        legend=_LEGEND,
        figures=figures,
        tables=tables,
        notes=notes,
    )


_LEGEND = (
    ("dot", "labels that the model contradicts, of pairs with about this margin"),
    ("band", "errors of the model, with their 90 % interval"),
    ("line", "wrong labels"),
    ("broken", "probability that a contradicted label is wrong"),
)


def _tell_reversed(titles: Sequence[str]) -> str:
    """Name the sources whose labels look reversed, the largest first."""
    named = ", ".join(map(repr, titles[:MOST_NAMED]))
    more = f" and {len(titles) - MOST_NAMED:,} more" if len(titles) > MOST_NAMED else ""
    return f"The model takes most labels of {named}{more} to be wrong: look at some of them, or drop these sources."


def _row(health: Mapping[str, Any], name: str) -> list[str]:
    source = health["sources"][name]
    return [source_title(name, health), *health_cells(source), tell_reading(source)]


def _rows(health: Mapping[str, Any]) -> list[list[str]]:
    """Tabulate an earlier decision, with the pairs known to be right first."""
    rows = [_row(health, name) for name in health["sources"]]
    if (known := health["reference"]) is not None:
        low, high = known["interval"]
        accuracy = f"{100 * low:.0f}-{high:.0%}"
        wrong = f"{1 - known['accuracy']:.1%}"
        rows.insert(0, ["known to be right", f"{known['pairs']:,}", wrong, accuracy, "", "", ""])
    return rows


def _draw_source(name: str, title: str, source: Mapping[str, Any]) -> Figure:
    """Draw what is seen in a source, and the curves that are fitted to it, by the size of the reward margin."""
    curves = {key: np.array(values) for key, values in source["curves"].items()}
    x = curves["margin"]
    drawing, axes = new_drawing()
    axes.fill_between(x, 1 - curves["accuracy_high"], 1 - curves["accuracy_low"], color=FAINT, alpha=0.6, linewidth=0)
    axes.plot(x, 1 - curves["accuracy"], color=MUTED, linewidth=1.4)
    axes.plot(x, curves["noise"], color=ACCENT, linewidth=1.6)
    axes.plot(x, curves["posterior"], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    _finish(axes, curves, 1.0)
    seen = f"{source['contradicted']:.1%} of the labels contradicted; {tell_reading(source)}"
    title = f"{title}, {source['pairs']:,} pairs"
    return Figure(title, as_svg(drawing, name), f"Contradicted and wrong labels by reward margin: {seen}")


def _draw_reference(known: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the errors on pairs known to be right beside those that are fitted on each source."""
    drawing, axes = new_drawing()
    fitted = [{name: np.array(values) for name, values in source["curves"].items()} for source in sources]
    for number, curves in enumerate(fitted):
        if number == 0:
            low, high = 1 - curves["accuracy_high"], 1 - curves["accuracy_low"]
            axes.fill_between(curves["margin"], low, high, color=FAINT, alpha=0.6, linewidth=0)
        axes.plot(curves["margin"], 1 - curves["accuracy"], color=MUTED, linewidth=1.4 if number == 0 else 0.8)
    _finish(axes, {name: np.array(values) for name, values in known["curve"].items()}, 0.6)
    title = f"Known to be right, {known['pairs']:,} pairs"
    label = f"Errors by reward margin: {1 - known['accuracy']:.1%} in all"
    return Figure(title, as_svg(drawing, "noise-reference"), label)


def _finish(axes: Axes, seen: Mapping[str, np.ndarray], top: float) -> None:
    """Draw the shares of negative margins, of neighboring bins together where these have few pairs, and the axes."""
    number = min(len(seen["pairs"]), max(5, int(seen["pairs"].sum()) // _PAIRS_PER_DOT))
    pairs, *sums = (
        np.array([part.sum() for part in np.array_split(values, number)])
        for values in (seen["pairs"], seen["pairs"] * seen["margin"], seen["pairs"] * seen["contradicted"])
    )
    x, y = (values / pairs for values in sums)
    axes.plot(x, y, "o", color=ACCENT, markersize=4)
    top = max(top, *y)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.03 * top, 1.03 * top)
    axes.set_xlabel("size of the reward margin")
    axes.set_ylabel("share")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
