"""What one round of [`IterativeCurationCallback`] decides, worked out from scores on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .callback_state import CurationState
from .combining import combine_scores
from .deciding import Decision, Flip, Keep, decide, group_by_source, parameters_of


@dataclass(frozen=True)
class RoundRules:
    """How scores become a decision; see [`IterativeCurationCallback`]."""

    rules: Sequence[Flip | Keep]
    min_kept: float
    combine: Literal["raw", "zscore", "rank"]
    momentum: float


@dataclass(frozen=True)
class Round:
    """
    What a round decided about the N pairs of a train set.

    Parameters:
        flipped, kept (`np.ndarray` of shape `(N,)` and dtype `bool`):
            As in [`Selection`].
        strength (`np.ndarray` of shape `(N,)` and dtype `float64`):
            After the flips; NaN for pairs that nothing was decided about.
        average (`np.ndarray` of shape `(N,)` and dtype `float64`):
            As in [`CurationState`].
        rows (`np.ndarray` of shape `(D,)`):
            The pairs that it decided about.
        reference (`np.ndarray` of shape `(R,)`, *optional*):
            Average strengths of the pairs known to be right.
        decision ([`Decision`] about D pairs):
            The decision itself.
        sources (`dict` of `np.ndarray`):
            Rows of each source, of those that it decided about.
    """

    flipped: np.ndarray
    kept: np.ndarray
    strength: np.ndarray
    average: np.ndarray
    rows: np.ndarray
    reference: np.ndarray | None
    decision: Decision
    sources: dict[str | None, np.ndarray]


def decide_round(
    rules: RoundRules,
    state: CurationState,
    rows: np.ndarray,
    scores: np.ndarray,
    reference_scores: np.ndarray | None = None,
    *,
    curated: np.ndarray,
    source: pa.Array,
) -> Round:
    """
    Decides about all pairs that have been scored in this round or an earlier one.

    Args:
        rules ([`RoundRules`]):
            How.
        state ([`CurationState`] of N pairs):
            What holds; pairs without a score stay so.
        rows (`np.ndarray` of shape `(n,)`):
            The pairs that were scored now.
        scores (`np.ndarray` of shape `(n, 2)` or `(n, 2, m)`):
            Their rewards, chosen and rejected as in the data set.
        reference_scores (`np.ndarray` of shape `(R, 2)` or `(R, 2, m)`, *optional*):
            Those of the pairs known to be right; rules that take a `reference` get their strengths.
        curated (`np.ndarray`):
            The pairs that may be changed.
        source (`pa.Array` of length N):
            Source of each pair.

    Returns:
        [`Round`]

    Raises:
        `ValueError`: if the scores have another shape, or there is none at all.
    """
    _check_shape(scores, len(rows))
    every = scores
    if reference_scores is not None:
        _check_shape(reference_scores, len(cast(np.ndarray, state.reference)))
        every = np.concatenate([scores, reference_scores])  # on one scale, whichever it is
    now = combine_scores(every, rules.combine)
    average, reference = state.average.copy(), state.reference
    average[rows] = blend(average[rows], now[: len(rows)], rules.momentum)
    if reference is not None:
        reference = blend(reference, now[len(rows) :], rules.momentum)
    scored = curated[~np.isnan(average[curated])]
    if len(scored) == 0:
        raise ValueError("The scorer gave NaN for every pair, so that there is nothing to decide on.")
    names = source.take(pa.array(scored))
    bound = [_with_reference(rule, reference) for rule in rules.rules]
    decision = decide(average[scored], bound, source=names, min_kept=rules.min_kept)
    flipped, kept, strength = (
        state.selection.flipped.copy(),
        state.selection.kept.copy(),
        np.full(len(average), np.nan),
    )
    flipped[scored], kept[scored], strength[scored] = decision.flip, decision.keep, decision.strength
    sources = {name: scored[part] for name, part in group_by_source(names, len(scored)).items()}
    return Round(flipped, kept, strength, average, scored, reference, decision, sources)


def _check_shape(scores: np.ndarray, number: int) -> None:
    if scores.shape[:2] != (number, 2):
        raise ValueError(
            f"The scorer gave an array of shape {scores.shape} for {number} pairs; give rewards of chosen and "
            f"rejected, ({number}, 2), or those of m models, ({number}, 2, m)."
        )


def takes_reference(rule: Flip | Keep) -> bool:
    """Whether a rule can be told the strengths of pairs known to be right."""
    return "reference" in parameters_of(rule)


def _with_reference(rule: Flip | Keep, reference: np.ndarray | None) -> Flip | Keep:
    if reference is None or not takes_reference(rule):
        return rule
    return replace(rule, rule=partial(cast("Callable[..., np.ndarray]", rule.rule), reference=reference))


def rows_of_sources(source: pa.Array, only_sources: Sequence[str] | None) -> np.ndarray:
    """The rows of some sources, or of all."""
    if only_sources is None:
        return np.arange(len(source))
    present = source.unique().to_pylist()
    if missing := sorted(set(only_sources) - set(present)):
        raise ValueError(
            f"`only_sources` names {missing[0]}, which is not in the column `source` of the train set; it has "
            f"{', '.join(sorted(str(name) for name in present))}."
        )
    return np.flatnonzero(pc.is_in(source, value_set=pa.array(list(only_sources))).to_numpy(zero_copy_only=False))


def blend(before: np.ndarray, now: np.ndarray, momentum: float) -> np.ndarray:
    """
    Exponential average of strengths.

    Args:
        before (`np.ndarray` of shape `(N,)`):
            Average so far, NaN where there is none.
        now (`np.ndarray` of shape `(N,)`):
            Strengths of this round, NaN where not scored.
        momentum (`float`):
            Share of the average so far.

    Returns:
        `np.ndarray` of shape `(N,)`: where one of both is NaN, the other.
    """
    average = momentum * before + (1 - momentum) * now
    return np.where(np.isnan(before), now, np.where(np.isnan(now), before, average))


def fold_of(num_pairs: int, folds: int, seed: int) -> np.ndarray:
    """The fold of each pair, `(N,)`, drawn at random; folds differ in size by one pair at most."""
    return np.random.default_rng([seed, num_pairs]).permutation(num_pairs) % folds


def deal_out(raw: np.ndarray, strength: np.ndarray, sources: Mapping[Any, np.ndarray]) -> np.ndarray:
    """
    Gives the strengths that a source has to other pairs of it: the largest to the pair of which a model is surest.

    So strengths stay in the unit of their source, and what was fitted to them still fits.

    Args:
        raw (`np.ndarray` of shape `(N,)`):
            Strengths of the data set, NaN where unknown.
        strength (`np.ndarray` of shape `(N,)`):
            By how much the model prefers chosen.
        sources (`Mapping` of `np.ndarray`):
            Rows of each source that take part.

    Returns:
        `np.ndarray` of shape `(N,)`: rows that take no part, or of unknown strength, as before.
    """
    dealt = raw.copy()
    for rows in sources.values():
        known = rows[~np.isnan(raw[rows])]
        dealt[known[np.argsort(strength[known], kind="stable")]] = np.sort(raw[known])
    return dealt


def round_metrics(done: Round) -> dict[str, float]:
    """What is logged of a round, as [`curation_metrics`] gives it."""
    return curation_metrics(done.flipped, done.kept, done.strength, done.rows, done.sources)


def curation_metrics(
    flipped: np.ndarray,
    kept: np.ndarray,
    strength: np.ndarray,
    rows: np.ndarray,
    sources: Mapping[str | None, np.ndarray],
) -> dict[str, float]:
    """
    Figures of a curated set, to be logged.

    Args:
        flipped, kept (`np.ndarray` of shape `(N,)` and dtype `bool`):
            What holds for each pair.
        strength (`np.ndarray` of shape `(N,)`):
            Their strengths, NaN where unknown.
        rows (`np.ndarray`):
            Rows to count.
        sources (`Mapping` of `np.ndarray`):
            Those of each source, which counts for itself too where there are several.

    Returns:
        `dict[str, float]`: `curation/kept`, `curation/dropped` and, of those that are kept, `curation/flipped`,
        numbers of pairs; `curation/noise_rate`, the share that is flipped, dropped pairs among them; and
        `curation/mean_strength`, over the kept pairs of known strength. Of a source as in `curation/kept/<source>`.
    """

    def of(rows: np.ndarray) -> dict[str, float]:
        known = strength[rows[kept[rows]]]
        known = known[~np.isnan(known)]
        return {
            "kept": int(kept[rows].sum()),
            "flipped": int((flipped & kept)[rows].sum()),
            "dropped": int((~kept[rows]).sum()),
            "noise_rate": float(flipped[rows].mean()),
            **({"mean_strength": float(known.mean())} if len(known) else {}),
        }

    metrics = {f"curation/{name}": value for name, value in of(rows).items()}
    if len(sources) > 1:
        for source, part in sources.items():
            metrics |= {f"curation/{name}/{source}": value for name, value in of(part).items()}
    return metrics
