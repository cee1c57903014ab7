"""The resumable store: records and scores in shards, claimed, written whole and read again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from .. import processes, utils
from ..data.contents import pair_ids, source_fingerprint
from ..data.ranked import cover_answers
from ..models.rendering import ProcessingClass


REWARD_COLUMNS, RANKED_REWARDS = ("chosen_reward", "rejected_reward"), "rewards"

_SCHEMA = pa.schema({"row": pa.int64(), "pair_id": pa.string(), "chosen": pa.float32(), "rejected": pa.float32()})


def claim(mark: Path, digest: str, settings: Mapping[str, Any] | None = None, files: str = "*") -> Path | None:
    """Claim the folder of a mark for parts with a digest. Parts of another digest are refused if the mark has
    settings, else moved aside to the path returned; `files` without a mark are refused."""
    folder, known = mark.parent, utils.read_json(mark)
    if known is not None and known["digest"] == digest:
        return None
    if known is not None and settings is not None:
        other = ", ".join(name for name, value in settings.items() if known["settings"].get(name) != value)
        raise ValueError(f"{folder} holds rewards with another {other}; give another `output_dir`, or delete it.")
    aside = None if known is None else utils.move_aside(folder)
    if any(file.suffix != ".part" for file in folder.glob(files)):
        raise ValueError(f"{folder} holds files that are not of this run; move them, or take another output_dir.")
    about = {"digest": digest} if settings is None else {"digest": digest, "settings": settings}
    utils.write_json(mark, about, indent=None if settings is None else 2)
    return aside


def record_of(path: Path, digest: str) -> dict[str, Any] | None:
    """Read a mark, or the record of a finished part; `None` if it is missing or of another digest."""
    record = utils.read_json(path)
    return record if record is not None and record["digest"] == digest else None


# Scores rows, given a title, as `(n, 2)`; all processes of a launch call it.
Score: TypeAlias = Callable[[Dataset, str], np.ndarray]


def add_rewards(
    dataset: Dataset,
    load: Callable[[], Score],
    *,
    output_dir: Path | None,
    settings: Mapping[str, Any],
    rows_per_shard: int = 512,
) -> Dataset:
    """Add the columns `chosen_reward` and `rejected_reward`, through files of [`score_in_shards`] if there is an
    `output_dir`; rewards depend on `settings` besides the rows. Every process has to call it."""
    if taken := [name for name in REWARD_COLUMNS if name in dataset.column_names]:
        raise ValueError(f"The data set has a column `{taken[0]}` already; remove or rename it.")
    if output_dir is None or len(dataset) == 0:
        rewards = load()(dataset, "Scoring")
    else:
        processes.check_shared_folder(output_dir)
        names = pair_ids(dataset)
        # A `pair_id` stays the same when a row is corrected; the names of rows without one are made of their content.
        contents = pair_ids(dataset.remove_columns("pair_id")) if "pair_id" in dataset.column_names else names
        about = {"rows": source_fingerprint(contents), "rows_per_shard": rows_per_shard, **settings}
        mark, digest = output_dir / "scoring.json", utils.digest_of(about)
        processes.on_main_process(lambda: claim(mark, digest, about, "scores-*.parquet"))
        score_in_shards(output_dir, dataset, load, pair_ids=names, rows_per_shard=rows_per_shard)
        rewards = gather_scores([[output_dir]], len(dataset))[:, :, 0]
    with processes.main_process_first():  # where rows were selected, `datasets` writes them anew
        for name, column in zip(REWARD_COLUMNS, rewards.T, strict=True):
            dataset = dataset.add_column(name, pa.array(np.ascontiguousarray(column, dtype=np.float32)))
    return dataset


def add_ranked_rewards(dataset: Dataset, load: Callable[[], Score], **options: Any) -> Dataset:
    """Add the column `rewards` to ranked prompts, a reward for each answer, by [`add_rewards`] of pairs that hold all
    answers."""
    if RANKED_REWARDS in dataset.column_names:
        raise ValueError(f"The data set has a column `{RANKED_REWARDS}` already; remove or rename it.")
    pairs, places = cover_answers(dataset)
    column: list[list[float]] = [[math.nan] * len(answers) for answers in places]
    if pairs is not None:
        scored = add_rewards(pairs, load, **options)
        by_side = [scored.with_format("numpy")[name][:] for name in REWARD_COLUMNS]
        for row, answers in enumerate(places):
            column[row] = [float(by_side[side][pair]) for pair, side in answers]
    with processes.main_process_first():
        return dataset.add_column(RANKED_REWARDS, pa.array(column, pa.list_(pa.float32())))


def score_in_shards(
    folder: Path,
    dataset: Dataset,
    load: Callable[[], Score],
    *,
    pair_ids: pa.Array,
    rows: np.ndarray | None = None,
    rows_per_shard: int = 4096,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any] | None:
    """Score rows, given ascending or all, into `scores-00000-of-00003.parquet`, ..., where these are missing, by what
    `load` gives; machine i of `shard` (i, n) makes every n-th file, and workers of an engine share the files. Return
    the number of `pairs` and `files`, or `None` while other machines have files to make."""
    rows = np.arange(len(dataset)) if rows is None else rows
    count = -(-len(rows) // rows_per_shard)
    files = [folder / f"scores-{number:05d}-of-{count:05d}.parquet" for number in range(count)]

    def missing() -> list[int]:
        return [number for number, file in enumerate(files) if not file.is_file()]

    parts = list[tuple[Path, np.ndarray, pa.Array, str]]()
    for number in processes.on_main_process(missing):
        if number % shard[1] == shard[0]:
            some = rows[number * rows_per_shard : (number + 1) * rows_per_shard]
            parts.append((files[number], some, pair_ids.take(pa.array(some)), f"Scoring, {number + 1} of {count}"))
    for _ in utils.run_parts(partial(_score_file, dataset), parts, "Scoring", setup=load):
        pass
    return None if processes.on_main_process(missing) else {"pairs": len(rows), "files": count}


def _score_file(dataset: Dataset, score: Score, part: tuple[Path, np.ndarray, pa.Array, str]) -> None:
    file, rows, names, title = part
    rewards = score(dataset.select(rows), title)

    def write() -> None:
        columns = [pa.array(rows), names, *map(pa.array, rewards.T.astype(np.float32))]
        with utils.whole_file(file) as made:
            pq.write_table(pa.table(columns, schema=_SCHEMA), made)

    processes.on_main_process(write)


def read_scores(folder: Path) -> pa.Table:
    """Read the files of [`score_in_shards`] as columns `row`, `pair_id`, and the rewards `chosen` and `rejected`."""
    files = sorted(folder.glob("scores-*.parquet"))  # none of an empty part
    return pa.concat_tables([_SCHEMA.empty_table(), *map(pq.read_table, files)])


def gather_scores(folders: list[list[Path]], num_rows: int) -> np.ndarray:
    """Gather the scores `(N, 2, M)` of M models, each from folders with different rows; NaN where a row has none."""
    scores = np.full((num_rows, 2, len(folders)), np.nan, dtype=np.float32)
    for model, parts in enumerate(folders):
        for table in map(read_scores, parts):
            for side, name in enumerate(("chosen", "rejected")):
                scores[table["row"].to_numpy(), side, model] = table[name].to_numpy()
    return scores


def make_records(
    path: Path, keys: Sequence[str], make: Callable[[list[int]], list[dict[str, Any]]], *, batch_size: int, desc: str
) -> list[dict[str, Any]]:
    """Make a record of every row that has none in a file of JSON lines, and return all on every process, each with its
    `row` and its `key`, a digest of what it depends on. Processes take turns with the batches, and append to
    `answers.jsonl.0`, ... until `answers.jsonl` is complete."""
    state = PartialState()
    processes.check_shared_folder(path.parent)
    known = _read_records(path, keys)
    processes.wait_for_everyone()  # before anybody writes what another would read as known
    batches = [list(range(first, min(first + batch_size, len(keys)))) for first in range(0, len(keys), batch_size)]
    missing = [batch for batch in batches if not all(row in known for row in batch)]
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{state.process_index}")
    if own.is_file():  # the next record begins a line, also after one that a kill has torn
        os.truncate(own, own.read_bytes().rfind(b"\n") + 1)
    hidden = not state.is_main_process
    with processes.failing_together(), tqdm(total=len(keys), initial=len(known), desc=desc, disable=hidden) as bar:
        for turn, batch in enumerate(missing):
            if turn % state.num_processes == state.process_index:
                made = list(zip(batch, make(batch), strict=True))  # after an error, the others keep what they make
                lines = [_line({"row": row, "key": keys[row], **one}) for row, one in made if row not in known]
                with own.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            bar.update(sum(row not in known for row in batch))
    known = _read_records(path, keys)
    records = [known[row] for row in range(len(keys))]
    processes.wait_for_everyone()

    def join() -> None:
        parts = _parts(path)
        if parts or not path.is_file():
            with utils.whole_file(path) as part:
                part.write_text("".join(map(_line, records)), encoding="utf-8")
            for one in parts:
                one.unlink()

    processes.on_main_process(join)
    return records


def _parts(path: Path) -> list[Path]:
    """List the files of records of single processes."""
    return sorted(path.parent.glob(f"{path.name}.[0-9]*"))


def _read_records(path: Path, keys: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Read records by row, without a last line that a kill has torn."""
    known: dict[int, dict[str, Any]] = {}
    for file in filter(Path.is_file, [path, *_parts(path)]):
        for line in file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                continue
            record = json.loads(line)
            row = record["row"]
            if row >= len(keys) or record["key"] != keys[row]:
                about = f"{file} holds a record of row {row} with other content or settings"
                raise ValueError(f"{about}; give another `output_dir`, or delete the file.")
            known[row] = record
    return known


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def model_fingerprint(model: nn.Module) -> str:
    """Hash names, shapes and dtypes of a model's tensors, and evenly spread numbers of each, since training moves all
    of them; equal on all devices."""
    parts: list[str | bytes] = []
    for name, tensor in model.state_dict().items():
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.numel():
            number = min(64, tensor.numel())
            some = torch.arange(number) * (tensor.numel() - 1) // max(1, number - 1)
            values = tensor.detach().flatten()[some.to(tensor.device)]
            parts.append(values.to("cpu", torch.float64).numpy().tobytes())
    return utils.digest(parts)


def processor_settings(processing_class: ProcessingClass) -> dict[str, Any]:
    """Collect what rewards depend on in a processor: the chat template, and the settings of the image processor."""
    settings = {"class": type(processing_class).__name__, "chat_template": processing_class.chat_template}
    if isinstance(processing_class, ProcessorMixin):
        settings["image_processor"] = processing_class.image_processor.to_dict()
    return json.loads(json.dumps(settings, sort_keys=True, default=str))
