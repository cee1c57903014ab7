"""Preference strength on a common scale: from each source's own unit to [0, 1].

A rating gap of 2 in one source and a confidence of 0.9 in another say little next to each other. Within a source the
order does, so by default a strength becomes its rank among the strengths of its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, IterableDataset


STRENGTH_NORMALIZATIONS = ("rank", "quantile", "none")


@dataclass(frozen=True)
class StrengthNormalizer:
    """
    Maps raw strengths to [0, 1], per source, after what was seen by [`fit_strength`].

    Parameters:
        how (`str`):
            `"rank"`: the share of the source's pairs that are weaker, ties counted half, so that the mean is 0.5.
            `"quantile"`: the strength over the 0.95 quantile of its source, cut at 1. `"none"`: left as it is; it
            must lie in [0, 1].
        neutral (`float`):
            What a pair of unknown strength gets.
        seen (`dict[str, np.ndarray]`):
            Sorted strengths of each source, fp64.
    """

    how: str
    neutral: float = 0.5
    seen: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, strength: Sequence[float | None], source: Sequence[str | None]) -> np.ndarray:
        """
        Args:
            strength (`Sequence[float | None]` of length N):
                Raw strengths, `None` or NaN where unknown.
            source (`Sequence[str | None]` of length N):
                Data set of each pair.

        Returns:
            `np.ndarray` of shape `(N,)` and dtype `float64`, in [0, 1].

        Raises:
            `ValueError`: if `how` is `"none"` and a strength lies outside [0, 1].
        """
        raw = np.array([np.nan if s is None else s for s in strength], dtype=np.float64)
        result = np.full(len(raw), self.neutral)
        known = ~np.isnan(raw)
        if self.how == "none":
            outside = known & ((raw < 0) | (raw > 1))
            if outside.any():
                raise ValueError(
                    f"The strength {raw[outside][0]} lies outside [0, 1]; set `strength_normalization` to "
                    '"rank" or "quantile", or scale the column.'
                )
            result[known] = raw[known]
            return result
        names = np.array([_name(s) for s in source], dtype=object)
        for name in set(names[known].tolist()):
            rows = known & (names == name)
            reference = self.seen.get(name)
            if reference is None or len(reference) == 0:  # a source that training has not seen
                continue
            result[rows] = _rank(raw[rows], reference) if self.how == "rank" else _quantile(raw[rows], reference)
        return result


def fit_strength(
    strength: Sequence[float | None], source: Sequence[str | None] | None, *, how: str, neutral: float = 0.5
) -> StrengthNormalizer:
    """
    Looks at a training set's strengths, per source, and returns the map that puts them on a common scale.

    Args:
        strength (`Sequence[float | None]` of length N):
            Raw strengths, `None` or NaN where unknown.
        source (`Sequence[str | None]` of length N, *optional*):
            Data set of each pair; without it, all pairs are one source.
        how (`str`):
            `"rank"`, `"quantile"` or `"none"`, see [`StrengthNormalizer`].
        neutral (`float`, *optional*, defaults to `0.5`):
            What a pair of unknown strength, or of a source not seen here, gets.

    Returns:
        [`StrengthNormalizer`]
    """
    raw = np.array([np.nan if s is None else s for s in strength], dtype=np.float64)
    names = np.array([_name(s) for s in (source if source is not None else [None] * len(raw))], dtype=object)
    known = ~np.isnan(raw)
    seen = {name: np.sort(raw[known & (names == name)]) for name in sorted(set(names.tolist()))}
    return StrengthNormalizer(how=how, neutral=neutral, seen=seen)


def fit_dataset_strength(dataset: Dataset | IterableDataset, *, how: str, neutral: float = 0.5) -> StrengthNormalizer:
    """
    As [`fit_strength`], for the columns `strength` and `source` of a data set.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training set with a `strength` column.
        how (`str`):
            `"rank"`, `"quantile"` or `"none"`.
        neutral (`float`, *optional*, defaults to `0.5`):
            What a pair of unknown strength gets.

    Returns:
        [`StrengthNormalizer`]

    Raises:
        `ValueError`: if the set is streamed and `how` has to see all of it.
    """
    if not isinstance(dataset, IterableDataset):
        sources = dataset["source"] if "source" in dataset.column_names else None
        return fit_strength(dataset["strength"], sources, how=how, neutral=neutral)
    if how != "none":
        raise ValueError(
            f'`strength_normalization="{how}"` has to see the whole train set, and it is streamed; scale the '
            '`strength` column to [0, 1] and set "none".'
        )
    return StrengthNormalizer(how=how, neutral=neutral)


def _name(source: str | None) -> str:
    return "" if source is None else source


def _rank(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    weaker = np.searchsorted(reference, values, side="left")
    not_stronger = np.searchsorted(reference, values, side="right")
    return (weaker + not_stronger) / (2 * len(reference))


def _quantile(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    scale = np.quantile(reference, 0.95)
    return np.clip(values / scale, 0, 1) if scale > 0 else np.ones_like(values)
