"""All that is checked about a row alone: its columns, its images, the length of its conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .arrow_rows import arrow_rows, look_at_all
from .duplicates import pair_digest
from .encoded import is_checked
from .errors import RowError
from .images import check_image, load_image
from .locations import ImageOptions
from .rows import SIDES, row_images, row_name, row_videos
from .schema import check_row, check_special_tokens, special_token_pattern


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
class TokenCounter:
    """
    A model as a reader of rows; [`~trl_dt2it.token_counter`] makes it.

    Parameters:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Its processor or tokenizer, whose special tokens no text may contain.
        check (`Callable`):
            Takes a row, and raises a [`RowError`] if its two answers are one to the model.
        count (`Callable`):
            Takes a row and [`ImageOptions`], and gives the numbers of tokens of prompt and chosen, and of prompt and
            rejected, image tokens included.
    """

    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    check: Callable[[Mapping[str, Any]], None]
    count: Callable[[Mapping[str, Any], ImageOptions], tuple[int, int]]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of a processor too."""
        return getattr(self.processing_class, "tokenizer", self.processing_class)


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
        token_counter ([`TokenCounter`], *optional*):
            Finds answers that are one to the model, and counts tokens.
        max_length (`int`, *optional*):
            Most tokens of a conversation, image tokens included.
    """

    image_options: ImageOptions
    image_check: ImageCheck = "header"
    special_tokens: re.Pattern | None = None
    token_counter: TokenCounter | None = None
    max_length: int | None = None

    def fault(self, row: Mapping[str, Any], is_checked: bool = False) -> RowError | None:
        """The first reason why a row cannot be used, or `None`; [`check_row`] may have passed it before."""
        try:
            if not is_checked:
                check_row(row, special_tokens=self.special_tokens)
            elif self.special_tokens is not None:
                check_special_tokens(row, self.special_tokens)
            if self.image_check != "none":
                frames = (frame for video in row_videos(row) for frame in video.frames)
                for image in (*row_images(row), *frames):
                    (load_image if self.image_check == "full" else check_image)(image, self.image_options)
            if self.token_counter is not None:
                self.token_counter.check(row)
                if self.max_length is not None:
                    self._check_length(row, self.token_counter, self.max_length)
        except RowError as error:
            return error
        return None

    def _check_length(self, row: Mapping[str, Any], token_counter: TokenCounter, max_length: int) -> None:
        try:
            counts = token_counter.count(row, self.image_options)
        except RowError as error:
            # It names the row, which the quarantine does too.
            raise RowError(error.reason, str(error).removeprefix(f"{row_name(row)}: ")) from error
        for side, count in zip(SIDES, counts, strict=True):
            if count > max_length:
                raise RowError(
                    "too_long", f"prompt and `{side}` have {count} tokens, more than {max_length}; shorten the text."
                )


def make_checks(
    token_counter: TokenCounter | None, image_options: ImageOptions, image_check: ImageCheck, max_length: int | None
) -> RowChecks:
    """Make the checks that the options of [`validate`] ask for; a `ValueError` says which do not fit."""
    if image_check not in ("header", "full", "none"):
        raise ValueError(f'`image_check` is {image_check!r}; it must be "header", "full" or "none".')
    if max_length is not None and max_length < 1:
        raise ValueError(f"`max_length` is {max_length}; it must be at least 1.")
    if token_counter is None:
        if max_length is not None:
            raise ValueError("`max_length` counts tokens; give the model's processor in a `token_counter` too.")
        return RowChecks(image_options, image_check)
    special_tokens = special_token_pattern(token_counter.tokenizer)
    return RowChecks(image_options, image_check, special_tokens, token_counter, max_length)


def find_faults(
    dataset: Dataset, checks: RowChecks, duplicates: bool, num_proc: int | None, num_checked: int = 0
) -> pa.Table:
    """Check all rows of a data set but the first `num_checked`, which are known to be good: for each row `reason` and
    `message`, "" if nothing is wrong, and what [`pair_digest`] gave, the key in two halves, `high` and `low`."""
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
        has_form=is_checked(dataset),
    )


def _check_table(
    table: pa.Table,
    indices: list[int],
    checks: RowChecks,
    duplicates: bool,
    num_checked: int,
    has_form: bool,
    json_columns: Features,
) -> pa.Table:
    verdicts = []
    for row, index in zip(arrow_rows(table, json_columns), indices, strict=True):
        error = None if index < num_checked else checks.fault(row, has_form)
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
