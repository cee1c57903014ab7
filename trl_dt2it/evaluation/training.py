"""Benchmarks during training: as evaluation sets of the trainer, and their metrics from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.encoded import column_of
from ..reward_metrics import PairRecord
from .benchmarks import BENCHMARKS
from .metrics import compute_metrics
from .raw_rows import BenchmarkRows
from .reading import read_benchmark


# Columns of an evaluation set that the metrics need besides the trainer's own.
COLUMNS = ("category", "group_id")


def eval_datasets(
    benchmarks: Sequence[str] | Mapping[str, BenchmarkRows | None], **reading: Any
) -> dict[str, Dataset]:
    """
    Benchmarks as `eval_dataset` of [`MultimodalRewardTrainer`].

    With `eval_dataset={**eval_datasets(["vl-rewardbench"]), "held_out": pairs}` every evaluation logs
    `eval_vl-rewardbench_macro` and so on.

    Args:
        benchmarks (`Sequence[str]` or `Mapping[str, BenchmarkRows]`):
            Names of benchmarks, which are read from the Hub, or by their names the rows, as in [`read_benchmark`].
        reading:
            Other arguments of [`read_benchmark`].

    Returns:
        `dict[str, Dataset]`: their rows by name.
    """
    given = benchmarks if isinstance(benchmarks, Mapping) else dict.fromkeys(benchmarks)
    return {name: read_benchmark(name, rows, **reading) for name, rows in given.items()}


def training_metrics(dataset: Any, records: Sequence[PairRecord]) -> dict[str, float]:
    """
    Metrics of a benchmark from what the trainer keeps of an evaluation.

    Args:
        dataset (`Dataset`):
            What was evaluated on. If it is no benchmark, there are no metrics.
        records (`Sequence[PairRecord]`):
            The pairs, with their positions in the set.

    Returns:
        `dict[str, float]`: as [`compute_metrics`] gives them, or empty.
    """
    if not isinstance(dataset, Dataset) or not {*COLUMNS, "source"} <= set(dataset.column_names):
        return {}
    if len(dataset) == 0 or (name := column_of(dataset.select([0]), "source")[0].as_py()) not in BENCHMARKS:
        return {}
    if not records:
        return {}
    chosen, rejected = (np.array([getattr(record, side) for record in records]) for side in ("chosen", "rejected"))
    rows = dataset.select_columns(list(COLUMNS)).select([record.position for record in records])
    return compute_metrics(name, rows, chosen, rejected)
