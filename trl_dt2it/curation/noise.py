"""Wrong labels: scores of several models combined, and the probability that each label is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import expit, log_softmax, logsumexp
from scipy.stats import ks_2samp, rankdata
from transformers.utils import logging

from ..data.columns import group_rows
from ..utils import check_value


logger = logging.get_logger(__name__)

MIN_PAIRS = 20

# A rate whose 95 % interval is wider is not identified; without a reference, the interval is that of a guess.
MAX_WIDTH, MAX_WIDTH_ALONE = 0.6, 0.25

# Flips that would raise the share of wrong labels by more than this are harm, and no more probable than that.
HARM, MAX_RISK = 0.0125, 0.2
MAX_RISK_ALONE = 0.07  # without a reference

# The accuracy on a source from which it is read, surely (95 %), and below which it is not, as far as can be told: with
# at least this probability.
READ, NOT_READ, MAX_GUESS = 0.6, 0.55, 0.2

# Pairs of a source that its likelihood counts for at most. No curve of the grid is the true one, and the likelihood of
# more pairs is sure of the one that is least wrong, however wrong: it is raised to a power that stops this, as by
# Miller and Dunson (2019), "Robust Bayesian inference via coarsening", Eq. 2.
_MAX_COUNT = 1000

_BINS = 24  # of the reward margins of a source, equally filled


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
    scores = _as_scores(scores)
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


def mean_rewards(scores: npt.ArrayLike) -> np.ndarray:
    """
    Return the mean reward of the two answers of each pair, which no label changes.

    Args:
        scores (`np.ndarray` of shape `(N, 2, M)` or `(N, 2)`):
            As in [`combine_scores`].

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `float64`: mean over models, each in units of its standard deviation
        over the pairs; NaN for a pair that some model has not scored.

    Raises:
        `ValueError`: if the shape is another, or a score is infinite.

    Example:

    ```python
    >>> from trl_dt2it.curation import mean_rewards
    >>> mean_rewards([[3.0, 1.0], [1.0, 3.0], [0.0, 0.0]]).round(2).tolist()
    [2.12, 2.12, 0.0]

    ```
    """
    means = _as_scores(scores).mean(axis=1)
    for column in means.T:  # views, changed in place
        deviation = np.nanstd(column) if (~np.isnan(column)).any() else 0.0
        column /= deviation or 1.0
    return means.mean(axis=1)


def _as_scores(scores: npt.ArrayLike) -> np.ndarray:
    """Return rewards as `float64`, `(N, 2, M)`; raise a `ValueError` at another shape or an infinite one."""
    given = np.asarray(scores, dtype=np.float64)
    scores = given[:, :, None] if given.ndim == 2 else given
    if scores.ndim != 3 or scores.shape[1] != 2 or scores.shape[2] == 0:
        raise ValueError(
            f"`scores` has shape {given.shape}; it must be (pairs, 2, models): rewards of chosen and of rejected."
        )
    if np.isinf(scores).any():
        pair, _, model = np.argwhere(np.isinf(scores))[0]
        raise ValueError(f"A score of model {model} for pair {pair} is infinite; give NaN for what has no score.")
    return scores


def as_margins(strength: npt.ArrayLike, argument: str = "strength", count: int | None = None) -> np.ndarray:
    """Return reward margins as `float64`, `(N,)`; raise a `ValueError` at another shape or an infinite margin, or if
    there are not `count`."""
    margins = np.asarray(strength, dtype=np.float64)
    if margins.ndim != 1:
        raise ValueError(
            f"`{argument}` has shape {margins.shape}; give one number per pair, as `combine_scores` does."
        )
    if np.isinf(margins).any():
        index, whose = np.flatnonzero(np.isinf(margins))[0], "" if argument == "strength" else f" of `{argument}`"
        raise ValueError(f"The reward margin of pair {index}{whose} is infinite; give NaN for one that is not scored.")
    if count is not None and len(margins) != count:
        raise ValueError(f"There are {count} pairs and {len(margins)} of `{argument}`; pass one per pair.")
    return margins


class MarginCurves(NamedTuple):
    """Observed and inferred curves over the size of the reward margin: arrays `(B,)` of bins of equally many pairs."""

    margin: np.ndarray  # mean of |d|
    pairs: np.ndarray
    contradicted: np.ndarray  # share of negative margins; 0 counts half
    accuracy: np.ndarray  # probability that the model ranks a pair rightly, with its 90 % interval
    accuracy_low: np.ndarray
    accuracy_high: np.ndarray
    noise: np.ndarray  # probability that a label is wrong
    posterior: np.ndarray  # the same, of labels that the model contradicts


@dataclass(frozen=True)
class NoiseEstimate:
    """
    Share of wrong labels of a source, the probability that each is wrong, and what may be flipped.

    Parameters:
        posterior (`np.ndarray` of shape `(N,)` and dtype `float64`):
            Probability that each label is wrong; NaN where the pair is not scored, 0 for all if not identified.
        flip (`np.ndarray` of shape `(N,)` and dtype `bool`):
            Labels to flip: the model contradicts them, and their posterior is above one half and `threshold`.
        rate (`float`):
            Expected share of wrong labels, from 0 to 1; NaN where nothing is fitted.
        interval (`tuple[float, float]`):
            95 % credible interval of `rate`.
        accuracy (`float`):
            Expected share of these pairs that the model ranks rightly; NaN where nothing is fitted.
        accuracy_interval (`tuple[float, float]`):
            90 % credible interval of `accuracy`.
        is_identified (`bool`):
            Whether there are enough pairs, the model reads them, and `interval` is at most 0.25 wide, with a reference
            0.6.
        reading (`str`):
            `"read"`: the accuracy is surely at least 0.6; `"not read"`: it may be below 0.55, with a probability of at
            least 20 %; `"hardly read"` between the two; `"unknown"` with under 20 scored pairs, or where all margins
            are 0.
        contradicted (`float`):
            Share of the scored pairs with a negative margin, a margin of 0 counted half; NaN without any.
        clean (`float`):
            Probability that no label is wrong.
        threshold (`float`):
            Posterior from which flips are believed to do no harm; 1 if none are.
        curves ([`MarginCurves`], *optional*):
            The same by the size of the margin; `None` where nothing is fitted.
    """

    posterior: np.ndarray
    flip: np.ndarray
    rate: float = math.nan
    interval: tuple[float, float] = (0.0, 1.0)
    accuracy: float = math.nan
    accuracy_interval: tuple[float, float] = (0.0, 1.0)
    is_identified: bool = False
    reading: str = "unknown"
    contradicted: float = math.nan
    clean: float = math.nan
    threshold: float = 1.0
    curves: MarginCurves | None = None

    def summary(self) -> dict[str, Any]:
        """Return the figures and curves as JSON, for the ledger and the report."""
        names = ("rate", "interval", "accuracy", "accuracy_interval", "is_identified", "reading", "contradicted")
        told = {name: getattr(self, name) for name in (*names, "clean", "threshold")}
        told |= {"pairs": int((~np.isnan(self.posterior)).sum()), "flipped": int(self.flip.sum())}
        if self.curves is not None:
            told["curves"] = {name: np.round(values, 4).tolist() for name, values in self.curves._asdict().items()}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in told.items()
        }


def estimate_noise(
    strength: npt.ArrayLike,
    reference: npt.ArrayLike | None = None,
    *,
    mean_reward: npt.ArrayLike | None = None,
    reference_mean_reward: npt.ArrayLike | None = None,
) -> NoiseEstimate:
    r"""
    Estimate which labels are wrong, from reward margins and from how often the model is right.

    A label is contradicted (\(d < 0\)) where it is right and the model errs, or where it is wrong and the model is
    right. With \(g(m)\) the accuracy of the model on pairs whose margin has the size \(m = |d|\), and \(e(m)\) the
    share of wrong labels among them, where errors of both are independent given \(m\), the share of contradicted
    labels is \(e g + (1 - e)(1 - g)\), and a contradicted label is wrong with probability

    \[ P(wrong \mid d = -m) = \frac{e(m) g(m)}{e(m) g(m) + (1 - e(m)) (1 - g(m))}. \]

    `reference` pairs tell \(g\): it is then known how often the model is surely wrong, and what is contradicted more
    often is noise. Without them, only the shape of the contradictions tells the two apart: errors become rare where
    the model is sure, and noise need not. Neither curve is assumed, but weighed against others: accuracies of
    \(\frac{\lambda}{2} + (1 - \lambda) \sigma(k m / (1 + (\tau m)^2))\), with errors at any margin
    (\(\lambda\)) and at large ones (\(\tau\)), and noise with log-odds that are linear in \(m\), may rest on the
    same pairs that the model finds hard (a wrong label is then more likely where the model errs), and may be none at
    all. Means over the posterior of all of these are returned, so that what the pairs do not tell stays unsure. One of
    the cases is that the model does not read the pairs as it reads the reference. It is less probable where the sizes
    of margins and the mean rewards, which wrong labels do not change, are distributed as those of the reference, and
    the more pairs show that, the less: only so are sources with half of their labels wrong told from sources that the
    model cannot read. Right labels by another criterion, of the same prompts and answers, look like wrong ones: leave
    such a source out.

    Labels are flipped where that leaves the fewest wrong ones in expectation (posterior above one half), and only if
    the probability that the flips together raise the share of wrong labels by over 1.25 points is small (20 %, without
    a reference 7 %). This is the best rule that sees only margins where the pairs are like the reference, apart from
    wrong labels, and wrong labels are no more likely on pairs that the model gets wrong than on others of the same
    margin, or somewhat more. A bias that model and annotators share cannot be seen in margins: wrong labels that the
    model agrees with stay.

    The paper flips half of the negative pairs, which is right only where wrong labels that the model sees through
    are as many as right labels that it misjudges.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins of pairs from one source, out of sample if possible: a model that has seen a wrong label
            partly believes it. NaN where a pair is not scored.
        reference (`np.ndarray` of shape `(R,)`, *optional*):
            Reward margins, in the same unit, of at least 20 pairs known to be right and not trained on.
        mean_reward (`np.ndarray` of shape `(N,)`, *optional*):
            Mean reward of the two answers of each pair, as of [`mean_rewards`]; NaN where it is not known.
        reference_mean_reward (`np.ndarray` of shape `(R,)`, *optional*):
            The same of the reference, in the same unit.

    Returns:
        [`NoiseEstimate`]

    Raises:
        `ValueError`: if a shape is wrong, a margin is infinite, or there are too few references.
    """
    margins = as_margins(strength)
    return _estimate([margins], [_as_means(mean_reward, len(margins))], reference, reference_mean_reward)[0]


def flip_mixture(
    strength: npt.ArrayLike,
    threshold: float = 0.5,
    *,
    reference: npt.ArrayLike | None = None,
    mean_reward: npt.ArrayLike | None = None,
    reference_mean_reward: npt.ArrayLike | None = None,
    source: Any = None,
    estimates: dict[str | None, NoiseEstimate] | None = None,
) -> np.ndarray:
    """
    Flip the pairs whose label is wrong with more than a given probability, by [`estimate_noise`].

    Each source of at least 20 pairs has its own rate; smaller ones stay as they are. Their model is one: without a
    reference, what a source tells about its accuracy helps to judge the others. That the model reads a source in
    another way, or not at all, is weighed too. Nothing is flipped in a source whose noise is not identified, or where
    flips are not sure enough to do no harm. A pair that the model ranks as its label does is never flipped. Logs the
    outcome.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins; NaN is not flipped.
        threshold (`float`, *optional*, defaults to `0.5`):
            Probability above which a pair is flipped, from 0.5 up to 1. At 0.5 the fewest wrong labels are expected.
        reference (`np.ndarray` of shape `(R,)`, *optional*):
            As in [`estimate_noise`], and so are the next two.
        mean_reward (`np.ndarray` of shape `(N,)`, *optional*):
            Mean rewards, which [`decide`] passes.
        reference_mean_reward (`np.ndarray` of shape `(R,)`, *optional*):
            Mean rewards of the reference.
        source (sequence of `str`, *optional*):
            Source of each pair, which [`decide`] passes with `Flip(flip_mixture, by="source")`; one by default.
        estimates (`dict`, *optional*):
            Is filled with the estimate of each source, in the order of its rows.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`.
    """
    check_value("`threshold`", threshold, 0.5 <= threshold < 1, "give a probability of at least 0.5, below 1")
    margins = as_margins(strength)
    groups = group_by_source(source, len(margins))
    mask = np.zeros(len(margins), dtype=bool)
    parts = [margins[rows] for rows in groups.values()]
    small = [len(part) for part in parts if 0 < (~np.isnan(part)).sum() < MIN_PAIRS]
    if small and len(parts) > 1:
        logger.info(f"{sum(small):,} pairs of {len(small):,} sources of under {MIN_PAIRS} pairs stay as they are.")
    means = _as_means(mean_reward, len(margins))
    found = _estimate(parts, [means[rows] for rows in groups.values()], reference, reference_mean_reward)
    for (name, rows), estimate in zip(groups.items(), found, strict=True):
        # Comparisons with NaN are false.
        mask[rows] = estimate.flip & (estimate.posterior > threshold)
        _log(name, estimate, int(mask[rows].sum()))
        if estimates is not None:
            estimates[name] = replace(estimate, flip=mask[rows])
    return mask


def group_by_source(source: Any, count: int) -> dict[str | None, np.ndarray]:
    """Return the rows of each source, ascending."""
    if source is None:
        return {None: np.arange(count)}
    column = as_column(source, "source", count)
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    if len(encoded.dictionary.unique()) < len(encoded.dictionary):
        encoded = encoded.cast(encoded.type.value_type).dictionary_encode()
    names = [*encoded.dictionary.to_pylist(), None]
    codes = encoded.indices.cast(pa.int64()).fill_null(len(names) - 1).to_numpy(zero_copy_only=False)
    return {name: rows for name, rows in zip(names, group_rows(codes), strict=False) if len(rows)}


def as_column(values: Any, argument: str, count: int | None = None) -> pa.Array:
    """Return values as one Arrow array, of length `count` if that is passed; messages name the `argument`."""
    column = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, from_pandas=True)
    if count is not None and len(column) != count:
        raise ValueError(f"There are {count} pairs and {len(column)} entries of `{argument}`; pass one per pair.")
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _log(source: str | None, estimate: NoiseEstimate, flipped: int) -> None:
    """Say what is seen in a source, and what is done."""
    count, share = int((~np.isnan(estimate.posterior)).sum()), estimate.contradicted
    if count < MIN_PAIRS:
        return
    whose = f"{count:,} pairs" if source is None else f"the {count:,} pairs of {source!r}"
    seen = f"The model contradicts {share:.1%} of the labels of {whose}"
    low, high = estimate.interval
    if flipped and share > 0.45:
        as_what = "far more than by chance" if estimate.rate > 0.5 else "about as many as by chance"
        logger.warning(
            f"{seen}, {as_what}, and {flipped:,} are flipped: look at some of them, and if the model is wrong about "
            "such pairs, or they are labelled by another criterion, leave the source out of the curation."
        )
    elif flipped:
        told = f"{estimate.rate:.1%} of the labels are estimated to be wrong ({low:.0%} to {high:.0%})"
        logger.info(f"{seen}; {told}, and {flipped:,} are flipped.")
    elif estimate.reading == "not read":
        logger.warning(
            f"{seen}, which does not tell wrong labels from a model that cannot read such pairs; they are left as "
            "they are."
        )
    elif not estimate.is_identified:
        logger.warning(f"{seen}, from which between {low:.0%} and {high:.0%} may be wrong; nothing is flipped.")
    else:
        logger.info(f"{seen}, which shows no noise that is more than the model's own errors; nothing is flipped.")


class _Grid(NamedTuple):
    """The curves that are weighed, with the logs of their prior probabilities."""

    steepness: np.ndarray  # (K, 1): of accuracies
    lapse: np.ndarray
    fall: np.ndarray
    known: np.ndarray  # (K,): prior of the accuracy on pairs like the reference,
    alone: np.ndarray  # without a reference,
    foreign: np.ndarray  # and on a source that the model reads in another way
    level: np.ndarray  # (A, 1): log-odds of a wrong label at a margin of 1, in units of `_scale`,
    slope: np.ndarray  # their change per unit,
    shared: np.ndarray  # and what is added where the model errs
    noise: np.ndarray  # (A,)


@lru_cache(maxsize=1)
def _grid() -> _Grid:
    # Priors are those of real models and annotators: accuracies that rise with the margin, a tenth to a third of the
    # labels wrong, more of them on hard pairs than on easy ones. They were chosen on simulated models and annotators
    # (`benchmarks/noise_simulation.py`), and what is flipped depends little on them.
    log_k = np.linspace(math.log(0.15), math.log(30), 13)
    lapses, falls = np.array([0, 0.06, 0.15, 0.3, 0.6, 1]), np.array([0, 0.15, 0.35])
    k, lapse, fall = (axis.reshape(-1, 1) for axis in np.meshgrid(np.exp(log_k), lapses, falls, indexing="ij"))

    def prior(of_lapses: Sequence[float], of_falls: Sequence[float], spread: float = 1.3) -> np.ndarray:
        of_k = -(((log_k - math.log(2)) / spread) ** 2) / 2
        return log_softmax((of_k[:, None, None] + np.log(of_lapses)[:, None] + np.log(of_falls)).ravel())

    levels = np.append(np.linspace(-4.5, -0.1, 11), [0.3, 0.7, 1.2])
    slopes, shares = np.array([-2.7, -1.8, -1, -0.5, 0, 0.7]), np.array([0.0, 1])
    of_level = -(((levels + 1.3) / 1.2) ** 2) / 2
    of_slope, of_share = np.log([0.05, 0.08, 0.2, 0.15, 0.47, 0.05]), np.log([0.75, 0.25])
    noise = log_softmax((of_level[:, None, None] + of_slope[:, None] + of_share).ravel())
    level, slope, shared = (axis.reshape(-1, 1) for axis in np.meshgrid(levels, slopes, shares, indexing="ij"))
    # One more: all labels are reversed, but for a few.
    extra = [np.append(axis, [[value]], axis=0) for axis, value in ((level, 3.5), (slope, 0.0), (shared, 0.0))]
    return _Grid(
        *(k, lapse, fall),
        known=prior((0.71, 0.105, 0.075, 0.045, 0.02, 0.045), (0.7, 0.15, 0.15)),
        alone=prior((0.5, 0.2, 0.18, 0.06, 0.02, 0.04), (0.4, 0.3, 0.3), spread=1.9),
        foreign=prior((0.004, 0.004, 0.008, 0.012, 0.022, 0.95), (0.6, 0.2, 0.2)),
        level=extra[0],
        slope=extra[1],
        shared=extra[2],
        noise=np.append(noise + math.log(0.99), math.log(0.01)),
    )


# Prior probabilities: that no label of a source is wrong, with and without a reference, and that the model reads a
# source in another way than the rest, mostly not at all; the last also where sizes of margins or mean rewards differ
# from those of the reference.
_CLEAN, _CLEAN_ALONE, _FOREIGN, _FOREIGN_UNLIKE = 0.1, 0.3, 0.2, 0.5

# Where neither differs by a test, a source that is read in another way is so by chance. For each the probability is
# this times sqrt(1 / pairs + 1 / references): of such sources, simulated with mean rewards that differ by a standard
# normal in units of their deviation, and deviations that differ by exp of a normal of 0.4. Pairs of one prompt are
# alike, and tell less than as many others: they differ by the test more often than they should, which is to be
# careful, and where they do not, that is believed no further than to the last of these.
_CHANCE_SIZE, _CHANCE_MEAN, _LEAST_FOREIGN = 4.0, 1.4, 0.01


class _Bins(NamedTuple):
    """Reward margins of a source by size."""

    margin: np.ndarray  # (B,), in units of the scale
    agreed: np.ndarray  # (B,), pairs with a positive margin; of 0 one half
    contradicted: np.ndarray
    power: float  # of the likelihood


def _bin(margins: np.ndarray, scale: float) -> _Bins:
    ordered = margins[np.argsort(np.abs(margins), kind="stable")]
    parts = np.array_split(ordered, min(_BINS, len(ordered)))
    agreed, contradicted = (
        np.array([np.sum(sign * part > 0) + np.sum(part == 0) / 2 for part in parts]) for sign in (1, -1)
    )
    margin = np.array([np.mean(np.abs(part) / scale) for part in parts])
    return _Bins(margin, agreed, contradicted, min(1.0, _MAX_COUNT / len(margins)))


def bin_margins(margins: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean size, number and share of negative margins by size, each `(B,)`."""
    bins = _bin(margins, 1.0)
    pairs = bins.agreed + bins.contradicted
    return {"margin": bins.margin, "pairs": pairs, "contradicted": bins.contradicted / pairs}


def _accuracy(grid: _Grid, margin: np.ndarray) -> np.ndarray:
    """Return all accuracies at some margins, `(K, B)`."""
    rises = expit(grid.steepness * margin / (1 + (grid.fall * margin) ** 2))
    return ((1 - grid.lapse) * rises + grid.lapse / 2).clip(1e-6, 1 - 1e-6)


def _log_likelihood(contradicted: np.ndarray, bins: _Bins) -> np.ndarray:
    """Return the log-likelihood of the signs at probabilities of contradiction `(..., B)`."""
    return bins.power * (np.log(contradicted) @ bins.contradicted + np.log1p(-contradicted) @ bins.agreed)


class _Fit(NamedTuple):
    """All curves on a source."""

    accuracy: np.ndarray  # (K, 1, B)
    missed: np.ndarray  # (A, B): probability of a wrong label where the model is right,
    shared: np.ndarray  # (K, A, B): and where it errs
    contradicted: np.ndarray  # (K, A, B)
    log_joint: np.ndarray  # (K, A + 1): log-likelihood times prior of the noise; the last is no noise


def _fit(grid: _Grid, bins: _Bins, clean: float) -> _Fit:
    accuracy = _accuracy(grid, bins.margin)[:, None]
    base = grid.level + grid.slope * (np.minimum(bins.margin, 3) - 1)
    # A cause of errors of both can only show where the model knows anything.
    missed, shared = expit(base), expit(base + grid.shared * 1.5 * (2 * accuracy - 1))
    contradicted = missed * accuracy + (1 - shared) * (1 - accuracy)
    noisy = _log_likelihood(contradicted, bins) + grid.noise + math.log1p(-clean)
    none = _log_likelihood(1 - accuracy[:, 0], bins) + math.log(clean)
    return _Fit(accuracy, missed, shared, contradicted, np.concatenate([noisy, none[:, None]], axis=1))


def _as_means(mean_reward: npt.ArrayLike | None, count: int, argument: str = "mean_reward") -> np.ndarray:
    """Return mean rewards, all NaN if none are passed."""
    return np.full(count, np.nan) if mean_reward is None else as_margins(mean_reward, argument, count)


def _foreign(traits: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> float:
    """Return the prior probability that the model reads a source in another way than the reference, from samples of
    both of what wrong labels do not change, each with its `_CHANCE`; NaN is left out."""
    known_traits = [(own[~np.isnan(own)], known[~np.isnan(known)], factor) for own, known, factor in traits]
    traits = [trait for trait in known_traits if min(map(len, trait[:2])) >= MIN_PAIRS]
    chance = 1.0
    for own, known, factor in traits:
        test: Any = ks_2samp(own, known, method="asymp")
        if test.pvalue * len(traits) < 0.05:
            return _FOREIGN_UNLIKE
        chance *= min(1.0, factor * math.sqrt(1 / len(own) + 1 / len(known)))
    return max(_LEAST_FOREIGN, _FOREIGN * chance / (1 - _FOREIGN + _FOREIGN * chance))


def _estimate(
    parts: Sequence[np.ndarray],
    means: Sequence[np.ndarray],
    reference: npt.ArrayLike | None,
    reference_mean_reward: npt.ArrayLike | None,
) -> list[NoiseEstimate]:
    """Estimate the noise of each source; the accuracy is one, but where a source is read in another way."""
    known = None if reference is None else as_margins(reference, "reference")
    if known is None and reference_mean_reward is not None:
        raise ValueError("`reference_mean_reward` is passed without `reference`, whose mean rewards it is; pass both.")
    known_means = _as_means(reference_mean_reward, 0 if known is None else len(known), "reference_mean_reward")
    known = None if known is None else known[~np.isnan(known)]
    if known is not None and len(known) < MIN_PAIRS:
        raise ValueError(f"There are {len(known)} scored references; give at least {MIN_PAIRS}, or none.")
    scored = [part[~np.isnan(part)] for part in parts]
    fitted = [index for index, part in enumerate(scored) if len(part) >= MIN_PAIRS and part.any()]
    results = [_unknown(part) for part in parts]
    scale = _scale([scored[index] for index in fitted] + ([] if known is None else [known]))
    if not fitted or scale == 0:
        return results
    grid, clean = _grid(), _CLEAN_ALONE if known is None else _CLEAN
    shared = grid.alone
    if known is not None:
        reference_bins = _bin(known, scale)
        shared = log_softmax(grid.known + _log_likelihood(1 - _accuracy(grid, reference_bins.margin), reference_bins))
    binned = {index: _bin(scored[index], scale) for index in fitted}
    # Wrong labels turn signs of margins, and neither their sizes nor the mean rewards.
    foreign = dict.fromkeys(fitted, _FOREIGN)
    if known is not None:
        for index in fitted:
            sizes = np.abs(scored[index]), np.abs(known), _CHANCE_SIZE
            foreign[index] = _foreign([sizes, (means[index], known_means, _CHANCE_MEAN)])
    # Each source says something about the shared accuracy; pairs that are known to be right say it better.
    # Fits are made anew below, because all of them take much memory.
    evidence = dict.fromkeys(fitted, np.zeros(len(shared)))
    for index in fitted if len(fitted) > 1 and known is None else ():
        marginal = logsumexp(_fit(grid, binned[index], clean).log_joint, axis=1)
        own, other = math.log1p(-foreign[index]), math.log(foreign[index])
        evidence[index] = np.logaddexp(own + marginal, other + logsumexp(grid.foreign + marginal))
    total = np.sum(list(evidence.values()), axis=0)
    for index in fitted:
        prior = log_softmax(shared + total - evidence[index])
        prior = np.logaddexp(math.log1p(-foreign[index]) + prior, math.log(foreign[index]) + grid.foreign)
        fit = _fit(grid, binned[index], clean)
        joint = prior[:, None] + fit.log_joint
        weights = np.exp(joint - logsumexp(joint))
        limits = (MAX_RISK_ALONE, MAX_WIDTH_ALONE) if known is None else (MAX_RISK, MAX_WIDTH)
        results[index] = _conclude(parts[index], binned[index], fit, weights, scale, *limits)
    return results


def _unknown(margins: np.ndarray) -> NoiseEstimate:
    scored = margins[~np.isnan(margins)]
    contradicted = float(np.mean(scored < 0) + np.mean(scored == 0) / 2) if len(scored) else math.nan
    posterior = np.where(np.isnan(margins), np.nan, 0.0)
    return NoiseEstimate(posterior, np.zeros(len(margins), dtype=bool), contradicted=contradicted)


def _conclude(
    margins: np.ndarray,
    bins: _Bins,
    fit: _Fit,
    weights: np.ndarray,
    scale: float,
    max_risk: float,
    max_width: float,
) -> NoiseEstimate:
    """Draw the estimate of a source from the posterior weights of the curves, `(K, A + 1)`."""
    pairs, noisy = bins.agreed + bins.contradicted, weights[:, :-1]
    share = pairs / pairs.sum()
    accuracy, of_accuracy = fit.accuracy[:, 0], weights.sum(axis=1)
    wrong = fit.missed * fit.accuracy + fit.shared * (1 - fit.accuracy)  # (K, A, B)
    rates = np.append(wrong @ share, np.zeros((len(weights), 1)), axis=1)
    if_contradicted = fit.missed * fit.accuracy / fit.contradicted
    if_agreed = fit.shared * (1 - fit.accuracy) / (1 - fit.contradicted)
    negative, positive, noise = (np.tensordot(noisy, each, axes=2) for each in (if_contradicted, if_agreed, wrong))
    lowest, highest = _quantiles(rates, weights, (0.025, 0.975))
    accuracies = accuracy @ share
    low, high = _quantiles(accuracies, of_accuracy, (0.05, 0.95))
    is_guess = of_accuracy[accuracies < NOT_READ].sum() >= MAX_GUESS
    reading = "read" if low >= READ else "not read" if is_guess else "hardly read"
    is_identified = reading != "not read" and highest - lowest <= max_width
    threshold = 1.0
    for bound in np.arange(0.5, 0.95, 0.05):
        flipped = bins.contradicted * (negative > bound) / pairs.sum()
        if not flipped.any():
            threshold = float(bound) if bound == 0.5 else threshold  # there is nothing to flip
            break
        harm = np.append(flipped.sum() - 2 * (if_contradicted @ flipped), np.full((len(weights), 1), flipped.sum()), 1)
        if weights[harm > HARM].sum() <= max_risk:
            threshold = float(bound)
            break
    sizes, is_negative = np.abs(margins) / scale, margins < 0
    posterior = np.where(
        is_negative, np.interp(sizes, bins.margin, negative), np.interp(sizes, bins.margin, positive)
    )  # NaN stays NaN
    posterior = posterior if is_identified else np.where(np.isnan(margins), np.nan, 0.0)
    lows, highs = np.transpose([_quantiles(one, of_accuracy, (0.05, 0.95)) for one in accuracy.T])
    return NoiseEstimate(
        posterior=posterior,
        flip=is_negative & (posterior > threshold),
        rate=float(np.sum(weights * rates)),
        interval=(lowest, highest),
        accuracy=float(of_accuracy @ accuracies),
        accuracy_interval=(low, high),
        is_identified=is_identified,
        reading=reading,
        contradicted=float(bins.contradicted.sum() / pairs.sum()),
        clean=float(weights[:, -1].sum()),
        threshold=threshold,
        curves=MarginCurves(
            bins.margin * scale, pairs, bins.contradicted / pairs, of_accuracy @ accuracy, lows, highs, noise, negative
        ),
    )


def _quantiles(values: np.ndarray, weights: np.ndarray, levels: Sequence[float]) -> list[float]:
    """Return quantiles of weighted values, both of one shape."""
    order = np.argsort(values, axis=None)
    reached = np.searchsorted(np.cumsum(weights.ravel()[order]), levels)
    return values.ravel()[order][np.minimum(reached, values.size - 1)].tolist()


def _scale(parts: Sequence[np.ndarray]) -> float:
    """Return the size of a reward margin that is neither large nor small, 1.48 times the median."""
    sizes = np.abs(np.concatenate([*parts, np.zeros(0)]))
    median = float(np.median(sizes)) if len(sizes) else 0.0
    return 1.48 * (median or (_root_mean_square(sizes) if len(sizes) else 0.0))


def _root_mean_square(values: np.ndarray) -> float:
    # Scaled by the largest first, so that squares neither overflow nor vanish.
    largest = float(np.abs(values).max())
    return largest * math.sqrt(np.mean((values / largest) ** 2)) if largest else 0.0
