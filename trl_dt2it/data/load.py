"""Any public preference set as canonical rows, in one call."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset
from transformers.utils import logging

from .. import __version__
from .converting import VERDICT, Conversion, find_own_columns
from .encoded import AnyDataset, batch_rows, column_names, column_of, mark_checked, rows_at_once
from .errors import RowError, is_milestone
from .grouping import rows_by_group
from .quarantine import take_out
from .reading import read_raw
from .sources import SOURCES
from .t2i import reformulate_t2i


logger = logging.get_logger(__name__)

# Rows that are held at once. Each may hold images of some megabytes.
_BATCH = 100


def load_preferences(
    name: str,
    path_or_id: str | os.PathLike | None = None,
    *,
    split: str = "train",
    image_root: str | os.PathLike | None = None,
    streaming: bool = False,
    on_bad_row: Literal["quarantine", "raise"] = "quarantine",
    quarantine_file: str | os.PathLike | None = None,
    source: str | None = None,
    reformulate: bool = True,
    seed: int = 42,
    template: str | None = None,
    both_orders: bool = False,
    max_frames: int = 32,
    shard: tuple[int, int] | None = None,
    num_proc: int | None = None,
    revision: str | None = None,
    **options: Any,
) -> AnyDataset:
    """
    Loads a public preference set, or a file in a known format, as canonical rows.

    Pairs that cannot be used, such as ties, are quarantined: counted by reason in a warning, and listed in
    `quarantine_file`. Images are neither decoded nor opened; [`validate`] looks at them.

    Args:
        name (`str`):
            Name of the set or format, one of [`SOURCES`], such as `"rlaif_v"`, `"hpdv3"`, `"llamafactory"`,
            `"columns"` (any table of questions and answers) or `"t2i"` (any table of captions and images).
        path_or_id (`str` or `os.PathLike`, *optional*):
            A file or folder with the set's rows, or a Hub id; by default the set's own place on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in [`ImageOptions`]: a path
            that leaves it makes its row a bad one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether rows are made while they are read.
        on_bad_row (`str`, *optional*, defaults to `"quarantine"`):
            `"raise"` makes the first bad row an error.
        quarantine_file (`str` or `os.PathLike`, *optional*):
            JSON lines file that lists the bad rows: `pair_id`, `row` of the source, `reason`, `message`. Not of a
            streamed set.
        source (`str`, *optional*):
            What the column `source` says, and the beginning of `pair_id` and `group_id`. By default what the rows say
            in a `source` of their own, or else `name`; with this argument theirs is kept as `original_source`.
        reformulate (`bool`, *optional*, defaults to `True`):
            Whether text-to-image pairs become two-image questions, by [`reformulate_t2i`]. Otherwise they keep the
            columns `caption`, `chosen_image` and `rejected_image`.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the reformulation.
        template (`str`, *optional*):
            Template of the reformulation.
        both_orders (`bool`, *optional*, defaults to `False`):
            Whether the reformulation gives each pair in both orders.
        max_frames (`int`, *optional*, defaults to `32`):
            Most frames of a video.
        shard (`tuple[int, int]`, *optional*):
            `(i, n)` takes the i-th of n parts, i from 0. A pair has the same `pair_id` whatever the parts.
        num_proc (`int`, *optional*):
            Number of processes.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        options:
            Options of the set's adapter, such as `min_confidence` of HPDv3 or the column names of `"columns"`.

    Returns:
        `Dataset` or `IterableDataset`: rows with the columns of [`FEATURES`], `videos` or `weight` where the source
        has such, and all columns that its adapter does not read. One with a name that rows have already is kept as
        `original_` and this name, which a warning says; one without any value is not kept.

    Raises:
        `ValueError`: if the name or an option is not known, if there is nothing to read, if no pair can be used, or
            if one is bad and `on_bad_row="raise"`.
    """
    if name == "columns" and {"chosen_image", "rejected_image"} & set(options):
        name = "t2i"  # a table of captions and images, named as in `reformulate_t2i`
    conversion = _conversion(name, source, options, image_root, max_frames)
    if on_bad_row not in ("quarantine", "raise"):
        raise ValueError(f'`on_bad_row` is {on_bad_row!r}; it must be "quarantine" or "raise".')
    if quarantine_file is not None and streaming:
        raise ValueError("A streamed set has no `quarantine_file`; load it without `streaming` to list its bad rows.")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` is {shard}; it must be (i, n) with 0 <= i < n.")
    known = SOURCES[name]
    if known.is_non_commercial:
        logger.warning(f"{name} is licensed under {known.licence}: not for commercial use.")
    raw = read_raw(known, path_or_id, split=split, streaming=streaming, revision=revision)
    conversion = replace(conversion, own=find_own_columns(raw, conversion))
    if streaming:
        rows: AnyDataset = _stream(raw, conversion, on_bad_row, shard)
    else:
        rows = _convert(raw, conversion, on_bad_row, quarantine_file, shard, num_proc)
    if known.is_t2i and reformulate:
        rows = reformulate_t2i(
            rows, seed=seed, template=template, both_orders=both_orders, on_bad_row=on_bad_row, num_proc=num_proc
        )
    return rows if known.is_t2i else mark_checked(rows)


def _conversion(
    name: str, source: str | None, options: dict[str, Any], image_root: str | os.PathLike | None, max_frames: int
) -> Conversion:
    if name not in SOURCES:
        raise ValueError(f"`{name}` is no known preference set or format. Known are {', '.join(sorted(SOURCES))}.")
    known = SOURCES[name]
    parameters = list(inspect.signature(known.convert).parameters.values())[1:]
    allowed = {parameter.name for parameter in parameters}
    if unknown := sorted(set(options) - allowed):
        takes = f"takes {', '.join(sorted(allowed))}" if allowed else "takes no options"
        raise ValueError(f"`{name}` has no option `{unknown[0]}`; it {takes}.")
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if missing := sorted(set(needed) - set(options)):
        raise ValueError(f"`{name}` needs the options {', '.join(missing)}.")
    try:
        list(
            known.convert([] if known.group_by else {}, **options)
        )  # options that do not fit, before anything is read
    except RowError:
        pass
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"`image_root` is {image_root}, but there is no such folder.")
    root = None if image_root is None else str(Path(image_root).resolve())
    return Conversion(known, source or name, options, root, max_frames, overrides=source is not None)


def _convert(
    raw: Dataset,
    conversion: Conversion,
    on_bad_row: str,
    quarantine_file: str | os.PathLike | None,
    shard: tuple[int, int] | None,
    num_proc: int | None,
) -> Dataset:
    name, first = conversion.name, 0
    groups = None
    if conversion.source.group_by is not None:
        groups = rows_by_group(raw, conversion.source.group_by)
    count = len(raw) if groups is None else len(groups)
    if shard is not None:
        first, last = (count * end // shard[1] for end in (shard[0], shard[0] + 1))
        raw, groups = (raw.select(range(first, last)), None) if groups is None else (raw, groups[first:last])
        count = last - first
    if count == 0:
        raise ValueError(f"There is no row in {name}{'' if shard is None else f' for the shard {shard}'}.")

    def convert(batch: dict[str, list[Any]], indices: list[int], version: str) -> dict[str, list[Any]]:
        if groups is None:
            rows = batch_rows(batch)
        else:
            rows = [{"group": [raw[int(index)] for index in groups[place]]} for place in indices]
        made = [
            pair for row, index in zip(rows, indices, strict=True) for pair in conversion.convert(row, first + index)
        ]
        return {column: [pair[column] for pair in made] for column in conversion.features}

    # The version is part of what `datasets` finds a cached result by; the code of adapters is not.
    given = raw if groups is None else Dataset.from_dict({"group": range(count)})
    converted = given.map(
        convert,
        batched=True,
        with_indices=True,
        batch_size=rows_at_once(raw) if groups is None else 10,
        writer_batch_size=rows_at_once(raw),
        remove_columns=given.column_names,
        features=conversion.features,
        fn_kwargs={"version": __version__},
        num_proc=num_proc if count >= (num_proc or 1) else None,
        desc=f"Reading {name}",
        **conversion.caching,
    )
    return _without_bad(converted, name, on_bad_row, quarantine_file)


def _without_bad(converted: Dataset, name: str, on_bad_row: str, quarantine_file: str | os.PathLike | None) -> Dataset:
    is_bad = pc.not_equal(column_of(converted, "reason"), "").to_numpy(zero_copy_only=False)
    bad = converted.select(np.flatnonzero(is_bad)).select_columns(["pair_id", *VERDICT])
    kept = converted.remove_columns(list(VERDICT))
    rows = np.flatnonzero(is_bad)
    return take_out(kept, rows, list(bad), name=f"pair of {name}", on_bad_row=on_bad_row, file=quarantine_file)


def _stream(
    raw: IterableDataset, conversion: Conversion, on_bad_row: str, shard: tuple[int, int] | None
) -> IterableDataset:
    if conversion.source.group_by is not None:
        raise ValueError(
            f"Pairs of {conversion.name} are formed from several rows, which may be far apart; load it without "
            "`streaming` (it is read from disk as needed, and not held in memory)."
        )
    counts: Counter[str] = Counter()
    features = Features({name: feature for name, feature in conversion.features.items() if name not in VERDICT})

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        made = []
        for row, index in zip(batch_rows(batch), indices, strict=True):
            if shard is None or index % shard[1] == shard[0]:
                made += [pair for pair in conversion.convert(row, index) if _is_good(pair)]
        return {column: [pair[column] for pair in made] for column in features}

    def _is_good(pair: dict[str, Any]) -> bool:
        if not (reason := pair["reason"]):
            return True
        problem = f"{pair['pair_id']}, {reason}: {pair['message']}"
        if on_bad_row == "raise":
            raise ValueError(f"A pair of {conversion.name} cannot be used. {problem}")
        counts[reason] += 1
        if is_milestone(counts[reason]):
            logger.warning(f"Dropped from {conversion.name}, {counts[reason]} with this reason so far: {problem}")
        return False

    rows = raw.map(convert, batched=True, with_indices=True, batch_size=_BATCH, remove_columns=column_names(raw))
    return rows.cast(features)  # if `map` were told of them, images would come undecoded
