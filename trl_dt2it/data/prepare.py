"""Preparation of a training mixture in resumable shards: validated, deduplicated, decontaminated, mixed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from transformers.utils import logging

from .. import __version__
from ..utils import digest_of, move_aside, read_json, run_parts, whole_file, whole_folder, write_json
from .columns import column_of, is_ranked, leave_images_encoded, mark_checked, select_rows
from .contents import read_encoded
from .decontamination import all_images, decontaminate, row_questions
from .export import embedded_tables, find_unpublishable, with_image_columns
from .images import ImageOptions, placed_image, with_image_root
from .load import load_preferences, raw_files, raw_rows, read_raw
from .mixing import concatenate, mix, split_by_group
from .ranked import to_pairs
from .rows import RowError, image_identity
from .sources import SOURCES
from .sources.fields import Source
from .sources.trl_rows import columns
from .validation import ImageCheck, TokenCounter, quarantine_report, take_out, validate


logger = logging.get_logger(__name__)

_QUESTIONS, _SIDES = ("question", "prompt", "caption"), ("chosen_image", "rejected_image")  # columns of benchmarks


@dataclass
class SourceSettings:
    """
    Settings of one source of a mixture.

    Parameters:
        name (`str`):
            Name of the set or format, as in [`load_preferences`].
        weight (`float`, *optional*):
            Share in the mixture, above 0. Either all sources have one or none.
        max_rows, num_shards (`int`, *optional*):
            Most rows of the source in the mixture, and number of shards to prepare it in, 1 by default.
        load (`dict`, *optional*):
            Other arguments of [`load_preferences`]: `path_or_id`, `split`, `image_root`, `seed`, ...
    """

    name: str
    weight: float | None = None
    max_rows: int | None = None
    num_shards: int = 1
    load: dict[str, Any] = field(default_factory=dict)


def read_settings(sources: Mapping[str, Mapping[str, Any] | None]) -> dict[str, SourceSettings]:
    """
    Read the settings of the sources of a mixture from a configuration.

    Args:
        sources (`Mapping[str, Mapping]`):
            Settings by source: those of [`SourceSettings`], and the arguments of [`load_preferences`] beside them. The
            key is the `name`, unless there is one.

    Returns:
        `dict[str, SourceSettings]`

    Raises:
        `ValueError`: if there is no source, one is not known or out of range, or only some have a weight.
    """
    if not sources:
        raise ValueError("`sources` is empty; name at least one preference set.")
    settings = {}
    for key, given in sources.items():
        given = dict(given or {})
        own = {name: given.pop(name) for name in ("name", "weight", "max_rows", "num_shards") if name in given}
        settings[key] = SourceSettings(**{"name": key, **own}, load=given)
        if settings[key].name not in SOURCES:
            message = f"{key} names {settings[key].name}, which is no known preference set or format; known are "
            raise ValueError(f"{message}{', '.join(sorted(SOURCES))}.")
        if settings[key].num_shards < 1:
            raise ValueError(f"`num_shards` of {key} is {settings[key].num_shards}; it must be at least 1.")
    without = [key for key, source in settings.items() if source.weight is None]
    if 0 < len(without) < len(settings):
        raise ValueError(f"{', '.join(without)} has no `weight`, but others have; give one to every source or none.")
    return settings


def prepare_shard(
    output_dir: str | os.PathLike,
    key: str,
    settings: SourceSettings,
    shard: int,
    *,
    image_options: ImageOptions | None = None,
    image_check: ImageCheck = "header",
    token_counter: TokenCounter | None = None,
    max_length: int | None = None,
    num_proc: int | None = None,
) -> tuple[dict[str, Any], bool]:
    """
    Load, validate and write one shard of a source, unless it is there already, made of the same files and settings.

    Args:
        output_dir, key (`str` or `os.PathLike`, `str`):
            Folder of the mixture, and name of the source in it and in the column `source`.
        settings, shard ([`SourceSettings`], `int`):
            Settings of the source, and index of the shard, from 0.
        image_options, image_check, token_counter, max_length, num_proc (*optional*):
            As in [`validate`].

    Returns:
        `tuple[dict, bool]`: the record of the shard, with the numbers of its `pairs`, of those `clean` and of
        `reasons`, and whether it was made now.

    Raises:
        `ValueError`: as [`load_preferences`] and [`validate`] do.
    """
    stem = Path(output_dir) / "shards" / key / f"{shard:05d}-of-{settings.num_shards:05d}"
    path_or_id, split = settings.load.get("path_or_id"), settings.load.get("split", "train")
    made_by = {
        "settings": asdict(settings) | {"weight": None, "max_rows": None},  # these are for later
        "files": raw_files(SOURCES[settings.name], path_or_id, split),
        "image_check": image_check,
        "image_options": asdict(image_options or ImageOptions()),
        "processing_class": None if token_counter is None else token_counter.tokenizer.name_or_path,
        "max_length": max_length,
        "version": __version__,
    }
    digest = digest_of(made_by)
    done = stem.with_suffix(".json")
    if (record := read_json(done)) is not None:
        if record["made_by"] == digest:
            return record, False
        # The record first: whoever is killed in between leaves no record of missing rows.
        made = (done, *(stem.with_suffix(f".{end}") for end in ("parquet", "quarantine.parquet", "refused.jsonl")))
        aside = [move_aside(file).name for file in made if file.is_file()]
        logger.warning(f"{stem} was made with other settings or of other files; it is now {aside[:2][-1]} beside it.")
    refused = stem.with_suffix(".refused.jsonl")
    refused.unlink(missing_ok=True)  # of a run that was killed
    part = (shard, settings.num_shards)
    rows = load_preferences(
        settings.name, source=key, shard=part, num_proc=num_proc, quarantine_file=refused, **settings.load
    )
    rows = to_pairs(rows) if is_ranked(rows) else rows
    # Shards hold the images, and go to others: rows may name the same images as in `write_parquet`.
    limits = image_options or ImageOptions()
    limits = replace(limits, image_root=settings.load.get("image_root") or limits.image_root)
    errors = find_unpublishable(rows, limits)
    names = rows.select_columns("pair_id").select(list(errors))["pair_id"]
    notes = [
        {"pair_id": name, "row": row, "reason": error.reason, "message": str(error)}
        for name, (row, error) in zip(names, errors.items(), strict=True)
    ]
    rows = take_out(rows, list(errors), Dataset.from_list(notes), name=f"row of {key}", file=refused, appends=True)
    clean, quarantine = validate(
        rows,
        image_options=limits,
        image_check=image_check,
        token_counter=token_counter,
        max_length=max_length,
        duplicates=False,  # they may lie in different shards
        num_proc=num_proc,
        quarantine_file=stem.with_suffix(".quarantine.parquet"),
        show=False,
    )
    report = quarantine_report(clean, quarantine)
    if report.rows_out == 0:
        reason, first = next(iter(report.reasons.items()))
        message = f"No row of {key} can be used; {first.count} have {reason}. The first, "
        advice = "" if key in SOURCES else SOURCES[settings.name].image_advice(reason)  # rows have the key as source
        raise ValueError(f"{message}{first.example}: {first.message}{advice}")
    write_parquet(clean, stem.with_suffix(".parquet"), image_options=limits)
    before: Counter[str] = Counter()
    if refused.is_file():
        with refused.open(encoding="utf-8") as lines:
            before.update(json.loads(line)["reason"] for line in lines)
    record = {
        "made_by": digest,
        "pairs": report.rows_in + before.total(),
        "clean": report.rows_out,
        "reasons": dict((Counter(report.counts) + before).most_common()),
    }
    write_json(done, record)
    return record, True


def prepare_part(
    output_dir: str | os.PathLike, settings: Mapping[str, SourceSettings], part: tuple[str, int], **options: Any
) -> tuple[dict[str, Any], bool]:
    """Prepare a shard of a source, given by both, as [`prepare_shard`] does."""
    key, shard = part
    return prepare_shard(output_dir, key, settings[key], shard, **options)


def write_parquet(
    dataset: Dataset,
    path: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
) -> None:
    """
    Write rows with their images embedded, undecoded, into a Parquet file, whole or not at all.

    Args:
        dataset, path (`Dataset`, `str` or `os.PathLike`):
            Rows of any kind, and file to write.
        image_root, image_options (*optional*):
            Folder of the images and other limits on them, as in [`ImageOptions`]. With a folder, paths in `image` and
            `images` become images. Without it, images have to be within the rows: somebody else's row may name any
            file of this machine.

    Raises:
        [`RowError`]: if an image may not be read or is none; the message names the row, and no file is written.
    """
    options = with_image_root(image_options, image_root)
    features = dataset.features if image_root is None else with_image_columns(dataset.features)
    with whole_file(path) as part, pq.ParquetWriter(part, schema=features.arrow_schema) as writer:
        for table in embedded_tables(dataset, features, options):
            writer.write_table(table)


def build_mixture(
    output_dir: str | os.PathLike,
    settings: Mapping[str, SourceSettings],
    *,
    benchmarks: Mapping[str, list[dict[str, Any]]] | None = None,
    max_per_group: int | None = None,
    size: int | None = None,
    test_size: float = 0.01,
    rows_per_file: int = 20_000,
    extend: Callable[[Dataset], Dataset] | None = None,
    seed: int = 42,
    num_proc: int | None = None,
) -> dict[str, Any]:
    """
    Put prepared shards together: duplicates and benchmark rows quarantined, mixed, split, written as Parquet files.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder with the shards. The set goes into its folder `mixture`, which is replaced as a whole, and the
            report into `report.json`. One of other shards, settings or benchmarks is moved aside, with its report.
        settings (`Mapping[str, SourceSettings]`):
            Settings of the sources by name.
        benchmarks (`Mapping[str, list[dict]]`, *optional*):
            Rows with `question` and `images` that must not be trained on, by benchmark.
        max_per_group, size, seed (*optional*):
            As in [`mix`].
        test_size (`float`, *optional*, defaults to `0.01`):
            Share of held-out rows, groups whole; 0 for none.
        rows_per_file, num_proc (`int`, *optional*):
            Rows of a file, 20,000 by default, and number of processes.
        extend (`Callable[[Dataset], Dataset]`, *optional*):
            Function that adds rows to the training split, such as a `functools.partial` of
            [`~trl_dt2it.debias.counterfactual_pairs`] with `with_originals=True`. They are shuffled in, and are
            `added` in the report. Keywords of a `partial` are part of the settings.

    Returns:
        `dict`: the report: the pairs of each source at every stage, and the reasons of those quarantined.

    Raises:
        `ValueError`: if a shard is missing, or as [`mix`] and [`split_by_group`] do.
    """
    output_dir = Path(output_dir)
    files = {key: _shard_files(output_dir, key, source.num_shards) for key, source in settings.items()}
    shards = {key: load_dataset("parquet", data_files=list(map(str, files[key])), split="train") for key in settings}
    records = {key: [read_json(file.with_suffix(".json")) for file in files[key]] for key in settings}
    # Our own output, of which `prepare_shard` checked every row before it wrote it.
    clean, duplicates = validate(mark_checked(concatenate(shards)), image_check="none", num_proc=num_proc, show=False)
    contaminated: Dataset = clean.select([])
    if benchmarks:
        clean, contaminated = decontaminate(clean, benchmarks, num_proc=num_proc)
    origin = column_of(clean, "source").to_numpy(zero_copy_only=False)  # `prepare_shard` has put the names there
    weights = {key: source.weight for key, source in settings.items() if source.weight is not None}
    mixture = mix(
        {key: select_rows(clean, np.flatnonzero(origin == key)) for key in shards},
        weights=weights or None,
        size=size,
        max_per_source={key: source.max_rows for key, source in settings.items() if source.max_rows is not None},
        max_per_group=max_per_group,
        seed=seed,
    )
    splits = dict(split_by_group(mixture, test_size, seed=seed)) if test_size else {"train": mixture}
    drawn = splits["train"]
    if extend is not None:
        splits["train"] = extend(drawn).shuffle(seed)
    made_by = digest_of(
        [
            [record["made_by"] for key in settings for record in records[key]],
            {key: [source.weight, source.max_rows] for key, source in settings.items()},
            {name: _benchmark_digest(rows) for name, rows in (benchmarks or {}).items()},
            [max_per_group, size, test_size, rows_per_file, seed, __version__],
            *([] if extend is None else [getattr(extend, "keywords", repr(extend))]),
        ]
    )
    folder, report_file = output_dir / "mixture", output_dir / "report.json"
    before = read_json(report_file)
    if folder.is_dir() and before is not None and before.get("made_by") != made_by:
        move_aside(report_file)
        aside = move_aside(folder)
        logger.warning(f"{folder} was made with other settings, shards or benchmarks; it is now {aside}.")
    with whole_folder(folder) as part:
        counted = {split: max(1, -(-len(rows) // rows_per_file)) for split, rows in splits.items()}
        made = [(split, number, count) for split, count in counted.items() for number in range(count)]
        for _ in run_parts(partial(_write_file, splits, part), made, "Writing"):
            pass
    stages = {"duplicates": duplicates, "contaminated": contaminated, "mixed": mixture}
    stages |= {"test": mixture.select([]), **splits}
    counts = {stage: Counter(column_of(rows, "source").to_pylist()) for stage, rows in stages.items()}
    if extend is not None:
        counts["added"] = counts["train"] - Counter(column_of(drawn, "source").to_pylist())
    report: dict[str, Any] = {"version": __version__, "made_by": made_by, "seed": seed, "sources": {}}
    for key in settings:
        reasons = sum((Counter(record["reasons"]) for record in records[key]), Counter[str]())
        report["sources"][key] = {
            **{number: sum(record[number] for record in records[key]) for number in ("pairs", "clean")},
            "reasons": dict(reasons.most_common()),
            **{stage: count[key] for stage, count in counts.items()},
        }
    write_json(report_file, report, ensure_ascii=False)
    return report


def _write_file(splits: Mapping[str, Dataset], folder: Path, file: tuple[str, int, int]) -> None:
    """Write a file of a split, given by its number and the number of files."""
    split, number, count = file
    rows = splits[split].shard(count, number, contiguous=True)
    write_parquet(rows, folder / f"{split}-{number:05d}-of-{count:05d}.parquet")


def _benchmark_digest(rows: list[dict[str, Any]]) -> str:
    """Hash what [`decontaminate`] compares of the rows of a benchmark: questions, and images by their bytes."""
    options = ImageOptions()
    images = ([image_identity(read_encoded(image, options)) for image in all_images(row)] for row in rows)
    return digest_of(list(zip(map(row_questions, rows), images, strict=True)))


def _shard_files(output_dir: Path, key: str, num_shards: int) -> list[Path]:
    """List the files of clean rows of a source, all of which have to be there."""
    folder = output_dir / "shards" / key
    files = [folder / f"{shard:05d}-of-{num_shards:05d}.parquet" for shard in range(num_shards)]
    if missing := [file for file in files if not file.with_suffix(".json").is_file()]:
        raise ValueError(f"{len(missing)} of {num_shards} shards of {key} are not there yet, {missing[0]} the first.")
    return files


def read_benchmarks(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """
    Read the questions and images of benchmarks, for [`decontaminate`].

    Args:
        benchmarks (`Mapping[str, Mapping]`):
            Settings by benchmark: `path_or_id`, `split` (`"test"` by default), `image_root` as in
            [`load_preferences`], and the names of the columns `question` (by default the first of `question`,
            `prompt` and `caption`) and `image`, a string or a list (by default `image`, `images`, `chosen_image` and
            `rejected_image`). Or, for a benchmark in the layout of a public set, such as the test split of HPDv3, its
            `name` and the arguments of [`load_preferences`].

    Returns:
        `dict[str, list[dict]]`: rows with `question` and `images`, by benchmark.

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
    made, seen = list[dict[str, Any]](), set[str]()
    for index, row in enumerate(rows):
        seen |= set(row)
        asks = next((name for name in _QUESTIONS if name in row), "question") if question is None else question
        if asks not in row:
            raise ValueError(f"The benchmark {benchmark} has no column `{asks}`; its columns are {', '.join(row)}.")
        cells = [row.get(column) for column in (("image", "images", *_SIDES) if named is None else named)]
        images = [item for cell in cells for item in (cell if isinstance(cell, list) else [cell]) if item]
        try:
            images = [placed_image(item, root) for item in images]
        except RowError as error:
            raise ValueError(f"Row {index} of the benchmark {benchmark} cannot be read: {error}") from error
        made.append({"question": row[asks], "t2i_caption": row.get("t2i_caption"), "images": images})
    there = f"its columns are {', '.join(sorted(seen))}."
    if missing := sorted(set(named or ()) - seen):
        raise ValueError(f"The benchmark {benchmark} has no column `{missing[0]}`; {there}")
    if not any(row["images"] for row in made):
        logger.warning(f"The benchmark {benchmark} has no images; if it should, name their column by `image`: {there}")
    return made
