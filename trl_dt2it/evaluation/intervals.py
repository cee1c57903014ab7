"""How sure a metric is: Wilson's interval of a share, and the bootstrap over prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from .metrics import Tally


# Draws of the bootstrap that are held at once.
_BATCH = 100


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def wilson_interval(hits: int, total: int, confidence: float = 0.95) -> Interval:
    """
    Wilson's score interval of a share. It takes the pairs for independent.

    Args:
        hits (`int`):
            How many are right.
        total (`int`):
            Of how many.
        confidence (`float`, *optional*, defaults to `0.95`):
            How often such an interval holds the true share.

    Returns:
        [`Interval`]
    """
    found = binomtest(hits, total).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def bootstrap_intervals(
    tally: Tally, *, num_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Interval]:
    """
    Percentile intervals of all metrics, from prompts drawn with replacement, the pairs of a prompt together.

    Args:
        tally ([`Tally`]):
            What was counted.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws; the same seed draws the same prompts.
        confidence (`float`, *optional*, defaults to `0.95`):
            Share of the draws inside the interval.

    Returns:
        `dict[str, Interval]`: for each ratio and mean. Draws in which a metric has no row do not count for it.
    """
    names = list(tally.ratios)
    hits = np.stack([tally.ratios[name].hits for name in names], axis=1)  # (U, M)
    totals = np.stack([tally.ratios[name].total for name in names], axis=1)
    rng = np.random.default_rng(seed)
    num_units = len(hits)
    shares = []
    for start in range(0, num_resamples, _BATCH):
        size = min(_BATCH, num_resamples - start)
        times = rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=size).astype(float)  # (B, U)
        with np.errstate(invalid="ignore"):
            shares.append((times @ hits) / (times @ totals))
    drawn = dict(zip(names, np.concatenate(shares).T, strict=True))
    drawn |= {name: np.mean([drawn[part] for part in parts], axis=0) for name, parts in tally.averages.items()}
    tail = (1 - confidence) / 2
    return {
        name: Interval(*np.nanquantile(values, [tail, 1 - tail], method="linear").tolist())
        for name, values in drawn.items()
    }
