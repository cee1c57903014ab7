"""A linear probe that sees style alone: how well does it tell which answer of a pair was chosen?

The probe is a logistic regression of the label on differences of style, without intercept. So swapping the two sides
of a pair changes the sign of its score and nothing else, and weights that balance style leave the probe nothing: its
gradient at 0 is the weighted mean difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.stats import chi2, norm
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from .pair_style import PairStyle


# A probe votes only where the training folds show at this level that style tells anything.
LEVEL = 0.01
_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class ProbeScores:
    """
    Scores of N pairs by probes that have not seen their groups.

    Parameters:
        score (`np.ndarray` of shape `(N,)`):
            Log odds that the chosen answer is the better one, by its style.
        vote (`np.ndarray` of shape `(N,)`):
            The same, but 0 where the training folds do not show that style tells anything.
    """

    score: np.ndarray
    vote: np.ndarray


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
    # The loss of a pair and of its mirror are the same, so that either will do; scikit-learn wants both labels.
    sign = np.where(np.arange(len(style)) % 2, 1.0, -1.0)
    probe = LogisticRegression(C=1.0, fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=200)
    probe.fit(style.difference / scale * sign[:, None], sign > 0, sample_weight=style.weight / style.weight.mean())
    return probe.coef_[0] / scale


def folds(group: np.ndarray, num_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows held out, `num_folds` times; no group is in both."""
    codes = np.unique(group, return_inverse=True)[1]
    # Which fold a group of a given size falls into goes by its number.
    shuffled = np.random.default_rng(seed).permutation(codes.max() + 1)[codes]
    return list(GroupKFold(num_folds).split(np.zeros((len(group), 1)), groups=shuffled))


def held_out_scores(style: PairStyle, num_folds: int, seed: int) -> ProbeScores:
    """
    Scores every pair by a probe that was fitted on the other folds.

    Sets that tell nothing would come out below 0.5 without the vote's condition, and far below where they were
    balanced: what one fold has too much of, the others lack, because the whole has a mean of exactly 0.

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
    score, vote = np.zeros(len(style)), np.zeros(len(style))
    for train, test in folds(style.group, num_folds, seed):
        part = style.take(train)
        if not part.weight.any():
            continue
        score[test] = style.difference[test] @ fit_probe(part)
        if tells_anything(part):
            vote[test] = score[test]
    return ProbeScores(score, vote)


def tells_anything(style: PairStyle) -> bool:
    """Score test of the probe at 0, with groups as the units that are independent: is the mean difference not 0?"""
    sums = group_sums(style.weight[:, None] * style.difference / root_mean_square(style), style.group)
    total = sums.sum(0)
    values, vectors = eigh(sums.T @ sums)
    known = values > 1e-9 * max(values[-1], 1e-300)
    statistic = ((total @ vectors[:, known]) ** 2 / values[known]).sum()
    return bool(chi2.sf(statistic, known.sum()) < LEVEL)


def root_mean_square(style: PairStyle) -> np.ndarray:
    """Size of each feature's differences, the same when sides are swapped; 1 for a feature that never differs."""
    scale = np.sqrt((style.difference**2 * style.weight[:, None]).sum(0) / style.weight.sum())
    return np.where(scale > 0, scale, 1.0)


def group_sums(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sum of the rows of each group."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    return np.add.reduceat(values[order], starts, axis=0)


def wins(score: np.ndarray) -> np.ndarray:
    """1 where a score is positive, 0 where it is negative, 0.5 for a tie."""
    return (np.sign(score) + 1) / 2


def auc_of(scores: ProbeScores, weight: np.ndarray, group: np.ndarray) -> tuple[float, tuple[float, float]]:
    """
    AUC of pairs against their mirrors, with an interval.

    A pair's mirror, its sides swapped, has the negative score. The AUC is the chance that a pair scores above its own
    mirror, P(s > -s), ties counted half: the accuracy of the probe in naming the chosen answer. Comparing each pair
    with its own mirror, and not with all, is what the probe is for; and it makes scores of different folds, which have
    no common scale, add up.

    Args:
        scores ([`ProbeScores`]):
            Scores of held-out pairs.
        weight (`np.ndarray` of shape `(N,)`):
            Weights of the pairs.
        group (`np.ndarray` of shape `(N,)`):
            Groups, which are the independent units.

    Returns:
        `tuple`: the AUC, and its 95 % interval, a Wilson interval with the cluster-robust variance. A probe without a
        vote has the interval of the coin that it amounts to.
    """
    share = weight / weight.sum()
    auc = 0.5 + float(share @ np.sign(scores.vote)) / 2  # exactly 0.5 without votes
    won = wins(scores.score)
    mean = float(share @ won)
    variance = float((group_sums(share * (won - mean), group) ** 2).sum())
    if variance > 0:
        effective = mean * (1 - mean) / variance
    else:  # all won or all lost
        effective = 1 / float((group_sums(share, group) ** 2).sum())
    return auc, wilson(auc, effective)


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def clustered_interval(value: float, influence: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """95 % interval of an estimate, of which `influence` has what each pair adds to its error."""
    half = _Z * float(np.sqrt((group_sums(influence, group) ** 2).sum()))
    return value - half, value + half
