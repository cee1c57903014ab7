"""The rows of a training set that an epoch reads, and their orientation, while data loader and number of steps stay.

A callback fills `trainer.selection` and changes it between epochs; the trainer asks it for the sampler, tells it when
to save, and from which checkpoint to resume. All that changes lives in a [`Selection`] in the main process. A sampler
gives, in place of a bare row number, a [`Draw`] that says how to read the row; it reaches the workers of the data
loader with the batch that it belongs to, so that nothing is out of date there, whether they persist or have fetched
ahead.
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
    """A pair and how to read it. Without `strength` the row's own holds; NaN is an unknown one."""

    row: int
    is_flipped: bool
    is_drawn: bool
    strength: float | None


@dataclass
class Selection:
    """The N pairs of a training set in this epoch."""

    flipped: np.ndarray  # (N,) bool: Whether chosen and rejected change places, against the data set
    kept: np.ndarray  # (N,) bool: Whether the pair stays in the set
    held_out: np.ndarray | None = None  # (N,) bool: Whether the pair is left out of this one epoch
    strength: np.ndarray | None = None  # (N,) float64: Strengths in place of those of the data set, NaN where unknown
    seed: int = 0  # Seed of the order; the trainer sets its own
    epoch: int = 0  # Number of epochs done
    # Writes into a checkpoint, on the process that saves, what a resumed run needs: `STATE_FILE` at least
    save: Callable[[Path], None] | None = None
    checkpoint: str | None = None  # What training resumes from; the trainer says so before `on_train_begin`

    @classmethod
    def of_all(cls, num_pairs: int, seed: int = 0) -> Selection:
        """All pairs, as they are in the data set."""
        return cls(np.zeros(num_pairs, dtype=bool), np.ones(num_pairs, dtype=bool), seed=seed)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def drawn(self) -> np.ndarray:
        """Whether the pair is trained on in this epoch, `(N,)` bool."""
        return self.kept if self.held_out is None else self.kept & ~self.held_out

    def draw(self, row: int) -> Draw:
        is_drawn = self.kept[row] and (self.held_out is None or not self.held_out[row])
        strength = None if self.strength is None else float(self.strength[row])
        return Draw(row, bool(self.flipped[row]), bool(is_drawn), strength)


class SelectionSampler(Sampler[Draw]):
    """Gives as many draws an epoch as the data set has pairs, all of pairs that are kept.

    Where fewer are kept, it goes through them again, in another order, until the epoch is full; so the number of steps
    and the learning rates stay, and no kept pair is seen more than once more often than another. The order follows
    from seed, epoch and selection alone, and with all pairs kept it is that of accelerate's `SeedableRandomSampler`,
    which the trainer uses otherwise.
    """

    def __init__(self, selection: Selection, shuffle: bool = True) -> None:
        self.selection = selection
        self.shuffle = shuffle

    def __len__(self) -> int:
        return len(self.selection)

    def __iter__(self) -> Iterator[Draw]:
        drawn = np.flatnonzero(self.selection.drawn)
        generator = torch.Generator().manual_seed(self.selection.seed + self.selection.epoch)
        left = len(self)
        while left:
            order = drawn
            if self.shuffle:
                order = drawn[torch.randperm(len(drawn), generator=generator).numpy()]
            for row in order[:left].tolist():
                yield self.selection.draw(row)
            left -= len(order[:left])


class PlannedSampler(Sampler[Draw]):
    """Gives what another sampler gives, as draws.

    For an order that was planned over all pairs, such as groups of similar length: a pair that is dropped keeps its
    place, and [`SelectedRows`] gives it the weight 0.
    """

    def __init__(self, sampler: Sampler, selection: Selection) -> None:
        self.sampler = sampler
        self.selection = selection

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # all of the trainer's have a length

    def __iter__(self) -> Iterator[Draw]:
        return map(self.selection.draw, self.sampler)


class PlannedBatchSampler(BatchRebalanceSampler):
    """The same for a sampler of batches; a `BatchRebalanceSampler` in name alone, as [`TokenBatchSampler`] is."""

    def __init__(self, sampler: Any, selection: Selection) -> None:
        self.sampler = sampler
        self.selection = selection

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.sampler:
            yield [self.selection.draw(row) for row in batch]

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class SelectedRows(Dataset):
    """A training set that is read by draws; its rows stay as they are."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__([draw.row for draw in draws])
        return [as_drawn(row, draw) for row, draw in zip(rows, draws, strict=True)]


def as_drawn(row: dict[str, Any], draw: Draw) -> dict[str, Any]:
    """A row as it is trained on: with its sides changed, with weight 0, or with another strength."""
    if draw.is_flipped:
        row = {name: row[partner_column(name, row.keys()) or name] for name in row}
    if not draw.is_drawn:
        row = {**row, "weight": 0.0}
    if draw.strength is not None:
        row = {**row, "strength": None if np.isnan(draw.strength) else draw.strength}
    return row


def selected(sampler: Sampler | None, selection: Selection, data_seed: int | None = None) -> Sampler:
    """Draw from a selection in place of the sampler that the trainer would have without it."""
    # As accelerate's `SeedableRandomSampler` has it.
    selection.seed = torch.random.initial_seed() if data_seed is None else data_seed
    if isinstance(sampler, BatchRebalanceSampler):
        return PlannedBatchSampler(sampler, selection)
    if isinstance(sampler, (RandomSampler, SequentialSampler)):
        return SelectionSampler(selection, shuffle=isinstance(sampler, RandomSampler))
    return PlannedSampler(cast(Sampler, sampler), selection)  # only streamed sets have none


def resume_selection(selection: Selection | None, checkpoint: str | bool | None, output_dir: str) -> None:
    """Tell a selection what training resumes from, as [`~transformers.Trainer.train`] takes it, and refuse to forget
    that of a checkpoint.
    """
    found = get_last_checkpoint(output_dir) if checkpoint is True else cast("str | None", checkpoint or None)
    if selection is not None:
        selection.checkpoint = found
    elif found is not None and (Path(found) / STATE_FILE).is_file():
        raise ValueError(
            f"{found} was written with the curation callback, whose flips would be forgotten; add the callback "
            f"before you resume, or delete its `{STATE_FILE}` to go on without."
        )
