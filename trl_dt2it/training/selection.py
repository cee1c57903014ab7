"""Selection: the rows of a training set that an epoch reads, and their orientation.

A callback has one as its `selection` and changes it between epochs; data loader and number of steps stay. All state
lives in a [`Selection`] in the main process: its samplers yield a [`Draw`] in place of a row index, which says how to
read the row and reaches the data loader's workers with its batch. So nothing is stale in workers, whether they persist
or prefetch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import get_last_checkpoint

from ..data.mixing import partner_column


STATE_FILE = "curation_state.json"  # in a checkpoint whose rows were selected


class Draw(NamedTuple):
    """A row and how to read it; without `strength` the row's own holds, and NaN is an unknown one."""

    row: int
    is_flipped: bool
    is_drawn: bool
    strength: float | None
    confidence: float | None = None  # the `label_confidence`; without it the row's own holds
    weight: float | None = None  # a factor of the row's own


@dataclass
class Selection:
    """The reading of the N pairs of a training set in an epoch."""

    flipped: np.ndarray  # (N,) bool: chosen and rejected are swapped, compared to the data set
    kept: np.ndarray  # (N,) bool: the pair stays in the set
    held_out: np.ndarray | None = None  # (N,) bool: the pair is skipped in this epoch
    strength: np.ndarray | None = None  # (N,) fp64: in place of the data set's, NaN where unknown
    confidence: np.ndarray | None = None  # (N,) fp64: `label_confidence`, NaN where the data set's own holds
    weight: np.ndarray | None = None  # (N,) fp64: factor of the data set's own
    seed: int = 0  # of the order; the trainer sets it
    epoch: int = 0  # number of epochs done
    # Writes into a checkpoint, on the process that saves, all that a resumed run needs: `STATE_FILE` at least.
    save: Callable[[Path], None] | None = None
    checkpoint: str | None = None  # that training resumes from, set before `on_train_begin`

    @classmethod
    def of_all(cls, num_pairs: int, seed: int = 0) -> Selection:
        """Select all pairs, as they are in the data set."""
        return cls(np.zeros(num_pairs, dtype=bool), np.ones(num_pairs, dtype=bool), seed=seed)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def drawn(self) -> np.ndarray:
        """Mask `(N,)` of the pairs that this epoch trains on."""
        return self.kept if self.held_out is None else self.kept & ~self.held_out

    def draw(self, row: int) -> Draw:
        """Return the reading of a row."""
        is_drawn = self.kept[row] and (self.held_out is None or not self.held_out[row])
        strength = None if self.strength is None else float(self.strength[row])
        confidence = None if self.confidence is None or np.isnan(self.confidence[row]) else float(self.confidence[row])
        weight = None if self.weight is None else float(self.weight[row])
        return Draw(row, bool(self.flipped[row]), bool(is_drawn), strength, confidence, weight)


@dataclass(eq=False)
class SelectionSampler(Sampler[Draw]):
    """A sampler of as many draws per epoch as the data set has pairs, all of kept pairs."""

    # Where fewer are kept, it goes through them again in another order, so that the number of steps and the learning
    # rates stay, and no kept pair comes more than once more often than another. The order follows from seed, epoch and
    # selection alone; with all pairs kept it is that of accelerate's `SeedableRandomSampler`, the trainer's default.

    selection: Selection
    shuffle: bool = True
    arrange: Callable[[np.ndarray], np.ndarray] | None = None  # brings rows together that are read together

    def __len__(self) -> int:
        return len(self.selection)

    def __iter__(self) -> Iterator[Draw]:
        drawn = np.flatnonzero(self.selection.drawn)
        generator = torch.Generator().manual_seed(self.selection.seed + self.selection.epoch)
        left = len(self)
        while left:
            order = drawn[torch.randperm(len(drawn), generator=generator).numpy()] if self.shuffle else drawn
            order = order if self.arrange is None else self.arrange(order)
            yield from map(self.selection.draw, order[:left].tolist())
            left -= len(order[:left])


@dataclass(eq=False)
class PlannedSampler(Sampler[Any]):
    """The draws of a sampler, or of its batches, whose order was planned over all pairs, such as by length."""

    # A dropped pair keeps its position, and [`SelectedRows`] gives it the weight 0.

    sampler: Any
    selection: Selection

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        draw = self.selection.draw
        return (list(map(draw, item)) if isinstance(item, list) else draw(item) for item in self.sampler)


class PlannedBatchSampler(PlannedSampler, BatchRebalanceSampler):
    """As [`PlannedSampler`], for batches; in name a `BatchRebalanceSampler`, as [`TokenBatchSampler`]."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


@dataclass(eq=False)
class SelectedRows(Dataset):
    """A training set read by draws."""

    dataset: datasets.Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__([draw.row for draw in draws])
        return [as_drawn(row, draw) for row, draw in zip(rows, draws, strict=True)]


def as_drawn(row: dict[str, Any], draw: Draw) -> dict[str, Any]:
    """Apply a draw to a row: swap its sides, or change its weight, its strength or the confidence in its label."""
    if draw.is_flipped:  # numbers about the label stay, `label_confidence` included, as in [`swap_pairs`]
        row = {name: row[partner_column(name, row.keys()) or name] for name in row}
        if row.get("blind_margin") is not None:
            row["blind_margin"] = -row["blind_margin"]
    if draw.weight is not None:
        own = row.get("weight")
        row = {**row, "weight": draw.weight * (1.0 if own is None else own)}
    if not draw.is_drawn:
        row = {**row, "weight": 0.0}
    if draw.confidence is not None:
        row = {**row, "label_confidence": draw.confidence}
    if draw.strength is not None:
        row = {**row, "strength": None if np.isnan(draw.strength) else draw.strength}
    return row


def selected(sampler: Sampler | None, selection: Selection, data_seed: int | None = None) -> Sampler:
    """Make the sampler of a selection in place of the trainer's own."""
    selection.seed = torch.random.initial_seed() if data_seed is None else data_seed  # as accelerate seeds its sampler
    if isinstance(sampler, BatchRebalanceSampler):
        return PlannedBatchSampler(sampler, selection)
    if isinstance(sampler, (RandomSampler, SequentialSampler)):
        return SelectionSampler(selection, shuffle=isinstance(sampler, RandomSampler))
    if (arrange := getattr(sampler, "arrange", None)) is not None:
        return SelectionSampler(selection, arrange=arrange)
    return PlannedSampler(sampler, selection)  # only streamed sets have no sampler


def checkpoint_folder(checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Return the folder that `resume_from_checkpoint` names."""
    return get_last_checkpoint(output_dir) if checkpoint is True else cast("str | None", checkpoint or None)


def resume_selection(selection: Selection | None, checkpoint: str | bool | None, output_dir: str) -> None:
    """Set the checkpoint that a selection resumes from; refuse to resume without the selection of a checkpoint."""
    folder = checkpoint_folder(checkpoint, output_dir)
    if selection is not None:
        selection.checkpoint = folder
    elif folder is not None and (Path(folder) / STATE_FILE).is_file():
        raise ValueError(
            f"{folder} was written with the curation callback, whose flips would be forgotten; add the callback "
            f"before you resume, or delete its `{STATE_FILE}` to go on without."
        )
