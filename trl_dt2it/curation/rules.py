"""The rules of curation: pure functions from reward margins and verdicts to decisions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers.utils import logging

from ..data.columns import group_rows
from .noise import as_strength, calibrate, shared_slope


# A vote that could not be read or was never cast, where votes are integers; NaN where they are floats.
UNREADABLE = -128

_REASONS = {
    "unanimous": ("judges agree with the label", "judges reverse the label", "judges disagree", "vote unreadable"),
    "majority": ("judges agree with the label", "judges reverse the label", "judges draw", "vote unreadable"),
}


def relabel_by_vote(votes: npt.ArrayLike, how: Literal["unanimous", "majority"] = "unanimous") -> Decision:
    """
    Keeps, flips or drops pairs by the votes of judges that saw each pair in both orders.

    Args:
        votes (`np.ndarray` of shape `(N, J, 2)`):
            What J judges say of each pair with chosen shown first, and with rejected shown first: 1 if chosen is
            better, -1 if rejected is, 0 for a tie; `UNREADABLE` (-128), or NaN in floats, for what is missing or
            cannot be read. Signs speak of the pair, not of the position.
        how (`str`, *optional*, defaults to `"unanimous"`):
            `"unanimous"`: all judges must agree in both orders. `"majority"`: the paper's rule; each call is one vote
            for the better answer, half a vote for each in a tie, and the answer with more votes is chosen. In both,
            a pair with a missing vote or a draw is dropped.

    Returns:
        [`Decision`]: its `strength` is the mean vote after flips, above 0 in kept pairs; NaN if a vote is
        missing.

    Raises:
        `ValueError`: if the shape is another, a vote has another value, or `how` is unknown.
    """
    if how not in _REASONS:
        raise ValueError(f"`how` is {how!r}; give one of {', '.join(map(repr, _REASONS))}.")
    votes = np.asarray(votes)
    if votes.ndim != 3 or votes.shape[1] == 0 or votes.shape[2] != 2:
        raise ValueError(
            f"`votes` has shape {votes.shape}; it must be (pairs, judges, 2): both orders of every judge."
        )
    missing = np.isnan(votes) if votes.dtype.kind == "f" else votes == UNREADABLE
    if not (missing | np.isin(votes, (-1, 0, 1))).all():
        pair, judge, order = np.argwhere(~(missing | np.isin(votes, (-1, 0, 1))))[0]
        raise ValueError(
            f"Vote {order} of judge {judge} for pair {pair} is {votes[pair, judge, order]}; give 1, 0 or -1, or "
            f"{UNREADABLE} for one that cannot be read."
        )
    unreadable = missing.any(axis=(1, 2))
    # A tie gives half a vote to each side, so that the sum of signs is the lead of chosen.
    lead = np.where(missing, 0, votes).sum(axis=(1, 2), dtype=np.int64)
    needed = 2 * votes.shape[1] if how == "unanimous" else 1
    flip, confirmed = ~unreadable & (lead <= -needed), ~unreadable & (lead >= needed)
    code = np.select([confirmed, flip, unreadable], [0, 1, 3], default=2).astype(np.int16)
    strength = np.where(unreadable, np.nan, np.where(flip, -lead, lead) / (2 * votes.shape[1]))
    return Decision(flip, confirmed | flip, strength, code, _REASONS[how])


logger = logging.get_logger(__name__)

Rule = Callable[[np.ndarray], np.ndarray]

KEPT, NOT_SCORED, BROUGHT_BACK = "kept", "not scored", "brought back, for its source to keep enough"

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Flip:
    """
    A rule that says which pairs are flipped.

    Parameters:
        rule (`Callable`):
            Takes strengths of shape `(n,)`, all finite, and gives a mask of those to flip.
        by (`str`, *optional*):
            `"source"` for a rule that sees one source at a time. A rule that has a parameter `slope`, as
            [`flip_mixture`] does, is passed that of its `reference`, or else the [`shared_slope`] of all sources; one
            that has a parameter `source` is passed the name.
        min_pairs (`int`, *optional*, defaults to `200`):
            With `by="source"` and a rule without a parameter `slope`, sources with fewer scored pairs than this are
            too small to be judged alone: for them the rule sees the pairs of all sources together. A rule with one
            judges every source by its own pairs.
    """

    rule: Rule
    by: Literal["source"] | None = None
    min_pairs: int = 200

    def __post_init__(self) -> None:
        _check_by(self.by)


@dataclass(frozen=True)
class Keep:
    """
    A rule that says which pairs are kept.

    Parameters:
        rule (`Callable`):
            Takes strengths of shape `(n,)`, all finite, and gives a mask of those to keep.
        by (`str`, *optional*):
            `"source"` for a rule that sees one source at a time.
    """

    rule: Rule
    by: Literal["source"] | None = None

    def __post_init__(self) -> None:
        _check_by(self.by)


@dataclass(frozen=True)
class Decision:
    """
    What becomes of N pairs.

    Parameters:
        flip (`np.ndarray` of shape `(N,)` and dtype `bool`):
            Whether chosen and rejected change places, against how the pair was scored.
        keep (`np.ndarray` of shape `(N,)` and dtype `bool`):
            Whether the pair stays in the set. A pair that is flipped and then dropped has both said.
        strength (`np.ndarray` of shape `(N,)` and dtype `float64`):
            Strength after the flips.
        reason_code (`np.ndarray` of shape `(N,)` and an integer dtype):
            Place of the reason in `reason_names`.
        reason_names (`tuple[str, ...]`):
            Reasons, as in "flipped by flip_mixture".
    """

    flip: np.ndarray
    keep: np.ndarray
    strength: np.ndarray
    reason_code: np.ndarray
    reason_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.flip)

    @property
    def reason(self) -> np.ndarray:
        """The reason of every pair, `(N,)`, strings."""
        return np.array(self.reason_names, dtype=object)[self.reason_code]

    def counts(self) -> dict[str, int]:
        """How many pairs have each reason; those that none has are left out."""
        counts = np.bincount(self.reason_code, minlength=len(self.reason_names)).tolist()
        return {name: count for name, count in zip(self.reason_names, counts, strict=True) if count}


def decide(
    strength: npt.ArrayLike,
    rules: Sequence[Flip | Keep],
    *,
    source: Sequence[str | None] | np.ndarray | pa.Array | pa.ChunkedArray | None = None,
    min_kept: float = 0.1,
) -> Decision:
    """
    Applies rules one after the other.

    A rule sees the pairs that are scored and that the rules before it kept, with the strengths that they have after
    the flips before it. Pairs that are not scored are dropped, so pass only pairs that are to be curated.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths, from [`combine_scores`]; NaN where a pair is not scored.
        rules (`Sequence` of [`Flip`] and [`Keep`]):
            The rules.
        source (sequence of `str`, *optional*):
            Source of each pair; `None` is a source of its own. Without it, all pairs are one source.
        min_kept (`float`, *optional*, defaults to `0.1`):
            Least share of the scored pairs of each source that is kept, from 0 to 1. Where the rules leave less, the
            strongest of the scored pairs that they dropped come back, in the orientation that the rules gave them,
            and a warning names the source. 0 turns it off, as in the paper.

    Returns:
        [`Decision`]

    Raises:
        `ValueError`: if an argument has the wrong shape or range, or a rule does not give one truth value per pair.
    """
    strength = as_strength(strength).copy()
    count = len(strength)
    if not 0 <= min_kept <= 1:
        raise ValueError(f"`min_kept` is {min_kept}; give a share from 0 to 1.")
    if source is None and any(rule.by for rule in rules):
        raise ValueError('A rule has `by="source"`, but no `source` is given; pass the source of each pair.')
    sources = group_by_source(source, count)
    keep, flip = ~np.isnan(strength), np.zeros(count, dtype=bool)
    names = [KEPT, NOT_SCORED, BROUGHT_BACK]
    code = np.where(keep, 0, 1).astype(np.int16)
    for rule in rules:
        for rows, mask in _judge(rule, strength, keep, sources):
            if isinstance(rule, Flip):
                turned = rows[mask]
                flip[turned] ^= True
                strength[turned] *= -1
                # Whoever is flipped back is as it was.
                code[turned] = np.where(flip[turned], len(names), 0)
            else:
                dropped = rows[~mask]
                keep[dropped] = False
                code[dropped] = len(names)
        names.append(f"{'flipped' if isinstance(rule, Flip) else 'dropped'} by {_name(rule.rule)}")
    saved = _bring_back(strength, keep, sources, min_kept)
    keep[saved] = True
    code[saved] = names.index(BROUGHT_BACK)
    return Decision(flip, keep, strength, code, tuple(names))


def group_by_source(source: Any, count: int) -> dict[str | None, np.ndarray]:
    """Rows of each source, ascending."""
    if source is None:
        return {None: np.arange(count)}
    column = source if isinstance(source, (pa.Array, pa.ChunkedArray)) else pa.array(source, from_pandas=True)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if len(column) != count:
        raise ValueError(f"There are {count} strengths and {len(column)} entries of `source`; give one per pair.")
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    names = [*encoded.dictionary.to_pylist(), None]
    codes = encoded.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)
    return {name: rows for name, rows in zip(names, group_rows(codes), strict=False) if len(rows)}


def _judge(
    rule: Flip | Keep, strength: np.ndarray, keep: np.ndarray, sources: dict[str | None, np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows that the rule speaks of, and what it says of them, before anything is changed."""
    everything = np.flatnonzero(keep)
    if rule.by is None:
        return [(everything, _ask(rule, strength[everything]))] if len(everything) else []
    groups = {name: rows[keep[rows]] for name, rows in sources.items()}
    groups = {name: rows for name, rows in groups.items() if len(rows)}
    shared = _with_slope(rule, [strength[rows] for rows in groups.values()])
    if shared is not None:
        return [(rows, _ask(_with_source(shared, name), strength[rows])) for name, rows in groups.items()]
    alone = {name: rows for name, rows in groups.items() if isinstance(rule, Keep) or len(rows) >= rule.min_pairs}
    judged = [(rows, _ask(_with_source(rule, name), strength[rows])) for name, rows in alone.items()]
    if len(alone) < len(groups):
        small = np.zeros(len(strength), dtype=bool)
        small[np.concatenate([rows for name, rows in groups.items() if name not in alone])] = True
        small = small[everything]
        judged.append((everything[small], _ask(rule, strength[everything])[small]))
    return judged


