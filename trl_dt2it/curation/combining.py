"""From the rewards of one or several models to one strength per pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata


def combine_scores(scores: npt.ArrayLike, how: Literal["raw", "zscore", "rank"] = "raw") -> np.ndarray:
    r"""
    How much better the chosen answer of each pair is, by the mean of all models.

    With \(d_{ij}\) the reward of chosen minus that of rejected by model \(j\), the strength of pair \(i\) is the mean
    over \(j\) of

    - `"raw"`: \(d_{ij}\), as in the paper. Rewards of different models have no common unit, so the model with the
      widest ones decides.
    - `"zscore"`: \(d_{ij}\) divided by the root mean square of \(d_{\cdot j}\). Nothing is subtracted: zero is where
      a right label turns into a wrong one, and centring would move it.
    - `"rank"`: the sign of \(d_{ij}\) times the rank of \(|d_{ij}|\) within the model, divided by the number of pairs
      that it scored. Equal ones share their mean rank, and a difference of 0 stays 0. Outliers do not matter then.

    Args:
        scores (`np.ndarray` of shape `(N, 2, M)`):
            Rewards of chosen and of rejected by M models, or of shape `(N, 2)` for one model; NaN where there is none.
        how (`str`, *optional*, defaults to `"raw"`):
            `"raw"`, `"zscore"` or `"rank"`.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `float64`: NaN for a pair that some model has not scored: a mean of
        fewer models is not comparable.

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
    if how not in _SCALES:
        raise ValueError(f"`how` is {how!r}; give one of {', '.join(map(repr, _SCALES))}.")
    difference = scores[:, 0] - scores[:, 1]
    for column in difference.T:  # views, changed in place
        is_scored = ~np.isnan(column)
        if is_scored.any():
            column[is_scored] = _SCALES[how](column[is_scored])
    return difference.mean(axis=1)


def as_strength(strength: npt.ArrayLike) -> np.ndarray:
    """
    Strengths as the rules want them.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths, NaN where a pair is not scored.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `float64`

    Raises:
        `ValueError`: if the shape is another or a strength is infinite.
    """
    strength = np.asarray(strength, dtype=np.float64)
    if strength.ndim != 1:
        raise ValueError(f"`strength` has shape {strength.shape}; give one number per pair, as `combine_scores` does.")
    if np.isinf(strength).any():
        place = np.flatnonzero(np.isinf(strength))[0]
        raise ValueError(f"The strength of pair {place} is infinite; give NaN for a pair that is not scored.")
    return strength


def _unit_root_mean_square(difference: np.ndarray) -> np.ndarray:
    # Scaled by the largest first, so that squares neither overflow nor vanish.
    largest = np.abs(difference).max()
    if largest == 0:
        return difference
    difference = difference / largest
    return difference / np.sqrt(np.mean(difference**2))


def _signed_rank(difference: np.ndarray) -> np.ndarray:
    return np.sign(difference) * rankdata(np.abs(difference)) / len(difference)


_SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw": lambda difference: difference,
    "zscore": _unit_root_mean_square,
    "rank": _signed_rank,
}
