"""A reward model on a benchmark, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from ..data.columns import column_of
from ..utils import digest
from .benchmark import Benchmark
from .benchmarks import find_benchmark
from .intervals import bootstrap_intervals, wilson
from .metrics import as_scores, row_keys, tally
from .raw_rows import BenchmarkRows
from .reading import read_benchmark
from .result import EvalResult
from .scores_file import rounded, write_scores


logger = logging.get_logger(__name__)


@runtime_checkable
class PairScorer(Protocol):
    """What scores pairs."""

    def score_pairs(self, dataset: Dataset) -> Any:
        """The rewards of chosen and rejected, `(n, 2)`, in the order of the rows."""


def evaluate(
    scorer: PairScorer | Callable[[Dataset], Any],
    name: str,
    rows: BenchmarkRows | None = None,
    *,
    image_root: str | os.PathLike | None = None,
    revision: str | None = None,
    model: str | None = None,
    scores_file: str | os.PathLike | None = None,
    round: int | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    **reading: Any,
) -> EvalResult:
    """
    Evaluates a reward model on a benchmark.

    A pair is right if the better answer scores strictly more, at full precision; ties are wrong, and counted.

    Args:
        scorer ([`PairScorer`] or `Callable`):
            Gives the rewards of chosen and rejected of each row, `(n, 2)`, in the order of the rows: an object with
            `score_pairs(dataset)`, a function of a data set, or a [`ScoreFile`].
        name (`str`):
            The benchmark, one of [`BENCHMARKS`].
        rows (`Dataset`, `Iterable[Mapping]`, `str` or `os.PathLike`, *optional*):
            Its rows, as in [`read_benchmark`]; by default from the Hub.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that the paths of images start from.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        model (`str`, *optional*):
            What the model is called, for the record.
        scores_file (`str` or `os.PathLike`, *optional*):
            Parquet or JSON lines file for the scores, by [`write_scores`]. On several processes, give it to one.
        round (`int`, *optional*):
            Rounds the scores, as in [`ScoreFile`]: only to compare with numbers measured so.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Draws of the bootstrap.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
        reading:
            Other arguments of [`read_benchmark`], such as `videos` or `both_orders`.

    Returns:
        [`EvalResult`]

    Raises:
        `ValueError`: if the scores are not one pair of numbers for each row, or as [`read_benchmark`] says.
    """
    benchmark = find_benchmark(name)
    dataset = read_benchmark(name, rows, image_root=image_root, revision=revision, **reading)
    category, unit = row_keys(benchmark, dataset)
    label, notes = describe(benchmark, category)
    for note in notes:
        logger.warning(note)
    score = scorer.score_pairs if isinstance(scorer, PairScorer) else scorer
    scores = as_scores(score(dataset), len(dataset))
    if scores_file is not None:
        write_scores(scores_file, dataset, scores)
    if round is not None:
        scores = rounded(scores, round)
        notes.append(f"Scores were rounded to {round} digits, which makes ties that count as wrong.")
    counted = tally(benchmark, category, unit, scores)
    is_right = scores[:, 0] > scores[:, 1]
    by_category = [float(is_right[category == one].mean()) for one in sorted(set(category.tolist()) - {""})]
    correct = {key: int(ratio.hits.sum()) for key, ratio in counted.ratios.items()}
    n = {key: int(ratio.total.sum()) for key, ratio in counted.ratios.items()}
    return EvalResult(
        name=name,
        title=benchmark.title,
        metrics=counted.values(),
        micro=float(is_right.mean()),
        macro=float(np.mean(by_category)) if by_category else None,
        correct=correct,
        n=n,
        ties=counted.ties,
        wilson={key: wilson(correct[key] / n[key], n[key]) for key in n},
        bootstrap=bootstrap_intervals(counted, num_resamples=num_resamples, seed=seed),
        label=label,
        notes=tuple(notes),
        settings={
            "model": model,
            "hub_id": benchmark.source.hub_id,
            "revision": revision,
            "rows_sha256": rows_sha256(dataset),
            "round": round,
            "bootstrap": {"num_resamples": num_resamples, "seed": seed, "num_prompts": int(unit.max()) + 1},
        },
    )


def describe(benchmark: Benchmark, category: np.ndarray) -> tuple[str, list[str]]:
    """
    What rows are, if they are not the benchmark as it is known.

    Args:
        benchmark ([`Benchmark`]):
            The benchmark.
        category (`np.ndarray` of shape `(n,)` and type str):
            The category of each row.

    Returns:
        `tuple[str, list[str]]`: a label, `""` for the current release; and what to say.
    """
    num_rows = len(category)
    if not benchmark.sizes or num_rows == next(iter(benchmark.sizes)):
        return "", []
    if num_rows in benchmark.sizes:
        what = benchmark.sizes[num_rows]
        return f"{num_rows:,} rows", [f"{benchmark.title} has {num_rows:,} rows here: {what}."]
    known = " or ".join(f"{size:,} ({what})" for size, what in benchmark.sizes.items())
    if benchmark.optional_category is not None and benchmark.optional_category[0] not in category:
        left_out, rest = benchmark.optional_category
        return f"{rest}, {num_rows:,} rows", [
            f"{benchmark.title} has {num_rows:,} rows here, none of the category {left_out}, and others report on "
            f"{known}: these numbers are {rest} and cannot be compared with theirs."
        ]
    return f"{num_rows:,} rows", [
        f"{benchmark.title} has {num_rows:,} rows here, and others report on {known}: the numbers cannot be compared."
    ]


def rows_sha256(dataset: Dataset) -> str:
    """A hash over the ids of rows, whatever their order: the same rows have the same."""
    ids = sorted(column_of(dataset, "pair_id").to_pylist())
    return digest("\n".join(ids))
