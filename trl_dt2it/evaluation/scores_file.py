"""Scores in files: of any model, by the ids of the pairs; and of LLaMA-Factory, whose files have no ids."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..data.columns import column_of
from ..utils import whole_file


# What the two scores are called: here, and by `RewardScorer`.
_NAMES = (("chosen", "rejected"), ("chosen_reward", "rejected_reward"))


@dataclass(frozen=True)
class ScoreFile:
    """
    Scores of a model in a file, in place of the model in [`evaluate`].

    Parameters:
        path (`str` or `os.PathLike`):
            A Parquet or JSON lines file with `pair_id`, `chosen` and `rejected` (or `chosen_reward` and
            `rejected_reward`), such as [`write_scores`] writes. It may have rows that are not asked for.
        by (`str`, *optional*, defaults to `"pair_id"`):
            `"pair_id"` finds the scores of a pair by its id. `"position"` takes line i for row i, if there are as many
            lines as rows: for files without ids, such as LLaMA-Factory's `generated_predictions.jsonl`. Nothing tells
            then if the rows were in another order.
        round (`int`, *optional*):
            Rounds the scores to so many digits, as LLaMA-Factory does to 2. That makes ties, which count as wrong:
            only to compare with numbers measured so.
    """

    path: str | os.PathLike
    by: Literal["pair_id", "position"] = "pair_id"
    round: int | None = None

    def __call__(self, dataset: Dataset) -> np.ndarray:
        """
        The scores of rows.

        Args:
            dataset (`Dataset`):
                Rows with `pair_id`, from [`read_benchmark`].

        Returns:
            `np.ndarray` of shape `(n, 2)` and type float64: the scores of chosen and rejected.

        Raises:
            `ValueError`: if a row has no score, or two different ones, or the numbers of lines and rows differ.
        """
        if self.by not in ("pair_id", "position"):
            raise ValueError(f'`by` is {self.by!r}; it must be "pair_id" or "position".')
        table = _read(Path(self.path))
        scores = _scores(table, self.path)
        if self.by == "position":
            if len(scores) != len(dataset):
                raise ValueError(
                    f"{self.path} has {len(scores)} lines, and there are {len(dataset)} rows: whoever wrote it left "
                    "rows out, or has another release, so that lines and rows cannot be matched by their places."
                )
        else:
            scores = scores[self._places(table, column_of(dataset, "pair_id").to_pylist(), scores)]
        return scores if self.round is None else rounded(scores, self.round)

    def _places(self, table: pa.Table, wanted: list[str], scores: np.ndarray) -> np.ndarray:
        if "pair_id" not in table.column_names:
            raise ValueError(
                f"{self.path} has no `pair_id`, only {', '.join(table.column_names)}; write it beside the scores, or, "
                'if every row has its line in the same order, set `by="position"`.'
            )
        places: dict[str, int] = {}
        for place, one in enumerate(table["pair_id"].to_pylist()):
            first = places.setdefault(one, place)
            if not np.array_equal(scores[first], scores[place]):
                raise ValueError(f"{self.path} has two scores for `{one}`; leave one of them.")
        missing = [one for one in wanted if one not in places]
        if missing:
            raise ValueError(
                f"{self.path} has no score for {len(missing)} of {len(wanted)} rows, the first is `{missing[0]}`; "
                "score them, or give the release that the scores are of."
            )
        return np.array([places[one] for one in wanted], dtype=np.int64)


def write_scores(path: str | os.PathLike, dataset: Dataset, scores: Any) -> None:
    """
    Writes scores with the ids of their pairs, at full precision.

    Args:
        path (`str` or `os.PathLike`):
            The file; its ending says whether it is `.parquet` or `.jsonl`. It is there whole or not at all.
        dataset (`Dataset`):
            The rows, with `pair_id`.
        scores (`array` of shape `(n, 2)`):
            The scores of chosen and rejected.

    Raises:
        `ValueError`: if the ending is another, or the lengths differ.
    """
    path, scores = Path(path), np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(dataset), 2):
        raise ValueError(f"The scores have the shape {scores.shape}; it must be ({len(dataset)}, 2).")
    table = pa.table({"pair_id": column_of(dataset, "pair_id"), "chosen": scores[:, 0], "rejected": scores[:, 1]})
    if path.suffix == ".parquet":
        with whole_file(path) as part:
            pq.write_table(table, part)
    elif path.suffix == ".jsonl":
        with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
    else:
        raise ValueError(f"{path} must end with .parquet or .jsonl.")


def split_predictions(
    path: str | os.PathLike, rows: Mapping[str, Dataset], *, round: int | None = None
) -> dict[str, np.ndarray]:
    """
    The scores of several benchmarks in one `generated_predictions.jsonl` of LLaMA-Factory, one after the other.

    The lines have no ids, and LLaMA-Factory leaves rows out without a word, after which every line would stand for the
    row before it. So the number of lines has to be that of all rows.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        rows (`Mapping[str, Dataset]`):
            The benchmarks in the order of the file. The DT2IT-MRM authors' order is MM-RLHF-RewardBench,
            VL-RewardBench, Multimodal RewardBench.
        round (`int`, *optional*):
            As in [`ScoreFile`].

    Returns:
        `dict[str, np.ndarray]`: for each benchmark the scores of its rows, `(n, 2)`.

    Raises:
        `ValueError`: if the numbers of lines and rows differ.
    """
    scores = _scores(_read(Path(path)), path)
    sizes = {name: len(dataset) for name, dataset in rows.items()}
    if len(scores) != sum(sizes.values()):
        raise ValueError(
            f"{path} has {len(scores)} lines, and there are {sum(sizes.values())} rows ("
            + ", ".join(f"{size} of {name}" for name, size in sizes.items())
            + "): whoever wrote it left rows out, or has another release, so that lines and rows cannot be matched."
        )
    scores = scores if round is None else rounded(scores, round)
    parts = np.split(scores, np.cumsum(list(sizes.values()))[:-1])
    return dict(zip(sizes, parts, strict=True))


def rounded(scores: np.ndarray, digits: int) -> np.ndarray:
    """Scores rounded one by one, as Python does: NumPy multiplies and divides, which ends elsewhere at times."""
    return np.array([[round(score, digits) for score in pair] for pair in scores.tolist()]).reshape(-1, 2)


def _read(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"Line {number} of {path} is not JSON ({error}); mend the file.") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"Line {number} of {path} holds no object; mend the file.")
    return pa.Table.from_pylist(rows)


def _scores(table: pa.Table, path: str | os.PathLike) -> np.ndarray:
    names: Sequence[str] = next((pair for pair in _NAMES if set(pair) <= set(table.column_names)), ())
    if not names:
        raise ValueError(
            f"{path} has the columns {', '.join(table.column_names)}; it needs the scores as `chosen` and `rejected`."
        )
    columns = [table[name] for name in names]
    if any(column.null_count or not _is_number(column.type) for column in columns):
        raise ValueError(f"{path} has a score that is missing or not a number; mend the file.")
    return np.stack([column.to_numpy().astype(np.float64) for column in columns], axis=1)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)
