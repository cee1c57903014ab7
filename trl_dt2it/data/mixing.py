"""Several sets mixed into one: proportions, caps, splits by group, sides swapped."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from datasets.fingerprint import generate_random_fingerprint

from ..utils import digest
from .columns import (
    arrow_rows,
    column_of,
    find_json_columns,
    group_codes,
    group_rows,
    has_transform,
    is_checked,
    leave_images_encoded,
    mark_checked,
    rows_at_once,
    select_rows,
    unify_types,
)
from .images import ImageOptions, placed_image, with_image_root
from .messages import MESSAGES, T2I_IDENTITY, as_image, with_image_blocks
from .rows import SIDES, RowError, blocks, row_images, row_name
from .sources.trl_rows import as_canonical


def partner_column(name: str, columns: Collection[str]) -> str | None:
    """The column that changes places with this one when a pair is swapped."""
    for here, there in (("chosen", "rejected"), ("rejected", "chosen")):
        if here in name:
            partner = name.replace(here, there)
            return partner if partner in columns else None
    return None


def swap_pairs(dataset: Dataset, swapped: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> Dataset:
    """Swaps chosen and rejected of some pairs. No cell is copied, decoded or written: the rows of the result point to
    the same data, under exchanged names where they are swapped.

    Shapes: `swapped` `(N,)` `bool`, `rows` `(R,)`.
    """
    count, names = len(dataset), dataset.column_names
    swapped = np.asarray(swapped, dtype=bool)
    places = np.arange(count) if rows is None else np.asarray(rows, dtype=np.int64)
    if swapped.shape != (count,):
        raise ValueError(f"`swapped` has shape {swapped.shape} for {count} rows; give one truth value per row.")
    if swapped.any():
        partners = {name: partner for name in names if (partner := partner_column(name, names))}
        if not partners:
            raise ValueError(f"No pair can be swapped: there is no `chosen` and `rejected` among {', '.join(names)}.")
        for name, partner in partners.items():
            if dataset.features[name] != dataset.features[partner]:
                raise ValueError(
                    f"`{name}` and `{partner}` hold different types, {dataset.features[name]} and "
                    f"{dataset.features[partner]}; cast one of them, or rename it so that it stays where it is."
                )
        mirrored = dataset.rename_columns(partners).select_columns(names)
        dataset = concatenate_datasets([dataset, mirrored])
        places = places + np.where(swapped[places], count, 0)
    elif rows is None:
        return dataset
    return dataset.select(places)


def with_columns(dataset: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """A data set with columns set or replaced. Rows that were selected one by one stay where they are: their images
    are not written anew, unless a row was selected twice.
    """
    order = list(dict.fromkeys([*dataset.column_names, *columns]))
    features = dataset.features
    base = dataset.remove_columns([name for name in columns if name in features])
    values = {name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()}
    new = Dataset(pa.table(values))
    if len(dataset) == 0:  # `datasets` leaves sets without rows out when it joins columns
        joined = {**features, **new.features}
        return Dataset.from_dict({name: [] for name in order}, Features({name: joined[name] for name in order}))
    # Through its public interface, `datasets` writes selected rows anew, images and all, before it adds a column.
    places = None if base._indices is None else base._indices.column(0).to_numpy().astype(np.int64)
    if places is not None and len(np.unique(places)) < len(places):
        features_before = base.features
        base, places = leave_images_encoded(base).flatten_indices(), None
        base.info.features = features_before
    if places is not None:
        nowhere = np.full(len(base.data), -1)
        nowhere[places] = np.arange(len(places))
        taken = pa.array(nowhere, mask=nowhere < 0)
        new = Dataset(pa.table({name: column.take(taken) for name, column in values.items()}))
        base = Dataset(base.data, info=base.info.copy(), split=base.split, fingerprint=f"{base._fingerprint}-all")
    added = concatenate_datasets([base, new], axis=1).select_columns(order)
    return added if places is None else added.select(places)


_TEXTS = ("prompt", *SIDES)

_KNOWN = {
    **dict.fromkeys(_TEXTS, MESSAGES),
    **dict.fromkeys(("strength", "weight", "margin"), Value("float64")),
    **dict.fromkeys(("pair_id", "group_id", "source", "source_id"), Value("string")),
    **T2I_IDENTITY,
}


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
            The sets by name. Columns that only some of them have are `None` in the others, but `margin` is 0.0. Sets
            of different shape, such as contents as strings in one and as blocks in another, become canonical rows; see
            [`with_canonical_columns`]. Other columns whose types differ become floats or strings.
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
    parts = {name: select_rows(dataset, np.sort(drawn[name][: counts[name]])) for name, dataset in datasets.items()}
    joined = concatenate(parts)
    return select_rows(joined, _rng(seed, "order").permutation(len(joined)))


def concatenate(datasets: Mapping[str, Dataset]) -> Dataset:
    """Put preference sets one behind the other, whatever shape their rows have."""
    parts = dict(datasets)
    if not parts:
        raise ValueError("There is no set; pass at least one.")
    for name, part in parts.items():
        if not isinstance(part, Dataset):
            raise ValueError(f"`{name}` is a {type(part).__name__}; sets are joined as `Dataset`, loaded whole.")
    if len({str(part.features.arrow_schema.remove_metadata()) for part in parts.values()}) > 1:
        for name, part in parts.items():
            try:
                parts[name] = with_canonical_columns(part)
            except RowError as error:
                raise RowError(error.reason, f"{name}, {error}") from error
        parts = unify_types(parts)
    if any("margin" in part.column_names for part in parts.values()):
        parts = {name: _with_margin(part) for name, part in parts.items()}
    if _first_conflict(parts) is not None:  # maybe only that some decode their images
        parts = {name: leave_images_encoded(part) for name, part in parts.items()}
    if (conflict := _first_conflict(parts)) is not None:
        raise ValueError(f"The column {conflict}; cast it in one of them, or rename it.")
    joined = concatenate_datasets(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))
    return mark_checked(joined) if all(map(is_checked, datasets.values())) else joined


def _with_margin(dataset: Dataset) -> Dataset:
    """The rows of a set that asks for no reward margin: one of 0.0, because `None` is no margin."""
    if "margin" in dataset.column_names:
        return dataset
    return with_columns(dataset, {"margin": pa.repeat(0.0, len(dataset))})


def _first_conflict(datasets: Mapping[str, Dataset]) -> str | None:
    """The first column that has two types, and which; `None` if there is none."""
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
    """Tell a type of nothing but `None`, in lists or not, which goes with any other."""
    return _is_empty(feature.feature) if isinstance(feature, List) else feature == Value("null")


def with_canonical_columns(dataset: Dataset, *, image_root: str | os.PathLike | None = None) -> Dataset:
    """
    Give the columns that have a meaning their canonical types; columns that have them are not copied.

    `prompt`, `chosen` and `rejected` become messages with blocks as contents, as `load_preferences("trl", ...)` makes
    them: images come first where the prompt is of strings, a common beginning of two conversations becomes the prompt,
    and a plain string a message. `image` and paths in `images` become a list of images, numbers floats, and names
    strings. Other columns stay.

    Args:
        dataset (`Dataset`):
            Preference rows.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in [`ImageOptions`]; they
            become absolute.

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
    if set(_TEXTS) & set(changed):  # a prompt that both answers begin with leaves them
        changed |= {name: features[name] for name in _TEXTS if name in features}
    # What is not changed keeps its images as they are, decoded or not when they are looked at.
    final = Features({**{name: dataset.features.get(name, one) for name, one in features.items()}, **changed})
    if not changed:
        return dataset
    if len(dataset) == 0:
        return Dataset.from_dict({name: [] for name in final}, features=final)
    kept = [name for name in encoded.column_names if name in features and name not in changed]
    made = encoded.with_format("arrow").map(
        _convert_table,
        with_indices=True,
        batched=True,
        batch_size=rows_at_once(encoded),
        remove_columns=encoded.column_names,
        features=Features(changed),
        fn_kwargs={
            "features": Features(changed),
            "options": options,
            "json": find_json_columns(encoded.features),
            "is_checked": was_checked,
        },
        load_from_cache_file=False,
        new_fingerprint=generate_random_fingerprint(),
        desc="Making rows canonical",
    )
    if kept:
        columns = {name: made.data.column(name).combine_chunks() for name in changed}
        made = with_columns(encoded.select_columns(kept), columns)
    made = copy.deepcopy(made.with_format(None).select_columns(list(final)))
    made.info.features = final  # the storage is the same
    return made


