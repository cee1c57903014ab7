"""Share of wrong labels: a mixture fitted to reward margins, and scores of several models combined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, logit
from scipy.stats import chi2, rankdata
from transformers.utils import logging

from ..evaluation.metrics import wilson
from ..utils import check_value


logger = logging.get_logger(__name__)

MIN_PAIRS = 20

# Twice the log-likelihood that a fit has to gain over coin flips: two standard errors of the mean sign.
MIN_EVIDENCE = 4.0

# A flip takes more: over a model that guesses, at the 0.01 % level (a run asks this of each source in each round, and
# half of the labels are at stake), and over labels that are all right and a model that is less sure than elsewhere, at
# the 5 % level.
MIN_READING, MIN_NOISE_EVIDENCE = float(chi2.isf(0.0001, 1)), float(chi2.isf(0.05, 1))

# A rate whose 95 % interval is wider is not identified.
MAX_WIDTH = 0.3
_INTERVAL_DEPTH = float(chi2.isf(0.05, 1))

# Most labels of a source are only called wrong where the model surely contradicts more of them than this: a model that
# reads a source badly contradicts about half, and a few more by a bias of its own.
MIN_REVERSED = 0.6

# A fit sees at most this many margins, evenly spaced by rank, and so takes the same time for any number of pairs.
_POINTS, _COARSE_POINTS = 4096, 512

# Slopes per root mean square, from which the search starts.
_SLOPES = np.geomspace(0.25, 64.0, 17)
_LOG_SLOPES = np.linspace(math.log(_SLOPES[0]) - 3, math.log(_SLOPES[-1]) + 1, 40)

# A prior worth one wrong and one right pair, and a slope that is finite where no pair contradicts.
_LOG_SLOPE, _LOG_SLOPE_SPREAD = math.log(3.0), 1.5


def combine_scores(scores: npt.ArrayLike, how: Literal["raw", "zscore", "rank"] = "raw") -> np.ndarray:
    r"""
    Combine the scores of several models into one reward margin per pair.

    With \(d_{ij}\) the reward of chosen minus that of rejected by model \(j\), the margin of pair \(i\) is the mean
    over \(j\) of

    - `"raw"`: \(d_{ij}\), as in the paper. Rewards of different models have no common unit, so the model with the
      widest rewards decides.
    - `"zscore"`: \(d_{ij}\) divided by the root mean square of \(d_{\cdot j}\). Nothing is subtracted: zero is where
      a right label turns into a wrong one, and centering would move it.
    - `"rank"`: the sign of \(d_{ij}\) times the rank of \(|d_{ij}|\) within the model, divided by the number of pairs
      that it scored, so that outliers do not matter. Equal differences share their mean rank, and 0 stays 0.

    Args:
        scores (`np.ndarray` of shape `(N, 2, M)`):
            Rewards of chosen and rejected by M models, or of shape `(N, 2)` for one model; NaN where there is none.
        how (`str`, *optional*, defaults to `"raw"`):
            `"raw"`, `"zscore"` or `"rank"`.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `float64`: NaN for a pair that some model has not scored, because a mean
        of fewer models is not comparable.

    Raises:
        `ValueError`: if the shape is another, a score is infinite, or `how` is unknown.
    """
    given = np.asarray(scores, dtype=np.float64)
    scores = given[:, :, None] if given.ndim == 2 else given
    if scores.ndim != 3 or scores.shape[1] != 2 or scores.shape[2] == 0:
        raise ValueError(
            f"`scores` has shape {given.shape}; it must be (pairs, 2, models): rewards of chosen and of rejected."
        )
    if np.isinf(scores).any():
        pair, _, model = np.argwhere(np.isinf(scores))[0]
        raise ValueError(f"A score of model {model} for pair {pair} is infinite; give NaN for what has no score.")
    check_value("`how`", how, how in _SCALES, f"give one of {', '.join(map(repr, _SCALES))}")
    difference = scores[:, 0] - scores[:, 1]
    for column in difference.T:  # views, changed in place
        is_scored = ~np.isnan(column)
        if is_scored.any():
            column[is_scored] = _SCALES[how](column[is_scored])
    return difference.mean(axis=1)


_SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw": lambda difference: difference,
    "zscore": lambda difference: difference / (_root_mean_square(difference) or 1.0),
    "rank": lambda difference: np.sign(difference) * rankdata(np.abs(difference)) / len(difference),
}


def as_margins(strength: npt.ArrayLike) -> np.ndarray:
    """Return reward margins as `float64`, `(N,)`; raise a `ValueError` at another shape or an infinite margin."""
    margins = np.asarray(strength, dtype=np.float64)
    if margins.ndim != 1:
        raise ValueError(f"`strength` has shape {margins.shape}; give one number per pair, as `combine_scores` does.")
    if np.isinf(margins).any():
        index = np.flatnonzero(np.isinf(margins))[0]
        raise ValueError(f"The reward margin of pair {index} is infinite; give NaN for a pair that is not scored.")
    return margins


@dataclass(frozen=True)
class NoiseEstimate:
    """
    Share of wrong labels, and the probability that each is wrong.

    Parameters:
        rate (`float`):
            Best-fitting share of wrong labels, from 0 to 1; NaN where there is no fit.
        slope (`float`):
            Log-odds that the model ranks a pair rightly, per unit of reward margin.
        mean, std (`float`):
            Mean and standard deviation of the reward margins that right labels would have.
        is_identified (`bool`):
            Whether there are enough pairs, their signs are more than coin flips (or a `reference` says so), and
            `interval` is at most 0.3 wide where the slope is not known.
        posterior (`np.ndarray` of shape `(N,)` and dtype `float64`):
            Probability that each label is wrong; NaN where the pair is not scored, and 0 for all if not identified.
        interval (`tuple[float, float]`):
            95 % interval of `rate` by its profile likelihood; 0 to 1 where there is no fit.
        evidence, reading (`float`):
            Twice the log-likelihood that the fit gains over labels that are all right (at any slope, or at that of the
            `reference`; above 3.84 it is noise at the 5 % level), and over a model that guesses.
        contradicted (`float`):
            Share of the scored pairs with a negative margin, a margin of 0 counted half; NaN without any.
    """

    rate: float
    slope: float
    mean: float
    std: float
    is_identified: bool
    posterior: np.ndarray
    interval: tuple[float, float] = (0.0, 1.0)
    evidence: float = 0.0
    reading: float = 0.0
    contradicted: float = math.nan


def estimate_noise(
    strength: npt.ArrayLike, reference: npt.ArrayLike | None = None, *, slope: float | None = None
) -> NoiseEstimate:
    r"""
    Fit the mirrored mixture to reward margins.

    A pair with a wrong label has minus the margin that it would have with the right one. So with noise rate \(e\) and
    density \(f\) of the margins of right labels, margins \(d\) have the density \((1 - e) f(d) + e f(-d)\), and a
    label is wrong with probability \(e f(-d) / ((1 - e) f(d) + e f(-d))\). Reward models are trained to make the
    log-odds of a preference linear in the difference of rewards, so \(\log f(d) / f(-d) = k d\) is all that is assumed
    of \(f\), and that posterior is \(\sigma(\log \frac{e}{1 - e} - k d)\). The distribution of \(|d|\) may be any:
    given \(|d|\), the sign is negative with probability \(e + (1 - 2e) \sigma(-k |d|)\), and \(e\) and \(k\) maximize
    the likelihood of the signs, with a weak prior. In short: where the model is sure, the share of negative margins is
    the noise rate, and how that share rises to one half towards 0 tells how far the model can be trusted.

    The paper flips half of the negative pairs, which is right only where wrong labels that the model sees through
    are as many as right labels that it misjudges, at \(e = 1 - a\) with \(a\) its accuracy: with a better model or
    noisier labels wrong labels stay, with cleaner labels right ones are flipped. Here the bound is where the posterior
    is one half, \(d = \log \frac{e}{1 - e} / k\), which of all rules that see only \(d\) leaves the fewest wrong
    labels: near 0 for noisy labels, far from it for clean ones, and at \(e = 0\) nothing is flipped.

    An error that the model is sure of cannot be told from noise, and counts as such. Nor can noise of one half be told
    from a model that guesses: the estimate is then not identified, unless a reference of the same kind of pairs shows
    that the model does not guess. Where the model is often unsure and all margins are about equally large, as votes
    are, the interval of the rate is wide. With under 20 pairs nothing is fitted.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins, out of sample if possible: a model that has seen a wrong label partly believes it. NaN
            where a pair is not scored.
        reference (`np.ndarray` of shape `(R,)`, *optional*):
            Reward margins of at least 20 pairs known to be right and not trained on. They set the slope (logistic
            regression without intercept), and only the rate is estimated, for which few pairs suffice.
        slope (`float`, *optional*):
            The slope, where it is known; 0 for a model that guesses.

    Returns:
        [`NoiseEstimate`]

    Raises:
        `ValueError`: if a shape is wrong, a margin is infinite, the slope is NaN, there are too few references, or
            both `reference` and `slope` are passed.
    """
    if reference is not None and slope is not None:
        raise ValueError("Both `reference` and `slope` are given, and each tells the slope; leave one of them out.")
    if slope is not None and math.isnan(slope):
        raise ValueError(f"`slope` is {slope}; pass log-odds per unit of reward margin, 0 for a model that guesses.")
    margins = as_margins(strength)
    scored = margins[~np.isnan(margins)]
    count, has_reference = len(scored), reference is not None
    if reference is not None:
        slope = calibrate(reference)
    is_slope_known = slope is not None
    contradicted = float(np.mean(scored < 0) + np.mean(scored == 0) / 2) if count else math.nan
    unknown = np.where(np.isnan(margins), np.nan, 0.0)
    if count < MIN_PAIRS or not scored.any() or (slope is not None and slope <= 0):
        return NoiseEstimate(math.nan, math.nan, math.nan, math.nan, False, unknown, contradicted=contradicted)
    scale = _root_mean_square(scored)
    points = _by_rank(np.sort(scored), _POINTS) / scale
    if slope is None:
        slopes = np.exp(_LOG_SLOPES)
        rate, slope = _fit(points, count)
        slope /= scale
    else:
        slopes = np.array([slope * scale])
        rate = _fit_rate(points, slope * scale, count)
    fitted = count * _mean_log_likelihood(points, rate, slope * scale)
    # Against a model that guesses, and against labels that are all right.
    coins, clean = -count * math.log(2), count * _best_without_noise(points, slope * scale if has_reference else None)
    interval = _profile_interval(_by_rank(points, _COARSE_POINTS), count, rate, slopes)
    is_told = has_reference or 2 * (fitted - coins) >= MIN_EVIDENCE
    is_identified = is_told and (is_slope_known or interval[1] - interval[0] <= MAX_WIDTH)
    posterior = expit(logit(rate) - slope * margins)
    # Of the signs that right labels would have, in expectation; in units of `scale`, the mean square is 1.
    mean = float(np.mean(scored / scale * (1 - 2 * posterior[~np.isnan(margins)])))
    return NoiseEstimate(
        rate=rate,
        slope=slope,
        mean=mean * scale,
        std=math.sqrt(max(0.0, 1 - mean**2)) * scale,
        is_identified=is_identified,
        posterior=posterior if is_identified else unknown,
        interval=interval,
        evidence=2 * (fitted - clean),
        reading=2 * (fitted - coins),
        contradicted=contradicted,
    )


def shared_slope(parts: Sequence[np.ndarray]) -> float:
    """Fit the slope that sources of different noise rates share; 0 if it is not identified."""
    # The slope is a property of the model. A source of 500 pairs whose rate is near one half does not show alone
    # whether its labels are noise or the model guesses; the others do.
    parts = [part for part in parts if len(part)]
    count = sum(map(len, parts))
    if count < MIN_PAIRS or (scale := _root_mean_square(np.concatenate(parts))) == 0:
        return 0.0
    ordered = [np.sort(part) / scale for part in parts]

    def loss(log_slope: float, most: int) -> float:
        total = -(((log_slope - _LOG_SLOPE) / _LOG_SLOPE_SPREAD) ** 2) / 2 / count
        for part in ordered:
            share = len(part) / count
            points, slope = _by_rank(part, max(MIN_PAIRS, int(most * share))), math.exp(log_slope)
            total += share * _mean_log_likelihood(points, _fit_rate(points, slope, len(part)), slope)
        return -total

    start = min(np.log(_SLOPES), key=lambda log_slope: loss(log_slope, _COARSE_POINTS))
    step = math.log(_SLOPES[1] / _SLOPES[0])
    bounds = (start - step, start + step)
    best = minimize_scalar(loss, bounds=bounds, args=(_POINTS,), method="bounded", options={"xatol": 1e-4})
    return math.exp(best.x) / scale if 2 * count * (math.log(2) - best.fun) >= MIN_EVIDENCE else 0.0


def calibrate(reference: npt.ArrayLike) -> float:
    """Fit the slope of pairs known to be right; 0 if the model does no better than guess on them."""
    known = as_margins(reference)
    known = known[~np.isnan(known)]
    count = len(known)
    if count < MIN_PAIRS:
        raise ValueError(f"There are {count} scored references; give at least {MIN_PAIRS}, or none.")
    scale = _root_mean_square(known)
    if scale == 0:
        return 0.0
    points = _by_rank(np.sort(known), _POINTS) / scale

    def loss(log_slope: np.ndarray) -> tuple[float, np.ndarray]:
        slope, shift = math.exp(log_slope[0]), (log_slope[0] - _LOG_SLOPE) / _LOG_SLOPE_SPREAD
        value = np.mean(log_expit(slope * points)) - shift**2 / 2 / count
        by_slope = np.mean(points * expit(-slope * points)) * slope - shift / _LOG_SLOPE_SPREAD / count
        return -float(value), -np.array([by_slope])

    slope = math.exp(minimize(loss, [_LOG_SLOPE], jac=True, method="L-BFGS-B", bounds=[(-4.0, 7.0)]).x[0])
    gain = 2 * count * (float(np.mean(log_expit(slope * points))) + math.log(2))
    return slope / scale if gain >= MIN_EVIDENCE else 0.0


def flip_mixture(
    strength: npt.ArrayLike,
    threshold: float = 0.5,
    *,
    reference: npt.ArrayLike | None = None,
    slope: float | None = None,
    source: str | None = None,
) -> np.ndarray:
    """
    Flip the pairs whose label is wrong with more than a given probability, by [`estimate_noise`].

    Nothing is flipped unless these pairs themselves show noise: the rate is identified, and the fit beats labels that
    are all right, whatever the slope, at the 5 % level, and a model that guesses at the 0.01 % level; with a
    reference, only labels that are all right at its slope. Without one, most labels are not called wrong unless the
    model surely (99 %) contradicts more than 60 % of them. A pair that the model ranks as its label does is never
    flipped. The outcome is logged.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins; NaN is not flipped.
        threshold (`float`, *optional*, defaults to `0.5`):
            Probability above which a pair is flipped, from 0 to 1. At 0.5 the fewest wrong labels are expected.
        reference, slope (*optional*):
            As in [`estimate_noise`]. With `Flip(flip_mixture, by="source")`, [`decide`] passes the slope that all
            sources share, or that of the reference: that the model reads it does not say that it reads a source.
        source (`str`, *optional*):
            Name of the pairs in messages, which [`decide`] passes.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: all false where these pairs do not show noise.
    """
    check_value("`threshold`", threshold, 0 < threshold < 1, "give a probability between 0 and 1")
    margins = as_margins(strength)
    estimate = estimate_noise(margins, reference, slope=slope)
    count, share = int((~np.isnan(margins)).sum()), estimate.contradicted
    if count == 0:
        return np.zeros(len(margins), dtype=bool)
    whose = f"{count:,} pairs" if source is None else f"the {count:,} pairs of {source!r}"
    seen = f"The model contradicts {share:.1%} of the labels of {whose}"
    low, high = wilson(share, count, confidence=0.98)  # each end one-sided at 1 %
    is_noisy = estimate.is_identified and estimate.evidence >= MIN_NOISE_EVIDENCE
    if reference is None and (estimate.reading < MIN_READING or (estimate.rate > 0.5 and low <= MIN_REVERSED)):
        is_noisy = False
    if is_noisy and estimate.rate > 0.5:
        logger.warning(
            f"{seen}, far more than by chance, and these labels are flipped as reversed: look at some of them, and if "
            "the model is wrong about such pairs, leave the source out of the curation."
        )
    elif is_noisy:
        logger.info(f"{seen}; {estimate.rate:.1%} of the labels are estimated to be wrong.")
    elif count >= MIN_PAIRS and high > 0.5 and reference is None:
        logger.warning(
            f"{seen}, which does not tell wrong labels from a model that cannot read such pairs; they are left as "
            "they are."
        )
    else:
        logger.info(f"{seen}, which shows no noise that is more than the model's own errors; nothing is flipped.")
    # Comparisons with NaN are false.
    return (estimate.posterior > threshold) & (margins < 0) & is_noisy


def _root_mean_square(values: np.ndarray) -> float:
    # Scaled by the largest first, so that squares neither overflow nor vanish.
    largest = float(np.abs(values).max())
    return largest * math.sqrt(np.mean((values / largest) ** 2)) if largest else 0.0


def _by_rank(ordered: np.ndarray, count: int) -> np.ndarray:
    """Thin sorted values to `count`, evenly spaced by rank."""
    if len(ordered) <= count:
        return ordered
    return ordered[((np.arange(count) + 0.5) * (len(ordered) / count)).astype(np.int64)]


def _fit(points: np.ndarray, count: int) -> tuple[float, float]:
    """Fit rate and slope to `count` pairs that `points` stand for."""
    coarse = _by_rank(points, _COARSE_POINTS)
    starts = [np.array([logit(_fit_rate(coarse, slope, count)), math.log(slope)]) for slope in _SLOPES]
    start = min(starts, key=lambda start: _loss(start, coarse, count)[0])
    bounds = [(-20.0, 20.0), (math.log(_SLOPES[0]) - 3, math.log(_SLOPES[-1]) + 3)]
    log_odds, log_slope = minimize(_loss, start, args=(points, count), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(expit(log_odds)), math.exp(log_slope)


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


def _fit_rate(points: np.ndarray, slope: float, count: int) -> float:
    """Fit the rate at a given slope, by bisection of the derivative of the likelihood, which is concave in it."""
    agree = expit(slope * points)
    low, high = 0.0, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        rises = np.mean((1 - 2 * agree) / (agree + rate * (1 - 2 * agree))) + (1 / rate - 1 / (1 - rate)) / count > 0
        low, high = (rate, high) if rises else (low, rate)
    return (low + high) / 2


def _mean_log_likelihood(points: np.ndarray, rate: float, slope: float) -> float:
    agree = expit(slope * points)
    return float(np.mean(np.log(agree + rate * (1 - 2 * agree))))


def _best_without_noise(points: np.ndarray, slope: float | None) -> float:
    """Return the largest mean log-likelihood of labels that are all right, at any slope from 0 or at the given one."""
    if slope is not None:
        return float(np.mean(log_expit(slope * points)))
    # Concave in the slope, and at its maximum above 0 only where the mean margin is.
    if points.mean() <= 0:
        return -math.log(2)
    bounds = (_LOG_SLOPES[0] - 3, _LOG_SLOPES[-1] + 3)
    best = minimize_scalar(lambda x: -np.mean(log_expit(math.exp(x) * points)), bounds=bounds, method="bounded")
    return max(-math.log(2), -float(best.fun))


def _profile_interval(points: np.ndarray, count: int, rate: float, slopes: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the rate: those whose likelihood at the best slope is near enough to the largest."""
    agree = expit(slopes[:, None] * points)
    grid = np.r_[rate, np.linspace(0.0, 1.0, 101)]
    with np.errstate(divide="ignore"):
        profile = np.array([np.log(agree + one * (1 - 2 * agree)).mean(1).max() for one in grid])
    near = grid[2 * count * (profile.max() - profile) <= _INTERVAL_DEPTH]
    return float(min(near.min(), rate)), float(max(near.max(), rate))
