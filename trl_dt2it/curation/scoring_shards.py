"""Scores of a set that need not fit into memory: one Parquet file for every few thousand pairs, each made once.

All processes of a run score a file's pairs together, and several machines with a common folder take files each. A file
is there whole or not at all, so that a killed run goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..data.whole_file import whole_file
from ..processes import on_main_process


_SCHEMA = pa.schema({"row": pa.int64(), "pair_id": pa.string(), "chosen": pa.float32(), "rejected": pa.float32()})


def score_in_shards(
    folder: Path,
    dataset: Dataset,
    score: Callable[[Dataset, str], np.ndarray],
    *,
    pair_ids: pa.Array,
    rows: np.ndarray | None = None,
    rows_per_shard: int = 4096,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any] | None:
    """
    Scores rows of a data set into `scores-00000-of-00003.parquet`, ..., unless they are there.

    Every process has to call it.

    Args:
        folder (`Path`):
            Where the files go. What lies there already has to be of the same rows and the same model.
        dataset (`Dataset`):
            Preference rows.
        score (`Callable`):
            Gets some of the rows, and what to call them, and gives the rewards of chosen and rejected, `(n, 2)`, on
            every process: [`score_pairs`] with a model.
        pair_ids (`pa.Array` of length N):
            Names of all rows of the data set.
        rows (`np.ndarray`, *optional*):
            Which rows to score, ascending; all by default.
        rows_per_shard (`int`, *optional*, defaults to `4096`):
            Pairs of a file: what a kill may cost at most.
        shard (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
            `(i, n)`: make the i-th of every n files, i from 0, as the i-th of n machines.

    Returns:
        `dict`, *optional*: the number of `pairs`, and of files; `None` if other machines still have files to make.
    """
    rows = np.arange(len(dataset)) if rows is None else rows
    files = _files(folder, -(-len(rows) // rows_per_shard))
    part, parts = shard
    missing = on_main_process(lambda: [number for number, file in enumerate(files) if not file.is_file()])
    for number in missing:
        if number % parts != part:
            continue
        some = rows[number * rows_per_shard : (number + 1) * rows_per_shard]
        rewards = score(dataset.select(some), f"Scoring, {number + 1} of {len(files)}")
        on_main_process(partial(_write, files[number], some, pair_ids, rewards))
    if on_main_process(lambda: any(not file.is_file() for file in files)):
        return None
    return {"pairs": len(rows), "files": len(files)}


def read_scores(folder: Path) -> pa.Table:
    """
    What [`score_in_shards`] wrote.

    Args:
        folder (`Path`):
            Its folder.

    Returns:
        `pa.Table`: `row` of the data set, `pair_id`, and the rewards `chosen` and `rejected`.
    """
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("scores-*.parquet"))])


def gather_scores(folders: list[list[Path]], num_rows: int) -> np.ndarray:
    """
    Scores of all models for all pairs.

    Args:
        folders (`list[list[Path]]`):
            For each of M models the folders of [`score_in_shards`], of which each has other rows.
        num_rows (`int`):
            Number N of rows of the data set.

    Returns:
        `np.ndarray` of shape `(N, 2, M)` and dtype `float32`: rewards of chosen and rejected, NaN where there is none.
    """
    scores = np.full((num_rows, 2, len(folders)), np.nan, dtype=np.float32)
    for model, parts in enumerate(folders):
        for folder in parts:
            table = read_scores(folder)
            for side, name in enumerate(("chosen", "rejected")):
                scores[table["row"].to_numpy(), side, model] = table[name].to_numpy()
    return scores


def _write(file: Path, rows: np.ndarray, pair_ids: pa.Array, rewards: np.ndarray) -> None:
    columns = [pa.array(rows), pair_ids.take(pa.array(rows)), *map(pa.array, rewards.T.astype(np.float32))]
    with whole_file(file) as unfinished:
        pq.write_table(pa.table(columns, schema=_SCHEMA), unfinished)


def _files(folder: Path, count: int) -> list[Path]:
    return [folder / f"scores-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
