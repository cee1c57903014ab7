"""Batches of similar total size from pairs of very different length, the same plan on every process.

The plan is made once, from the lengths alone: pairs of nearly equal length share a window, every pair counts as much
as the longest of its window, and what is in the windows is packed into batches that stay under the cap. So the number
of batches is the same in every epoch, as the trainer needs it. What an epoch changes is which pair of a window goes
where, and the order of the steps; both follow from the seed and the epoch, so that no process has to ask another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.utils import logging

from .reward_config import MultimodalRewardConfig


logger = logging.get_logger(__name__)

# Within a window lengths differ by up to this share of the longest: more lets an epoch mix pairs more freely, and less
# leaves less room unused.
_WINDOW = 1 / 32


@dataclass
class BatchPlan:
    """
    Which window each place of each batch takes its pair from.

    Parameters:
        rows (`np.ndarray` of shape `(N,)`):
            Indices of all pairs, longest first; those of a window are neighbours.
        window (`np.ndarray` of shape `(N,)`):
            Number of the window of each.
        batches (`list[np.ndarray]`):
            For each batch the positions in `rows`, every position once. `world_size` batches that follow each other
            make up a step and are of similar size.
        world_size (`int`):
            Number of processes.
        num_too_long (`int`):
            Number of pairs that alone exceed the cap; each has a batch of its own.
    """

    rows: np.ndarray
    window: np.ndarray
    batches: list[np.ndarray]
    world_size: int
    num_too_long: int


def plan_batches(
    sizes: Sequence[int] | np.ndarray, max_tokens: int, *, world_size: int = 1, padded: bool = False
) -> BatchPlan:
    """
    Plans the batches of an epoch.

    Args:
        sizes (`Sequence[int]` of length N):
            Number of tokens of each pair.
        max_tokens (`int`):
            Largest size of a batch of more than one pair.
        world_size (`int`, *optional*, defaults to 1):
            Number of processes.
        padded (`bool`, *optional*, defaults to `False`):
            Whether a batch of n pairs costs n times its longest pair, instead of the sum of its pairs.

    Returns:
        [`BatchPlan`]: as few batches as packing finds, filled evenly; their number is a multiple of `world_size`.

    Raises:
        `ValueError`: if there are fewer pairs than processes, or if `max_tokens` leaves nearly each pair a batch of
        its own, so that their number cannot be made a multiple of `world_size`.
    """
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
    sizes are taken together and equal batches are made together, so that it takes no time a pair."""
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
    """
    Gives one process its batches of a plan.

    It is a `BatchRebalanceSampler` in name alone: the trainer takes that for a sampler that knows its process, and
    hands it to the data loader as it is.

    Args:
        plan ([`BatchPlan`]):
            The plan, the same on every process.
        rank (`int`, *optional*, defaults to 0):
            Which process this is.
        seed (`int`, *optional*, defaults to 0):
            Seed of the epochs' permutations.
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
    torch's global generator, so that a resumed run would go on with other pairs."""

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
    processes, the trainer does not reach it."""

    def __init__(self) -> None:
        self.sampler: Any = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(int(state.epoch))


def training_sampler(sizes: list[int], plan: BatchPlan | None, args: MultimodalRewardConfig) -> Sampler | None:
    """
    The sampler of the training pairs that ours is needed for.

    Args:
        sizes (`list[int]`):
            Number of tokens of each pair.
        plan ([`BatchPlan`], *optional*):
            What [`plan_training`] gave.
        args ([`MultimodalRewardConfig`]):
            `train_sampling_strategy`, the seeds, the batch size and the process are read.

    Returns:
        `Sampler`, *optional*: `None` where transformers' own will do.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    if plan is not None:
        return TokenBatchSampler(plan, rank=args.process_index, seed=seed)
    if args.train_sampling_strategy == "group_by_length":
        size = args.train_batch_size * args.gradient_accumulation_steps
        return EpochLengthGroupedSampler(size, sizes, seed=seed)
    return None
