"""A linear probe that sees style alone: how well does it tell which answer of a pair was chosen?

The probe is a logistic regression of the label on differences of style, without intercept. So swapping the two sides
of a pair changes the sign of its score and nothing else, and weights that balance style leave the probe nothing: its
gradient at 0 is the weighted mean difference.

Its accuracy on new pairs is estimated by repeated cross-validation. The interval has to cover more than the noise of
counting held-out pairs: a pair is scored by a probe that learned from the others, and they by probes that learned from
it, so that outcomes go together, the more the less style tells ([`held_out_scores`]).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.special import expit
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from ..evaluation.intervals import Interval, group_sums, wilson
from .pair_style import PairStyle


# Pairs that are scored over all repeats of the cross-validation, and the most repeats.
_SCORED, _REPEATS = 20_000, 10
# Width of the kernel that measures how dense scores are at 0, in standard deviations of the scores.
_BANDWIDTH = 0.25
# Of 100 samples of pairs without leakage, this share has a mean style so near to 0.
_BALANCED = 0.01


@dataclass(frozen=True)
class ProbeScores:
    """
    Scores of N pairs by probes that have not seen their groups.

    Parameters:
        score (`np.ndarray` of shape `(N,)`):
            Log odds that the chosen answer is the better one, by its style: the mean over repeats.
        won (`np.ndarray` of shape `(N,)`):
            Share of the repeats in which the score is positive, ties counted half.
        variance (`float`):
            Variance of the weighted mean of `won` about the accuracy, on new pairs, of the probe fitted on all pairs.
    """

    score: np.ndarray
    won: np.ndarray
    variance: float


def fit_probe(style: PairStyle) -> np.ndarray:
    """
    Fits the probe under the pairs' weights.

    Args:
        style ([`PairStyle`]):
            At least two pairs.

    Returns:
        `np.ndarray` of shape `(K,)`: log odds per unit of each feature, 0 for a feature that never differs.
    """
    scale = root_mean_square(style)
    return _coefficients(style.difference / scale, style.weight / style.weight.mean()) / scale


def _coefficients(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    # The loss of a pair and of its mirror are the same, so that either will do; scikit-learn wants both labels.
    sign = np.where(np.arange(len(x)) % 2, 1.0, -1.0)
    probe = LogisticRegression(C=1.0, fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=200)
    probe.fit(x * sign[:, None], sign > 0, sample_weight=weight)
    return probe.coef_[0]


def folds(group: np.ndarray, num_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows held out, `num_folds` times; no group is in both."""
    codes, sizes = np.unique(group, return_inverse=True, return_counts=True)[1:]
    # Which fold a group of a given size falls into goes by its number.
    shuffled = np.random.default_rng(seed).permutation(codes.max() + 1)[codes]
    if (sizes == sizes[0]).all():  # what `GroupKFold` does, without its loop over groups
        fold = shuffled % num_folds
        return [(np.flatnonzero(fold != one), np.flatnonzero(fold == one)) for one in range(num_folds)]
    return list(GroupKFold(num_folds).split(np.zeros((len(group), 1)), groups=shuffled))


