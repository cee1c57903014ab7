"""Sample rows of public sets, with the exact names, nesting and types of their columns and invented values."""

import base64
import json
from pathlib import Path
from typing import Any


def fixture(name: str) -> Any:
    """The rows of `fixtures/{name}.json`, with bytes as bytes."""
    return _with_bytes(json.loads((Path(__file__).parent / "fixtures" / f"{name}.json").read_text(encoding="utf-8")))


def _with_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__bytes_b64__"}:
            return base64.b64decode(value["__bytes_b64__"])
        return {key: _with_bytes(item) for key, item in value.items()}
    return [_with_bytes(item) for item in value] if isinstance(value, list) else value
