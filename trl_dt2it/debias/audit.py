"""The audit: how much of the labels a cross-validated probe predicts from style alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset
from scipy.linalg import eigh
from scipy.special import expit
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold
from transformers import TrainerCallback

from ..data.columns import column_of, has_transform
from ..evaluation.metrics import Interval, clustered_interval, group_sums, wilson
from ..training.model_card import cell, table
from ..training.pair_scoring import evaluating
from ..training.trainer import MultimodalRewardTrainer
from ..utils import on_main_process
from .style import PairStyle, parts_by, read_pair_style
from .tables import FeatureLeakage, RewardStyle, StyleLeakage, StyleReport


# Pairs that are scored over all repeats of the cross-validation, and the most repeats.
_SCORED, _REPEATS = 20_000, 10

# Width of the kernel that measures how dense scores are at 0, in standard deviations of the scores.
_BANDWIDTH = 0.25

# Of 100 samples of pairs without leakage, this share has a mean style so near to 0.
_BALANCED = 0.01


@dataclass(frozen=True)
class ProbeScores:
    """Scores of N pairs by probes that have not seen their groups."""

    score: np.ndarray  # (N,): Log odds that the chosen answer is the better one, by its style: the mean over repeats
    won: np.ndarray  # (N,): Share of the repeats in which the score is positive, ties counted half
    # Variance of the weighted mean of `won` about the accuracy, on new pairs, of the probe fitted on all pairs
    variance: float


def fit_probe(style: PairStyle) -> np.ndarray:
    """Fits the probe under the pairs' weights.

    Shapes: returns `(K,)`.
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
    r"""Scores every pair by probes that were fitted on other folds, over several divisions into folds.

    The variance has two parts. Groups \(g\) vary: \(\sum_g u_g^2\), with \(u_g\) what the group adds to the error.
    And groups of different folds influence each other's probes. Leaving \(h\) out of the probe that scores \(g\)
    changes the latter's share of right pairs by \(a_g^T H_g^{-1} b_h\): \(b_h\) is the gradient of the held-out loss
    of \(h\), \(H_g\) the Hessian of the probe that scores \(g\), and \(a_g\) the sum of the differences of \(g\)
    whose score is about 0, where a small change turns it. The covariance is the sum over pairs of groups of
    \(a_g^T H_g^{-1} b_h \cdot a_h^T H_h^{-1} b_g\), which is a trace of K x K matrices. In a set without leakage this
    adds about two thirds to the first part; where style tells much, nothing.
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
    """What each pair adds to the error of an estimate by what the probe learned from it.

    Shapes: `effect` `(N,)`, returns `(N,)`.
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
    """AUC of pairs against their mirrors, with an interval.

    A pair's mirror, its sides swapped, has the negative score. The AUC is the chance that a pair scores above its own
    mirror, P(s > -s), ties counted half: the accuracy of the probe in naming the chosen answer. Comparing each pair
    with its own mirror, and not with all, is what the probe is for; and it makes scores of different folds, which have
    no common scale, add up.

    Folds of a set that was balanced are no samples: what one has too much of, the others lack, so that the probe is
    wrong more often than not. Where the mean style is nearer to 0 than in 99 of 100 samples of pairs without leakage,
    the distance of the AUC from 0.5 is taken off in proportion. At a mean of 0 the probe of all pairs is 0 and the AUC
    0.5, as it is for any new pairs; the interval is that of the coin that such a probe amounts to, at least.
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


def read_rewards(dataset: Dataset, scorer: Callable[[Dataset], Any] | Sequence[str]) -> np.ndarray:
    """Reward gaps of all pairs.

    Shapes: returns `(N,)` `float64`.
    """
    if callable(scorer):
        chosen, rejected = (np.asarray(rewards, dtype=np.float64) for rewards in scorer(dataset))
    else:
        if isinstance(scorer, str) or len(scorer) != 2:
            raise ValueError("`scorer` must be a function or the names of two columns, of chosen and of rejected.")
        for name in scorer:
            if name not in dataset.column_names:
                raise ValueError(f"`scorer` names the column {name!r}; there are {', '.join(dataset.column_names)}.")
        chosen, rejected = (
            column_of(dataset, name).cast("float64").fill_null(np.nan).to_numpy(zero_copy_only=False)
            for name in scorer
        )
    for side, rewards in (("chosen", chosen), ("rejected", rejected)):
        if rewards.shape != (len(dataset),):
            raise ValueError(
                f"The scorer gave rewards of shape {rewards.shape} for the {side} answers of {len(dataset)} rows; it "
                "must give one number a row."
            )
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            raise ValueError(f"The reward of the {side} answer of row {bad[0]} is {rewards[bad[0]]}, not finite.")
    return chosen - rejected


def audit_rewards(
    style: PairStyle, gap: np.ndarray, votes: np.ndarray | None, scores: ProbeScores, *, num_folds: int, seed: int
) -> RewardStyle:
    """Measures how far reward gaps follow style beyond the label.

    Every pair has its chosen side first, so that the label is the same for all, and what the gaps have in common is
    what they owe to it. Only how gaps differ from their mean is put down to style. That style can also go with how
    much better an answer is: compare with a model that was trained on balanced pairs.

    Where the pairs themselves say what style votes for, the intervals count how uncertain that is too: of pairs
    without leakage, any vote is chance, and so is the sign of what a model seems to make of it.

    Shapes: `gap` `(N,)`, `votes` `(N,)`.
    """
    share, group, won = style.weight / style.weight.sum(), style.group, wins(gap)
    vote = scores.score if votes is None else votes

    def influence_of(direct: np.ndarray, by_vote: np.ndarray) -> np.ndarray:
        return direct if votes is not None else direct + learning_noise(style, scores, by_vote)

    agree, disagree = (_accuracy(won, share * mask) for mask in (vote > 0, vote < 0))
    split, split_interval, follows, follows_interval = None, None, None, None
    if agree is not None and disagree is not None:
        split = agree - disagree
        influence = sum(
            sign * share * mask * (won - mean) / (share @ mask)
            for sign, mask, mean in ((1, vote > 0, agree), (-1, vote < 0, disagree))
        )
        turned = share * density_at_zero(vote, share > 0)
        by_vote = turned * sum(
            (won - mean) / (share @ mask) for mask, mean in ((vote > 0, agree), (vote < 0, disagree))
        )
        split_interval = clustered_interval(split, influence_of(influence, by_vote), group)
    centred_gap, centred_vote = gap - share @ gap, vote - share @ vote
    gap_variance, vote_variance = share @ centred_gap**2, share @ centred_vote**2
    if gap_variance > 0 and vote_variance > 0:
        a, b = centred_gap / np.sqrt(gap_variance), centred_vote / np.sqrt(vote_variance)
        follows = float(share @ (a * b))
        direct, by_vote = share * (a * b - follows * (a**2 + b**2) / 2), share * (a - follows * b)
        follows_interval = clustered_interval(follows, influence_of(direct, by_vote / np.sqrt(vote_variance)), group)
    return RewardStyle(
        accuracy=float(share @ won),
        r_squared=_r_squared(style, gap, num_folds, seed),
        follows=follows,
        follows_interval=follows_interval,
        agree_share=float(share @ (vote > 0)),
        agree_accuracy=agree,
        disagree_share=float(share @ (vote < 0)),
        disagree_accuracy=disagree,
        accuracy_gap=split,
        accuracy_gap_interval=split_interval,
    )


def _accuracy(won: np.ndarray, share: np.ndarray) -> float | None:
    return float(share @ won / share.sum()) if share.sum() > 0 else None


def _r_squared(style: PairStyle, gap: np.ndarray, num_folds: int, seed: int) -> float | None:
    """Share of the variance of held-out gaps that style explains; below 0 where it predicts worse than their mean."""
    x = style.difference / root_mean_square(style)
    left, whole = 0.0, 0.0
    for train, test in folds(style.group, num_folds, seed):
        weight = style.weight[train]
        if not weight.any():
            continue
        predicted = Ridge(alpha=1.0).fit(x[train], gap[train], sample_weight=weight).predict(x[test])
        left += float(style.weight[test] @ (gap[test] - predicted) ** 2)
        whole += float(style.weight[test] @ (gap[test] - np.average(gap[train], weights=weight)) ** 2)
    return 1 - left / whole if whole > 0 else None


Scorer = Callable[[Dataset], tuple[Sequence[float], Sequence[float]]]

# Fewer independent groups than this, and the variance between groups is not known well enough.
_MIN_GROUPS = 10


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
    Measures how far style alone tells which answer of a pair was chosen.

    *Leakage* is the accuracy with which a logistic probe, which sees differences of style and nothing else, names the
    chosen answer of pairs whose `group_id` it has not seen: the AUC of pairs against their mirrors, see
    [`~trl_dt2it.debias.audit.auc_of`]. 0.5 means that style tells nothing. The interval holds, in 95 of 100 sets, what
    the probe of the whole set reaches on new pairs. A column `weight` counts, in fitting and in measuring.

    Args:
        dataset (`Dataset`):
            Preference rows; images are not read.
        by (`str`, *optional*, defaults to `"source"`):
            A column whose values are measured each on its own, besides the whole. `None` measures the whole only, as
            do rows without a column `source`.
        scorer (`Callable` or `tuple[str, str]`, *optional*):
            A trained model to measure too: a function that takes the data set and gives the rewards of the chosen and
            of the rejected answers, or the names of two columns that hold them, such as
            `("chosen_reward", "rejected_reward")`.
        reference (`Dataset`, *optional*):
            Rows whose style decides what style votes for, such as those that the scored model was trained on, where
            `dataset` has a style that tells nothing. By default `dataset` itself, its held-out folds.
        features (`Sequence[str]`, *optional*):
            Which of `STYLE_FEATURES`; all by default.
        num_folds (`int`, *optional*, defaults to `10`):
            Most folds of the cross-validation: fewer where there are less than two groups for each.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the folds.
        min_pairs (`int`, *optional*, defaults to `200`):
            Fewest pairs of a source that gets a number; others get a note.

    Returns:
        [`StyleReport`]

    Raises:
        `ValueError`: if a column is missing, or if rewards are not finite or not as many as rows.
    """
    if num_folds < 2:
        raise ValueError(f"`num_folds` is {num_folds}; give at least 2.")
    if by == "source" and by not in dataset.column_names:
        by = None
    parts = parts_by(dataset, by)
    style = read_pair_style(dataset, features)
    rewards = None if scorer is None else read_rewards(dataset, scorer)
    votes = None
    if reference is not None:
        votes = style.difference @ fit_probe(read_pair_style(reference, style.features))

    def measure(rows: np.ndarray) -> StyleLeakage:
        part = style.take(rows)
        return leakage(
            part,
            gap=None if rewards is None else rewards[rows],
            votes=None if votes is None else votes[rows],
            num_folds=num_folds,
            seed=seed,
            min_pairs=min_pairs,
        )

    overall = measure(np.arange(len(style)))
    if len(parts) == 1:  # the same pairs once more
        return StyleReport(overall=overall, sources=dict.fromkeys(parts, overall))
    return StyleReport(overall=overall, sources={name: measure(rows) for name, rows in parts.items()})


