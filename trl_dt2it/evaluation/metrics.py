"""Accuracies of benchmarks, and the package's one set of confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import norm, t

from ..data.columns import leave_images_encoded
from .benchmarks import find_benchmark
from .benchmarks.benchmark import Benchmark, Ratio


CANONICAL_KEYS = ("category", "group_id")
_BATCH = 100  # draws of the bootstrap to hold at once
_PRIOR_PAIRS = 0.5  # weight, in pairs, of the prior that pairs of a prompt are right together


@dataclass(frozen=True)
class Tally:
    """Counts of right pairs."""

    ratios: dict[str, Ratio]  # metrics as ratios of sums over units, without those that have no row
    averages: dict[str, tuple[str, ...]]  # metrics that are the mean of ratios, all of which are there
    ties: dict[str, int]  # for each ratio over pairs, the number with two equal scores, which count as wrong

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
    Compute the metrics of a benchmark.

    A pair is right if `chosen > rejected`, at the precision of the scores; a tie is wrong.

    Args:
        name (`str`):
            Name of the benchmark, one of [`BENCHMARKS`].
        rows (`Dataset` or `Iterable[Mapping]` of length n):
            Rows, as the benchmark has them or from [`read_benchmark`].
        chosen, rejected (`Sequence[float]` of length n):
            Scores of the better and of the worse answers, in the order of the rows.

    Returns:
        `dict[str, float]`: from 0 to 1, `overall` and each category. `"vl-rewardbench"` has `macro` besides, the mean
        of its groups, and `"multimodal-rewardbench"` `overall_without_safety`. `"mm-rlhf-rewardbench"` has instead
        `acc` over pairs, `acc_plus` over prompts of which every pair is right, and both for each category, as
        `acc/<category>`. Metrics without a row are dropped, as are means with such a part.

    Raises:
        `ValueError`: if the name is unknown, the lengths differ, a score is not a number, or a row does not tell its
            group or prompt.
    """
    benchmark = find_benchmark(name)
    category, unit = row_keys(benchmark, rows)
    if not len(chosen) == len(rejected) == len(category):
        given = f"{len(chosen)} scores of chosen and {len(rejected)} of rejected"
        raise ValueError(f"There are {len(category)} rows of {benchmark.title}, {given}; pass one of each a row.")
    scores = as_scores(np.stack([chosen, rejected], axis=-1), len(category))
    return tally(benchmark, category, unit, scores).values()


def as_scores(scores: Any, num_rows: int) -> np.ndarray:
    """Check scores of pairs. Shapes: `scores` `(n, 2)`, returns `(n, 2)` `float64`."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (num_rows, 2):
        raise ValueError(f"The scores have the shape {scores.shape}, and there are {num_rows} pairs; pass two a pair.")
    if len(bad := np.flatnonzero(np.isnan(scores).any(axis=1))):
        bad_rows = f"{len(bad)} of {num_rows} pairs"
        raise ValueError(f"{bad_rows} have a score that is not a number, the first is row {bad[0]}.")
    return scores


def row_keys(benchmark: Benchmark, rows: Dataset | Iterable[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Category and unit (prompt) of each row."""
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
            key = benchmark.unit_of(row)
        except ValueError as error:
            raise ValueError(f"Row {index} of {benchmark.title}: {error}") from error
        except KeyError as error:
            raise ValueError(f"Row {index} of {benchmark.title} has no {error}, so that it has no prompt.") from error
        unit.append(units.setdefault((index,) if key is None else key, len(units)))
    return np.array(categories, dtype=str), np.array(unit, dtype=np.int64)


