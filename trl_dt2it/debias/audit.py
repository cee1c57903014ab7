"""Style audit: the share of labels, and of a model's rewards, that a cross-validated probe predicts from style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.linalg import eigh
from scipy.special import expit
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold

from ..data.columns import column_of
from ..evaluation.metrics import Interval, clustered_interval, group_sums, wilson
from .reports import FeatureLeakage, RewardStyle, StyleLeakage, StyleReport
from .style import PairStyle, parts_by, read_pair_style


Scorer = Callable[[Dataset], tuple[Sequence[float], Sequence[float]]]

_MIN_GROUPS = 10  # with fewer independent groups, the variance between groups is not known well enough
_SCORED, _REPEATS = 20_000, 10  # pairs to score over all repeats of the cross-validation, and the most repeats
_BANDWIDTH = 0.25  # of the kernel for the density of scores at 0, in standard deviations of the scores
_BALANCED = 0.01  # share of samples without leakage whose mean style is nearer to 0 than that of a balanced set


def audit_style(
    dataset: Dataset,
    *,
    by: str | None = "source",
    scorer: Scorer | tuple[str, str] | None = None,
    reference: Dataset | None = None,
    features: Sequence[str] | None = None,
    num_folds: int = 10,
    seed: int = 42,
    min_pairs: int = 200,
) -> StyleReport:
    """
    Measure leakage: how far style alone tells which answer of a pair was chosen.

    Leakage is the accuracy with which a logistic probe, which sees only differences of style, names the chosen answer
    of pairs whose `group_id` it has not seen. It is the AUC of pairs against their mirrors, so 0.5 means that style
    tells nothing. In 95 of 100 sets, the interval holds the AUC that the probe of the whole set reaches on new pairs.
    A column `weight` counts, in fitting and in measuring.

    Args:
        dataset (`Dataset`):
            Preference rows; images are not read.
        by (`str`, *optional*, defaults to `"source"`):
            Column whose values are also measured one by one; `None`, or no column `source`, for the whole only.
        scorer (`Callable` or `tuple[str, str]`, *optional*):
            Model to measure too: a function from the data set to the rewards of the chosen and of the rejected
            answers, or the names of two columns of rewards, such as `("chosen_reward", "rejected_reward")`.
        reference (`Dataset`, *optional*):
            Rows that decide what style votes for where that of `dataset` tells nothing, such as those that the model
            was trained on. By default the held-out folds of `dataset`.
        features (`Sequence[str]`, *optional*):
            Some of `STYLE_FEATURES`; all by default.
        num_folds, seed (`int`, *optional*, default to `10` and `42`):
            Most folds of the cross-validation, each of at least two groups, and their seed.
        min_pairs (`int`, *optional*, defaults to `200`):
            Fewest pairs that are measured; smaller sources get a note.

    Returns:
        [`StyleReport`]

    Raises:
        `ValueError`: if a column is missing, or if rewards are not finite or not one per row.
    """
    if num_folds < 2:
        raise ValueError(f"`num_folds` is {num_folds}; pass at least 2.")
    parts = parts_by(dataset, by, optional="source")
    style = read_pair_style(dataset, features)
    known: dict[str, Any] = {}  # arrays of a value per pair
    if scorer is not None:
        known["margins"] = _reward_margins(dataset, scorer)
    if reference is not None:
        known["votes"] = style.difference @ fit_probe(read_pair_style(reference, style.features))
    options: dict[str, Any] = {"num_folds": num_folds, "seed": seed, "min_pairs": min_pairs}

    def measure(rows: np.ndarray) -> StyleLeakage:
        return leakage(style.take(rows), **{name: values[rows] for name, values in known.items()}, **options)

    overall = measure(np.arange(len(style)))
    # A single source holds the same pairs once more.
    return StyleReport(overall, {name: overall if len(parts) == 1 else measure(rows) for name, rows in parts.items()})


def leakage(
    style: PairStyle,
    *,
    margins: np.ndarray | None = None,
    votes: np.ndarray | None = None,
    num_folds: int = 10,
    seed: int = 42,
    min_pairs: int = 200,
) -> StyleLeakage:
    """Leakage of some pairs, as [`audit_style`] measures it. Shapes: `margins` `(N,)`, `votes` `(N,)`."""
    num_groups = len(np.unique(style.group))
    note = why_not_measured(style.weight, style.group, num_folds=num_folds, min_pairs=min_pairs)
    if note is None and not style.difference.any():
        note = "no feature differs in any pair"
    if note is not None:
        return StyleLeakage(len(style), num_groups, note=note)
    num_folds = min(num_folds, num_groups // 2)
    scores = held_out_scores(style, num_folds, seed)
    auc, interval = _auc_against_mirrors(scores, style)
    reward = None if margins is None else _reward_style(style, margins, votes, scores, num_folds, seed)
    return StyleLeakage(len(style), num_groups, auc, interval, _by_feature(style), reward)


def why_not_measured(weight: np.ndarray, group: np.ndarray, *, num_folds: int, min_pairs: int) -> str | None:
    """The reason why pairs of these weights and groups are too few to cross-validate, if they are."""
    num_groups, least = len(np.unique(group)), min(2 * num_folds, _MIN_GROUPS)
    notes = {
        f"too few pairs: {len(group)} of at least {min_pairs}": len(group) < min_pairs,
        f"too few groups: {num_groups} of at least {least} for {least // 2} folds": num_groups < least,
        "every weight is 0": not weight.any(),
    }
    return next((note for note, holds in notes.items() if holds), None)


def _by_feature(style: PairStyle) -> dict[str, FeatureLeakage]:
    share = style.weight / style.weight.sum()
    mean, coefficient = share @ style.difference, fit_probe(style) * root_mean_square(style)
    return {
        name: FeatureLeakage(
            auc=0.5 + float(share @ np.sign(style.difference[:, index])) / 2,
            difference=float(mean[index] / style.spread[index]) if style.spread[index] > 0 else 0.0,
            coefficient=float(coefficient[index]),
        )
        for index, name in enumerate(style.features)
    }


def fit_probe(style: PairStyle) -> np.ndarray:
    """Fit the probe under the weights of the pairs. Shapes: returns `(K,)`."""
    scale = root_mean_square(style)
    return _coefficients(style.difference / scale, style.weight / style.weight.mean()) / scale


def _coefficients(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    # A pair and its mirror have the same loss, so either will do; scikit-learn wants both labels.
    sign = np.where(np.arange(len(x)) % 2, 1.0, -1.0)
    probe = LogisticRegression(C=1.0, fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=200)
    probe.fit(x * sign[:, None], sign > 0, sample_weight=weight)
    return probe.coef_[0]


def root_mean_square(style: PairStyle) -> np.ndarray:
    """Size of each feature's differences, the same when sides are swapped; 1 for a feature that never differs."""
    scale = np.sqrt((style.difference**2 * style.weight[:, None]).sum(0) / style.weight.sum())
    return np.where(scale > 0, scale, 1.0)


