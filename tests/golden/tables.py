"""Parquet files as JSON holds them: schema, metadata and values, whatever release of PyArrow has written them."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def parquet(path: Path) -> dict[str, Any]:
    """Columns with types, what is in them, and the metadata."""
    table = pq.read_table(path)
    metadata = {name.decode(): json.loads(value) for name, value in (table.schema.metadata or {}).items()}
    columns = {field.name: f"{field.type}{'' if field.nullable else ' not null'}" for field in table.schema}
    return {"columns": columns, "metadata": metadata, "rows": [list(row.values()) for row in table.to_pylist()]}


def files(folder: Path) -> list[str]:
    """Names of all files, the deeper ones with their folders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
