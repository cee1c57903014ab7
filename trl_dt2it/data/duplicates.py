"""Which rows say the same twice, and which contradict each other: told by short hashes, without holding the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..utils import digest
from .errors import RowError
from .identity import canonical_text, image_identity, t2i_identity
from .rows import SIDES, row_images, row_videos


class PairDigest(NamedTuple):
    """
    A pair in a few bytes.

    Parameters:
        key (`bytes`):
            What it is about, without its label.
        is_swapped (`bool`):
            The label: whether the answer that sorts second is preferred.
        is_mirror (`bool`):
            Whether it asks about a text-to-image pair in the second of both orders. It is then no duplicate of the row
            in the first order, but contradicts it as any row does.
    """

    key: bytes
    is_swapped: bool
    is_mirror: bool = False


class Doubles(NamedTuple):
    """
    Rows that may not stay because of another row.

    Parameters:
        rows (`np.ndarray` of shape `(D,)` and type int64):
            Their places, ascending.
        others (`np.ndarray` of shape `(D,)` and type int64):
            For each the place of the other row: the first equal one, or the first that prefers the other answer.
        is_contradiction (`np.ndarray` of shape `(D,)` and type bool):
            Whether it prefers the other answer.
    """

    rows: np.ndarray
    others: np.ndarray
    is_contradiction: np.ndarray


def pair_digest(row: Mapping[str, Any]) -> PairDigest:
    """
    A hash of what a pair is about, the same whichever answer is preferred.

    It covers what [`content_id`] covers: of a text-to-image pair the caption and both images, and otherwise all that
    the model reads. A row with an explicit prompt and one with whole conversations, which a chat template renders
    alike, are the same pair. Images are the same if their bytes are, or their paths.

    Args:
        row (`Mapping[str, Any]`):
            A row that [`check_row`] accepts.

    Returns:
        [`PairDigest`]: with a key of 16 bytes.

    Raises:
        [`RowError`]: if an image has a type without identity, or does not decode.
    """
    if (pair := t2i_identity(row)) is not None:
        images = [json.dumps(image) for image in (pair.chosen, pair.rejected)]
        return PairDigest(_hash("t2i", pair.caption, *sorted(images)), images[0] > images[1], pair.order == "ba")
    context = {
        "images": [image_identity(image) for image in row_images(row)],
        "videos": [[video.fps, *map(image_identity, video.frames)] for video in row_videos(row)],
        "tools": row.get("tools"),
        "chat_template_kwargs": row.get("chat_template_kwargs"),
    }
    prompt = row.get("prompt")
    if isinstance(row["chosen"], str):
        chosen, rejected = ((prompt or "") + row[side] for side in SIDES)
    else:
        # Both are JSON lists, so that the prompt is written once and not once for each answer.
        start = canonical_text(prompt)[:-1] + "," if prompt else "["
        chosen, rejected = (start + canonical_text(row[side])[1:] for side in SIDES)
    is_swapped = chosen > rejected
    parts = [canonical_text([context]), *((rejected, chosen) if is_swapped else (chosen, rejected))]
    return PairDigest(_hash(*parts), is_swapped)


def _hash(*parts: str) -> bytes:
    return bytes.fromhex(digest("\0".join(parts), size=16))


def find_doubles(
    high: np.ndarray,
    low: np.ndarray,
    is_swapped: np.ndarray,
    is_bad: np.ndarray,
    is_mirror: np.ndarray | None = None,
) -> Doubles:
    """Find rows that repeat an earlier one, and all rows of which another one prefers the other answer. Of equal rows
    the first may stay. Of a contradiction none may, because nothing tells which is right. Keys come in two halves;
    rows that are bad take no part, and those of `is_mirror` are no duplicates of others. Sorting takes about 20 bytes
    a row."""
    # One half of the keys leaves hardly any row that has no double, and half as much to sort.
    order = np.argsort(high, kind="stable")
    ordered = high[order]
    members = order[_has_equal(ordered[1:] == ordered[:-1])] if len(order) else order
    members = members[~is_bad[members]]
    if len(members):
        # Stable: equal keys stay in the order of their rows.
        keys = (
            (low[members], high[members]) if is_mirror is None else (is_mirror[members], low[members], high[members])
        )
        members = members[np.lexsort(keys)]
        same = (high[members[1:]] == high[members[:-1]]) & (low[members[1:]] == low[members[:-1]])
        has_equal, is_first = _has_equal(same), np.r_[True, ~same]
        members, is_first = members[has_equal], is_first[has_equal]
    if len(members) == 0:
        return Doubles(members, members, np.zeros(0, dtype=bool))

    swapped = is_swapped[members]
    group, starts, nowhere = np.cumsum(is_first) - 1, np.flatnonzero(is_first), len(high)
    firsts = [np.minimum.reduceat(np.where(swapped == label, members, nowhere), starts)[group] for label in (0, 1)]
    is_contradiction = (firsts[0] < nowhere) & (firsts[1] < nowhere)
    if is_mirror is not None:
        is_first[1:] |= is_mirror[members[1:]] != is_mirror[members[:-1]]
    others = np.where(is_contradiction & ~swapped, firsts[1], firsts[0])
    others = np.where(is_contradiction, others, members[is_first][np.cumsum(is_first) - 1])
    found = np.flatnonzero(is_contradiction | (members != others))
    found = found[np.argsort(members[found])]
    return Doubles(members[found], others[found], is_contradiction[found])


def _has_equal(same: np.ndarray) -> np.ndarray:
    """Which of some sorted rows have an equal neighbour, out of whether each equals the next one."""
    return np.r_[False, same] | np.r_[same, False]


def duplicate_error(other: str) -> RowError:
    """What is wrong with a row that repeats the row of that name."""
    return RowError("duplicate_pair", f"it is the same pair as {other}; keep one of them.")


def contradiction_error(other: str) -> RowError:
    """What is wrong with a row that contradicts the row of that name."""
    return RowError("contradictory_pair", f"{other} prefers the other answer; keep the one that is right.")
