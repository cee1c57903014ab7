"""Drawing pairs: evenly over strengths, within one generator, and not too many of one prompt.

Left alone, judges give many small gaps and few large ones, or the other way round, and prompts with many candidates
give more pairs than others.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..utils import digest


DRAWN, PROMPT_IS_FULL, BIN_IS_FULL = 0, 1, 2


def strength_bins(strengths: np.ndarray, *, num_bins: int, low: float, high: float) -> np.ndarray:
    """
    The bin of each strength, of bins of one width.

    Args:
        strengths (`np.ndarray` of shape `(n,)`):
            Strengths, in points.
        num_bins (`int`):
            Number of bins.
        low (`float`):
            Where the first bin begins.
        high (`float`):
            Where the last bin ends. What lies outside belongs to the first or last bin.

    Returns:
        `np.ndarray` of type int64 and shape `(n,)`: from 0, the weakest.
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
    """
    Draws pairs as evenly over the bins as they allow, for each generator on its own.

    Bins take turns, those with the fewest pairs so far first, each the next pair in a drawn order whose prompt may
    give one more. Then no bin of a generator keeps more than the median of its bins has, bins without a pair left out;
    one bin keeps all. What is drawn does not depend on the order of the pairs.

    Args:
        bins (`np.ndarray` of type int64 and shape `(n,)`):
            Bin of each pair.
        prompts (`Sequence[str]`):
            Prompt of each pair.
        generators (`Sequence[str]`):
            Which model wrote both answers.
        keys (`Sequence[str]`):
            Name of each pair, no two alike.
        pairs_per_prompt (`int`, *optional*):
            Most pairs of one prompt; `None` for no limit.
        max_pairs (`int`, *optional*):
            Most pairs in all.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw.

    Returns:
        `np.ndarray` of type int8 and shape `(n,)`: for each pair 0 if it is drawn, 1 if its prompt gave enough
        others, 2 if its bin is full.
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
