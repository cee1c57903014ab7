"""Rows that are the same although they differ: quarantine of those that a benchmark holds too, by text and by
perceptual hash of their images, and groups of rows whose images look alike."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from PIL import Image
from transformers.utils import logging

from .columns import arrow_rows, connected, leave_images_encoded, look_in_shares, map_tables, select_rows
from .images import ImageOptions, load_image, with_image_root
from .messages import IMAGE_MARKER
from .rows import RowError, blocks, row_images
from .t2i import find_caption
from .validation import NOTES, check_free, quarantined_rows, write_quarantine


logger = logging.get_logger(__name__)

# Side of the square of low frequencies whose signs make the hash. `benchmarks/decontamination.py` compares sizes and
# kinds of hashes.
_SIDE = 12
HASH_BITS = _SIDE**2
HASH_WORDS = -(-HASH_BITS // 64)

Match = Literal["both", "image", "question"]

# In place of the index of the benchmark row that a row matches.
_NO_MATCH, _MATCH_BY_ID = -1, -2

# `distance` is that of the nearest images, or -1.
_RESULT = Features({"match": Value("int64"), "distance": Value("int64"), "unreadable": Value("bool")})
_NOTES = Features({**NOTES, "distance": Value("int64")})

# Most bits between images that look alike. Hashes within it share one of so many parts and one more, each 16 bits.
_ALIKE_BITS = HASH_BITS // 16 - 1
_HASHES = Features({"hashes": Value("binary")})

_TEXTS = ("prompt", "question", "caption", "t2i_caption", "source", "source_id", "pair_id")
_IMAGES = ("images", "image", "chosen_image", "rejected_image")

# Names of rows in VL-RewardBench by their source, with the index of the row in it. Others, such as `mathverse_...`,
# `mmmu_...` and those from VLFeedback, are of sets that are not known by such numbers.
_VL_REWARDBENCH = {
    "rlaif_v": re.compile(r"RLAIF-V[-_](\d+)"),
    "rlhf_v": re.compile(r"RLHF-V[-_](\d+)"),
    "povid": re.compile(r"hallucination_pair[-_](\d+)"),
    "wildvision_battle": re.compile(r"wildvision-battle[-_](\d+)"),
}


def normalize(text: str) -> str:
    """Remove from a question whatever a copy may change: case, punctuation, white space, width, image markers."""
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_MARKER, " ")).casefold()
    kept = _ignored().sub("", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFKC", kept)  # marks may stand behind another letter now


@lru_cache(maxsize=1)
def _ignored() -> re.Pattern:
    """Match punctuation, white space and invisible characters."""
    kinds = ("P", "Z", "Cc", "Cf")
    ignored = [char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char).startswith(kinds)]
    return re.compile(f"[{re.escape(''.join(ignored))}]+")


def row_questions(row: Mapping[str, Any]) -> list[str]:
    """List the questions of a row, normalized: all turns of its user together, each turn, and the caption of a
    question about a text-to-image pair, known by the column `t2i_caption` or by its wording."""
    given = next((row[name] for name in ("prompt", "question", "caption") if row.get(name) is not None), None)
    if given is None and not isinstance(row.get("chosen"), str):  # whole conversations
        given = row.get("chosen")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
    turns = [blocks(message) for message in messages if message.get("role") == "user"]
    if not turns:
        return []
    texts = [" ".join(block.get("text") or "" for block in turn) for turn in turns]
    texts = [" ".join(texts), *texts] if len(texts) > 1 else texts
    caption, questions = row.get("t2i_caption"), [normalize(text) for text in texts]
    if isinstance(caption, str):
        captions: list[str | None] = [normalize(caption)]
    else:
        captions = [find_caption(text, normalize, plain) for text, plain in zip(texts, questions, strict=True)]
    # A caption that is normalized to nothing would be the question of any row that asks none.
    return list(dict.fromkeys([*questions, *filter(None, captions)]))


def all_images(row: Mapping[str, Any]) -> list[Any]:
    """List the images of a preference row or of a text-to-image pair that are not `None`."""
    pair = [row.get("chosen_image"), row.get("rejected_image")]
    return [image for image in (*pair, *row_images(row)) if image is not None]


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """Hash an image such that images that look alike differ in few bits. Shape: returns `(HASH_WORDS,)`."""
    # Rather than a hash of our own: kept up since 2013. Here, because preparing a shard does without it.
    import imagehash

    bits = imagehash.phash(image, hash_size=_SIDE).hash.ravel()
    return np.packbits(np.pad(bits, (0, 64 * HASH_WORDS - HASH_BITS))).view(np.uint64)


def distances(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Count the bits in which hashes `(N, HASH_WORDS)` and `(M, HASH_WORDS)` differ, as `(N, M)`."""
    return np.bitwise_count(hashes[:, None] ^ others[None]).sum(axis=-1, dtype=np.int64)


