"""Results of `recipes/evaluate.py` as the report reads them: numbers with intervals, and the scores beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..evaluation.results import published_scores
from .page import Section, Table


@dataclass(frozen=True)
class Evaluation:
    """
    Results of one model.

    Parameters:
        model (`str`):
            Its name.
        results (`Sequence[dict]`):
            Each as [`~trl_dt2it.evaluation.EvalResult.to_dict`] gives it.
        pooled (`dict`, *optional*):
            `micro`, `mean` and `n` over all.
        scores (`dict[str, np.ndarray]`):
            By benchmark the scores of chosen and rejected, `(n, 2)`, where their file lies beside.
    """

    model: str
    results: Sequence[dict[str, Any]]
    pooled: dict[str, Any] | None
    scores: dict[str, np.ndarray]


def read_evaluation(path: str | os.PathLike) -> Evaluation:
    """
    Reads `evaluation.json`, or one result as JSON.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        [`Evaluation`]

    Raises:
        `ValueError`: if it is something else.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give what recipes/evaluate.py wrote.") from error
    results = content.get("results", [content]) if isinstance(content, dict) else []
    needed = {"name", "title", "metrics", "n", "wilson", "bootstrap"}
    if not results or not all(isinstance(one, dict) and needed <= set(one) for one in results):
        raise ValueError(f"{path} holds no result of an evaluation; give the evaluation.json of recipes/evaluate.py.")
    model = content.get("model") or results[0].get("settings", {}).get("model") or path.stem
    scores = {}
    for one in results:
        file = path.parent / f"{Path(one['name']).name}.parquet"
        if file.is_file():
            table = pq.read_table(file, columns=["chosen", "rejected"])
            scores[one["title"]] = np.stack([column.to_numpy() for column in table.columns], axis=1)
    return Evaluation(str(model), results, content.get("pooled"), scores)


def benchmarks(evaluations: Sequence[Evaluation]) -> Section:
    """Tables of benchmarks with intervals, beside published scores."""
    key, title = "benchmarks", "Benchmarks"
    if not evaluations:
        return Section(key, title, missing="no result of recipes/evaluate.py was given (`--evaluation`).")
    tables, notes = [], []
    for evaluation in evaluations:
        for one in evaluation.results:
            label = f" ({one['label']})" if one.get("label") else ""
            rows = [
                [
                    name,
                    _percent(value),
                    *_intervals(one, name),
                    _whole(one["n"].get(name)),
                    _whole(one["ties"].get(name)),
                ]
                for name, value in one["metrics"].items()
            ]
            columns: tuple[str, ...] = ("metric", "%", "95 %, Wilson", "95 %, prompts drawn", "n", "ties")
            tables.append(Table(f"{one['title']}{label}: {evaluation.model}", columns, rows))
            published = [
                [other.model, other.metric, _percent(other.value), other.source, other.note or ""]
                for other in published_scores(one["name"])
                if other.metric in one["metrics"]
            ]
            if published:
                columns = ("model", "metric", "%", "source", "")
                tables.append(Table(f"{one['title']}: published, not measured here", columns, published, "llrll"))
            notes += [note for note in one.get("notes", ()) if note not in notes]
        if evaluation.pooled:
            pooled = evaluation.pooled
            row = [evaluation.model, _percent(pooled["micro"]), _percent(pooled["mean"]), _whole(pooled["n"])]
            columns = ("model", "% of all pairs", "mean of benchmarks, %", "pairs")
            tables.append(Table("All of them as one", columns, [row]))
    lead = "Share of pairs in which the chosen answer has the higher reward; a tie is wrong."
    return Section(key, title, lead=lead, tables=tables, notes=notes)


def _intervals(result: dict[str, Any], metric: str) -> list[str]:
    found = (result[kind].get(metric) for kind in ("wilson", "bootstrap"))
    return ["" if one is None else f"{_percent(one[0])} to {_percent(one[1])}" for one in found]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _whole(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
