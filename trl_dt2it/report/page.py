"""The page of a report, and the run folder that it reads."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..curation.ledger import CurationLedger
from ..curation.rounds.config import Loaders, read_sets
from ..curation.rounds.results import FINAL_NAMES, read_record
from ..data.contents import pair_ids
from ..data.images import ImageOptions
from ..data.mixing import with_columns
from ..scoring.shards import read_scores
from ..utils import digest, is_aside, read_json
from .figures import Figure


@dataclass(frozen=True)
class RunFolder:
    """A run of rounds, or as much as there is of it."""

    directory: Path
    record: dict[str, Any] | None  # `run.json`: what the run was told
    summary: dict[str, Any] | None  # `summary.json`, once the run has ended
    stages: dict[str, dict[str, Any]]  # `stage.json` of each stage that is done, by its name
    ledger: CurationLedger | None  # once it has decided about anything
    pool: Dataset | None  # the noisy set, with the ledger's names in `pair_id`
    problem: str | None = None  # why there is no pool
    rewards: dict[str, np.ndarray] = field(default_factory=dict)  # (n, 2), of each final model that was tested

    def image_options(self) -> ImageOptions:
        """Return where the run's images may come from; nothing is fetched."""
        given = {} if self.record is None else self.record["images"]
        return ImageOptions(**{name: value for name, value in given.items() if value is not None})

    def is_scored(self) -> bool:
        """Tell a run whose ledger holds a stage."""
        return self.ledger is not None and bool(self.ledger.rounds)


def read_run_folder(directory: Path, pool: Dataset | None = None, loaders: Loaders | None = None) -> RunFolder:
    """Read the folder of a run; the noisy set, with `pair_id`, too if it is not at hand, as `run.json` says."""
    files = sorted(directory.rglob("stage.json")) if directory.is_dir() else []
    files = [file for file in files if not is_aside(file.relative_to(directory))]
    has_ledger = (directory / "ledger/ledger.json").is_file()
    if not files and not has_ledger:
        raise ValueError(f"{directory} is no folder of a run of recipes/dt2it.py: it has no stage that is done.")
    # In the order in which they were done.
    files.sort(key=lambda file: file.stat().st_mtime)
    stages = {str(file.parent.relative_to(directory)): read_json(file) for file in files}
    record, problem = read_record(directory), None
    if pool is None:
        pool, problem = _read_pool(record, loaders)
    tested = {name.removeprefix("test/"): directory / name for name in stages if name.startswith("test/")}
    rewards = {}
    for name in sorted(tested, key=list(FINAL_NAMES).index):
        table = read_scores(tested[name])
        rewards[name] = np.stack([table[side].to_numpy() for side in ("chosen", "rejected")], axis=1)
    return RunFolder(
        directory,
        record,
        read_json(directory / "summary.json"),
        stages,
        CurationLedger(directory / "ledger") if has_ledger else None,
        pool,
        problem,
        rewards,
    )


def _read_pool(record: Mapping[str, Any] | None, loaders: Loaders | None) -> tuple[Dataset | None, str | None]:
    if record is None:
        return (
            None,
            "the run has no run.json, as runs of older releases have none, and so does not say where its pool is",
        )
    try:
        rows = read_sets("pool", record["sets"]["pool"], loaders)
        rows = with_columns(rows, {"pair_id": pair_ids(rows)})
    except (ValueError, OSError) as error:
        return None, f"the pool cannot be read again: {error}"
    return rows, None


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    title: str  # What stands above it
    columns: Sequence[str]  # Heads
    rows: Sequence[Sequence[str]]  # Cells
    # `l` or `r` for each column; by default the first is text, on the left, and the others are numbers
    align: str = ""
    is_folded: bool = False  # Whether it opens by a click only

    def classes(self) -> list[str]:
        """The class of the cells of each column."""
        align = self.align or "l" + "r" * (len(self.columns) - 1)
        return ["number" if one == "r" else "words" for one in align]


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str  # Its name in addresses
    title: str  # Its title
    lead: str = ""  # What one sees, in a sentence or two
    warnings: Sequence[str] = ()  # What went wrong, in red, above all else
    missing: str | None = None  # Why there is nothing to see
    command: str = ""  # A command line that goes with it
    legend: Sequence[tuple[str, str]] = ()  # Class of a mark, and what it stands for
    figures: Sequence[Figure] = ()  # Figures
    tables: Sequence[Table] = ()  # Tables
    facts: Sequence[tuple[str, str]] = ()  # Names and values, above all else
    notes: Sequence[str] = field(default_factory=tuple)  # What else a reader has to know


def render(
    title: str, sections: Sequence[Section], *, subtitle: str = "", gallery: Mapping[str, Any] | None = None
) -> str:
    """The page as text."""
    loader = PackageLoader("trl_dt2it.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (_own_file(name) for name in ("report.css", "report.js"))
    # The browser runs this script and no other, and asks no other machine for anything.
    script_hash = base64.b64encode(bytes.fromhex(digest(script))).decode()
    return environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        gallery=gallery,
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        script_hash=script_hash,
    )


def _own_file(name: str) -> str:
    return files("trl_dt2it.report").joinpath("templates", name).read_text(encoding="utf-8")
