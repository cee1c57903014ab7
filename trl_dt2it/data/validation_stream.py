"""A streamed preference set divided in two while it streams; see [`validate`]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Features, IterableDataset
from transformers.utils import logging

from .duplicates import contradiction_error, duplicate_error, pair_digest
from .encoded import is_checked, leave_images_encoded, mark_checked
from .errors import RowError, is_milestone
from .quarantine import NOTES
from .row_checks import RowChecks
from .rows import row_name


logger = logging.get_logger(__name__)


@dataclass
class StreamChecks:
    """The checks of a stream, with a memory of its rows: they are compared if `duplicates`, and bad ones logged if
    `show`."""

    checks: RowChecks
    duplicates: bool
    show: bool
    is_checked: bool
    _seen: dict[tuple[bytes, bool], tuple[int, bool, str]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The notes about a row: its place, and its reason and message, or twice "" if nothing is wrong."""
        if index == 0:  # the stream begins anew
            self._seen.clear()
            self._counts.clear()
        error = self.checks.fault(row, self.is_checked)
        if error is None and self.duplicates:
            error = self._compare(row, index)
        if error is None:
            return {"row": index, "reason": "", "message": ""}
        self._counts[error.reason] += 1
        count = self._counts[error.reason]
        if self.show and is_milestone(count):
            problem = f"{row_name(row, index)}, {error.reason}: {error}"
            logger.warning(f"Quarantined, {count} with this reason so far: {problem}")
        return {"row": index, "reason": error.reason, "message": str(error)}

    def _compare(self, row: Mapping[str, Any], index: int) -> RowError | None:
        try:
            key, is_swapped, is_mirror = pair_digest(row)
        except RowError as error:
            return error
        # A row in the other of both orders is no duplicate, but may contradict.
        place, was_swapped, name = self._seen.get((key, not is_mirror), (index, is_swapped, ""))
        if place < index and was_swapped != is_swapped:
            return contradiction_error(name)
        own = (index, is_swapped, row_name(row, index))
        place, was_swapped, name = self._seen.setdefault((key, is_mirror), own)
        if place >= index:  # the row itself, or one that a second iterator over the same stream has read ahead
            return None
        return duplicate_error(name) if was_swapped == is_swapped else contradiction_error(name)


def divide_stream(
    dataset: IterableDataset, checks: RowChecks, duplicates: bool, show: bool
) -> tuple[IterableDataset, IterableDataset]:
    """Divide a stream into good rows with their features, and bad rows with notes."""
    features, encoded = dataset.features, leave_images_encoded(dataset)
    noted = None if features is None else Features({**encoded.features, **NOTES})
    halves = []
    for is_good in (True, False):
        stream_checks = StreamChecks(checks, duplicates, show and is_good, is_checked(dataset))
        judged = encoded.map(stream_checks, with_indices=True, features=noted)
        halves.append(judged.filter(_has_no_reason if is_good else _has_reason, input_columns=["reason"]))
    good = halves[0].remove_columns(list(NOTES))
    return mark_checked(good if features is None else good.cast(features)), halves[1]


def _has_no_reason(reason: str) -> bool:
    return not reason


def _has_reason(reason: str) -> bool:
    return bool(reason)
