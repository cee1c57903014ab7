"""Rows of a benchmark as canonical rows: from the Hub, from files, or as they are in memory."""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from transformers.utils import logging

from .. import __version__
from ..data.columns import batch_rows, column_of, leave_images_encoded, rows_at_once
from ..data.convert import Conversion
from ..data.load import named_groups, rows_by_group
from ..data.rows import summarise
from ..data.sources.fields import FOLDER_COLUMN, JSON_COLUMN
from ..data.t2i import reformulate_t2i
from .benchmark import Benchmark
from .benchmarks import find_benchmark
from .raw_rows import BenchmarkRows, find_image_root, read_raw_rows
from .training import with_metrics


logger = logging.get_logger(__name__)

Videos: TypeAlias = Literal["auto", "images", "video", "skip"]

# What a canonical row of a benchmark has besides. `row_index` is its place, which no other row has.
_OWN = {"category": Value("string"), "row_index": Value("int64")}
_NO_FRAMES = "no_frames"


def read_benchmark(
    name: str,
    rows: BenchmarkRows | None = None,
    *,
    image_root: str | os.PathLike | None = None,
    split: str = "test",
    revision: str | None = None,
    videos: Videos = "auto",
    max_frames: int = 32,
    both_orders: bool | None = None,
    seed: int = 42,
    on_bad_row: Literal["raise", "leave_out"] = "raise",
    **options: Any,
) -> Dataset:
    """
    The rows of a benchmark as canonical rows, for a scorer, for `eval_dataset`, or to align scores of another model.

    Args:
        name (`str`):
            The benchmark, one of [`BENCHMARKS`].
        rows (`Dataset`, `Iterable[Mapping]`, `str` or `os.PathLike`, *optional*):
            The rows as the benchmark has them, a file or folder with them, or a Hub id; by default the benchmark's own
            place on the Hub. Canonical rows come back as they are.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that the paths of images start from; by default where the files of the rows lie.
        split (`str`, *optional*, defaults to `"test"`):
            Split.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        videos (`str`, *optional*, defaults to `"auto"`):
            What becomes of rows about a video. `"images"`: its frames are several images of the prompt, which any
            model of several images reads. `"video"`: a video, in the column `videos`. `"skip"`: they are dropped.
            `"auto"`: images, or dropped if not all frames are there. What is dropped is counted on screen.
        max_frames (`int`, *optional*, defaults to `32`):
            Most frames of a video, taken evenly.
        both_orders (`bool`, *optional*):
            Whether a text-to-image pair is asked about in both orders, the better image first (`category` is
            `chosen_first`) and second (`chosen_second`). By default only of the benchmarks that do so.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the wording of text-to-image questions, and of the order of images where only one is asked about.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            `"leave_out"` drops rows that cannot be used, and says how many. Ties are always dropped, where a
            benchmark has any.
        options:
            Options of the benchmark's adapter, such as `criteria` of Omni-RewardBench.

    Returns:
        `Dataset`: with the columns of [`~trl_dt2it.data.messages.FEATURES`], `category` and `row_index`. `pair_id` is
        made of the benchmark's own id and a hash of question and answers, and is unique. `group_id` is the same for
        all pairs about one prompt.

    Raises:
        `ValueError`: if the name or an option is not known, if there is nothing to read, or if a row cannot be used.
    """
    benchmark = find_benchmark(name)
    if videos not in ("auto", "images", "video", "skip"):
        raise ValueError(f'`videos` is {videos!r}; it must be "auto", "images", "video" or "skip".')
    if on_bad_row not in ("raise", "leave_out"):
        raise ValueError(f'`on_bad_row` is {on_bad_row!r}; it must be "raise" or "leave_out".')
    if isinstance(rows, Dataset) and {"prompt", "pair_id", "category"} <= set(rows.column_names):
        return with_metrics(rows, name)
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"`image_root` is {image_root}, but there is no such folder.")
    allowed = list(inspect.signature(benchmark.source.convert).parameters)[1:]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"`{name}` has no option `{unknown[0]}`; it takes {', '.join(allowed) or 'none'}.")
    raw, folder = read_raw_rows(benchmark, rows, split=split, revision=revision)
    root, below = (Path(image_root), None) if image_root is not None else find_image_root(raw, folder)
    conversion = Conversion(benchmark.source, name, options, None if root is None else str(root.resolve()), max_frames)
    converted = _convert(raw, conversion, videos, below)
    kept = _without_bad(converted, benchmark, videos, on_bad_row)
    if "images" in kept.column_names and (folder is not None or image_root is not None):
        _warn_of_missing_files(kept, benchmark)
    if benchmark.source.is_t2i:
        ask_both = benchmark.both_orders if both_orders is None else both_orders
        kept = reformulate_t2i(kept, seed=seed, both_orders=ask_both)
        orders = {"ab": "chosen_first", "ba": "chosen_second"}
        categories = [orders[one[-2:]] if ask_both else "" for one in kept["pair_id"]]
        kept = kept.add_column("category", pa.array(categories, pa.string()))
        kept = kept.add_column("row_index", pa.array(np.arange(len(kept))))
    return with_metrics(_with_unique_ids(kept), name)


