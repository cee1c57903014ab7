"""A long run as a list of stages, each of which is done once, whenever the run is killed.

```
output_dir/
  round-1/score/model-0/begun.json     whose work lies here: a digest of all that the result depends on
  round-1/score/model-0/...            what the stage makes
  round-1/score/model-0/stage.json     what came of it; written last, so that it says that the stage is done
```
A digest covers the settings of a stage and the digests of its inputs, so that the list is a pure function of the
configuration, and changing a setting does again what depends on it and nothing else. What was made with other settings
is moved aside, to `model-0.old-1` beside `model-0`, and comes back when these are set again.
"""

from __future__ import annotations

import json
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

from .. import __version__
from ..data.whole_file import move_aside, moved_aside, whole_file
from ..printable import digest_of
from ..processes import check_shared_folder, on_main_process, wait_for_everyone
from ..run_lock import run_lock


@dataclass(frozen=True)
class Stage:
    """
    One step of a run.

    Parameters:
        name (`str`):
            Its name, and its folder under the output directory.
        run (`Callable`):
            Does it: gets the folder, is called on every process, and returns counts, of which those of the first
            process are kept. What a killed call left in the folder is still there in the next one.
        settings (`Mapping`):
            What the result depends on besides `inputs`; anything that JSON can hold.
        inputs (`tuple[str, ...]`, *optional*):
            Names of stages before it, whose results it reads.
        expected (`Mapping`, *optional*):
            What it will take at most, for the plan: `pairs`, `steps`, `calls`, `USD`.
        is_shared (`bool`, *optional*, defaults to `False`):
            Whether several machines may work on it at a time. Then `run` may return `None`: its own part is done, and
            others are not.
        is_replayed (`bool`, *optional*, defaults to `False`):
            Whether it also writes outside of its folder, as decisions go into the ledger. When its folder comes back,
            it is run again, on what lies there.
    """

    name: str
    run: Callable[[Path], Mapping[str, Any] | None]
    settings: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    expected: Mapping[str, Any] = field(default_factory=dict)
    is_shared: bool = False
    is_replayed: bool = False


def stage_digests(stages: Sequence[Stage]) -> dict[str, str]:
    """
    A digest of all that each stage depends on.

    Args:
        stages (`Sequence[Stage]`):
            The stages, in order.

    Returns:
        `dict[str, str]`: digests by name.

    Raises:
        `ValueError`: if two stages have one name, or an input is not among the stages before.
    """
    digests: dict[str, str] = {}
    for stage in stages:
        if stage.name in digests:
            raise ValueError(f"Two stages are called {stage.name}.")
        if missing := [name for name in stage.inputs if name not in digests]:
            raise ValueError(f"{stage.name} reads {missing[0]}, which is not among the stages before it.")
        parts = {"settings": stage.settings, "inputs": [digests[name] for name in stage.inputs]}
        digests[stage.name] = digest_of({**parts, "version": __version__})
    return digests


def stage_record(output_dir: Path, name: str, digest: str) -> dict[str, Any] | None:
    """What came of a stage, or `None` if it is not done, or was done with something else."""
    marker = output_dir / name / "stage.json"
    if not marker.is_file():
        return None
    record = json.loads(marker.read_text(encoding="utf-8"))
    return record if record["digest"] == digest else None


def run_stages(
    stages: Sequence[Stage],
    output_dir: Path,
    *,
    only_shared: bool = False,
    stop_before: str | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Does what is not done yet, on all processes together.

    Args:
        stages (`Sequence[Stage]`):
            The stages, in order.
        output_dir (`Path`):
            Folder of the run.
        only_shared (`bool`, *optional*, defaults to `False`):
            Whether this is one of several machines, which works on shared stages and stops before any other that is
            not done, or is not done by all machines.
        stop_before (`str`, *optional*):
            Stops before the first stage that is not done and whose name begins like this.
        console (`rich.console.Console`, *optional*):
            Where the first process says what it does.

    Returns:
        `dict[str, dict]`: for each stage that is done its record: `digest`, `counts` and `seconds`.

    Raises:
        `ValueError`: if a stage's folder holds files of something else, if not all processes see `output_dir`, or if
            another run is at work in it.
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
        record = on_main_process(partial(stage_record, output_dir, stage.name, digests[stage.name]))
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
        record = on_main_process(partial(_end, output_dir / stage.name, record))
        if record["counts"] is None:
            _say(console, f"{title}: this machine's part is done; others are still at work.")
            break
        records[stage.name] = record
        told = ", ".join(f"{name} {_number(value)}" for name, value in record["counts"].items() if _is_number(value))
        _say(console, f"{title} done in {seconds:.0f} s" + (f": {told}" if told else ""))
    return records


def show_plan(stages: Sequence[Stage], output_dir: Path, console: Console | None = None) -> None:
    """
    Prints what would be done.

    Args:
        stages (`Sequence[Stage]`):
            The stages, in order.
        output_dir (`Path`):
            Folder of the run.
        console (`rich.console.Console`, *optional*):
            Where to; standard output by default.
    """
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
        is_done = stage_record(folder.parent, folder.name, digest) is not None
        is_done = is_done and not (before is not None and stage.is_replayed)
        state = "done" if is_done else "begun" if _has_begun(folder, digest) else "to do"
        values = {name: stage.expected.get(name) for name in columns}
        table.add_row(stage.name, state, *("" if value is None else _number(value) for value in values.values()))
        for name, value in values.items():
            total[name] += 0 if is_done else value or 0
    table.add_section()
    table.add_row("to do in all", "", "", *(_number(total[name]) for name in columns[1:]))
    (console or Console()).print(table)


def _has_begun(folder: Path, digest: str) -> bool:
    begun = folder / "begun.json"
    return begun.is_file() and json.loads(begun.read_text(encoding="utf-8"))["digest"] == digest


def _made_before(folder: Path, digest: str) -> Path | None:
    """Where what a stage with this digest has made was moved aside, if that is not in its place."""
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
        said = _clear(folder)
        before.rename(folder)
    return [*said, f"made with these settings before, and back from {before}."]


def _one_at_a_time(output_dir: Path) -> FileLock:
    """Held while folders change places, by one of the machines that share them."""
    output_dir.mkdir(parents=True, exist_ok=True)
    return FileLock(output_dir / ".stages.lock")


def _clear(folder: Path) -> list[str]:
    """Move what a stage has made with other settings aside."""
    if not (folder / "begun.json").is_file():
        return []
    return [f"what was made with other settings is now in {move_aside(folder)}."]


def _begin(output_dir: Path, stage: Stage, digest: str) -> list[str]:
    """Make the folder ready: what an interrupted run of the same stage left stays, and what another left is moved
    aside; say where to."""
    folder = output_dir / stage.name
    with _one_at_a_time(output_dir):
        if _has_begun(folder, digest):
            return []
        said = _clear(folder)
        if folder.is_dir() and any(one.suffix != ".part" for one in folder.iterdir()):
            raise ValueError(f"{folder} holds files that are not of this run; move them, or take another output_dir.")
        with whole_file(folder / "begun.json") as part:
            part.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")
        return said


def _end(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    if record["counts"] is not None:
        with whole_file(folder / "stage.json") as part:
            part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _say(console: Console, text: str) -> None:
    if PartialState().is_main_process:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"