def leakage(
    style: PairStyle,
    *,
    gap: np.ndarray | None = None,
    votes: np.ndarray | None = None,
    num_folds: int = 10,
    seed: int = 42,
    min_pairs: int = 200,
) -> StyleLeakage:
    """Leakage of some pairs, as [`audit_style`] measures it.

    Shapes: `gap` `(N,)`, `votes` `(N,)`.
    """
    num_groups = len(np.unique(style.group))
    note = None
    if len(style) < min_pairs:
        note = f"too few pairs: {len(style)} of at least {min_pairs}"
    elif num_groups < (least := min(2 * num_folds, _MIN_GROUPS)):
        note = f"too few groups: {num_groups} of at least {least} for {least // 2} folds"
    elif not style.weight.any():
        note = "every weight is 0"
    elif not style.difference.any():
        note = "no feature differs in any pair"
    if note:
        return StyleLeakage(num_pairs=len(style), num_groups=num_groups, note=note)
    num_folds = min(num_folds, num_groups // 2)
    scores = held_out_scores(style, num_folds, seed)
    auc, interval = auc_of(scores, style)
    reward = None
    if gap is not None:
        reward = audit_rewards(style, gap, votes, scores, num_folds=num_folds, seed=seed)
    return StyleLeakage(
        num_pairs=len(style),
        num_groups=num_groups,
        auc=auc,
        interval=interval,
        features=_by_feature(style),
        reward=reward,
    )


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


class StyleAuditCallback(TrainerCallback):
    """
    Audits the style of the train set of a [`MultimodalRewardTrainer`] when training begins, and logs the figures.

    They reach the trackers that `report_to` names, as in `train/style/leakage`, the log history and the model card.
    About 5000 pairs a second are read. A run that resumes does not measure again.

    Args:
        trainer ([`MultimodalRewardTrainer`]):
            The trainer that the callback is added to.
        audit:
            Options of [`audit_style`], such as `features`.

    Raises:
        `ValueError`: if the train set is streamed.

    Example:

    ```python
    >>> from trl_dt2it.debias import StyleAuditCallback

    >>> trainer.add_callback(StyleAuditCallback(trainer))
    >>> trainer.train()
    ```
    """

    def __init__(self, trainer: MultimodalRewardTrainer, **audit: Any) -> None:
        if not isinstance(trainer.train_dataset, Dataset):
            raise ValueError("Style is audited on a whole train set, not on a streamed one; load it whole.")
        if has_transform(trainer.train_dataset):
            raise ValueError(
                "Style is audited on the columns of the train set, and a transform makes its rows; apply the function "
                "with `map` instead."
            )
        self.trainer = trainer
        self.audit = audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any("style/leakage" in entry for entry in state.log_history):
            return
        train = cast(Dataset, self.trainer.train_dataset)
        metrics = on_main_process(lambda: audit_style(train, **self.audit).metrics())
        # In training, `log` would begin to gather the metrics of the steps.
        with evaluating(self.trainer.model):
            self.trainer.log(metrics)

    def model_card_section(self, trainer: MultimodalRewardTrainer) -> str | None:
        """Tell the model card what the last audit found."""
        return style_section(trainer.state.log_history)


def style_facts(log_history: Sequence[Mapping[str, Any]], count: int = 5) -> dict[str, Any] | None:
    """`leakage`, `sources` and the `count` `features` that tell most, of the last audit in a trainer's log, if any."""
    last = next((entry for entry in reversed(log_history) if "style/leakage" in entry), None)
    if last is None:
        return None
    parts: dict[str, dict[str, float]] = {"style/leakage/": {}, "style/feature/": {}}
    for prefix, values in parts.items():
        values |= {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}
    features = sorted(parts["style/feature/"].items(), key=lambda item: -abs(item[1] - 0.5))[:count]
    return {
        "leakage": f"{last['style/leakage']:.3f}",
        "sources": [(cell(name), f"{value:.3f}") for name, value in parts["style/leakage/"].items()],
        "features": [(cell(name), f"{value:.3f}") for name, value in features],
    }


def style_section(log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """The section of a model card on the style of its training set; see [`style_facts`]."""
    facts = style_facts(log_history)
    if facts is None:
        return None
    text = (
        "### Style\n\nStyle alone (length, lists, bold, hedges and the like) names the chosen answer with an AUC of "
        f"{facts['leakage']}; 0.5 is no style bias."
    )
    tables = {"source": facts["sources"], "most telling feature": facts["features"]}
    return "\n\n".join([text, *(table((name, "AUC"), lines) for name, lines in tables.items() if lines)])
