r"""Confidence intervals of what is counted: shares, of independent pairs or of few prompts, and their means.

A share \(p\) of \(n\) independent trials has Wilson's score interval, which is never empty, not even where all are
right. Pairs of one prompt are not independent: \(n\) of them say as much as \(n / D\) independent pairs, where the
design effect \(D\) is the variance of \(p\) over draws of prompts in units of \(p (1 - p) / n\). With \(D\) estimated
from few prompts, the quantile is Student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import norm, t


if TYPE_CHECKING:
    from .metrics import Tally

# Draws of the bootstrap that are held at once.
_BATCH = 100
# What is assumed before any pair is seen: pairs of a prompt are right together. The assumption counts as half a pair.
_PRIOR_PAIRS = 0.5


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def wilson(share: float, count: float, confidence: float = 0.95, freedom: float = np.inf) -> Interval:
    """
    Wilson's score interval of a share.

    Args:
        share (`float`):
            The share, from 0 to 1.
        count (`float`):
            Number of independent trials that say as much, any number above 0.
        confidence (`float`, *optional*, defaults to `0.95`):
            How often such an interval holds the true share.
        freedom (`float`, *optional*):
            Degrees of freedom with which `count` was estimated; infinite where it is known.

    Returns:
        [`Interval`]
    """
    # `scipy.stats.binomtest` and `statsmodels` have it for whole counts, or without Student's quantile.
    quantile = _quantile(confidence, freedom)
    center = (share + quantile**2 / (2 * count)) / (1 + quantile**2 / count)
    half = quantile / (1 + quantile**2 / count) * np.sqrt(share * (1 - share) / count + quantile**2 / (4 * count**2))
    # At the ends the interval holds the share itself, whatever rounding does.
    return Interval(max(0.0, min(share, float(center - half))), min(1.0, max(share, float(center + half))))


def clustered_interval(
    value: float, influence: np.ndarray, group: np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
    """
    Interval of an estimate that is no share, such as a correlation, with groups as the independent units.

    Args:
        value (`float`):
            The estimate.
        influence (`np.ndarray` of shape `(N,)`):
            What each pair adds to its error.
        group (`np.ndarray` of shape `(N,)`):
            Group of each pair.
        confidence (`float`, *optional*, defaults to `0.95`):
            How often such an interval holds the true value.

    Returns:
        `tuple[float, float]`
    """
    sums = group_sums(influence, group)
    variance = float((sums**2).sum()) * len(sums) / max(len(sums) - 1, 1)
    half = _quantile(confidence, max(len(sums) - 1, 1)) * float(np.sqrt(variance))
    return value - half, value + half


def group_sums(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sum of the rows of each group, groups sorted by their number."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    return np.add.reduceat(values[order], starts, axis=0)


def bootstrap_intervals(
    tally: Tally, *, num_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Interval]:
    """
    Intervals of all metrics, with prompts as the independent units.

    Prompts are drawn with replacement, the pairs of a prompt together. The draws say how much each metric varies and
    which vary together; the ends are Wilson's for so many effective pairs, with Student's quantile for so many
    prompts. Percentiles of the draws would do for many prompts; of six, all of which are right, they are 100 % to
    100 %. A mean of metrics has the interval of a share of as many trials as its parts together are worth.

    Args:
        tally ([`Tally`]):
            What was counted.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws; the same seed draws the same prompts.
        confidence (`float`, *optional*, defaults to `0.95`):
            How often such an interval holds the true value.

    Returns:
        `dict[str, Interval]`: for each ratio and mean. Draws in which a metric has no row do not count for it.
    """
    names, drawn = list(tally.ratios), _draw(tally, num_resamples, seed)
    evidence = {
        name: _evidence(ratio.hits, ratio.total, float(np.nanvar(values)))
        for (name, ratio), values in zip(tally.ratios.items(), drawn.T, strict=True)
    }
    found = {name: wilson(one.share, one.count, confidence, one.freedom) for name, one in evidence.items()}
    for mean, parts in tally.averages.items():
        values = drawn[:, [names.index(part) for part in parts]]
        pooled = _pool([evidence[part] for part in parts], _correlation(values[np.isfinite(values).all(axis=1)]))
        found[mean] = wilson(pooled.share, pooled.count, confidence, pooled.freedom)
    return found


@dataclass(frozen=True)
class _Evidence:
    """A share, how many independent trials say as much, and the degrees of freedom with which that was estimated."""

    share: float
    count: float
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
    """
    What units of several pairs each say about a share, given its variance over draws of units.

    With r the correlation of pairs of a unit, the design effect is 1 + (m - 1) r, where m is the mean size of a unit
    as its pairs see it. Pairs that are nearly all right, or nearly all wrong, do not show r: it is drawn to 1, the
    more the fewer pairs differ from the rest.
    """
    hits, total = hits[total > 0], total[total > 0]
    num_units, count = len(total), float(total.sum())
    share, others = float(hits.sum()) / count, float((total**2).sum()) / count - 1  # `others` is m - 1
    rare = min(share, 1 - share) * count
    if rare < 1e-12 or num_units == 1:
        return _Evidence(share, count / (1 + others), np.inf)
    correlation = 0.0
    if others > 0:
        effect = variance * num_units / (num_units - 1) * count / (share * (1 - share))
        correlation = min(max((effect - 1) / others, 0.0), 1.0)
        correlation += (1 - correlation) * _PRIOR_PAIRS / (_PRIOR_PAIRS + rare)
    return _Evidence(share, count / (1 + others * correlation), num_units - 1)


def _pool(parts: Sequence[_Evidence], correlation: np.ndarray) -> _Evidence:
    """
    What shares say about their mean.

    A part in which all are right seems not to vary: each counts with the variance of a share as large as the mean, at
    least. The degrees of freedom are Satterthwaite's.
    """
    mean = float(np.mean([part.share for part in parts]))
    spread = mean * (1 - mean)
    own = [part.share * (1 - part.share) / spread if spread > 0 else 1.0 for part in parts]
    variance = np.array([max(one, 1.0) / part.count for one, part in zip(own, parts, strict=True)])
    size = np.sqrt(variance)
    uncertain = float(sum(one**2 / part.freedom for one, part in zip(variance, parts, strict=True)))
    freedom = float(variance.sum()) ** 2 / uncertain if uncertain > 0 else np.inf
    return _Evidence(mean, len(parts) ** 2 / float(size @ correlation @ size), freedom)


def _correlation(values: np.ndarray) -> np.ndarray:
    """Correlations of columns, 0 with a column that does not vary."""
    deviation = values - values.mean(axis=0) if len(values) else np.zeros((1, values.shape[1]))
    size = np.sqrt((deviation**2).sum(axis=0))
    scaled = deviation / np.where(size > 0, size, 1.0)
    correlation = scaled.T @ scaled
    np.fill_diagonal(correlation, 1.0)
    return correlation


def _quantile(confidence: float, freedom: float) -> float:
    tail = (1 + confidence) / 2
    return float(norm.ppf(tail) if np.isinf(freedom) else t.ppf(tail, freedom))