def _canonical_features(features: Features) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, feature in features.items():
        if name in ("image", "images"):
            found["images"] = List(Image()) if name == "image" or _differs(feature, List(Image())) else feature
        elif name not in _TEXTS and not isinstance(feature, Value):
            found[name] = feature
        else:
            found[name] = _KNOWN.get(name, feature)
    if set(SIDES) <= set(features):  # both may begin with the prompt
        found = {"prompt": MESSAGES, **found}
    return found


def _differs(feature: Any, wanted: Any) -> bool:
    return feature is None or Features({"": feature}).arrow_schema != Features({"": wanted}).arrow_schema


def _convert_table(
    table: pa.Table, indices: list[int], features: Features, options: ImageOptions, json: Features, is_checked: bool
) -> pa.Table:
    made = []
    for row, index in zip(arrow_rows(table, json), indices, strict=True):
        try:
            made.append(_converted(row, features, options, is_checked))
        except RowError as error:
            raise RowError(error.reason, f"{row_name(row, index)}: {error}") from error
    return pa.Table.from_pylist(made, schema=features.arrow_schema)


def _converted(row: Mapping[str, Any], features: Features, options: ImageOptions, is_checked: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, Value) and row.get(name) is not None:
            found[name] = float(row[name]) if feature.dtype == "float64" else str(row[name])
    images = [image and placed_image(as_image(image), options) for image in row_images(row)]
    if set(_TEXTS) & set(features):
        texts = {name: row.get(name) for name in _TEXTS}
        try:
            # Whatever is wrong with a row besides is for its checks to find.
            pair = as_canonical({**texts, "images": images, "videos": row.get("videos")}, is_checked)
            texts = {name: pair[name] for name in _TEXTS}
        except RowError as error:
            places = len(images) if _is_of_strings(texts["prompt"]) else 0
            texts = {name: _blocked(messages, error) for name, messages in texts.items()}
            texts["prompt"] = with_image_blocks(texts["prompt"] or [], places) if places else texts["prompt"]
        found |= texts
    return {**found, "images": images} if "images" in features else found


