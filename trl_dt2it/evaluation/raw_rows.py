"""Rows of a benchmark as the benchmark has them, wherever they are, and the folder that their images start from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

from datasets import Dataset
from huggingface_hub import snapshot_download

from ..data.columns import leave_images_encoded
from ..data.load import raw_rows, read_raw
from .benchmark import Benchmark


BenchmarkRows: TypeAlias = Dataset | Iterable[Mapping[str, Any]] | str | os.PathLike


def read_raw_rows(
    benchmark: Benchmark, rows: BenchmarkRows | None, *, split: str, revision: str | None
) -> tuple[Dataset | list[Mapping[str, Any]], Path | None]:
    """Rows as the benchmark has them, images encoded, and the folder that they come from."""
    if isinstance(rows, Dataset):
        return leave_images_encoded(rows.with_format(None)), None
    if rows is not None and not isinstance(rows, (str, os.PathLike)):
        return list(rows), None
    if rows is None and benchmark.source.hub_id is None:
        raise ValueError(f"{benchmark.title} has no known place on the Hub; give its rows, or a file with them.")
    place = os.fspath(rows if rows is not None else str(benchmark.source.hub_id))
    path = Path(place).expanduser()
    if benchmark.whole_repository and not path.exists() and not path.suffix and place.count("/") == 1:
        path = Path(snapshot_download(place, repo_type="dataset", revision=revision))
    if not path.exists():
        return cast(Dataset, read_raw(benchmark.source, place, split=split, revision=revision)), None
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".tsv":
        return cast(Dataset, Dataset.from_csv(str(path), sep="\t", keep_default_na=False)), folder
    if path.suffix == ".json" and (nested := _nested_pairs(path)) is not None:
        return nested, folder
    return cast(Dataset, read_raw(benchmark.source, path, split=split)), folder


def _nested_pairs(path: Path) -> list[Mapping[str, Any]] | None:
    """The rows of a JSON object that holds them under `pairs`."""
    with path.open(encoding="utf-8-sig") as file:
        if file.read(4096).lstrip()[:1] != "{":
            return None
        file.seek(0)
        try:
            content = json.load(file)
        except ValueError:  # JSON lines
            return None
    return content.get("pairs")


def find_image_root(raw: Dataset | list[Mapping[str, Any]], folder: Path | None) -> tuple[Path | None, str | None]:
    """The folder that no path of an image may leave, and the folder in it that paths start from: of those that
    benchmarks use, the one in which the first path leads to a file."""
    if folder is None:
        return None, None
    paths = [
        Path(row[column])
        for row in _first_rows(raw)
        for column in ("image", "Image", "video", "image_path")
        if isinstance(row.get(column), str) and 0 < len(row[column]) < 1000
    ]
    for place in (folder, folder / "images", folder.parent) if paths and not paths[0].is_absolute() else ():
        if (place / paths[0]).exists():
            # In the cache of the Hub, files are links to others beside the snapshots.
            is_cache = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
            return (folder.parents[1], str(place.relative_to(folder.parents[1]))) if is_cache else (place, None)
    return None, None


def _first_rows(raw: Dataset | list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    start = raw.select(range(min(20, len(raw)))) if isinstance(raw, Dataset) else raw[:20]
    return iter(raw_rows(start)) if isinstance(start, Dataset) else iter(start)
