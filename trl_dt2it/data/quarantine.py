"""Rows set aside, each with its reason, and what they add up to: a table on screen and JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..printable import printable
from .encoded import column_of, leave_images_encoded
from .rows import row_name
from .whole_file import whole_file


# What a row that was set aside has besides its own columns.
NOTES = Features({"row": Value("int64"), "reason": Value("string"), "message": Value("string")})
_ROW_GROUP = 100  # rows that a reader of a file holds at once; each may have images of some megabytes


@dataclass(frozen=True)
class ReasonSummary:
    """
    The rows of one reason.

    Parameters:
        count (`int`):
            How many there are.
        share (`float`):
            Their share of the rows that came in, from 0 to 1.
        example (`str`):
            Name of the first one.
        message (`str`):
            What is wrong with it.
    """

    count: int
    share: float
    example: str
    message: str


@dataclass(frozen=True)
class ValidationReport:
    """
    What came in, what went out, and why the rest did not.

    Parameters:
        rows_in (`int`):
            Number of rows that were looked at.
        rows_out (`int`):
            Number of those that can be used.
        reasons (`dict[str, ReasonSummary]`):
            The others by reason, the most frequent first.
        sources (`dict[str, dict[str, int]]`):
            For each value of the column `source`, `rows_in`, `rows_out` and the number of rows of each reason; empty
            without such a column.
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
        """The report as JSON."""
        return json.dumps({**asdict(self), "counts": self.counts}, indent=2, ensure_ascii=False)

    def show(self, console: Console | None = None) -> None:
        """
        Prints the report.

        Args:
            console (`rich.console.Console`, *optional*):
                Where to; standard output by default.
        """
        console = console or Console()
        title = f"{self.rows_out} of {self.rows_in} rows can be used"
        if not self.reasons:
            console.print(f"{title}.")
            return
        table = Table("reason", title=title)
        for column in ("rows", "share"):
            table.add_column(column, justify="right")
        table.add_column("for example")
        for reason, summary in self.reasons.items():
            example = f"{summary.example}: {summary.message}"
            table.add_row(reason, str(summary.count), f"{summary.share:.2%}", Text(printable(example, 300)))
        console.print(table)
        if len(self.sources) > 1:
            by_source = Table("source")
            for column in ("rows in", "rows out"):
                by_source.add_column(column, justify="right")
            by_source.add_column("reasons")
            for source, numbers in self.sources.items():
                reasons = ", ".join(f"{numbers[reason]} {reason}" for reason in self.reasons if reason in numbers)
                by_source.add_row(
                    Text(printable(source, 300)), str(numbers["rows_in"]), str(numbers["rows_out"]), reasons or "none"
                )
            console.print(by_source)


def quarantine_report(clean: Dataset, quarantine: Dataset) -> ValidationReport:
    """
    Sums up what [`validate`] or [`decontaminate`] gave.

    Args:
        clean (`Dataset`):
            The rows that can be used.
        quarantine (`Dataset`):
            The others, with `row`, `reason` and `message`.

    Returns:
        [`ValidationReport`]
    """
    rows_in = len(clean) + len(quarantine)
    reasons = {}
    if len(quarantine):
        encoded = column_of(quarantine, "reason").dictionary_encode()
        # Codes are given in the order of first appearance.
        codes, firsts, counts = np.unique(encoded.indices.to_numpy(), return_index=True, return_counts=True)
        notes = quarantine.select_columns([*NOTES, *({"pair_id"} & set(quarantine.column_names))])
        for place in np.argsort(-counts, kind="stable"):
            first = notes[int(firsts[place])]
            reasons[encoded.dictionary[int(codes[place])].as_py()] = ReasonSummary(
                count=int(counts[place]),
                share=int(counts[place]) / rows_in,
                example=row_name(first, first["row"]),
                message=first["message"],
            )
    return ValidationReport(rows_in, len(clean), reasons, _by_source(clean, quarantine))


def check_free(columns: Sequence[str], features: Features) -> None:
    """Raises a `ValueError` if one of the `features` that notes will have is a column already."""
    if taken := [name for name in features if name in columns]:
        raise ValueError(
            f"The set has a column `{taken[0]}`, where what is wrong with a row is to be written; rename it, or use "
            "`readmit` for rows of a quarantine."
        )


def set_aside(dataset: Dataset, rows: np.ndarray, notes: Mapping[str, Any], features: Features = NOTES) -> Dataset:
    """
    Rows of a data set with notes beside them. Their images stay encoded, because some do not decode.

    Args:
        dataset (`Dataset`):
            The data set.
        rows (`np.ndarray` of type int64):
            Which rows.
        notes (`Mapping`):
            A list or array for each of the other columns.
        features (`Features`, *optional*):
            Types of the notes, `row` included.

    Returns:
        `Dataset`
    """
    encoded = leave_images_encoded(dataset.with_format(None))
    every = Features({**encoded.features, **features})
    if len(rows) == 0:  # which `concatenate_datasets` would leave without the notes
        return Dataset.from_dict({name: [] for name in every}, features=every)
    table = pa.table({"row": rows, **notes}).select(list(features)).cast(features.arrow_schema)
    return concatenate_datasets([encoded.select(rows), Dataset(table)], axis=1)


def write_quarantine(quarantine: Dataset, path: str | os.PathLike) -> None:
    """
    Writes rows into a Parquet file, whole or not at all, images as they are: bytes as bytes, paths as paths.

    Args:
        quarantine (`Dataset`):
            The rows.
        path (`str` or `os.PathLike`):
            File to write. `Dataset.from_parquet` reads it.
    """
    with whole_file(path) as part:
        quarantine.to_parquet(part, batch_size=_ROW_GROUP)


def _by_source(clean: Dataset, quarantine: Dataset) -> dict[str, dict[str, int]]:
    if "source" not in quarantine.column_names:
        return {}
    counts = column_of(clean, "source").value_counts().to_pylist()
    kept: Counter[str | None] = Counter({one["values"]: one["counts"] for one in counts})
    lost: dict[str | None, Counter[str]] = {source: Counter() for source in kept}
    bad = pa.table({name: column_of(quarantine, name) for name in ("source", "reason")})
    for one in bad.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist():
        lost.setdefault(one["source"], Counter())[one["reason"]] = one["count_all"]
    return {
        str(source): {"rows_in": kept[source] + reasons.total(), "rows_out": kept[source], **reasons}
        for source, reasons in lost.items()
    }
