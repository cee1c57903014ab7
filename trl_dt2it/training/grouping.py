"""Grouping: the pairs that share a prompt and answers, and the order in which an epoch reads them together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from torch.utils.data import Sampler
from transformers.utils import logging

from ..data.columns import (
    connected,
    group_codes,
    has_transform,
    look_at_rows,
    look_in_shares,
    row_groups,
    select_rows,
)
from ..data.contents import prompt_key
from ..data.controls import MEDIA
from ..data.rows import SIDES, to_json, without_empty
from ..utils import digest
from .collator import MultimodalPreferenceCollator
from .config import MultimodalRewardConfig


logger = logging.get_logger(__name__)

# Prompts of a step from which training learns as much as from as many pairs apart (`benchmarks/group_quality.py`).
FEW_PROMPTS = 16

_LOOKAHEAD = 64  # prompts among which one is looked for that fills a batch up


_PROMPT = Features({"prompt": Value("string")})
_TEXTS = Features({**_PROMPT, **dict.fromkeys(SIDES, Value("int64"))})


def groups_pairs(args: MultimodalRewardConfig, collator: MultimodalPreferenceCollator) -> bool:
    """Tell whether training brings the pairs of a prompt together."""
    # Batches by tokens are planned by the length of whole rows where each answer has one.
    fits = collator.share_prefix or args.max_tokens_per_batch is None
    return collator.group_pairs and fits and args.train_sampling_strategy in ("random", "group_by_length")


@dataclass
class Prompts:
    """The prompts of N pairs, and their answers."""

    number: np.ndarray  # (N,): of the prompt of each pair
    answers: np.ndarray  # (N, 2): numbers of both answers; equal ones of a prompt have one number

    def take(self, rows: np.ndarray) -> Prompts:
        return Prompts(self.number[rows], self.answers[rows])


def find_prompts(dataset: Dataset, *, num_proc: int | None = None) -> Prompts | None:
    """Number the prompts of a data set, with their images, and their answers; `None` if all prompts differ. Each
    process hashes its share."""
    if "chosen_ids" in dataset.column_names:
        return None
    if "group_id" in dataset.column_names and not has_transform(dataset):
        if len(np.unique(row_groups(dataset))) == len(dataset):  # within which pairs are grouped
            return None
    media = [] if has_transform(dataset) else [name for name in MEDIA if name in dataset.column_names]
    look = partial(look_at_rows, function=_texts, features=_TEXTS, desc="Finding pairs of one prompt")
    table = look_in_shares(dataset.remove_columns(media), look, num_proc=num_proc)
    number, _ = group_codes(table["prompt"].combine_chunks())
    repeated = np.flatnonzero(np.bincount(number)[number] > 1)
    if media and len(repeated):  # images are read of prompts alone whose text comes twice
        look = partial(look_at_rows, function=_prompt, features=_PROMPT, desc="Comparing their images")
        keys = look_in_shares(select_rows(dataset, repeated), look, num_proc=num_proc)["prompt"]
        number[repeated] = number.max() + 1 + group_codes(keys.combine_chunks())[0]
    if len(np.unique(number)) == len(number):
        return None
    nodes = np.stack([np.tile(number, 2), np.concatenate([table[side].to_numpy() for side in SIDES])])
    return Prompts(number, np.unique(nodes, axis=1, return_inverse=True)[1].reshape(2, -1).T)


def warn_of_few_prompts(prompts: Prompts, args: MultimodalRewardConfig) -> None:
    """Say where a step learns from so few prompts that it is better made of more pairs."""
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_prompt = len(prompts.number) / len(np.unique(prompts.number))
    if args.max_tokens_per_batch is None and 1.5 <= per_prompt and step < FEW_PROMPTS * per_prompt:
        logger.warning(
            f"The pairs of a prompt are read together, {per_prompt:.1f} on the mean, so that the {step} pairs of a "
            f"step are of about {step / per_prompt:.0f} prompts. That is little to learn from at a time: raise "
            "`per_device_train_batch_size` or `gradient_accumulation_steps`; pairs that share a prompt take less "
            "memory and time than others. `group_pairs=False` reads them apart."
        )


def warn_of_rankings(prompts: Prompts | None, is_grouped: bool, args: MultimodalRewardConfig) -> None:
    """Say where a listwise loss finds the answers of a prompt in several batches, or no prompt with several pairs."""
    about = f'`loss_type="{args.loss_type}"` compares the answers that the pairs of a prompt have in a batch, '
    most = 1 if prompts is None else int(np.bincount(prompts.number).max())
    if not is_grouped:
        logger.warning(
            f"{about}and nothing brings them together in a stream, with this `train_sampling_strategy`, or in batches "
            "by tokens of a family that does not share prompts; let them be neighbors."
        )
    elif most == 1:
        logger.warning(f"{about}but no two pairs of the train set have one in common, so that it is the same as `bt`.")
    elif args.max_tokens_per_batch is None and args.train_batch_size % most:
        logger.warning(
            f"{about}and `per_device_train_batch_size={args.per_device_train_batch_size}` divides some: there are up "
            f"to {most} pairs of one. Make it a multiple of that, or large, or set `max_tokens_per_batch`."
        )


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt_key(row)}


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    hashes = {side: int(digest(to_json(without_empty(row[side])), size=8), 16) - 2**63 for side in SIDES}
    return {**_prompt(row), **hashes}


@dataclass
class Units:
    """Pairs that are batched together; those of a unit share a prompt, and answers link them."""

    rows: np.ndarray  # (N,): the pairs of the first unit, of the second, ...
    start: np.ndarray  # (U + 1,): of each unit in `rows`
    sizes: np.ndarray  # (U,): number of tokens that each adds to a batch

    def pairs_of(self, units: np.ndarray) -> np.ndarray:
        return np.concatenate([self.rows[self.start[unit] : self.start[unit + 1]] for unit in units])


def make_units(prompts: Prompts, counts: pa.Table, sizes: Sequence[int], cap: int, max_answers: int) -> Units:
    """Divide pairs into units of at most `cap` tokens and `max_answers` answers, as far as pairs themselves are no
    longer. `sizes` `(N,)` are those of the pairs alone."""
    chosen, rejected, shared = (counts[name].to_numpy() for name in ("chosen", "rejected", "shared"))
    # Pairs that no answer links may begin differently, so that their common beginning is not known.
    linked = connected(int(prompts.answers.max()) + 1, *prompts.answers.T)[prompts.answers[:, 0]]
    order = np.argsort(linked, kind="stable")
    rows, start, found = [], [0], []
    for pairs in np.split(order, np.flatnonzero(np.diff(linked[order])) + 1):
        if len(pairs) == 1 or (shared[pairs] < 0).any():
            rows += pairs.tolist()
            start += (start[-1] + 1 + np.arange(len(pairs))).tolist()
            found += [sizes[pair] for pair in pairs]
            continue
        prefix = int(shared[pairs].min())  # of all: what links of a tree have in common, all have
        own: set[int] = set()
        size = 0
        for pair in pairs.tolist():
            ends = {
                answer: int(length) - prefix
                for answer, length in zip(prompts.answers[pair].tolist(), (chosen[pair], rejected[pair]), strict=True)
            }
            more = sum(length for answer, length in ends.items() if answer not in own)
            if own and (size + more > cap or len(own | ends.keys()) > max_answers):
                start.append(len(rows))
                found.append(size)
                own, size = set(), 0
            size = size + more if own else prefix + sum(ends.values())
            own |= ends.keys()
            rows.append(pair)
        start.append(len(rows))
        found.append(size)
    return Units(np.array(rows), np.array(start), np.array(found))


def arrange(rows: np.ndarray, prompts: np.ndarray, size: int) -> np.ndarray:
    """Bring the rows of one prompt together, in batches of `size`; `rows` are in a random order, and `prompts` `(N,)`
    are those of all rows. A prompt is divided where it has more pairs than fit, and where no other of the next
    prompts fills a batch up."""
    codes, start, count = np.unique(prompts[rows], return_index=True, return_counts=True)
    by_prompt = np.argsort(prompts[rows], kind="stable")
    groups = np.split(rows[by_prompt], np.cumsum(count)[:-1])
    waiting = deque(groups[number] for number in np.argsort(start, kind="stable"))
    arranged: list[np.ndarray] = []
    room = size
    while waiting:
        fits = (index for index, group in enumerate(islice(waiting, _LOOKAHEAD)) if len(group) <= room)
        index = 0 if room == size else next(fits, 0)
        group = waiting[index]
        del waiting[index]
        if len(group) > room:
            waiting.appendleft(group[room:])
            group = group[:room]
        arranged.append(group)
        room = room - len(group) or size
    return np.concatenate(arranged) if arranged else rows


@dataclass(eq=False)
class GroupedSampler(Sampler[int]):
    """All pairs of an epoch in random order, those of one prompt together."""

    prompts: np.ndarray  # (N,): number of the prompt of each pair
    batch_size: int
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def arrange(self, rows: np.ndarray) -> np.ndarray:
        return arrange(rows, self.prompts, self.batch_size)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from self.arrange(torch.randperm(len(self), generator=generator).numpy()).tolist()