def parameters_of(rule: Flip | Keep) -> set[str]:
    """Names of the parameters of a rule; none of one in C that does not say."""
    try:
        return set(inspect.signature(rule.rule).parameters)
    except ValueError:
        return set()


def _with_slope(rule: Flip | Keep, parts: Sequence[np.ndarray]) -> Flip | Keep | None:
    """The rule, told how sure the model is, by its reference or by all sources; `None` if it does not ask."""
    told = dict(rule.rule.keywords) if isinstance(rule.rule, partial) else {}
    if "slope" not in parameters_of(rule):
        return None
    if told.get("slope") is None:
        # That the model reads the reference does not say that it reads this source: only the slope is lent.
        reference = told.pop("reference", None)
        slope = shared_slope(parts) if reference is None else calibrate(reference)
        function = rule.rule.func if isinstance(rule.rule, partial) else rule.rule
        given = rule.rule.args if isinstance(rule.rule, partial) else ()
        rule = replace(rule, rule=cast("Rule", partial(function, *given, **{**told, "slope": slope})))
    return rule


def _with_source(rule: Flip | Keep, name: str | None) -> Flip | Keep:
    if "source" not in parameters_of(rule):
        return rule
    return replace(rule, rule=partial(cast("Callable[..., np.ndarray]", rule.rule), source=name))


