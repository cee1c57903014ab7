"""Benchmarks of preference pairs: origin of the rows, their categories, and the ratios to count."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...data.sources.fields import Source
from ...utils import digest


class Ratio(NamedTuple):
    """A metric as a ratio of two sums over units, which a bootstrap draws as wholes. Shapes: `(U,)`."""

    hits: np.ndarray
    total: np.ndarray
    over: str = "pairs"


# From right pairs `(n,)` bool, the category of each row `(n,)` str and its unit `(n,)` int64, the ratios by name.
Counting = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, Ratio]]


def pair_ratio(correct: np.ndarray, unit: np.ndarray, where: np.ndarray | None = None) -> Ratio:
    """The share of right pairs. Shapes: `correct` `(n,)`, `unit` `(n,)`, `where` `(n,)`."""
    counts = np.ones(len(unit), dtype=bool) if where is None else where
    num_units = int(unit.max(initial=-1)) + 1
    hits = np.bincount(unit, weights=correct & counts, minlength=num_units)
    return Ratio(hits, np.bincount(unit, weights=counts, minlength=num_units))


def unit_ratio(pairs: Ratio) -> Ratio:
    """The share of units of which every pair is right, of those that have any."""
    exists = pairs.total > 0
    all_right = exists & (pairs.hits == pairs.total)
    return Ratio(all_right.astype(float), exists.astype(float), over="prompts")


def by_category(
    correct: np.ndarray, category: np.ndarray, unit: np.ndarray, names: Iterable[str] | None = None
) -> dict[str, Ratio]:
    """The share of right pairs, `overall` and of each category: of `names`, or of all in sorted order."""
    names = sorted(set(category.tolist()) - {""}) if names is None else names
    by_name = {name: pair_ratio(correct, unit, category == name) for name in names}
    return {"overall": pair_ratio(correct, unit), **by_name}


def pair_identity(name: Any, *parts: Any) -> str:
    """An id of a pair that no other pair has, whatever the names of the rows and their order."""
    short = digest(json.dumps(parts, ensure_ascii=False, default=str))[:12]
    return short if name is None or name == "" else f"{name}-{short}"


def path_field(row: Mapping[str, Any], *columns: str) -> str:
    """The path of an image or video in the first of some columns that has any; `""` if none."""
    values = (row.get(column) for column in columns)
    paths = (value.get("path") if isinstance(value, Mapping) else value for value in values)
    return next((path for path in paths if isinstance(path, str) and path), "")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of preference pairs."""

    name: str  # for users
    title: str  # of its authors
    source: Source  # its origin, license and adapter, whose rows have a unique `pair_id` and their `category`
    # Of a row, raw or canonical; by default the one that it brings, such as the order of its images.
    category_of: Callable[[Mapping[str, Any]], str] = lambda row: str(row.get("category") or "")
    # Shared by all rows about the same prompt; `None` if the row does not tell.
    unit_of: Callable[[Mapping[str, Any]], Any] = lambda row: row.get("group_id")
    count: Counting = by_category  # its metrics as ratios, the headline first
    averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # metrics that are the mean of others
    headline: str = "overall"  # the ratio over all pairs
    sizes: Mapping[int, str] = field(default_factory=dict)  # releases by their number of rows, the current first
    key_columns: tuple[str, ...] = ("category",)  # columns of a raw row that `category_of` and `unit_of` read
    optional_category: tuple[str, str] | None = None  # a category that may be missing, and the label of the rest
    whole_repository: bool = False  # images lie beside the rows in the repository on the Hub
    both_orders: bool = False  # ask about text-to-image pairs in both orders by default
