"""Text that the cards of models and data sets share: Markdown that data cannot break, sources, and the command."""

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

from ..utils import printable, without_secrets
from .columns import column_of
from .sources import SOURCES


PROJECT_URL = "https://pypi.org/project/trl-dt2it"

PAPER: dict[str, str] = {
    "title": "DT2IT-MRM: Debiased Preference Construction and Iterative Training for Multimodal Reward Modeling",
    "id": "2604.19544",
    "citation": """\
@article{zhang2026dt2it,
    title         = {{DT2IT-MRM: Debiased Preference Construction and Iterative Training for Multimodal Reward
                     Modeling}},
    author        = {Zhang, Zhihong and Zhao, Jie and Huang, Xiaojian and Xu, Jin and Luo, Zhuodong and Liu, Xin and
                     Wei, Jiansheng and Chen, Xuejin},
    journal       = {arXiv preprint arXiv:2604.19544},
    year          = {2026},
}""",
}


def cell(text: object) -> str:
    """Escape text from a data set as a cell of a Markdown table."""
    plain = printable(text, instead=" ")
    return "".join(f"\\{char}" if char in "\\`*_[]|<>#~$&" else char for char in plain)


def name_cell(text: object) -> str:
    """Escape a name such as `eval_accuracy` as a cell; an underscore within a word is no markup."""
    return re.sub(r"(?<=[^\W_])\\_(?=[^\W_])", "_", cell(text))


def paragraph(text: object) -> str:
    """Escape text from a data set at the beginning of a line of Markdown, where it could start a list or a rule."""
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", cell(text).strip())


def code_span(text: object) -> str:
    """Quote text from a data set as code within a line of Markdown, outside of tables."""
    plain = printable(text, instead=" ").strip()
    ticks = _fence(plain, 1)
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{plain}{space}{ticks}" if plain else ""


def code_block(text: str, language: str) -> str:
    """Quote lines as a code block of Markdown that none of them ends."""
    lines = "\n".join(printable(line, instead=" ") for line in text.splitlines())
    ticks = _fence(lines, 3)
    return f"{ticks}{language}\n{lines}\n{ticks}"


def _fence(text: str, least: int) -> str:
    return "`" * max([least, *(len(ticks) + 1 for ticks in re.findall("`+", text))])


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table of cells that are Markdown already."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def hub_link(repo_id: str, kind: str = "") -> str:
    """Link to a repository on the Hub; `kind` is `"datasets/"` for a data set."""
    return f"[{cell(repo_id)}](https://huggingface.co/{kind}{quote(repo_id, safe='/')})"


def metadata(value: Any) -> Any:
    """Replace in text for a card's metadata what YAML cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\x85", "\n")  # which YAML reads as a line break
    return list(map(metadata, value)) if isinstance(value, list) else value


def source_counts(dataset: Any) -> dict[str, int]:
    """Count the pairs of each source, most frequent first."""
    if not isinstance(dataset, Dataset) or len(dataset) == 0:
        return {}
    if "source" not in dataset.column_names:
        return {"": len(dataset)}
    names = column_of(dataset, "source").fill_null("").to_pylist()
    return dict(Counter(names).most_common())


def licence_of(source: str, licences: Mapping[str, str] | None = None) -> str:
    """Return the license of a source."""
    known = SOURCES[source].licence if source in SOURCES else "unknown"
    return (licences or {}).get(source, known)


def hub_ids(sources: Sequence[str]) -> list[str]:
    """Return the Hub ids of the public sets among some sources."""
    ids = (SOURCES[name].hub_id for name in sources if name in SOURCES)
    return list(dict.fromkeys(filter(None, ids)))


def source_lines(counts: Mapping[str, int], licences: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Return a line for each source of a table: its linked name, its number of pairs and its license."""
    lines = []
    for name, pairs in counts.items():
        shown = cell(name) or "not named"
        if name in SOURCES and (hub_id := SOURCES[name].hub_id):
            shown = f"[{shown}](https://huggingface.co/datasets/{hub_id})"
        lines.append((shown, f"{pairs:,}", cell(licence_of(name, licences))))
    return lines


def run_command(num_processes: int, argv: Sequence[str] | None = None) -> str | None:
    """Return the command that started this process, without secrets, or `None` if it is not reproducible."""
    script, *words = sys.argv if argv is None else argv
    path = Path(script)
    if path.name == "trl-dt2it":
        start = ["trl-dt2it"]
    elif path.suffix == ".py" and not path.name.startswith("__") and "site-packages" not in path.parts:
        place = f"recipes/{path.name}" if path.parent.name == "recipes" else path.name
        start = ["accelerate", "launch", place] if num_processes > 1 else ["python", place]
    else:
        return None
    return shlex.join([*start, *map(_without_root, without_secrets(words))])


def _without_root(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)
