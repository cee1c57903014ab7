"""The last step of preparing data: shards of all sources as one set, duplicates and benchmark rows removed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from .. import __version__
from ..utils import digest_of, move_aside, whole_file, whole_folder
from .canonical import as_image
from .decontamination import decontaminate
from .encoded import column_of, leave_images_encoded, mark_checked, select_rows
from .errors import RowError
from .load import load_preferences
from .locations import placed_image, with_image_root
from .mixing import concatenate, mix, split_by_group
from .prepare import SourceSettings, read_shards, shard_files, write_parquet
from .reading import raw_rows, read_raw
from .sources import SOURCES
from .sources.columns import columns
from .sources.source import Source
from .validation import validate


logger = logging.get_logger(__name__)

# Where a benchmark's rows keep what they ask about, unless the user says otherwise.
_QUESTIONS, _SIDES = ("question", "prompt", "caption"), ("chosen_image", "rejected_image")


def build_mixture(
    output_dir: str | os.PathLike,
    settings: Mapping[str, SourceSettings],
    *,
    benchmarks: Mapping[str, list[dict[str, Any]]] | None = None,
    max_per_group: int | None = None,
    size: int | None = None,
    test_size: float = 0.01,
    rows_per_file: int = 20_000,
    seed: int = 42,
    num_proc: int | None = None,
) -> dict[str, Any]:
    """
    Puts prepared shards together: duplicates and benchmark rows quarantined, mixed, split, written as Parquet files.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder with the shards. The set goes into its folder `mixture`, which is replaced as a whole, and the
            report into `report.json`. A mixture that was made of other shards or settings is moved aside, with its
            report.
        settings (`Mapping[str, SourceSettings]`):
            The sources by name.
        benchmarks (`Mapping[str, list[dict]]`, *optional*):
            Rows with `question` and `images` that must not be trained on, by benchmark.
        max_per_group, size, seed (*optional*):
            As in [`mix`].
        test_size (`float`, *optional*, defaults to `0.01`):
            Share of held-out rows, groups whole; 0 for none.
        rows_per_file (`int`, *optional*, defaults to `20000`):
            Rows of a file.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `dict`: for each source, the number of its pairs at every stage and the reasons of those that were quarantined.

    Raises:
        `ValueError`: if a shard is missing, or as [`mix`] and [`split_by_group`] do.
    """
    output_dir = Path(output_dir)
    shards = {key: read_shards(output_dir, key, one.num_shards) for key, one in settings.items()}
    clean, duplicates = validate(mark_checked(concatenate(shards)), image_check="none", num_proc=num_proc, show=False)
    contaminated: Dataset = clean.select([])
    if benchmarks:
        clean, contaminated = decontaminate(clean, benchmarks, num_proc=num_proc)
    origin = column_of(clean, "source").to_numpy(zero_copy_only=False)  # `prepare_shard` has put the names there
    weights = {key: one.weight for key, one in settings.items() if one.weight is not None}
    mixture = mix(
        {key: select_rows(clean, np.flatnonzero(origin == key)) for key in shards},
        weights=weights or None,
        size=size,
        max_per_source={key: one.max_rows for key, one in settings.items() if one.max_rows is not None},
        max_per_group=max_per_group,
        seed=seed,
    )
    splits = dict(split_by_group(mixture, test_size, seed=seed)) if test_size else {"train": mixture}
    made_by = _made_by(
        output_dir, settings, benchmarks, [max_per_group, size, test_size, rows_per_file, seed, __version__]
    )
    _move_other_aside(output_dir, made_by)
    write_splits(splits, output_dir / "mixture", rows_per_file)

    stages = {
        "duplicates": duplicates,
        "contaminated": contaminated,
        "mixed": mixture,
        "test": mixture.select([]),
        **splits,
    }
    counts = {stage: Counter(column_of(rows, "source").to_pylist()) for stage, rows in stages.items()}
    report: dict[str, Any] = {"version": __version__, "made_by": made_by, "seed": seed, "sources": {}}
    for key, one in settings.items():
        before = _over_shards(output_dir, key, one.num_shards)
        report["sources"][key] = {**before, **{stage: counts[stage][key] for stage in stages}}
    with whole_file(output_dir / "report.json") as part:
        part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _made_by(
    output_dir: Path,
    settings: Mapping[str, SourceSettings],
    benchmarks: Mapping[str, list[dict[str, Any]]] | None,
    others: list[Any],
) -> str:
    """A hash of all that a mixture depends on."""
    shards = [
        json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["made_by"]
        for key, one in settings.items()
        for file in shard_files(output_dir, key, one.num_shards)
    ]
    mixed = {key: [one.weight, one.max_rows] for key, one in settings.items()}
    kept_out = {name: len(rows) for name, rows in (benchmarks or {}).items()}
    return digest_of([shards, mixed, kept_out, others])


def _move_other_aside(output_dir: Path, made_by: str) -> None:
    """Move a mixture that was made in another way aside, with its report."""
    folder, report = output_dir / "mixture", output_dir / "report.json"
    if not (folder.is_dir() and report.is_file()):
        return
    if json.loads(report.read_text(encoding="utf-8")).get("made_by") != made_by:
        aside = [move_aside(one) for one in (report, folder)]
        logger.warning(f"{folder} was made with other settings or of other shards; it is now {aside[1]}.")


def write_splits(splits: Mapping[str, Dataset], folder: Path, rows_per_file: int) -> None:
    """
    Writes splits as `{split}-00000-of-00002.parquet` into a folder, which is replaced only when all is written.

    Args:
        splits (`Mapping[str, Dataset]`):
            The rows by split.
        folder (`Path`):
            The folder; `datasets.load_dataset` reads it.
        rows_per_file (`int`):
            Rows of a file.
    """
    with whole_folder(folder) as part:
        for split, rows in splits.items():
            num_files = max(1, -(-len(rows) // rows_per_file))
            for number in range(num_files):
                file = part / f"{split}-{number:05d}-of-{num_files:05d}.parquet"
                write_parquet(rows.shard(num_files, number, contiguous=True), file)


def read_benchmarks(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """
    Questions and images of benchmarks, for [`decontaminate`].

    Args:
        benchmarks (`Mapping[str, Mapping]`):
            For each benchmark `path_or_id`, `split` (`"test"` by default), `image_root` as in [`load_preferences`],
            and the columns `question` (by default the first of `question`, `prompt` and `caption` that is there) and
            `image`, one name or a list of them (by default those of `image`, `images`, `chosen_image` and
            `rejected_image` that are there). Or, for a benchmark in the layout of a public set, such as the test split
            of HPDv3, its `name` and the arguments of [`load_preferences`] beside it.

    Returns:
        `dict[str, list[dict]]`: rows with `question` and `images`.

    Raises:
        `ValueError`: if a setting is not known, a benchmark has no such column, or an image leaves `image_root`.
    """
    return {name: _benchmark_rows(name, **settings) for name, settings in benchmarks.items()}


def _benchmark_rows(
    benchmark: str,
    path_or_id: str | None = None,
    split: str = "test",
    image_root: str | None = None,
    question: str | None = None,
    image: str | list[str] | None = None,
    name: str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    rows: Iterable[Mapping[str, Any]]
    if name is not None:
        given = {"question": question, "image": image}  # which some adapters take, too
        options |= {option: value for option, value in given.items() if value is not None}
        options |= {"split": split, "image_root": image_root, "reformulate": False}
        rows = leave_images_encoded(load_preferences(name, path_or_id, **options))
        question, image = ("caption", list(_SIDES)) if SOURCES[name].is_t2i else ("prompt", "images")
    elif options:
        raise ValueError(f"The benchmark {benchmark} has the unknown key `{next(iter(options))}`.")
    else:
        rows = raw_rows(read_raw(Source(columns, "unknown"), path_or_id, split=split))
    root = with_image_root(None, image_root)
    named = [image] if isinstance(image, str) else image
    found, seen = list[dict[str, Any]](), set[str]()
    for index, row in enumerate(rows):
        seen |= set(row)
        asks = next((one for one in _QUESTIONS if one in row), "question") if question is None else question
        if asks not in row:
            raise ValueError(f"The benchmark {benchmark} has no column `{asks}`; its columns are {', '.join(row)}.")
        cells = [row.get(column) for column in (("image", "images", *_SIDES) if named is None else named)]
        images = [one for cell in cells for one in (cell if isinstance(cell, list) else [cell]) if one]
        try:
            images = [placed_image(as_image(one), root) for one in images]
        except RowError as error:
            raise ValueError(f"Row {index} of the benchmark {benchmark} cannot be read: {error}") from error
        found.append({"question": row[asks], "t2i_caption": row.get("t2i_caption"), "images": images})
    there = f"its columns are {', '.join(sorted(seen))}."
    if missing := sorted(set(named or ()) - seen):
        raise ValueError(f"The benchmark {benchmark} has no column `{missing[0]}`; {there}")
    if not any(row["images"] for row in found):
        logger.warning(f"The benchmark {benchmark} has no images; if it should, name their column by `image`: {there}")
    return found


def _over_shards(output_dir: Path, key: str, num_shards: int) -> dict[str, Any]:
    """What the records of all shards of a source say together."""
    files = shard_files(output_dir, key, num_shards)
    records = [json.loads(file.with_suffix(".json").read_text(encoding="utf-8")) for file in files]
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record["reasons"])
    return {
        "pairs": sum(record["pairs"] for record in records),
        "clean": sum(record["clean"] for record in records),
        "reasons": dict(reasons.most_common()),
    }
