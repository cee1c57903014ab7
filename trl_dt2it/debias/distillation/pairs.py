"""Pairs on which both ways of judging agree, drawn evenly over strength, as canonical rows."""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Features, Value

from ...data.messages import FEATURES
from ...data.rows import text_message
from ...judge.rubric import Rubric
from ...utils import digest
from ..reports import AgreementCounts, DistillReport, PositionBias
from .candidates import ListScores, Pool
from .position_bias import fit_positions


# Canonical columns, and the origin of a pair; `provenance` is JSON with every score of both sides.
DISTILLED_FEATURES = Features(
    {
        **FEATURES,
        **dict.fromkeys(("generator", "chosen_origin", "rejected_origin"), Value("string")),
        **dict.fromkeys(("listwise_gap", "pointwise_gap"), Value("float64")),
        **{"strength_bin": Value("int64"), "provenance": Value("string")},
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


@dataclass(frozen=True)
class JudgedPair(AgreedPair):
    """An agreed pair and its pool."""

    pool: Pool

    @property
    def key(self) -> str:
        """A key that is the same for the same prompt, images, generator and texts."""
        texts = [self.pool.candidates[side].text for side in (self.better, self.worse)]
        return digest(json.dumps([self.pool.key, *texts]))[:16]


def fit_listwise(pools: Sequence[Pool], rubric: Rubric) -> list[PositionBias]:
    """Fit the listwise scores of each pool's candidates without position bias; return the biases."""
    # All rounds tell about the judge; a pool's longest, which is its last that came back, holds all candidates.
    rounds: dict[int, list[tuple[int, list[ListScores]]]] = defaultdict(list)
    for index, pool in enumerate(pools):
        for lists in filter(None, pool.rounds):
            rounds[len(lists[0].order)].append((index, lists))
    biases = []
    for length, same_length in sorted(rounds.items()):
        flat = [
            (value, number * length + candidate, position, index)
            for number, (index, lists) in enumerate(same_length)
            for scored in lists
            for position, (candidate, value) in enumerate(zip(scored.order, scored.scores, strict=True))
        ]
        columns = map(np.array, zip(*flat, strict=True))
        qualities, bias = fit_positions(*columns, num_positions=length, low=rubric.low, high=rubric.high)
        for (index, _), scores in zip(same_length, qualities.reshape(-1, length).tolist(), strict=True):
            pools[index].listwise = dict(enumerate(scores))
        if bias is not None:
            biases.append(bias)
    return biases


def agreed_pairs(pools: Sequence[Pool], rubric: Rubric, min_gap: float, report: DistillReport) -> list[JudgedPair]:
    """The pairs that both scores agree on. Pools without any are settled in the report."""
    pairs = []
    for pool in pools:
        report.candidates.update(pool.dropped)
        both = [candidate for candidate in sorted(pool.criteria) if candidate in pool.listwise]
        agreed = list[AgreedPair]()
        if pool.failure is None and len(pool.candidates) == 1:
            pool.failure = pool.unanswered or "all_equal"
            if pool.generation_status is not None and not pool.dropped["equal"]:
                pool.failure = f"generation: {pool.generation_status}"
        elif pool.failure is None and len(both) < 2:
            pool.failure = f"pointwise: {pool.pointwise_status}"
        elif pool.failure is None:
            by_list = [pool.listwise[candidate] for candidate in both]
            by_point = [rubric.total(pool.criteria[candidate]) for candidate in both]
            agreed, pool.agreement = agreeing_pairs(by_list, by_point, min_gap=min_gap)
            report.agreement += pool.agreement
            if not agreed:
                pool.failure = pool.unanswered or ("opposed" if pool.agreement.opposed else "no_order")
        if pool.failure is not None:
            report.settle(pool.failure, pool.question.name)
        for pair in agreed:
            better, worse = both[pair.better], both[pair.worse]
            pairs.append(JudgedPair(better, worse, pair.listwise_gap, pair.pointwise_gap, pool))
    return pairs


def agreeing_pairs(
    listwise: Sequence[float], pointwise: Sequence[float], *, min_gap: float
) -> tuple[list[AgreedPair], AgreementCounts]:
    """The pairs of candidates with both gaps of one sign and at least `min_gap` points, and counts of all pairs."""
    first, second = np.triu_indices(len(listwise), 1)
    scores = np.array([listwise, pointwise], dtype=float)
    list_gaps, point_gaps = scores[:, first] - scores[:, second]
    # Sums of the weights of a rubric are off by rounding, which must not decide on a gap of just `min_gap`.
    is_ordered = np.minimum(np.abs(list_gaps), np.abs(point_gaps)) >= min_gap - 1e-9
    agrees = is_ordered & (np.sign(list_gaps) == np.sign(point_gaps))
    better, worse = np.where(list_gaps > 0, [first, second], [second, first])[:, agrees].tolist()
    gaps = np.abs([list_gaps, point_gaps])[:, agrees].tolist()
    pairs = [AgreedPair(*pair) for pair in zip(better, worse, *gaps, strict=True)]
    opposed = int(is_ordered.sum()) - len(pairs)
    return pairs, AgreementCounts(len(pairs), opposed, len(first) - len(pairs) - opposed)


def strength_bins(strengths: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """The bin of each strength; the outer bins take what lies outside. Shapes: `strengths` `(n,)`, returns `(n,)`."""
    return np.searchsorted(edges[1:-1], strengths, side="right")


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
    """Draw pairs evenly over the bins of each generator: `DRAWN`, `PROMPT_IS_FULL` or `BIN_IS_FULL` for each."""
    outcome = np.full(len(keys), BIN_IS_FULL, dtype=np.int8)
    strata: dict[tuple[str, int], list[int]] = {}
    # From the back, so that the next pair is the last of its list.
    for index in sorted(range(len(keys)), key=lambda index: digest(f"{seed} {keys[index]}"), reverse=True):
        strata.setdefault((generators[index], int(bins[index])), []).append(index)

    # Bins take turns, those with the fewest pairs so far first, each the next pair in a drawn order whose prompt may
    # have one more.
    per_prompt: Counter[str] = Counter()
    turns: list[tuple[tuple[str, int], int, int]] = []
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
            turns.append((stratum, count, index))
            heapq.heappush(queue, (count + 1, len(pairs), stratum))

    # No bin of a generator keeps more than the median of its bins with a pair; a single bin keeps all.
    levels: dict[str, list[int]] = defaultdict(list)
    for (generator, _), count in Counter(stratum for stratum, *_ in turns).items():
        levels[generator].append(count)
    quotas = {generator: int(np.median(counts)) for generator, counts in levels.items()}
    kept = [index for (generator, _), count, index in turns if count < quotas[generator]]
    outcome[kept[:max_pairs]] = DRAWN
    return outcome


def count_drawn(
    pools: Sequence[Pool], pairs: Sequence[JudgedPair], report: DistillReport, **options: Any
) -> list[tuple[JudgedPair, int]]:
    """Draw pairs as [`draw_pairs`] does, and count them and their pools; return each drawn pair with its bin."""
    num_bins = len(report.bin_edges) - 1
    bins = strength_bins(np.array([pair.strength for pair in pairs]), report.bin_edges)
    generators = np.array([pair.pool.generator for pair in pairs])
    group_ids, keys = [pair.pool.question.group_id for pair in pairs], [pair.key for pair in pairs]
    outcome = draw_pairs(bins, group_ids, generators.tolist(), keys, **options)
    drawn = [(pairs[index], int(bins[index])) for index in np.flatnonzero(outcome == DRAWN).tolist()]
    paired = {id(pair.pool) for pair, _ in drawn}
    for pool in pools:
        if pool.failure is None:
            report.settle("paired" if id(pool) in paired else "not_drawn", pool.question.name)
    for generator in sorted(set(generators.tolist())):
        own = generators == generator
        report.agreed_by_bin[generator] = np.bincount(bins[own], minlength=num_bins).tolist()
        report.pairs_by_bin[generator] = np.bincount(bins[own & (outcome == DRAWN)], minlength=num_bins).tolist()
    report.not_drawn["prompt_is_full"] = int((outcome == PROMPT_IS_FULL).sum())
    report.not_drawn["bin_is_full"] = int((outcome == BIN_IS_FULL).sum())
    return drawn


def pair_row(
    pair: JudgedPair,
    strength_bin: int,
    source: str,
    about: Mapping[str, str],
    rubric: Rubric,
    effects: Mapping[int, Sequence[float]],
) -> dict[str, Any]:
    """All columns of a pair but its images."""
    pool, question = pair.pool, pair.pool.question
    last = next(lists for lists in reversed(pool.rounds) if lists)
    provenance: dict[str, Any] = {**about, "list_length": len(last[0].order), "pairs_of_prompt": vars(pool.agreement)}
    row: dict[str, Any] = {"prompt": question.messages}
    for side, index in (("chosen", pair.better), ("rejected", pair.worse)):
        candidate = pool.candidates[index]
        row[side] = [text_message("assistant", candidate.text)]
        row[f"{side}_origin"] = candidate.origin
        provenance[side] = {
            "listwise": pool.listwise[index],
            "lists": [_list_score(scored, index, effects) for scored in last],
            "pointwise": rubric.total(pool.criteria[index]),
            "criteria": pool.criteria[index],
        }
    return {
        **row,
        "strength": pair.strength,
        "pair_id": f"{source}-{pair.key}",
        "group_id": question.group_id,
        "source": source,
        "source_id": question.source_id,
        "generator": pool.generator,
        "listwise_gap": pair.listwise_gap,
        "pointwise_gap": pair.pointwise_gap,
        "strength_bin": strength_bin,
        "provenance": json.dumps(provenance, ensure_ascii=False),
    }


def _list_score(scored: ListScores, candidate: int, effects: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """A candidate's position in a list and its score there, raw and without the effect of the position."""
    position = scored.order.index(candidate)
    score, effect = scored.scores[position], effects.get(len(scored.order), [0.0] * len(scored.order))[position]
    return {"position": position, "score": score, "corrected": score - effect}