def eval_datasets(
    benchmarks: Sequence[str] | Mapping[str, BenchmarkRows | None], **reading: Any
) -> dict[str, Dataset]:
    """
    Benchmarks as `eval_dataset` of [`MultimodalRewardTrainer`].

    With `eval_dataset={**eval_datasets(["vl-rewardbench"]), "held_out": pairs}` every evaluation logs
    `eval_vl-rewardbench_macro` and so on.

    Args:
        benchmarks (`Sequence[str]` or `Mapping[str, BenchmarkRows]`):
            Names of benchmarks, which are read from the Hub, or by their names the rows, as in [`read_benchmark`].
        reading:
            Other arguments of [`read_benchmark`].

    Returns:
        `dict[str, Dataset]`: their rows by name.
    """
    given = benchmarks if isinstance(benchmarks, Mapping) else dict.fromkeys(benchmarks)
    return {name: read_benchmark(name, rows, **reading) for name, rows in given.items()}


def _convert(
    raw: Dataset | list[Mapping[str, Any]], conversion: Conversion, videos: Videos, below: str | None
) -> Dataset:
    """Canonical rows, with `reason` and `message` of those that cannot be used. Paths start `below` the image root."""
    source = conversion.source
    features = Features({**conversion.features, **({} if source.is_t2i else _OWN)})
    del features["row"]
    if videos != "video":
        features.pop("videos", None)

    def convert(row: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
        is_video = source.has_videos and _has_video(row)
        if is_video and videos == "skip":
            yield {**dict.fromkeys(features), "row_index": index, "reason": _NO_FRAMES, "message": "skipped"}
            return
        for pair in conversion.convert(row if below is None else {**row, FOLDER_COLUMN: below}, index):
            if is_video and pair["reason"] == "image_missing":
                pair["reason"] = _NO_FRAMES
            if pair.get("videos") and videos != "video":
                pair |= _frames_as_images(pair)
            yield {name: pair.get(name) for name in features} | ({} if source.is_t2i else {"row_index": pair["row"]})

    if source.group_by is not None or not isinstance(raw, Dataset):
        made = [pair for index, row in enumerate(_grouped(raw, source.group_by)) for pair in convert(row, index)]
        return Dataset.from_list(made, features=features)

    def convert_batch(batch: dict[str, list[Any]], indices: list[int], version: str) -> dict[str, list[Any]]:
        pairs = [p for row, index in zip(batch_rows(batch), indices, strict=True) for p in convert(row, index)]
        return {name: [pair[name] for pair in pairs] for name in features}

    # The version is part of what `datasets` finds a cached result by; the code of adapters is not.
    return raw.map(
        convert_batch,
        batched=True,
        with_indices=True,
        batch_size=rows_at_once(raw),
        writer_batch_size=rows_at_once(raw),
        remove_columns=raw.column_names,
        features=features,
        fn_kwargs={"version": __version__},
        desc=f"Reading {conversion.name}",
        **conversion.caching,
    )


def _has_video(row: Mapping[str, Any]) -> bool:
    if JSON_COLUMN not in row:
        return bool(row.get("video"))
    try:
        return bool(json.loads(row[JSON_COLUMN])["video"])
    except (ValueError, KeyError, TypeError):  # if it is no row at all, its conversion says so
        return False


def _grouped(raw: Dataset | list[Mapping[str, Any]], column: str | None) -> list[Any]:
    """The rows, or all rows of each group together where pairs are formed from several."""
    if column is None:
        return list(raw)
    if isinstance(raw, Dataset):
        return [{"group": [raw[int(index)] for index in places]} for places in rows_by_group(raw, column)]
    names = pa.array([row.get(column) for row in raw])
    return [{"group": [raw[index] for index in places]} for places in named_groups(names)]


def _frames_as_images(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The frames of a row's only video as images of its prompt, in their order."""
    (frames,) = pair["videos"]
    blocks = pair["prompt"][0]["content"]
    images = [{"type": "image", "text": None}] * len(frames)
    content = [new for block in blocks for new in (images if block["type"] == "video" else [block])]
    return {"prompt": [{**pair["prompt"][0], "content": content}], "images": list(frames)}


def _without_bad(converted: Dataset, benchmark: Benchmark, videos: Videos, on_bad_row: str) -> Dataset:
    reasons = np.array(column_of(converted, "reason").to_pylist(), dtype=object)
    keep = reasons == ""
    no_frames = reasons == _NO_FRAMES
    if no_frames.any() and videos in ("auto", "skip"):
        category, rest = cast("tuple[str, str]", benchmark.optional_category)
        is_video = no_frames | (np.array(column_of(converted, "category").to_pylist(), dtype=object) == category)
        keep &= ~is_video
        why = (
            "`videos` says so"
            if videos == "skip"
            else "their frames are not there; unpack them, or check `image_root`"
        )
        logger.warning(
            f"Dropped {is_video.sum()} of {len(converted)} rows of {benchmark.title}, those about a video: {why}. "
            f'What is left is not the benchmark that others report on; results are labelled "{rest}".'
        )
        reasons = np.where(is_video, "", reasons)
    bad = np.flatnonzero((reasons != "") & (reasons != "tie"))
    if len(bad) and (on_bad_row == "raise" or len(bad) == len(converted)):
        first = converted[int(bad[0])]
        way_out = "" if len(bad) == len(converted) else ', or set `on_bad_row="leave_out"`'
        raise ValueError(
            f"{len(bad)} of {len(converted)} pairs of {benchmark.title} cannot be used "
            f"({summarise(Counter(reasons[bad]))}). The first, {first['pair_id']}: {first['message']} Fix the rows"
            f"{way_out}."
        )
    if dropped := Counter(reason for reason in reasons if reason):
        logger.warning(
            f"Dropped {dropped.total()} of {len(converted)} pairs of {benchmark.title} ({summarise(dropped)})."
        )
    rows = converted.remove_columns(["reason", "message"])
    return rows if keep.all() else rows.select(np.flatnonzero(keep))


def _warn_of_missing_files(rows: Dataset, benchmark: Benchmark) -> None:
    """Says which images are not there: scores of another model may be aligned without them, and nothing else done."""
    missing = []
    for row in leave_images_encoded(rows.select_columns("images")):
        paths = [image["path"] for image in row["images"] if image["bytes"] is None]
        missing += [path for path in paths if "://" not in path and not Path(path).is_file()][:1]
    if missing:
        logger.warning(
            f"Image files of {len(missing)} of {len(rows)} rows of {benchmark.title} are not there, such as "
            f"{missing[0]}; give the folder that their paths start from as `image_root`."
        )


def _with_unique_ids(rows: Dataset) -> Dataset:
    """Rows whose ids are different: of equal rows, the second is called `id#2`."""
    ids = column_of(rows, "pair_id").to_pylist()
    if len(set(ids)) == len(ids):
        return rows
    seen: Counter[str] = Counter()
    unique = []
    for one in ids:
        seen[one] += 1
        unique.append(one if seen[one] == 1 else f"{one}#{seen[one]}")
    named = rows.remove_columns("pair_id").add_column("pair_id", pa.array(unique, pa.string()))
    return named.select_columns(rows.column_names)