def tally(benchmark: Benchmark, category: np.ndarray, unit: np.ndarray, scores: np.ndarray) -> Tally:
    """Count right pairs and ties. Shapes: `category` `(n,)`, `unit` `(n,)`, `scores` `(n, 2)`."""
    if len(scores) == 0:
        raise ValueError(f"There is no row of {benchmark.title} to evaluate.")
    ratios = benchmark.count(scores[:, 0] > scores[:, 1], category, unit)
    tied = benchmark.count(scores[:, 0] == scores[:, 1], category, unit)
    ratios = {name: ratio for name, ratio in ratios.items() if ratio.total.sum() > 0}
    averages = {name: parts for name, parts in benchmark.averages.items() if set(parts) <= set(ratios)}
    ties = {name: int(tied[name].hits.sum()) for name, ratio in ratios.items() if ratio.over == "pairs"}
    return Tally(ratios, averages, ties)


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def wilson(share: float, count: float, confidence: float = 0.95, freedom: float = np.inf) -> Interval:
    """Wilson's score interval of a share."""
    # `scipy.stats.binomtest` and `statsmodels` have it for whole counts, or without Student's quantile.
    quantile = _quantile(freedom, confidence)
    center = (share + quantile**2 / (2 * count)) / (1 + quantile**2 / count)
    half = quantile / (1 + quantile**2 / count) * np.sqrt(share * (1 - share) / count + quantile**2 / (4 * count**2))
    # At the ends the interval holds the share itself, whatever rounding does.
    return Interval(max(0.0, min(share, float(center - half))), min(1.0, max(share, float(center + half))))


