"""Quarantine: rows checked in memory or as a stream, bad rows kept apart with a reason and a count."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import not_
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from rich.console import Console
from transformers.utils import logging

from ..utils import screen_table, whole_file
from .columns import (
    AnyDataset,
    Data,
    arrow_rows,
    column_of,
    is_checked,
    is_ranked,
    leave_images_encoded,
    map_tables,
    mark_checked,
    select_rows,
)
from .contents import duplicate_error, find_duplicates, pair_digest
from .images import ImageOptions, check_image, load_image, with_image_root
from .ranked import to_pairs
from .rows import (
    SIDES,
    RowError,
    check_row,
    check_special_tokens,
    is_milestone,
    row_images,
    row_name,
    row_videos,
    special_token_pattern,
    summarize,
)
from .sources import SOURCES


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


logger = logging.get_logger(__name__)

# Columns of a quarantined row besides its own.
NOTES = Features({"row": Value("int64"), "reason": Value("string"), "message": Value("string")})
ROW_GROUP = 100  # rows of a Parquet file that its reader holds at once; each may have images of some megabytes

# Result of the checks of a row: its fault, "" if it has none, and its `pair_digest`, the key in two halves.
_DIGEST = {"high": Value("uint64"), "low": Value("uint64"), "is_swapped": Value("bool"), "is_mirror": Value("bool")}
_RESULT = Features({"reason": Value("string"), "message": Value("string"), **_DIGEST})

ImageCheck = Literal["header", "full", "none"]


@dataclass(frozen=True)
class ReasonSummary:
    """Rows quarantined for one reason."""

    count: int
    share: float  # of the rows that came in, from 0 to 1
    example: str  # name of the first row
    message: str  # of the first row


@dataclass(frozen=True)
class ValidationReport:
    """
    Numbers of rows that came in, went out and were quarantined.

    Parameters:
        rows_in, rows_out (`int`):
            Numbers of rows checked, and of those that can be used.
        reasons (`dict[str, ReasonSummary]`):
            Quarantined rows by reason, the most frequent first.
        sources (`dict[str, dict[str, int]]`):
            `rows_in`, `rows_out` and the rows of each reason by `source`; empty without such a column.
    """

    rows_in: int
    rows_out: int
    reasons: dict[str, ReasonSummary]
    sources: dict[str, dict[str, int]]

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each reason."""
        return {reason: summary.count for reason, summary in self.reasons.items()}

    def to_json(self) -> str:
        """Write the report as JSON."""
        return json.dumps({**asdict(self), "counts": self.counts}, indent=2, ensure_ascii=False)

    def show(self, console: Console | None = None) -> None:
        """Print the report, to standard output by default."""
        console = console or Console()
        title = f"{self.rows_out} of {self.rows_in} rows can be used"
        if not self.reasons:
            console.print(f"{title}.")
            return
        rows = [
            (reason, str(summary.count), f"{summary.share:.2%}", f"{summary.example}: {summary.message}"[:300])
            for reason, summary in self.reasons.items()
        ]
        console.print(screen_table(("reason", "rows", "share"), rows, last="for example", title=title))
        if len(self.sources) > 1:
            sources = []
            for source, numbers in self.sources.items():
                reasons = ", ".join(f"{numbers[reason]} {reason}" for reason in self.reasons if reason in numbers)
                sources.append((source[:300], str(numbers["rows_in"]), str(numbers["rows_out"]), reasons or "none"))
            console.print(screen_table(("source", "rows in", "rows out"), sources, last="reasons"))


def quarantine_report(clean: Dataset, quarantine: Dataset) -> ValidationReport:
    """
    Summarize the result of [`validate`] or [`decontaminate`].

    Args:
        clean, quarantine (`Dataset`):
            Rows that can be used, and the others with `row`, `reason` and `message`.

    Returns:
        [`ValidationReport`]
    """
    rows_in = len(clean) + len(quarantine)
    reasons = {}
    if len(quarantine):
        names = column_of(quarantine, "reason").to_pylist()
        notes = quarantine.select_columns([*NOTES, *({"pair_id"} & set(quarantine.column_names))])
        for reason, count in Counter(names).most_common():  # of equal counts, the first to appear
            first = notes[names.index(reason)]
            name = row_name(first, first["row"])
            reasons[reason] = ReasonSummary(count, count / rows_in, name, first["message"])
    return ValidationReport(rows_in, len(clean), reasons, _by_source(clean, quarantine))


