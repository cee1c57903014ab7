"""A long run as a list of stages, each of which is done once, whenever the run is killed.

```
output_dir/
  round-1/score/model-0/begun.json     the claim: a digest of all that the result depends on
  round-1/score/model-0/...            what the stage makes
  round-1/score/model-0/stage.json     its record; written last, so that it says that the stage is done
```
A digest covers the settings of a stage and the digests of its inputs, so that the list is a pure function of the
configuration, and changing a setting does again what depends on it and nothing else. What was made with other settings
is moved aside, to `model-0.old-1` beside `model-0`, and comes back when these are set again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from ... import __version__
from ...scoring.shards import claim, record_of
from ...utils import (
    check_shared_folder,
    digest_of,
    move_aside,
    moved_aside,
    on_main_process,
    run_lock,
    wait_for_everyone,
    write_json,
)


@dataclass(frozen=True)
class Stage:
    """One step of a run, with all that its result depends on."""

    name: str  # and its folder under the output directory
    # Called on every process, with the folder and what a killed call left there; the first process's counts are kept.
    run: Callable[[Path], Mapping[str, Any] | None]
    settings: Mapping[str, Any]  # what the result depends on besides `inputs`; anything that JSON can hold
    inputs: tuple[str, ...] = ()  # stages before it, whose results it reads
    expected: Mapping[str, Any] = field(default_factory=dict)  # at most: `pairs`, `steps`, `calls`, `USD`
    is_shared: bool = False  # among machines: `run` may return `None` if its part is done and others' are not
    is_replayed: bool = False  # it also writes outside of its folder, so it runs again when its folder comes back


def stage_digests(stages: Sequence[Stage]) -> dict[str, str]:
    """Return a digest of all that each stage depends on, by its name."""
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
    """Do what is not done yet, on all processes together, up to a stage whose name begins with `stop_before`; with
    `only_shared`, as one of several machines, up to one that is not shared. Return the records of finished stages.
    """
    check_shared_folder(output_dir)
    # Machines that share a folder hold their parts of it, which is up to whoever knows which part.
    with nullcontext() if only_shared else run_lock(output_dir):
        return _run(stages, output_dir, only_shared, stop_before, console or Console())


def _run(
    stages: Sequence[Stage], output_dir: Path, only_shared: bool, stop_before: str | None, console: Console
) -> dict[str, dict[str, Any]]:
    records = dict[str, dict[str, Any]]()
    digests = stage_digests(stages)
    for number, stage in enumerate(stages, 1):
        title = f"{number}/{len(stages)} {stage.name}"
        for sentence in on_main_process(partial(_bring_back, output_dir, stage, digests[stage.name])):
            _say(console, f"{title}: {sentence}")
        record = on_main_process(partial(record_of, output_dir / stage.name / "stage.json", digests[stage.name]))
        if record is not None:
            records[stage.name] = record
            continue
        if only_shared and not stage.is_shared:
            _say(console, f"{title}: run it without `--shard`, on one machine or on all as one launch.")
            break
        if stop_before is not None and stage.name.startswith(stop_before):
            _say(console, f"{title}: stopped before it.")
            break
        _say(console, f"{title} ...")
        for sentence in on_main_process(partial(_begin, output_dir, stage, digests[stage.name])):
            _say(console, f"{title}: {sentence}")
        start = time.perf_counter()
        counts = stage.run(output_dir / stage.name)
        seconds = round(time.perf_counter() - start, 1)
        record = {"stage": stage.name, "digest": digests[stage.name], "counts": counts, "seconds": seconds}
        # Only when all processes are through is the stage done, and only then may any go on.
        wait_for_everyone()
        record = on_main_process(partial(_end, output_dir / stage.name / "stage.json", record))
        if record["counts"] is None:
            _say(console, f"{title}: this machine's part is done; others are still at work.")
            break
        records[stage.name] = record
        told = ", ".join(f"{name} {_number(value)}" for name, value in record["counts"].items() if _is_number(value))
        _say(console, f"{title} done in {seconds:.0f} s" + (f": {told}" if told else ""))
    return records


def show_plan(stages: Sequence[Stage], output_dir: Path, console: Console | None = None) -> None:
    """Print what would be done."""
    digests = stage_digests(stages)
    table = Table("stage", "state", title=f"Plan of {output_dir}", caption="pairs, steps, calls and USD: at most")
    columns = ("pairs", "steps", "calls", "USD")
    for column in columns:
        table.add_column(column, justify="right")
    total = dict.fromkeys(columns, 0.0)
    for stage in stages:
        digest = digests[stage.name]
        before = _made_before(output_dir / stage.name, digest)
        folder = before or output_dir / stage.name
        is_done = record_of(folder / "stage.json", digest) is not None and not (before and stage.is_replayed)
        state = "done" if is_done else "begun" if _has_begun(folder, digest) else "to do"
        values = {name: stage.expected.get(name) for name in columns}
        table.add_row(stage.name, state, *("" if value is None else _number(value) for value in values.values()))
        for name, value in values.items():
            total[name] += 0 if is_done else value or 0
    table.add_section()
    table.add_row("to do in all", "", "", *(_number(total[name]) for name in columns[1:]))
    (console or Console()).print(table)


def _has_begun(folder: Path, digest: str) -> bool:
    return record_of(folder / "begun.json", digest) is not None


def _made_before(folder: Path, digest: str) -> Path | None:
    """Find where what a stage with this digest has made was moved aside, if that is not in its place."""
    if _has_begun(folder, digest):
        return None
    return next((place for place in moved_aside(folder) if _has_begun(place, digest)), None)


def _bring_back(output_dir: Path, stage: Stage, digest: str) -> list[str]:
    """Put what a stage has made with these settings before others into its place; say what was moved where."""
    folder = output_dir / stage.name
    if _made_before(folder, digest) is None:
        return []
    with _one_at_a_time(output_dir):
        before = _made_before(folder, digest)
        if before is None:  # another machine was faster
            return []
        if stage.is_replayed:
            (before / "stage.json").unlink(missing_ok=True)
        aside = move_aside(folder) if (folder / "begun.json").is_file() else None
        before.rename(folder)
    return [*_moved(aside), f"made with these settings before, and back from {before}."]


def _one_at_a_time(output_dir: Path) -> FileLock:
    """Held while folders change places, by one of the machines that share them."""
    output_dir.mkdir(parents=True, exist_ok=True)
    return FileLock(output_dir / ".stages.lock")


def _begin(output_dir: Path, stage: Stage, digest: str) -> list[str]:
    """Make the folder ready, where what an interrupted run of the same stage left stays; say what was moved where."""
    with _one_at_a_time(output_dir):
        return _moved(claim(output_dir / stage.name / "begun.json", digest))


def _moved(aside: Path | None) -> list[str]:
    return [] if aside is None else [f"what was made with other settings is now in {aside}."]


def _end(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    if record["counts"] is not None:
        write_json(path, record)
    return record


def _say(console: Console, text: str) -> None:
    if PartialState().is_main_process:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"
