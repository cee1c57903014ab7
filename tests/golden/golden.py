"""Golden files: names and values that must not change by accident, as JSON in `files/`.

They are what the package writes into files of users, or what users write into files for it. A test computes them and
compares; `python -m tests.golden.write` writes them anew, and its diff is then part of the change. What depends on
the releases of transformers, PyArrow or Pillow is left out.
"""

import json
import os
from pathlib import Path
from typing import Any


FILES = Path(__file__).parent / "files"
WRITE = "WRITE_GOLDEN_FILES"


def check(name: str, value: Any) -> None:
    """Compare a value with its golden file, as JSON holds it, to 9 digits; NaN equals itself."""
    text, file = _as_text(_rounded(value)), FILES / f"{name}.json"
    if WRITE in os.environ:
        file.write_text(text + "\n", encoding="utf-8")
    golden = json.loads(file.read_text(encoding="utf-8"), parse_constant=str)
    assert json.loads(text, parse_constant=str) == golden


def _as_text(value: Any, indent: str = "") -> str:
    """JSON whose lists and objects are on one line where they fit."""
    text, inner = json.dumps(value, ensure_ascii=False), f"{indent} "
    if not isinstance(value, (dict, list)) or len(indent + text) <= 110:
        return text
    names = (
        [f"{json.dumps(name, ensure_ascii=False)}: " for name in value]
        if isinstance(value, dict)
        else [""] * len(value)
    )
    parts = value.values() if isinstance(value, dict) else value
    lines = [f"{inner}{name}{_as_text(part, inner)}" for name, part in zip(names, parts, strict=True)]
    return text[0] + "\n" + ",\n".join(lines) + f"\n{indent}{text[-1]}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
