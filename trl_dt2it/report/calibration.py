"""Does a reward model win as often as it says? The predicted win probability against the observed share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from ..evaluation.metrics import Interval, wilson


@dataclass(frozen=True)
class CalibrationBin:
    """
    Pairs of about the same predicted win probability.

    Parameters:
        low, high (`float`):
            Ends of the bin, from 0.5 to 1.
        count (`int`):
            Number of pairs.
        predicted (`float`, *optional*):
            Their mean predicted probability; `None` of an empty bin.
        observed (`float`, *optional*):
            The share in which the answer that the model prefers is the chosen one.
        interval ([`Interval`], *optional*):
            The share's 95 % interval.
    """

    low: float
    high: float
    count: int
    predicted: float | None = None
    observed: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Calibration:
    r"""
    Predicted against observed.

    Which answer is called chosen is no news, so each pair counts from the side that the model prefers: it predicts
    that this answer wins with \\(p = \sigma(|r_c - r_r|)\\), and it has won if it is the chosen one.

    Parameters:
        bins (`tuple[CalibrationBin, ...]`):
            From 0.5 to 1, of equal width.
        error (`float`):
            Expected calibration error: mean of |observed - predicted| over the bins, by number of pairs.
        count (`int`):
            Number of pairs with two different rewards.
        ties (`int`):
            Number of the others, which predict nothing and are left out.
    """

    bins: tuple[CalibrationBin, ...]
    error: float
    count: int
    ties: int


def calibrate(chosen: npt.ArrayLike, rejected: npt.ArrayLike, num_bins: int = 10) -> Calibration:
    """
    Compares what rewards predict with what is labelled.

    Args:
        chosen, rejected (`np.ndarray` of shape `(N,)`):
            Rewards; pairs in which one is not finite do not count.
        num_bins (`int`, *optional*, defaults to `10`):
            Number of bins.

    Returns:
        [`Calibration`]
    """
    gap = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    gap = gap[np.isfinite(gap)]
    ties = int((gap == 0).sum())
    gap = gap[gap != 0]
    predicted, won = expit(np.abs(gap)), gap > 0
    edges = np.linspace(0.5, 1, num_bins + 1)
    place = np.minimum(np.searchsorted(edges, predicted, side="right") - 1, num_bins - 1)
    bins, error = [], 0.0
    for number in range(num_bins):
        inside = place == number
        count, low, high = int(inside.sum()), float(edges[number]), float(edges[number + 1])
        if not count:
            bins.append(CalibrationBin(low, high, 0))
            continue
        hits, mean = int(won[inside].sum()), float(predicted[inside].mean())
        bins.append(CalibrationBin(low, high, count, mean, hits / count, wilson(hits / count, count)))
        error += abs(hits / count - mean) * count / len(gap)
    return Calibration(tuple(bins), error, len(gap), ties)
