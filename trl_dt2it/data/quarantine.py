"""The quarantine: rows that cannot be used, each with its reason, counted on screen and in JSON, and kept in a file.

Rows of which nothing is kept but their count are dropped rows.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from ..utils import printable, whole_file
from .encoded import column_of, leave_images_encoded, select_rows
from .errors import summarise
from .rows import row_name


logger = logging.get_logger(__name__)

# What a quarantined row has besides its own columns.
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


def quarantined_rows(
    dataset: Dataset, rows: np.ndarray, notes: Mapping[str, Any], features: Features = NOTES
) -> Dataset:
    """Select rows of a data set with notes beside them, a list or array for each of the `features`. Their images stay
    encoded, because some do not decode."""
    encoded = leave_images_encoded(dataset.with_format(None))
    every = Features({**encoded.features, **features})
    if len(rows) == 0:  # which `concatenate_datasets` would leave without the notes
        return Dataset.from_dict({name: [] for name in every}, features=every)
    table = pa.table({"row": rows, **notes}).select(list(features)).cast(features.arrow_schema)
    return concatenate_datasets([encoded.select(rows), Dataset(table)], axis=1)


def write_quarantine(quarantine: Dataset, path: str | os.PathLike) -> None:
    """Write rows into a Parquet file, whole or not at all, images as they are: bytes as bytes, paths as paths."""
    with whole_file(path) as part:
        quarantine.to_parquet(part, batch_size=_ROW_GROUP)


def take_out(
    dataset: Dataset,
    rows: Sequence[int] | np.ndarray,
    notes: Sequence[Mapping[str, Any]],
    *,
    name: str,
    on_bad_row: str = "quarantine",
    file: str | os.PathLike | None = None,
    appends: bool = False,
    advice: str = "",
    show: bool = True,
) -> Dataset:
    """
    Take bad rows out of a data set, list their notes (`pair_id`, `row`, `reason`, `message`) in a JSON lines file and
    warn, where `show` says so; or raise a `ValueError`, with `on_bad_row="raise"` or if no other row is left.

    Messages call the set by `name`, with the kind of its rows, such as `"pair of povid"`; an error ends with `advice`.
    """
    if len(rows) == 0:
        return dataset
    kind, of = name.split(" ", 1)
    summary = summarise(Counter(one["reason"] for one in notes))
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
                lines.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in notes)
            listed = f"; listed in {file}"
        logger.warning(f"Quarantined {len(rows)} of {len(dataset)} {kind}s {of} ({summary}){listed}. {first}")
    return select_rows(dataset, np.setdiff1d(np.arange(len(dataset)), rows))


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