def _is_of_strings(prompt: Any) -> bool:
    """Tell a prompt of strings, in which images come first, from one whose blocks say where they go."""
    messages = prompt if isinstance(prompt, (list, tuple)) else []
    has_user = any(message["role"] == "user" for message in messages)
    return has_user and all(isinstance(message["content"], str) for message in messages)


def _blocked(messages: Any, error: RowError) -> list[dict[str, Any]] | None:
    """Messages with blocks of type and text as contents; `error` if they hold more than that."""
    if isinstance(messages, str):
        raise error
    made = []
    for message in messages or []:
        content = blocks(message)
        fields = [(message, ("role", "content")), *((block, ("type", "text")) for block in content)]
        if any(value for one, known in fields for key, value in one.items() if key not in known):
            raise error
        content = [{"type": block["type"], "text": block.get("text")} for block in content]
        made.append({"role": message["role"], "content": content})
    return None if messages is None else made


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
    rows = {"train": np.flatnonzero(~in_test), "test": np.flatnonzero(in_test)}
    return DatasetDict({split: select_rows(dataset, rows[split]) for split in rows})


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
    places = np.empty(len(codes), dtype=np.int64)
    for rows in group_rows(codes):
        places[rows] = np.arange(len(rows))
    return places


def _groups(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """A code for each row's group, from 0, and what the groups are called; rows without one have one of their own."""
    count = len(dataset)
    if "group_id" not in dataset.column_names:
        return np.arange(count), [f"row {row}" for row in range(count)]
    codes, names = group_codes(column_of(dataset, "group_id"))
    return codes, [*names, *(f"row {row}" for row in np.flatnonzero(codes >= len(names)))]


def _hash(seed: int, text: str) -> int:
    return int(digest(f"{seed}-{text}", size=8), 16)


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(_hash(seed, name))
