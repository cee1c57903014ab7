"""Results of an evaluation: pooled, beside published scores, in score files and in model cards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from huggingface_hub import ModelCard
from rich.console import Console

from ..data.cards import code_block, metadata, name_cell, paragraph, table
from ..data.columns import column_of
from ..utils import digest, screen_table, whole_file
from .benchmarks import PAPER_BENCHMARKS
from .looking import COLUMNS, LOOKING, NOTE, OWN, SHOWN, LookingReport
from .metrics import Interval, wilson


HEADING = "## Benchmarks"

INTERVALS = ("95 %, Wilson", "95 %, prompts drawn")  # heads of columns

_UNMATCHED = (
    "{} has {} lines, and there are {}: whoever wrote it left rows out, or has another release; write the scores with "
    "`pair_id`, or pass the release that they are of."
)

# Names of the two scores: in files of `write_scores`, and in those of `RewardScorer`.
_NAMES = (("chosen", "rejected"), ("chosen_reward", "rejected_reward"))


@dataclass(frozen=True)
class PublishedScore:
    """
    A published score.

    Parameters:
        model, source (`str`):
            Names of the model and of the publication.
        benchmark, metric (`str`):
            One of [`BENCHMARKS`], or `"pooled"` for the share of right pairs of the paper's three, and a metric of
            [`compute_metrics`].
        value (`float`):
            Score, from 0 to 1.
        note (`str`, *optional*, defaults to `""`):
            Caveat.
    """

    model: str
    benchmark: str
    metric: str
    value: float
    source: str
    note: str = ""


_COLUMNS = (
    *(("vl-rewardbench", "overall"), ("vl-rewardbench", "macro"), ("multimodal-rewardbench", "overall")),
    *(("mm-rlhf-rewardbench", "acc"), ("mm-rlhf-rewardbench", "acc_plus"), ("pooled", "overall")),
)

_DT2IT = "arXiv 2604.19544, from a copy"
_BASE = "arXiv 2509.16127, tables 8-10"
_OMNI = "Corrected there; an author of DT2IT-MRM measured 72.0."
_PARTS = "The paper's own groups give {} at the benchmark's group sizes."

# Model, publication, note on the first column, and the scores by `_COLUMNS`.
_TABLE: tuple[tuple[str, str, str, tuple[float | None, ...]], ...] = (
    ("DT2IT-MRM 8B", _DT2IT, "", (0.835, None, 0.793, 0.894, None, 0.805)),
    ("BaseReward 7B", _BASE, _PARTS.format(86.1), (0.8216, 0.8085, 0.728, 0.9176, 0.8043)),
    ("BaseReward 7B", _DT2IT, "", (None, None, None, None, None, 0.752)),
    ("BaseReward, ensemble", _BASE, _PARTS.format(87.2), (0.8441, 0.8291, 0.736, 0.9294, 0.8043)),
    ("Skywork-VL-Reward 7B", "arXiv 2505.07263", "73.3 after a fix of labels.", (0.731, 0.69)),
    ("Skywork-VL-Reward 7B", _DT2IT, "", (None, None, 0.744, 0.659)),
    ("IXC-2.5-Reward 7B", "arXiv 2501.12368", "", (0.658, 0.7)),
    ("IXC-2.5-Reward 7B", _BASE, "", (None, None, 0.666, 0.7118, 0.5)),
    ("MM-RLHF-Reward 7B", _BASE, "", (0.5015, 0.51, 0.671)),
    ("MM-RLHF-Reward 7B", "arXiv 2502.10391", "", (None, None, None, 0.82, 0.63)),
    ("R1-Reward (writes verdicts)", _BASE, _PARTS.format(77.2), (0.7192, 0.714, 0.822, 0.8059, 0.5435)),
    ("OmniReward", "issue 3 of OmniReward's repository", _OMNI, (0.763,)),
    ("Claude 3.7 (writes verdicts)", _BASE, "", (None, None, None, 0.8235, 0.652)),
    ("GPT-5.2 (writes verdicts)", _DT2IT, "", (0.702, None, 0.753, 0.682)),
)

PUBLISHED: tuple[PublishedScore, ...] = tuple(
    PublishedScore(model, *column, value, source, note if column == _COLUMNS[0] else "")
    for model, source, note, values in _TABLE
    for column, value in zip(_COLUMNS, values, strict=False)
    if value is not None
)


def published_scores(benchmark: str, metric: str | None = None) -> list[PublishedScore]:
    """
    List the published scores of a benchmark.

    Args:
        benchmark, metric (`str`):
            As in [`PublishedScore`]; by default all metrics.

    Returns:
        `list[PublishedScore]`: the best first.
    """
    scores = [score for score in PUBLISHED if score.benchmark == benchmark and metric in (None, score.metric)]
    return sorted(scores, key=lambda score: -score.value)


@dataclass(frozen=True)
class EvalResult:
    """
    Result of [`evaluate`].

    Parameters:
        name, title (`str`):
            Names of the benchmark, here and by its authors.
        metrics (`dict[str, float]`):
            Metrics of [`compute_metrics`], from 0 to 1.
        micro (`float`):
            Share of right pairs.
        macro (`float`, *optional*):
            Mean over the categories of the share of right pairs; `None` where there are none.
        correct, n, ties (`dict[str, int]`):
            For each metric that is a share, the number of right pairs, of pairs, and of pairs with two equal scores,
            which count as wrong; for `acc_plus`, the numbers of prompts, without ties.
        wilson, bootstrap (`dict[str, Interval]`):
            95 % intervals: of each share if all pairs were independent, and of each metric with prompts as the
            independent units.
        label (`str`, *optional*, defaults to `""`):
            Part of the benchmark, if the rows are not the whole, such as `"image-only"`.
        notes (`tuple[str, ...]`, *optional*):
            Caveats for a reader of the numbers.
        settings (`dict`, *optional*):
            `rows_sha256` over the ids of the rows, `revision`, `round`, `model`, `bootstrap`.
        looking ([`LookingReport`], *optional*):
            Accuracies with other images, if there were `controls`.
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
    looking: LookingReport | None = None

    @property
    def headline(self) -> str:
        """The metric over all pairs."""
        return next(iter(self.metrics))

    @property
    def full_title(self) -> str:
        """The title with the label."""
        return f"{self.title} ({self.label})" if self.label else self.title

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """For each metric, as text, its name, value, both intervals, number and ties; empty what there is not."""
        return [
            (
                *(name, f"{100 * value:.1f}", _interval(self.wilson.get(name)), _interval(self.bootstrap.get(name))),
                *(f"{counts[name]:,}" if name in counts else "" for counts in (self.n, self.ties)),
            )
            for name, value in self.metrics.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values, intervals as lists."""
        return json.loads(json.dumps(self._content()))

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(self._content(), indent=2, ensure_ascii=False)

    def _content(self) -> dict[str, Any]:
        content = asdict(self)
        if self.looking is None:
            del content["looking"]
        return content

    def show(self, console: Console | None = None) -> None:
        """Print the result beside published scores of other models, on standard output by default."""
        console = console or Console()
        label = f", {self.label}" if self.label else ""
        columns = ("", "value", *INTERVALS, "n", "ties")
        console.print(screen_table(columns, self.cells, title=f"{self.title}{label}: accuracy, %"))
        for note in self.notes:
            console.print(note, markup=False)
        if self.looking is not None:
            self.looking.show(console)
        show_published([self], console)

    def model_index_entries(self) -> list[huggingface_hub.EvalResult]:
        """The metrics for `ModelCardData(eval_results=...)`, rounded to 4 digits."""
        return [
            huggingface_hub.EvalResult(
                task_type="text-classification",
                task_name="Reward modeling",
                dataset_type=self.settings.get("hub_id") or self.name,
                dataset_name=self.full_title,
                dataset_split="test",
                dataset_revision=self.settings.get("revision"),
                metric_type="accuracy",
                metric_name=metric,
                metric_value=round(value, 4),
            )
            for metric, value in self.metrics.items()
        ]


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


@dataclass(frozen=True)
class PooledResult:
    """
    Several benchmarks as one.

    Parameters:
        names (`tuple[str, ...]`):
            Names of the benchmarks.
        micro (`float`):
            Share of right pairs over all benchmarks, which the paper calls the mean overall accuracy.
        mean (`float`):
            Mean of the shares, each benchmark counting the same.
        correct, n, ties (`int`):
            Numbers as in [`EvalResult`], over all benchmarks.
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
    Pool results: the share of right pairs over several benchmarks, as the paper reports it over its three.

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
        raise ValueError(f"Pass one result for each benchmark to pool; got {', '.join(names) or 'none'}.")
    correct, n, ties = (
        sum(getattr(result, counts)[result.headline] for result in results) for counts in ("correct", "n", "ties")
    )
    mean = sum(result.micro for result in results) / len(results)
    return PooledResult(names, correct / n, mean, correct, n, ties, wilson(correct / n, n))


def show_published(results: Sequence[EvalResult], console: Console | None = None, model: str = "this model") -> None:
    """
    Print results beside the published scores of other models, each with its source.

    Args:
        results (`Sequence[EvalResult]`):
            One result for each benchmark. For the paper's three, the share of all pairs is a column too. Results with
            other images are lines below.
        console, model (`rich.console.Console` and `str`, *optional*):
            Console to print on, standard output by default, and name for the model of the results.
    """
    # A column for each metric that somebody published, and one for the share of all pairs.
    columns = {(r.name, m): value for r in results for m, value in r.metrics.items() if published_scores(r.name, m)}
    if not columns:
        return
    if {result.name for result in results} == set(PAPER_BENCHMARKS):
        columns["pooled", "overall"] = pooled(results).micro
    others: dict[str, dict[tuple[str, str], PublishedScore]] = {}
    for column in columns:
        for score in published_scores(*column):
            others.setdefault(score.model, {})[column] = score
    labels = "; ".join(f"{name}: {label}" for name, label in sorted({(r.name, r.label) for r in results if r.label}))
    rows = [(model, *(f"{100 * value:.1f}" for value in columns.values()), labels)]
    metrics = {r.name: r.looking.metrics for r in results if r.looking is not None}
    for shown in (name for name in SHOWN if name != OWN and any(name in one for one in metrics.values())):
        values = (metrics.get(name, {}).get(shown, {}).get(metric) for name, metric in columns)
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        rows.append((f"{model}, image: {SHOWN[shown]}", *cells, ""))
    num_own = len(rows)
    notes: dict[str, int] = {}
    for name, scores in others.items():
        cells = []
        for published in map(scores.get, columns):
            note = "" if published is None else published.note
            mark = f" [{notes.setdefault(note, len(notes) + 1)}]" if note else ""
            cells.append("" if published is None else f"{100 * published.value:.4g}{mark}")
        rows.append((name, *cells, "; ".join(dict.fromkeys(score.source for score in scores.values()))))
    title = "Beside published scores, %: not measured here, and not always in the same way"
    table = screen_table(("model", *map("\n".join, columns)), rows, last="source", title=title)
    table.columns[-1].overflow = "fold"
    table.rows[num_own - 1].end_section = True
    console = console or Console()
    console.print(table)
    for note, number in notes.items():
        console.print(f"\\[{number}] {note}")


@dataclass(frozen=True)
class ScoreFile:
    """
    Scores of a model from a file, in place of the model in [`evaluate`].

    Parameters:
        path (`str` or `os.PathLike`):
            Parquet or JSON lines file with `pair_id`, `chosen` and `rejected` (or `chosen_reward` and
            `rejected_reward`), such as from [`write_scores`]. It may hold other pairs too.
        by (`str`, *optional*, defaults to `"pair_id"`):
            `"pair_id"` finds the scores of a pair by its id. `"position"` takes line i for row i, for files without
            ids such as LLaMA-Factory's `generated_predictions.jsonl`: another order of the rows is not noticed.
        round (`int`, *optional*):
            Digits to round the scores to, 2 in LLaMA-Factory. Makes ties: only to compare with numbers measured so.
    """

    path: str | os.PathLike
    by: Literal["pair_id", "position"] = "pair_id"
    round: int | None = None

    def __call__(self, dataset: Dataset) -> np.ndarray:
        """Scores of rows. Shapes: returns `(n, 2)`."""
        if self.by not in ("pair_id", "position"):
            raise ValueError(f'`by` is {self.by!r}; it must be "pair_id" or "position".')
        table, scores = _read_scores(self.path)
        if self.by == "pair_id":
            scores = scores[self._positions(table, scores, column_of(dataset, "pair_id").to_pylist())]
        elif len(scores) != len(dataset):
            raise ValueError(_UNMATCHED.format(self.path, len(scores), f"{len(dataset)} rows"))
        return scores if self.round is None else rounded(scores, self.round)

    def _positions(self, table: pa.Table, scores: np.ndarray, pair_ids: list[str]) -> list[int]:
        if "pair_id" not in table.column_names:
            raise ValueError(
                f"{self.path} has no `pair_id`, only {', '.join(table.column_names)}; write it beside the scores, or "
                'set `by="position"` if every row has its line in the same order.'
            )
        positions: dict[str, int] = {}
        for position, pair_id in enumerate(table["pair_id"].to_pylist()):
            first = positions.setdefault(pair_id, position)
            if not np.array_equal(scores[first], scores[position], equal_nan=True):  # `evaluate` refuses NaN
                raise ValueError(f"{self.path} has two scores for `{pair_id}`; keep one of them.")
        if missing := [pair_id for pair_id in pair_ids if pair_id not in positions]:
            raise ValueError(
                f"{self.path} has no score for {len(missing)} of {len(pair_ids)} rows, the first is `{missing[0]}`; "
                "score them, or pass the release that the scores are of."
            )
        return [positions[pair_id] for pair_id in pair_ids]


def write_scores(path: str | os.PathLike, dataset: Dataset, scores: Any) -> None:
    """
    Write scores with the ids of their pairs, at full precision.

    Args:
        path (`str` or `os.PathLike`):
            File to write, `.parquet` or `.jsonl`, whole or not at all.
        dataset, scores (`Dataset` and `array` of shape `(n, 2)`):
            Rows with `pair_id`, and their scores of chosen and rejected.

    Raises:
        `ValueError`: if the suffix is another, or the lengths differ.
    """
    path, scores = Path(path), np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(dataset), 2):
        raise ValueError(f"The scores have the shape {scores.shape}; it must be ({len(dataset)}, 2).")
    table = pa.table({"pair_id": column_of(dataset, "pair_id"), "chosen": scores[:, 0], "rejected": scores[:, 1]})
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"{path} must end with .parquet or .jsonl.")
    with whole_file(path) as part:
        if path.suffix == ".parquet":
            pq.write_table(table, part)
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
            part.write_text("".join(lines), encoding="utf-8")


