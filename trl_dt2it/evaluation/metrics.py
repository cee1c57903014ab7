"""The metrics of a benchmark from scores: full precision, and a pair is right if chosen scores strictly more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset

from ..data.columns import leave_images_encoded
from .benchmark import Benchmark, Ratio
from .benchmarks import find_benchmark


CANONICAL_KEYS = ("category", "group_id")


@dataclass(frozen=True)
class Tally:
    """
    What was counted.

    Parameters:
        ratios (`dict[str, Ratio]`):
            Metrics as ratios of sums over units, those without any row left out.
        averages (`dict[str, tuple[str, ...]]`):
            Metrics that are the mean of ratios, those of which one is missing left out.
        ties (`dict[str, int]`):
            For each ratio over pairs, how many have two equal scores. They are counted as wrong.
    """

    ratios: dict[str, Ratio]
    averages: dict[str, tuple[str, ...]]
    ties: dict[str, int]

    def values(self) -> dict[str, float]:
        """The metrics, from 0 to 1; means follow the first ratio, over all pairs."""
        shares = {name: float(ratio.hits.sum() / ratio.total.sum()) for name, ratio in self.ratios.items()}
        means = {name: float(np.mean([shares[part] for part in parts])) for name, parts in self.averages.items()}
        first = next(iter(shares))
        return {first: shares[first], **means, **shares}


def compute_metrics(
    name: str,
    rows: Dataset | Iterable[Mapping[str, Any]],
    chosen: Sequence[float] | np.ndarray,
    rejected: Sequence[float] | np.ndarray,
) -> dict[str, float]:
    """
    The metrics of a benchmark.

    A pair is right if `chosen > rejected`, at the precision of the scores; a tie is wrong.

    Args:
        name (`str`):
            The benchmark, one of [`BENCHMARKS`].
        rows (`Dataset` or `Iterable[Mapping]` of length n):
            Its rows, as the benchmark has them or from [`read_benchmark`], in the order of the scores.
        chosen (`Sequence[float]` of length n):
            The score of the answer that people prefer.
        rejected (`Sequence[float]` of length n):
            The score of the other answer.

    Returns:
        `dict[str, float]`: from 0 to 1. Of `"vl-rewardbench"`: `overall`, `macro` (the mean of the groups), `general`,
        `hallucination`, `reasoning`. Of `"multimodal-rewardbench"`: `overall`, `overall_without_safety`,
        `correctness`, `preference`, `knowledge`, `math`, `coding`, `safety`, `vqa`. Of `"mm-rlhf-rewardbench"`: `acc`
        over pairs, `acc_plus` over prompts of which every pair is right, and both for each category, as
        `acc/<category>` and `acc_plus/<category>`. Of the others: `overall`, and their categories. What has no row is
        left out, and so is a mean of which one part is.

    Raises:
        `ValueError`: if the name is not known, the lengths differ, a score is not a number, or a row does not say
            what it belongs to.
    """
    benchmark = find_benchmark(name)
    category, unit = row_keys(benchmark, rows)
    if not len(chosen) == len(rejected) == len(category):
        raise ValueError(
            f"There are {len(category)} rows of {benchmark.title}, {len(chosen)} scores of chosen and {len(rejected)} "
            "of rejected; give one of each for each row."
        )
    scores = as_scores(np.stack([chosen, rejected], axis=-1), len(category))
    return tally(benchmark, category, unit, scores).values()


def as_scores(scores: Any, num_rows: int) -> np.ndarray:
    """
    Scores of pairs, checked.

    Args:
        scores (`array` of shape `(n, 2)`):
            The scores of chosen and rejected.
        num_rows (`int`):
            The number of pairs that there are.

    Returns:
        `np.ndarray` of shape `(n, 2)` and type float64.

    Raises:
        `ValueError`: if the shape is another, or a score is not a number.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (num_rows, 2):
        raise ValueError(
            f"The scores have the shape {scores.shape}, and there are {num_rows} pairs; give one score for chosen and "
            "one for rejected of each pair."
        )
    if len(bad := np.flatnonzero(np.isnan(scores).any(axis=1))):
        raise ValueError(
            f"{len(bad)} of {num_rows} pairs have a score that is not a number, the first is row {bad[0]}."
        )
    return scores


def row_keys(benchmark: Benchmark, rows: Dataset | Iterable[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """
    What each row counts for.

    Args:
        benchmark ([`Benchmark`]):
            The benchmark.
        rows (`Dataset` or `Iterable[Mapping]`):
            Its rows, raw or canonical.

    Returns:
        `tuple`: the category of each row, `(n,)` str, and its unit, `(n,)` int64 from 0 on: rows about one prompt have
        the same; a row that does not tell its prompt has one of its own.

    Raises:
        `ValueError`: if a row does not say what it belongs to.
    """
    if isinstance(rows, Dataset):
        wanted = CANONICAL_KEYS if set(CANONICAL_KEYS) <= set(rows.column_names) else benchmark.key_columns
        encoded = cast(Dataset, leave_images_encoded(rows)).with_format(None)
        rows = encoded.select_columns([name for name in wanted if name in encoded.column_names])
    categories: list[str] = []
    units: dict[Any, int] = {}
    unit: list[int] = []
    for index, row in enumerate(rows):
        try:
            categories.append(benchmark.category_of(row))
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
        try:
            key = benchmark.unit_of(row)
        except KeyError as error:
            raise ValueError(f"Row {index} of {benchmark.title} has no {error}, so that it has no prompt.") from error
        unit.append(units.setdefault((index,) if key is None else key, len(units)))
    return np.array(categories, dtype=str), np.array(unit, dtype=np.int64)


def tally(benchmark: Benchmark, category: np.ndarray, unit: np.ndarray, scores: np.ndarray) -> Tally:
    """
    Counts what is right.

    Args:
        benchmark ([`Benchmark`]):
            The benchmark.
        category (`np.ndarray` of shape `(n,)` and type str), unit (`np.ndarray` of shape `(n,)` and type int64):
            From [`row_keys`].
        scores (`np.ndarray` of shape `(n, 2)` and type float64):
            The scores of chosen and rejected.

    Returns:
        [`Tally`]

    Raises:
        `ValueError`: if there is no row.
    """
    if len(scores) == 0:
        raise ValueError(f"There is no row of {benchmark.title} to evaluate.")
    ratios = benchmark.count(scores[:, 0] > scores[:, 1], category, unit)
    tied = benchmark.count(scores[:, 0] == scores[:, 1], category, unit)
    ratios = {name: ratio for name, ratio in ratios.items() if ratio.total.sum() > 0}
    averages = {name: parts for name, parts in benchmark.averages.items() if set(parts) <= set(ratios)}
    ties = {name: int(tied[name].hits.sum()) for name, ratio in ratios.items() if ratio.over == "pairs"}
    return Tally(ratios, averages, ties)
