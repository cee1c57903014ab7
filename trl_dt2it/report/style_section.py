"""Style leakage before and after: of the constructed data where a run balanced it, else of the pool."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..curation.rounds.results import MOST_AUDITED, audit_pool
from ..curation.rounds.sets import STAGE as BALANCE
from ..data.contents import pair_contents
from .figures import bars
from .page import Section, Table
from .run_folder import RunFolder


MOST_FEATURES = 10


def read_audit(path: str | os.PathLike) -> dict[str, Any]:
    """
    Reads what [`~trl_dt2it.debias.tables.StyleReport.to_json`] gave.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        `dict`: `overall` and `sources`.

    Raises:
        `ValueError`: if it is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give what `StyleReport.to_json` wrote.") from error
    if not isinstance(content, dict) or not {"overall", "sources"} <= set(content):
        raise ValueError(f"{path} is no audit of style; give what `StyleReport.to_json` wrote.")
    return content


def audits_of(run: RunFolder) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """
    Audits of a run's constructed data before and after balancing; without it, of the pool as it came and as it is now.

    Args:
        run ([`RunFolder`]):
            The run; `style_before.json` and `style_after.json` in its folder win over both.

    Returns:
        `tuple[dict, list]`: audits by `"before"` and `"after"`, and notes on how they were made.
    """
    for folder, notes in ((run.directory, []), (run.directory / BALANCE, ["Of the constructed data, weighted."])):
        files = {name: folder / f"style_{name}.json" for name in ("before", "after")}
        if found := {name: read_audit(file) for name, file in files.items() if file.is_file()}:
            return found, notes
    if run.pool is None:
        return {}, []
    notes = []
    if len(run.pool) > MOST_AUDITED:
        notes.append(f"Measured on {MOST_AUDITED:,} pairs, drawn of {len(run.pool):,}.")
    root = run.image_options().image_root
    ledger = run.ledger if run.is_scored() else None
    return audit_pool(run.pool, ledger, lambda pool: pair_contents(pool, image_root=root)), notes


def style_leakage(audits: Mapping[str, Mapping[str, Any]], why_not: str, notes: list[str]) -> Section:
    """
    How far style tells which answer was chosen, before and after, and the features that carry it.

    Args:
        audits (`Mapping[str, Mapping]`):
            One or two audits, by what they are called.
        why_not (`str`):
            Why there are none, if so.
        notes (`list[str]`):
            How they were made.

    Returns:
        [`Section`]
    """
    key, title = "style", "Style leakage"
    if not audits:
        return Section(key, title, missing=why_not)
    rows = []
    names = list(dict.fromkeys(name for audit in audits.values() for name in audit["sources"]))
    for source in ["all pairs", *(names if len(names) > 1 else [])]:
        for when, audit in audits.items():
            part = audit["overall"] if source == "all pairs" else audit["sources"].get(source)
            if part is not None:
                rows.append([source, when, f"{part['num_pairs']:,}", *_leakage(part)])
    columns = ("pairs of", "", "pairs", "AUC", "95 % interval", "note")
    last = list(audits.values())[-1]["overall"]["features"]
    first = list(audits.values())[0]["overall"]["features"]
    telling = sorted(first | last, key=lambda name: -_most(name, first, last))[:MOST_FEATURES]
    telling = [name for name in telling if name in first]
    figures, legend = [], list[tuple[str, str]]()
    if telling:
        series = {
            when: {name: audit["overall"]["features"][name]["auc"] for name in telling}
            for when, audit in audits.items()
            if audit["overall"]["features"]
        }
        figures = [bars("style", "What carries it", series, xlabel="chance that chosen has more", middle=0.5)]
        # Of two, the first are marks, and the last bars.
        legend = list(zip(("tick", "filled")[-len(series) :], series, strict=True))
    return Section(
        key,
        title,
        lead="How well style alone (length, markdown, tone, ...) tells which answer was chosen, in pairs that the "
        "probe has not seen. 0.5 is not at all, 1 is always.",
        legend=legend,
        figures=figures,
        tables=(Table("Leakage", columns, rows, "llrrrl"),),
        notes=notes,
    )


def _leakage(part: Mapping[str, Any]) -> list[str]:
    if part["auc"] is None:
        return ["", "", part["note"] or ""]
    low, high = part["interval"]
    return [f"{part['auc']:.3f}", f"{low:.3f} to {high:.3f}", ""]


def _most(name: str, *features: Mapping[str, Any]) -> float:
    return max(abs(one[name]["auc"] - 0.5) if name in one else 0.0 for one in features)
