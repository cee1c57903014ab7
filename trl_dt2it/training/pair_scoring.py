"""Scoring of every pair of a data set as in training: one row per pair, without gradients.

The data set alone decides which pairs share a batch, and processes take turns with the batches; so a pair has the same
rewards on one process and on many. The workers of a data loader count tokens and decode images. A row that cannot be
read on one process is an error on all, which agree before each batch: none is left alone in a forward pass that all
have to take part in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce, send_to_device
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from transformers import DataCollator
from transformers.utils import logging

from ..data.columns import leave_images_encoded
from ..data.rows import row_name
from ..models.modeling import STATISTICS
from ..models.posterior import HeadInputs, RewardPosterior, laplace_posterior, watching_head
from ..processes import failing_together, gather, on_main_process, portable, raise_together
from .batching import PairTokens, count_tokens, pair_size, plan_batches
from .config import Trainer
from .grouping import Prompts, arrange, find_prompts, make_units
from .losses import blind_weight, loss_name, pair_curvature, pair_rewards, pair_weight, with_blind_margin
from .selection import Selection, as_drawn


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
    counts: pa.Table | None = None,
    prompts: Prompts | Literal["find"] | None = "find",
    num_workers: int = 0,
    read: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor] | None = None,
    desc: str = "Scoring",
    show_progress: bool = True,
) -> np.ndarray:
    """Compute the rewards `(N, 2)` fp32 of chosen and rejected of N pairs; every process has to call it. `read` takes
    the rewards `(2, B + D)` of each batch and its dummies, and its `pairs`, and returns what to keep, `(2, B)`. Where
    the collator groups pairs, those of one of the `prompts` are read in one batch. What is not passed of these, of the
    tokens of all pairs (`counts`, columns as of [`count_pairs`]) and of what they add to a batch (`lengths`) is
    found."""
    # Random generators and the mode of each module, training or evaluation, stay as they are.
    state = accelerator or PartialState()
    if isinstance(dataset, Dataset):
        dataset = leave_images_encoded(dataset)
    hidden = not (show_progress and state.is_main_process)
    loader = _Loader(_Attempts(dataset, collator), min(num_workers, len(dataset)))
    if max_tokens_per_batch is None or len(dataset) == 0:
        batches = _ranges(len(dataset), batch_size)
        prompts = _find_prompts(dataset, collator) if prompts == "find" else prompts
        if prompts is not None:
            order = arrange(np.arange(len(dataset)), prompts.number, batch_size)
            batches = [order[batch].tolist() for batch in batches]
    else:
        cap, shares = max_tokens_per_batch, cast(Any, collator).share_prefix
        if lengths is None:
            tokens = _count(loader, len(dataset), disable=hidden)
            lengths = [pair_size(one, cast(Any, collator), cap) for one in tokens]
            counts = pa.table(dict(zip(PairTokens._fields, zip(*tokens, strict=True), strict=True)))
        units = None
        if counts is not None and shares:
            prompts = _find_prompts(dataset, collator) if prompts == "find" else prompts
            if prompts is not None:
                units = make_units(prompts, counts, cast(Any, lengths), cap, cast(Any, collator).max_answers_per_group)
        plan = plan_batches(lengths if units is None else units.sizes, cap, padded=not shares)
        planned = (plan.rows[batch] for batch in plan.batches)
        batches = [(batch if units is None else units.pairs_of(batch)).tolist() for batch in planned]
    # Where the model is sharded, all processes have to take part in equally many forward passes.
    step = state.num_processes
    turns = range(state.process_index, -(-len(batches) // step) * step, step)
    mine = [batches[min(turn, len(batches) - 1)] for turn in turns]
    device = next(model.parameters()).device
    rewards = torch.zeros(len(dataset), 2)
    failure: Exception | None = None
    with torch.no_grad(), evaluating(model), tqdm(total=len(dataset), desc=desc, disable=hidden) as bar:
        for turn, indices, (inputs, problem) in zip(turns, mine, loader.load(mine, is_batch=True), strict=True):
            raise_together(failure or problem)
            number = len(inputs["pairs"]["weight"])
            try:
                tensors = send_to_device({name: value for name, value in inputs.items() if name != "pairs"}, device)
                scores = pair_rewards(model, tensors, number, inputs["pairs"].get("answers"))
                if turn < len(batches):
                    kept = scores[:, :number] if read is None else read(scores, inputs["pairs"])
                    rewards[indices] = kept.T.cpu()
            except Exception as error:  # the others hear of it before their next batch
                failure = error
            bar.update(min(number * step, len(dataset) - bar.n))
        raise_together(failure)
    # Each row is nonzero on one process alone, so that the sum is exact.
    return reduce(rewards.to(state.device), "sum").cpu().numpy()


def score_with_trainer(trainer: Trainer, dataset: Any, rows: np.ndarray | None = None, **options: Any) -> np.ndarray:
    """Score pairs by [`score_pairs`] with a trainer's model, collator, processes and settings, and other `options`.
    `rows` are those of its training set that they are, of which it knows lengths and prompts."""
    known: dict[str, Any] = {}
    if rows is not None:
        known = {
            "lengths": None if trainer._lengths is None else np.asarray(trainer._lengths)[rows],
            "counts": None if trainer._counts is None else trainer._counts.take(pa.array(rows)),
            "prompts": None if trainer._prompts is None else trainer._prompts.take(rows),
        }
    return score_pairs(
        trainer.model_wrapped,
        dataset,
        trainer.data_collator,
        **known,
        accelerator=trainer.accelerator,
        max_tokens_per_batch=trainer.args.max_tokens_per_batch,
        num_workers=trainer.args.dataloader_num_workers,
        show_progress=not trainer.args.disable_tqdm,
        **options,
    )


def measure_reward_statistics(trainer: Trainer) -> dict[str, float] | None:
    """Compute mean and standard deviation of the rewards of a sample of a trainer's pairs; all processes call it."""
    # Nothing that goes wrong here may cost the finished training: an error on any process becomes a warning on all.
    try:
        pairs, rows = _sample(trainer)
        if len(pairs) == 0:
            return None
        options = {"batch_size": trainer._train_batch_size, "desc": "Reward mean and std"}
        rewards = score_with_trainer(trainer, pairs, rows, **options)
    except Exception as error:
        logger.warning(
            "`reward_mean` and `reward_std` are left out of the trained model's configuration, because its training "
            f"pairs cannot all be scored: {type(error).__name__}: {error}"
        )
        return None
    if not np.isfinite(rewards).all():
        logger.warning("Some rewards of the training set are not finite, so that their mean is not written.")
        return None
    rewards = rewards.astype(np.float64)
    mean, std = float(rewards.mean()), float(rewards.std())
    if std <= 1e-6 * max(1.0, abs(mean)):  # equal, but for the rounding of different batches
        logger.warning(f"All rewards of the training set are {mean:g}; they cannot be normalized.")
        std = 0.0
    return dict(zip(STATISTICS, (mean, std), strict=True))