def _ask(rule: Flip | Keep, strength: np.ndarray) -> np.ndarray:
    mask = np.asarray(rule.rule(strength))
    if mask.shape != strength.shape or mask.dtype != bool:
        raise ValueError(
            f"The rule {_name(rule.rule)} gave {mask.dtype} values of shape {mask.shape} for {len(strength)} pairs; "
            "it must give one truth value per pair."
        )
    return mask


def _bring_back(
    strength: np.ndarray, keep: np.ndarray, sources: dict[str | None, np.ndarray], min_kept: float
) -> np.ndarray:
    """The strongest of the dropped pairs of sources of which too few are kept."""
    saved = [np.empty(0, dtype=np.int64)]
    for name, rows in sources.items():
        rows = rows[~np.isnan(strength[rows])]  # one that is not scored has nothing to come back for
        missing = math.ceil(min_kept * len(rows) - _ROUNDING) - int(keep[rows].sum())
        if missing > 0:
            dropped = rows[~keep[rows]]
            saved.append(dropped[np.argsort(-strength[dropped], kind="stable")[:missing]])
            whose = "the set" if name is None else repr(name)  # a name from data is text on screen, whatever is in it
            logger.warning(
                f"The rules keep {keep[rows].sum():,} of {len(rows):,} pairs of {whose}; the strongest "
                f"{missing:,} of the others come back, because `min_kept` is {min_kept}."
            )
    return np.concatenate(saved)


