"""Batches of an evaluation set: every pair once, in the order of the set, and as many batches on each process.

accelerate repeats rows where a set does not come out even, and guesses afterwards how many to cut off; of a stream it
cannot guess. Here each pair has its position in the set, on which all processes agree, so that nothing is repeated but
in batches that are marked. The position travels in `pairs`, beside the collator's own values, and not in a column: no
column of a user's can be taken for it.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, starmap
from typing import Any, NamedTuple, cast

import datasets
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object, recursively_apply
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from .batch_loss import BatchLoss
from .data.columns import AnyDataset
from .reward_config import MultimodalRewardConfig
from .reward_metrics import PairRecord, pair_records


class Place(NamedTuple):
    """The position of a row in its set, -1 where the row only fills a batch, and how to read it: by its index, or, in
    a stream, the row itself."""

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
    """
    The batches of one process: of all batches of the set, in their order, every `num_processes`-th.

    A stream is read by the main process of each rank, whole, and its rows are sent to the workers, which decode and
    collate them. Otherwise `datasets` would spread the files over the workers and number the rows anew in each.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The evaluation set.
        batch_size (`int`):
            Pairs per batch.
        process_index (`int`):
            Index of this process.
        num_processes (`int`):
            Number of processes.
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
    """
    A data loader that gives every pair of a set once.

    It does not follow `dataloader_drop_last`, `dataloader_in_order`, `dataloader_persistent_workers` and, of
    `accelerator_config`, `even_batches` and `dispatch_batches`: they choose between ways to repeat or to drop pairs.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Prepared rows.
        collator (`Callable`):
            Makes batches with `pairs`, as [`MultimodalPreferenceCollator`] does.
        args ([`MultimodalRewardConfig`]):
            The batch size and the settings of data loaders are read.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the processes, and whether they split a batch of the given size.

    Returns:
        `DataLoader`: registered with accelerate while it is read, but not split by it.
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
    """
    What an evaluation keeps of its pairs, each process of its own, and what it gathers of every batch.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Knows the processes.
    """

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
        stands in for `gather_for_metrics`."""
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
        """
        The records of all processes, in the order of the set; every process must call it.

        Raises:
            `ValueError`: if the processes have read a stream in different orders, so that some pairs were counted
                twice and others not at all.
        """
        if len(set(gather_object([getattr(loader.batch_sampler, "digest", 0)]))) > 1:
            raise ValueError(
                "The processes have read the streamed evaluation set in different orders; pass a `seed` to its "
                "`shuffle`, or do not shuffle it."
            )
        return sorted(gather_object(self._records), key=lambda record: record.position)
