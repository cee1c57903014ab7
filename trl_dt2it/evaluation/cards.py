"""Results of benchmarks in the card of a model: in its metadata, and as a table of each benchmark in its text."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from ..training.model_card import code_block, metadata, name_cell, paragraph, table
from ..utils import digest, whole_file
from .result import EvalResult


HEADING = "## Benchmarks"


def update_card(
    path: str | os.PathLike, results: Sequence[EvalResult], *, model_name: str, command: str | None = None
) -> None:
    """
    Puts results into a model card. Earlier ones of the same benchmarks are replaced, and all else stays as it is.

    Args:
        path (`str` or `os.PathLike`):
            The `README.md`.
        results (`Sequence[EvalResult]`):
            One result for each benchmark.
        model_name (`str`):
            What the metadata calls the model, if they do not say yet.
        command (`str`, *optional*):
            The command that measured.
    """
    card = ModelCard.load(Path(path))
    new = [entry for result in results for entry in result.model_index_entries()]
    for entry in new:
        for name in ("dataset_type", "dataset_name", "metric_name"):
            setattr(entry, name, metadata(getattr(entry, name)))
    measured = {entry.dataset_name for entry in new}
    kept = [entry for entry in card.data.eval_results or [] if entry.dataset_name not in measured]
    card.data.model_name = card.data.model_name or metadata(model_name)
    card.data.eval_results = [*kept, *new]
    text = card.text
    for result in results:
        text = _with_block(text, result, command)
    card.text = text
    with whole_file(path) as part:
        part.write_text(str(card), encoding="utf-8")


def card_block(result: EvalResult, command: str | None = None) -> str:
    """
    A result as Markdown.

    Args:
        result ([`EvalResult`]):
            The result.
        command (`str`, *optional*):
            The command that measured it.

    Returns:
        `str`: a heading, a table with a line for each metric, notes and the command.
    """
    rows = []
    for metric, value in result.metrics.items():
        interval, n, ties = result.bootstrap.get(metric), result.n.get(metric), result.ties.get(metric)
        cells = (
            name_cell(metric),
            f"{100 * value:.1f}",
            "" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}",
            "" if n is None else f"{n:,}",
            "" if ties is None else f"{ties:,}",
        )
        rows.append(cells)
    columns = ("metric", "value, %", "95 % interval", "of", "ties")
    lines = [f"### {name_cell(_title(result))}", "", table(columns, rows)]
    lines += ["", "Intervals by drawing prompts with replacement. Ties count as wrong."]
    lines += map(paragraph, result.notes)
    if command is not None:
        lines += ["", code_block(command, "bash")]
    return "\n".join(lines)


def _title(result: EvalResult) -> str:
    return f"{result.title} ({result.label})" if result.label else result.title


def _with_block(text: str, result: EvalResult, command: str | None) -> str:
    """The text of a card with the table of a benchmark in it, where an earlier one was or else behind all others."""
    title = _title(result)
    name = re.sub(r"[^\w .()]+", "-", title)  # fit for a comment
    if re.search(r"[^\w .()-]", title):  # and no other's
        name += f" {digest(title.encode('utf-8', 'replace'))[:8]}"
    start, end = f"<!-- benchmark: {name} -->", f"<!-- end of benchmark: {name} -->"
    block = f"{start}\n{card_block(result, command)}\n{end}"
    if start in text and end in text:
        before, rest = text.split(start, 1)
        return before + block + rest.split(end, 1)[1]
    marks = list(re.finditer(rf"^{HEADING}$|^<!-- end of benchmark: .* -->$", text, flags=re.MULTILINE))
    if not marks:
        return f"{text.rstrip()}\n\n{HEADING}\n\n{block}\n"
    place = marks[-1].end()
    return f"{text[:place]}\n\n{block}{text[place:]}"
