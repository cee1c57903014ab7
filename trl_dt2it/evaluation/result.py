"""What an evaluation found: the numbers, how sure they are, on screen, as JSON and for a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import huggingface_hub
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..utils import printable
from .intervals import Interval, wilson
from .published import PublishedScore, published_scores


@dataclass(frozen=True)
class EvalResult:
    """
    What [`evaluate`] found.

    Parameters:
        name (`str`):
            Name of the benchmark.
        title (`str`):
            What its authors call it.
        metrics (`dict[str, float]`):
            As [`compute_metrics`] gives them, from 0 to 1.
        micro (`float`):
            Share of all pairs that are right.
        macro (`float`, *optional*):
            Mean over the categories of the share that is right in each; `None` where there are none.
        correct (`dict[str, int]`):
            For each metric that is a share, how many are right.
        n (`dict[str, int]`):
            Of how many: pairs, or prompts of `acc_plus`.
        ties (`dict[str, int]`):
            For each share of pairs, how many have two equal scores. They are counted as wrong.
        wilson (`dict[str, Interval]`):
            95 % interval of each share, if all pairs were independent.
        bootstrap (`dict[str, Interval]`):
            95 % interval of each metric, prompts as the independent units, see
            [`~trl_dt2it.evaluation.intervals.bootstrap_intervals`].
        label (`str`, *optional*, defaults to `""`):
            What the rows are if they are not the whole benchmark, such as `"image-only"`.
        notes (`tuple[str, ...]`, *optional*):
            What else a reader of the numbers has to know.
        settings (`dict`, *optional*):
            How it was measured: `rows_sha256` over the ids of the rows, `revision`, `round`, `model`, bootstrap.
    """

    name: str
    title: str
    metrics: dict[str, float]
    micro: float
    macro: float | None
    correct: dict[str, int]
    n: dict[str, int]
    ties: dict[str, int]
    wilson: dict[str, Interval]
    bootstrap: dict[str, Interval]
    label: str = ""
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The metric over all pairs."""
        return next(iter(self.metrics))

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON knows it, intervals as lists."""
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def show(self, console: Console | None = None) -> None:
        """
        Prints the result, and what was published of other models.

        Args:
            console (`rich.console.Console`, *optional*):
                Where to; standard output by default.
        """
        console = console or Console()
        label = f", {self.label}" if self.label else ""
        table = Table("", title=Text(printable(f"{self.title}{label}: accuracy, %"), style="italic"))
        for column in ("value", "95 %, Wilson", "95 %, prompts drawn", "n", "ties"):
            table.add_column(column, justify="right")
        for name, value in self.metrics.items():
            table.add_row(
                Text(printable(name)),
                _percent(value),
                _interval(self.wilson.get(name)),
                _interval(self.bootstrap.get(name)),
                f"{self.n[name]:,}" if name in self.n else "",
                f"{self.ties[name]:,}" if name in self.ties else "",
            )
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False)
        show_published([self], console)

    def model_index_entries(self) -> list[huggingface_hub.EvalResult]:
        """
        The result for a model card.

        Returns:
            `list[huggingface_hub.EvalResult]`: one for each metric, for `ModelCardData(eval_results=...)`. Their
            values are rounded to 4 digits.
        """
        name = f"{self.title} ({self.label})" if self.label else self.title
        return [
            huggingface_hub.EvalResult(
                task_type="text-classification",
                task_name="Reward modeling",
                dataset_type=self.settings.get("hub_id") or self.name,
                dataset_name=name,
                dataset_split="test",
                dataset_revision=self.settings.get("revision"),
                metric_type="accuracy",
                metric_name=metric,
                metric_value=round(value, 4),
            )
            for metric, value in self.metrics.items()
        ]


@dataclass(frozen=True)
class PooledResult:
    """
    Several benchmarks as one.

    Parameters:
        names (`tuple[str, ...]`):
            The benchmarks.
        micro (`float`):
            Share of all their pairs that are right: what the paper calls the mean overall accuracy.
        mean (`float`):
            Mean of their shares, each benchmark counting the same, whatever its size.
        correct (`int`):
            Number of pairs that are right.
        n (`int`):
            Number of pairs.
        ties (`int`):
            Number of pairs with two equal scores. They are counted as wrong.
        wilson ([`Interval`]):
            95 % interval of `micro`, if all pairs were independent.
    """

    names: tuple[str, ...]
    micro: float
    mean: float
    correct: int
    n: int
    ties: int
    wilson: Interval


def pooled(results: Sequence[EvalResult]) -> PooledResult:
    """
    The share of right pairs over several benchmarks, as the paper reports it over its three.

    Args:
        results (`Sequence[EvalResult]`):
            One result for each benchmark.

    Returns:
        [`PooledResult`]

    Raises:
        `ValueError`: if there is none, or two of one benchmark.
    """
    names = tuple(result.name for result in results)
    if not results or len(set(names)) < len(names):
        raise ValueError(f"Give one result for each benchmark to pool; got {', '.join(names) or 'none'}.")
    correct = sum(result.correct[result.headline] for result in results)
    n = sum(result.n[result.headline] for result in results)
    ties = sum(result.ties[result.headline] for result in results)
    mean = sum(result.micro for result in results) / len(results)
    return PooledResult(names, correct / n, mean, correct, n, ties, wilson(correct / n, n))


def show_published(results: Sequence[EvalResult], console: Console | None = None, model: str = "this model") -> None:
    """
    Prints results beside the published scores of other models, each with its source.

    Args:
        results (`Sequence[EvalResult]`):
            One result for each benchmark. Of the paper's three, the share of all pairs is a column too.
        console (`rich.console.Console`, *optional*):
            Where to; standard output by default.
        model (`str`, *optional*, defaults to `"this model"`):
            What to call the model of the results.
    """
    from .benchmarks import PAPER_BENCHMARKS

    # A column for the share of all pairs, and one for each other metric that somebody published.
    columns: dict[tuple[str, str], float] = {}
    for result in results:
        metrics = {one.metric for one in published_scores(result.name)}
        columns |= {(result.name, m): value for m, value in result.metrics.items() if m in metrics}
    if not columns:
        return
    if {result.name for result in results} == set(PAPER_BENCHMARKS):
        columns["pooled", "overall"] = pooled(results).micro
    others: dict[str, dict[tuple[str, str], PublishedScore]] = {}
    for benchmark, metric in columns:
        for one in published_scores(benchmark, metric):
            others.setdefault(one.model, {})[benchmark, metric] = one
    table = Table("model", title="Beside published scores, %: not measured here, and not always in the same way")
    for benchmark, metric in columns:
        table.add_column(f"{benchmark}\n{metric}", justify="right")
    table.add_column("source", overflow="fold")
    own = {(result.name, result.label) for result in results if result.label}
    labels = "; ".join(f"{name}: {label}" for name, label in sorted(own))
    table.add_row(model, *(_percent(value) for value in columns.values()), labels, end_section=True)
    notes: list[str] = []
    for name, scores in others.items():
        cells = []
        for column in columns:
            score = scores.get(column)
            if score is not None and score.note and score.note not in notes:
                notes.append(score.note)
            mark = f" [{notes.index(score.note) + 1}]" if score is not None and score.note else ""
            cells.append("" if score is None else f"{100 * score.value:.4g}{mark}".replace("[", "\\["))
        table.add_row(name, *cells, "; ".join(dict.fromkeys(score.source for score in scores.values())))
    console = console or Console()
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"\\[{number}] {note}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(value: Interval | None) -> str:
    return "" if value is None else f"{_percent(value.low)} to {_percent(value.high)}"
