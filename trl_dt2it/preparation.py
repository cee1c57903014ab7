"""What happens to a data set before training: every row checked, bad ones refused or quarantined, long ones
dropped.

Images stay undecoded; the collator decodes them, safely, when their batch comes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Value
from datasets.table import InMemoryTable
from transformers import ProcessorMixin
from transformers.utils import logging

from .collator import MultimodalPreferenceCollator
from .data.columns import (
    AnyDataset,
    as_python,
    column_names,
    has_transform,
    leave_images_encoded,
    look_at_rows,
    look_in_shares,
)
from .data.images import ImageOptions
from .data.rows import RowError, row_name
from .data.validation import ImageCheck, make_checks, take_out
from .models.rendering import equal_when_rendered
from .reward_config import MultimodalRewardConfig
from .token_counts import count_pairs, count_tokens, needs_lengths, token_counter


logger = logging.get_logger(__name__)

# What training and evaluation read of a row; the trainer takes off all other columns.
COLUMNS = [
    *("prompt", "chosen", "rejected", "image", "images", "videos", "tools", "chat_template_kwargs"),
    *("strength", "weight", "margin", "source", "pair_id", "group_id", "category", "row_index", "chosen_ids"),
    "rejected_ids",
]

_FOUND = Features({"reason": Value("string"), "message": Value("string")})


def image_options(args: MultimodalRewardConfig) -> ImageOptions:
    """Where images may come from and how large they may be, as a configuration says."""
    hosts = tuple(args.allowed_image_hosts or ())
    return ImageOptions(args.image_root, max_image_pixels=args.max_image_pixels, allowed_hosts=hosts)


def prepare_dataset(
    dataset: AnyDataset, *, name: str, collator: MultimodalPreferenceCollator, args: MultimodalRewardConfig
) -> tuple[AnyDataset, Dataset | None]:
    """
    Makes a data set ready for the collator: every row checked, long ones dropped, images left encoded.

    Doing it twice is the same as doing it once.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Preference rows.
        name (`str`):
            Name of the set in messages and files; `"train"` is the one to train on.
        collator ([`MultimodalPreferenceCollator`]):
            The collator that the rows are for.
        args ([`MultimodalRewardConfig`]):
            `on_bad_row`, `image_check`, `max_length`, `max_tokens_per_batch`, `train_sampling_strategy`,
            `length_column_name`, `dataset_num_proc` and `output_dir` are read.

    Returns:
        `tuple`: the data set, and its numbers of tokens as [`count_pairs`] gives them, if anything asks for them.

    Raises:
        `ValueError`: if columns are missing, if there are images and the model reads text only, or as
        [`quarantine_bad_rows`] and [`drop_long_rows`] say.
    """
    dataset = rename_old_columns(leave_images_encoded(as_python(dataset)))
    columns = set(column_names(dataset))
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {name} set has no rows; check the split and the filters that it comes from.")
    if not {"chosen", "rejected"} <= columns and not {"chosen_ids", "rejected_ids"} <= columns:
        raise ValueError(
            f"The {name} set has the columns {', '.join(sorted(columns))}; it needs `chosen` and `rejected` (and "
            "`prompt`, unless both begin with it)."
        )
    for column in sorted(columns - set(COLUMNS)):
        # A slip costs a letter or two; `rejected_digits` is no misspelt `rejected_ids`.
        near = [name for name in COLUMNS if name not in columns and abs(len(name) - len(column)) <= 1]
        if close := get_close_matches(column, near, n=1, cutoff=0.8):
            logger.warning(
                f"The {name} set has a column `{column}`, which is not read; rename it if `{close[0]}` is meant."
            )
    if "chosen_ids" not in columns:
        if not isinstance(collator.processing_class, ProcessorMixin) and {"image", "images"} & columns:
            raise ValueError(
                f"The {name} set has images, but the model reads text only; use a vision-language model, or remove "
                "the column."
            )
        if collator.processing_class.chat_template is None and _is_conversational(dataset):
            raise ValueError(
                f"The {name} set holds messages, and the model has no chat template to render them with; set "
                "`chat_template_path`."
            )
    dataset = quarantine_bad_rows(
        dataset,
        name=name,
        collator=collator,
        image_check=args.image_check,
        on_bad_row=args.on_bad_row,
        output_dir=cast(str, args.output_dir),
        num_proc=args.dataset_num_proc,
    )
    counts = None
    needed = name == "train" and needs_lengths(args) and args.length_column_name not in columns
    if isinstance(dataset, Dataset) and (needed or args.max_length is not None):
        count = partial(count_pairs, name=name, collator=collator)
        table = look_in_shares(
            dataset, lambda part, num_proc: count(part, num_proc=num_proc).data.table, num_proc=args.dataset_num_proc
        )
        counts = Dataset(InMemoryTable(table))
    if args.max_length is not None:
        dataset, counts = drop_long_rows(
            dataset,
            counts,
            name=name,
            collator=collator,
            max_length=args.max_length,
            is_checked=args.on_bad_row == "quarantine",
        )
    return dataset, counts


def token_fault(row: Mapping[str, Any]) -> RowError | None:
    """The first reason why a row of tokens cannot be used, or `None`."""
    for side in ("chosen_ids", "rejected_ids"):
        if not row[side]:
            return RowError("empty_answer", f"`{side}` holds no tokens; drop the row.")
    return equal_when_rendered() if list(row["chosen_ids"]) == list(row["rejected_ids"]) else None


def _is_conversational(dataset: AnyDataset) -> bool:
    """Tell from the type of a column whether rows hold messages; `False` for a stream that does not know its types."""
    feature = (dataset.features or {}).get("chosen")
    return feature is not None and not isinstance(feature, Value)


def rename_old_columns(dataset: AnyDataset) -> AnyDataset:
    """Tokenized rows under the names that TRL gave them once, `chosen_input_ids` and `rejected_input_ids`, under those
    that it gives them today. Both sets of names may be there; today's count."""
    columns = set(column_names(dataset))
    old = {f"{side}_input_ids": f"{side}_ids" for side in ("chosen", "rejected")}
    if not set(old) <= columns or set(old.values()) <= columns:
        return dataset
    warnings.warn(
        "The columns `chosen_input_ids` and `rejected_input_ids` are deprecated and will not be supported in v1 of "
        "TRL; rename them to `chosen_ids` and `rejected_ids`.",
        FutureWarning,
        stacklevel=2,
    )
    return dataset.rename_columns(old)


