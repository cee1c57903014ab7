"""How many tokens a pair has, image tokens included, and how many it adds to a batch.

Where the processor tells the number of an image's tokens from its size, the image is not decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset, Features, Value
from datasets.table import InMemoryTable
from transformers.utils import logging

from .collator import MultimodalPreferenceCollator
from .data.columns import look_at_rows
from .data.images import ImageOptions, check_image
from .data.rows import RowError, check_row, row_images, row_name
from .data.validation import TokenCounter
from .models.families import FAMILIES
from .models.rendering import ProcessingClass, check_difference, encode_branches, get_tokenizer, render_branches
from .models.shared_prefix import common_prefix_length
from .reward_config import MultimodalRewardConfig


logger = logging.get_logger(__name__)

# Of the processors that tell the number of an image's tokens from its size; the others have to see the pixels.
UNCOUNTED_TOKENS = {
    family.processor: family.uncounted_tokens for family in FAMILIES.values() if family.uncounted_tokens is not None
}


class PairTokens(NamedTuple):
    """Tokens of the chosen and of the rejected conversation, and how many one row per pair shares: as many as both
    have in common from their start, or -1 if the pair needs two rows because the two differ before an image."""

    chosen: int
    rejected: int
    shared: int


_COUNTS = Features({name: Value("int64") for name in PairTokens._fields})


def count_tokens(
    row: Mapping[str, Any], collator: MultimodalPreferenceCollator, is_checked: bool = False
) -> PairTokens:
    """
    Counts the tokens of a preference row, nothing truncated.

    Args:
        row (`Mapping[str, Any]`):
            As the collator takes it.
        collator ([`~trl_dt2it.collator.MultimodalPreferenceCollator`]):
            The collator that the row is for.
        is_checked (`bool`, *optional*, defaults to `False`):
            Whether [`~trl_dt2it.data.rows.check_row`] has passed the row before.

    Returns:
        [`PairTokens`]

    Raises:
        [`~trl_dt2it.data.rows.RowError`]: if the row cannot be used; the message names it. Where the images need not
        be decoded, they are not, and a truncated one passes.
    """
    processor = collator.processing_class
    if "chosen_ids" in row:
        return _compare([row["chosen_ids"], row["rejected_ids"]], set())
    images = row_images(row)
    if row.get("videos") or (images and type(processor).__name__ not in UNCOUNTED_TOKENS):
        tokens, _ = encode_branches([collator.render(row, is_checked=is_checked)], processor)
        return _compare([branch[0]["input_ids"].tolist() for branch in tokens], collator.image_token_ids)
    try:
        if not is_checked:
            check_row(row, special_tokens=collator.special_tokens)
        sizes = [check_image(image, collator.image_options) for image in images]
    except RowError as error:
        raise RowError(error.reason, f"{row_name(row, None)}: {error}") from error

    rendered = render_branches(row, cast(Any, sizes), processor)  # of the images, only the number counts
    tokenizer = get_tokenizer(processor)
    branches = tokenizer(rendered.texts, add_special_tokens=rendered.add_special_tokens)["input_ids"]
    if not images:
        return _compare(branches, set())
    counting = cast(Any, processor)  # ProcessorMixin does not have what follows, the listed ones do
    counted = counting._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
    uncounted = UNCOUNTED_TOKENS[type(processor).__name__]
    extra = [number + uncounted - 1 for number in counted["num_image_tokens"]]  # beyond the placeholder
    placeholder = cast(int, tokenizer.convert_tokens_to_ids(counting.image_token))
    return _compare(branches, {placeholder}, extra)


def token_counter(processing_class: ProcessingClass) -> TokenCounter:
    """
    Make what [`~trl_dt2it.data.validate`] asks about special tokens, equal answers and lengths.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model, or tokenizer of a text model.

    Returns:
        [`~trl_dt2it.data.TokenCounter`]
    """
    collator = MultimodalPreferenceCollator(processing_class)
    return TokenCounter(processing_class, partial(_check, processing_class), partial(_count, collator))


def _check(processing_class: Any, row: Mapping[str, Any]) -> None:
    if isinstance(row["chosen"], str) or processing_class.chat_template is not None:
        check_difference(row, processing_class)


def _count(
    collator: MultimodalPreferenceCollator, row: Mapping[str, Any], image_options: ImageOptions
) -> tuple[int, int]:
    collator.image_options = image_options
    return count_tokens(row, collator, is_checked=True)[:2]


def _compare(branches: list[list[int]], image_ids: set[int], extra: list[int] | None = None) -> PairTokens:
    """Measures two token lists; `extra` says for each image by how much its one placeholder is too short."""
    shared = common_prefix_length([torch.tensor(ids) for ids in branches])
    inside = sum(token in image_ids for token in branches[0][:shared])
    behind = any(token in image_ids for ids in branches for token in ids[shared:])
    total = sum(extra or [])
    own = shared + (sum(extra[:inside]) if extra else 0)
    return PairTokens(len(branches[0]) + total, len(branches[1]) + total, -1 if behind else own)


def pair_size(tokens: PairTokens, collator: MultimodalPreferenceCollator) -> int:
    """
    Number of tokens that a pair adds to a batch: with one row per pair what it shares once and both answers, with two
    rows twice the longer one, padding to a multiple included.

    Args:
        tokens ([`PairTokens`]):
            What [`count_tokens`] gave.
        collator ([`~trl_dt2it.collator.MultimodalPreferenceCollator`]):
            Knows how the pair will be laid out.

    Returns:
        `int`
    """
    if collator.share_prefix and tokens.shared >= 0:
        return tokens.chosen + tokens.rejected - tokens.shared
    multiple = collator.pad_to_multiple_of or 1
    return 2 * -(-max(tokens.chosen, tokens.rejected) // multiple) * multiple


def needs_lengths(args: MultimodalRewardConfig) -> bool:
    """Whether the batches of training depend on how long the pairs are."""
    by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    return by_length or args.max_tokens_per_batch is not None


def count_pairs(
    dataset: Dataset, *, name: str, collator: MultimodalPreferenceCollator, num_proc: int | None = None
) -> Dataset:
    """
    Counts the tokens of all pairs of a data set, which is left as it is. No process waits for another, and nothing is
    kept for the next run: an image file may change.

    Args:
        dataset (`Dataset`):
            Checked rows.
        name (`str`):
            Name of the set in messages.
        collator ([`MultimodalPreferenceCollator`]):
            The collator that the rows are for.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `Dataset`: with the columns of [`~trl_dt2it.token_counts.PairTokens`], in the same order.
    """
    counts = look_at_rows(
        dataset,
        lambda row: count_tokens(row, collator, True)._asdict(),
        _COUNTS,
        num_proc=num_proc,
        desc=f"Counting tokens of {name} dataset",
    )
    return Dataset(InMemoryTable(counts))


def pair_sizes(
    dataset: Dataset, counts: Dataset | None, *, collator: MultimodalPreferenceCollator, args: MultimodalRewardConfig
) -> list[int]:
    """
    Number of tokens that each pair of the training set adds to a batch.

    Args:
        dataset (`Dataset`):
            Prepared rows; a column `args.length_column_name` wins over what was counted.
        counts (`Dataset`, *optional*):
            What [`count_pairs`] gave for them.
        collator ([`MultimodalPreferenceCollator`]):
            Knows how the pairs will be laid out.
        args ([`MultimodalRewardConfig`]):
            `length_column_name` and `max_tokens_per_batch` are read.

    Returns:
        `list[int]`

    Raises:
        `ValueError`: if the column holds anything but positive integers.
    """
    name = args.length_column_name
    if name in dataset.column_names:
        sizes = dataset.with_format(None)[name][:]
        bad = next((index for index, size in enumerate(sizes) if not (isinstance(size, int) and size > 0)), None)
        if bad is not None:
            raise ValueError(
                f"The column `{name}` of the train set is taken for numbers of tokens, but row {bad} has "
                f"{sizes[bad]!r}; remove the column, or set `length_column_name` to another name."
            )
        logger.warning(f"The lengths of the pairs are taken from the column `{name}` of the train set.")
        return sizes
    sizes = []
    columns = [cast(Dataset, counts)[field][:] for field in PairTokens._fields]
    for tokens in map(PairTokens._make, zip(*columns, strict=True)):
        size = pair_size(tokens, collator)
        if collator.share_prefix and tokens.shared < 0:
            # It would give all of its batch two rows per pair, so it has to be alone.
            size = max(size, args.max_tokens_per_batch or 0)
        sizes.append(size)
    return sizes
