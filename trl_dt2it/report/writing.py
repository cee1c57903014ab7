"""Puts the report together, out of whatever a run of rounds and evaluations have left."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..curation.rounds.config import Loaders
from ..utils import whole_file
from .evaluations import Evaluation, benchmarks, read_evaluation
from .flow import Flow, read_flow
from .gallery import gallery_items
from .page import Section, render
from .rewards import calibration, reward_distributions, scored_sets
from .run_folder import RunFolder, read_run_folder
from .sections import NO_RUN, NOT_DECIDED, curation_flow, strengths, trained
from .style_section import audits_of, read_audit, style_leakage


def write_report(
    output: str | os.PathLike,
    *,
    run: str | os.PathLike | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
    style_before: str | os.PathLike | None = None,
    style_after: str | os.PathLike | None = None,
    pool: Dataset | None = None,
    loaders: Loaders | None = None,
    gallery: int = 300,
    title: str | None = None,
) -> Path:
    """
    Writes a report: one HTML file that holds all it shows and fetches nothing.

    Args:
        output (`str` or `os.PathLike`):
            The file.
        run (`str` or `os.PathLike`, *optional*):
            Folder of a run of `recipes/dt2it.py`; it need not have ended.
        evaluations (sequence of `str` or `os.PathLike`, *optional*):
            Files that `recipes/evaluate.py` wrote (`evaluation.json`). Scores that lie beside are shown too.
        style_before, style_after (`str` or `os.PathLike`, *optional*):
            Audits of style before and after curation, from `StyleReport.to_json`. By default the run's pool is
            audited, unless `style_before.json` and `style_after.json` are in its folder.
        pool (`Dataset`, *optional*):
            The run's noisy set with `pair_id`, where it is at hand; by default it is read as the run has read it.
        loaders (`Mapping[str, Callable]`, *optional*):
            Functions that load kinds of sources that only the run's recipe knows, such as
            [`trl_dt2it.demo.sets.DEMO_LOADERS`].
        gallery (`int`, *optional*, defaults to `300`):
            Most pairs in the gallery, half of them the strongest flips.
        title (`str`, *optional*):
            Title of the page.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: if there is nothing to report on, or a file is not what it should be.

    Example:

    ```python
    >>> from trl_dt2it.report import write_report

    >>> write_report("report.html", run="outputs/dt2it_digits")
    ```
    """
    if run is None and not evaluations and style_before is None and style_after is None:
        raise ValueError("There is nothing to report on; give `run`, `evaluations`, or an audit of style.")
    folder = None if run is None else read_run_folder(Path(run), pool, loaders)
    read = [read_evaluation(path) for path in evaluations]
    flow = read_flow(folder.ledger) if folder is not None and folder.ledger is not None else None
    if flow is not None and not len(flow.pair_id):  # all of it is undone
        flow = None
    sets = scored_sets(folder, read)
    items = _items(folder, flow, gallery)
    sections = [
        trained(folder),
        strengths(folder, flow),
        _style(folder, style_before, style_after),
        curation_flow(folder, flow),
        reward_distributions(sets),
        calibration(sets),
        benchmarks(read),
        _gallery(folder, flow, items),
    ]
    page = render(title or _title(folder, read), sections, subtitle=_subtitle(folder, flow), gallery=items)
    with whole_file(output) as part:
        part.write_bytes(page.encode("utf-8", "replace"))  # JSON may hold half a character
    return Path(output)


def _style(run: RunFolder | None, before: Any, after: Any) -> Section:
    if before is not None or after is not None:
        given = {"before": before, "after": after}
        return style_leakage({name: read_audit(path) for name, path in given.items() if path is not None}, "", [])
    if run is None:
        return style_leakage({}, "no audit was given (`--style_before`, `--style_after`), and no run.", [])
    audits, notes = audits_of(run)
    return style_leakage(audits, f"{run.problem}.", notes)


def _items(run: RunFolder | None, flow: Flow | None, most: int) -> dict[str, Any] | None:
    if run is None or flow is None or run.ledger is None or run.pool is None or not most:
        return None
    items = gallery_items(run.pool, run.ledger, flow, most=most, options=run.image_options())
    source_set = run.ledger.source_set
    # Verdicts in a browser are kept by what the report is of.
    return {**items, "source_set": source_set, "report": f"{source_set} {len(run.ledger.rounds)}"}


def _gallery(run: RunFolder | None, flow: Flow | None, items: dict[str, Any] | None) -> Section:
    key, title = "gallery", "Pairs"
    if run is None or flow is None:
        return Section(key, title, missing=NO_RUN if run is None else NOT_DECIDED)
    if items is None:
        return Section(key, title, missing=f"{run.problem or 'no pairs were asked for (`--gallery 0`)'}.")
    return Section(
        key,
        title,
        lead="The strongest flips first. Say of each whether what became of it is right; then export the verdicts and "
        "give them to the ledger, where a person's word stands against all rounds:",
        command=f"python recipes/report.py --run {shlex.quote(str(run.directory))} --corrections corrections.json",
    )


def _title(run: RunFolder | None, evaluations: Sequence[Evaluation]) -> str:
    if run is not None:
        return f"Curation report: {run.directory.resolve().name}"
    return f"Evaluation report: {Path(evaluations[0].model).name}" if evaluations else "Style report"


def _subtitle(run: RunFolder | None, flow: Flow | None) -> str:
    if run is None:
        return ""
    started = f"Run of {run.record['started'][:10]}" if run.record else "Run of unknown date"
    rounds = "" if flow is None else f", {len(flow.pair_id):,} pairs in {len(flow.steps) - 1} stages of curation"
    return started + rounds + ("" if run.summary else "; not ended yet")