def _by_source(clean: Dataset, quarantine: Dataset) -> dict[str, dict[str, int]]:
    if "source" not in quarantine.column_names:
        return {}
    counts = column_of(clean, "source").value_counts().to_pylist()
    kept: Counter[str | None] = Counter({one["values"]: one["counts"] for one in counts})
    lost: dict[str | None, Counter[str]] = {source: Counter() for source in kept}
    bad = (column_of(quarantine, name).to_pylist() for name in ("source", "reason"))
    for source, reason in zip(*bad, strict=True):
        lost.setdefault(source, Counter())[reason] += 1
    return {
        str(source): {"rows_in": kept[source] + reasons.total(), "rows_out": kept[source], **reasons}
        for source, reasons in lost.items()
    }


def check_free(columns: Sequence[str], features: Features) -> None:
    """Refuse a data set that has one of the columns of notes already."""
    if taken := [name for name in features if name in columns]:
        message = f"The set has a column `{taken[0]}`, where what is wrong with a row is to be written"
        raise ValueError(f"{message}; rename it, or use `readmit` for rows of a quarantine.")


def quarantined_rows(
    dataset: Dataset, rows: np.ndarray, notes: Mapping[str, Any], features: Features = NOTES
) -> Dataset:
    """Select rows, images encoded since some do not decode, with a list or array for each of the `features`."""
    encoded = leave_images_encoded(dataset.with_format(None))
    every = Features({**encoded.features, **features})
    if len(rows) == 0:  # which `concatenate_datasets` would leave without the notes
        return Dataset.from_dict({name: [] for name in every}, features=every)
    table = pa.table({"row": rows, **notes}).select(list(features)).cast(features.arrow_schema)
    return concatenate_datasets([encoded.select(rows), Dataset(table)], axis=1)


def write_quarantine(quarantine: Dataset, path: str | os.PathLike) -> None:
    """Write rows into a Parquet file, whole or not at all, images as they are: bytes as bytes, paths as paths."""
    with whole_file(path) as part:
        quarantine.to_parquet(part, batch_size=ROW_GROUP)


def take_out(
    dataset: Dataset,
    rows: Sequence[int] | np.ndarray,
    notes: Dataset,
    *,
    name: str,
    on_bad_row: str = "quarantine",
    file: str | os.PathLike | None = None,
    appends: bool = False,
    advice: str = "",
    show: bool = True,
) -> Dataset:
    """Take bad rows out of a data set, with a warning and a JSON lines file of their notes where `show` is true; or
    raise a `ValueError`, with `on_bad_row="raise"` or if no row is left. `name` is of the form `"pair of povid"`."""
    if len(rows) == 0:
        return dataset
    kind, of = name.split(" ", 1)
    # The notes may be larger than memory: only this column is read as a whole.
    summary = summarize(Counter(column_of(notes, "reason").to_pylist()))
    first = f"The first, {row_name(notes[0], notes[0]['row'])}: {notes[0]['message']}"
    if on_bad_row == "raise":
        raise ValueError(f"{len(rows)} of {len(dataset)} {kind}s {of} cannot be used ({summary}). {first}{advice}")
    if len(rows) == len(dataset):
        raise ValueError(f"No {name} can be used ({summary}). {first}")
    if show:
        listed = ""
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a" if appends else "w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(note, ensure_ascii=False) + "\n" for note in notes)
            listed = f"; listed in {file}"
        logger.warning(f"Quarantined {len(rows)} of {len(dataset)} {kind}s {of} ({summary}){listed}. {first}")
    return select_rows(dataset, np.delete(np.arange(len(dataset)), rows))