def quarantine_bad_rows(
    dataset: AnyDataset,
    *,
    name: str,
    collator: MultimodalPreferenceCollator,
    image_check: str,
    on_bad_row: str,
    output_dir: str,
    num_proc: int | None = None,
) -> AnyDataset:
    """Check every row of a data set, or of a stream as it streams, and return those that can be trained on; a
    `ValueError` if a row is bad and `on_bad_row="raise"`, or if no good row is left."""

    reader = token_counter(collator.processing_class)
    checks = make_checks(reader, collator.image_options, cast(ImageCheck, image_check), None)

    def check(row: Mapping[str, Any]) -> dict[str, str]:
        error = checks.fault(row) if "chosen_ids" not in row else token_fault(row)
        return {"reason": "", "message": ""} if error is None else {"reason": error.reason, "message": str(error)}

    if isinstance(dataset, IterableDataset):
        if on_bad_row == "raise":  # the collator does
            return dataset

        def keep(row: dict[str, Any]) -> bool:
            found = check(row)
            if found["reason"]:
                logger.warning(f"Dropped from the {name} set: {row_name(row)}, {found['reason']}: {found['message']}")
            return not found["reason"]

        return dataset.filter(keep)

    look = partial(look_at_rows, function=check, features=_FOUND, desc=f"Checking {name} dataset")
    # Anew in each run: a file that an image is in may have been replaced.
    found = look_in_shares(dataset, look, num_proc=num_proc).to_pydict()
    bad = [index for index, reason in enumerate(found["reason"]) if reason]
    notes = [
        {
            "row": index,
            "pair_id": dataset[index].get("pair_id"),
            **{column: values[index] for column, values in found.items()},
        }
        for index in bad
    ]
    return take_out(
        dataset,
        bad,
        notes,
        name=f"row of the {name} set",
        on_bad_row=on_bad_row,
        # The leading underscore keeps the file out of what is pushed to the Hub.
        file=Path(output_dir) / f"_quarantine_{name}.jsonl",
        advice=' Fix them, or set `on_bad_row="quarantine"`.',
        show=PartialState().is_main_process,
    )


def drop_long_rows(
    dataset: AnyDataset,
    counts: Dataset | None,
    *,
    name: str,
    collator: MultimodalPreferenceCollator,
    max_length: int,
    is_checked: bool = True,
) -> tuple[AnyDataset, Dataset | None]:
    """Drop the pairs of which one side has more than `max_length` tokens, image tokens included, and their `counts`;
    rows of a stream are counted here, and `is_checked` tells whether they were checked before."""
    if counts is None:
        return dataset.filter(lambda row: max(count_tokens(row, collator, is_checked)[:2]) <= max_length), None
    longest = np.maximum(counts["chosen"][:], counts["rejected"][:])
    fitting = np.flatnonzero(longest <= max_length)
    kept = dataset.select(fitting)
    if len(kept) < len(dataset):
        message = f"Dropped {len(dataset) - len(kept)} of {len(dataset)} pairs of the {name} set: longer than "
        message += f"{max_length} tokens."
        if len(kept) == 0:
            raise ValueError(message + " None is left; raise `max_length`, or lower `max_pixels`.")
        logger.warning(message)
        return kept, counts.select(fitting)
    return dataset, counts


def plain_columns(dataset: AnyDataset, names: Sequence[str]) -> AnyDataset:
    """A data set of which columns can be read: where a transform makes the rows, what it gave under these names."""
    if not has_transform(dataset):
        return dataset
    there = [name for name in names if name in column_names(dataset)]
    # Every row is made for this, images and all.
    rows = [{name: row[name] for name in there} for row in cast(Dataset, dataset)] if there else []
    return Dataset.from_list(rows)
