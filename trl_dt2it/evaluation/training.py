"""Metrics of benchmarks during training: an evaluation set brings them along in its `info`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetInfo

from .benchmarks import BENCHMARKS
from .metrics import CANONICAL_KEYS, compute_metrics


if TYPE_CHECKING:
    from ..training.metrics import PairRecord  # with which TRL would be loaded whenever a benchmark is read


class BenchmarkInfo(DatasetInfo):
    """
    Info of a data set that is a benchmark, whose name is in `dataset_name`.

    `datasets` passes the info of a set on to what is selected, filtered, mapped or shuffled of it, so that the trainer
    finds `measure` whatever became of the rows.
    """

    @property
    def title(self) -> str:
        return BENCHMARKS[str(self.dataset_name)].title

    @property
    def hub_id(self) -> str | None:
        return BENCHMARKS[str(self.dataset_name)].source.hub_id

    def measure(self, dataset: Any, records: Sequence[PairRecord]) -> dict[str, float]:
        return training_metrics(dataset, records)


def with_metrics(dataset: Dataset, name: str) -> Dataset:
    """Let the canonical rows of a benchmark bring its metrics along."""
    if isinstance(dataset.info, BenchmarkInfo):
        return dataset
    dataset = copy.copy(dataset)
    dataset._info = BenchmarkInfo(**{**vars(dataset.info), "dataset_name": name})
    return dataset


def training_metrics(dataset: Any, records: Sequence[PairRecord]) -> dict[str, float]:
    """
    Metrics of a benchmark from what the trainer keeps of an evaluation.

    Args:
        dataset (`Dataset`):
            What was evaluated on. If it is not of [`read_benchmark`], there are no metrics.
        records (`Sequence[PairRecord]`):
            The pairs, with their positions in the set.

    Returns:
        `dict[str, float]`: as [`compute_metrics`] gives them, or empty.
    """
    if not records or not isinstance(dataset.info, BenchmarkInfo):
        return {}
    if not set(CANONICAL_KEYS) <= set(dataset.column_names):
        return {}
    chosen, rejected = (np.array([getattr(record, side) for record in records]) for side in ("chosen", "rejected"))
    rows = dataset.select_columns(list(CANONICAL_KEYS)).select([record.position for record in records])
    return compute_metrics(str(dataset.info.dataset_name), rows, chosen, rejected)