@dataclass(frozen=True)
class TokenCounter:
    """
    Model as a reader of rows, made by [`~trl_dt2it.token_counter`].

    Parameters:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor or tokenizer, whose special tokens no text may contain.
        check (`Callable`):
            Function of a row that raises a [`RowError`] if its two answers are equal to the model.
        count (`Callable`):
            Function of a row and [`ImageOptions`] that counts the tokens of prompt and chosen, and of prompt and
            rejected, image tokens included.
    """

    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    check: Callable[[Mapping[str, Any]], None]
    count: Callable[[Mapping[str, Any], ImageOptions], tuple[int, int]]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself, or that of the processor."""
        return getattr(self.processing_class, "tokenizer", self.processing_class)


@dataclass(frozen=True)
class RowChecks:
    """Checks of a row. Picklable, for worker processes."""

    image_options: ImageOptions
    image_check: ImageCheck = "header"  # `"full"` decodes every image, `"header"` reads headers
    token_counter: TokenCounter | None = None  # no text may contain its special tokens
    max_length: int | None = None  # most tokens of a conversation, image tokens included
    duplicates: bool = False  # good rows are compared with each other
    has_form: bool = False  # rows have passed [`check_row`] before

    def __post_init__(self) -> None:
        if self.image_check not in ("header", "full", "none"):
            raise ValueError(f'`image_check` is {self.image_check!r}; it must be "header", "full" or "none".')
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` is {self.max_length}; it must be at least 1.")
        if self.max_length is not None and self.token_counter is None:
            raise ValueError("`max_length` counts tokens; pass the model's processor in a `token_counter` too.")

    @cached_property
    def _special_tokens(self) -> re.Pattern | None:
        return None if self.token_counter is None else special_token_pattern(self.token_counter.tokenizer)

    def fault(self, row: Mapping[str, Any]) -> RowError | None:
        """Find the first reason why a row cannot be used."""
        try:
            if not self.has_form:
                check_row(row, special_tokens=self._special_tokens)
            elif self._special_tokens is not None:
                check_special_tokens(row, self._special_tokens)
            if self.image_check != "none":
                frames = (frame for video in row_videos(row) for frame in video.frames)
                for image in (*row_images(row), *frames):
                    (load_image if self.image_check == "full" else check_image)(image, self.image_options)
            if self.token_counter is not None:
                self.token_counter.check(row)
            if self.token_counter is not None and self.max_length is not None:
                for side, count in zip(SIDES, self.token_counter.count(row, self.image_options), strict=True):
                    if count > self.max_length:
                        message = f"prompt and `{side}` have {count} tokens, more than {self.max_length}"
                        raise RowError("too_long", f"{message}; shorten the text.")
        except RowError as error:
            known = SOURCES.get(str(row.get("source")))
            advice = "" if known is None else known.image_advice(error.reason)
            # A token counter names the row, as the quarantine does.
            return RowError(error.reason, str(error).removeprefix(f"{row_name(row)}: ") + advice)
        return None


def _check_table(table: pa.Table, indices: list[int], checks: RowChecks, num_checked: int) -> pa.Table:
    results = []
    for row, index in zip(arrow_rows(table), indices, strict=True):
        error = None if index < num_checked else checks.fault(row)
        digest: tuple[Any, ...] = (0, 0, False, False)
        if error is None and checks.duplicates:
            try:
                key, *flags = pair_digest(row)
                digest = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big"), *flags
            except RowError as unknown:  # an image without identity, which no check looked at
                error = unknown
        results.append((*(("", "") if error is None else (error.reason, str(error))), *digest))
    return pa.table(list(map(list, zip(*results, strict=True))), schema=_RESULT.arrow_schema)


@dataclass
class StreamChecks:
    """Checks of a stream, with a memory of its rows."""

    checks: RowChecks
    show: bool  # logs bad rows
    _seen: dict[tuple[bytes, bool], tuple[int, bool, str]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Write the notes about a row; reason and message are "" for a good row."""
        if index == 0:  # the stream begins anew
            self._seen.clear()
            self._counts.clear()
        error = self.checks.fault(row)
        if error is None and self.checks.duplicates:
            error = self._compare(row, index)
        if error is None:
            return {"row": index, "reason": "", "message": ""}
        self._counts[error.reason] += 1
        if self.show and is_milestone(count := self._counts[error.reason]):
            problem = f"{row_name(row, index)}, {error.reason}: {error}"
            logger.warning(f"Quarantined, {count} with this reason so far: {problem}")
        return {"row": index, "reason": error.reason, "message": str(error)}

    def _compare(self, row: Mapping[str, Any], index: int) -> RowError | None:
        try:
            key, is_swapped, is_mirror = pair_digest(row)
        except RowError as error:
            return error
        # A row in the other of both orders is no duplicate, but may contradict.
        earlier, was_swapped, name = self._seen.get((key, not is_mirror), (index, is_swapped, ""))
        if earlier < index and was_swapped != is_swapped:
            return duplicate_error(name, is_contradiction=True)
        own = (index, is_swapped, row_name(row, index))
        earlier, was_swapped, name = self._seen.setdefault((key, is_mirror), own)
        if earlier >= index:  # the row itself, or one that a second iterator over the same stream has read ahead
            return None
        return duplicate_error(name, is_contradiction=was_swapped != is_swapped)


