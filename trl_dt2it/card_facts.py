"""Facts of a run for the cards of models and of data sets: sources, accuracies, command, and Markdown to say them."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from datasets import Dataset
from huggingface_hub import EvalResult

from .data.columns import column_of
from .data.sources import SOURCES
from .utils import printable, without_secrets


def cell(text: object) -> str:
    """Text from a data set as a cell of a Markdown table: one line, and no markup of its own."""
    plain = printable(text, instead=" ")
    return "".join(f"\\{char}" if char in "\\`*_[]|<>#~$&" else char for char in plain)


def name_cell(text: object) -> str:
    """As [`cell`], for names such as `eval_accuracy`: an underscore within a word is no markup."""
    return re.sub(r"(?<=[^\W_])\\_(?=[^\W_])", "_", cell(text))


def paragraph(text: object) -> str:
    """Text from a data set at the beginning of a line of Markdown: no list, no rule, and no code by its indent."""
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", cell(text).strip())


def code_span(text: object) -> str:
    """Text from a data set as code within a line of Markdown, not of a table."""
    plain = printable(text, instead=" ").strip()
    ticks = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{plain}{space}{ticks}" if plain else ""


def code_block(text: str, language: str) -> str:
    """Lines of code as a block of Markdown that none of them ends."""
    lines = "\n".join(printable(line, instead=" ") for line in text.splitlines())
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return f"{ticks}{language}\n{lines}\n{ticks}"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, of cells that are Markdown already."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def hub_link(repo_id: str, kind: str = "") -> str:
    """A link to a repository on the Hub; `kind` is `"datasets/"` for a data set."""
    return f"[{cell(repo_id)}](https://huggingface.co/{kind}{quote(repo_id, safe='/')})"


def metadata(value: Any) -> Any:
    """Text for the metadata of a card, which YAML can hold whatever it is, but for half a character."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\x85", "\n")  # which YAML reads as a line break
    return [metadata(one) for one in value] if isinstance(value, list) else value


def source_counts(dataset: Any) -> dict[str, int]:
    """
    Pairs of each source.

    Args:
        dataset (`Any`):
            What was trained on.

    Returns:
        `dict[str, int]`: the largest first; rows that do not say theirs as `""`. Empty for a streamed set.
    """
    if not isinstance(dataset, Dataset) or len(dataset) == 0:
        return {}
    if "source" not in dataset.column_names:
        return {"": len(dataset)}
    names = column_of(dataset, "source").fill_null("").to_pylist()
    return dict(Counter(names).most_common())


def licence_of(source: str, licences: Mapping[str, str] | None = None) -> str:
    """
    The licence of a source.

    Args:
        source (`str`):
            What the column `source` says.
        licences (`Mapping[str, str]`, *optional*):
            Licences by source, where they are known otherwise.

    Returns:
        `str`: what is given, or what the publisher of a set of [`load_preferences`] says, or `"unknown"`.
    """
    if licences is not None and source in licences:
        return licences[source]
    return SOURCES[source].licence if source in SOURCES else "unknown"


def hub_ids(sources: Sequence[str]) -> list[str]:
    """Where the public sets among some sources are on the Hub."""
    found = [SOURCES[name].hub_id for name in sources if name in SOURCES]
    return list(dict.fromkeys(one for one in found if one))


def source_lines(counts: Mapping[str, int], licences: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """
    A table of sources.

    Args:
        counts (`Mapping[str, int]`):
            Pairs by source.
        licences (`Mapping[str, str]`, *optional*):
            As in [`licence_of`].

    Returns:
        `list[tuple[str, str, str]]`: source with a link where it is public, pairs, licence.
    """
    lines = []
    for name, pairs in counts.items():
        hub_id = SOURCES[name].hub_id if name in SOURCES else None
        shown = cell(name) or "not named"
        linked = f"[{shown}](https://huggingface.co/datasets/{hub_id})" if hub_id else shown
        lines.append((linked, f"{pairs:,}", cell(licence_of(name, licences))))
    return lines


def evaluation_entries(
    metrics: Mapping[str, float], dataset_name: str | None, eval_dataset: object = None
) -> list[EvalResult]:
    """Accuracy of each evaluation set for the metadata of a card, from the newest metrics under the trainer's names. A
    set may have `title` and `hub_id` in its `info`; where there is one set, pairs held out of `dataset_name` are
    meant."""
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {}
    entries = []
    for key, value in metrics.items():
        if not key.endswith("_accuracy"):
            continue
        name = metadata(key.removeprefix("eval_").removesuffix("accuracy").rstrip("_"))
        info = getattr(sets.get(name), "info", None)
        entries.append(
            EvalResult(
                task_type="text-classification",
                task_name="Reward modeling",
                dataset_type=getattr(info, "hub_id", None) or name or dataset_name or "held-out-pairs",
                dataset_name=getattr(info, "title", None) or name or dataset_name or "held-out pairs",
                metric_type="accuracy",
                metric_name="pair accuracy",
                metric_value=round(value, 4),
            )
        )
    return entries


def run_command(num_processes: int, argv: Sequence[str] | None = None) -> str | None:
    """
    The command that started this process, for whoever wants to repeat it.

    Args:
        num_processes (`int`):
            Number of processes; several are launched by accelerate.
        argv (`Sequence[str]`, *optional*):
            The command line; this process's by default.

    Returns:
        `str`, *optional*: without what may be secret, and with the last part only of paths that start at the root.
        `None` where it is neither a script nor `trl-dt2it`, such as in a notebook.
    """
    script, *words = sys.argv if argv is None else argv
    path = Path(script)
    if path.name == "trl-dt2it":
        start = ["trl-dt2it"]
    elif path.suffix == ".py" and not path.name.startswith("__") and "site-packages" not in path.parts:
        place = f"recipes/{path.name}" if path.parent.name == "recipes" else path.name
        start = [*(("accelerate", "launch") if num_processes > 1 else ("python",)), place]
    else:
        return None
    return shlex.join([*start, *map(_without_root, without_secrets(words))])


def _without_root(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)
