"""A budget of judges: the pairs to ask about first, what a verdict is worth against a reward model, and the curve."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..utils import check_value
from .rules import Decision


Order = Literal["gain", "uncertainty", "margin", "random"]

ORDERS: tuple[Order, ...] = ("gain", "uncertainty", "margin", "random")

# Share of right verdicts that is assumed of judges who agree with themselves after a position swap, until votes tell
# more than so many verdicts would.
ACCURACY, _PRIOR_VERDICTS = 0.8, 50

_CURVE_POINTS, _DIGITS = 50, 6


def judge_order(
    posterior: npt.ArrayLike,
    margins: npt.ArrayLike,
    *,
    how: Order,
    flipped: npt.ArrayLike,
    kept: npt.ArrayLike,
    accuracy: float = ACCURACY,
    seed: int = 42,
) -> np.ndarray:
    r"""
    Order pairs by what asking judges about them is worth.

    Let \(p\) be the probability that the label as it is kept now is wrong, and \(a\) the share of right verdicts. The
    verdict is against the label with probability \(c = p a + (1 - p)(1 - a)\), and the label is then wrong with
    probability \(p' = p a / c\), by Bayes. Turning it removes a wrong label with probability \(p'\) and makes one with
    \(1 - p'\), so it is turned where \(p' > 1/2\), and a pair is expected to lose

    \[g = c \, \max(0, 2 p' - 1) = \max(0, p a - (1 - p)(1 - a)) = \max(0, p + a - 1)\]

    wrong labels by being asked about: the probability that the verdict changes the label times how much more likely
    wrong than right it then is. At \(p \le 1 - a\) no verdict changes anything. A dropped pair has no label, which is
    a coin toss, \(p = 1/2\); it comes back with the label of the verdict, and \(g = a - 1/2\). Verdicts that are no
    clear ones multiply all gains alike, as do calls.

    Args:
        posterior (`np.ndarray` of shape `(N,)`):
            Probability that each label is wrong, from 0 to 1, in the orientation of `flipped = False`; where it is not
            known, NaN, which counts as the mean of the others, or 0.5 if none is known.
        margins (`np.ndarray` of shape `(N,)`):
            Reward margins of the labels as they are now, NaN counting as 0.
        how (`str`):
            `"gain"`: largest \(g\) first, without the pairs of \(g = 0\). `"uncertainty"`: posterior closest to 0.5
            first. `"margin"`: smallest absolute margin first. `"random"`: at random.
        flipped, kept (`np.ndarray` of shape `(N,)` and dtype `bool`):
            State of each pair now.
        accuracy (`float`, *optional*, defaults to `0.8`):
            \(a\), above 0.5 and at most 1.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the random order.

    Returns:
        `np.ndarray` of shape `(M,)` and dtype `int64`: indices of pairs, the first to ask about first; all N, but for
        `"gain"`. Of equals, the pair of the smaller absolute margin comes first (for `"gain"` of the lower margin,
        whose label is rather wrong even where no posterior tells), then the earlier one.

    Raises:
        `ValueError`: if `how` is unknown, or a number is out of range.
    """
    check_value("`how`", how, how in ORDERS, f"give one of {', '.join(ORDERS)}")
    check_value("`accuracy`", accuracy, 0.5 < accuracy <= 1, "give a share above 0.5, and at most 1")
    wrong, margins = fill_unknown(posterior), np.nan_to_num(np.asarray(margins, dtype=np.float64))
    if how == "random":
        return np.random.default_rng(seed).permutation(len(wrong))
    if how == "margin":
        return np.lexsort([np.abs(margins)])
    if how == "uncertainty":
        return np.lexsort([np.abs(margins), np.abs(wrong - 0.5).round(_DIGITS)])
    gain = expected_gain(wrong, flipped, kept, accuracy)
    order = np.lexsort([margins, -gain])
    return order[gain[order] > 0]


def expected_gain(
    posterior: npt.ArrayLike, flipped: npt.ArrayLike, kept: npt.ArrayLike, accuracy: float
) -> np.ndarray:
    """Return the gain of [`judge_order`] of each pair, `(N,)`, below 0 where no verdict changes the label."""
    wrong = fill_unknown(posterior)
    # Rounded, so that 0.1 and 1 - 0.9 are equals.
    return (np.where(kept, np.where(flipped, 1 - wrong, wrong), 0.5) + accuracy - 1).round(_DIGITS)


def fill_unknown(posterior: npt.ArrayLike) -> np.ndarray:
    """Return probabilities, `(N,)`, with the mean of the known for NaN, and 0.5 if none is known."""
    wrong = np.array(posterior, dtype=np.float64)
    is_known = ~np.isnan(wrong)
    known = wrong[is_known]
    outside = known[(known < 0) | (known > 1)]
    check_value(
        "A value of `posterior`", next(iter(outside), None), not len(outside), "give probabilities from 0 to 1"
    )
    wrong[~is_known] = known.mean() if len(known) else 0.5
    return wrong


def estimate_accuracy(by_votes: Decision, posterior: npt.ArrayLike) -> float:
    r"""
    Estimate how often clear verdicts are right, by how they agree with what was known before.

    A label that is wrong with probability \(p\) is called wrong with probability \(p a + (1 - p)(1 - a)\). The
    estimate is the \(a\) that makes all verdicts most likely, and 50 more, of which 40 are right. Where all \(p\) are
    one half, nothing is learned.

    Args:
        by_votes ([`Decision`]):
            Decision by the votes alone about N pairs, from [`relabel_by_vote`].
        posterior (`np.ndarray` of shape `(N,)`):
            As in [`judge_order`], in the orientation of the votes.

    Returns:
        `float`: from 0.5 to 0.999.
    """
    wrong, is_clear = fill_unknown(posterior), by_votes.keep
    believed = np.where(by_votes.flip, wrong, 1 - wrong)[is_clear]  # that the verdict is right
    accuracy = np.linspace(0.5, 0.999, 500)
    fits = _PRIOR_VERDICTS * (ACCURACY * np.log(accuracy) + (1 - ACCURACY) * np.log(1 - accuracy))
    # Of many equal or about equal beliefs one is computed.
    values, counts = np.unique(believed.round(3), return_counts=True)
    fits += np.log(np.outer(accuracy, values) + np.outer(1 - accuracy, 1 - values)) @ counts
    return float(accuracy[fits.argmax()])


def weigh_votes(
    by_votes: Decision,
    posterior: npt.ArrayLike,
    *,
    flipped: np.ndarray,
    kept: np.ndarray,
    strength: np.ndarray,
    accuracy: float = ACCURACY,
) -> Decision:
    """
    Combine votes with what was known before them, by Bayes.

    Args:
        by_votes ([`Decision`]):
            Decision by the votes alone about N pairs, from [`relabel_by_vote`].
        posterior, flipped, kept, accuracy:
            As in [`judge_order`], seen from the orientation of the votes.
        strength (`np.ndarray` of shape `(N,)`):
            Reward margins now.

    Returns:
        [`Decision`]: with the `posterior` after the votes. A dropped pair is decided about by the votes alone. A kept
        pair stays, and is turned if the votes are against its label and it is then more likely wrong than right.
    """
    wrong = np.clip(fill_unknown(posterior), 1e-9, 1 - 1e-9)
    is_clear, says_wrong = by_votes.keep, by_votes.flip
    # Probability of the votes if the label is wrong; without a clear verdict, they tell nothing.
    likelihood = np.where(is_clear, np.where(says_wrong, accuracy, 1 - accuracy), 0.5)
    after = wrong * likelihood / (wrong * likelihood + (1 - wrong) * (1 - likelihood))
    # It stays unknown where it was, and no verdict is clear.
    known = np.where(np.isnan(np.asarray(posterior, dtype=np.float64)) & ~is_clear, np.nan, after)
    is_against = kept & is_clear & (says_wrong != flipped)
    turned = is_against & (np.where(flipped, 1 - after, after) > 0.5)
    names = (*by_votes.reason_names, "judges do not outweigh the model")
    return Decision(
        np.where(kept, flipped ^ turned, by_votes.flip),
        kept | by_votes.keep,
        np.where(kept & ~turned, strength, by_votes.strength),
        np.where(is_against & ~turned, len(names) - 1, by_votes.reason_code).astype(np.int16),
        names,
        known,
    )


def judge_curve(
    decision: Decision,
    rows: np.ndarray,
    calls: np.ndarray,
    *,
    flipped: np.ndarray,
    kept: np.ndarray,
    wrong: np.ndarray | None = None,
) -> dict[str, list[Any]]:
    """
    Trace what calls to judges did.

    Args:
        decision ([`Decision`]):
            Decision about M of N pairs, in the order in which they were asked about.
        rows, calls (`np.ndarray` of shape `(M,)`):
            Index of each of the M pairs among the N, and the calls that it took.
        flipped, kept, wrong (`np.ndarray` of shape `(N,)` and dtype `bool`):
            State of all pairs before, and whether the labels as of `flipped = False` are wrong, if that is known.

    Returns:
        `dict`: after up to 51 numbers of `calls`, from 0, the number of labels `changed` (pairs that came back
        included), and with `wrong` the share of wrong labels among the kept pairs as `noise`.
    """
    was_kept, keep = kept[rows], decision.keep
    is_changed = keep & (~was_kept | (decision.flip != flipped[rows]))
    steps = {"calls": calls, "changed": is_changed, "kept": keep.astype(int) - was_kept}
    start = {"calls": 0, "changed": 0, "kept": int(kept.sum())}
    if wrong is not None:
        before, after = (wrong ^ flipped) & kept, (wrong[rows] ^ decision.flip) & keep
        steps["noise"], start["noise"] = after.astype(int) - before[rows], int(before.sum())
    shown = np.unique(np.linspace(0, len(rows), _CURVE_POINTS + 1).round().astype(int))
    curve = {name: start[name] + np.r_[0, np.cumsum(step)][shown] for name, step in steps.items()}
    count = np.maximum(1, curve.pop("kept"))
    if wrong is not None:
        curve["noise"] = np.round(curve["noise"] / count, 6)
    return {name: values.tolist() for name, values in curve.items()}
