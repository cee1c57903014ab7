"""Lengths of pairs, batches by number of tokens, and evaluation batches that hold every pair once."""

from __future__ import annotations

import copy
import math
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, starmap
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object, recursively_apply
from datasets import Dataset, Features, Value
from datasets.table import InMemoryTable
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.utils import logging

from ..data.columns import AnyDataset, look_at_rows
from ..data.images import ImageOptions, check_image
from ..data.rows import RowError, check_row, row_images, row_name
from ..data.validation import TokenCounter
from ..models.families import FAMILIES
from ..models.rendering import ProcessingClass, check_difference, encode_branches, get_tokenizer, render_branches
from ..models.shared_prefix import common_prefix_length
from .collator import MultimodalPreferenceCollator
from .config import MultimodalRewardConfig
from .metrics import BatchLoss, PairRecord, pair_records


logger = logging.get_logger(__name__)

# Of the processors that tell the number of an image's tokens from its size; the others have to see the pixels.
UNCOUNTED_TOKENS = {
    family.processor: family.uncounted_tokens for family in FAMILIES.values() if family.uncounted_tokens is not None
}


class PairTokens(NamedTuple):
    """Tokens of the chosen and of the rejected conversation, and how many one row per pair shares: as many as both
    have in common from their start, or -1 if the pair needs two rows because the two differ before an image.
    """

    chosen: int
    rejected: int
    shared: int


_COUNTS = Features({name: Value("int64") for name in PairTokens._fields})


def count_tokens(
    row: Mapping[str, Any], collator: MultimodalPreferenceCollator, is_checked: bool = False
) -> PairTokens:
    """Counts the tokens of a preference row, nothing truncated."""
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
    """Number of tokens that a pair adds to a batch: with one row per pair what it shares once and both answers, with
    two rows twice the longer one, padding to a multiple included.
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
    """Counts the tokens of all pairs of a data set, which is left as it is. No process waits for another, and nothing
    is kept for the next run: an image file may change.
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
    """Number of tokens that each pair of the training set adds to a batch."""
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


# Within a window lengths differ by up to this share of the longest: more lets an epoch mix pairs more freely, and less
# leaves less room unused.
_WINDOW = 1 / 32


@dataclass
class BatchPlan:
    """Which window each place of each batch takes its pair from."""

    rows: np.ndarray  # (N,): Indices of all pairs, longest first; those of a window are neighbours
    window: np.ndarray  # (N,): Number of the window of each
    # For each batch the positions in `rows`, every position once. `world_size` batches that follow each other make up
    # a step and are of similar size
    batches: list[np.ndarray]
    world_size: int  # Number of processes
    num_too_long: int  # Number of pairs that alone exceed the cap; each has a batch of its own


def plan_batches(
    sizes: Sequence[int] | np.ndarray, max_tokens: int, *, world_size: int = 1, padded: bool = False
) -> BatchPlan:
    """Plans the batches of an epoch."""
    lengths = np.asarray(sizes, dtype=np.int64)
    if len(lengths) < world_size:
        raise ValueError(f"{len(lengths)} pairs are too few for {world_size} processes; start at most as many.")
    rows = np.argsort(-lengths, kind="stable")
    window, planned = _windows(lengths[rows])
    pack = _pack_padded if padded else _pack

    fewest = len(pack(planned, max_tokens))
    wanted = _round_up(fewest, world_size)
    if wanted > len(lengths):
        raise ValueError(
            f"`max_tokens_per_batch={max_tokens}` makes {fewest} batches of {len(lengths)} pairs, which {world_size} "
            "processes cannot share evenly; raise it."
        )
    # The smallest cap that does not need more batches fills them evenly; otherwise the last ones would be left small.
    low, high = int(planned.sum()) // wanted, max_tokens
    while high - low > max_tokens // 512 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(pack(planned, middle)) <= wanted else (middle, high)
    batches = pack(planned, high)
    _split_largest(batches, planned, _round_up(len(batches), world_size), padded)
    batches.sort(key=lambda batch: -_cost(batch, planned, padded))
    return BatchPlan(rows, window, batches, world_size, int((lengths > max_tokens).sum()))


def plan_training(sizes: Sequence[int], max_tokens: int, *, world_size: int, padded: bool) -> BatchPlan:
    """As [`plan_batches`], telling on screen what became of the pairs."""
    plan = plan_batches(sizes, max_tokens, world_size=world_size, padded=padded)
    if plan.num_too_long:
        logger.warning(
            f"{plan.num_too_long} of {len(sizes)} pairs have more than `max_tokens_per_batch={max_tokens}` tokens; "
            "each has a batch of its own."
        )
    logger.info(f"Packed {len(sizes)} pairs into {len(plan.batches)} batches.")
    return plan