def pair_inputs(
    head: HeadInputs, scores: torch.Tensor, pairs: Mapping[str, Any], posterior: RewardPosterior | None = None
) -> torch.Tensor:
    """Return the head's inputs `(2, B, H)` of chosen and rejected, from the rewards `(2, B + D)` of its last pass."""
    number, answers = len(pairs["weight"]), pairs.get("answers")
    if answers is None:
        return head.take(scores.numel(), posterior).unflatten(0, (2, -1))[:, :number]
    return head.take(int(answers.max()) + 1, posterior)[answers[:number].T]


@dataclass(frozen=True)
class _KeptRows(Sequence):
    """The rows of a training set as a selection reads them, held-out pairs included."""

    dataset: Dataset
    selection: Selection

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        draw = self.selection.draw(index)._replace(is_drawn=bool(self.selection.kept[index]))
        return as_drawn(self.dataset[index], draw)


def fit_reward_posterior(trainer: Trainer) -> RewardPosterior:
    """Fit the posterior of the `score` head to a trainer's training pairs in one pass; every process calls it."""
    rows, selection = leave_images_encoded(trainer.train_dataset), trainer.selection
    device = trainer.accelerator.device
    at = torch.device("cpu") if device.type == "mps" else device  # which has no fp64
    sums = torch.empty(0)

    def parts() -> tuple[torch.Tensor, ...]:
        """Views of the Hessian `(H, H)`, the sum of the inputs `(H,)`, and the number and the weight of the pairs."""
        nonlocal sums
        size = head.weight.shape[-1]
        if not len(sums):  # one buffer for all, which is added to in place: nothing else here is as large
            sums = torch.zeros(size**2 + size + 2, dtype=torch.float64, device=at)
        return sums[: size**2].view(size, size), sums[size**2 : -2], sums[-2:]

    def add(scores: torch.Tensor, pairs: Mapping[str, Any]) -> torch.Tensor:
        weight = pair_weight(pairs, trainer.args, trainer.loss_type)
        rewards = scores[:, : len(weight)].cpu()
        if trainer.args.blind_weighting:
            weight = weight * blind_weight(rewards, pairs)
        of_loss = with_blind_margin(rewards, pairs) if trainer.args.blind_offset else rewards
        curvature = pair_curvature(of_loss, pairs, trainer.args, loss_type=trainer.loss_type)
        if pairs.get("label_confidence") is not None:  # see `models/posterior.py`
            curvature[0] *= (2 * pairs["label_confidence"].float() - 1) ** 2
        inputs = pair_inputs(head, scores, pairs).to(at, torch.float64)
        hessian, total, counts = parts()
        for direction, second in zip((inputs[0] - inputs[1], inputs[0] + inputs[1]), curvature, strict=True):
            if second.any():
                hessian.addmm_(direction.T * (weight * second).to(direction), direction)
        is_counted = (weight > 0).to(inputs)
        total += (inputs * is_counted[:, None]).sum((0, 1)) / 2
        counts += torch.stack([is_counted.sum(), weight.sum().to(inputs)])
        return rewards

    def fit() -> RewardPosterior:
        hessian, total, counts = parts()
        count, all_weight = counts.tolist()
        if count == 0:
            raise ValueError(
                "All pairs of the train set have the weight 0, so that they say nothing about the rewards."
            )
        about = {"num_pairs": int(count), "total_weight": all_weight, "loss_type": loss_name(trainer.loss_type)}
        return laplace_posterior(hessian, head.weight.flatten(), total / count, about)

    options = {"batch_size": trainer._train_batch_size, "desc": "Reward posterior"}
    with watching_head(trainer.model_wrapped) as head:
        kept = rows if selection is None else _KeptRows(rows, selection)
        score_with_trainer(trainer, kept, np.arange(len(kept)), read=add, **options)
    with failing_together():
        if head.weight is None:
            raise ValueError("The train set has no pairs, so that they say nothing about the rewards.")
        parts()  # of a process that had no batch
    if PartialState().num_processes > 1:
        dist.all_reduce(sums)  # in place, unlike `reduce`
    return on_main_process(fit)


