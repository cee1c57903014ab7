"""All that is checked about a row alone: its columns, its images, the length of its conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .arrow_rows import arrow_rows, look_at_all
from .duplicates import pair_digest
from .errors import RowError
from .images import check_image, load_image
from .locations import ImageOptions
from .rows import row_images, row_name, row_videos
from .schema import check_row


if TYPE_CHECKING:
    from ..collator import MultimodalPreferenceCollator


_FOUND = Features(
    {
        "reason": Value("string"),
        "message": Value("string"),
        "high": Value("uint64"),
        "low": Value("uint64"),
        "is_swapped": Value("bool"),
        "is_mirror": Value("bool"),
    }
)

ImageCheck = Literal["header", "full", "none"]


@dataclass(frozen=True)
class RowChecks:
    """
    What is checked about a row. It can be pickled, for worker processes.

    Parameters:
        image_options ([`ImageOptions`]):
            Where images may come from and how large they may be.
        image_check (`str`):
            `"full"` decodes every image, `"header"` reads its header, `"none"` leaves it alone.
        special_tokens (`re.Pattern`, *optional*):
            What no text may contain.
        collator ([`~trl_dt2it.collator.MultimodalPreferenceCollator`], *optional*):
            Renders rows, so that answers which its chat template makes equal are found, and counts tokens.
        max_length (`int`, *optional*):
            Most tokens of a conversation, image tokens included.
    """

    image_options: ImageOptions
    image_check: ImageCheck = "header"
    special_tokens: re.Pattern | None = None
    collator: MultimodalPreferenceCollator | None = None
    max_length: int | None = None

    def fault(self, row: Mapping[str, Any]) -> RowError | None:
        """The first reason why a row cannot be used, or `None`."""
        try:
            check_row(row, special_tokens=self.special_tokens)
            if self.image_check != "none":
                frames = (frame for video in row_videos(row) for frame in video.frames)
                for image in (*row_images(row), *frames):
                    (load_image if self.image_check == "full" else check_image)(image, self.image_options)
            if self.collator is not None:
                self._check_difference(row, self.collator.processing_class)
            if self.max_length is not None:
                self._check_length(row, self.max_length)
        except RowError as error:
            return error
        return None

    def _check_difference(self, row: Mapping[str, Any], processing_class: Any) -> None:
        from ..rendering import check_difference

        if isinstance(row["chosen"], str) or processing_class.chat_template is not None:
            check_difference(row, processing_class)

    def _check_length(self, row: Mapping[str, Any], max_length: int) -> None:
        from ..token_counts import count_tokens

        try:
            tokens = count_tokens(row, self.collator)  # type: ignore[arg-type]  # there is one if there is a length
        except RowError as error:
            # It names the row, which the quarantine does too.
            raise RowError(error.reason, str(error).removeprefix(f"{row_name(row)}: ")) from error
        for side, count in (("chosen", tokens.chosen), ("rejected", tokens.rejected)):
            if count > max_length:
                raise RowError(
                    "too_long", f"prompt and `{side}` have {count} tokens, more than {max_length}; shorten the text."
                )


def make_checks(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase | None,
    image_options: ImageOptions,
    image_check: ImageCheck,
    max_length: int | None,
) -> RowChecks:
    """
    Makes the checks that the options ask for.

    Args:
        processing_class, image_options, image_check, max_length:
            As in [`validate`].

    Returns:
        [`RowChecks`]

    Raises:
        `ValueError`: if an option is out of range, or `max_length` comes without `processing_class`.
    """
    if image_check not in ("header", "full", "none"):
        raise ValueError(f'`image_check` is {image_check!r}; it must be "header", "full" or "none".')
    if max_length is not None and max_length < 1:
        raise ValueError(f"`max_length` is {max_length}; it must be at least 1.")
    if processing_class is None:
        if max_length is not None:
            raise ValueError("`max_length` counts tokens; give the model's processor as `processing_class` too.")
        return RowChecks(image_options, image_check)
    # The collator imports this package.
    from ..collator import MultimodalPreferenceCollator

    collator = MultimodalPreferenceCollator(processing_class, image_options)
    return RowChecks(image_options, image_check, collator.special_tokens, collator, max_length)


def find_faults(
    dataset: Dataset, checks: RowChecks, duplicates: bool, num_proc: int | None, num_checked: int = 0
) -> pa.Table:
    """
    Checks all rows of a data set, in one pass over it.

    Args:
        dataset (`Dataset`):
            The data set.
        checks ([`RowChecks`]):
            What is checked about a row.
        duplicates (`bool`):
            Whether good rows are hashed.
        num_proc (`int`, *optional*):
            Number of processes.
        num_checked (`int`, *optional*, defaults to `0`):
            How many rows at the beginning are known to be good.

    Returns:
        `pa.Table`: for each row `reason` and `message`, "" if nothing is wrong, and what [`pair_digest`] gave: `high`
        and `low`, the halves of the key, `is_swapped` and `is_mirror`.
    """
    return look_at_all(
        dataset,
        _check_table,
        _FOUND,
        num_proc=num_proc,
        desc="Checking rows",
        with_indices=True,
        checks=checks,
        duplicates=duplicates,
        num_checked=num_checked,
    )


def _check_table(
    table: pa.Table,
    indices: list[int],
    checks: RowChecks,
    duplicates: bool,
    num_checked: int,
    json_columns: Features,
) -> pa.Table:
    verdicts = []
    for row, index in zip(arrow_rows(table, json_columns), indices, strict=True):
        error = None if index < num_checked else checks.fault(row)
        verdicts.append(_verdict(row, error, duplicates))
    columns = zip(*verdicts, strict=True)
    return pa.table(list(map(list, columns)), schema=_FOUND.arrow_schema)


def _verdict(row: Mapping[str, Any], error: RowError | None, duplicates: bool) -> tuple[Any, ...]:
    """The values of the columns of `_FOUND`."""
    if error is None and duplicates:
        try:
            key, *flags = pair_digest(row)
            return "", "", int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big"), *flags
        except RowError as unknown:  # an image without identity, which no check looked at
            error = unknown
    return *(("", "") if error is None else (error.reason, str(error))), 0, 0, False, False
