"""Pairs on which both judgings agree, drawn evenly over strength, as canonical rows."""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Value

from ...data.messages import FEATURES
from ...judge.rubric import Rubric
from ...utils import digest
from .judging import AgreementCounts, DistillReport, JudgedPool, ListScores
from .position_bias import PositionBias, fit_positions


@dataclass(frozen=True)
class AgreedPair:
    """Two candidates of one prompt that both ways of judging order alike."""

    better: int  # The candidate with the higher scores
    worse: int  # The other one
    listwise_gap: float  # By how many points its listwise score is higher
    pointwise_gap: float  # By how many points its pointwise score is higher

    @property
    def strength(self) -> float:
        """Mean of the two gaps."""
        return (self.listwise_gap + self.pointwise_gap) / 2


@dataclass
class JudgedPair:
    """A pair that both scores agree on."""

    one: JudgedPool  # Where it comes from
    agreed: AgreedPair  # Its sides and gaps
    listwise: dict[int, float]  # Listwise scores of all candidates of the pool
    counts: AgreementCounts  # What became of all pairs of the pool

    @property
    def key(self) -> str:
        """Its name: the same for the same prompt, images, model and texts."""
        texts = [self.one.pool.candidates[side].text for side in (self.agreed.better, self.agreed.worse)]
        return digest(json.dumps([self.one.pool.key, *texts]))[:16]


def listwise_scores(
    judged: Sequence[JudgedPool], rubric: Rubric
) -> tuple[dict[int, dict[int, float]], list[PositionBias]]:
    """Listwise scores without position bias."""
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
    """The pairs that both scores agree on. Pools without one are settled in the report."""
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


DRAWN, PROMPT_IS_FULL, BIN_IS_FULL = 0, 1, 2


def strength_bins(strengths: np.ndarray, *, num_bins: int, low: float, high: float) -> np.ndarray:
    """The bin of each strength, of bins of one width.

    Shapes: `strengths` `(n,)`.
    """
    edges = np.linspace(low, high, num_bins + 1)[1:-1]
    return np.searchsorted(edges, strengths, side="right")


def draw_pairs(
    bins: np.ndarray,
    prompts: Sequence[str],
    generators: Sequence[str],
    keys: Sequence[str],
    *,
    pairs_per_prompt: int | None,
    max_pairs: int | None = None,
    seed: int = 42,
) -> np.ndarray:
    """Draws pairs as evenly over the bins as they allow, for each generator on its own.

    Bins take turns, those with the fewest pairs so far first, each the next pair in a drawn order whose prompt may
    give one more. Then no bin of a generator keeps more than the median of its bins has, bins without a pair left out;
    one bin keeps all. What is drawn does not depend on the order of the pairs.
    """
    found = np.full(len(keys), BIN_IS_FULL, dtype=np.int8)
    strata: dict[tuple[str, int], list[int]] = {}
    # From the back, so that the next pair is the last of its list.
    for place in sorted(range(len(keys)), key=lambda place: _ticket(seed, keys[place]), reverse=True):
        strata.setdefault((generators[place], int(bins[place])), []).append(place)

    given: Counter[str] = Counter()
    turns: list[tuple[tuple[str, int], int]] = []
    queue = [(0, len(places), stratum) for stratum, places in strata.items()]
    heapq.heapify(queue)
    while queue:
        count, _, stratum = heapq.heappop(queue)
        places = strata[stratum]
        while places and pairs_per_prompt is not None and given[prompts[places[-1]]] >= pairs_per_prompt:
            found[places.pop()] = PROMPT_IS_FULL
        if places:
            place = places.pop()
            given[prompts[place]] += 1
            turns.append((stratum, place))
            heapq.heappush(queue, (count + 1, len(places), stratum))

    quotas = _quotas(Counter(stratum for stratum, _ in turns))
    kept = []
    for stratum, place in turns:
        if quotas[stratum] > 0:
            quotas[stratum] -= 1
            kept.append(place)
    found[kept[:max_pairs]] = DRAWN
    return found


def _ticket(seed: int, key: str) -> str:
    return digest(f"{seed} {key}")


def _quotas(counts: Counter[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Most pairs that each bin of each generator keeps."""
    levels: dict[str, list[int]] = {}
    for (generator, _), count in counts.items():
        levels.setdefault(generator, []).append(count)
    return {stratum: int(np.median(levels[stratum[0]])) for stratum in counts}


# Canonical columns, and what a pair was made of; `provenance` is JSON with every score of both sides.
DISTILLED_FEATURES = FEATURES.copy()

DISTILLED_FEATURES.update(
    {
        "generator": Value("string"),
        "chosen_origin": Value("string"),
        "rejected_origin": Value("string"),
        "listwise_gap": Value("float64"),
        "pointwise_gap": Value("float64"),
        "strength_bin": Value("int64"),
        "provenance": Value("string"),
    }
)


def pair_row(
    pair: JudgedPair,
    strength_bin: int,
    source: str,
    about: Mapping[str, str],
    rubric: Rubric,
    effects: Mapping[int, Sequence[float]],
) -> dict[str, Any]:
    """All columns of a pair but its images."""
    one, question = pair.one, pair.one.pool.question
    sides = {"chosen": pair.agreed.better, "rejected": pair.agreed.worse}
    counts = {name: getattr(pair.counts, name) for name in ("agreed", "opposed", "close")}
    last = next(given for given in reversed(one.rounds) if given)
    provenance: dict[str, Any] = {**about, "list_length": len(last[0].order), "pairs_of_prompt": counts}
    row: dict[str, Any] = {"prompt": question.prompt}
    for side, candidate in sides.items():
        given = one.pool.candidates[candidate]
        row[side] = [{"role": "assistant", "content": [{"type": "text", "text": given.text}]}]
        row[f"{side}_origin"] = given.origin
        provenance[side] = {
            "listwise": pair.listwise[candidate],
            "lists": list(_list_scores(last, candidate, effects)),
            "pointwise": rubric.total(one.criteria[candidate]),
            "criteria": one.criteria[candidate],
        }
    return {
        **row,
        "strength": pair.agreed.strength,
        "pair_id": f"{source}-{pair.key}",
        "group_id": question.group_id,
        "source": source,
        "source_id": question.source_id,
        "generator": one.pool.generator,
        "listwise_gap": pair.agreed.listwise_gap,
        "pointwise_gap": pair.agreed.pointwise_gap,
        "strength_bin": strength_bin,
        "provenance": json.dumps(provenance, ensure_ascii=False),
    }


def _list_scores(
    lists: Sequence[ListScores], candidate: int, effects: Mapping[int, Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """A candidate's score in each list, with the place it had, and without what that was worth."""
    for given in lists:
        position = given.order.index(candidate)
        score = given.scores[position]
        worth = effects.get(len(given.order), (0.0,) * len(given.order))[position]
        yield {"position": position, "score": score, "corrected": score - worth}
