"""The paper's third step: what judges say, in both orders, about the pairs that the model contradicts."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from .deciding import Decision


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
