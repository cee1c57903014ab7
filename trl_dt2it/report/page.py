"""The page of a report, and the run folder that it reads."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..curation.ledger import CurationLedger
from ..curation.rounds.config import Loaders, read_sets
from ..curation.rounds.results import FINAL_NAMES, read_record
from ..data.contents import pair_ids
from ..data.images import ImageOptions
from ..data.mixing import with_columns
from ..data.rows import SIDES
from ..scoring.shards import read_scores
from ..utils import digest, is_aside, read_json
from .figures import Figure


@dataclass(frozen=True)
class RunFolder:
    """A run of rounds, finished or not."""

    directory: Path
    record: dict[str, Any] | None  # `run.json`, the settings
    summary: dict[str, Any] | None  # `summary.json`, once the run has ended
    stages: dict[str, dict[str, Any]]  # `stage.json` of each finished stage, by name
    ledger: CurationLedger | None  # once there is a decision
    pool: Dataset | None  # the noisy set, with the names of the ledger in `pair_id`
    problem: str | None = None  # why there is no pool
    rewards: dict[str, np.ndarray] = field(default_factory=dict)  # (n, 2), of each final model that was tested

    def image_options(self) -> ImageOptions:
        """Return the folder and limits of the run's images; nothing is fetched."""
        given = {} if self.record is None else self.record["images"]
        return ImageOptions(**{name: value for name, value in given.items() if value is not None})


def read_run_folder(directory: Path, pool: Dataset | None = None, loaders: Loaders | None = None) -> RunFolder:
    """Read the folder of a run, and its noisy set as in `run.json`, unless the `pool` with `pair_id` is passed."""
    files = [file for file in sorted(directory.rglob("stage.json")) if not is_aside(file.relative_to(directory))]
    has_ledger = (directory / "ledger/ledger.json").is_file()
    if not files and not has_ledger:
        raise ValueError(f"{directory} is no folder of a run of recipes/dt2it.py: it has no stage that is done.")
    files.sort(key=lambda file: file.stat().st_mtime)  # in the order in which they were done
    stages = {str(file.parent.relative_to(directory)): read_json(file) for file in files}
    record, problem = read_record(directory), None
    if pool is None and record is not None:
        try:
            rows = read_sets("pool", record["sets"]["pool"], loaders)
            pool = with_columns(rows, {"pair_id": pair_ids(rows)})
        except (ValueError, OSError) as error:
            problem = f"the pool cannot be read again: {error}"
    elif pool is None:
        problem = "the run has no run.json (it is of an older release), and so does not say where its pool is"
    summary = read_json(directory / "summary.json")
    ledger = CurationLedger(directory / "ledger") if has_ledger else None
    tested = [name.removeprefix("test/") for name in stages if name.startswith("test/")]
    names = sorted(tested, key=list(FINAL_NAMES).index)
    rewards = {name: stack_rewards(read_scores(directory / "test" / name)) for name in names}
    return RunFolder(directory, record, summary, stages, ledger, pool, problem, rewards)


def stack_rewards(table: pa.Table) -> np.ndarray:
    """Return the rewards of chosen and rejected, `(n, 2)`."""
    return np.stack([table[side].to_numpy() for side in SIDES], axis=1)


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    title: str
    columns: Sequence[str]  # heads
    rows: Sequence[Sequence[str]]
    align: str = ""  # `l` for text and `r` for numbers, by column; by default, text in the first column alone
    is_folded: bool = False  # opens at a click

    def classes(self) -> list[str]:
        """Return the CSS class of the cells of each column."""
        align = self.align or "l" + "r" * (len(self.columns) - 1)
        return ["number" if one == "r" else "words" for one in align]


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str  # anchor in the address
    title: str
    lead: str = ""  # a sentence or two on top
    warnings: Sequence[str] = ()  # in red, above all else
    missing: str | None = None  # the reason why there is nothing to see
    command: str = ""  # a command line that goes with it
    legend: Sequence[tuple[str, str]] = ()  # class of a mark, and its meaning
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str]] = ()  # names and values, above the figures
    notes: Sequence[str] = ()


def render(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    warnings: Sequence[str] = (),
    gallery: Mapping[str, Any] | None = None,
) -> str:
    """Render the page."""
    loader = PackageLoader("trl_dt2it.report")
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, script = (loader.get_source(env, name)[0] for name in ("report.css", "report.js"))
    return env.get_template("report.html").render(
        {"title": title, "subtitle": subtitle, "warnings": warnings, "sections": sections, "gallery": gallery},
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        # The browser runs this script and no other, and asks no other machine for anything.
        script_hash=base64.b64encode(bytes.fromhex(digest(script))).decode(),
    )