@dataclass(frozen=True)
class Search:
    """Search for rows in benchmarks. Picklable, for worker processes."""

    match: Match
    max_distance: int  # most bits in which the hashes of one image may differ
    ids: dict[str, set[str]]  # of rows that are in a benchmark, by `source`
    options: ImageOptions
    names: list[str]  # of the rows of the benchmarks
    by_question: dict[str, list[int]]  # indices of the rows that ask a normalized question
    hashes: np.ndarray  # (H, HASH_WORDS), of all images in the order of their rows
    owners: np.ndarray  # (H,), index of the row of each image


def _read_benchmarks(
    benchmarks: Mapping[str, Iterable[Mapping[str, Any]]], match: Match, options: ImageOptions
) -> tuple[list[str], dict[str, list[int]], np.ndarray, np.ndarray]:
    """Read the questions and hash the images of benchmarks, given by name; see [`Search`]."""
    names, hashes, owners = list[str](), list[np.ndarray](), list[int]()
    by_question = defaultdict[str, list[int]](list)
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
                    by_question[question].append(len(names))
            names.append(name)
    hash_table = np.array(hashes, dtype=np.uint64).reshape(-1, HASH_WORDS)
    return names, dict(by_question), hash_table, np.array(owners, dtype=np.int64)


def _search_table(table: pa.Table, search: Search) -> pa.Table:
    names = set(table.column_names)
    texts = [name for name in _TEXTS if name in names]
    if "chosen" in names and ("prompt" not in names or table["prompt"].null_count):
        texts.append("chosen")
    image_table = table.select([name for name in _IMAGES if name in names])
    found = []
    for index, row in enumerate(arrow_rows(table.select(texts))):
        candidates, match, distance, is_unreadable = list[int](), _NO_MATCH, -1, False
        if _is_known(row, search.ids):
            match = _MATCH_BY_ID
        elif search.match != "image":
            candidates = [other for question in row_questions(row) for other in search.by_question.get(question, ())]
            if candidates and search.match == "question":
                match = candidates[0]
        if match == _NO_MATCH and (candidates or search.match == "image"):
            images = all_images(image_table.slice(index, 1).to_pylist()[0]) if image_table.num_columns else []
            hashes = []
            for image in images:
                try:
                    hashes.append(perceptual_hash(load_image(image, search.options)))
                except RowError:
                    is_unreadable = True
            if hashes:
                match, distance = _nearest(np.stack(hashes), candidates, search)
            elif not images:
                match = next((other for other in candidates if other not in search.owners), _NO_MATCH)
        found.append({"match": match, "distance": distance, "unreadable": is_unreadable and match == _NO_MATCH})
    return pa.Table.from_pylist(found, schema=_RESULT.arrow_schema)


def _is_known(row: Mapping[str, Any], ids: Mapping[str, set[str]]) -> bool:
    source = row.get("source") or ""
    if source not in ids:
        return False
    # "povid-7", or "povid-7-2" of the third pair of a row
    number = str(row.get("pair_id") or "").removeprefix(f"{source}-")
    return not ids[source].isdisjoint({str(row.get("source_id")), number, number.partition("-")[0]})


