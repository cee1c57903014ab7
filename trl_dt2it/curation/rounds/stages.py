"""A long run as a list of stages, each done once, whenever the run is killed.

```
output_dir/
  round-1/score/model-0/begun.json     the claim: a digest of all that the result depends on
  round-1/score/model-0/...            the result
  round-1/score/model-0/stage.json     the record; written last, so it marks the stage as done
```
A digest covers the settings of a stage and the digests of its inputs, so changing a setting repeats the stages that
depend on it and no other. Results of other settings are moved aside, to `model-0.old-1` beside `model-0`, and come
back when these settings are restored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from filelock import FileLock
from rich.console import Console
from rich.table import Column, Table

from ... import __version__
from ...processes import check_shared_folder, gather, on_main_process, run_lock
from ...scoring.shards import claim, record_of
from ...utils import digest_of, move_aside, moved_aside, write_json


_LOCK = ".stages.lock"  # held while folders move, by one of the machines that share them


@dataclass(frozen=True)
class Stage:
    """One step of a run, with all that its result depends on."""

    name: str  # also its folder under the output directory
    # Called on every process with the folder, which may hold files of a killed call; the first process's counts count.
    run: Callable[[Path], Mapping[str, Any] | None]
    settings: Mapping[str, Any]  # JSON, all that the result depends on besides `inputs`
    inputs: tuple[str, ...] = ()  # earlier stages whose results it reads
    expected: Mapping[str, Any] = field(default_factory=dict)  # at most: `pairs`, `steps`, `calls`; estimated: `USD`
    is_shared: bool = False  # among machines: `run` returns `None` while the parts of others are not done
    is_replayed: bool = False  # writes outside of its folder too, so it runs again when its folder comes back


def stage_digests(stages: Sequence[Stage]) -> dict[str, str]:
    """Return the digest of each stage, by name."""
    digests: dict[str, str] = {}
    for stage in stages:
        if stage.name in digests:
            raise ValueError(f"Two stages are called {stage.name}.")
        if missing := [name for name in stage.inputs if name not in digests]:
            raise ValueError(f"{stage.name} reads {missing[0]}, which is not among the stages before it.")
        parts = {"settings": stage.settings, "inputs": [digests[name] for name in stage.inputs]}
        digests[stage.name] = digest_of({**parts, "version": __version__})
    return digests


def run_stages(
    stages: Sequence[Stage],
    output_dir: Path,
    *,
    only_shared: bool = False,
    stop_before: str | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Do all unfinished stages, on all processes together, up to a name that begins with `stop_before`; with
    `only_shared`, as one of several machines, up to a stage that is not shared. Return the records of finished stages.
    """
    check_shared_folder(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    digests, records = stage_digests(stages), dict[str, dict[str, Any]]()
    console = console or Console()

    def say(title: str, text: str) -> None:
        if PartialState().is_main_process:
            console.print(f"{title}{text}", markup=False, highlight=False, soft_wrap=True)

    # Each of several machines holds its part of the folder, which the caller locks.
    with nullcontext() if only_shared else run_lock(output_dir):
        for number, stage in enumerate(stages, 1):
            title = f"{number}/{len(stages)} {stage.name}"
            folder, digest = output_dir / stage.name, digests[stage.name]
            on_main_process(partial(_bring_back, output_dir, stage, digest, partial(say, f"{title}: ")))
            if (record := on_main_process(partial(record_of, folder / "stage.json", digest))) is not None:
                records[stage.name] = record
                continue
            if only_shared and not stage.is_shared:
                say(title, ": run it without `--shard`, on one machine or on all as one launch.")
                break
            if stop_before is not None and stage.name.startswith(stop_before):
                say(title, ": stopped before it.")
                break
            say(title, " ...")
            on_main_process(partial(_begin, output_dir, stage, digest, partial(say, f"{title}: ")))
            start = time.perf_counter()
            counts = stage.run(folder)
            seconds = round(time.perf_counter() - start, 1)
            made: dict[str, Any] = {"stage": stage.name, "digest": digest, "counts": counts, "seconds": seconds}
            # A stage is done when all processes are through, and only then may any continue.
            record = gather(made)[0]
            if record["counts"] is None:
                say(title, ": this machine's part is done; others are still at work.")
                break
            on_main_process(partial(write_json, folder / "stage.json", record))
            records[stage.name] = record
            numbers = {name: value for name, value in record["counts"].items() if isinstance(value, (int, float))}
            told = ", ".join(f"{k} {_number(v)}" for k, v in numbers.items() if not isinstance(v, bool))
            say(title, f" done in {seconds:.0f} s" + (f": {told}" if told else ""))
    return records


def show_plan(stages: Sequence[Stage], output_dir: Path, console: Console | None = None) -> None:
    """Print the state of each stage, and what is left to do."""
    digests = stage_digests(stages)
    told = "pairs, steps, calls: at most; USD: estimated from a sample of pairs, each reply at its longest"
    columns = ["pairs", "steps", "calls", "USD"]
    if any("times seen" in stage.expected for stage in stages):
        columns.insert(2, "times seen")
        told += "; times seen: each pair, by a fixed number of steps"
    table = Table(Column("stage", overflow="fold"), "state", title=f"Plan of {output_dir}", caption=told)
    for column in columns:
        table.add_column(column.replace(" ", "\n"), justify="right")
    total = np.zeros(len(columns))
    for stage in stages:
        digest = digests[stage.name]
        before = _made_before(output_dir / stage.name, digest)
        folder = before or output_dir / stage.name
        is_done = record_of(folder / "stage.json", digest) is not None and not (before and stage.is_replayed)
        state = "done" if is_done else "begun" if _has_begun(folder, digest) else "to do"
        values = [stage.expected.get(name) for name in columns]
        table.add_row(stage.name, state, *map(_cell, columns, values))
        if not is_done:
            total += [value or 0 for value in values]
    table.add_section()
    sums = [None if name in ("pairs", "times seen") else value for name, value in zip(columns, total, strict=True)]
    table.add_row("to do in all", "", *map(_cell, columns, sums))
    (console or Console()).print(table)


def _has_begun(folder: Path, digest: str) -> bool:
    return record_of(folder / "begun.json", digest) is not None


def _made_before(folder: Path, digest: str) -> Path | None:
    """Find where the result of a stage with this digest was moved aside, unless it is in its place."""
    if _has_begun(folder, digest):
        return None
    return next((place for place in moved_aside(folder) if _has_begun(place, digest)), None)


def _bring_back(output_dir: Path, stage: Stage, digest: str, say: Callable[[str], None]) -> None:
    """Put an earlier result with this digest back into its place, and say what was moved where."""
    folder = output_dir / stage.name
    if _made_before(folder, digest) is None:
        return
    with FileLock(output_dir / _LOCK):
        before = _made_before(folder, digest)
        if before is None:  # another machine was faster
            return
        if stage.is_replayed:
            (before / "stage.json").unlink(missing_ok=True)
        aside = move_aside(folder) if (folder / "begun.json").is_file() else None
        before.rename(folder)
    _say_moved(aside, say)
    say(f"made with these settings before, and back from {before}.")


def _begin(output_dir: Path, stage: Stage, digest: str, say: Callable[[str], None]) -> None:
    """Claim the folder of a stage, and keep files of an interrupted run of it; say what was moved where."""
    with FileLock(output_dir / _LOCK):
        _say_moved(claim(output_dir / stage.name / "begun.json", digest), say)


def _say_moved(aside: Path | None, say: Callable[[str], None]) -> None:
    if aside is not None:
        say(f"what was made with other settings is now in {aside}.")


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if column == "times seen" else _number(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"
