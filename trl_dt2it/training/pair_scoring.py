"""Rewards of both answers of every pair of a data set, as training computes them: one row per pair, without gradient.

Which pairs share a batch depends on the data set alone, and processes take turns with the batches; so each pair has
the same rewards on one process and on many. Tokens are counted and images decoded in the workers of a data loader. A
row that cannot be read on one process is an error on all of them, and before each batch they make sure that all have
theirs: none is left alone in a forward pass that all have to take part in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce, send_to_device
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from transformers import DataCollator, Trainer
from transformers.utils import logging

from ..data.columns import leave_images_encoded
from ..data.rows import row_name
from ..models.freezing import STATISTICS
from ..utils import gather, portable, raise_together
from .batching import count_tokens, pair_size, plan_batches
from .config import MultimodalRewardConfig
from .metrics import pair_rewards


logger = logging.get_logger(__name__)

ROWS_COUNTED_TOGETHER = 8


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
    """Rewards of chosen and rejected of N pairs.

    Every process has to call it; they share the pairs out among them, and before that the counting of their tokens.
    The random generators stay as they are, and so does the mode, training or evaluation, of each module of the model.

    Shapes: returns `(N, 2)` `float32`.
    """
    state = accelerator or PartialState()
    if isinstance(dataset, Dataset):
        dataset = leave_images_encoded(dataset)
    hidden = not (show_progress and state.is_main_process)
    loader = _Loader(_Attempts(dataset, collator), min(num_workers, len(dataset)))
    if max_tokens_per_batch is None:
        batches = _ranges(len(dataset), batch_size)
    elif len(dataset) == 0:
        batches = []
    else:
        if lengths is None:
            lengths = _count_sizes(loader, len(dataset), collator, max_tokens_per_batch, disable=hidden)
        plan = plan_batches(lengths, max_tokens_per_batch, padded=not cast(Any, collator).share_prefix)
        batches = [plan.rows[batch].tolist() for batch in plan.batches]
    turns = -(-len(batches) // state.num_processes)
    # Where the model is sharded, all processes have to take part in as many forward passes.
    mine = [batches[min(turn * state.num_processes + state.process_index, len(batches) - 1)] for turn in range(turns)]
    device = next(model.parameters()).device
    rewards = torch.zeros(len(dataset), 2)
    failure: Exception | None = None
    with torch.no_grad(), evaluating(model), tqdm(total=len(dataset), desc=desc, disable=hidden) as bar:
        for turn, (inputs, problem) in enumerate(loader.load(mine, is_batch=True)):
            raise_together(failure or problem)
            number = len(inputs["pairs"]["weight"])
            try:
                tensors = send_to_device({name: value for name, value in inputs.items() if name != "pairs"}, device)
                found = pair_rewards(model, tensors, number)
                if turn * state.num_processes + state.process_index < len(batches):
                    rewards[mine[turn]] = found[:, :number].T.cpu()
            except Exception as error:  # the others hear of it before their next batch
                failure = error
            bar.update(min(number * state.num_processes, len(dataset) - bar.n))
        raise_together(failure)
    # Each row stands on one process alone, so that the sum is exact.
    return reduce(rewards.to(state.device), "sum").cpu().numpy()


def score_with_trainer(
    trainer: Trainer,
    dataset: Dataset | Sequence[dict[str, Any]],
    lengths: Sequence[int] | np.ndarray | None = None,
    *,
    batch_size: int,
    desc: str = "Scoring",
) -> np.ndarray:
    """Rewards of N pairs by a trainer's model, as [`score_pairs`] gives them, with the trainer's collator, processes
    and settings.

    Shapes: returns `(N, 2)` `float32`.
    """
    args = cast(MultimodalRewardConfig, trainer.args)
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


def measure_reward_statistics(trainer: Trainer) -> dict[str, float] | None:
    """Mean and standard deviation of the rewards that a trainer's model gives both answers of its training pairs, as
    many of them as `reward_statistics_pairs` says.

    Every process has to call it, after training. The random generators stay as they are. The training is done, and
    nothing that goes wrong here may cost it: an error on any process becomes a warning on all of them.
    """
    try:
        return _measure(trainer)
    except Exception as error:
        logger.warning(
            "`reward_mean` and `reward_std` are left out of the trained model's configuration, because its training "
            f"pairs cannot all be scored: {type(error).__name__}: {error}"
        )
        return None


def _measure(trainer: Trainer) -> dict[str, float] | None:
    rows, lengths = _sample(trainer)
    if len(rows) == 0:
        return None
    rewards = score_with_trainer(
        trainer, rows, lengths, batch_size=trainer._train_batch_size, desc="Reward mean and std"
    ).astype(np.float64)
    if not np.isfinite(rewards).all():
        logger.warning("Some rewards of the training set are not finite, so that their mean is not written.")
        return None
    mean, std = float(rewards.mean()), float(rewards.std())
    if std <= 1e-6 * max(1.0, abs(mean)):  # equal, but for the rounding of different batches
        logger.warning(f"All rewards of the training set are {mean:g}; they cannot be normalised.")
        std = 0.0
    return dict(zip(STATISTICS, (mean, std), strict=True))


def _sample(trainer: Trainer) -> tuple[Sequence[Any] | Dataset, Any]:
    """Pairs to score, and their numbers of tokens if they are known."""
    args, dataset = cast(MultimodalRewardConfig, trainer.args), trainer.train_dataset
    most = args.reward_statistics_pairs
    if isinstance(dataset, IterableDataset):
        # Rows that were read before: a later one may be bad, and a training that is over must not fail by it.
        step = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows, failure = [], None
        try:
            rows = list(islice(dataset, min(most, trainer.state.global_step * step)))
        except Exception as error:
            failure = error
        raise_together(failure)
        # Where the stream was split over the processes, they may have different numbers of rows.
        return rows[: min(gather(len(rows)))], None
    dataset = cast("Dataset", dataset)
    counted = cast(Any, trainer)._lengths
    lengths = None if counted is None else np.asarray(counted)
    if most >= len(dataset):
        return dataset, lengths
    seed = args.seed if args.data_seed is None else args.data_seed
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), size=most, replace=False))
    return dataset.select(chosen), None if lengths is None else lengths[chosen]


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


class _Task(NamedTuple):
    """What a worker makes of some rows: a batch, or their numbers of tokens."""

    indices: list[int]
    is_batch: bool


@dataclass(frozen=True)
class _Attempts(TorchDataset):
    """Items of a data loader, each made of some rows; or in its place the error, because an error that is raised in a
    worker comes back as another, and one that is raised on a process leaves the other processes waiting.
    """

    rows: Any
    collator: Any

    def __getitem__(self, task: _Task) -> tuple[Any, Exception | None]:
        try:
            rows = [self._named(index) for index in task.indices]
            return self.collator(rows) if task.is_batch else [count_tokens(row, self.collator) for row in rows], None
        except Exception as error:
            return None, portable(error)

    def _named(self, index: int) -> dict[str, Any]:
        """The row, which an error calls by its index in the set where it has no `pair_id`, not by that in a batch."""
        row = self.rows[index]
        return {**row, "pair_id": row_name(row, index)}


class _Loader:
    """A data loader whose workers stay from the counting of tokens to the last batch."""

    def __init__(self, items: _Attempts, num_workers: int) -> None:
        self._tasks: list[_Task] = []
        self._loader = DataLoader(
            items,
            batch_size=None,
            sampler=self._tasks,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # without one of its own it would draw a seed from the global generator
        )

    def load(self, indices: list[list[int]], *, is_batch: bool) -> Iterator[tuple[Any, Exception | None]]:
        """Give the items in their order; a worker that dies is an error in the place of its item."""
        self._tasks[:] = [_Task(some, is_batch) for some in indices]
        loaded = None
        for _ in indices:
            try:
                loaded = iter(self._loader) if loaded is None else loaded
                item = next(loaded)
            except Exception as error:
                item = None, error
            yield item


def _as_it_is(item: Any) -> Any:
    return item


def _count_sizes(loader: _Loader, number: int, collator: Any, most: int, *, disable: bool) -> list[int]:
    """Count what each pair adds to a batch; each process counts its share. A pair that differs before its last image
    fills a batch, to be alone: it would give all of its batch two rows per pair.
    """
    state = PartialState()
    chunks = _ranges(number, ROWS_COUNTED_TOGETHER)
    mine = chunks[state.process_index :: state.num_processes]
    own: list[list[int]] = []
    failure = None
    with tqdm(total=number, desc="Counting tokens", disable=disable, leave=False) as bar:
        for counted, problem in loader.load(mine, is_batch=False):
            if problem is not None:
                failure = problem
                break
            sizes = [pair_size(tokens, collator) for tokens in counted]
            alone = [collator.share_prefix and tokens.shared < 0 for tokens in counted]
            own.append([max(size, most) if one else size for size, one in zip(sizes, alone, strict=True)])
            bar.update(min(len(sizes) * state.num_processes, number - bar.n))
    raise_together(failure)
    shares = gather(own)
    return [
        size
        for place in range(len(chunks))
        for size in shares[place % state.num_processes][place // state.num_processes]
    ]


def _ranges(number: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, number))) for first in range(0, number, size)]