def split_predictions(
    path: str | os.PathLike, rows: Mapping[str, Dataset], *, round: int | None = None
) -> dict[str, np.ndarray]:
    """
    Split the scores of several benchmarks in one `generated_predictions.jsonl` of LLaMA-Factory.

    The lines have no ids, and LLaMA-Factory silently drops rows: there must be as many lines as rows.

    Args:
        path (`str` or `os.PathLike`):
            File to read.
        rows (`Mapping[str, Dataset]`):
            Benchmarks in the order of the file. The DT2IT-MRM authors' order is MM-RLHF-RewardBench, VL-RewardBench,
            Multimodal RewardBench.
        round (`int`, *optional*):
            As in [`ScoreFile`].

    Returns:
        `dict[str, np.ndarray]`: for each benchmark the scores of its rows, `(n, 2)`.

    Raises:
        `ValueError`: if the numbers of lines and rows differ.
    """
    _, scores = _read_scores(path)
    sizes = {name: len(dataset) for name, dataset in rows.items()}
    if len(scores) != sum(sizes.values()):
        shown = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise ValueError(_UNMATCHED.format(path, len(scores), f"{sum(sizes.values())} rows ({shown})"))
    scores = scores if round is None else rounded(scores, round)
    parts = np.split(scores, np.cumsum(list(sizes.values()))[:-1])
    return dict(zip(sizes, parts, strict=True))


