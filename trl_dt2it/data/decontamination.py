"""Rows dropped that a benchmark holds too, by text and by perceptual hash of their images."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

# Rather than a hash of our own, which would need the same tests: `imagehash`, kept up since 2013 (BSD-2-Clause,
# 80 kB; of what it needs only PyWavelets is new here: MIT, 9 MB).
import imagehash
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from PIL import Image
from transformers.utils import logging

from .columns import arrow_rows, leave_images_encoded, look_at_all, select_rows
from .images import ImageOptions, load_image, with_image_root
from .messages import IMAGE_MARKER
from .rows import RowError, blocks, row_images
from .t2i_templates import find_caption
from .validation import NOTES, check_free, quarantined_rows, write_quarantine


# Side of the square of low frequencies whose signs make the hash. `benchmarks/decontamination.py` compares sizes and
# kinds of hashes.
_SIDE = 12

HASH_BITS = _SIDE**2

HASH_WORDS = -(-HASH_BITS // 64)


def normalise(text: str) -> str:
    """A question without what people change when they copy one: case, punctuation, white space, width of characters,
    image markers.
    """
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_MARKER, " ")).casefold()
    kept = _ignored().sub("", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFKC", kept)  # marks may stand behind another letter now


def row_questions(row: Mapping[str, Any]) -> list[str]:
    """The questions that a row asks, normalised: what its user says in all turns together, and in each turn; and the
    caption of a question about a text-to-image pair, told by the column `t2i_caption` or by a known wording.
    """
    given = next((row[name] for name in ("prompt", "question", "caption") if row.get(name) is not None), None)
    if isinstance(given, str):
        return _with_captions([given], row)
    if given is None and not isinstance(row.get("chosen"), str):  # whole conversations
        given = row.get("chosen")
    turns = [
        " ".join(block.get("text") or "" for block in blocks(message))
        for message in given or []
        if message.get("role") == "user"
    ]
    return _with_captions([" ".join(turns), *turns], row) if turns else []


def _with_captions(texts: list[str], row: Mapping[str, Any]) -> list[str]:
    caption, asked = row.get("t2i_caption"), [normalise(text) for text in texts]
    if isinstance(caption, str):
        captions: list[str | None] = [normalise(caption)]
    else:
        captions = [find_caption(text, normalise, one) for text, one in zip(texts, asked, strict=True)]
    # A caption that is normalised to nothing would be the question of any row that asks none.
    return list(dict.fromkeys([*asked, *filter(None, captions)]))


def all_images(row: Mapping[str, Any]) -> list[Any]:
    """The images of a preference row or of a text-to-image pair, as they are, but for those that are `None`."""
    pair = [row.get("chosen_image"), row.get("rejected_image")]
    return [image for image in (*pair, *row_images(row)) if image is not None]


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """A hash that images share, but for some bits, if they look alike.

    Shapes: returns `(HASH_WORDS,)`.
    """
    bits = imagehash.phash(image, hash_size=_SIDE).hash.ravel()
    return np.packbits(np.pad(bits, (0, 64 * HASH_WORDS - HASH_BITS))).view(np.uint64)


def distances(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Numbers of bits in which hashes differ.

    Shapes: `hashes` `(N, HASH_WORDS)`, `others` `(M, HASH_WORDS)`, returns `(N, M)`.
    """
    return np.bitwise_count(hashes[:, None] ^ others[None]).sum(axis=-1, dtype=np.int64)


@lru_cache(maxsize=1)
def _ignored() -> re.Pattern:
    """Punctuation, white space and what does not show."""
    kinds = ("P", "Z", "Cc", "Cf")
    ignored = [char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char).startswith(kinds)]
    return re.compile(f"[{re.escape(''.join(ignored))}]+")


Match = Literal["both", "image", "question"]

# The benchmark row that a row matches, or one of these; the distance of the nearest images, or -1.
NO_MATCH, MATCH_BY_ID = -1, -2

FOUND = Features({"match": Value("int64"), "distance": Value("int64"), "unreadable": Value("bool")})

_TEXTS = ("prompt", "question", "caption", "t2i_caption", "source", "source_id", "pair_id")

_IMAGES = ("images", "image", "chosen_image", "rejected_image")

_COMPARISONS = 4_000_000  # of hashes at once


@dataclass(frozen=True)
class Benchmark:
    """Rows that must not be trained on."""

    names: list[str] = field(default_factory=list)  # What each row is called
    # Places of the rows that ask a question, normalised
    by_question: dict[str, list[int]] = field(default_factory=dict)
    # (H, HASH_WORDS): Hashes of all images, in the order of their rows
    hashes: np.ndarray = field(default_factory=lambda: np.zeros((0, HASH_WORDS), dtype=np.uint64))
    # (H,): Place of the row that an image is of, ascending
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
    """What makes a row one of a benchmark. It can be pickled, for worker processes."""

    benchmark: Benchmark  # The rows to look for
    match: Match  # `"both"`, `"image"` or `"question"`
    max_distance: int  # Most bits in which the hashes of one image may differ
    ids: dict[str, set[str]]  # Ids of rows that are in a benchmark, by `source`
    options: ImageOptions  # Where images may come from


def search_table(table: pa.Table, search: Search, json_columns: Features) -> pa.Table:
    """Looks for the rows of a table in benchmarks."""
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