def clustered_interval(value: float, influence: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """95 % interval of an estimate that is no share, given its `influence` `(N,)`; each `group` `(N,)` is one unit."""
    sums = group_sums(influence, group)
    freedom = max(len(sums) - 1, 1)
    half = _quantile(freedom) * float(np.sqrt((sums**2).sum() * len(sums) / freedom))
    return value - half, value + half


def paired_interval(difference: np.ndarray, unit: np.ndarray) -> Interval:
    """95 % interval of a difference of accuracies on the same pairs, the mean of `difference` `(n,)`, of -1, 0 and 1;
    each `unit` `(n,)` is independent of the others."""
    # Of Bonett and Price (2012), "Adjusted Wald confidence interval for a difference of binomial proportions based on
    # paired data", for the number of independent pairs that the units are worth.
    mean, sizes = float(difference.mean()), np.unique(unit, return_counts=True)[1].astype(float)
    shares = np.array([(difference > 0).mean(), (difference < 0).mean()])
    differing, num_units, count = float(shares.sum()), len(sizes), float(len(difference))
    spread, others = differing - mean**2, float((sizes**2).sum()) / count - 1
    effect, freedom = 1 + others, np.inf  # of a single unit, or of pairs that are all alike
    if num_units > 1 and spread > 0:
        between = float((group_sums(difference - mean, unit) ** 2).sum()) * num_units / (num_units - 1)
        effect, freedom = between / (count * spread), num_units - 1
    count /= _design_effect(effect, others, differing * count)
    # One pair more that differs in each direction: where no pair differs, the interval is no point.
    more, fewer = (shares * count + 1) / (count + 2)
    center, spread = more - fewer, more + fewer - (more - fewer) ** 2
    half = _quantile(freedom) * float(np.sqrt(spread / (count + 2)))
    return Interval(max(-1.0, min(mean, float(center - half))), min(1.0, max(mean, float(center + half))))


def group_sums(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sum of the rows of each group, groups sorted by their number."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    return np.add.reduceat(values[order], starts, axis=0)


def bootstrap_intervals(tally: Tally, *, num_resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """95 % intervals of all metrics, with prompts as the independent units."""
    # Prompts are drawn with replacement, the pairs of a prompt together. The draws tell how much each metric varies
    # and which vary together; the ends are Wilson's for so many effective pairs, with Student's quantile for so many
    # prompts: percentiles of draws of six prompts that are all right would be 100 % to 100 %. A mean of metrics has
    # the interval of a share of as many trials as its parts together are worth.
    drawn = pd.DataFrame(_draw(tally, num_resamples, seed), columns=list(tally.ratios))
    evidence = {
        name: _evidence(ratio.hits, ratio.total, float(np.nanvar(drawn[name].to_numpy())))
        for name, ratio in tally.ratios.items()
    }
    for mean, parts in tally.averages.items():
        # 0 with a part that does not vary.
        correlation = drawn[list(parts)].dropna().corr().fillna(0.0).to_numpy(copy=True)
        np.fill_diagonal(correlation, 1.0)
        evidence[mean] = _pool([evidence[part] for part in parts], correlation)
    return {name: wilson(one.share, one.count, freedom=one.freedom) for name, one in evidence.items()}


class _Evidence(NamedTuple):
    """A share, the equivalent number of independent trials, and the degrees of freedom of that estimate."""

    share: float
    count: float  # type: ignore[assignment]  # of trials, not the method of a tuple
    freedom: float


def _draw(tally: Tally, num_resamples: int, seed: int) -> np.ndarray:
    """Ratios under draws of units with replacement, `(num_resamples, M)`; NaN where a draw has no row of one."""
    hits = np.stack([ratio.hits for ratio in tally.ratios.values()], axis=1)  # (U, M)
    totals = np.stack([ratio.total for ratio in tally.ratios.values()], axis=1)
    rng, num_units, shares = np.random.default_rng(seed), len(hits), []
    for start in range(0, num_resamples, _BATCH):
        size = min(_BATCH, num_resamples - start)
        times = rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=size).astype(float)  # (B, U)
        with np.errstate(invalid="ignore"):
            shares.append((times @ hits) / (times @ totals))
    return np.concatenate(shares)


def _evidence(hits: np.ndarray, total: np.ndarray, variance: float) -> _Evidence:
    """Evidence of units of several pairs about a share, given its variance over draws of units."""
    # With r the correlation of pairs of a unit, the design effect is 1 + (m - 1) r, where m is the mean size of a unit
    # as its pairs see it. Pairs that are nearly all right, or nearly all wrong, do not show r: it is drawn to 1, the
    # more the fewer pairs differ from the rest.
    hits, total = hits[total > 0], total[total > 0]
    num_units, count = len(total), float(total.sum())
    share, others = float(hits.sum()) / count, float((total**2).sum()) / count - 1  # `others` is m - 1
    rare = min(share, 1 - share) * count
    if rare < 1e-12 or num_units == 1:
        return _Evidence(share, count / (1 + others), np.inf)
    effect = variance * num_units / (num_units - 1) * count / (share * (1 - share))
    return _Evidence(share, count / _design_effect(effect, others, rare), num_units - 1)


def _design_effect(effect: float, others: float, rare: float) -> float:
    """Design effect of units of `1 + others` pairs, drawn from what was seen to the largest possible."""
    if others <= 0:
        return 1.0
    correlation = min(max((effect - 1) / others, 0.0), 1.0)
    return 1 + others * (correlation + (1 - correlation) * _PRIOR_PAIRS / (_PRIOR_PAIRS + rare))


def _pool(parts: Sequence[_Evidence], correlation: np.ndarray) -> _Evidence:
    """Evidence of shares about their mean, with Satterthwaite's degrees of freedom."""
    # A part in which all are right seems not to vary: each counts at least with the variance of a share as large as
    # the mean.
    mean = float(np.mean([part.share for part in parts]))
    spread = mean * (1 - mean)
    own = [part.share * (1 - part.share) / spread if spread > 0 else 1.0 for part in parts]
    variance = np.array([max(one, 1.0) / part.count for one, part in zip(own, parts, strict=True)])
    size = np.sqrt(variance)
    uncertain = float(sum(one**2 / part.freedom for one, part in zip(variance, parts, strict=True)))
    freedom = float(variance.sum()) ** 2 / uncertain if uncertain > 0 else np.inf
    return _Evidence(mean, len(parts) ** 2 / float(size @ correlation @ size), freedom)


def _quantile(freedom: float, confidence: float = 0.95) -> float:
    tail = (1 + confidence) / 2
    return float(norm.ppf(tail) if np.isinf(freedom) else t.ppf(tail, freedom))