def try_reward_posterior(trainer: Trainer) -> RewardPosterior | None:
    """Fit a posterior as [`fit_reward_posterior`]; an error on any process is a warning, and costs no training."""
    try:
        return fit_reward_posterior(trainer)
    except Exception as error:
        logger.warning(f"The trained model has no reward posterior: {type(error).__name__}: {error}")
        return None


def _sample(trainer: Trainer) -> tuple[Sequence[Any] | Dataset, np.ndarray | None]:
    """Return pairs to score, and their rows in the training set unless it is streamed."""
    args, dataset = trainer.args, trainer.train_dataset
    most = args.reward_statistics_pairs
    if isinstance(dataset, IterableDataset):
        # Rows that training has read: a later one may be bad.
        step = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
        with failing_together():
            rows = list(islice(dataset, min(most, trainer.state.global_step * step)))
        # Parts of a stream that was split over the processes may differ in length.
        return rows[: min(gather(len(rows)))], None
    if most >= len(dataset):
        return dataset, np.arange(len(dataset))
    seed = args.seed if args.data_seed is None else args.data_seed
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), size=most, replace=False))
    return dataset.select(chosen), chosen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation, and afterwards each of its modules to its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class _Attempts(TorchDataset):
    """Items of a data loader, each a result with `None`, or `None` with an error."""

    # An error raised in a worker comes back as another, and raised on a process it leaves the others waiting.

    rows: Any
    collator: Any

    def __getitem__(self, task: tuple[list[int], bool]) -> tuple[Any, Exception | None]:
        indices, is_batch = task
        try:
            # An error names a row by its `pair_id` or its index in the set, not that in a batch.
            named = ((index, self.rows[index]) for index in indices)
            rows = [{**row, "pair_id": row_name(row, index)} for index, row in named]
            return self.collator(rows) if is_batch else [count_tokens(row, self.collator) for row in rows], None
        except Exception as error:
            return None, portable(error)


class _Loader:
    """A data loader whose workers live from the counting of tokens to the last batch."""

    def __init__(self, items: _Attempts, num_workers: int) -> None:
        self._tasks: list[tuple[list[int], bool]] = []  # rows of which a worker makes a batch, or counts the tokens
        self._loader = DataLoader(
            items,
            batch_size=None,
            sampler=self._tasks,
            collate_fn=tuple,  # an item as it is
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # otherwise it would draw a seed from the global generator
        )

    def load(self, indices: list[list[int]], *, is_batch: bool) -> Iterator[tuple[Any, Exception | None]]:
        """Yield the items in order; the death of a worker is an error in place of its item."""
        self._tasks[:] = [(some, is_batch) for some in indices]
        loaded = None
        for _ in indices:
            try:
                loaded = iter(self._loader) if loaded is None else loaded
                item = next(loaded)
            except Exception as error:
                item = None, error
            yield item


def _find_prompts(dataset: Any, collator: Any) -> Prompts | None:
    if not isinstance(dataset, Dataset) or not getattr(collator, "group_pairs", False):
        return None
    try:
        return find_prompts(dataset)
    except Exception:  # a row is not as it should be, which the collator says of it by name
        return None


def _count(loader: _Loader, number: int, *, disable: bool) -> list[PairTokens]:
    """Count the tokens of each pair; each process counts its share."""
    state = PartialState()
    chunks = _ranges(number, ROWS_COUNTED_TOGETHER)
    mine = chunks[state.process_index :: state.num_processes]
    own: list[list[PairTokens]] = []
    with failing_together(), tqdm(total=number, desc="Counting tokens", disable=disable, leave=False) as bar:
        for counted, failure in loader.load(mine, is_batch=False):
            if failure is not None:
                raise failure
            own.append(counted)
            bar.update(min(len(counted) * state.num_processes, number - bar.n))
    in_turn = zip_longest(*gather(own), fillvalue=[])
    return [tokens for of_processes in in_turn for counted in of_processes for tokens in counted]


def _ranges(number: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, number))) for first in range(0, number, size)]
