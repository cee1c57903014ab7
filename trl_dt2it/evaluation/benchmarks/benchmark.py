"""What a benchmark of preference pairs is: where its rows are, how they fall into categories, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...data.sources.fields import Source
from ...utils import digest


class Ratio(NamedTuple):
    """A metric as a ratio of two sums over units, which are drawn as wholes when it is bootstrapped.

    Shapes: `hits` `(U,)`, `total` `(U,)`.
    """

    hits: np.ndarray
    total: np.ndarray
    over: str = "pairs"


# From what is right `(n,)` bool, the category of each row `(n,)` str and its unit `(n,)` int64, the ratios by name.
Counting = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, Ratio]]


def pair_ratio(correct: np.ndarray, unit: np.ndarray, where: np.ndarray | None = None) -> Ratio:
    """The share of pairs that are right.

    Shapes: `correct` `(n,)`, `unit` `(n,)`, `where` `(n,)`.
    """
    counts = np.ones(len(unit), dtype=bool) if where is None else where
    num_units = int(unit.max(initial=-1)) + 1
    hits = np.bincount(unit, weights=correct & counts, minlength=num_units)
    return Ratio(hits, np.bincount(unit, weights=counts, minlength=num_units))


def unit_ratio(pairs: Ratio) -> Ratio:
    """The share of units of which every pair is right, of those that have any."""
    exists = pairs.total > 0
    all_right = exists & (pairs.hits == pairs.total)
    return Ratio(all_right.astype(float), exists.astype(float), over="prompts")


def by_category(correct: np.ndarray, category: np.ndarray, unit: np.ndarray) -> dict[str, Ratio]:
    """The share of pairs that are right, as `overall` and for each category by its name, these sorted."""
    names = sorted(set(category.tolist()) - {""})
    return {
        "overall": pair_ratio(correct, unit),
        **{name: pair_ratio(correct, unit, category == name) for name in names},
    }


def pair_identity(name: Any, *parts: Any) -> str:
    """An id of a pair that no other pair has, whatever the rows are called, and whatever order they come in."""
    short = digest(json.dumps(parts, ensure_ascii=False, default=str))[:12]
    return short if name is None or name == "" else f"{name}-{short}"


def by_group_id(row: Mapping[str, Any]) -> Any:
    """The unit of a canonical row."""
    return row.get("group_id")


def own_category(row: Mapping[str, Any]) -> str:
    """The category that a row itself brings, such as the order of its images; `""` if none."""
    return str(row.get("category") or "")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of preference pairs."""

    name: str  # What users call it
    title: str  # What its authors call it
    # Where it is, under which licence, and its adapter, which gives rows with a `pair_id` of their own and their
    # `category`
    source: Source
    # The category of a row, raw or canonical; by default its column `category`
    category_of: Callable[[Mapping[str, Any]], str] = own_category
    # What a row has in common with the other rows about the same prompt; `None` if the row does not tell. By default
    # its `group_id`
    unit_of: Callable[[Mapping[str, Any]], Any] = by_group_id
    # The ratios that are its metrics; by default the share of right pairs, overall and by category
    count: Counting = by_category
    averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # Metrics that are the mean of others
    headline: str = "overall"  # The ratio over all pairs
    # Known numbers of rows, and which release has them, the current first
    sizes: Mapping[int, str] = field(default_factory=dict)
    key_columns: tuple[str, ...] = ("category",)  # Columns of a raw row that `category_of` and `unit_of` read
    # A category that may be left out as a whole, and what the rest is called then
    optional_category: tuple[str, str] | None = None
    whole_repository: bool = False  # Whether images lie beside the rows in the repository on the Hub
    # Whether text-to-image pairs are asked about in both orders, unless the user says otherwise
    both_orders: bool = False
