"""Rewards of both answers of every pair of a data set, as training computes them: one row per pair, without gradient.

Which pairs share a batch depends on the data set alone, and processes take turns with the batches; so each pair has
the same rewards on one process and on many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce, send_to_device
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollator

from .batch_loss import pair_rewards
from .data.encoded import leave_images_encoded
from .packing import plan_batches
from .token_counts import PairTokens, count_pairs, pair_size


if TYPE_CHECKING:
    from .reward_trainer import MultimodalRewardTrainer


def score_pairs(
    model: nn.Module,
    dataset: Dataset | Sequence[dict[str, Any]],
    collator: DataCollator,
    *,
    accelerator: Accelerator | None = None,
    batch_size: int = 8,
    max_tokens_per_batch: int | None = None,
    lengths: Sequence[int] | np.ndarray | None = None,
    num_workers: int = 0,
    desc: str = "Scoring",
    show_progress: bool = True,
) -> np.ndarray:
    """
    Rewards of chosen and rejected of N pairs.

    Every process has to call it; they share the pairs out among them. The random generators stay as they are, and so
    does the mode, training or evaluation, of each module of the model.

    Args:
        model (`nn.Module`):
            Reward model, wrapped or not, on its device.
        dataset (`Dataset` or `Sequence[dict]`):
            Preference rows, as the collator takes them.
        collator ([`MultimodalPreferenceCollator`]):
            The trainer's, or one that gives what that gives; with `share_prefix` the model has to be of a family that
            can read it.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Knows the processes. Without it, they are taken from [`~accelerate.PartialState`].
        batch_size (`int`, *optional*, defaults to `8`):
            Pairs per batch of a process.
        max_tokens_per_batch (`int`, *optional*):
            Packs each batch with as many pairs as have at most this many tokens together, in place of `batch_size`.
        lengths (`Sequence[int]` of length N, *optional*):
            Number of tokens of each pair, for `max_tokens_per_batch`; counted if not given.
        num_workers (`int`, *optional*, defaults to `0`):
            Number of processes that load and preprocess the rows.
        desc (`str`, *optional*, defaults to `"Scoring"`):
            What the progress bar says.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether the first process shows a progress bar.

    Returns:
        `np.ndarray` of shape `(N, 2)` and dtype `float32`: rewards of chosen and of rejected, in the order of the
        rows, the same on every process.
    """
    state = accelerator or PartialState()
    if isinstance(dataset, Dataset):
        dataset = leave_images_encoded(dataset)
    batches = _batches(dataset, collator, batch_size, max_tokens_per_batch, lengths)
    turns = -(-len(batches) // state.num_processes)
    # Where the model is sharded, all processes have to take part in as many forward passes.
    mine = [batches[min(turn * state.num_processes + state.process_index, len(batches) - 1)] for turn in range(turns)]
    loader = DataLoader(
        cast(Any, dataset),  # a sequence of rows will do
        batch_sampler=mine,
        collate_fn=collator,
        num_workers=num_workers,
        generator=torch.Generator(),  # without one of its own it would draw a seed from the global generator
    )
    device = next(model.parameters()).device
    rewards = torch.zeros(len(dataset), 2)
    hidden = not (show_progress and state.is_main_process)
    with torch.no_grad(), evaluating(model), tqdm(total=len(dataset), desc=desc, disable=hidden) as bar:
        for turn, inputs in enumerate(loader):
            number = len(inputs["pairs"]["weight"])
            tensors = send_to_device({name: value for name, value in inputs.items() if name != "pairs"}, device)
            found = pair_rewards(model, tensors, number)
            if turn * state.num_processes + state.process_index < len(batches):
                rewards[mine[turn]] = found[:, :number].T.cpu()
            bar.update(min(number * state.num_processes, len(dataset) - bar.n))
    # Each row stands on one process alone, so that the sum is exact.
    return reduce(rewards.to(state.device), "sum").cpu().numpy()


def score_with_trainer(
    trainer: MultimodalRewardTrainer,
    dataset: Dataset | Sequence[dict[str, Any]],
    lengths: Sequence[int] | np.ndarray | None = None,
    *,
    batch_size: int,
    desc: str = "Scoring",
) -> np.ndarray:
    """
    Rewards of N pairs by a trainer's model, as [`score_pairs`] gives them, with the trainer's collator, processes and
    settings.

    Args:
        trainer ([`MultimodalRewardTrainer`]):
            The trainer, in training or after it.
        dataset, lengths, batch_size, desc:
            As in [`score_pairs`].

    Returns:
        `np.ndarray` of shape `(N, 2)` and dtype `float32`.
    """
    args = trainer.args
    return score_pairs(
        trainer.model_wrapped,
        dataset,
        trainer.data_collator,
        accelerator=trainer.accelerator,
        batch_size=batch_size,
        max_tokens_per_batch=args.max_tokens_per_batch,
        lengths=lengths,
        num_workers=args.dataloader_num_workers,
        desc=desc,
        show_progress=not args.disable_tqdm,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets a model to evaluation, and afterwards each of its modules back to the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(
    dataset: Dataset | Sequence[dict[str, Any]],
    collator: Any,
    batch_size: int,
    max_tokens_per_batch: int | None,
    lengths: Sequence[int] | np.ndarray | None,
) -> list[list[int]]:
    if len(dataset) == 0:
        return []
    if max_tokens_per_batch is None:
        return [list(range(i, min(i + batch_size, len(dataset)))) for i in range(0, len(dataset), batch_size)]
    if lengths is None:
        counts = count_pairs(dataset, name="scored", collator=collator)
        columns = zip(*(counts[field][:] for field in PairTokens._fields), strict=True)
        lengths = [pair_size(PairTokens(*tokens), collator) for tokens in columns]
    plan = plan_batches(lengths, max_tokens_per_batch, padded=not collator.share_prefix)
    return [plan.rows[batch].tolist() for batch in plan.batches]