def _divide_stream(dataset: IterableDataset, checks: RowChecks, show: bool) -> tuple[IterableDataset, IterableDataset]:
    """Divide a stream into good rows with their features, and bad rows with notes."""
    features, encoded = dataset.features, leave_images_encoded(dataset)
    noted = None if features is None else Features({**encoded.features, **NOTES})
    good, bad = (
        encoded.map(StreamChecks(checks, shows), with_indices=True, features=noted).filter(
            is_kept, input_columns=["reason"]
        )
        for shows, is_kept in ((show, not_), (False, bool))
    )
    good = good.remove_columns(list(NOTES))
    return mark_checked(good if features is None else good.cast(features)), bad


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
    Check every row of a preference set and quarantine bad rows.

    A streamed set is divided while it streams, and each of the two results reads the stream for itself. Of two
    contradictory rows, only the later is quarantined. A row is compared with those that the same process has read
    since the stream began: not with all, if a `DataLoader` has several workers, or if the stream was resumed. This
    takes some 300 bytes of memory a row.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Preference rows, as [`check_row`] describes them, or ranked prompts, whose pairs [`to_pairs`] makes.
        token_counter ([`TokenCounter`], *optional*):
            Model as a reader of rows, from [`~trl_dt2it.token_counter`]. With it, no text may contain a special token,
            and the chat template may not make the two answers of a pair equal.
        image_root, image_options (*optional*):
            Folder of the images and other limits on them, as in [`ImageOptions`].
        image_check (`str`, *optional*, defaults to `"header"`):
            `"full"` decodes every image, which finds truncated files and takes long; `"header"` reads headers;
            `"none"` ignores images.
        max_length (`int`, *optional*):
            Most tokens of prompt and answer, image tokens included. Needs `token_counter`.
        duplicates (`bool`, *optional*, defaults to `True`):
            Whether to quarantine rows that equal an earlier row, and all rows that differ from another in nothing but
            the preferred answer.
        num_proc (`int`, *optional*):
            Number of processes, of a set in memory.
        report_file, quarantine_file (`str` or `os.PathLike`, *optional*):
            JSON file for the report, and Parquet file for the bad rows, images as they are. Not of a streamed set.
        show (`bool`, *optional*, defaults to `True`):
            Whether to print the report, or to log bad rows of a streamed set.

    Returns:
        `tuple[Dataset, Dataset]` or `tuple[IterableDataset, IterableDataset]`: the good rows, in their order and with
        their features, and the bad rows with all their columns, images encoded, and three more: `row` (the index in
        `dataset`), `reason` (one of [`REASONS`]) and `message`.

    Raises:
        `ValueError`: if the set has no `chosen` and `rejected`, or has one of the three columns, or if options do not
            fit.

    Example:

    ```python
    >>> clean, quarantine = validate(dataset, report_file="report.json")
    >>> fixed = quarantine.filter(lambda row: row["reason"] == "bad_strength").map(lambda row: {"strength": None})
    >>> clean, quarantine = readmit(clean, fixed)
    ```
    """
    options = with_image_root(image_options, image_root)
    if is_ranked(dataset):
        dataset = to_pairs(dataset)
    checks = RowChecks(options, image_check, token_counter, max_length, duplicates, is_checked(dataset))
    _check_columns(dataset, checks)
    if isinstance(dataset, IterableDataset):
        if report_file is not None or quarantine_file is not None:
            raise ValueError("Nothing is known of a streamed set before it is read; it has no report and no file.")
        return _divide_stream(dataset, checks, show)
    return _reported(*_divide(dataset, checks, num_proc), report_file, quarantine_file, show)


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
    Readmit fixed rows of a quarantine, after the same checks, duplicates and contradictions included.

    Args:
        clean, repaired (`Dataset`):
            Good rows of [`validate`], which are not checked again but compared, and fixed rows of its quarantine.
        token_counter, image_root, image_options, image_check, max_length, duplicates (*optional*):
            As in [`validate`].
        num_proc, report_file, quarantine_file, show (*optional*):
            As in [`validate`].

    Returns:
        `tuple[Dataset, Dataset]`: `clean` and behind it the rows that are good now, and the others. Their `row` is the
        index in the two sets joined, so that of the first fixed row is `len(clean)`.

    Raises:
        `ValueError`: if the columns of the two sets differ, or if options do not fit.
    """
    options = with_image_root(image_options, image_root)
    checks = RowChecks(options, image_check, token_counter, max_length, duplicates)
    repaired = repaired.remove_columns([name for name in NOTES if name in repaired.column_names])
    if differing := sorted(set(clean.column_names) ^ set(repaired.column_names)):
        raise ValueError(f"Only one of `clean` and `repaired` has the column `{differing[0]}`; give both the same.")
    _check_columns(clean, checks)
    if repaired.features != clean.features:
        repaired = repaired.with_format(None).cast(clean.features)
    joined = concatenate_datasets([clean, repaired.with_format(**clean.format)])
    divided = _divide(joined, checks, num_proc, num_checked=len(clean))
    return _reported(*divided, report_file, quarantine_file, show)


