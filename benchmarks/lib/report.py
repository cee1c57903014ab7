"""Printing a table and keeping it, with the versions and the machine that it was measured on."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np


RESULTS = Path(__file__).parents[1] / "results"


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = "|" + "---|" * len(names)
    return "\n".join([_line(names), rule, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(name: str, text: str, record: dict, folder: Path = RESULTS) -> None:
    """
    Prints a text and writes it into `results/NAME.md`, and the figures behind it into `results/NAME.json`.

    Args:
        name (`str`):
            Name of the benchmark.
        text (`str`):
            Tables and notes, in Markdown.
        record (`dict`):
            Figures, as JSON can hold them.
        folder (`Path`, *optional*):
            Takes the place of `results`.
    """
    versions = {package: version(package) for package in ("trl-dt2it", "trl", "transformers", "torch")}
    environment = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**record, "versions": versions, **environment}, indent=2) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    print(text)


def interval_coverage(low: np.ndarray, high: np.ndarray, estimate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Means over sets, of each of which an interval, an estimate and what it is of are known, all `(N,)`."""
    measured = {
        "reached": truth,
        "estimate": estimate,
        "coverage": (low <= truth) & (truth <= high),
        "below": high < truth,
        "above": low > truth,
        "width": high - low,
    }
    return {name: float(values.mean()) for name, values in measured.items()}


def peak_memory(function: Callable[[], object]) -> int:
    """Run a function, and return the peak memory of the process above what it held before, in bytes."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    function()
    return status("VmHWM") - before


def printed_by(script: str, *arguments: str) -> Any:
    """Run a script in a process of its own, and return the JSON that it prints last."""
    run = subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def wall_seconds(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def in_turn(
    functions: dict[str, Callable[[], object]],
    runs: int = 5,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, list[float]]:
    """
    Times functions one after the other, again and again, so that a machine that changes its pace changes it for all.

    Args:
        functions (`dict[str, Callable]`):
            What to time, by name.
        runs (`int`, *optional*, defaults to `5`):
            Number of rounds that count.
        warmup (`int`, *optional*, defaults to `1`):
            Number of rounds before them.
        clock (`Callable`, *optional*):
            Runs a function and says how many seconds it took.

    Returns:
        `dict[str, list[float]]`: seconds of each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(warmup + runs):
        for name, function in functions.items():
            taken = clock(function)
            if index >= warmup:
                seconds[name].append(taken)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of how many times `fast` was faster in the same round."""
    return median(a / b for a, b in zip(slow, fast, strict=True))
