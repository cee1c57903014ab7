"""How far does style tell which answer was chosen, and how far does a reward model follow it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset

from .pair_style import PairStyle, parts_by, read_pair_style
from .probe import auc_of, fit_probe, held_out_scores, root_mean_square
from .scored_audit import audit_rewards, read_rewards
from .style_report import FeatureLeakage, StyleLeakage, StyleReport


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
    [`~trl_dt2it.debias.probe.auc_of`]. 0.5 means that style tells nothing. The interval holds, in 95 of 100 sets, what
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
    """
    Leakage of some pairs, as [`audit_style`] measures it.

    Args:
        style ([`PairStyle`]):
            The pairs.
        gap (`np.ndarray` of shape `(N,)`, *optional*):
            Rewards of chosen minus rewards of rejected.
        votes (`np.ndarray` of shape `(N,)`, *optional*):
            What style votes for, where it is not the probe's own score.
        num_folds (`int`, *optional*, defaults to `10`):
            Most folds.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the folds.
        min_pairs (`int`, *optional*, defaults to `200`):
            Fewest pairs that get a number.

    Returns:
        [`StyleLeakage`]
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
