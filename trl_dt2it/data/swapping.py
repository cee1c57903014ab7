"""Pairs whose two answers change places, whatever columns they have and without a copy of their images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets

from .encoded import leave_images_encoded


def partner_column(name: str, columns: Collection[str]) -> str | None:
    """
    The column that changes places with this one when a pair is swapped.

    Args:
        name (`str`):
            A column, such as `"chosen"` or `"style_rejected"`.
        columns (`Collection[str]`):
            All columns.

    Returns:
        `str`, *optional*: `"rejected"` or `"style_chosen"`, or `None` if the name has no such partner among them.
    """
    for here, there in (("chosen", "rejected"), ("rejected", "chosen")):
        if here in name:
            partner = name.replace(here, there)
            return partner if partner in columns else None
    return None


def swap_pairs(dataset: Dataset, swapped: npt.ArrayLike, rows: npt.ArrayLike | None = None) -> Dataset:
    """
    Swaps chosen and rejected of some pairs. No cell is copied, decoded or written: the rows of the result point to the
    same data, under exchanged names where they are swapped.

    Args:
        dataset (`Dataset`):
            Pairs.
        swapped (`np.ndarray` of shape `(N,)` and dtype `bool`):
            Which rows to swap.
        rows (`np.ndarray` of shape `(R,)` and an integer dtype, *optional*):
            Rows of the result, in its order; all by default.

    Returns:
        `Dataset`: every column with a [`partner_column`] has changed places with it in the swapped rows.

    Raises:
        `ValueError`: if there is nothing to swap in the columns, or two partners hold different types.
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
    """
    A data set with columns set or replaced. Rows that were selected one by one stay where they are: their images are
    not written anew, unless a row was selected twice.

    Args:
        dataset (`Dataset`):
            The data set.
        columns (`Mapping[str, array]`):
            Arrow or NumPy arrays with a value for each row.

    Returns:
        `Dataset`: columns that were there keep their place, the others come last.
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
