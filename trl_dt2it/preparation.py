"""What happens to a data set before training: every row checked, bad ones refused or set aside, long ones left out.

Images stay undecoded; the collator decodes them, safely, when their batch comes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import PartialState
from datasets import Dataset, Image, IterableDataset, List
from transformers.utils import logging

from .collator import MultimodalPreferenceCollator
from .data.images import check_image
from .data.schema import RowError, check_row, row_images, row_name


logger = logging.get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset


def leave_images_encoded(dataset: AnyDataset) -> AnyDataset:
    """
    Casts `image` and `images` so that rows hold bytes and paths instead of decoded images.

    `datasets` decodes whatever a row points to, paths outside of the data set included; the collator's own loader
    does not.
    """
    features = dataset.features or {}
    if isinstance(features.get("image"), Image):
        dataset = dataset.cast_column("image", Image(decode=False))
    images = features.get("images")
    if isinstance(images, List) and isinstance(images.feature, Image):
        dataset = dataset.cast_column("images", List(Image(decode=False)))
    return dataset


def find_bad_row(row: dict[str, Any], *, collator: MultimodalPreferenceCollator, image_check: str) -> RowError | None:
    """The reason why a row cannot be trained on, or `None`. `image_check` is `"full"`, `"header"` or `"none"`."""
    try:
        if image_check == "full":
            collator.render(row)
        else:
            check_row(row, special_tokens=collator.special_tokens)
            if image_check == "header":
                for image in row_images(row):
                    check_image(image, collator.image_options)
    except RowError as error:
        return error
    return None


def set_bad_rows_aside(
    dataset: AnyDataset,
    *,
    name: str,
    collator: MultimodalPreferenceCollator,
    image_check: str,
    on_bad_row: str,
    output_dir: str,
    num_proc: int | None = None,
) -> AnyDataset:
    """
    Checks every row of a data set.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows as in the collator; a streamed set is checked as it streams.
        name (`str`):
            Name of the set in messages and files.
        collator ([`MultimodalPreferenceCollator`]):
            Knows the special tokens and where images may come from.
        image_check (`str`):
            `"full"`, `"header"` or `"none"`.
        on_bad_row (`str`):
            `"raise"` or `"quarantine"`.
        output_dir (`str`):
            Where the quarantine file goes.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `Dataset` or `IterableDataset`: the rows that can be trained on, in their order.

    Raises:
        `ValueError`: if a row is bad and `on_bad_row="raise"`, or if no good row is left.
    """

    def check(row: dict[str, Any]) -> dict[str, str]:
        error = find_bad_row(row, collator=collator, image_check=image_check)
        return {"reason": "", "message": ""} if error is None else {"reason": error.reason, "message": str(error)}

    if isinstance(dataset, IterableDataset):
        if on_bad_row == "raise":  # the collator does
            return dataset

        def keep(row: dict[str, Any]) -> bool:
            found = check(row)
            if found["reason"]:
                logger.warning(f"Left out of the {name} set: {row_name(row)}, {found['reason']}: {found['message']}")
            return not found["reason"]

        return dataset.filter(keep)

    with PartialState().main_process_first():
        found = dataset.map(
            check, remove_columns=dataset.column_names, num_proc=num_proc, desc=f"Checking {name} dataset"
        )
    bad = [index for index, reason in enumerate(found["reason"]) if reason]
    if not bad:
        return dataset
    counts = Counter(found["reason"][index] for index in bad)
    summary = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = f"{row_name(dataset[bad[0]], bad[0])}: {found['message'][bad[0]]}"
    if on_bad_row == "raise":
        raise ValueError(
            f"{len(bad)} of {len(dataset)} rows of the {name} set cannot be used ({summary}). The first, {first} Mend "
            'them, or set `on_bad_row="quarantine"` to leave them out.'
        )
    if len(bad) == len(dataset):
        raise ValueError(f"No row of the {name} set can be used ({summary}). The first, {first}")
    # The leading underscore keeps the file out of what is pushed to the Hub.
    path = Path(output_dir) / f"_quarantine_{name}.jsonl"
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for index in bad:
                entry = {"row": index, "pair_id": dataset[index].get("pair_id")}
                file.write(json.dumps({**entry, **found[index]}, ensure_ascii=False) + "\n")
        logger.warning(f"Left {len(bad)} of {len(dataset)} rows out of the {name} set ({summary}); listed in {path}.")
    return dataset.select(sorted(set(range(len(dataset))) - set(bad)))


def leave_out_long_rows(
    dataset: AnyDataset,
    *,
    name: str,
    collator: MultimodalPreferenceCollator,
    max_length: int,
    num_proc: int | None = None,
) -> AnyDataset:
    """
    Leaves out the pairs of which one side has more than `max_length` tokens, image tokens included.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Checked rows.
        name (`str`):
            Name of the set in messages.
        collator ([`MultimodalPreferenceCollator`]):
            Counts the tokens.
        max_length (`int`):
            Largest number of tokens of a conversation.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `Dataset` or `IterableDataset`: the other pairs.

    Raises:
        `ValueError`: if no pair is left.
    """

    def fits(row: dict[str, Any]) -> bool:
        return max(collator.lengths(row)) <= max_length

    if isinstance(dataset, IterableDataset):
        return dataset.filter(fits)
    with PartialState().main_process_first():
        kept = dataset.filter(fits, num_proc=num_proc, desc=f"Filtering {name} >{max_length} tokens")
    if len(kept) < len(dataset):
        message = f"Left {len(dataset) - len(kept)} of {len(dataset)} pairs out of the {name} set: longer than "
        message += f"{max_length} tokens."
        if len(kept) == 0:
            raise ValueError(message + " None is left; raise `max_length`, or lower `max_pixels`.")
        logger.warning(message)
    return kept
