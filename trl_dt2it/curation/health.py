"""Health of the model that judges labels: where it can be believed, before any flip is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.contents import pair_contents
from ..debias.audit import audit_style
from ..evaluation.metrics import wilson
from ..utils import printable
from .ledger import CurationLedger
from .noise import MIN_PAIRS, NoiseEstimate, bin_margins


NO_REFERENCE = (
    "There are no pairs known to be right, and so a bias that the model has throughout cannot be told from wrong "
    "labels: little is flipped; pass `reference` rows, or a base of at least 80 pairs to the rounds, to flip more."
)

MOST_AUDITED = 20_000  # pairs drawn from a larger pool: enough for the third digit, within some seconds

# A smaller change of an accuracy on one source, or of a leakage, is not called harm.
LEAST_CHANGE = 0.01

# Pairs known to be right that tell the accuracy of a model well, also at large margins: where it reads badly, 75 of
# them leave most noise undecided.
_ENOUGH = 200

_MOST_NAMED = 6  # sources, in a sentence

_READINGS = {
    "read": "read",
    "hardly read": "hardly read",
    "not read": "not read, left alone",
    "unknown": "too few pairs to tell",
}


def num_references(count: int) -> int:
    """Return how many of so many trusted pairs are held out to tell how far a model can be believed; 0 if too few."""
    held_out = min(count // 4, max(_ENOUGH, count // 10), 1000)
    return held_out if held_out >= MIN_PAIRS else 0


def num_reference_parts(count: int) -> int:
    """Return in how many parts the rounds hold trusted pairs out, one from each model: a single one if it is large
    enough for all, four that together are all pairs if these are few, and 0 if they are too few."""
    held_out = num_references(count)
    return (1 if held_out >= _ENOUGH else 4) if held_out else 0


def draw_references(groups: np.ndarray) -> np.ndarray:
    """Draw the trusted rows that are held out, ascending: whole groups, of the group of each row `(N,)`; none if that
    would take more than half."""
    count, sizes = num_references(len(groups)), np.bincount(groups) if len(groups) else np.zeros(0, dtype=np.int64)
    order = np.random.default_rng(42).permutation(len(sizes))
    drawn = order[: np.searchsorted(np.cumsum(sizes[order]), count) + 1] if count else order[:0]
    rows = np.flatnonzero(np.isin(groups, drawn))
    return rows if len(rows) <= len(groups) / 2 else rows[:0]


def describe_health(
    estimates: Mapping[str | None, NoiseEstimate], reference: np.ndarray | None = None
) -> dict[str, Any] | None:
    """Return what a decision rests on, as JSON for the ledger; `None` of rules that estimate nothing. The reward
    margins `(R,)` are of pairs known to be right."""
    if not estimates:
        return None
    known = None
    margins = np.empty(0) if reference is None else reference[~np.isnan(reference)]
    if len(margins):
        accuracy = float(np.mean(margins > 0) + np.mean(margins == 0) / 2)
        known = {"pairs": len(margins), "accuracy": accuracy, "interval": list(wilson(accuracy, len(margins)))}
        known["curve"] = {name: np.round(values, 4).tolist() for name, values in bin_margins(margins).items()}
    nameless = "no source" if "" in estimates else ""
    sources = {nameless if name is None else name: estimate.summary() for name, estimate in estimates.items()}
    return {"reference": known, "sources": sources}


def source_title(name: str, health: Mapping[str, Any]) -> str:
    """Return the name of a source to show; pairs without a source are all pairs, or those of no source."""
    return printable(name) or ("all pairs" if len(health["sources"]) == 1 else "no source")


def tell_reading(source: Mapping[str, Any]) -> str:
    """Tell in a few words how the model reads a source, and why nothing may be flipped there."""
    is_unsure = source["reading"] in ("read", "hardly read") and not source["is_identified"]
    return _READINGS[source["reading"]] + (", its noise unsure: left alone" if is_unsure else "")


def tell_accuracy(health: Mapping[str, Any]) -> str:
    """Tell the accuracy on pairs known to be right, or that there are none."""
    if (known := health["reference"]) is None:
        return NO_REFERENCE
    low, high = known["interval"]
    told = f"On {known['pairs']:,} pairs known to be right, the model is right in {known['accuracy']:.1%}"
    return f"{told} ({low:.1%} to {high:.1%})."


def tell_health(health: Mapping[str, Any]) -> str:
    """Tell in a sentence which sources the model reads."""
    names: dict[str, list[str]] = {reading: [] for reading in _READINGS}
    for name, source in health["sources"].items():
        names[source["reading"]].append(source_title(name, health))

    def those(reading: str) -> str:
        named, more = names[reading][:_MOST_NAMED], len(names[reading]) - _MOST_NAMED
        return ", ".join([*map(repr, named), *([f"{more:,} more"] if more > 0 else [])])

    count, total = len(names["read"]), len(health["sources"])
    parts = [f"reads {count:,} of {total:,} source{'s' if total > 1 else ''}"]
    parts += [f"hardly reads {those('hardly read')}"] if names["hardly read"] else []
    parts += [f"does not read {those('not read')}, which it leaves alone"] if names["not read"] else []
    parts += [f"has too few pairs of {those('unknown')} to tell"] if names["unknown"] else []
    return f"The model {'; it '.join(parts)}."


def show_health(health: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a decision rests on: a result, which is shown where progress bars are not; by one process."""
    console = console or Console()
    # Of a terminal of 80 columns, numbers take what they need, and names the rest, in several lines.
    table = Table(title="Can the model be believed?", caption=tell_accuracy(health), box=box.SIMPLE)
    table.add_column("source", overflow="fold")
    for column in ("pairs", "contra-\ndicted", "accuracy", "wrong\nlabels", "flipped"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("reading")
    for name, source in health["sources"].items():
        style = {"not read": "bold red", "hardly read": "yellow"}.get(source["reading"])
        table.add_row(Text(source_title(name, health)), *health_cells(source), tell_reading(source), style=style)
    console.print(table)
    console.print(tell_health(health), markup=False, highlight=False)


def health_cells(source: Mapping[str, Any]) -> list[str]:
    """Return pairs, share contradicted, accuracy, wrong labels and flips of a source, empty where not known."""
    is_fitted, share = source["rate"] is not None, source["contradicted"]
    ends = [source["accuracy_interval"], source["interval"]]
    intervals = [f"{100 * one[0]:.0f}-{one[1]:.0%}" if is_fitted else "" for one in ends]
    return [f"{source['pairs']:,}", "" if share is None else f"{share:.1%}", *intervals, f"{source['flipped']:,}"]


def audited_rows(count: int) -> np.ndarray:
    """Draw the rows of so many whose style is audited, ascending; all if they are few."""
    if count <= MOST_AUDITED:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, MOST_AUDITED, replace=False))


