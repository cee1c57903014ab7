"""Pairs on which both ways of judging agree, drawn evenly over strength, as canonical rows."""

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
from ..reports import AgreementCounts, DistillReport, PositionBias
from .judging import JudgedPool, ListScores
from .position_bias import fit_positions


# Canonical columns, and the origin of a pair; `provenance` is JSON with every score of both sides.
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

DRAWN, PROMPT_IS_FULL, BIN_IS_FULL = 0, 1, 2


@dataclass(frozen=True)
class AgreedPair:
    """Two candidates of one prompt that both ways of judging order alike, with their gaps in points."""

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
    """An agreed pair and its pool."""

    judged: JudgedPool
    agreed: AgreedPair
    listwise: dict[int, float]  # listwise scores of all candidates of the pool
    counts: AgreementCounts  # of all pairs of the pool

    @property
    def key(self) -> str:
        """A key that is the same for the same prompt, images, generator and texts."""
        texts = [self.judged.pool.candidates[side].text for side in (self.agreed.better, self.agreed.worse)]
        return digest(json.dumps([self.judged.pool.key, *texts]))[:16]


def listwise_scores(
    judged_pools: Sequence[JudgedPool], rubric: Rubric
) -> tuple[dict[int, dict[int, float]], list[PositionBias]]:
    """Listwise scores without position bias, of the candidates of each pool by its index, and the biases."""
    # All rounds tell about the judge; the last one that came back holds all candidates.
    lists: dict[int, list[tuple[int, int, ListScores]]] = defaultdict(list)
    for index, judged in enumerate(judged_pools):
        for number, scored in enumerate(judged.rounds):
            for one_list in scored:
                lists[len(one_list.order)].append((index, number, one_list))
    fitted: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    biases = []
    for length in sorted(lists):
        units: dict[tuple[int, int, int], int] = {}
        flat = [
            (value, units.setdefault((index, number, candidate), len(units)), position, index)
            for index, number, scored in lists[length]
            for position, (candidate, value) in enumerate(zip(scored.order, scored.scores, strict=True))
        ]
        scores, candidates, positions, prompts = map(np.array, zip(*flat, strict=True))
        qualities, bias = fit_positions(
            scores, candidates, positions, prompts, num_positions=length, low=rubric.low, high=rubric.high
        )
        for (index, number, candidate), unit in units.items():
            fitted[index, number][candidate] = float(qualities[unit])
        if bias is not None:
            biases.append(bias)
    return {index: fitted[index, number] for index, number in sorted(fitted)}, biases


def agreed_pairs(
    judged_pools: Sequence[JudgedPool],
    listwise: Mapping[int, dict[int, float]],
    rubric: Rubric,
    min_gap: float,
    report: DistillReport,
) -> list[JudgedPair]:
    """The pairs that both scores agree on. Pools without any are settled in the report."""
    pairs = []
    for index, judged in enumerate(judged_pools):
        pool, by_list = judged.pool, listwise.get(index, {})
        report.candidates["equal"] += pool.num_equal
        report.candidates["empty"] += pool.num_empty
        if pool.num_unfinished:
            report.candidates["unfinished"] += pool.num_unfinished
        both = [candidate for candidate in sorted(judged.criteria) if candidate in by_list]
        agreed, counts = list[AgreedPair](), AgreementCounts()
        if judged.failure is None and len(pool.candidates) == 1:
            is_alone = judged.generation_status is not None and not pool.num_equal
            judged.failure = (
                f"generation: {judged.generation_status}" if is_alone else judged.unanswered or "all_equal"
            )
        elif judged.failure is None and len(both) < 2:
            judged.failure = f"pointwise: {judged.pointwise_status}"
        elif judged.failure is None:
            by_point = [rubric.total(judged.criteria[candidate]) for candidate in both]
            agreed, counts = agreeing_pairs([by_list[candidate] for candidate in both], by_point, min_gap=min_gap)
            report.agreement += counts
            if not agreed:
                judged.failure = judged.unanswered or ("opposed" if counts.opposed else "no_order")
        if judged.failure is not None:
            report.settle(judged.failure, pool.question.name)
        for pair in agreed:
            named = AgreedPair(both[pair.better], both[pair.worse], pair.listwise_gap, pair.pointwise_gap)
            pairs.append(JudgedPair(judged, named, by_list, counts))
    return pairs


def agreeing_pairs(
    listwise: Sequence[float], pointwise: Sequence[float], *, min_gap: float
) -> tuple[list[AgreedPair], AgreementCounts]:
    """The pairs of candidates with both gaps of one sign and at least `min_gap` points, and counts of all pairs."""
    first, second = np.triu_indices(len(listwise), 1)
    list_gaps, point_gaps = (
        scores[first] - scores[second]
        for scores in (np.array(listwise, dtype=float), np.array(pointwise, dtype=float))
    )
    # Sums of the weights of a rubric are off by rounding, which must not decide on a gap of just `min_gap`.
    is_ordered = np.minimum(np.abs(list_gaps), np.abs(point_gaps)) >= min_gap - 1e-9
    agrees = is_ordered & (np.sign(list_gaps) == np.sign(point_gaps))
    pairs = []
    for index in np.flatnonzero(agrees):
        sides = (int(first[index]), int(second[index]))
        better, worse = sides if list_gaps[index] > 0 else sides[::-1]
        pairs.append(AgreedPair(better, worse, abs(float(list_gaps[index])), abs(float(point_gaps[index]))))
    opposed = int(is_ordered.sum()) - len(pairs)
    return pairs, AgreementCounts(len(pairs), opposed, len(first) - len(pairs) - opposed)


