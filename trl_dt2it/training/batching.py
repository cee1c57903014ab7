"""Batching: token counts of pairs, batches by number of tokens, and evaluation batches with every pair once."""

from __future__ import annotations

import copy
import math
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise, starmap
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object, recursively_apply
from datasets import Dataset, Features, Value
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.utils import logging

from ..data.columns import AnyDataset, group_rows, look_at_rows, look_in_shares
from ..data.images import ImageOptions, check_image
from ..data.rows import check_row, named_errors, row_images
from ..data.validation import TokenCounter
from ..models.families import FAMILIES
from ..models.rendering import ProcessingClass, check_difference, encode_completions, get_tokenizer, render_pair
from ..models.shared_prefix import common_prefix_length
from .collator import MultimodalPreferenceCollator
from .config import MultimodalRewardConfig, Trainer
from .grouping import Units, arrange
from .losses import PairRecord


logger = logging.get_logger(__name__)

# By processors that count an image's tokens from its size; the others need the pixels.
UNCOUNTED_TOKENS = {
    family.processor: family.uncounted_tokens for family in FAMILIES.values() if family.uncounted_tokens is not None
}

# Lengths within a window differ by up to this share of the longest: more lets an epoch mix pairs more freely, less
# leaves less room unused.
_WINDOW = 1 / 32


class PairTokens(NamedTuple):
    """Numbers of tokens of both conversations, and of their common start; -1 if they differ before an image."""

    chosen: int
    rejected: int
    shared: int


_COUNTS = Features({name: Value("int64") for name in PairTokens._fields})


def count_tokens(
    row: Mapping[str, Any], collator: MultimodalPreferenceCollator, is_checked: bool = False
) -> PairTokens:
    """Count the tokens of a preference row, nothing truncated."""
    processor = collator.processing_class
    if "chosen_ids" in row:
        return _compare([row["chosen_ids"], row["rejected_ids"]], set())
    images = row_images(row)
    if row.get("videos") or (images and type(processor).__name__ not in UNCOUNTED_TOKENS):
        tokens, _ = encode_completions([collator.render(row, is_checked=is_checked)], processor)
        return _compare([side["input_ids"].tolist() for (side,) in tokens], collator.image_token_ids)
    with named_errors(row, None):
        if not is_checked:
            check_row(row, special_tokens=collator.special_tokens)
        sizes = [check_image(image, collator.image_options) for image in images]
    rendered = render_pair(row, cast(Any, sizes), processor)  # of the images, only the number counts
    tokenizer = get_tokenizer(processor)
    ids = tokenizer(rendered.texts, add_special_tokens=rendered.add_special_tokens)["input_ids"]
    if not images:
        return _compare(ids, set())
    counting = cast(Any, processor)  # ProcessorMixin lacks what follows, the listed processors have it
    counted = counting._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
    uncounted = UNCOUNTED_TOKENS[type(processor).__name__]
    extra = [number + uncounted - 1 for number in counted["num_image_tokens"]]  # beyond the placeholder
    return _compare(ids, {cast(int, tokenizer.convert_tokens_to_ids(counting.image_token))}, extra)


def token_counter(processing_class: ProcessingClass) -> TokenCounter:
    """
    Make the reader with which [`~trl_dt2it.data.validate`] checks special tokens, equal answers and lengths.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model, or tokenizer of a text model.

    Returns:
        [`~trl_dt2it.data.TokenCounter`]
    """
    return counter_of(MultimodalPreferenceCollator(processing_class))


def counter_of(collator: MultimodalPreferenceCollator) -> TokenCounter:
    """Make the reader of [`token_counter`] from a collator of the model."""
    check = partial(_check, collator.processing_class)
    return TokenCounter(collator.processing_class, check, partial(_count, collator))


def _check(processing_class: Any, row: Mapping[str, Any]) -> None:
    if isinstance(row["chosen"], str) or processing_class.chat_template is not None:
        check_difference(row, processing_class)


