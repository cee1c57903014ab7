"""Which rows of a table are in a benchmark: by source id, by question, by image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value

from .arrow_rows import arrow_rows
from .encoded import leave_images_encoded
from .errors import RowError
from .images import load_image
from .locations import ImageOptions
from .similarity import HASH_WORDS, all_images, distances, perceptual_hash, row_questions


Match = Literal["both", "image", "question"]

# The benchmark row that a row matches, or one of these; the distance of the nearest images, or -1.
NO_MATCH, MATCH_BY_ID = -1, -2
FOUND = Features({"match": Value("int64"), "distance": Value("int64"), "unreadable": Value("bool")})

_TEXTS = ("prompt", "question", "caption", "t2i_caption", "source", "source_id", "pair_id")
_IMAGES = ("images", "image", "chosen_image", "rejected_image")
_COMPARISONS = 4_000_000  # of hashes at once


@dataclass(frozen=True)
class Benchmark:
    """
    Rows that must not be trained on.

    Parameters:
        names (`list[str]`):
            What each row is called.
        by_question (`dict[str, list[int]]`):
            Places of the rows that ask a question, normalised.
        hashes (`np.ndarray` of shape `(H, HASH_WORDS)` and type uint64):
            Hashes of all images, in the order of their rows.
        owners (`np.ndarray` of shape `(H,)` and type int64):
            Place of the row that an image is of, ascending.
    """

    names: list[str] = field(default_factory=list)
    by_question: dict[str, list[int]] = field(default_factory=dict)
    hashes: np.ndarray = field(default_factory=lambda: np.zeros((0, HASH_WORDS), dtype=np.uint64))
    owners: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def hashes_of(self, place: int) -> np.ndarray:
        start, stop = np.searchsorted(self.owners, [place, place + 1])
        return self.hashes[start:stop]


def read_benchmarks(
    benchmarks: Mapping[str, Iterable[Mapping[str, Any]]], match: Match, options: ImageOptions
) -> Benchmark:
    """
    Reads benchmarks into memory: questions, and hashes of images.

    Args:
        benchmarks (`Mapping[str, Iterable[Mapping]]`):
            Rows by the name of their benchmark.
        match (`str`):
            `"both"`, `"image"` or `"question"`.
        options ([`ImageOptions`]):
            Where images may come from.

    Returns:
        [`Benchmark`]

    Raises:
        `ValueError`: if a row has no question or no images though `match` compares them, or an image cannot be read.
    """
    names: list[str] = []
    by_question: dict[str, list[int]] = {}
    hashes: list[np.ndarray] = []
    owners: list[int] = []
    for benchmark, rows in benchmarks.items():
        if isinstance(rows, Dataset):
            rows = leave_images_encoded(rows.with_format(None))
        for index, row in enumerate(rows):
            own_id = row.get("pair_id") or row.get("id")
            name = f"row {index} of {benchmark}" + (f" ({own_id!s:.60})" if own_id else "")
            questions = [] if match == "image" else row_questions(row)
            if match != "image" and not questions:
                raise ValueError(f"{name} has no question; give it as `question`, or as messages in `prompt`.")
            images = [] if match == "question" else all_images(row)
            try:
                hashes += [perceptual_hash(load_image(image, options)) for image in images]
            except RowError as error:
                raise ValueError(f"{name} cannot be compared: {error}") from error
            owners += [len(names)] * len(images)
            # No question and no image would match any row without a question.
            for question in questions:
                if question or images:
                    by_question.setdefault(question, []).append(len(names))
            names.append(name)
    if not hashes:
        return Benchmark(names, by_question)
    return Benchmark(names, by_question, np.stack(hashes), np.array(owners))


@dataclass(frozen=True)
class Search:
    """
    What makes a row one of a benchmark. It can be pickled, for worker processes.

    Parameters:
        benchmark ([`Benchmark`]):
            The rows to look for.
        match (`str`):
            `"both"`, `"image"` or `"question"`.
        max_distance (`int`):
            Most bits in which the hashes of one image may differ.
        ids (`dict[str, set[str]]`):
            Ids of rows that are in a benchmark, by `source`.
        options ([`ImageOptions`]):
            Where images may come from.
    """

    benchmark: Benchmark
    match: Match
    max_distance: int
    ids: dict[str, set[str]]
    options: ImageOptions


def search_table(table: pa.Table, search: Search, json_columns: Features) -> pa.Table:
    """
    Looks for the rows of a table in benchmarks.

    Args:
        table (`pa.Table`):
            Part of a data set in the format "arrow".
        search ([`Search`]):
            What to look for.
        json_columns (`Features`):
            Columns of the data set that hold JSON.

    Returns:
        `pa.Table`: with the columns of [`FOUND`].
    """
    texts = [name for name in _TEXTS if name in table.column_names]
    if "prompt" not in texts or table["prompt"].null_count:
        texts += [name for name in ("chosen",) if name in table.column_names]
    image_table = table.select([name for name in _IMAGES if name in table.column_names])
    match = np.full(len(table), NO_MATCH)
    distance = np.full(len(table), -1)
    unreadable = np.zeros(len(table), dtype=bool)
    hashes: list[np.ndarray] = []
    owners: list[int] = []
    for index, row in enumerate(arrow_rows(table.select(texts), json_columns)):
        if _is_known(row, search.ids):
            match[index] = MATCH_BY_ID
            continue
        candidates: list[int] = []
        if search.match != "image":
            by_question = search.benchmark.by_question
            candidates = [place for question in row_questions(row) for place in by_question.get(question, ())]
            if not candidates:
                continue
            if search.match == "question":
                match[index] = candidates[0]
                continue
        images = all_images(image_table.slice(index, 1).to_pylist()[0]) if image_table.num_columns else []
        own, unreadable[index] = _hashes(images, search.options)
        if search.match == "image":
            hashes += own
            owners += [index] * len(own)
        else:
            match[index], distance[index] = _nearest(own, bool(images), candidates, search)
    if hashes:
        _match_images(np.stack(hashes), np.array(owners), search, match, distance)
    return pa.table([match, distance, unreadable & (match == NO_MATCH)], schema=FOUND.arrow_schema)


def _is_known(row: Mapping[str, Any], ids: Mapping[str, set[str]]) -> bool:
    source = row.get("source") or ""
    if source not in ids:
        return False
    # "povid-7", or "povid-7-2" of the third pair of a row
    number = str(row.get("pair_id") or "").removeprefix(f"{source}-")
    names = {str(row.get("source_id")), number, number.partition("-")[0]}
    return not names.isdisjoint(ids[source])


def _hashes(images: list[Any], options: ImageOptions) -> tuple[list[np.ndarray], bool]:
    """Hashes of the images that can be read, and whether some cannot."""
    hashes = []
    for image in images:
        try:
            hashes.append(perceptual_hash(load_image(image, options)))
        except RowError:
            pass
    return hashes, len(hashes) < len(images)


def _nearest(own: list[np.ndarray], has_images: bool, candidates: list[int], search: Search) -> tuple[int, int]:
    """The row among the candidates that has one of the images, or none if neither side has any."""
    best = (NO_MATCH, search.max_distance + 1)
    for place in candidates:
        theirs = search.benchmark.hashes_of(place)
        if len(theirs) == 0 and not has_images:
            return place, -1
        if len(theirs) and own:
            distance = int(distances(np.stack(own), theirs).min())
            if distance < best[1]:
                best = (place, distance)
    return best if best[0] != NO_MATCH else (NO_MATCH, -1)


def _match_images(
    hashes: np.ndarray, owners: np.ndarray, search: Search, match: np.ndarray, distance: np.ndarray
) -> None:
    """Writes the nearest benchmark row of each image into `match` and `distance`, if it is near enough."""
    theirs = search.benchmark.hashes
    if len(theirs) == 0:
        return
    step = max(1, _COMPARISONS // len(theirs))
    for start in range(0, len(hashes), step):
        table = distances(hashes[start : start + step], theirs)
        nearest = table.argmin(axis=1)
        for owner, column, bits in zip(owners[start : start + step], nearest, table.min(axis=1), strict=True):
            if bits <= search.max_distance and (match[owner] == NO_MATCH or bits < distance[owner]):
                match[owner], distance[owner] = search.benchmark.owners[column], bits
