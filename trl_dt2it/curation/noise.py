"""How many labels are wrong, and which: the mirrored mixture of strengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, logit
from transformers.utils import logging

from .combining import as_strength


logger = logging.get_logger(__name__)

MIN_PAIRS = 20
# Twice the log-likelihood that a fit has to gain over coin flips: two standard errors of the mean sign.
MIN_EVIDENCE = 4.0
# A fit sees no more than this many strengths, evenly spaced by rank, and so takes the same time for any number.
_POINTS, _COARSE_POINTS = 4096, 512
# Slopes per root mean square, from which the search starts.
_SLOPES = np.geomspace(0.25, 64.0, 17)
# As much as one wrong and one right pair more, and a slope that is finite where no pair contradicts.
_LOG_SLOPE, _LOG_SLOPE_SPREAD = math.log(3.0), 1.5


@dataclass(frozen=True)
class NoiseEstimate:
    """
    How many labels are wrong, and how likely each is.

    Parameters:
        rate (`float`):
            Share of wrong labels, from 0 to 1; NaN where it cannot be told.
        slope (`float`):
            How fast the model becomes sure: the log-odds that it ranks a pair rightly, per unit of strength.
        mean, std (`float`):
            Mean and standard deviation of the strengths that right labels would have.
        is_identified (`bool`):
            Whether there are enough pairs, and whether their signs are more than coin flips.
        posterior (`np.ndarray` of shape `(N,)` and dtype `float64`):
            Probability that each label is wrong; NaN where the pair is not scored, and 0 for all if the estimate is
            not identified.
    """

    rate: float
    slope: float
    mean: float
    std: float
    is_identified: bool
    posterior: np.ndarray


def estimate_noise(
    strength: npt.ArrayLike, reference: npt.ArrayLike | None = None, *, slope: float | None = None
) -> NoiseEstimate:
    r"""
    Fits the mirrored mixture to strengths.

    A pair with a wrong label has minus the strength that it would have with the right one. So with noise rate \(e\)
    and density \(f\) of the strengths of right labels, strengths \(d\) have the density
    \((1 - e) f(d) + e f(-d)\), and a label is wrong with probability
    \(e f(-d) / ((1 - e) f(d) + e f(-d))\). Reward models are trained to make the log-odds of a preference linear
    in the difference of rewards, so \(\log f(d) / f(-d) = k d\) is all that is assumed of \(f\), and that posterior is
    \(\sigma(\log \frac{e}{1 - e} - k d)\). The distribution of \(|d|\) may be any: given \(|d|\), the sign is negative
    with probability \(e + (1 - 2e) \sigma(-k |d|)\), and \(e\) and \(k\) maximise the likelihood of the signs, with a
    weak prior. (A Gaussian \(f\) is such a one, with \(k = 2 \mu / \sigma^2\); but fitted as a Gaussian, heavy tails
    pass for noise.) In short: where the model is sure, the share of negative strengths is the noise rate, and how that
    share rises to one half towards 0 tells how far the model itself can be trusted.

    That is why it is better than the half of the negative pairs that the paper flips. Among negative pairs are wrong
    labels that the model sees through, about \(e a\) with \(a\) its accuracy, and right ones that it misjudges,
    about \((1 - e)(1 - a)\). Half is right only where the two are equal, that is \(e = 1 - a\). A better model or
    noisier labels, and wrong labels stay; cleaner labels, and right ones are turned. Here the bound is where the
    posterior is one half, \(d = \log \frac{e}{1 - e} / k\), which of all rules that see only \(d\) leaves the fewest
    wrong labels. It moves to 0 as labels become noisier, and away from it as they become cleaner: at \(e = 0\)
    nothing is flipped.

    What the model is wrong about without doubt cannot be told from noise, and counts as such. Signs cannot tell noise
    of one half from a model that guesses: neither is flipped, and the estimate is called not identified, unless a
    reference shows that the model does not guess. Under 20 pairs neither is tried. A rate above one half says that
    most labels are reversed, or that the model is wrong about the whole source; the model is believed.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths, out of sample if possible: a model that has seen a wrong label partly believes it. NaN where a
            pair is not scored.
        reference (`np.ndarray` of shape `(R,)`, *optional*):
            Strengths of at least 20 pairs known to be right and not trained on. The slope is calibrated on them
            (logistic regression without intercept), and only the rate is estimated, which few pairs suffice for.
        slope (`float`, *optional*):
            The slope, where it is known, as from [`shared_slope`]; 0 says that the model guesses.

    Returns:
        [`NoiseEstimate`]

    Raises:
        `ValueError`: if a shape is wrong, a strength is infinite, there are too few references, or there are both
            `reference` and `slope`.
    """
    if reference is not None and slope is not None:
        raise ValueError("Both `reference` and `slope` are given, and each tells the slope; leave one of them out.")
    strength = as_strength(strength)
    scored = strength[~np.isnan(strength)]
    slope = slope if reference is None else _calibrate(reference)
    if len(scored) < MIN_PAIRS or not scored.any() or (slope is not None and slope <= 0):
        return _unidentified(strength)
    scale = float(np.abs(scored).max())
    scale *= math.sqrt(np.mean((scored / scale) ** 2))
    points = _by_rank(np.sort(scored), _POINTS) / scale
    if slope is None:
        rate, slope = _fit(points, len(scored))
        gain = 2 * len(scored) * (_mean_log_likelihood(points, rate, slope) + math.log(2))
        if gain < MIN_EVIDENCE:
            return _unidentified(strength)
        slope /= scale
    else:
        rate = _fit_rate(expit(slope * scale * points), len(scored))
    posterior = expit(logit(rate) - slope * strength)
    # With the signs that right labels would give, in expectation; in units of `scale`, the mean square is 1.
    mean = float(np.mean(scored / scale * (1 - 2 * posterior[~np.isnan(strength)])))
    return NoiseEstimate(rate, slope, mean * scale, math.sqrt(max(0.0, 1 - mean**2)) * scale, True, posterior)


def shared_slope(parts: Sequence[np.ndarray]) -> float:
    r"""
    The slope of several sources whose noise rates differ, of which one by itself may tell little.

    How sure a model is of a difference in rewards is a property of the model, so \(k\) is one for all sources, and
    each has its own rate \(e\): both maximise the likelihood of [`estimate_noise`], summed over the sources. A
    source of 500 pairs whose rate is near one half does not show by itself whether its labels are noise or the model
    guesses; the others do.

    Args:
        parts (`Sequence[np.ndarray]`):
            Strengths of each source, of shape `(n,)`, all finite.

    Returns:
        `float`: log-odds per unit of strength; 0 if all signs together are no more than coin flips, or there are
        fewer than 20 pairs.
    """
    count = sum(len(part) for part in parts)
    size = math.sqrt(sum(float(np.sum(part**2)) for part in parts) / max(count, 1))
    if count < MIN_PAIRS or size == 0:
        return 0.0
    ordered = [np.sort(part) / size for part in parts if len(part)]
    shares = [len(part) / count for part in ordered]

    def loss(log_slope: float, most: int) -> float:
        total = -(((log_slope - _LOG_SLOPE) / _LOG_SLOPE_SPREAD) ** 2) / 2 / count
        for part, share in zip(ordered, shares, strict=True):
            points, slope = _by_rank(part, max(MIN_PAIRS, int(most * share))), math.exp(log_slope)
            rate = _fit_rate(expit(slope * points), len(part))
            total += share * _mean_log_likelihood(points, rate, slope)
        return -total

    start = min(np.log(_SLOPES), key=lambda log_slope: loss(log_slope, _COARSE_POINTS))
    step = math.log(_SLOPES[1] / _SLOPES[0])
    bounds = (start - step, start + step)
    found = minimize_scalar(loss, bounds=bounds, args=(_POINTS,), method="bounded", options={"xatol": 1e-4})
    is_identified = 2 * count * (math.log(2) - found.fun) >= MIN_EVIDENCE
    return math.exp(found.x) / size if is_identified else 0.0


def flip_mixture(
    strength: npt.ArrayLike,
    threshold: float = 0.5,
    *,
    reference: npt.ArrayLike | None = None,
    slope: float | None = None,
) -> np.ndarray:
    """
    Flips the pairs whose label is wrong with more than a given probability, by [`estimate_noise`].

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths; NaN is not flipped.
        threshold (`float`, *optional*, defaults to `0.5`):
            Probability above which a pair is flipped, from 0 to 1. At 0.5 the fewest wrong labels are expected.
        reference (`np.ndarray` of shape `(R,)`, *optional*):
            Strengths of pairs known to be right; see [`estimate_noise`].
        slope (`float`, *optional*):
            The slope, where it is known. With `Flip(flip_mixture, by="source")` and no reference, [`decide`] passes
            the [`shared_slope`] of all sources.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: all false where the noise cannot be told, which is logged.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` is {threshold}; give a probability between 0 and 1.")
    estimate = estimate_noise(strength, reference, slope=slope)
    if not estimate.is_identified and len(estimate.posterior):
        logger.info(
            f"No label of {len(estimate.posterior):,} pairs is flipped: their strengths do not tell the noise."
        )
    elif estimate.rate > 0.5:
        logger.warning(
            f"The model contradicts {estimate.rate:.0%} of the labels of {len(estimate.posterior):,} pairs and is "
            "believed: look at some of them, whether their labels are reversed or the model does not fit them."
        )
    return estimate.posterior > threshold


def _unidentified(strength: np.ndarray) -> NoiseEstimate:
    posterior = np.where(np.isnan(strength), np.nan, 0.0)
    return NoiseEstimate(math.nan, math.nan, math.nan, math.nan, False, posterior)


def _by_rank(ordered: np.ndarray, count: int) -> np.ndarray:
    """Evenly spaced ones of sorted values."""
    if len(ordered) <= count:
        return ordered
    return ordered[((np.arange(count) + 0.5) * (len(ordered) / count)).astype(np.int64)]


def _fit(points: np.ndarray, count: int) -> tuple[float, float]:
    """Rate and slope, of `count` pairs that `points` stand for."""
    coarse = _by_rank(points, _COARSE_POINTS)
    starts = [np.array([logit(_fit_rate(expit(slope * coarse), count)), math.log(slope)]) for slope in _SLOPES]
    start = min(starts, key=lambda start: _loss(start, coarse, count)[0])
    bounds = [(-20.0, 20.0), (math.log(_SLOPES[0]) - 3, math.log(_SLOPES[-1]) + 3)]
    found = minimize(_loss, start, args=(points, count), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(expit(found[0])), math.exp(found[1])


def _mean_log_likelihood(points: np.ndarray, rate: float, slope: float) -> float:
    agree = expit(slope * points)
    return float(np.mean(np.log(agree + rate * (1 - 2 * agree))))


def _loss(parameters: np.ndarray, points: np.ndarray, count: int) -> tuple[float, np.ndarray]:
    """Minus the mean log-likelihood with its prior, and its gradient, at log-odds of the rate and log of the slope."""
    rate, slope = float(expit(parameters[0])), math.exp(parameters[1])
    agree = expit(slope * points)
    likelihood = agree + rate * (1 - 2 * agree)
    shift = (parameters[1] - _LOG_SLOPE) / _LOG_SLOPE_SPREAD
    prior = math.log(rate) + math.log1p(-rate) - shift**2 / 2
    by_rate = np.mean((1 - 2 * agree) / likelihood) * rate * (1 - rate) + (1 - 2 * rate) / count
    by_slope = np.mean(points * agree * (1 - agree) / likelihood) * (1 - 2 * rate) * slope
    by_slope -= shift / _LOG_SLOPE_SPREAD / count
    return -(float(np.mean(np.log(likelihood))) + prior / count), -np.array([by_rate, by_slope])


def _fit_rate(agree: np.ndarray, count: int) -> float:
    """The rate at a given slope; the likelihood is concave in it, so that bisection of its derivative finds it."""
    low, high = 0.0, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        rises = np.mean((1 - 2 * agree) / (agree + rate * (1 - 2 * agree))) + (1 / rate - 1 / (1 - rate)) / count > 0
        low, high = (rate, high) if rises else (low, rate)
    return (low + high) / 2


def _calibrate(reference: npt.ArrayLike) -> float:
    """The slope of pairs known to be right; 0 if the model does no better than guess on them."""
    known = as_strength(reference)
    known = known[~np.isnan(known)]
    if len(known) < MIN_PAIRS:
        raise ValueError(f"There are {len(known)} scored references; give at least {MIN_PAIRS}, or none.")
    scale = float(np.abs(known).max())
    if scale == 0:
        return 0.0
    scale *= math.sqrt(np.mean((known / scale) ** 2))
    points, count = _by_rank(np.sort(known), _POINTS) / scale, len(known)

    def loss(log_slope: np.ndarray) -> tuple[float, np.ndarray]:
        slope, shift = math.exp(log_slope[0]), (log_slope[0] - _LOG_SLOPE) / _LOG_SLOPE_SPREAD
        value = np.mean(log_expit(slope * points)) - shift**2 / 2 / count
        by_slope = np.mean(points * expit(-slope * points)) * slope - shift / _LOG_SLOPE_SPREAD / count
        return -float(value), -np.array([by_slope])

    slope = math.exp(minimize(loss, [_LOG_SLOPE], jac=True, method="L-BFGS-B", bounds=[(-4.0, 7.0)]).x[0])
    gain = 2 * count * (float(np.mean(log_expit(slope * points))) + math.log(2))
    return slope / scale if gain >= MIN_EVIDENCE else 0.0