def _count(collator: Any, row: Mapping[str, Any], image_options: ImageOptions) -> tuple[int, int]:
    collator = copy.copy(collator)
    collator.image_options = image_options
    return count_tokens(row, collator, is_checked=True)[:2]


def _compare(sides: list[list[int]], image_ids: set[int], extra: list[int] | None = None) -> PairTokens:
    """Measure two token lists, in which each image's placeholder lacks `extra` tokens."""
    shared = common_prefix_length([torch.tensor(ids) for ids in sides])
    num_inside = sum(token in image_ids for token in sides[0][:shared])
    is_behind = any(token in image_ids for ids in sides for token in ids[shared:])
    extra = extra or []
    chosen, rejected = (len(ids) + sum(extra) for ids in sides)
    return PairTokens(chosen, rejected, -1 if is_behind else shared + sum(extra[:num_inside]))


def pair_size(tokens: PairTokens, collator: MultimodalPreferenceCollator, cap: int = 0) -> int:
    """Return the number of tokens that a pair adds to a batch of at most `cap`, padding to a multiple included."""
    if collator.share_prefix and tokens.shared >= 0:
        return tokens.chosen + tokens.rejected - tokens.shared
    multiple = collator.pad_to_multiple_of or 1
    size = 2 * -(-max(tokens.chosen, tokens.rejected) // multiple) * multiple
    # Among pairs that share, it would give all of its batch two rows per pair, so it fills a batch alone.
    return max(size, cap) if collator.share_prefix else size


def needs_lengths(args: MultimodalRewardConfig) -> bool:
    """Tell whether the batches of training depend on the lengths of the pairs."""
    by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    return by_length or args.max_tokens_per_batch is not None


def count_pairs(
    dataset: Dataset, *, name: str, collator: MultimodalPreferenceCollator, num_proc: int | None = None
) -> pa.Table:
    """Count the tokens of all pairs of a data set, in columns as [`PairTokens`]; each process counts its share."""
    # Nothing is kept for the next run: an image file may change.
    options = {"features": _COUNTS, "desc": f"Counting tokens of {name} dataset"}
    look = partial(look_at_rows, function=lambda row: count_tokens(row, collator, True)._asdict(), **options)
    return look_in_shares(dataset, look, num_proc=num_proc)


def pair_sizes(
    dataset: Dataset, counts: pa.Table | None, *, collator: MultimodalPreferenceCollator, args: MultimodalRewardConfig
) -> list[int]:
    """Return the number of tokens that each pair of the training set adds to a batch."""
    name = args.length_column_name
    if name not in dataset.column_names:
        tokens = map(PairTokens, *(cast(pa.Table, counts)[name].to_pylist() for name in PairTokens._fields))
        return [pair_size(pair, collator, args.max_tokens_per_batch or 0) for pair in tokens]
    sizes = dataset.with_format(None)[name][:]
    for index, size in enumerate(sizes):
        if not (isinstance(size, int) and size > 0):
            raise ValueError(
                f"The column `{name}` of the train set is taken for numbers of tokens, but row {index} has {size!r}; "
                "remove the column, or set `length_column_name` to another name."
            )
    logger.warning(f"The lengths of the pairs are taken from the column `{name}` of the train set.")
    return sizes


@dataclass
class BatchPlan:
    """The batches of every epoch; an epoch shuffles the pairs of each window."""

    rows: np.ndarray  # (N,): indices of all pairs, longest first; those of a window are neighbors
    window: np.ndarray  # (N,): number of the window of each
    # Positions in `rows` of each batch, every position once; `world_size` batches of similar size in a row make a step
    batches: list[np.ndarray]
    world_size: int  # number of processes
    num_too_long: int  # pairs that exceed the cap alone; each has its own batch
    units: Units | None = None  # of which `rows` are the indices, in place of pairs


def plan_batches(
    sizes: Sequence[int] | np.ndarray, max_tokens: int, *, world_size: int = 1, padded: bool = False
) -> BatchPlan:
    """Plan the batches of an epoch: of at most `max_tokens`, and equally many on each process."""
    lengths = np.asarray(sizes, dtype=np.int64)
    if len(lengths) < world_size:
        raise ValueError(f"{len(lengths)} pairs are too few for {world_size} processes; start at most as many.")
    rows = np.argsort(-lengths, kind="stable")
    window, planned = _windows(lengths[rows])
    pack = _pack_padded if padded else _pack

    fewest = len(pack(planned, max_tokens))
    if (wanted := _round_up(fewest, world_size)) > len(lengths):
        raise ValueError(
            f"`max_tokens_per_batch={max_tokens}` makes {fewest} batches of {len(lengths)} pairs, which {world_size} "
            "processes cannot share evenly; raise it."
        )
    # The smallest cap that needs no more batches fills them evenly; otherwise the last would be small.
    low, high = int(planned.sum()) // wanted, max_tokens
    while high - low > max_tokens // 512 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(pack(planned, middle)) <= wanted else (middle, high)
    batches = pack(planned, high)
    _split_largest(batches, planned, _round_up(len(batches), world_size), padded)
    batches.sort(key=lambda batch: -_cost(batch, planned, padded))
    return BatchPlan(rows, window, batches, world_size, int((lengths > max_tokens).sum()))


def plan_training(
    sizes: Sequence[int], max_tokens: int, *, world_size: int, padded: bool, units: Units | None = None
) -> BatchPlan:
    """Plan the batches of training, and report long pairs on screen."""
    planned = sizes if units is None else units.sizes
    plan = plan_batches(planned, max_tokens, world_size=world_size, padded=padded)
    plan.units = units
    if plan.num_too_long:
        long = f"{plan.num_too_long} of {len(sizes)} pairs have more than `max_tokens_per_batch={max_tokens}` tokens"
        logger.warning(f"{long}; each has a batch of its own.")
    logger.info(f"Packed {len(sizes)} pairs into {len(plan.batches)} batches.")
    return plan


def _windows(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the window's number and its longest length for each of some falling lengths."""
    starts, rising = [0], -lengths  # as `searchsorted` needs
    while starts[-1] < len(lengths):
        shortest = lengths[starts[-1]] * (1 - _WINDOW)
        starts.append(int(np.searchsorted(rising, -shortest, side="right")))
    counts = np.diff(starts)
    return np.repeat(np.arange(len(counts)), counts), np.repeat(lengths[starts[:-1]], counts)


def _pack(planned: np.ndarray, cap: int) -> list[np.ndarray]:
    """Pack by first-fit decreasing: the longest pair left, then always the longest that still fits."""
    # Equal sizes are taken together, and equal batches are made together.
    sizes, starts, counts = np.unique(-planned, return_index=True, return_counts=True)
    keys, left, position = sizes.tolist(), counts.tolist(), starts.tolist()  # keys are negative sizes, rising
    batches: list[np.ndarray] = []
    first = 0
    while first < len(keys):
        content: list[tuple[int, int]] = []  # index of a size, number of pairs
        room, index = cap, first
        while index < len(keys):
            # A pair that is too long has its own batch.
            if number := min(left[index], max(room // -keys[index], int(not content))):
                content.append((index, number))
                room += number * keys[index]
            index = max(index + 1, bisect_left(keys, -room)) if room > 0 else len(keys)
        repeats = min(left[index] // number for index, number in content)
        parts = []
        for index, number in content:
            parts.append(position[index] + np.arange(repeats * number).reshape(repeats, number))
            position[index] += repeats * number
            left[index] -= repeats * number
        batches += list(np.concatenate(parts, axis=1))
        while first < len(keys) and not left[first]:
            first += 1
    return batches


def _pack_padded(planned: np.ndarray, cap: int) -> list[np.ndarray]:
    """Pack neighbors, as many as fit when padded to the longest of them."""
    sizes, starts = planned.tolist(), [0]
    while starts[-1] < len(sizes):
        starts.append(min(starts[-1] + max(1, cap // sizes[starts[-1]]), len(sizes)))
    return [np.arange(start, stop) for start, stop in pairwise(starts)]


def _cost(batch: np.ndarray, planned: np.ndarray, padded: bool) -> int:
    sizes = planned[batch]
    return int(len(sizes) * sizes.max() if padded else sizes.sum())


def _split_largest(batches: list[np.ndarray], planned: np.ndarray, number: int, padded: bool) -> None:
    """Halve the largest batches of more than one pair until there are `number`, in place."""
    while len(batches) < number:
        several = [index for index, batch in enumerate(batches) if len(batch) > 1]
        largest = batches.pop(max(several, key=lambda index: _cost(batches[index], planned, padded)))
        ordered, half = np.sort(largest), len(largest) // 2  # longest first
        batches += [ordered[:half], ordered[half:]] if padded else [ordered[::2], ordered[1::2]]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(eq=False)
class TokenBatchSampler(BatchRebalanceSampler):
    """The batches of one process of a plan, in the order of an epoch."""

    # In name a `BatchRebalanceSampler`, because the trainer passes these to the data loader as they are.

    plan: BatchPlan
    rank: int = 0
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.plan.batches) // self.plan.world_size

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        rows = self.plan.rows[np.lexsort((random.random(len(self.plan.rows)), self.plan.window))]
        for step in random.permutation(len(self)):
            batch = rows[self.plan.batches[step * self.plan.world_size + self.rank]]
            yield (batch if self.plan.units is None else self.plan.units.pairs_of(batch)).tolist()


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler for `group_by_length`, with an order that follows from seed and epoch."""

    # transformers draws from torch's global generator, so that a resumed run would go on with other pairs.

    def __init__(self, batch_size: int, lengths: list[int], seed: int, prompts: np.ndarray | None = None) -> None:
        """`prompts` `(N,)` are numbers of those whose pairs come together; prompts are then grouped by length."""
        self.num_pairs, self.pairs_of_batch, self.prompts = len(lengths), batch_size, prompts
        if prompts is not None:
            self.members = group_rows(prompts)
            lengths = [max(lengths[row] for row in rows) for rows in self.members]
            batch_size = max(1, round(batch_size * len(lengths) / self.num_pairs))
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_pairs

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.prompts is None:
            return super().__iter__()
        rows = np.concatenate([self.members[number] for number in super().__iter__()])
        return iter(arrange(rows, self.prompts, self.pairs_of_batch).tolist())


class SetEpoch(TrainerCallback):
    """A callback that sets the epoch of the training sampler."""

    # The trainer does not reach the sampler through the wrappers of a resumed run or of several processes.

    sampler: Any = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(int(state.epoch))


@dataclass(eq=False)
class EvaluationRows(TorchDataset):
    """An evaluation set read by batches of positions with row indices, or of a stream's positions with its rows."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)  # a TypeError for a stream, which has no length

    def __getitems__(self, batch: Sequence[tuple[int, Any]]) -> list[tuple[int, dict[str, Any]]]:
        positions, rows = zip(*batch, strict=True)
        if isinstance(self.dataset, Dataset):
            rows = self.dataset.__getitems__(list(rows))
        return list(zip(positions, rows, strict=True))


@dataclass(eq=False)
class EvaluationBatches(Sampler[list[tuple[int, Any]]]):
    """Every `num_processes`-th batch of a set, as positions and row indices, or rows of a stream."""

    # Each rank's main process reads a stream whole and sends its rows to the workers, which decode and collate them.
    # Otherwise `datasets` would spread the files over the workers and number the rows anew in each.

    dataset: Any
    size: int
    process_index: int
    num_processes: int
    digest: int = 0  # of a stream, in the order in which it was read

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.size / self.num_processes)

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        rows = enumerate(range(len(self.dataset)) if isinstance(self.dataset, Dataset) else self._stream())
        first, count = None, 0
        while batch := list(islice(rows, self.size)):
            first = first or batch[0]
            if count % self.num_processes == self.process_index:
                yield batch
            count += 1
        if first is not None and 0 < count % self.num_processes <= self.process_index:
            # Where the model is sharded, every process has to take part in each forward pass. -1 marks a filler.
            yield [(-1, first[1])]

    def _stream(self) -> Iterator[Any]:
        whole, self.digest = self.dataset, 0
        if whole._distributed is not None:  # a user's `split_dataset_by_node`: the whole set is needed here
            whole = copy.copy(whole)
            whole._distributed = None
        for row in whole:
            text = repr([row.get(name) for name in ("prompt", "chosen", "rejected", "chosen_ids", "rejected_ids")])
            self.digest = zlib.crc32(text.encode(errors="replace"), self.digest)
            yield row


def _collate_positioned(collator: Callable[[list[Any]], dict[str, Any]], rows: Sequence[tuple[int, Any]]) -> Any:
    """Collate rows and add their `positions` `(B,)` int64 to the `pairs` of the batch."""
    batch = collator([row for _, row in rows])
    batch["pairs"]["positions"] = torch.tensor([position for position, _ in rows])
    return batch


def evaluation_loader(trainer: Trainer, dataset: AnyDataset) -> DataLoader:
    """Make a data loader that yields every pair of a set once."""
    # Ignored, because they choose how pairs are repeated or dropped: `dataloader_drop_last`, `dataloader_in_order`,
    # `dataloader_persistent_workers` and, of `accelerator_config`, `even_batches` and `dispatch_batches`.
    args, accelerator = trainer.args, trainer.accelerator
    copies = num_copies(accelerator)
    num_processes = accelerator.num_processes // copies
    size = max(1, args.eval_batch_size // (num_processes if accelerator.split_batches else 1))
    loader = DataLoader(
        EvaluationRows(dataset),
        batch_sampler=EvaluationBatches(dataset, size, accelerator.process_index // copies, num_processes),
        collate_fn=partial(_collate_positioned, trainer.data_collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_data_loader(loader, num_processes=1, process_index=0)


def num_copies(accelerator: Accelerator) -> int:
    """Count the processes that read the same batch: 1 but under tensor and the like parallelism."""
    mesh = accelerator.torch_device_mesh
    names = () if mesh is None else mesh.mesh_dim_names
    return math.prod(mesh[name].size() for name in names if not name.startswith("dp"))


class Evaluation:
    """The records of an evaluation, each process of its own pairs, and the gathering of its batches."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._is_copy = accelerator.process_index % num_copies(accelerator) != 0
        self._records: list[PairRecord] = []
        self._is_kept = True
        self._losses: torch.Tensor | None = None

    def add(self, pairs: Mapping[str, Any], *columns: torch.Tensor) -> None:
        """Keep the records of a batch from its `pairs` and, each `(B,)`, rewards of chosen and rejected, losses and
        weights."""
        if "positions" in pairs:
            positions = pairs["positions"].tolist()
        else:  # not of [`evaluation_loader`]
            positions = range(len(self._records), len(self._records) + len(columns[0]))
        self._is_kept = min(positions) >= 0 and not self._is_copy
        self._losses = columns[2]
        if self._is_kept:
            values = torch.stack(columns).tolist()
            self._records += starmap(PairRecord, zip(positions, *values, pairs["source"], strict=True))

    def gather(self, data: Any) -> Any:
        """Gather tensors of a batch from all processes, in place of `gather_for_metrics`, without fillers."""
        if self._losses is not None:
            # First Trainer gathers the mean loss of a step, repeated as often as a full batch has pairs.
            data, self._losses = self._losses, None
        return recursively_apply(self._gather, data)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        own = torch.atleast_1d(tensor)[: None if self._is_kept else 0]
        # By way of the CPU, because the processes have different numbers of pairs.
        return torch.cat(gather_object([own.detach().cpu()])).to(tensor.device)

    def records(self, loader: DataLoader) -> list[PairRecord]:
        """Return the records of all processes, in the order of the set; every process must call it."""
        if len(set(gather_object([getattr(loader.batch_sampler, "digest", 0)]))) > 1:
            raise ValueError(
                "The processes have read the streamed evaluation set in different orders; pass a `seed` to its "
                "`shuffle`, or do not shuffle it."
            )
        return sorted(gather_object(self._records), key=lambda record: record.position)