def held_out_scores(style: PairStyle, num_folds: int, seed: int) -> ProbeScores:
    r"""
    Scores every pair by probes that were fitted on other folds, over several divisions into folds.

    The variance has two parts. Groups \(g\) vary: \(\sum_g u_g^2\), with \(u_g\) what the group adds to the error.
    And groups of different folds influence each other's probes. Leaving \(h\) out of the probe that scores \(g\)
    changes the latter's share of right pairs by \(a_g^T H_g^{-1} b_h\): \(b_h\) is the gradient of the held-out loss
    of \(h\), \(H_g\) the Hessian of the probe that scores \(g\), and \(a_g\) the sum of the differences of \(g\)
    whose score is about 0, where a small change turns it. The covariance is the sum over pairs of groups of
    \(a_g^T H_g^{-1} b_h \cdot a_h^T H_h^{-1} b_g\), which is a trace of K x K matrices. In a set without leakage this
    adds about two thirds to the first part; where style tells much, nothing.

    Args:
        style ([`PairStyle`]):
            Pairs of at least `num_folds` groups.
        num_folds (`int`):
            Number of folds.
        seed (`int`):
            Seed of the assignment of groups to folds.

    Returns:
        [`ProbeScores`]
    """
    count = len(style)
    share, x, start = style.weight / style.weight.sum(), style.difference / root_mean_square(style), fit_probe(style)
    start = start * root_mean_square(style)
    score, won, together = np.zeros(count), np.zeros(count), 0.0
    repeats = int(np.clip(_SCORED // count, 1, _REPEATS))
    for repeat in range(repeats):
        held_out, parts = np.zeros(count), []
        for train, test in folds(style.group, num_folds, seed + repeat):
            total = style.weight[train].sum()
            if total == 0:
                continue
            weight = style.weight * (len(train) / total)
            probe, hessian = _fit(x[train], weight[train], start)
            held_out[test] = x[test] @ probe
            parts.append((test, weight, np.linalg.inv(hessian)))
        win = wins(held_out)
        score, won = score + held_out / repeats, won + win / repeats
        # Outcomes that go together more than they vary are a density near 0 that cannot be measured.
        most = float((group_sums(share * (win - share @ win), style.group) ** 2).sum())
        covariance = _interaction(x, share, style.group, held_out, parts)
        together += min(max(covariance, 0.0), most) / repeats
    own = float((group_sums(share * (won - share @ won), style.group) ** 2).sum())
    return ProbeScores(score, won, own + together)


def learning_noise(style: PairStyle, scores: ProbeScores, effect: np.ndarray) -> np.ndarray:
    """
    What each pair adds to the error of an estimate by what the probe learned from it.

    Args:
        style ([`PairStyle`]):
            The pairs.
        scores ([`ProbeScores`]):
            Their scores when held out.
        effect (`np.ndarray` of shape `(N,)`):
            Derivative of the estimate by the score of each pair.

    Returns:
        `np.ndarray` of shape `(N,)`
    """
    scale = root_mean_square(style)
    x, weight, against = style.difference / scale, style.weight / style.weight.mean(), expit(-scores.score)
    hessian = (x * (weight * against * (1 - against))[:, None]).T @ x + np.eye(x.shape[1])
    return weight * against * (x @ np.linalg.solve(hessian, effect @ x))


def density_at_zero(score: np.ndarray, used: np.ndarray) -> np.ndarray:
    """How near each score is to 0, as a normal density; `used` are the pairs whose scores say how far they spread."""
    size = np.abs(score[(score != 0) & used])
    if len(size) == 0:
        return np.zeros(len(score))
    width = _BANDWIDTH * float(np.median(size)) / 0.6745  # the median of |z| of a normal z
    return np.exp(-((score / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))


def _interaction(x: np.ndarray, share: np.ndarray, group: np.ndarray, score: np.ndarray, parts: list) -> float:
    """Covariance of the outcomes of different folds, which learn from each other."""
    density = density_at_zero(score, share > 0)
    every, own = np.zeros((x.shape[1], x.shape[1])), 0.0
    for test, weight, inverse in parts:
        turned = group_sums((share[test] * density[test])[:, None] * x[test], group[test])
        learned = group_sums((weight[test] * expit(-score[test]))[:, None] * x[test], group[test])
        fold = learned.T @ turned @ inverse
        every, own = every + fold, own + float(np.sum(fold * fold.T))
    return float(np.sum(every * every.T)) - own


def _fit(x: np.ndarray, weight: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method for the probe from a point near to it, and the Hessian there."""
    point, steps = start, 0
    while True:
        against = expit(-(x @ point))
        hessian = (x * (weight * against * (1 - against))[:, None]).T @ x + np.eye(x.shape[1])
        step = np.linalg.solve(hessian, x.T @ (weight * against) - point)
        point, steps = point + step, steps + 1
        if np.abs(step).max() < 1e-3 * max(1.0, float(np.abs(point).max())):
            return point, hessian
        if steps == 10:  # it does not settle: from 0, with a line search
            return _coefficients(x, weight), hessian


def root_mean_square(style: PairStyle) -> np.ndarray:
    """Size of each feature's differences, the same when sides are swapped; 1 for a feature that never differs."""
    scale = np.sqrt((style.difference**2 * style.weight[:, None]).sum(0) / style.weight.sum())
    return np.where(scale > 0, scale, 1.0)


def wins(score: np.ndarray) -> np.ndarray:
    """1 where a score is positive, 0 where it is negative, 0.5 for a tie."""
    return (np.sign(score) + 1) / 2


def auc_of(scores: ProbeScores, style: PairStyle) -> tuple[float, Interval]:
    """
    AUC of pairs against their mirrors, with an interval.

    A pair's mirror, its sides swapped, has the negative score. The AUC is the chance that a pair scores above its own
    mirror, P(s > -s), ties counted half: the accuracy of the probe in naming the chosen answer. Comparing each pair
    with its own mirror, and not with all, is what the probe is for; and it makes scores of different folds, which have
    no common scale, add up.

    Folds of a set that was balanced are no samples: what one has too much of, the others lack, so that the probe is
    wrong more often than not. Where the mean style is nearer to 0 than in 99 of 100 samples of pairs without leakage,
    the distance of the AUC from 0.5 is taken off in proportion. At a mean of 0 the probe of all pairs is 0 and the AUC
    0.5, as it is for any new pairs; the interval is that of the coin that such a probe amounts to, at least.

    Args:
        scores ([`ProbeScores`]):
            Scores of the pairs when held out.
        style ([`PairStyle`]):
            The pairs.

    Returns:
        `tuple`: the AUC, and its 95 % interval, Wilson's for so many independent pairs as have that variance.
    """
    share, unbalanced, variance = style.weight / style.weight.sum(), _unbalanced(style), scores.variance
    auc = 0.5 + (float(share @ scores.won) - 0.5) * unbalanced
    units = 1 / float((group_sums(share, style.group) ** 2).sum())
    if unbalanced < 1:
        toss = float((group_sums(share * (wins(scores.score) - 0.5), style.group) ** 2).sum())
        variance = max(variance, toss)
    if variance > 0 and 0 < auc < 1:
        count = auc * (1 - auc) / variance
    else:  # all won or all lost
        count = units
    return auc, wilson(auc, count, freedom=max(units - 1, 1))


def _unbalanced(style: PairStyle) -> float:
    """1 for a set whose mean style is as far from 0 as samples have it, less for a set that was balanced; 0 at 0."""
    sums = group_sums(style.weight[:, None] * style.difference / root_mean_square(style), style.group)
    total, count = sums.sum(0), int((np.abs(sums).sum(1) > 0).sum())
    values, vectors = eigh(sums.T @ sums)
    known = values > 1e-9 * max(values[-1], 1e-300)
    rank = int(known.sum())
    if count <= rank:
        return 1.0
    # The share of a constant 1 that the sums explain: that of random normal sums has a beta distribution.
    explained = float(((total @ vectors[:, known]) ** 2 / values[known]).sum()) / count
    return min(1.0, explained / float(beta.ppf(_BALANCED, rank / 2, (count - rank) / 2)))
