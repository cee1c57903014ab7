"""The rules of curation: pure functions from strengths to decisions, and where to import all of them from.

A strength is the reward of the chosen answer minus that of the rejected one, combined over models; NaN where a pair is
not scored. A rule for flipping gives a mask of pairs to flip, a rule for keeping one of pairs to keep, and no rule
flips or keeps a pair that is not scored. The paper's steps are `flip_weakest_half`, then, with a model trained on the
result, `keep_consistent`, then `relabel_by_vote(..., how="majority")` on what that leaves out.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .combining import as_strength, combine_scores
from .deciding import Decision, Flip, Keep, decide
from .noise import NoiseEstimate, estimate_noise, flip_mixture
from .votes import UNREADABLE, relabel_by_vote


__all__ = [
    "UNREADABLE",
    "Decision",
    "Flip",
    "Keep",
    "NoiseEstimate",
    "combine_scores",
    "decide",
    "estimate_noise",
    "flip_mixture",
    "flip_negative",
    "flip_weakest_half",
    "keep_confident",
    "keep_consistent",
    "relabel_by_vote",
]

# Keeps 0.1 * 70 = 7.000000000000001 from asking for an eighth pair.
_ROUNDING = 1e-9


def flip_weakest_half(strength: npt.ArrayLike) -> np.ndarray:
    """
    The paper's first step: of the pairs with a negative strength, the lower half is flipped.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths; NaN is not flipped and does not count.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: true for the `floor(n / 2)` lowest of the `n` negative ones. Of
        equal ones the earlier rows come first. A single negative pair is not flipped.
    """
    strength = as_strength(strength)
    negative = np.flatnonzero(strength < 0)
    order = np.argsort(strength[negative], kind="stable")
    mask = np.zeros(len(strength), dtype=bool)
    mask[negative[order[: len(negative) // 2]]] = True
    return mask


def flip_negative(strength: npt.ArrayLike, margin: float = 0.0) -> np.ndarray:
    """
    Flips every pair whose rejected answer is better by more than a margin.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths; NaN and 0 are not flipped.
        margin (`float`, *optional*, defaults to `0.0`):
            Pairs with a strength below minus this are flipped; not negative.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`
    """
    if not margin >= 0:
        raise ValueError(f"`margin` is {margin}; give a number that is not negative.")
    return as_strength(strength) < -margin


def keep_consistent(strength: npt.ArrayLike) -> np.ndarray:
    """
    The paper's second step: keeps the pairs whose chosen answer has the higher reward.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths; NaN is not kept.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: true where the strength is above 0; a tie is not kept.
    """
    return as_strength(strength) > 0


def keep_confident(strength: npt.ArrayLike, share: float = 0.9) -> np.ndarray:
    """
    Keeps the given share of the pairs, those of the highest strength.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths, best after the flips; NaN is not kept and does not count.
        share (`float`, *optional*, defaults to `0.9`):
            Share of the scored pairs to keep, rounded up, from 0 to 1.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: of equal strengths the earlier rows are kept first.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` is {share}; give a number from 0 to 1.")
    strength = as_strength(strength)
    scored = np.flatnonzero(~np.isnan(strength))
    order = np.argsort(-strength[scored], kind="stable")
    mask = np.zeros(len(strength), dtype=bool)
    mask[scored[order[: math.ceil(share * len(scored) - _ROUNDING)]]] = True
    return mask