def audit_pool(
    pool: Dataset, ledger: CurationLedger | None, contents: Callable[[Dataset], pa.Table] = pair_contents
) -> dict[str, dict[str, Any]]:
    """Audit the style of a pool as labelled by its sources, and after curation by a ledger."""
    if len(pool) > MOST_AUDITED:
        pool = pool.select(audited_rows(len(pool)))
    audits = {"before": asdict(audit_style(pool))}
    if ledger is not None:
        audits["after"] = asdict(audit_style(ledger.apply(pool, contents=contents(pool))))
    return audits


def style_rises(audits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the sources, or without any the set, whose style tells more of their labels after curation than before."""
    sentences = []
    before, after = (
        (audit.get("sources") or {"": audit["overall"]}) if (audit := audits.get(when)) else {}
        for when in ("before", "after")
    )
    for source in sorted(set(before) & set(after), key=str):
        was, now, whose = before[source]["auc"], after[source]["auc"], f" of {source!r}" if source else ""
        if None not in (was, now) and after[source]["interval"][0] > was and now - was > LEAST_CHANGE:
            sentences.append(
                f"Style tells more of the labels{whose} after curation than before (leakage {was:.3f} to {now:.3f}): "
                "wrong labels hid it, or the model follows style; look at what was flipped there."
            )
    return sentences