def _name(rule: Any) -> str:
    while isinstance(rule, partial):
        rule = rule.func
    return getattr(rule, "__name__", type(rule).__name__)


def _check_by(by: str | None) -> None:
    if by not in (None, "source"):
        raise ValueError(f'`by` is {by!r}; give "source", or leave it out.')


def flip_weakest_half(strength: npt.ArrayLike) -> np.ndarray:
    """
    The paper's first step: of the pairs with a negative strength, the lower half is flipped.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths; NaN is not flipped and does not count.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: true for the `floor(n / 2)` lowest of the `n` negative ones. Of
        equal ones the earlier rows come first. A single negative pair is not flipped.
    """
    strength = as_strength(strength)
    negative = np.flatnonzero(strength < 0)
    order = np.argsort(strength[negative], kind="stable")
    mask = np.zeros(len(strength), dtype=bool)
    mask[negative[order[: len(negative) // 2]]] = True
    return mask


def flip_negative(strength: npt.ArrayLike, margin: float = 0.0) -> np.ndarray:
    """
    Flips every pair whose rejected answer is better by more than a margin.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths; NaN and 0 are not flipped.
        margin (`float`, *optional*, defaults to `0.0`):
            Pairs with a strength below minus this are flipped; not negative.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`
    """
    if not margin >= 0:
        raise ValueError(f"`margin` is {margin}; give a number that is not negative.")
    return as_strength(strength) < -margin


def keep_consistent(strength: npt.ArrayLike) -> np.ndarray:
    """
    The paper's second step: keeps the pairs whose chosen answer has the higher reward.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths; NaN is not kept.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: true where the strength is above 0; a tie is not kept.
    """
    return as_strength(strength) > 0


def keep_confident(strength: npt.ArrayLike, share: float = 0.9) -> np.ndarray:
    """
    Keeps the given share of the pairs, those of the highest strength.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Strengths, best after the flips; NaN is not kept and does not count.
        share (`float`, *optional*, defaults to `0.9`):
            Share of the scored pairs to keep, rounded up, from 0 to 1.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: of equal strengths the earlier rows are kept first.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` is {share}; give a number from 0 to 1.")
    strength = as_strength(strength)
    scored = np.flatnonzero(~np.isnan(strength))
    order = np.argsort(-strength[scored], kind="stable")
    mask = np.zeros(len(strength), dtype=bool)
    mask[scored[order[: math.ceil(share * len(scored) - _ROUNDING)]]] = True
    return mask
