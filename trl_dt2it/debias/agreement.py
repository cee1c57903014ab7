"""Which of two candidates is better, where two ways of judging say the same.

Listwise scores compare the candidates of a prompt with each other, pointwise scores compare each with the reference
answer. Their mistakes have different causes, so that a pair that both order alike is rarely ordered wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AgreedPair:
    """
    Two candidates of one prompt that both ways of judging order alike.

    Parameters:
        better (`int`):
            The candidate with the higher scores.
        worse (`int`):
            The other one.
        listwise_gap (`float`):
            By how many points its listwise score is higher.
        pointwise_gap (`float`):
            By how many points its pointwise score is higher.
    """

    better: int
    worse: int
    listwise_gap: float
    pointwise_gap: float

    @property
    def strength(self) -> float:
        """Mean of the two gaps."""
        return (self.listwise_gap + self.pointwise_gap) / 2


@dataclass(frozen=True)
class AgreementCounts:
    """
    What became of the pairs of candidates.

    Parameters:
        agreed (`int`, *optional*, defaults to `0`):
            Pairs in the same order by both.
        opposed (`int`, *optional*, defaults to `0`):
            Pairs in opposite orders.
        close (`int`, *optional*, defaults to `0`):
            Pairs of which one gap or both are too small to tell an order.
    """

    agreed: int = 0
    opposed: int = 0
    close: int = 0

    def __add__(self, other: AgreementCounts) -> AgreementCounts:
        return AgreementCounts(self.agreed + other.agreed, self.opposed + other.opposed, self.close + other.close)

    @property
    def pairs(self) -> int:
        """All pairs."""
        return self.agreed + self.opposed + self.close

    @property
    def rate(self) -> float | None:
        """Share of agreed pairs among those that both put in an order; `None` without any."""
        ordered = self.agreed + self.opposed
        return self.agreed / ordered if ordered else None


def agreeing_pairs(
    listwise: Sequence[float], pointwise: Sequence[float], *, min_gap: float
) -> tuple[list[AgreedPair], AgreementCounts]:
    """
    The pairs of a prompt's candidates that both scores order alike.

    Args:
        listwise (`Sequence[float]`):
            Listwise score of each candidate, in points.
        pointwise (`Sequence[float]`):
            Pointwise score of each candidate, in points.
        min_gap (`float`):
            Smallest gap of either score that counts as an order, in points; above 0.

    Returns:
        `tuple[list[AgreedPair], AgreementCounts]`: the pairs, and what became of all.
    """
    first, second = np.triu_indices(len(listwise), 1)
    by_list = np.asarray(listwise, dtype=np.float64)
    by_point = np.asarray(pointwise, dtype=np.float64)
    list_gaps, point_gaps = by_list[first] - by_list[second], by_point[first] - by_point[second]
    # Sums of the weights of a rubric are off by rounding, which must not decide on a gap of just `min_gap`.
    is_ordered = np.minimum(np.abs(list_gaps), np.abs(point_gaps)) >= min_gap - 1e-9
    agrees = is_ordered & (np.sign(list_gaps) == np.sign(point_gaps))
    pairs = []
    for place in np.flatnonzero(agrees):
        ends = (int(first[place]), int(second[place]))
        better, worse = ends if list_gaps[place] > 0 else ends[::-1]
        pairs.append(AgreedPair(better, worse, abs(float(list_gaps[place])), abs(float(point_gaps[place]))))
    agreed = len(pairs)
    opposed = int(is_ordered.sum()) - agreed
    return pairs, AgreementCounts(agreed, opposed, len(first) - agreed - opposed)
