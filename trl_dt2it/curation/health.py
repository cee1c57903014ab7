"""Health of the model that judges labels: where it can be believed, before any flip is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evaluation.metrics import wilson
from ..utils import printable
from .noise import MIN_PAIRS, NoiseEstimate, bin_margins


NO_REFERENCE = (
    "There are no pairs known to be right, and so a bias that the model has throughout cannot be told from wrong "
    "labels: little is flipped; pass `reference` rows to flip more."
)

_DONE = {
    "read": "read",
    "hardly read": "hardly read",
    "not read": "not read, left alone",
    "unknown": "too few pairs to tell",
}


def num_references(count: int) -> int:
    """Return how many of so many trusted pairs are held out to tell how far a model can be believed; 0 if too few."""
    held_out = min(count // 4, max(200, count // 10), 1000)
    return held_out if held_out >= MIN_PAIRS else 0


def describe_health(
    estimates: Mapping[str | None, NoiseEstimate], reference: np.ndarray | None = None
) -> dict[str, Any] | None:
    """Return what a decision rests on, as JSON for the ledger; `None` of rules that estimate nothing. The reward
    margins `(R,)` are of pairs known to be right."""
    if not estimates:
        return None
    known = None
    if reference is not None:
        margins = reference[~np.isnan(reference)]
        accuracy = float(np.mean(margins > 0) + np.mean(margins == 0) / 2)
        known = {"pairs": len(margins), "accuracy": accuracy, "interval": list(wilson(accuracy, len(margins)))}
        known["curve"] = {name: np.round(values, 4).tolist() for name, values in bin_margins(margins).items()}
    sources = {"" if name is None else name: estimate.summary() for name, estimate in estimates.items()}
    return {"reference": known, "sources": sources}


def show_health(health: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a decision rests on."""
    console, known = console or Console(), health["reference"]
    told = NO_REFERENCE
    if known is not None:
        low, high = known["interval"]
        told = f"On {known['pairs']:,} pairs known to be right, the model is right in {known['accuracy']:.1%}"
        told += f" ({low:.1%} to {high:.1%})."
    table = Table("source", title="Can the model be believed?", caption=told)
    for column in ("pairs", "contradicted", "accuracy", "wrong labels", "flipped"):
        table.add_column(column, justify="right")
    table.add_column("the model reads it")
    for name, source in health["sources"].items():
        style = {"not read": "bold red", "hardly read": "yellow"}.get(source["reading"])
        is_fitted, share = source["rate"] is not None, source["contradicted"]
        table.add_row(
            Text(printable(name) or "all"),
            f"{source['pairs']:,}",
            "" if share is None else f"{share:.1%}",
            "{:.0%} to {:.0%}".format(*source["accuracy_interval"]) if is_fitted else "",
            "{:.0%} to {:.0%}".format(*source["interval"]) if is_fitted else "",
            f"{source['flipped']:,}",
            _DONE[source["reading"]],
            style=style,
        )
    console.print(table)
