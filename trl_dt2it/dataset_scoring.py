"""Rewards of a whole data set as two columns, in files that a killed run goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn
from transformers import ProcessorMixin

from .curation.scoring_shards import gather_scores, score_in_shards
from .data.pair_identity import pair_ids, source_fingerprint
from .data.whole_file import whole_file
from .printable import digest, digest_of
from .processes import check_shared_folder, main_process_first, on_main_process
from .rendering import ProcessingClass


REWARD_COLUMNS = ("chosen_reward", "rejected_reward")


def add_rewards(
    dataset: Dataset,
    score: Callable[[Dataset, str], np.ndarray],
    *,
    output_dir: Path | None,
    settings: Mapping[str, Any],
    rows_per_shard: int = 512,
) -> Dataset:
    """
    Adds the rewards of chosen and rejected to a data set.

    Every process has to call it.

    Args:
        dataset (`Dataset`):
            Preference rows.
        score (`Callable`):
            Gets some of the rows, and what to call them, and gives the rewards, `(n, 2)`, on every process.
        output_dir (`Path`, *optional*):
            Folder of the files; without it, nothing is written.
        settings (`Mapping`):
            What the rewards depend on besides the rows; anything that JSON can hold.
        rows_per_shard (`int`, *optional*, defaults to `512`):
            Pairs of a file: what a kill may cost at most.

    Returns:
        `Dataset`: with the columns `chosen_reward` and `rejected_reward`, of type float32.

    Raises:
        `ValueError`: if the columns are there already, if the folder holds rewards of other rows or of another
            model, or if not all processes see it.
    """
    if taken := [name for name in REWARD_COLUMNS if name in dataset.column_names]:
        raise ValueError(f"The data set has a column `{taken[0]}` already; remove or rename it.")
    if output_dir is None or len(dataset) == 0:
        rewards = score(dataset, "Scoring")
    else:
        check_shared_folder(output_dir)
        names = pair_ids(dataset)
        record = {"rows": rows_fingerprint(dataset, names), "rows_per_shard": rows_per_shard, **settings}
        if problem := on_main_process(partial(_begin, output_dir, record)):
            raise ValueError(problem)
        score_in_shards(output_dir, dataset, score, pair_ids=names, rows_per_shard=rows_per_shard)
        rewards = gather_scores([[output_dir]], len(dataset))[:, :, 0]
    with main_process_first():  # where rows were selected, `datasets` writes them anew
        for name, column in zip(REWARD_COLUMNS, rewards.T, strict=True):
            dataset = dataset.add_column(name, pa.array(np.ascontiguousarray(column, dtype=np.float32)))
    return dataset


def rows_fingerprint(dataset: Dataset, names: pa.Array) -> str:
    """A hash over the content of all rows, images included, in their order: `pair_id` alone stays the same when a row
    is corrected. `names` are the rows' [`pair_ids`], which are made of their content where they have no `pair_id`."""
    if "pair_id" in dataset.column_names:
        names = pair_ids(dataset.remove_columns("pair_id"))
    return source_fingerprint(names)


def model_fingerprint(model: nn.Module, per_tensor: int = 64) -> str:
    """
    A hash that tells a model from others, in no time a gigabyte.

    Args:
        model (`nn.Module`):
            The model.
        per_tensor (`int`, *optional*, defaults to `64`):
            How many numbers of each parameter and buffer count, spread over it evenly: training moves all of them.

    Returns:
        `str`: 64 hexadecimal digits, from names, shapes, dtypes and these numbers; the same on every device.
    """
    parts: list[str | bytes] = []
    for name, tensor in model.state_dict().items():
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.numel():
            number = min(per_tensor, tensor.numel())
            some = torch.arange(number) * (tensor.numel() - 1) // max(1, number - 1)
            values = tensor.detach().flatten()[some.to(tensor.device)]
            parts.append(values.to("cpu", torch.float64).numpy().tobytes())
    return digest(parts)


def processor_settings(processing_class: ProcessingClass) -> dict[str, Any]:
    """What the rewards of a model depend on in its processor: the chat template, and what becomes of an image."""
    settings = {"class": type(processing_class).__name__, "chat_template": processing_class.chat_template}
    if isinstance(processing_class, ProcessorMixin):
        settings["image_processor"] = processing_class.image_processor.to_dict()
    return json.loads(json.dumps(settings, sort_keys=True, default=str))


def _begin(folder: Path, record: dict[str, Any]) -> str | None:
    """Writes what the folder is for, or says in which way it is for something else."""
    path = folder / "scoring.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["digest"] == digest_of(record):
            return None
        other = [name for name, value in record.items() if known["settings"].get(name) != value]
        return f"{folder} holds rewards with another {', '.join(other)}; give another `output_dir`, or delete it."
    if any(folder.glob("scores-*.parquet")):
        return f"{folder} holds scores that are not of this run; give another `output_dir`."
    with whole_file(path) as part:
        text = json.dumps({"digest": digest_of(record), "settings": record}, indent=2)
        part.write_text(text + "\n", encoding="utf-8")
    return None
