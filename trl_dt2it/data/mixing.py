"""Mixtures of several sets: proportions, caps, splits by group, swapped pairs."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets

from ..utils import digest
from .columns import (
    arrow_rows,
    column_of,
    group_codes,
    has_transform,
    is_checked,
    leave_images_encoded,
    mark_checked,
    rows_at_once,
    select_rows,
    uncached,
    unify_types,
)
from .images import ImageOptions, placed_image, with_image_root
from .messages import MESSAGES, PROVENANCE, T2I_IDENTITY, with_image_blocks
from .rows import SIDES, RowError, blocks, named_errors, row_images
from .sources.trl_rows import as_canonical


TEXTS = ("prompt", *SIDES)

# Types of the columns that mean something in canonical rows, but for images.
_KNOWN = {
    **dict.fromkeys(TEXTS, MESSAGES),
    **dict.fromkeys(("strength", "weight", "label_confidence", "margin", "blind_margin"), Value("float64")),
    **dict.fromkeys(PROVENANCE, Value("string")),
    **T2I_IDENTITY,
}


def partner_column(name: str, columns: Collection[str]) -> str | None:
    """Find the column to exchange with this one when a pair is swapped."""
    partner = next((name.replace(*sides) for sides in (SIDES, SIDES[::-1]) if sides[0] in name), None)
    return partner if partner in columns else None


def swap_pairs(dataset: Dataset, swapped: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> Dataset:
    """Swap chosen and rejected where `swapped` `(N,)` is true, without copying a cell, and select `rows`."""
    # The label changes, so that numbers about it stay: as 1 - p, a `label_confidence` would undo the swap in the loss.
    # A `blind_margin` says which answer a model prefers, whatever the label.
    count, names = len(dataset), dataset.column_names
    swapped = np.asarray(swapped, dtype=bool)
    indices = np.arange(count) if rows is None else np.asarray(rows, dtype=np.int64)
    if swapped.shape != (count,):
        raise ValueError(f"`swapped` has shape {swapped.shape} for {count} rows; pass one truth value per row.")
    if swapped.any():
        partners = {name: partner for name in names if (partner := partner_column(name, names))}
        if not partners:
            raise ValueError(f"No pair can be swapped: there is no `chosen` and `rejected` among {', '.join(names)}.")
        for name, partner in partners.items():
            if (here := dataset.features[name]) != (there := dataset.features[partner]):
                message = f"`{name}` and `{partner}` hold different types, {here} and {there}"
                raise ValueError(f"{message}; cast one of them, or rename it so that it stays where it is.")
        mirrored = dataset.rename_columns(partners).select_columns(names)
        if "blind_margin" in names and not pa.types.is_null((blind := column_of(dataset, "blind_margin")).type):
            mirrored = with_columns(mirrored, {"blind_margin": pc.negate(blind)})
        dataset = concatenate_datasets([dataset, mirrored])
        indices = indices + np.where(swapped[indices], count, 0)
    elif rows is None:
        return dataset
    return dataset.select(indices)


def with_columns(dataset: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """Set or replace columns, without writing the images of selected rows anew, unless a row was selected twice."""
    order = list(dict.fromkeys([*dataset.column_names, *columns]))
    features = dataset.features
    base = dataset.remove_columns([name for name in columns if name in features])
    values = {name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()}
    new = Dataset(pa.table(values))
    if len(dataset) == 0:  # `datasets` leaves sets without rows out when it joins columns
        joined = {**features, **new.features}
        return Dataset.from_dict({name: [] for name in order}, Features({name: joined[name] for name in order}))
    # Through its public interface, `datasets` writes selected rows anew, images and all, before it adds a column.
    selected = None if base._indices is None else base._indices.column(0).to_numpy().astype(np.int64)
    if selected is not None and len(np.unique(selected)) < len(selected):
        before = base.features
        base, selected = leave_images_encoded(base).flatten_indices(), None
        base.info.features = before
    if selected is not None:
        positions = np.full(len(base.data), -1)
        positions[selected] = np.arange(len(selected))
        taken = pa.array(positions, mask=positions < 0)
        new = Dataset(pa.table({name: column.take(taken) for name, column in values.items()}))
        base = Dataset(base.data, info=base.info.copy(), split=base.split, fingerprint=f"{base._fingerprint}-all")
    added = concatenate_datasets([base, new], axis=1).select_columns(order)
    return added if selected is None else added.select(selected)


def beside(kept: Dataset, made: Dataset, features: Features) -> Dataset:
    """Put columns made of the rows of a data set beside those kept, as `features`, whose storage is the same."""
    if kept.column_names:
        made = with_columns(kept, {name: made.data.column(name).combine_chunks() for name in made.column_names})
    made = copy.deepcopy(made.select_columns(list(features)))
    made.info.features = features
    return made


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
    Mix preference sets.

    Without `weights`, all rows that the caps leave are taken. With them, sources are drawn from in these proportions,
    without repeating a row: as many rows as the scarcest source allows, or `size`. The rows drawn from a source do not
    depend on the other sources.

    Args:
        datasets (`Mapping[str, Dataset]`):
            Sets by name. Columns that only some of them have are `None` in the others, but `margin` is 0.0. Sets of
            different shape, such as contents as strings in one and as blocks in another, become canonical rows; see
            [`with_canonical_columns`]. Other columns whose types differ become floats or strings.
        weights (`Mapping[str, float]`, *optional*):
            A number above 0 for each set; only their proportions matter.
        max_per_source (`int` or `Mapping[str, int]`, *optional*):
            Most rows of a set, before proportions.
        size, max_per_group, seed (`int`, *optional*):
            Number of rows of the mixture, all by default; most rows of a set with one `group_id`, where they have
            one; and seed of the draw and of the order.

    Returns:
        `Dataset`: the rows in random order.

    Raises:
        `ValueError`: if there is no set, if an argument does not fit, or if a source has too few rows for `size`.
    """
    _check_sets(datasets)
    caps: Mapping[str, int | None] = (
        max_per_source if isinstance(max_per_source, Mapping) else dict.fromkeys(datasets, max_per_source)
    )
    for option, given in (("weights", weights or {}), ("max_per_source", caps)):
        if unknown := set(given) - set(datasets):
            raise ValueError(f"`{option}` names {sorted(unknown)[0]!r}; the sets are {', '.join(datasets)}.")
    for name in datasets:
        if weights is not None and not 0 < weights.get(name, 0) < float("inf"):
            raise ValueError(f"`weights` has {weights.get(name)} for {name!r}; pass a number above 0 for each set.")
    limits = (("size", size), ("max_per_group", max_per_group), *(("max_per_source", cap) for cap in caps.values()))
    for option, number in limits:
        if number is not None and number < 1:
            raise ValueError(f"`{option}` is {number}; it must be at least 1.")
    drawn = {}
    for name, dataset in datasets.items():
        order = _rng(seed, name).permutation(len(dataset))
        if max_per_group is not None:
            groups = pd.Series(_groups(dataset)[0][order])
            order = order[groups.groupby(groups).cumcount().to_numpy() < max_per_group]
        drawn[name] = order[: caps.get(name)]
    available = {name: len(order) for name, order in drawn.items()}
    counts = _shares(available, weights, size)
    parts = {name: select_rows(dataset, np.sort(drawn[name][: counts[name]])) for name, dataset in datasets.items()}
    joined = concatenate(parts)
    return select_rows(joined, _rng(seed, "order").permutation(len(joined)))


