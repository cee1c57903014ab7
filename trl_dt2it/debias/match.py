"""Style balanced without weights: every pair that stays has a partner whose style speaks the other way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from scipy.spatial import cKDTree
from transformers.utils import logging

from .entropy import whiten
from .pair_style import read_pair_style


logger = logging.get_logger(__name__)

_NEIGHBOURS = 16


def match_style(
    dataset: Dataset, *, caliper: float = 0.25, features: Sequence[str] | None = None, seed: int = 42
) -> Dataset:
    """
    Keeps pairs that have a style-mirrored partner: another pair whose difference of style is nearly minus its own.

    For users who want no weights. Over a couple, style speaks for the chosen answer as much as against it. Every pair
    is in one couple at most; the nearest are joined first. Pairs without a partner, as are most where nearly all style
    is on the chosen side, are left out; their number is logged.

    Args:
        dataset (`Dataset`):
            Preference rows; images are not read. A column `weight` stays and is not looked at.
        caliper (`float`, *optional*, defaults to `0.25`):
            Furthest that the style of a partner may be from the mirrored one: root mean square over the directions of
            style, each in units of its own root mean square.
        features (`Sequence[str]`, *optional*):
            Which of `STYLE_FEATURES`; all by default.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the choice among pairs of the same style.

    Returns:
        `Dataset`: an even number of rows, in their order.

    Raises:
        `ValueError`: if no two pairs are partners.
    """
    if not caliper > 0:
        raise ValueError(f"`caliper` is {caliper}; give a number above 0.")
    couples = find_couples(whiten(read_pair_style(dataset, features).difference), caliper, seed)
    rows = np.sort(couples.ravel())
    message = f"Matched {len(rows):,} of {len(dataset):,} pairs with a partner of the mirrored style."
    if len(rows) == 0:
        raise ValueError(f"{message} Raise `caliper`, take fewer `features`, or use `balance_style`.")
    logger.info(message)
    return dataset.select(rows)


def find_couples(directions: np.ndarray, caliper: float, seed: int) -> np.ndarray:
    """
    Joins rows to couples, greedily: of all candidates the nearest first.

    Args:
        directions (`np.ndarray` of shape `(N, R)`):
            From [`~trl_dt2it.debias.entropy.whiten`].
        caliper (`float`):
            Furthest distance, root mean square over directions.
        seed (`int`):
            Seed of the choice among equals.

    Returns:
        `np.ndarray` of shape `(C, 2)`: rows of each couple.
    """
    num_rows, num_directions = directions.shape
    if num_directions == 0:  # no pair has any style, and each is any other's mirror
        return np.arange(num_rows - num_rows % 2).reshape(-1, 2)
    rng = np.random.default_rng(seed)
    # Pairs of one style are spread a little, or all of them would be offered the same few partners.
    points = directions + rng.normal(scale=1e-7, size=directions.shape)
    furthest = caliper * np.sqrt(num_directions)
    free, couples = np.arange(num_rows), [np.empty((0, 2), dtype=np.int64)]
    while len(free) > 1:
        tree = cKDTree(points[free])
        # One neighbour more than asked for, because a row may be its own.
        count = min(_NEIGHBOURS + 1, len(free))
        distance, place = tree.query(-points[free], k=count, distance_upper_bound=furthest, workers=-1)
        first = np.repeat(np.arange(len(free)), count)
        distance, second = distance.ravel(), place.ravel()
        valid = np.isfinite(distance) & (first != second)
        order = np.flatnonzero(valid)[np.argsort(distance[valid], kind="stable")]
        taken = np.zeros(len(free), dtype=bool)
        joined = []
        for one, other in zip(first[order].tolist(), second[order].tolist(), strict=True):
            if not (taken[one] or taken[other]):
                taken[one] = taken[other] = True
                joined.append((one, other))
        if not joined:
            break
        couples.append(free[np.array(joined)])
        free = free[~taken]
    return np.concatenate(couples)
