"""A mixture of public sets on disk: each source in shards that survive a kill, then one set in Parquet files.

```
output_dir/
  shards/rlaif_v/00000-of-00004.parquet      clean rows, images embedded
  shards/rlaif_v/00000-of-00004.quarantine.parquet, .refused.jsonl
  shards/rlaif_v/00000-of-00004.json         what happened; written last, so that it says that the shard is done
  mixture/train-00000-of-00002.parquet, mixture/test-...
  report.json
```
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from transformers.utils import logging

from .. import __version__
from ..utils import digest_of, move_aside, whole_file
from .load import load_preferences
from .locations import ImageOptions, with_image_root
from .published import embedded_tables, find_unpublishable, with_image_columns
from .quarantine import quarantine_report, take_out
from .reading import raw_files
from .row_checks import ImageCheck, TokenCounter
from .sources import SOURCES
from .validation import validate


logger = logging.get_logger(__name__)


@dataclass
class SourceSettings:
    """
    One source of a mixture.

    Parameters:
        name (`str`):
            Name of the set or format, as in [`load_preferences`].
        weight (`float`, *optional*):
            Its share in the mixture. Either all sources have one or none.
        max_rows (`int`, *optional*):
            Most of its rows in the mixture.
        num_shards (`int`, *optional*, defaults to `1`):
            Number of parts that it is prepared in.
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
    Settings of the sources of a mixture, out of a configuration file.

    Args:
        sources (`Mapping[str, Mapping]`):
            For each source its settings: those of [`SourceSettings`], and the arguments of [`load_preferences`]
            beside them. Its key is its `name`, unless it has one.

    Returns:
        `dict[str, SourceSettings]`

    Raises:
        `ValueError`: if there is no source, one is not known, a value is out of range, or only some have a weight.
    """
    if not sources:
        raise ValueError("`sources` is empty; name at least one preference set.")
    settings = {}
    for key, given in sources.items():
        given = dict(given or {})
        own = {name: given.pop(name) for name in ("name", "weight", "max_rows", "num_shards") if name in given}
        settings[key] = SourceSettings(**{"name": key, **own}, load=given)
        if settings[key].name not in SOURCES:
            raise ValueError(
                f"{key} names {settings[key].name}, which is no known preference set or format; known are "
                f"{', '.join(sorted(SOURCES))}."
            )
        if settings[key].num_shards < 1:
            raise ValueError(f"`num_shards` of {key} is {settings[key].num_shards}; it must be at least 1.")
    if len({one.weight is None for one in settings.values()}) > 1:
        without = [key for key, one in settings.items() if one.weight is None]
        raise ValueError(
            f"{', '.join(without)} has no `weight`, but others have; give one to every source or to none."
        )
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
    Loads, validates and writes one shard of a source, unless it is there already, made in the same way from the same
    files.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder of the mixture.
        key (`str`):
            Name of the source in the mixture, and what its column `source` says.
        settings ([`SourceSettings`]):
            The source.
        shard (`int`):
            Which shard, from 0.
        image_options, image_check, token_counter, max_length, num_proc (*optional*):
            As in [`validate`].

    Returns:
        `tuple[dict, bool]`: what happened, and whether it happened now.

    Raises:
        `ValueError`: as [`load_preferences`] and [`validate`] do.
    """
    stem = Path(output_dir) / "shards" / key / f"{shard:05d}-of-{settings.num_shards:05d}"
    made_by = {
        "settings": asdict(settings) | {"weight": None, "max_rows": None},  # these are for later
        "files": raw_files(
            SOURCES[settings.name], settings.load.get("path_or_id"), split=settings.load.get("split", "train")
        ),
        "image_check": image_check,
        "image_options": asdict(image_options or ImageOptions()),
        "processing_class": None if token_counter is None else token_counter.tokenizer.name_or_path,
        "max_length": max_length,
        "version": __version__,
    }
    digest = digest_of(made_by)
    done = stem.with_suffix(".json")
    if done.is_file() and (record := json.loads(done.read_text()))["made_by"] == digest:
        return record, False
    if done.is_file():  # whole, and made in another way
        made = (done, *(stem.with_suffix(f".{end}") for end in ("parquet", "quarantine.parquet", "refused.jsonl")))
        aside = [move_aside(file) for file in made if file.is_file()]
        logger.warning(f"{stem} was made with other settings or of other files; it is now {aside[1].name} beside it.")
    refused = stem.with_suffix(".refused.jsonl")
    refused.unlink(missing_ok=True)  # of a run that was killed
    rows = load_preferences(
        settings.name,
        source=key,
        shard=(shard, settings.num_shards),
        num_proc=num_proc,
        quarantine_file=refused,
        **settings.load,
    )
    # Shards hold the images, and go to others: what a row may name is as in `write_parquet`.
    options = image_options or ImageOptions()
    options = replace(options, image_root=settings.load.get("image_root") or options.image_root)
    rows = _without_unpublishable(rows, options, key, refused)
    clean, quarantine = validate(
        rows,
        image_options=options,
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
        reason, summary = next(iter(report.reasons.items()))
        example = f"{summary.example}: {summary.message}"
        raise ValueError(f"No row of {key} can be used; {summary.count} have {reason}. The first, {example}")
    write_parquet(clean, stem.with_suffix(".parquet"), image_options=options)
    before = [json.loads(line)["reason"] for line in _lines(refused)]
    reasons = Counter(report.counts) + Counter(before)
    record = {
        "made_by": digest,
        "pairs": report.rows_in + len(before),
        "clean": report.rows_out,
        "reasons": dict(reasons.most_common()),
    }
    with whole_file(done) as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record, True


def read_shards(output_dir: str | os.PathLike, key: str, num_shards: int) -> Dataset:
    """
    The clean rows of a source, of all shards, memory-mapped.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder of the mixture.
        key (`str`):
            Name of the source in the mixture.
        num_shards (`int`):
            Number of its shards.

    Returns:
        `Dataset`

    Raises:
        `ValueError`: if a shard is not there.
    """
    files = shard_files(output_dir, key, num_shards)
    missing = [file for file in files if not file.with_suffix(".json").is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {num_shards} shards of {key} are not there yet, {missing[0]} the first.")
    return load_dataset("parquet", data_files=list(map(str, files)), split="train")


def shard_files(output_dir: str | os.PathLike, key: str, num_shards: int) -> list[Path]:
    """Where the clean rows of each shard of a source are."""
    folder = Path(output_dir) / "shards" / key
    return [folder / f"{shard:05d}-of-{num_shards:05d}.parquet" for shard in range(num_shards)]


def write_parquet(
    dataset: Dataset,
    path: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
) -> None:
    """
    Writes rows with their images embedded, undecoded, into a Parquet file that needs no other; whole or not at all.

    Args:
        dataset (`Dataset`):
            The rows.
        path (`str` or `os.PathLike`):
            File to write.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in [`ImageOptions`]. Columns
            of such paths, `image` and `images`, become images. Without it, images have to be within the rows: a row
            of somebody else's may name any file of this machine, which would go out with it.
        image_options ([`ImageOptions`], *optional*):
            Where else images may come from; columns of paths stay such.

    Raises:
        [`RowError`]: if an image may not be read, is not there or is none; the message names the row. Then no file is
            written.
    """
    options = with_image_root(image_options, image_root)
    features = dataset.features if image_root is None else with_image_columns(dataset.features)
    with whole_file(path) as part, pq.ParquetWriter(part, schema=features.arrow_schema) as writer:
        for table in embedded_tables(dataset, features, options):
            writer.write_table(table)


def _without_unpublishable(rows: Dataset, options: ImageOptions, key: str, refused: Path) -> Dataset:
    """Rows without those whose images must not go out; these are added to the file of the refused."""
    errors = find_unpublishable(rows, options)
    if not errors:
        return rows
    names = rows.select_columns("pair_id").select(list(errors))["pair_id"]
    notes = [
        {"pair_id": name, "row": row, "reason": error.reason, "message": str(error)}
        for name, (row, error) in zip(names, errors.items(), strict=True)
    ]
    return take_out(rows, list(errors), notes, name=f"row of {key}", file=refused, appends=True)


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from file
