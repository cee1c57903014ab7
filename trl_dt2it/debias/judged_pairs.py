"""From verdicts to pairs: listwise scores without position bias, and the pairs that both ways of judging agree on.

Listwise scores compare the candidates of a prompt with each other, pointwise scores compare each with the reference
answer. Their mistakes have different causes, so that a pair that both order alike is rarely ordered wrongly.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..judge.rubric import Rubric
from ..utils import digest
from .distill_report import AgreementCounts, DistillReport
from .judging import JudgedPool, ListScores
from .position_bias import PositionBias, fit_positions


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


@dataclass
class JudgedPair:
    """
    A pair that both scores agree on.

    Parameters:
        one ([`JudgedPool`]):
            Where it comes from.
        agreed ([`AgreedPair`]):
            Its sides and gaps.
        listwise (`dict[int, float]`):
            Listwise scores of all candidates of the pool.
        counts ([`AgreementCounts`]):
            What became of all pairs of the pool.
    """

    one: JudgedPool
    agreed: AgreedPair
    listwise: dict[int, float]
    counts: AgreementCounts

    @property
    def key(self) -> str:
        """Its name: the same for the same prompt, images, model and texts."""
        texts = [self.one.pool.candidates[side].text for side in (self.agreed.better, self.agreed.worse)]
        return digest(json.dumps([self.one.pool.key, *texts]))[:16]


def listwise_scores(
    judged: Sequence[JudgedPool], rubric: Rubric
) -> tuple[dict[int, dict[int, float]], list[PositionBias]]:
    """
    Listwise scores without position bias.

    Args:
        judged (`Sequence[JudgedPool]`):
            The pools.
        rubric ([`Rubric`]):
            The scale.

    Returns:
        `tuple`: for each pool, by its place, the score of each candidate; and the bias for each length of lists.
    """
    # All rounds tell about the judge; the last one that came back holds all candidates.
    lists: dict[int, list[tuple[int, int, ListScores]]] = defaultdict(list)
    for place, one in enumerate(judged):
        for number, given in enumerate(one.rounds):
            for one_list in given:
                lists[len(one_list.order)].append((place, number, one_list))
    fitted: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    biases = []
    for length in sorted(lists):
        units: dict[tuple[int, int, int], int] = {}
        flat = [
            (value, units.setdefault((place, number, candidate), len(units)), position, place)
            for place, number, given in lists[length]
            for position, (candidate, value) in enumerate(zip(given.order, given.scores, strict=True))
        ]
        scores, candidates, positions, places = map(np.array, zip(*flat, strict=True))
        qualities, bias = fit_positions(
            scores, candidates, positions, places, num_positions=length, low=rubric.low, high=rubric.high
        )
        for (place, number, candidate), unit in units.items():
            fitted[place, number][candidate] = float(qualities[unit])
        if bias is not None:
            biases.append(bias)
    best: dict[int, dict[int, float]] = {}
    for place, number in sorted(fitted):
        best[place] = fitted[place, number]
    return best, biases


def agreeing_pairs(
    listwise: Sequence[float], pointwise: Sequence[float], *, min_gap: float
) -> tuple[list[AgreedPair], AgreementCounts]:
    """The pairs of candidates with both gaps of one sign and at least `min_gap` points, and counts of all pairs."""
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


def agreed_pairs(
    judged: Sequence[JudgedPool],
    listwise: Mapping[int, dict[int, float]],
    rubric: Rubric,
    min_gap: float,
    report: DistillReport,
) -> list[JudgedPair]:
    """
    The pairs that both scores agree on. Pools without one are settled in the report.

    Args:
        judged (`Sequence[JudgedPool]`):
            The pools.
        listwise (`Mapping[int, dict[int, float]]`):
            What [`listwise_scores`] gave.
        rubric ([`Rubric`]):
            Weights of the criteria.
        min_gap (`float`):
            Smallest gap of either score, in points.
        report ([`DistillReport`]):
            Counts.

    Returns:
        `list[JudgedPair]`
    """
    pairs = []
    for place, one in enumerate(judged):
        report.candidates["equal"] += one.pool.num_equal
        report.candidates["empty"] += one.pool.num_empty
        if one.pool.num_unfinished:
            report.candidates["unfinished"] += one.pool.num_unfinished
        by_list = listwise.get(place, {})
        both = [candidate for candidate in sorted(one.criteria) if candidate in by_list]
        if one.failure is None and len(one.pool.candidates) == 1:
            is_alone = one.generation_status is not None and not one.pool.num_equal
            one.failure = f"generation: {one.generation_status}" if is_alone else one.unanswered or "all_equal"
        elif one.failure is None and len(both) < 2:
            one.failure = f"pointwise: {one.pointwise_status}"
        if one.failure is not None:
            report.settle(one.failure, one.pool.question.name)
            continue
        by_point = [rubric.total(one.criteria[candidate]) for candidate in both]
        agreed, counts = agreeing_pairs([by_list[candidate] for candidate in both], by_point, min_gap=min_gap)
        report.agreement += counts
        if not agreed:
            one.failure = one.unanswered or ("opposed" if counts.opposed else "no_order")
            report.settle(one.failure, one.pool.question.name)
        for pair in agreed:
            named = AgreedPair(both[pair.better], both[pair.worse], pair.listwise_gap, pair.pointwise_gap)
            pairs.append(JudgedPair(one, named, by_list, counts))
    return pairs