def concatenate(datasets: Mapping[str, Dataset]) -> Dataset:
    """Concatenate preference sets, whatever shape their rows have."""
    _check_sets(datasets)
    parts = dict(datasets)
    if len({str(part.features.arrow_schema.remove_metadata()) for part in parts.values()}) > 1:
        for name, part in parts.items():
            try:
                parts[name] = with_canonical_columns(part)
            except RowError as error:
                raise RowError(error.reason, f"{name}, {error}") from error
        parts = unify_types(parts)
    if any("margin" in part.column_names for part in parts.values()):  # where 0.0 is none, and `None` an error
        for name, part in parts.items():
            if "margin" not in part.column_names:
                parts[name] = with_columns(part, {"margin": pa.repeat(0.0, len(part))})
    for keeps_mode in (True, False):  # maybe only that some decode their images, or into another mode
        if _first_conflict(parts) is not None:
            parts = {name: leave_images_encoded(part, keeps_mode=keeps_mode) for name, part in parts.items()}
    if (conflict := _first_conflict(parts)) is not None:
        raise ValueError(f"The column {conflict}; cast it in one of them, or rename it.")
    joined = concatenate_datasets(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
    return mark_checked(joined) if all(map(is_checked, datasets.values())) else joined


def _check_sets(datasets: Mapping[str, Dataset]) -> None:
    if not datasets:
        raise ValueError("There is no set; pass at least one.")
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            message = f"`{name}` is a {type(dataset).__name__}; sets are joined as `Dataset`, so load it without"
            raise ValueError(f"{message} streaming, or mix streams with `datasets.interleave_datasets`.")


def _first_conflict(datasets: Mapping[str, Dataset]) -> str | None:
    """Describe the first column that has two types, if there is one."""
    first: dict[str, tuple[str, Any]] = {}
    for name, dataset in datasets.items():
        for column, feature in dataset.features.items():
            if _is_empty(feature):
                continue
            other, seen = first.setdefault(column, (name, feature))
            if seen != feature:
                return f"`{column}` is {seen} in `{other}` and {feature} in `{name}`"
    return None


def _is_empty(feature: Any) -> bool:
    """Tell a type of nothing but `None`, in lists or not, which fits any other."""
    return _is_empty(feature.feature) if isinstance(feature, List) else feature == Value("null")


def with_canonical_columns(dataset: Dataset, *, image_root: str | os.PathLike | None = None) -> Dataset:
    """
    Cast the columns of preference rows to their canonical types; other columns stay.

    `prompt`, `chosen` and `rejected` become messages with blocks as contents, as in `load_preferences("trl", ...)`:
    images come first where the prompt is of strings, a common beginning of two conversations becomes the prompt, and a
    plain string a message. `image` and paths in `images` become a list of images, numbers floats, and names strings.

    Args:
        dataset, image_root (`Dataset`, `str` or `os.PathLike`):
            Preference rows, and folder of their images, as in [`ImageOptions`]; relative paths become absolute.

    Returns:
        `Dataset`: the same rows in their order.

    Raises:
        [`RowError`]: if a row holds what canonical rows cannot, such as tool calls; the message names the row.

    Example:

    ```python
    >>> from datasets import concatenate_datasets, load_dataset
    >>> from trl_dt2it.data import load_preferences, with_canonical_columns

    >>> mine = load_dataset("json", data_files="pairs.jsonl", split="train")
    >>> pictures = load_preferences("hpdv3", "hpdv3/train.json", image_root="hpdv3")
    >>> both = concatenate_datasets([with_canonical_columns(mine, image_root="photos"), pictures])
    ```
    """
    options = with_image_root(None, image_root)
    if has_transform(dataset):
        return dataset
    was_checked = is_checked(dataset)
    dataset = dataset.with_format(None)
    encoded = leave_images_encoded(dataset)
    features = _canonical_features(encoded.features)
    changed = {name: feature for name, feature in features.items() if _differs(encoded.features.get(name), feature)}
    if options.image_root is not None and "images" in features:
        changed.setdefault("images", dataset.features.get("images"))
    if set(TEXTS) & set(changed):  # a prompt that both answers begin with leaves them
        changed |= {name: features[name] for name in TEXTS if name in features}
    # Unchanged columns keep their images as they are, decoded on access or not.
    final = Features({name: dataset.features.get(name, feature) for name, feature in features.items()} | changed)
    if not changed:
        return dataset
    if len(dataset) == 0:
        return Dataset.from_dict({name: [] for name in final}, features=final)

    def convert(table: pa.Table, indices: list[int]) -> pa.Table:
        rows = []
        for row, index in zip(arrow_rows(table), indices, strict=True):
            with named_errors(row, index):
                rows.append(_converted(row, changed, options, was_checked))
        return pa.Table.from_pylist(rows, schema=Features(changed).arrow_schema)

    made = encoded.with_format("arrow").map(
        convert,
        with_indices=True,
        batched=True,
        batch_size=rows_at_once(encoded),
        remove_columns=encoded.column_names,
        features=Features(changed),
        desc="Making rows canonical",
        **uncached(),
    )
    kept = [name for name in encoded.column_names if name in features and name not in changed]
    return beside(encoded.select_columns(kept), made.with_format(None), final)


def _canonical_features(features: Features) -> dict[str, Any]:
    canonical: dict[str, Any] = {}
    for name, feature in features.items():
        if name in ("image", "images"):
            image = getattr(feature, "feature", feature)
            images = List(Image(mode=image.mode if isinstance(image, Image) else None))
            canonical["images"] = images if name == "image" or _differs(feature, images) else feature
        else:
            canonical[name] = _KNOWN.get(name, feature) if name in TEXTS or isinstance(feature, Value) else feature
    # Both sides may begin with the prompt.
    return {"prompt": MESSAGES, **canonical} if set(SIDES) <= set(features) else canonical


def _differs(feature: Any, wanted: Any) -> bool:
    return feature is None or Features({"": feature}).arrow_schema != Features({"": wanted}).arrow_schema


def _converted(
    row: Mapping[str, Any], features: Mapping[str, Any], options: ImageOptions, is_checked: bool
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, Value) and row.get(name) is not None:
            made[name] = float(row[name]) if feature.dtype == "float64" else str(row[name])
    images = [image and placed_image(image, options) for image in row_images(row)]
    if set(TEXTS) & set(features):
        texts = {name: row.get(name) for name in TEXTS}
        try:
            # Whatever else is wrong with a row is for its checks to find.
            pair = as_canonical({**texts, "images": images, "videos": row.get("videos")}, is_checked)
            texts = {name: pair[name] for name in TEXTS}
        except RowError as error:
            num_leading = {"prompt": len(images)} if _is_of_strings(texts["prompt"]) else {}
            texts = {name: _blocked(messages, num_leading.get(name, 0), error) for name, messages in texts.items()}
        made |= texts
    return {**made, "images": images} if "images" in features else made


def _is_of_strings(prompt: Any) -> bool:
    """Tell a prompt of strings, in which images come first, from one whose blocks say where they go."""
    messages = prompt if isinstance(prompt, (list, tuple)) else []
    has_user = any(message["role"] == "user" for message in messages)
    return has_user and all(isinstance(message["content"], str) for message in messages)


def _blocked(messages: Any, num_images: int, error: RowError) -> list[dict[str, Any]] | None:
    """Turn contents into blocks of type and text, behind images; raise `error` if messages hold anything else."""
    if messages is None:
        return None
    if isinstance(messages, str):
        raise error
    for message in messages:
        fields = [(message, ("role", "content")), *((block, ("type", "text")) for block in blocks(message))]
        if any(value for part, known in fields for key, value in part.items() if key not in known):
            raise error
    return [{key: message[key] for key in ("role", "content")} for message in with_image_blocks(messages, num_images)]


def split_by_group(dataset: Dataset, test_size: float | int, *, seed: int = 42) -> DatasetDict:
    """
    Split a set so that no group is in both parts.

    Groups are taken into the test set in the order of a hash of their names. So nearly all groups of a test set stay
    in a test set of the same share when rows are added.

    Args:
        dataset (`Dataset`):
            Rows with `group_id`; a row without one is a group of its own.
        test_size, seed (`float` or `int`):
            Share or number of rows of the test set, which has up to a group more, and seed of the hash.

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
    parts = {"train": ~in_test, "test": in_test}
    return DatasetDict({split: select_rows(dataset, np.flatnonzero(part)) for split, part in parts.items()})


def _shares(available: dict[str, int], weights: Mapping[str, float] | None, size: int | None) -> dict[str, int]:
    """Compute the number of rows of each source. Fractions go to the largest remainders, so that the sum is `size`."""
    if weights is None:
        if size is None:
            return available
        weights = available
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
            message = f"A mixture of {size} rows takes {count} of {name!r}, which has {available[name]} after caps; "
            raise ValueError(f"{message}lower `size`, its weight, or raise its caps.")
    return counts


def _groups(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """Number the groups of the rows from 0, and name them; a row without a group is a group of its own."""
    has_groups = "group_id" in dataset.column_names
    codes, names = group_codes(column_of(dataset, "group_id") if has_groups else pa.nulls(len(dataset)))
    return codes, [*names, *(f"row {row}" for row in np.flatnonzero(codes >= len(names)))]


def _hash(seed: int, text: str) -> int:
    return int(digest(f"{seed}-{text}", size=8), 16)


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(_hash(seed, name))