def _check_columns(dataset: AnyDataset, checks: RowChecks) -> None:
    if (columns := dataset.column_names) is None:  # of a streamed set that does not tell
        return
    if not set(SIDES) <= set(columns):
        message = f"The set has the columns {', '.join(columns)}; it needs `chosen` and `rejected`."
        raise ValueError(f"{message} Text-to-image pairs become such rows by `reformulate_t2i`.")
    check_free(columns, NOTES)
    if checks.token_counter is not None and checks.max_length is not None and {"image", "images"} & set(columns):
        from transformers import ProcessorMixin  # loaded already, by what has made the counter

        if not isinstance(checks.token_counter.processing_class, ProcessorMixin):
            raise ValueError("`max_length` counts image tokens; pass the processor, and not only its tokenizer.")


def _divide(
    dataset: Dataset, checks: RowChecks, num_proc: int | None, num_checked: int = 0
) -> tuple[Dataset, Dataset]:
    """Divide a data set into good rows and quarantine; the first `num_checked` rows are known to be good."""
    kwargs = {"with_indices": True, "fn_kwargs": {"checks": checks, "num_checked": num_checked}}
    results = map_tables(dataset, _check_table, _RESULT, num_proc=num_proc, desc="Checking rows", **kwargs)
    is_bad = pc.not_equal(results["reason"], "").to_numpy()
    faults = results.select(["reason", "message"]).filter(pa.array(is_bad)).to_pylist()
    errors = {row: RowError(**fault) for row, fault in zip(np.flatnonzero(is_bad), faults, strict=True)}
    if checks.duplicates:
        high, low, is_swapped, is_mirror = (results[name].to_numpy() for name in _DIGEST)
        del results  # the largest thing in memory, if the set is large
        repeats = find_duplicates(high, low, is_swapped, is_bad, is_mirror)
        others = dataset.select(repeats.others)
        ids = column_of(others, "pair_id").to_pylist() if "pair_id" in others.column_names else [None] * len(others)
        names = map(row_name, ({"pair_id": pair_id} for pair_id in ids), repeats.others)
        errors |= zip(repeats.rows, map(duplicate_error, names, repeats.is_contradiction), strict=True)
        is_bad[repeats.rows] = True
    rows = np.flatnonzero(is_bad)
    notes = {"reason": [errors[row].reason for row in rows], "message": [str(errors[row]) for row in rows]}
    quarantine = quarantined_rows(dataset, rows, notes)
    return mark_checked(dataset.select(np.flatnonzero(~is_bad)) if len(rows) else dataset), quarantine


def _reported(
    clean: Dataset,
    quarantine: Dataset,
    report_file: str | os.PathLike | None,
    quarantine_file: str | os.PathLike | None,
    show: bool,
) -> tuple[Dataset, Dataset]:
    if quarantine_file is not None:
        write_quarantine(quarantine, quarantine_file)
    if report_file is None and not show:  # counting takes time
        return clean, quarantine
    report = quarantine_report(clean, quarantine)
    if report_file is not None:
        with whole_file(report_file) as part:
            part.write_text(report.to_json() + "\n", encoding="utf-8")
    if show:
        report.show()
    return clean, quarantine
