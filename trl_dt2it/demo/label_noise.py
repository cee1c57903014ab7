"""Wrong labels, planted in the demo's pairs the way that annotators make them.

Every kind has the mean rate `noise`, exactly in expectation over the rows at hand; `annotator` only where their number
is a multiple of `ANNOTATORS`, and otherwise nearly:

| kind | annotators |
|---|---|
| `uniform` | err in every pair alike |
| `hard` | err the more, the smaller the difference that they see (Bradley-Terry): by 0.5 where there is none |
| `length` | sometimes prefer the longer answer: they err only where the worse answer is longer |
| `reversed` | are right but for one, who is always wrong: a share `noise` of the pairs, which is a source of its own |
| `near_duplicates` | label a pair once, and it is there `COPIES` times with other words and a slightly darker image |
| `annotator` | are `ANNOTATORS` sources that err differently: by 1/4, 3/4, 5/4 and 7/4 of `noise` |
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit


NOISE_KINDS = ("uniform", "hard", "length", "reversed", "near_duplicates", "annotator")
COPIES = 4
ANNOTATORS = 4

_LEAST_DIFFERENCE = 0.05  # of looks, in wrong digits; with it, no pair is beyond a coin flip


def check_noise(noise: float, kind: str, kinds: Sequence[str] = NOISE_KINDS) -> None:
    """Refuse a rate or a kind that cannot be planted, whatever the rows."""
    if kind not in kinds:
        raise ValueError(f"`noise_kind` must be one of {', '.join(kinds)}, got {kind!r}.")
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"`noise` must be between 0 and 1, got {noise}.")
    if kind == "hard" and noise >= 0.5:
        raise ValueError(
            f"`noise` must be below 0.5 with `noise_kind` 'hard', which is no worse than chance, got {noise}."
        )


def flip_chances(
    noise: float, kind: str, differences: Sequence[float], extra_lengths: Sequence[int] | None = None
) -> np.ndarray:
    """Return the chance of a wrong label of each pair, `(N,)`, from how different the answers look and by how many
    characters the worse answer is longer."""
    count = len(differences)
    if kind == "hard" and noise > 0:
        seen = np.maximum(differences, _LEAST_DIFFERENCE)
        slope = brentq(lambda slope: expit(-slope * seen).mean() - noise, 0.0, 1000.0 / _LEAST_DIFFERENCE)
        return expit(-slope * seen)
    if kind == "length" and extra_lengths is not None:
        is_longer = np.asarray(extra_lengths) > 0
        _check_reach(noise, kind, float(is_longer.mean()))
        return is_longer * noise * count / max(1, int(is_longer.sum()))
    if kind == "annotator":
        _check_reach(noise, kind, ANNOTATORS / (2 * ANNOTATORS - 1))
        return noise * (2 * (np.arange(count) % ANNOTATORS) + 1) / ANNOTATORS
    return np.full(count, noise)


def _check_reach(noise: float, kind: str, most: float) -> None:
    if noise > most:
        raise ValueError(f"`noise` must be at most {most:.3f} with `noise_kind` {kind!r} of these pairs, got {noise}.")


def plant_noise(rows: Sequence[dict[str, Any]], noise: float, kind: str, coin: random.Random) -> None:
    """Set `is_flipped` of rows with `difference` and `extra_length`, and the `source` where a kind divides it."""
    lengths = [row["extra_length"] for row in rows] if kind == "length" else None
    chances = flip_chances(noise, kind, [row["difference"] for row in rows], lengths)
    is_flipped = False
    for index, (row, chance) in enumerate(zip(rows, chances.tolist(), strict=True)):
        if kind != "near_duplicates" or index % COPIES == 0:
            is_flipped = coin.random() < chance
        row["is_flipped"] = is_flipped
        if kind == "annotator":
            row["source"] += f"-{index % ANNOTATORS}"
        elif kind == "reversed" and is_flipped:
            row["source"] += "-reversed"
