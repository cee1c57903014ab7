"""How far does a trained reward model follow style beyond the label?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.linear_model import Ridge

from ..data.columns import column_of
from ..evaluation.intervals import clustered_interval
from .pair_style import PairStyle
from .probe import ProbeScores, density_at_zero, folds, learning_noise, root_mean_square, wins
from .style_report import RewardStyle


def read_rewards(dataset: Dataset, scorer: Callable[[Dataset], Any] | Sequence[str]) -> np.ndarray:
    """
    Reward gaps of all pairs.

    Args:
        dataset (`Dataset`):
            Preference rows.
        scorer (`Callable` or `Sequence[str]`):
            A function from the data set to the rewards of the chosen and of the rejected answers, or two columns.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `float64`: reward of chosen minus reward of rejected.

    Raises:
        `ValueError`: if a column is missing, or if rewards are not finite or not as many as rows.
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
    """
    Measures how far reward gaps follow style beyond the label.

    Every pair has its chosen side first, so that the label is the same for all, and what the gaps have in common is
    what they owe to it. Only how gaps differ from their mean is put down to style. That style can also go with how
    much better an answer is: compare with a model that was trained on balanced pairs.

    Where the pairs themselves say what style votes for, the intervals count how uncertain that is too: of pairs
    without leakage, any vote is chance, and so is the sign of what a model seems to make of it.

    Args:
        style ([`PairStyle`]):
            Style of N pairs.
        gap (`np.ndarray` of shape `(N,)`):
            Rewards of chosen minus rewards of rejected.
        votes (`np.ndarray` of shape `(N,)`, *optional*):
            Positive where style speaks for the chosen answer, negative where against, as other pairs say; by default
            what these pairs say of each other.
        scores ([`~trl_dt2it.debias.probe.ProbeScores`]):
            What these pairs say of each other.
        num_folds (`int`):
            Number of folds.
        seed (`int`):
            Seed of the folds.

    Returns:
        [`RewardStyle`]
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
