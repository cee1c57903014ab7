"""A preference set divided in two: rows that can be used, and rows that cannot, each with its reason.

Nothing is thrown away: bad rows come back whole, can be fixed, and are let in again by [`readmit`].
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import ProcessorMixin

from .duplicates import contradiction_error, duplicate_error, find_doubles
from .encoded import AnyDataset, Data, column_of, mark_checked
from .locations import ImageOptions, with_image_root
from .quarantine import NOTES, check_free, quarantine_report, quarantined_rows, write_quarantine
from .row_checks import ImageCheck, RowChecks, TokenCounter, find_faults, make_checks
from .rows import row_name
from .validation_stream import divide_stream


def validate(
    dataset: Data,
    *,
    token_counter: TokenCounter | None = None,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
    image_check: ImageCheck = "header",
    max_length: int | None = None,
    duplicates: bool = True,
    num_proc: int | None = None,
    report_file: str | os.PathLike | None = None,
    quarantine_file: str | os.PathLike | None = None,
    show: bool = True,
) -> tuple[Data, Data]:
    """
    Checks every row of a preference set and quarantines bad ones.

    Rows are read once, and images stay encoded. What is kept of a row is its verdict and a hash of 16 bytes.

    A streamed set is divided while it streams; each of the two results reads the stream for itself. There, of two
    contradictory rows the later one is quarantined, because the earlier one has gone out by then. A row is compared
    with those before it that the same process has read since the stream began: not with all, if a `DataLoader` has
    several workers, or if the stream was resumed. This takes some 300 bytes of memory a row.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Preference rows, as [`check_row`] describes them.
        token_counter ([`TokenCounter`], *optional*):
            The model as a reader of rows, from [`~trl_dt2it.token_counter`]. With it, no text may contain a special
            token, and the chat template may not make the two answers of a pair equal.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in [`ImageOptions`].
        image_options ([`ImageOptions`], *optional*):
            Where else images may come from, and how large they may be.
        image_check (`str`, *optional*, defaults to `"header"`):
            `"full"` decodes every image, which finds truncated files and takes long; `"header"` reads headers;
            `"none"` does not look at images.
        max_length (`int`, *optional*):
            Most tokens of prompt and answer, image tokens included. Needs `token_counter`.
        duplicates (`bool`, *optional*, defaults to `True`):
            Whether a row that equals an earlier one is quarantined, and all rows that differ from another in nothing
            but which answer is preferred.
        num_proc (`int`, *optional*):
            Number of processes. A streamed set is checked by whoever iterates it.
        report_file (`str` or `os.PathLike`, *optional*):
            JSON file for the report. Not of a streamed set.
        quarantine_file (`str` or `os.PathLike`, *optional*):
            Parquet file for the bad rows, images as they are. Not of a streamed set.
        show (`bool`, *optional*, defaults to `True`):
            Whether to print the report; for a streamed set, whether to log bad rows.

    Returns:
        `tuple[Dataset, Dataset]` or `tuple[IterableDataset, IterableDataset]`: the good rows, in their order and with
        their features, and the bad rows with all their columns, images encoded, and three more: `row` (the place in
        `dataset`), `reason` (one of [`REASONS`]) and `message`.

    Raises:
        `ValueError`: if the set has no `chosen` and `rejected`, or a column named as one of the three, or if options
            do not fit.

    Example:

    ```python
    >>> clean, quarantine = validate(dataset, report_file="report.json")
    >>> fixed = quarantine.filter(lambda row: row["reason"] == "bad_strength").map(lambda row: {"strength": None})
    >>> clean, quarantine = readmit(clean, fixed)
    ```
    """
    checks = make_checks(token_counter, with_image_root(image_options, image_root), image_check, max_length)
    _check_columns(dataset, checks)
    if isinstance(dataset, IterableDataset):
        if report_file is not None or quarantine_file is not None:
            raise ValueError("Nothing is known of a streamed set before it is read; it has no report and no file.")
        return divide_stream(dataset, checks, duplicates, show)
    clean, quarantine = _divide(dataset, find_faults(dataset, checks, duplicates, num_proc), duplicates)
    _report(clean, quarantine, report_file, quarantine_file, show)
    return clean, quarantine


def readmit(
    clean: Dataset,
    repaired: Dataset,
    *,
    token_counter: TokenCounter | None = None,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
    image_check: ImageCheck = "header",
    max_length: int | None = None,
    duplicates: bool = True,
    num_proc: int | None = None,
    report_file: str | os.PathLike | None = None,
    quarantine_file: str | os.PathLike | None = None,
    show: bool = True,
) -> tuple[Dataset, Dataset]:
    """
    Lets fixed rows of a quarantine in again, after the same checks, duplicates and contradictions included.

    Args:
        clean (`Dataset`):
            What [`validate`] found good. It is not checked again, but a fixed row may equal or contradict one of it.
        repaired (`Dataset`):
            Rows of the quarantine, or of its Parquet file, after they were fixed.
        token_counter, image_root, image_options, image_check, max_length (*optional*):
            As in [`validate`].
        duplicates, num_proc, report_file, quarantine_file, show (*optional*):
            As in [`validate`].

    Returns:
        `tuple[Dataset, Dataset]`: `clean` and behind it the rows that are good now, and the others. Their `row` is the
        place in the two sets joined, so that the first fixed row has the number `len(clean)`.

    Raises:
        `ValueError`: if the columns of the two sets differ, or if options do not fit.
    """
    checks = make_checks(token_counter, with_image_root(image_options, image_root), image_check, max_length)
    repaired = repaired.remove_columns([name for name in NOTES if name in repaired.column_names])
    if differing := sorted(set(clean.column_names) ^ set(repaired.column_names)):
        raise ValueError(f"Only one of `clean` and `repaired` has the column `{differing[0]}`; give both the same.")
    _check_columns(clean, checks)
    if repaired.features != clean.features:
        repaired = repaired.with_format(None).cast(clean.features)
    joined = concatenate_datasets([clean, repaired.with_format(**clean.format)])
    num_checked = len(clean)
    clean, quarantine = _divide(joined, find_faults(joined, checks, duplicates, num_proc, num_checked), duplicates)
    _report(clean, quarantine, report_file, quarantine_file, show)
    return clean, quarantine


def _check_columns(dataset: AnyDataset, checks: RowChecks) -> None:
    columns = dataset.column_names
    if columns is None:  # of a streamed set that does not tell
        return
    if not {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"The set has the columns {', '.join(columns)}; it needs `chosen` and `rejected`. Text-to-image pairs "
            "become such rows by `reformulate_t2i`."
        )
    check_free(columns, NOTES)
    if checks.token_counter is not None and checks.max_length is not None and {"image", "images"} & set(columns):
        if not isinstance(checks.token_counter.processing_class, ProcessorMixin):
            raise ValueError("`max_length` counts image tokens; give the processor, and not only its tokenizer.")


def _divide(dataset: Dataset, found: pa.Table, duplicates: bool) -> tuple[Dataset, Dataset]:
    is_bad = pc.not_equal(found["reason"], "").to_numpy()
    rows = np.flatnonzero(is_bad)
    reasons, messages = (found[name].take(pa.array(rows)).to_pylist() for name in ("reason", "message"))
    if duplicates:
        names = ("high", "low", "is_swapped", "is_mirror")
        high, low, is_swapped, is_mirror = (found[name].to_numpy() for name in names)
        del found  # the largest thing in memory, if the set is large
        doubles = find_doubles(high, low, is_swapped, is_bad, is_mirror)
        others = _names(dataset, doubles.others)
        for is_contradiction, name in zip(doubles.is_contradiction, others, strict=True):
            error = contradiction_error(name) if is_contradiction else duplicate_error(name)
            reasons.append(error.reason)
            messages.append(str(error))
        rows = np.concatenate([rows, doubles.rows])
        is_bad[doubles.rows] = True
    order = np.argsort(rows)
    notes = {"reason": [reasons[place] for place in order], "message": [messages[place] for place in order]}
    quarantine = quarantined_rows(dataset, rows[order], notes)
    return mark_checked(dataset.select(np.flatnonzero(~is_bad)) if len(rows) else dataset), quarantine


def _names(dataset: Dataset, rows: np.ndarray) -> list[str]:
    if "pair_id" not in dataset.column_names or len(rows) == 0:
        return [row_name({}, row) for row in rows]
    pair_ids = column_of(dataset.select(rows), "pair_id").to_pylist()
    return [row_name({"pair_id": pair_id}, row) for pair_id, row in zip(pair_ids, rows, strict=True)]


def _report(
    clean: Dataset,
    quarantine: Dataset,
    report_file: str | os.PathLike | None,
    quarantine_file: str | os.PathLike | None,
    show: bool,
) -> None:
    if quarantine_file is not None:
        write_quarantine(quarantine, quarantine_file)
    if not show and report_file is None:
        return
    report = quarantine_report(clean, quarantine)
    if report_file is not None:
        Path(report_file).parent.mkdir(parents=True, exist_ok=True)
        Path(report_file).write_text(report.to_json() + "\n", encoding="utf-8")
    if show:
        report.show()