def strength_bins(strengths: np.ndarray, *, num_bins: int, low: float, high: float) -> np.ndarray:
    """The bin of each strength, of bins of one width. Shapes: `strengths` `(n,)`, returns `(n,)`."""
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
    """Draw pairs as evenly over the bins as they allow, each generator on its own, whatever the order of the pairs.

    Shapes: `bins` `(n,)`, returns `(n,)`: `DRAWN`, `PROMPT_IS_FULL` or `BIN_IS_FULL`.
    """
    outcome = np.full(len(keys), BIN_IS_FULL, dtype=np.int8)
    strata: dict[tuple[str, int], list[int]] = {}
    # From the back, so that the next pair is the last of its list.
    for index in sorted(range(len(keys)), key=lambda index: digest(f"{seed} {keys[index]}"), reverse=True):
        strata.setdefault((generators[index], int(bins[index])), []).append(index)

    # Bins take turns, those with the fewest pairs so far first, each the next pair in a drawn order whose prompt may
    # have one more.
    per_prompt: Counter[str] = Counter()
    turns: list[tuple[tuple[str, int], int]] = []
    queue = [(0, len(pairs), stratum) for stratum, pairs in strata.items()]
    heapq.heapify(queue)
    while queue:
        count, _, stratum = heapq.heappop(queue)
        pairs = strata[stratum]
        while pairs and pairs_per_prompt is not None and per_prompt[prompts[pairs[-1]]] >= pairs_per_prompt:
            outcome[pairs.pop()] = PROMPT_IS_FULL
        if pairs:
            index = pairs.pop()
            per_prompt[prompts[index]] += 1
            turns.append((stratum, index))
            heapq.heappush(queue, (count + 1, len(pairs), stratum))

    # No bin of a generator keeps more than the median of its bins with a pair; a single bin keeps all.
    counts = Counter(stratum for stratum, _ in turns)
    levels: dict[str, list[int]] = defaultdict(list)
    for (generator, _), count in counts.items():
        levels[generator].append(count)
    quotas = {stratum: int(np.median(levels[stratum[0]])) for stratum in counts}
    kept = []
    for stratum, index in turns:
        if quotas[stratum] > 0:
            quotas[stratum] -= 1
            kept.append(index)
    outcome[kept[:max_pairs]] = DRAWN
    return outcome


def pair_row(
    pair: JudgedPair,
    strength_bin: int,
    source: str,
    about: Mapping[str, str],
    rubric: Rubric,
    effects: Mapping[int, Sequence[float]],
) -> dict[str, Any]:
    """All columns of a pair but its images."""
    judged, agreed, question = pair.judged, pair.agreed, pair.judged.pool.question
    last = next(lists for lists in reversed(judged.rounds) if lists)
    provenance: dict[str, Any] = {
        **about,
        "list_length": len(last[0].order),
        "pairs_of_prompt": {name: getattr(pair.counts, name) for name in ("agreed", "opposed", "close")},
    }
    row: dict[str, Any] = {"prompt": question.prompt}
    for side, index in (("chosen", agreed.better), ("rejected", agreed.worse)):
        candidate = judged.pool.candidates[index]
        row[side] = [{"role": "assistant", "content": [{"type": "text", "text": candidate.text}]}]
        row[f"{side}_origin"] = candidate.origin
        provenance[side] = {
            "listwise": pair.listwise[index],
            "lists": list(_list_scores(last, index, effects)),
            "pointwise": rubric.total(judged.criteria[index]),
            "criteria": judged.criteria[index],
        }
    return {
        **row,
        "strength": agreed.strength,
        "pair_id": f"{source}-{pair.key}",
        "group_id": question.group_id,
        "source": source,
        "source_id": question.source_id,
        "generator": judged.pool.generator,
        "listwise_gap": agreed.listwise_gap,
        "pointwise_gap": agreed.pointwise_gap,
        "strength_bin": strength_bin,
        "provenance": json.dumps(provenance, ensure_ascii=False),
    }


def _list_scores(
    lists: Sequence[ListScores], candidate: int, effects: Mapping[int, Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """A candidate's score in each list with its position, raw and without the effect of the position."""
    for scored in lists:
        position = scored.order.index(candidate)
        score = scored.scores[position]
        effect = effects[len(scored.order)][position] if len(scored.order) in effects else 0.0
        yield {"position": position, "score": score, "corrected": score - effect}
