"""The rules of curation: pure functions from reward margins and verdicts to decisions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers.utils import logging

from ..utils import check_value
from .noise import MIN_PAIRS, NoiseEstimate, as_margins, flip_mixture, group_by_source


logger = logging.get_logger(__name__)

Rule = Callable[..., np.ndarray]

# An integer vote that cannot be read or was never cast; NaN among floats.
UNREADABLE = -128

KEPT, NOT_SCORED, BROUGHT_BACK = "kept", "not scored", "brought back, for its source to keep enough"
NOT_READ = "kept, for the model does not read its source"

_VOTE_REASONS = {
    "unanimous": ("judges agree with the label", "judges reverse the label", "judges disagree", "vote unreadable"),
    "majority": ("judges agree with the label", "judges reverse the label", "judges draw", "vote unreadable"),
}

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Flip:
    """
    A rule that flips pairs.

    Parameters:
        rule (`Callable`):
            Function of finite reward margins of shape `(n,)` that returns a mask of those to flip.
        by (`str`, *optional*):
            `"source"` for a rule that sees one source at a time. A rule with a parameter `source`, as
            [`flip_mixture`], is called once instead, with the source of each pair. One with a parameter `estimates`
            gets a dictionary, which it fills with the [`NoiseEstimate`] of each source, in the order of its pairs.
        min_pairs (`int`, *optional*, defaults to `200`):
            Scored pairs below which a source is too small to be judged alone with `by="source"` by a rule without a
            parameter `source`: for such sources the rule sees the pairs of all sources together.
    """

    rule: Rule
    by: Literal["source"] | None = None
    min_pairs: int = 200

    def __post_init__(self) -> None:
        check_value("`by`", self.by, self.by in (None, "source"), 'give "source", or leave it out')


@dataclass(frozen=True)
class Keep:
    """
    A rule that keeps pairs, and drops all others.

    Parameters:
        rule (`Callable`):
            Function of finite reward margins of shape `(n,)` that returns a mask of those to keep.
        by (`str`, *optional*):
            `"source"` for a rule that sees one source at a time, as in [`Flip`].
    """

    rule: Rule
    by: Literal["source"] | None = None

    def __post_init__(self) -> None:
        check_value("`by`", self.by, self.by in (None, "source"), 'give "source", or leave it out')


@dataclass(frozen=True)
class Decision:
    """
    Decision about N pairs.

    Parameters:
        flip (`np.ndarray` of shape `(N,)` and dtype `bool`):
            Whether chosen and rejected change places, against the orientation in which the pair was scored.
        keep (`np.ndarray` of shape `(N,)` and dtype `bool`):
            Whether the pair stays in the set; a pair may be both flipped and dropped.
        strength (`np.ndarray` of shape `(N,)` and dtype `float64`):
            Reward margin after the flips.
        reason_code (`np.ndarray` of shape `(N,)` and an integer dtype):
            Index of the reason in `reason_names`.
        reason_names (`tuple[str, ...]`):
            Reasons, such as "flipped by flip_mixture".
        posterior (`np.ndarray` of shape `(N,)`, *optional*):
            Probability that the label is wrong, in the orientation in which the pair was scored, before any flip; NaN
            where it is not known.
        estimates (`dict[str | None, NoiseEstimate]`):
            Estimate of each source by the last rule that makes any.
    """

    flip: np.ndarray
    keep: np.ndarray
    strength: np.ndarray
    reason_code: np.ndarray
    reason_names: tuple[str, ...]
    posterior: np.ndarray | None = None
    estimates: Mapping[str | None, NoiseEstimate] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.flip)

    @property
    def reason(self) -> np.ndarray:
        """The reason of every pair, `(N,)`, strings."""
        return np.array(self.reason_names, dtype=object)[self.reason_code]

    def counts(self) -> dict[str, int]:
        """Count the pairs by reason, without reasons that none has."""
        counts = np.bincount(self.reason_code, minlength=len(self.reason_names)).tolist()
        return {name: count for name, count in zip(self.reason_names, counts, strict=True) if count}


def label_doubt(posterior: np.ndarray, flipped: np.ndarray) -> np.ndarray:
    """Return the probability that each label, as it is after flips, is wrong, at most one half, `(N,)`; NaN where that
    of the label as scored is."""
    return np.where(flipped, 1 - posterior, posterior).clip(0, 0.5)


def decide(
    strength: npt.ArrayLike,
    rules: Sequence[Flip | Keep],
    *,
    source: Sequence[str | None] | np.ndarray | pa.Array | pa.ChunkedArray | None = None,
    mean_reward: npt.ArrayLike | None = None,
    min_kept: float = 0.1,
) -> Decision:
    """
    Apply rules one after the other.

    A rule sees the scored pairs that earlier rules kept, with their reward margins after earlier flips. Pairs that are
    not scored are dropped, so pass only pairs that are to be curated. What an estimate of the noise calls not read is
    left alone by all later rules.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins, from [`combine_scores`]; NaN where a pair is not scored.
        rules (`Sequence` of [`Flip`] and [`Keep`]):
            The rules.
        source (sequence of `str`, *optional*):
            Source of each pair, where `None` is a source too. By default, all pairs are one source.
        mean_reward (`np.ndarray` of shape `(N,)`, *optional*):
            Mean reward of the two answers of each pair, from [`mean_rewards`], for rules that take it.
        min_kept (`float`, *optional*, defaults to `0.1`):
            Least share of the scored pairs of each source to keep, from 0 to 1; 0 in the paper. Where the rules keep
            fewer, the dropped pairs of the largest margins come back, as flipped as they are, with a warning.

    Returns:
        [`Decision`]

    Raises:
        `ValueError`: if an argument has the wrong shape or range, or a rule does not return one boolean per pair.
    """
    margins = as_margins(strength).copy()
    count = len(margins)
    means = None if mean_reward is None else as_margins(mean_reward, "mean_reward", count)
    check_value("`min_kept`", min_kept, 0 <= min_kept <= 1, "give a share from 0 to 1")
    if source is None and any(rule.by for rule in rules):
        raise ValueError('A rule has `by="source"`, but no `source` is given; pass the source of each pair.')
    sources = group_by_source(source, count)
    keep, flip = ~np.isnan(margins), np.zeros(count, dtype=bool)
    is_read, posterior, estimates = np.ones(count, dtype=bool), None, dict[str | None, NoiseEstimate]()
    names = [KEPT, NOT_SCORED, BROUGHT_BACK, NOT_READ]
    code = np.where(keep, 0, 1).astype(np.int16)
    for rule in rules:
        seen, before, told = keep & is_read, flip.copy(), dict[str | None, tuple[np.ndarray, NoiseEstimate]]()
        for rows, mask, of_sources in _judge(rule, margins, means, seen, sources):
            told |= of_sources
            if isinstance(rule, Flip):
                turned = rows[mask]
                flip[turned] ^= True
                margins[turned] *= -1
                # A pair that is flipped back is as it was.
                code[turned] = np.where(flip[turned], len(names), 0)
            else:
                dropped = rows[~mask]
                keep[dropped] = False
                code[dropped] = len(names)
        names.append(f"{'flipped' if isinstance(rule, Flip) else 'dropped'} by {_name(rule.rule)}")
        if told:
            estimates, posterior = {name: one for name, (_, one) in told.items()}, np.full(count, np.nan)
            for rows, estimate in told.values():
                if estimate.is_identified:
                    posterior[rows] = np.where(before[rows], 1 - estimate.posterior, estimate.posterior)
                if estimate.reading == "not read":
                    is_read[rows] = False
                    code[rows[~flip[rows]]] = names.index(NOT_READ)
    saved = _bring_back(margins, keep, sources, min_kept)
    keep[saved] = True
    code[saved] = names.index(BROUGHT_BACK)
    return Decision(flip, keep, margins, code, tuple(names), posterior, estimates)


def _judge(
    rule: Flip | Keep,
    margins: np.ndarray,
    means: np.ndarray | None,
    seen: np.ndarray,
    sources: dict[str | None, np.ndarray],
) -> list[tuple[np.ndarray, np.ndarray, dict[str | None, tuple[np.ndarray, NoiseEstimate]]]]:
    """Return groups of rows that a rule sees, each with its mask, before anything is changed, and rows and estimate of
    each source where the rule makes any."""
    everything = np.flatnonzero(seen)
    if len(everything) == 0:
        return []
    parameters = parameters_of(rule)

    def judge(
        rows: np.ndarray, groups: Mapping[str | None, np.ndarray], **told: Any
    ) -> tuple[np.ndarray, np.ndarray, dict[str | None, tuple[np.ndarray, NoiseEstimate]]]:
        found: dict[str | None, NoiseEstimate] = {}
        told |= {"estimates": found} if "estimates" in parameters else {}
        told |= {"mean_reward": means[rows]} if means is not None and "mean_reward" in parameters else {}
        mask = _mask(partial(rule.rule, **told) if told else rule.rule, margins[rows])
        if len(groups) == len(found) == 1:  # of one group, whatever the rule calls it
            found = dict(zip(groups, found.values(), strict=True))
        if any(name not in groups or len(one.posterior) != len(groups[name]) for name, one in found.items()):
            raise ValueError(
                f"The estimates of {_name(rule.rule)} are of other sources than it was given; leave its `source` to "
                '`by="source"`.'
            )
        return rows, mask, {name: (groups[name], estimate) for name, estimate in found.items()}

    if rule.by is None:
        return [judge(everything, {None: everything})]
    groups = {name: rows[seen[rows]] for name, rows in sources.items()}
    groups = {name: rows for name, rows in groups.items() if len(rows)}
    if "source" in parameters:
        codes = np.empty(len(margins), dtype=np.int32)
        for code, rows in enumerate(groups.values()):
            codes[rows] = code
        source = pa.DictionaryArray.from_arrays(pa.array(codes[everything]), pa.array(groups, pa.string()))
        return [judge(everything, groups, source=source)]
    alone = groups
    if isinstance(rule, Flip):
        alone = {name: rows for name, rows in groups.items() if len(rows) >= rule.min_pairs}
    judged = [judge(rows, {name: rows}) for name, rows in alone.items()]
    if len(alone) < len(groups):
        small = np.isin(everything, np.concatenate([rows for name, rows in groups.items() if name not in alone]))
        _, mask, _ = judge(everything, {None: everything})
        judged.append((everything[small], mask[small], {}))
    return judged


def parameters_of(rule: Flip | Keep) -> set[str]:
    """Return the names of the parameters of a rule that are not bound; none of a rule without a signature, in C."""
    bound = rule.rule.keywords if isinstance(rule.rule, partial) else {}
    try:
        return set(inspect.signature(rule.rule).parameters) - set(bound)
    except ValueError:
        return set()


def with_reference(
    rules: Sequence[Flip | Keep], reference: np.ndarray | None, mean_reward: np.ndarray | None = None
) -> list[Flip | Keep]:
    """Bind reward margins of pairs known to be right, and their mean rewards, `(R,)`, to the rules that take them, if
    enough of them are scored."""
    if reference is None or (~np.isnan(reference)).sum() < MIN_PAIRS:
        if reference is not None:
            logger.warning(f"Under {MIN_PAIRS} pairs known to be right have a score, so that the rules get none.")
        return list(rules)
    known = {"reference": reference} | ({} if mean_reward is None else {"reference_mean_reward": mean_reward})

    def bind(rule: Flip | Keep) -> Flip | Keep:
        takes = parameters_of(rule)
        if "reference" not in takes:  # or the mean rewards may be of another
            return rule
        return replace(rule, rule=partial(rule.rule, **{name: known[name] for name in takes & known.keys()}))

    return list(map(bind, rules))


def _mask(rule: Rule, margins: np.ndarray) -> np.ndarray:
    mask = np.asarray(rule(margins))
    if mask.shape != margins.shape or mask.dtype != bool:
        told = f"{mask.dtype} values of shape {mask.shape} for {len(margins)} pairs"
        raise ValueError(f"The rule {_name(rule)} gave {told}; it must give one truth value per pair.")
    return mask


def _bring_back(
    margins: np.ndarray, keep: np.ndarray, sources: dict[str | None, np.ndarray], min_kept: float
) -> np.ndarray:
    """Return the dropped pairs of the largest margins, of sources of which too few are kept."""
    saved = [np.empty(0, dtype=np.int64)]
    for name, rows in sources.items():
        rows = rows[~np.isnan(margins[rows])]
        missing = math.ceil(min_kept * len(rows) - _ROUNDING) - int(keep[rows].sum())
        if missing > 0:
            dropped = rows[~keep[rows]]
            saved.append(dropped[np.argsort(-margins[dropped], kind="stable")[:missing]])
            whose = "the set" if name is None else repr(name)  # printable, whatever is in a name from data
            logger.warning(
                f"The rules keep {keep[rows].sum():,} of {len(rows):,} pairs of {whose}; the strongest "
                f"{missing:,} of the others come back, because `min_kept` is {min_kept}."
            )
    return np.concatenate(saved)


def _name(rule: Any) -> str:
    while isinstance(rule, partial):
        rule = rule.func
    return getattr(rule, "__name__", type(rule).__name__)


def flip_weakest_half(strength: npt.ArrayLike) -> np.ndarray:
    """
    Flip the lower half of the pairs with a negative reward margin: the paper's first step.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins; NaN is not flipped and does not count.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: true for the `floor(n / 2)` lowest of the `n` negative margins.
        Of equal margins the earlier rows come first. A single negative pair is not flipped.
    """
    margins = as_margins(strength)
    negative = np.flatnonzero(margins < 0)
    order = np.argsort(margins[negative], kind="stable")
    mask = np.zeros(len(margins), dtype=bool)
    mask[negative[order[: len(negative) // 2]]] = True
    return mask


def flip_negative(strength: npt.ArrayLike, margin: float = 0.0) -> np.ndarray:
    """
    Flip every pair whose rejected answer is better by more than a margin.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins; NaN and 0 are not flipped.
        margin (`float`, *optional*, defaults to `0.0`):
            Pairs with a reward margin below minus this are flipped; not negative.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`
    """
    check_value("`margin`", margin, margin >= 0, "give a number that is not negative")
    return as_margins(strength) < -margin


def keep_consistent(strength: npt.ArrayLike) -> np.ndarray:
    """
    Keep the pairs whose chosen answer has the higher reward: the paper's second step.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins; NaN is not kept.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: true where the margin is above 0; a tie is not kept.
    """
    return as_margins(strength) > 0


def keep_confident(strength: npt.ArrayLike, share: float = 0.9) -> np.ndarray:
    """
    Keep a share of the pairs, those of the largest reward margins.

    Args:
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins, best after the flips; NaN is not kept and does not count.
        share (`float`, *optional*, defaults to `0.9`):
            Share of the scored pairs to keep, rounded up, from 0 to 1.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `bool`: of equal margins the earlier rows are kept first.
    """
    check_value("`share`", share, 0 <= share <= 1, "give a number from 0 to 1")
    margins = as_margins(strength)
    scored = np.flatnonzero(~np.isnan(margins))
    order = np.argsort(-margins[scored], kind="stable")
    mask = np.zeros(len(margins), dtype=bool)
    mask[scored[order[: math.ceil(share * len(scored) - _ROUNDING)]]] = True
    return mask


def relabel_by_vote(votes: npt.ArrayLike, how: Literal["unanimous", "majority"] = "unanimous") -> Decision:
    """
    Keep, flip or drop pairs by the votes of judges that saw each pair with and without position swap.

    Args:
        votes (`np.ndarray` of shape `(N, J, 2)`):
            Votes of J judges with chosen shown first, and with rejected shown first: 1 if chosen is better, -1 if
            rejected is, 0 for a tie; `UNREADABLE` (-128), or NaN in floats, for a missing or unreadable vote.
        how (`str`, *optional*, defaults to `"unanimous"`):
            `"unanimous"`: all judges must agree in both orders. `"majority"`: the paper's rule; each call is one vote,
            a tie half a vote for each answer. In both, a pair with a missing vote or a draw is dropped.

    Returns:
        [`Decision`]: its `strength` is the mean vote after flips, above 0 in kept pairs; NaN if a vote is missing.

    Raises:
        `ValueError`: if the shape is another, a vote has another value, or `how` is unknown.
    """
    check_value("`how`", how, how in _VOTE_REASONS, f"give one of {', '.join(map(repr, _VOTE_REASONS))}")
    votes = np.asarray(votes)
    if votes.ndim != 3 or votes.shape[1] == 0 or votes.shape[2] != 2:
        raise ValueError(f"`votes` has shape {votes.shape}; it must be (pairs, judges, 2): both orders of each judge.")
    missing = is_missing_vote(votes)
    is_valid = missing | np.isin(votes, (-1, 0, 1))
    if not is_valid.all():
        pair, judge, order = np.argwhere(~is_valid)[0]
        given = f"Vote {order} of judge {judge} for pair {pair} is {votes[pair, judge, order]}"
        raise ValueError(f"{given}; give 1, 0 or -1, or {UNREADABLE} for one that cannot be read.")
    unreadable = missing.any(axis=(1, 2))
    # A tie is half a vote for each answer, so the sum of signs is the lead of chosen.
    lead = np.where(missing, 0, votes).sum(axis=(1, 2), dtype=np.int64)
    needed = 2 * votes.shape[1] if how == "unanimous" else 1
    flip, confirmed = ~unreadable & (lead <= -needed), ~unreadable & (lead >= needed)
    code = np.select([confirmed, flip, unreadable], [0, 1, 3], default=2).astype(np.int16)
    strength = np.where(unreadable, np.nan, np.where(flip, -lead, lead) / (2 * votes.shape[1]))
    return Decision(flip, confirmed | flip, strength, code, _VOTE_REASONS[how])


def is_missing_vote(votes: np.ndarray) -> np.ndarray:
    """Mark votes that cannot be read or were never cast."""
    return np.isnan(votes) if votes.dtype.kind == "f" else votes == UNREADABLE


# Rules that a configuration may name, with any option of the function beside the name. Enter a new rule here.
FLIP_RULES = {rule.__name__: rule for rule in (flip_weakest_half, flip_negative, flip_mixture)}
KEEP_RULES = {rule.__name__: rule for rule in (keep_consistent, keep_confident)}