def _windows(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the window, and length of the window's longest pair, for lengths that do not rise."""
    starts, rising = [0], -lengths  # searching needs what rises
    while starts[-1] < len(lengths):
        shortest = lengths[starts[-1]] * (1 - _WINDOW)
        starts.append(int(np.searchsorted(rising, -shortest, side="right")))
    counts = np.diff(starts)
    return np.repeat(np.arange(len(counts)), counts), np.repeat(lengths[starts[:-1]], counts)


def _pack(planned: np.ndarray, cap: int) -> list[np.ndarray]:
    """First-fit decreasing, a batch at a time: the longest pair left, then always the longest that still fits. Equal
    sizes are taken together and equal batches are made together, so that it takes no time a pair.
    """
    sizes, starts, counts = np.unique(-planned, return_index=True, return_counts=True)
    keys, left, position = sizes.tolist(), counts.tolist(), starts.tolist()  # keys are negative sizes, rising
    batches: list[np.ndarray] = []
    first = 0
    while first < len(keys):
        content: list[tuple[int, int]] = []  # of which size, and how many
        room, index = cap, first
        while index < len(keys):
            # A pair that is too long has a batch of its own.
            number = min(left[index], max(room // -keys[index], int(not content)))
            if number:
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
    """Neighbours, as many as fit with the longest of them."""
    sizes = planned.tolist()
    batches, start = [], 0
    while start < len(sizes):
        stop = min(start + max(1, cap // sizes[start]), len(sizes))
        batches.append(np.arange(start, stop))
        start = stop
    return batches


def _cost(batch: np.ndarray, planned: np.ndarray, padded: bool) -> int:
    sizes = planned[batch]
    return int(len(sizes) * sizes.max() if padded else sizes.sum())


def _split_largest(batches: list[np.ndarray], planned: np.ndarray, number: int, padded: bool) -> None:
    """Halves the largest batches of more than one pair until there are `number`; changes the list."""
    while len(batches) < number:
        several = [index for index, batch in enumerate(batches) if len(batch) > 1]
        largest = batches.pop(max(several, key=lambda index: _cost(batches[index], planned, padded)))
        ordered = np.sort(largest)  # longest first
        if padded:
            batches += [ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]]
        else:
            batches += [ordered[::2], ordered[1::2]]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class TokenBatchSampler(BatchRebalanceSampler):
    """Gives one process its batches of a plan.

    It is a `BatchRebalanceSampler` in name alone: the trainer takes that for a sampler that knows its process, and
    hands it to the data loader as it is.
    """

    def __init__(self, plan: BatchPlan, *, rank: int = 0, seed: int = 0) -> None:
        self.plan = plan
        self.rank = rank
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.plan.batches) // self.plan.world_size

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        rows = self.plan.rows[np.lexsort((random.random(len(self.plan.rows)), self.plan.window))]
        for step in random.permutation(len(self)):
            yield rows[self.plan.batches[step * self.plan.world_size + self.rank]].tolist()


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler for `group_by_length`, with an order that follows from seed and epoch: it draws from
    torch's global generator, so that a resumed run would go on with other pairs.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class SetEpoch(TrainerCallback):
    """Tells the sampler of the training data the epoch: through the wrappers of a resumed run, or of several
    processes, the trainer does not reach it.
    """

    def __init__(self) -> None:
        self.sampler: Any = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(int(state.epoch))


def training_sampler(sizes: list[int], plan: BatchPlan | None, args: MultimodalRewardConfig) -> Sampler | None:
    """The sampler of the training pairs that ours is needed for."""
    seed = args.seed if args.data_seed is None else args.data_seed
    if plan is not None:
        return TokenBatchSampler(plan, rank=args.process_index, seed=seed)
    if args.train_sampling_strategy == "group_by_length":
        size = args.train_batch_size * args.gradient_accumulation_steps
        return EpochLengthGroupedSampler(size, sizes, seed=seed)
    return None


class Place(NamedTuple):
    """The position of a row in its set, -1 where the row only fills a batch, and how to read it: by its index, or, in
    a stream, the row itself.
    """

    position: int
    row: Any


class EvaluationRows(TorchDataset):
    """Rows of an evaluation set with their positions, read by [`Place`]."""

    def __init__(self, dataset: AnyDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(datasets.Dataset, self.dataset))  # a TypeError for a stream, which has no length

    def __getitem__(self, place: Place) -> tuple[int, dict[str, Any]]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[Place]) -> list[tuple[int, dict[str, Any]]]:
        rows = [place.row for place in places]
        if isinstance(self.dataset, datasets.Dataset):
            rows = self.dataset.__getitems__(rows)
        return list(zip((place.position for place in places), rows, strict=True))


class EvaluationBatches(Sampler[list[Place]]):
    """The batches of one process: of all batches of the set, in their order, every `num_processes`-th.

    A stream is read by the main process of each rank, whole, and its rows are sent to the workers, which decode and
    collate them. Otherwise `datasets` would spread the files over the workers and number the rows anew in each.
    """

    def __init__(self, dataset: AnyDataset, batch_size: int, process_index: int, num_processes: int) -> None:
        self.dataset = dataset
        self.size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.digest = 0  # of a stream, in the order in which it was read

    def __len__(self) -> int:
        batches = math.ceil(len(cast(datasets.Dataset, self.dataset)) / self.size)
        return math.ceil(batches / self.num_processes)

    def __iter__(self) -> Iterator[list[Place]]:
        places = starmap(Place, enumerate(self._rows()))
        first, count = None, 0
        while batch := list(islice(places, self.size)):
            first = first or batch[0]
            if count % self.num_processes == self.process_index:
                yield batch
            count += 1
        if first is not None and 0 < count % self.num_processes <= self.process_index:
            # Where the model is sharded, every process has to take part in each forward pass.
            yield [Place(-1, first.row)]

    def _rows(self) -> Iterator[Any]:
        if isinstance(self.dataset, datasets.Dataset):
            return iter(range(len(self.dataset)))
        return self._stream()

    def _stream(self) -> Iterator[Any]:
        whole, self.digest = self.dataset, 0
        if whole._distributed is not None:  # a user's `split_dataset_by_node`: the set itself is needed here
            whole = copy.copy(whole)
            whole._distributed = None
        for row in whole:
            text = repr([row.get(name) for name in ("prompt", "chosen", "rejected", "chosen_ids", "rejected_ids")])
            self.digest = zlib.crc32(text.encode(errors="replace"), self.digest)
            yield row


@dataclass
class PositionedCollator:
    """A collator that adds `positions` `(B,)` int64 to the `pairs` of another's batches."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        batch = self.collator([row for _, row in rows])
        batch["pairs"]["positions"] = torch.tensor([position for position, _ in rows])
        return batch


def evaluation_loader(
    dataset: AnyDataset,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    args: MultimodalRewardConfig,
    accelerator: Accelerator,
) -> DataLoader:
    """A data loader that gives every pair of a set once.

    It does not follow `dataloader_drop_last`, `dataloader_in_order`, `dataloader_persistent_workers` and, of
    `accelerator_config`, `even_batches` and `dispatch_batches`: they choose between ways to repeat or to drop pairs.
    """
    copies = num_copies(accelerator)
    num_processes = accelerator.num_processes // copies
    size = args.eval_batch_size
    if accelerator.split_batches:
        size = max(1, size // num_processes)
    loader = DataLoader(
        EvaluationRows(dataset),
        batch_sampler=EvaluationBatches(dataset, size, accelerator.process_index // copies, num_processes),
        collate_fn=PositionedCollator(collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_data_loader(loader, num_processes=1, process_index=0)


def num_copies(accelerator: Accelerator) -> int:
    """How many processes read the same batch, as under tensor parallelism; 1 under data parallelism alone."""
    mesh = accelerator.torch_device_mesh
    names = () if mesh is None else mesh.mesh_dim_names
    return math.prod(mesh[name].size() for name in names if not name.startswith("dp"))


class Evaluation:
    """What an evaluation keeps of its pairs, each process of its own, and what it gathers of every batch."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._is_copy = accelerator.process_index % num_copies(accelerator) != 0
        self._records: list[PairRecord] = []
        self._is_kept = True
        self._losses: torch.Tensor | None = None

    def add(self, pairs: Mapping[str, Any], found: BatchLoss) -> None:
        """Keep the records of a batch, of its `pairs` and of what [`batch_loss`] gave for them."""
        if "positions" in pairs:
            positions = pairs["positions"].tolist()
        else:  # a loader that is not of [`evaluation_loader`]
            positions = range(len(self._records), len(self._records) + len(found.losses))
        self._is_kept = min(positions) >= 0 and not self._is_copy
        self._losses = found.losses
        if self._is_kept:
            self._records += pair_records(positions, pairs, found)

    def gather(self, data: Any) -> Any:
        """Gather a batch of tensors from all processes, without those of batches that only fill the last step. It
        stands in for `gather_for_metrics`.
        """
        if self._losses is not None:
            # The first that Trainer gathers of a step is the mean of the losses, as often as a full batch has pairs.
            data, self._losses = self._losses, None
        return recursively_apply(self._gather, data)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        tensor = tensor[None] if tensor.ndim == 0 else tensor
        size = len(tensor) if self._is_kept else 0
        sizes = self.accelerator.gather(torch.tensor([size], device=tensor.device)).tolist()
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[:size] = tensor[:size]
        parts = self.accelerator.gather(padded).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def records(self, loader: DataLoader) -> list[PairRecord]:
        """The records of all processes, in the order of the set; every process must call it."""
        if len(set(gather_object([getattr(loader.batch_sampler, "digest", 0)]))) > 1:
            raise ValueError(
                "The processes have read the streamed evaluation set in different orders; pass a `seed` to its "
                "`shuffle`, or do not shuffle it."
            )
        return sorted(gather_object(self._records), key=lambda record: record.position)
