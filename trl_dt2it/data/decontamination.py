"""Training rows that are in a benchmark, found and quarantined.

Benchmarks are made of the public sets that reward models train on. An image is in both, but encoded again and scaled,
so that no checksum finds it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from transformers.utils import logging

from .arrow_rows import look_at_all
from .benchmark_search import FOUND, MATCH_BY_ID, NO_MATCH, Match, Search, read_benchmarks, search_table
from .encoded import select_rows
from .locations import ImageOptions, with_image_root
from .quarantine import NOTES, check_free, quarantined_rows, write_quarantine
from .similarity import HASH_BITS


logger = logging.get_logger(__name__)

_NOTES = Features({**NOTES, "distance": Value("int64")})

# What rows of VL-RewardBench are called, by the set that they are of. A number is a row's place in it. Others, such as
# `mathverse_...`, `mmmu_...` and those from VLFeedback, are of sets that are not known by such numbers.
_VL_REWARDBENCH = {
    "rlaif_v": re.compile(r"RLAIF-V[-_](\d+)"),
    "rlhf_v": re.compile(r"RLHF-V[-_](\d+)"),
    "povid": re.compile(r"hallucination_pair[-_](\d+)"),
    "wildvision_battle": re.compile(r"wildvision-battle[-_](\d+)"),
}


def decontaminate(
    train: Dataset,
    benchmark_rows: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
    max_distance: int = 32,
    match: Match = "both",
    source_ids: Mapping[str, Collection[str | int]] | None = None,
    num_proc: int | None = None,
    dropped_file: str | os.PathLike | None = None,
) -> tuple[Dataset, Dataset]:
    """
    Quarantines the training rows that are in a benchmark.

    A question is the same if it differs in nothing but case, punctuation and white space. A text-to-image pair, before
    or after [`reformulate_t2i`], asks its caption, whatever its wording, language and order on either side. An image
    is the same if its perceptual hash (144 bits) differs in no more than `max_distance` bits, which lets it be encoded
    again, scaled, and cropped by some percent. Frames of videos are not compared.

    Args:
        train (`Dataset`):
            Preference rows, or text-to-image pairs with `caption`.
        benchmark_rows (`Dataset`, `Iterable[Mapping]`, or `Mapping` of these by name):
            Rows of one benchmark, or of several by name: preference rows, or rows with `question` and `image` or
            `images`.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in [`ImageOptions`], on both
            sides.
        image_options ([`ImageOptions`], *optional*):
            Where else images may come from, on both sides.
        max_distance (`int`, *optional*, defaults to `32`):
            Most bits, from 0 to 144, in which the hashes of one image may differ.
        match (`str`, *optional*, defaults to `"both"`):
            `"both"`: the question and one image are the same, or the question if neither row has images. Only images
            of rows whose question matches are decoded, so that a million rows cost little. `"image"`: one image is the
            same, whatever the question; decodes every image. `"question"`: the question is, whatever the images.
        source_ids (`Mapping[str, Collection]`, *optional*):
            By `source`, ids of rows that are quarantined in any case: their `source_id`, or the number in their
            `pair_id`, such as `7` in `"povid-7"`. See [`vl_rewardbench_source_ids`].
        num_proc (`int`, *optional*):
            Number of processes.
        dropped_file (`str` or `os.PathLike`, *optional*):
            Parquet file for the quarantined rows, images as they are.

    Returns:
        `tuple[Dataset, Dataset]`: the other rows, in their order, and the quarantined ones with `row` (their place),
        `reason` (`"contaminated"`), `message` (which benchmark row it is, and what is the same) and `distance` (of the
        images, in bits; `None` where no image was compared).

    Raises:
        `ValueError`: if an option is out of range, if `train` has one of these columns, or if a row of a benchmark has
            no question or an image that cannot be read.
    """
    if match not in ("both", "image", "question"):
        raise ValueError(f'`match` is {match!r}; it must be "both", "image" or "question".')
    if not 0 <= max_distance <= HASH_BITS:
        raise ValueError(f"`max_distance` is {max_distance}; it must be from 0 to {HASH_BITS} bits.")
    check_free(train.column_names, _NOTES)
    named = benchmark_rows if isinstance(benchmark_rows, Mapping) else {"the benchmark": benchmark_rows}
    image_options = with_image_root(image_options, image_root)
    benchmark = read_benchmarks(named, match, image_options)
    ids = {source: {str(one) for one in given} for source, given in (source_ids or {}).items()}
    search = Search(benchmark, match, max_distance, ids, image_options)
    found = look_at_all(
        train, search_table, FOUND, num_proc=num_proc, desc="Looking for benchmark rows", search=search
    )

    places, bits = found["match"].to_numpy(), found["distance"].to_numpy()
    rows = np.flatnonzero(places != NO_MATCH)
    notes = {
        "reason": pa.repeat("contaminated", len(rows)),
        "message": [_message(places[row], bits[row], match, benchmark.names) for row in rows],
        "distance": pa.array(bits[rows], mask=bits[rows] < 0),
    }
    quarantine = quarantined_rows(train, rows, notes, _NOTES)
    if dropped_file is not None:
        write_quarantine(quarantine, dropped_file)
    logger.warning(f"Quarantined {len(quarantine)} of {len(train)} rows, because they are in a benchmark.")
    if unreadable := int(found["unreadable"].to_numpy().sum()):
        logger.warning(f"{unreadable} rows have an image that cannot be read; they stay, but may be in a benchmark.")
    return (select_rows(train, np.flatnonzero(places == NO_MATCH)) if len(rows) else train), quarantine


def vl_rewardbench_source_ids(rows: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    """
    Which rows of public sets VL-RewardBench is made of, as far as its ids tell.

    Args:
        rows (`Iterable[Mapping]`):
            Rows of the benchmark, with `id`.

    Returns:
        `dict[str, set[str]]`: for each source, as [`load_preferences`] calls it, the places of its rows.
    """
    found: dict[str, set[str]] = {}
    for row in rows:
        for source, pattern in _VL_REWARDBENCH.items():
            if number := pattern.fullmatch(str(row.get("id"))):
                found.setdefault(source, set()).add(number.group(1))
    return found


def _message(place: int, bits: int, match: Match, names: list[str]) -> str:
    if place == MATCH_BY_ID:
        return "its source and id are those of a benchmark row."
    if bits < 0:
        same = "its question is"
    else:
        what = "its question and an image" if match == "both" else "an image"
        same = f"{what} ({bits} bits apart) {'are' if match == 'both' else 'is'}"
    return f"{same} in {names[place]}."