def folds(group: np.ndarray, num_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows to hold out, `num_folds` times; no group is in both."""
    codes, sizes = np.unique(group, return_inverse=True, return_counts=True)[1:]
    # `GroupKFold` assigns groups of one size to folds by their numbers.
    shuffled = np.random.default_rng(seed).permutation(codes.max() + 1)[codes]
    if (sizes == sizes[0]).all():  # the result of `GroupKFold`, without its loop over groups
        fold = shuffled % num_folds
        return [(np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)) for held_out in range(num_folds)]
    return list(GroupKFold(num_folds).split(np.zeros((len(group), 1)), groups=shuffled))


@dataclass(frozen=True)
class ProbeScores:
    """Scores of N pairs by probes that have not seen their groups."""

    score: np.ndarray  # (N,): log odds, by style, that the chosen answer is the better one; mean over repeats
    won: np.ndarray  # (N,): share of the repeats in which the score is positive, ties counted half
    variance: float  # of the weighted mean of `won` about the accuracy, on new pairs, of the probe of all pairs


def held_out_scores(style: PairStyle, num_folds: int, seed: int) -> ProbeScores:
    """Score every pair by probes fitted on other folds, over several divisions into folds."""
    count, scale = len(style), root_mean_square(style)
    share, x, start = style.weight / style.weight.sum(), style.difference / scale, fit_probe(style) * scale
    score, won, between_folds = np.zeros(count), np.zeros(count), 0.0
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
        # Outcomes that covary more than they vary are a density near 0 that cannot be measured.
        most = float((group_sums(share * (win - share @ win), style.group) ** 2).sum())
        covariance = _covariance_of_folds(x, share, style.group, held_out, parts)
        between_folds += min(max(covariance, 0.0), most) / repeats
    between_groups = float((group_sums(share * (won - share @ won), style.group) ** 2).sum())
    return ProbeScores(score, won, between_groups + between_folds)


def _covariance_of_folds(x: np.ndarray, share: np.ndarray, group: np.ndarray, score: np.ndarray, parts: list) -> float:
    """Covariance of the outcomes of different folds, whose probes learn from each other."""
    # Leaving group h out of the probe that scores group g changes the share of right pairs of g by a_g' H_g^-1 b_h:
    # b_h is the gradient of the held-out loss of h, H_g the Hessian of the probe that scores g, and a_g the sum of
    # those differences of g whose score is about 0, where a small change turns it. The covariance is the sum over
    # pairs of groups of a_g' H_g^-1 b_h times a_h' H_h^-1 b_g, a trace of K x K matrices. In a set without leakage it
    # adds about two thirds to the variance between groups; where style tells much, nothing.
    density = density_at_zero(score, share > 0)
    every, own = np.zeros((x.shape[1], x.shape[1])), 0.0
    for test, weight, inverse in parts:
        turned = group_sums((share[test] * density[test])[:, None] * x[test], group[test])
        learned = group_sums((weight[test] * expit(-score[test]))[:, None] * x[test], group[test])
        fold = learned.T @ turned @ inverse
        every, own = every + fold, own + float(np.sum(fold * fold.T))
    return float(np.sum(every * every.T)) - own


def density_at_zero(score: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Nearness of each score to 0, as a normal density whose width follows from the scores of the `used` pairs."""
    size = np.abs(score[(score != 0) & used])
    if len(size) == 0:
        return np.zeros(len(score))
    width = _BANDWIDTH * float(np.median(size)) / 0.6745  # the median of |z| of a normal z
    return np.exp(-((score / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))


def _fit(x: np.ndarray, weight: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method for the probe from a point near it; the coefficients and the Hessian there."""
    point = start
    for _ in range(10):
        against = expit(-(x @ point))
        hessian = _hessian(x, weight, against)
        step = np.linalg.solve(hessian, x.T @ (weight * against) - point)
        point = point + step
        if np.abs(step).max() < 1e-3 * max(1.0, float(np.abs(point).max())):
            return point, hessian
    return _coefficients(x, weight), hessian  # it does not settle: from 0, with a line search


def _hessian(x: np.ndarray, weight: np.ndarray, against: np.ndarray) -> np.ndarray:
    return (x * (weight * against * (1 - against))[:, None]).T @ x + np.eye(x.shape[1])


def wins(score: np.ndarray) -> np.ndarray:
    """1 where a score is positive, 0 where it is negative, 0.5 for a tie."""
    return (np.sign(score) + 1) / 2


def _auc_against_mirrors(scores: ProbeScores, style: PairStyle) -> tuple[float, Interval]:
    """AUC of pairs against their mirrors, with an interval."""
    # A pair's mirror, its sides swapped, has the negative score. The chance that a pair scores above its own mirror,
    # P(s > -s), is the accuracy of the probe. Scores of different folds have no common scale, and need none here.
    #
    # The folds of a balanced set are no samples: what one has too much of, the others lack, so that the probe is
    # wrong more often than not. The AUC's distance from 0.5 is then shrunk. At a mean style of 0 the probe of all
    # pairs is 0 and its AUC 0.5, and the interval is at least that of a coin.
    share, unbalanced, variance = style.weight / style.weight.sum(), _unbalanced(style), scores.variance
    auc = 0.5 + (float(share @ scores.won) - 0.5) * unbalanced
    units = 1 / float((group_sums(share, style.group) ** 2).sum())
    if unbalanced < 1:
        toss = float((group_sums(share * (wins(scores.score) - 0.5), style.group) ** 2).sum())
        variance = max(variance, toss)
    # Without variance, all are won or all lost.
    count = auc * (1 - auc) / variance if variance > 0 and 0 < auc < 1 else units
    return auc, wilson(auc, count, freedom=max(units - 1, 1))


def _unbalanced(style: PairStyle) -> float:
    """1 for a set whose mean style is as far from 0 as samples have it, less for a balanced set; 0 at 0."""
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


def _reward_margins(dataset: Dataset, scorer: Callable[[Dataset], Any] | Sequence[str]) -> np.ndarray:
    """Reward margins of all pairs. Shapes: returns `(N,)` `float64`."""
    if callable(scorer):
        chosen, rejected = (np.asarray(side, dtype=np.float64) for side in scorer(dataset))
    else:
        if isinstance(scorer, str) or len(scorer) != 2:
            raise ValueError("`scorer` must be a function or the names of two columns, of chosen and of rejected.")
        if missing := [name for name in scorer if name not in dataset.column_names]:
            raise ValueError(f"`scorer` names the column {missing[0]!r}; there are {', '.join(dataset.column_names)}.")
        columns = (column_of(dataset, name).cast("float64").fill_null(np.nan) for name in scorer)
        chosen, rejected = (column.to_numpy(zero_copy_only=False) for column in columns)
    for side, values in (("chosen", chosen), ("rejected", rejected)):
        if values.shape != (len(dataset),):
            wanted = f"the {side} answers of {len(dataset)} rows; it must return one number per row"
            raise ValueError(f"The scorer gave rewards of shape {values.shape} for {wanted}.")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"The reward of the {side} answer of row {bad[0]} is {values[bad[0]]}, not finite.")
    return chosen - rejected


def _reward_style(
    style: PairStyle, margins: np.ndarray, votes: np.ndarray | None, scores: ProbeScores, num_folds: int, seed: int
) -> RewardStyle:
    """Dependence of reward margins on style beyond the label. Shapes: `margins` `(N,)`, `votes` `(N,)`."""
    # Every pair has its chosen side first, so the label is the same for all, and what the margins have in common is
    # due to it. Only their differences from the mean are put down to style. Style may also go with the difference in
    # quality: compare with a model that was trained on balanced pairs.
    share, group, won = style.weight / style.weight.sum(), style.group, wins(margins)
    vote = scores.score if votes is None else votes

    def interval(value: float, direct: np.ndarray, by_vote: np.ndarray) -> tuple[float, float]:
        # Votes of the pairs themselves are uncertain too: in pairs without leakage, each vote is chance, and so is the
        # sign of what the model seems to make of it.
        if votes is None:
            direct = direct + _learning_noise(style, scores, by_vote)
        return clustered_interval(value, direct, group)

    agree, disagree = vote > 0, vote < 0
    agree_accuracy, disagree_accuracy = (
        float(part @ won / part.sum()) if part.sum() > 0 else None for part in (share * agree, share * disagree)
    )
    accuracy_gap = gap_interval = follows = follows_interval = None
    if agree_accuracy is not None and disagree_accuracy is not None:
        accuracy_gap = agree_accuracy - disagree_accuracy
        by_agree = (won - agree_accuracy) / (share @ agree)
        by_disagree = (won - disagree_accuracy) / (share @ disagree)
        turned = share * density_at_zero(vote, share > 0) * (by_agree + by_disagree)
        gap_interval = interval(accuracy_gap, share * (agree * by_agree - disagree * by_disagree), turned)
    centered_margins, centered_vote = margins - share @ margins, vote - share @ vote
    margin_variance, vote_variance = share @ centered_margins**2, share @ centered_vote**2
    if margin_variance > 0 and vote_variance > 0:
        a, b = centered_margins / np.sqrt(margin_variance), centered_vote / np.sqrt(vote_variance)
        follows = float(share @ (a * b))
        by_vote = share * (a - follows * b) / np.sqrt(vote_variance)
        follows_interval = interval(follows, share * (a * b - follows * (a**2 + b**2) / 2), by_vote)
    return RewardStyle(
        accuracy=float(share @ won),
        r_squared=_r_squared(style, margins, num_folds, seed),
        follows=follows,
        follows_interval=follows_interval,
        agree_share=float(share @ agree),
        agree_accuracy=agree_accuracy,
        disagree_share=float(share @ disagree),
        disagree_accuracy=disagree_accuracy,
        accuracy_gap=accuracy_gap,
        accuracy_gap_interval=gap_interval,
    )


def _learning_noise(style: PairStyle, scores: ProbeScores, effect: np.ndarray) -> np.ndarray:
    """Contribution `(N,)` of each pair, through what the probe learned from it, to the error of an estimate."""
    x, weight = style.difference / root_mean_square(style), style.weight / style.weight.mean()
    against = expit(-scores.score)
    return weight * against * (x @ np.linalg.solve(_hessian(x, weight, against), effect @ x))


def _r_squared(style: PairStyle, margins: np.ndarray, num_folds: int, seed: int) -> float | None:
    """Share of the variance of held-out margins that style explains; below 0 where their mean predicts better."""
    x = style.difference / root_mean_square(style)
    unexplained, whole = 0.0, 0.0
    for train, test in folds(style.group, num_folds, seed):
        weight = style.weight[train]
        if not weight.any():
            continue
        predicted = Ridge(alpha=1.0).fit(x[train], margins[train], sample_weight=weight).predict(x[test])
        unexplained += float(style.weight[test] @ (margins[test] - predicted) ** 2)
        whole += float(style.weight[test] @ (margins[test] - np.average(margins[train], weights=weight)) ** 2)
    return 1 - unexplained / whole if whole > 0 else None