def _nearest(hashes: np.ndarray, candidates: list[int], search: Search) -> tuple[int, int]:
    """Find the benchmark row of the nearest image, among all rows with `match="image"`, and its distance."""
    theirs = slice(None) if search.match == "image" else np.isin(search.owners, candidates)
    owners, bits = search.owners[theirs], distances(hashes, search.hashes[theirs]).min(axis=0)
    if len(owners) == 0 or bits.min() > search.max_distance:
        return _NO_MATCH, -1
    return int(owners[bits.argmin()]), int(bits.min())


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
    Quarantine the training rows that are in a benchmark.

    Questions are the same if they differ in nothing but case, punctuation and white space. The question of a
    text-to-image pair, before or after [`reformulate_t2i`], is its caption, whatever the wording, language and order
    on either side. Images are the same if their perceptual hashes (144 bits) differ in at most `max_distance` bits: an
    image may be encoded again, scaled, and cropped by some percent. Frames of videos are not compared.

    Args:
        train (`Dataset`):
            Preference rows, or text-to-image pairs with `caption`.
        benchmark_rows (`Dataset`, `Iterable[Mapping]`, or `Mapping` of these by name):
            Rows of one benchmark, or of several by name: preference rows, or rows with `question` and `image` or
            `images`.
        image_root, image_options (*optional*):
            Folder of the images on both sides and other limits on them, as in [`ImageOptions`].
        max_distance (`int`, *optional*, defaults to `32`):
            Most bits, from 0 to 144, in which the hashes of one image may differ.
        match (`str`, *optional*, defaults to `"both"`):
            `"both"`: the question and one image are the same, or the question if neither row has images; only images
            of rows whose question matches are decoded, so that a million rows cost little. `"image"`: one image is the
            same, whatever the question; decodes every image. `"question"`: the question is the same, whatever the
            images.
        source_ids (`Mapping[str, Collection]`, *optional*):
            Ids by `source` of rows to quarantine in any case: their `source_id`, or the number in their `pair_id`,
            such as `7` in `"povid-7"`. See [`vl_rewardbench_source_ids`].
        num_proc, dropped_file (*optional*):
            Number of processes, and Parquet file for the quarantined rows, images as they are.

    Returns:
        `tuple[Dataset, Dataset]`: the other rows in their order, and the quarantined rows with `row` (their index),
        `reason` (`"contaminated"`), `message` (the benchmark row, and what is the same) and `distance` (of the images,
        in bits; `None` where no image was compared).

    Raises:
        `ValueError`: if an option is out of range, `train` has one of these columns, or a benchmark cannot be read.
    """
    if match not in ("both", "image", "question"):
        raise ValueError(f'`match` is {match!r}; it must be "both", "image" or "question".')
    if not 0 <= max_distance <= HASH_BITS:
        raise ValueError(f"`max_distance` is {max_distance}; it must be from 0 to {HASH_BITS} bits.")
    check_free(train.column_names, _NOTES)
    named = benchmark_rows if isinstance(benchmark_rows, Mapping) else {"the benchmark": benchmark_rows}
    image_options = with_image_root(image_options, image_root)
    ids = {source: set(map(str, given)) for source, given in (source_ids or {}).items()}
    benchmarks = _read_benchmarks(named, match, image_options)
    search = Search(match, max_distance, ids, image_options, *benchmarks)
    kwargs = {"num_proc": num_proc, "desc": "Looking for benchmark rows", "fn_kwargs": {"search": search}}
    results = map_tables(train, _search_table, _RESULT, **kwargs)

    matches, bits = results["match"].to_numpy(), results["distance"].to_numpy()
    rows = np.flatnonzero(matches != _NO_MATCH)
    notes = {
        "reason": pa.repeat("contaminated", len(rows)),
        "message": [_message(matches[row], bits[row], match, search.names) for row in rows],
        "distance": pa.array(bits[rows], mask=bits[rows] < 0),
    }
    quarantine = quarantined_rows(train, rows, notes, _NOTES)
    if dropped_file is not None:
        write_quarantine(quarantine, dropped_file)
    logger.warning(f"Quarantined {len(quarantine)} of {len(train)} rows, because they are in a benchmark.")
    if unreadable := int(results["unreadable"].to_numpy().sum()):
        logger.warning(f"{unreadable} rows have an image that cannot be read; they stay, but may be in a benchmark.")
    return (select_rows(train, np.flatnonzero(matches == _NO_MATCH)) if len(rows) else train), quarantine


def look_alikes(
    dataset: Dataset, *, image_options: ImageOptions | None = None, num_proc: int | None = None
) -> np.ndarray:
    """Number groups of rows whose images look alike, whatever the texts, and return that of each row, `(N,)` int64.

    Images look alike if their perceptual hashes differ in at most 8 of 144 bits: encoded again, a little darker or
    scaled. Rows with several images need as many that do, whatever their order, as far as it does not hang on the bits
    that differ; rows without images, or with one that cannot be read, are each a group of their own. Every process has
    to call it.
    """
    options = image_options or ImageOptions()
    images = dataset.select_columns([name for name in _IMAGES if name in dataset.column_names])
    if not images.column_names:
        return np.arange(len(dataset))

    def look(part: Dataset, num_proc: int | None) -> pa.Table:
        kwargs = {"num_proc": num_proc, "desc": "Comparing images", "fn_kwargs": {"options": options}}
        return map_tables(part, _hash_table, _HASHES, **kwargs)

    # Each look is compared once, however many rows have it.
    column = look_in_shares(leave_images_encoded(images), look, num_proc=num_proc)["hashes"]
    looks = column.combine_chunks().dictionary_encode()
    edges = [np.zeros((0, 2), dtype=np.int64)]
    by_size = defaultdict[int, list[int]](list)
    for index, look_of_row in enumerate(looks.dictionary.to_pylist()):
        by_size[len(look_of_row)].append(index)
    for size, indices in by_size.items():
        joined = b"".join(looks.dictionary[index].as_py() for index in indices)
        hashes = np.frombuffer(joined, dtype=np.uint64).reshape(len(indices), -1, HASH_WORDS)
        edges += [np.array(indices)[each] for each in _alike(hashes)] if size else []
    first, second = np.concatenate(edges).T
    count = len(looks.dictionary)
    if count == 0:
        return np.arange(len(dataset))
    group = connected(count, first, second)[looks.indices.fill_null(0).to_numpy()]
    alone = looks.indices.is_null().to_numpy(zero_copy_only=False)
    return np.where(alone, count + np.arange(len(dataset)), group)


def _hash_table(table: pa.Table, options: ImageOptions) -> pa.Table:
    """Hash the images of rows, sorted and joined; null without images, or with one that cannot be read."""
    found = list[bytes | None]()
    for row in table.to_pylist():
        try:
            hashes = [perceptual_hash(load_image(image, options)).tobytes() for image in all_images(row)]
        except RowError:
            hashes = []
        found.append(b"".join(sorted(hashes)) or None)
    return pa.table({"hashes": pa.array(found, pa.binary())})


def _alike(hashes: np.ndarray, most: int = 4_000_000) -> Iterator[np.ndarray]:
    """Find rows of hashes `(N, images, HASH_WORDS)` of which all look alike, about `most` compared at a time; yields
    edges `(E, 2)` that join them, fewer than rows each time."""
    parts = np.ascontiguousarray(hashes[:, 0]).view(np.uint16)[:, : HASH_BITS // 16]
    for part in parts.T:
        order = np.argsort(part, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            step = max(1, most // len(bucket))
            for start in range(0, len(bucket) if len(bucket) > 1 else 0, step):
                rows = bucket[start : start + step]
                bits = np.bitwise_count(hashes[rows][:, None] ^ hashes[bucket][None]).sum(axis=-1, dtype=np.int64)
                one, other = np.nonzero((bits <= _ALIKE_BITS).all(axis=-1))
                if len(one) > len(rows):  # each is near itself
                    joined = connected(len(bucket), start + one, other)
                    _, first = np.unique(joined, return_index=True)
                    yield np.stack([bucket, bucket[first[joined]]], axis=1)[first[joined] != np.arange(len(bucket))]


def vl_rewardbench_source_ids(rows: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    """
    Find the rows of public sets that VL-RewardBench is made of, as far as its ids tell.

    Args:
        rows (`Iterable[Mapping]`):
            Rows of the benchmark, with `id`.

    Returns:
        `dict[str, set[str]]`: the indices of rows by source, named as in [`load_preferences`].
    """
    ids: dict[str, set[str]] = {}
    for row in rows:
        for source, pattern in _VL_REWARDBENCH.items():
            if number := pattern.fullmatch(str(row.get("id"))):
                ids.setdefault(source, set()).add(number.group(1))
    return ids


def _message(index: int, bits: int, match: Match, names: list[str]) -> str:
    if index == _MATCH_BY_ID:
        return "its source and id are those of a benchmark row."
    if bits < 0:
        return f"its question is in {names[index]}."
    what, verb = ("its question and an image", "are") if match == "both" else ("an image", "is")
    return f"{what} ({bits} bits apart) {verb} in {names[index]}."