def rounded(scores: np.ndarray, digits: int) -> np.ndarray:
    """Round scores one by one, as Python does: NumPy multiplies and divides, with other results at times."""
    return np.array([[round(score, digits) for score in pair] for pair in scores.tolist()]).reshape(-1, 2)


def _read_scores(path: str | os.PathLike) -> tuple[pa.Table, np.ndarray]:
    path = Path(path)
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.Table.from_pylist(_json_lines(path))
    names: Sequence[str] = next((pair for pair in _NAMES if set(pair) <= set(table.column_names)), ())
    if not names:
        there = ", ".join(table.column_names)
        raise ValueError(f"{path} has the columns {there}; it needs the scores as `chosen` and `rejected`.")
    columns = [table[name] for name in names]
    if any(c.null_count or not (pa.types.is_floating(c.type) or pa.types.is_integer(c.type)) for c in columns):
        raise ValueError(f"{path} has a score that is missing or not a number; fix the file.")
    return table, np.stack([column.to_numpy().astype(np.float64) for column in columns], axis=1)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"Line {number} of {path} is not JSON ({error}); fix the file.") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"Line {number} of {path} holds no object; fix the file.")
    return rows


def update_card(
    path: str | os.PathLike, results: Sequence[EvalResult], *, model_name: str, command: str | None = None
) -> None:
    """Put results into a model card, replacing earlier ones of the same benchmarks and nothing else."""
    card = ModelCard.load(Path(path))
    new = [entry for result in results for entry in result.model_index_entries()]
    for entry in new:
        for name in ("dataset_type", "dataset_name", "metric_name"):
            setattr(entry, name, metadata(getattr(entry, name)))
    measured = {entry.dataset_name for entry in new}
    kept = [entry for entry in card.data.eval_results or [] if entry.dataset_name not in measured]
    card.data.model_name = card.data.model_name or metadata(model_name)
    card.data.eval_results = [*kept, *new]
    for result in results:
        card.text = _with_block(card.text, result, command)
    with whole_file(path) as part:
        part.write_text(str(card), encoding="utf-8")


