"""Several sources as one training set: weighted, with caps, and split without parting a group.

Sets are put together by indices: no row is copied, whatever its images weigh, and the same arguments give the same
rows in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from .encoded import column_of, unify_types


def mix(
    datasets: Mapping[str, Dataset],
    *,
    weights: Mapping[str, float] | None = None,
    size: int | None = None,
    max_per_source: int | Mapping[str, int] | None = None,
    max_per_group: int | None = None,
    seed: int = 42,
) -> Dataset:
    """
    Mixes preference sets.

    Without `weights`, all rows that the caps leave are taken. With them, sources are drawn from in these proportions,
    without repeating a row: as many rows as the scarcest source allows, or `size`. Which rows of a source are drawn
    does not depend on the other sources.

    Args:
        datasets (`Mapping[str, Dataset]`):
            The sets by name. Columns that only some of them have are `None` in the others; those that have different
            types become floats or strings.
        weights (`Mapping[str, float]`, *optional*):
            A number above 0 for each set; only their proportions matter.
        size (`int`, *optional*):
            Number of rows of the mixture; all that there are by default.
        max_per_source (`int` or `Mapping[str, int]`, *optional*):
            Most rows of a set, before proportions.
        max_per_group (`int`, *optional*):
            Most rows of a set with one `group_id`. Rows without one are not limited.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw and of the order.

    Returns:
        `Dataset`: the rows in random order.

    Raises:
        `ValueError`: if there are no sets, if names do not fit, if a number is out of range, or if a source has fewer
            rows than its share of `size`.
    """
    _check_arguments(datasets, weights, size, max_per_source, max_per_group)
    drawn = {}
    for name, dataset in datasets.items():
        most = max_per_source.get(name) if isinstance(max_per_source, Mapping) else max_per_source
        order = _rng(seed, name).permutation(len(dataset))
        if max_per_group is not None:
            order = order[_place_in_group(_groups(dataset)[0][order]) < max_per_group]
        drawn[name] = order[:most]
    available = {name: len(order) for name, order in drawn.items()}
    counts = _shares(available, weights, size)
    parts = [dataset.select(np.sort(drawn[name][: counts[name]])) for name, dataset in unify_types(datasets).items()]
    joined = concatenate_datasets(parts)
    return joined.select(_rng(seed, "order").permutation(len(joined)))


def split_by_group(dataset: Dataset, test_size: float | int, *, seed: int = 42) -> DatasetDict:
    """
    Splits a set so that no group is in both parts.

    Groups are taken into the test set in the order of a hash of their names. So a group that was in the test set stays
    in a test set of the same share when rows are added, but for those at the edge.

    Args:
        dataset (`Dataset`):
            Rows with `group_id`; a row without one is a group of its own.
        test_size (`float` or `int`):
            Share of the rows between 0 and 1, or number of rows, of the test set. It has this size or, because groups
            stay together, up to a group more.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the hash.

    Returns:
        `DatasetDict`: `train` and `test`, rows in their order.

    Raises:
        `ValueError`: if the size is out of range, or if one part would be empty.
    """
    wanted = round(test_size * len(dataset)) if isinstance(test_size, float) else test_size
    if not 0 < wanted < len(dataset):
        raise ValueError(f"`test_size` is {test_size}; it must leave rows for both parts of {len(dataset)} rows.")
    codes, names = _groups(dataset)
    order = np.argsort(np.array([_hash(seed, name) for name in names], dtype=np.uint64), kind="stable")
    sizes = np.bincount(codes)[order]
    num_groups = int(np.searchsorted(np.cumsum(sizes), wanted)) + 1
    in_test = np.isin(codes, order[:num_groups])
    if in_test.all():
        raise ValueError(f"No group is left to train on: the {len(sizes)} groups are too few for {wanted} test rows.")
    return DatasetDict(train=dataset.select(np.flatnonzero(~in_test)), test=dataset.select(np.flatnonzero(in_test)))


def _check_arguments(
    datasets: Mapping[str, Dataset],
    weights: Mapping[str, float] | None,
    size: int | None,
    max_per_source: int | Mapping[str, int] | None,
    max_per_group: int | None,
) -> None:
    if not datasets:
        raise ValueError("`mix` needs at least one set.")
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"`{name}` is a {type(dataset).__name__}; `mix` counts rows, so load it without streaming, or mix "
                "streams with `datasets.interleave_datasets`."
            )
    for option, given in (("weights", weights), ("max_per_source", max_per_source)):
        if isinstance(given, Mapping) and (unknown := set(given) - set(datasets)):
            raise ValueError(f"`{option}` names {sorted(unknown)[0]!r}; the sets are {', '.join(datasets)}.")
    if weights is not None:
        for name in datasets:
            if not weights.get(name, 0) > 0 or weights[name] == float("inf"):
                raise ValueError(f"`weights` has {weights.get(name)} for {name!r}; give a number above 0 to each set.")
    caps = max_per_source.values() if isinstance(max_per_source, Mapping) else [max_per_source]
    for option, number in (("size", size), ("max_per_group", max_per_group), *(("max_per_source", c) for c in caps)):
        if number is not None and number < 1:
            raise ValueError(f"`{option}` is {number}; it must be at least 1.")


def _shares(available: dict[str, int], weights: Mapping[str, float] | None, size: int | None) -> dict[str, int]:
    """Rows of each source. Fractions go to the largest remainders, so that the numbers add up to `size`."""
    if weights is None:
        weights = available if size is not None else None
    if weights is None:
        return available
    total = sum(weights[name] for name in available)
    if total == 0:
        raise ValueError("No row is left to mix.")
    if size is None:
        size = int(min(available[name] * total / weights[name] for name in available) + 1e-9)
    exact = {name: size * weights[name] / total for name in available}
    counts = {name: int(share + 1e-9) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: size - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if count > available[name]:
            raise ValueError(
                f"A mixture of {size} rows takes {count} of {name!r}, which has {available[name]} after caps; lower "
                "`size`, its weight, or raise its caps."
            )
    return counts


def _place_in_group(codes: np.ndarray) -> np.ndarray:
    """For each row, how many rows before it have the same code."""
    order = np.argsort(codes, kind="stable")
    sorted_codes = codes[order]
    starts = np.flatnonzero(np.r_[True, sorted_codes[1:] != sorted_codes[:-1]])
    sizes = np.diff(np.r_[starts, len(codes)])
    places = np.empty(len(codes), dtype=np.int64)
    places[order] = np.arange(len(codes)) - np.repeat(starts, sizes)
    return places


def _groups(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """A code for each row's group, from 0, and what the groups are called; rows without one have one of their own."""
    count = len(dataset)
    if "group_id" not in dataset.column_names:
        return np.arange(count), [f"row {row}" for row in range(count)]
    encoded = column_of(dataset, "group_id").dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone = np.flatnonzero(codes < 0)
    codes[alone] = len(encoded.dictionary) + np.arange(len(alone))
    return codes, [*encoded.dictionary.to_pylist(), *(f"row {row}" for row in alone)]


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}-{text}".encode(), digest_size=8).digest(), "big")


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(_hash(seed, name))