def card_block(result: EvalResult, command: str | None = None) -> str:
    """A result as Markdown."""
    rows = [(name_cell(name), value, drawn, *counts) for name, value, _, drawn, *counts in result.cells]
    columns = ("metric", "value, %", "95 % interval", "of", "ties")
    lines = [f"### {name_cell(result.full_title)}", "", table(columns, rows)]
    lines += ["", "Intervals by drawing prompts with replacement. Ties count as wrong."]
    lines += map(paragraph, result.notes)
    if (looking := result.looking) is not None:
        lines += ["", f"#### {LOOKING}", "", *([looking.text, ""] if looking.text else [])]
        lines += [table(COLUMNS, looking.cells), "", looking.counted, NOTE]
    if command is not None:
        lines += ["", code_block(command, "bash")]
    return "\n".join(lines)


def _with_block(text: str, result: EvalResult, command: str | None) -> str:
    """Put the table of a benchmark into the text of a card, in place of an earlier one or else behind all others."""
    name = re.sub(r"[^\w .()]+", "-", result.full_title)  # fit for a comment
    if re.search(r"[^\w .()-]", result.full_title):  # and no other's
        name += f" {digest(result.full_title.encode('utf-8', 'replace'))[:8]}"
    start, end = f"<!-- benchmark: {name} -->", f"<!-- end of benchmark: {name} -->"
    block = f"{start}\n{card_block(result, command)}\n{end}"
    if start in text and end in text:
        before, rest = text.split(start, 1)
        return before + block + rest.split(end, 1)[1]
    marks = list(re.finditer(rf"^{HEADING}$|^<!-- end of benchmark: .* -->$", text, flags=re.MULTILINE))
    if not marks:
        return f"{text.rstrip()}\n\n{HEADING}\n\n{block}\n"
    end_of_last = marks[-1].end()
    return f"{text[:end_of_last]}\n\n{block}{text[end_of_last:]}"
