"""Pairs by content: names that survive a reordering, duplicates, and contradictions."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from transformers.utils import logging

from ..utils import digest
from .columns import arrow_rows, column_of, leave_images_encoded, look_at_all
from .images import ImageOptions, is_address, open_encoded
from .messages import T2I_IDENTITY
from .rows import SIDES, RowError, canonical_text, content_id, image_identity, row_images, row_videos, t2i_identity


class PairDigest(NamedTuple):
    """A pair in a few bytes."""

    key: bytes
    is_swapped: bool
    is_mirror: bool = False


class Doubles(NamedTuple):
    """Rows that may not stay because of another row.

    Shapes: `rows` `(D,)`, `others` `(D,)`, `is_contradiction` `(D,)`.
    """

    rows: np.ndarray
    others: np.ndarray
    is_contradiction: np.ndarray


def pair_digest(row: Mapping[str, Any]) -> PairDigest:
    """A hash of what a pair is about, the same whichever answer is preferred.

    It covers what [`content_id`] covers: of a text-to-image pair the caption and both images, and otherwise all that
    the model reads. A row with an explicit prompt and one with whole conversations, which a chat template renders
    alike, are the same pair. Images are the same if their bytes are, or their paths.
    """
    if (pair := t2i_identity(row)) is not None:
        images = [json.dumps(image) for image in (pair.chosen, pair.rejected)]
        return PairDigest(_hash("t2i", pair.caption, *sorted(images)), images[0] > images[1], pair.order == "ba")
    context = {
        "images": [image_identity(image) for image in row_images(row)],
        "videos": [[video.fps, *map(image_identity, video.frames)] for video in row_videos(row)],
        "tools": row.get("tools"),
        "chat_template_kwargs": row.get("chat_template_kwargs"),
    }
    prompt = row.get("prompt")
    if isinstance(row["chosen"], str):
        chosen, rejected = ((prompt or "") + row[side] for side in SIDES)
    else:
        # Both are JSON lists, so that the prompt is written once and not once for each answer.
        start = canonical_text(prompt)[:-1] + "," if prompt else "["
        chosen, rejected = (start + canonical_text(row[side])[1:] for side in SIDES)
    is_swapped = chosen > rejected
    parts = [canonical_text([context]), *((rejected, chosen) if is_swapped else (chosen, rejected))]
    return PairDigest(_hash(*parts), is_swapped)


def _hash(*parts: str) -> bytes:
    return bytes.fromhex(digest("\0".join(parts), size=16))


def find_doubles(
    high: np.ndarray,
    low: np.ndarray,
    is_swapped: np.ndarray,
    is_bad: np.ndarray,
    is_mirror: np.ndarray | None = None,
) -> Doubles:
    """Find rows that repeat an earlier one, and all rows of which another one prefers the other answer. Of equal rows
    the first may stay. Of a contradiction none may, because nothing tells which is right. Keys come in two halves;
    rows that are bad take no part, and those of `is_mirror` are no duplicates of others. Sorting takes about 20 bytes
    a row.
    """
    # One half of the keys leaves hardly any row that has no double, and half as much to sort.
    order = np.argsort(high, kind="stable")
    ordered = high[order]
    members = order[_has_equal(ordered[1:] == ordered[:-1])] if len(order) else order
    members = members[~is_bad[members]]
    if len(members):
        # Stable: equal keys stay in the order of their rows.
        keys = (
            (low[members], high[members]) if is_mirror is None else (is_mirror[members], low[members], high[members])
        )
        members = members[np.lexsort(keys)]
        same = (high[members[1:]] == high[members[:-1]]) & (low[members[1:]] == low[members[:-1]])
        has_equal, is_first = _has_equal(same), np.r_[True, ~same]
        members, is_first = members[has_equal], is_first[has_equal]
    if len(members) == 0:
        return Doubles(members, members, np.zeros(0, dtype=bool))

    swapped = is_swapped[members]
    group, starts, nowhere = np.cumsum(is_first) - 1, np.flatnonzero(is_first), len(high)
    firsts = [np.minimum.reduceat(np.where(swapped == label, members, nowhere), starts)[group] for label in (0, 1)]
    is_contradiction = (firsts[0] < nowhere) & (firsts[1] < nowhere)
    if is_mirror is not None:
        is_first[1:] |= is_mirror[members[1:]] != is_mirror[members[:-1]]
    others = np.where(is_contradiction & ~swapped, firsts[1], firsts[0])
    others = np.where(is_contradiction, others, members[is_first][np.cumsum(is_first) - 1])
    found = np.flatnonzero(is_contradiction | (members != others))
    found = found[np.argsort(members[found])]
    return Doubles(members[found], others[found], is_contradiction[found])


def _has_equal(same: np.ndarray) -> np.ndarray:
    """Which of some sorted rows have an equal neighbour, out of whether each equals the next one."""
    return np.r_[False, same] | np.r_[same, False]


def duplicate_error(other: str) -> RowError:
    """What is wrong with a row that repeats the row of that name."""
    return RowError("duplicate_pair", f"it is the same pair as {other}; keep one of them.")


def contradiction_error(other: str) -> RowError:
    """What is wrong with a row that contradicts the row of that name."""
    return RowError("contradictory_pair", f"{other} prefers the other answer; keep the one that is right.")


logger = logging.get_logger(__name__)

# What `content_id` looks at.
_T2I = ("caption", "chosen_image", "rejected_image")

_CONTENT = ("prompt", *SIDES, "image", "images", "videos", "tools", "chat_template_kwargs", *T2I_IDENTITY, *_T2I)

_PICTURED = ("image", "images", "videos", "chosen_image", "rejected_image")

# Of a pair whose content is hashed.
CONTENT_COLUMNS = ("content", "content_text")

# Which rows of a curated set stand the other way round than their source has them.
FLIPPED = "curation_flipped"


def pair_ids(dataset: Dataset, *, num_proc: int | None = None) -> pa.Array:
    """
    A name for every pair, and no two alike.

    It is the row's `pair_id` where it has one, and else [`~trl_dt2it.data.content_id`], a hash of prompt, answers and
    all images, which are read but not decoded; of a text-to-image pair, of caption and images, so that its name stays
    when the pair is reformulated with another seed. A name that was there before in this set gets `#2`, `#3`, ...
    behind it, in the order of the rows. [`CurationLedger.apply`] writes the names into the column `pair_id`, so that
    they stay what they are when rows are swapped, left out or put in another order.

    Args:
        dataset (`Dataset`):
            Preference rows.
        num_proc (`int`, *optional*):
            Number of processes that hash rows.

    Returns:
        `pa.Array` of length N and type string, without nulls.

    Raises:
        `ValueError`: if a row has no `pair_id` and the set no column `chosen` or `rejected`.
    """
    names = pa.nulls(len(dataset), pa.string())
    if "pair_id" in dataset.column_names:
        names = column_of(dataset, "pair_id").cast(pa.string())
        names = pc.if_else(pc.equal(names, ""), None, names)
    unnamed = np.flatnonzero(names.is_null().to_numpy(zero_copy_only=False))
    if len(unnamed):
        if missing := [side for side in SIDES if side not in dataset.column_names]:
            raise ValueError(
                f"{len(unnamed)} of {len(dataset)} rows have no `pair_id`, and there is no column `{missing[0]}` to "
                "tell them apart by; name the rows, or load them with `trl_dt2it.data.load_preferences`."
            )
        rows = dataset if len(unnamed) == len(dataset) else dataset.select(unnamed)
        rows = leave_images_encoded(rows.with_format(None))
        rows = rows.select_columns([name for name in _CONTENT if name in rows.column_names])
        found = look_at_all(
            rows, _content_ids, Features({"pair_id": Value("string")}), num_proc=num_proc, desc="Naming pairs"
        )
        hashes = found["pair_id"].combine_chunks()
        names = hashes if len(unnamed) == len(dataset) else pc.replace_with_mask(names, names.is_null(), hashes)
    return _distinct(names)


def pair_contents(
    dataset: Dataset, *, image_root: str | os.PathLike | None = None, num_proc: int | None = None
) -> pa.Table:
    """
    What is in every pair, as hashes, by which a ledger knows whether a pair is still what it has decided about.

    A hash is [`~trl_dt2it.data.content_id`] of the pair as its source labels it: where `curation_flipped` says that a
    row is swapped, it is swapped back first. So it stays when a ledger is applied, and is another one when answers are
    swapped, or anything that a model reads is edited. Images count by their bytes, in the rows or in files, which are
    read and not decoded: also where they lie elsewhere by then, or within the rows.

    Args:
        dataset (`Dataset`):
            Preference rows.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from.
        num_proc (`int`, *optional*):
            Number of processes that hash rows.

    Returns:
        `pa.Table`: `pair_id`, from [`pair_ids`]; `content`, null where an image cannot be read; and `content_text`,
        without the images. Both are null for rows that are neither preference rows nor text-to-image pairs, or that
        cannot be read.
    """
    names = pair_ids(dataset, num_proc=num_proc)
    if not any(set(sides) <= set(dataset.column_names) for sides in (SIDES, _T2I)):
        nothing = pa.nulls(len(names), pa.string())
        return pa.table({"pair_id": names, **dict.fromkeys(CONTENT_COLUMNS, nothing)})
    rows = leave_images_encoded(dataset.with_format(None))
    rows = rows.select_columns([name for name in (*_CONTENT, "pair_id", FLIPPED) if name in rows.column_names])
    features = Features(dict.fromkeys(CONTENT_COLUMNS, Value("string")))
    options = ImageOptions(image_root=None if image_root is None else os.fspath(image_root))
    found = look_at_all(rows, _contents, features, num_proc=num_proc, desc="Hashing pairs", options=options)
    return pa.table({"pair_id": names, **{name: found[name].combine_chunks() for name in CONTENT_COLUMNS}})


def source_fingerprint(names: pa.Array) -> str:
    """A short hash that tells one source set from another."""
    slices = (names.slice(start, 10_000).to_pylist() for start in range(0, len(names), 10_000))
    return digest(str(len(names)), ("\0".join(part) + "\0" for part in slices))[:16]


def _content_ids(table: pa.Table, json_columns: Features) -> pa.Table:
    return pa.table({"pair_id": [content_id(row) for row in arrow_rows(table, json_columns)]})


def _contents(table: pa.Table, json_columns: Features, options: ImageOptions) -> pa.Table:
    found = [_content(row, options) for row in arrow_rows(table, json_columns)]
    return pa.table(
        {name: pa.array([one[place] for one in found], pa.string()) for place, name in enumerate(CONTENT_COLUMNS)}
    )


def _content(row: Mapping[str, Any], options: ImageOptions) -> tuple[str | None, str | None]:
    if row.get(FLIPPED):
        sides = [pair for pair in (SIDES, _T2I[1:]) if set(pair) <= set(row)]
        row = {**row, **{one: row[other] for pair in sides for one, other in (pair, pair[::-1])}}
    pictured = [name for name in _PICTURED if row.get(name) is not None]
    try:
        # Each image by its place: the text of a pair of two images is about the first and the second.
        places = iter(range(1_000_000))
        numbered = {**row, **{name: _each(row[name], lambda _: b"%d" % next(places)) for name in pictured}}
        if (pair := t2i_identity(numbered)) is not None:  # the order of its images was drawn
            numbered = dict(zip(_T2I, (pair.caption, b"0", b"1"), strict=True))
        text = content_id(numbered)
    except (RowError, TypeError, ValueError, KeyError, AttributeError):  # a row that no check has seen yet
        return None, None
    try:
        whole = content_id(
            {**row, **{name: _each(row[name], lambda image: _bytes(image, options)) for name in pictured}}
        )
    except (RowError, OSError, ValueError):
        return None, text[:32]
    return whole[:32], text[:32]


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A column of images, or of videos as their frames, with each image changed."""
    if isinstance(value, (list, tuple)):
        return [_each(one, change) for one in value]
    if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
        return {name: _each(one, change) if name == "frames" else one for name, one in value.items()}
    return change(value)


def _bytes(image: Any, options: ImageOptions) -> Any:
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if not isinstance(image, (str, os.PathLike)):
        return image
    if is_address(os.fsdecode(image)):
        raise RowError("image_url", "an image has an address, and nothing is fetched to hash it.")
    with open_encoded(image, options) as (stream, _):
        return stream.read()


def _distinct(names: pa.Array) -> pa.Array:
    encoded = names.dictionary_encode()
    if len(encoded.dictionary) == len(names):
        return names
    codes = encoded.indices.to_numpy()
    is_first = np.zeros(len(names), dtype=bool)
    is_first[np.unique(codes, return_index=True)[1]] = True
    repeated = np.flatnonzero(~is_first)
    logger.info(f"{len(repeated):,} of {len(names):,} rows have the name of a row before them, and get a number.")
    # Only a name with the mark in it can be in the way of a new one.
    taken = set(encoded.dictionary.filter(pc.match_substring(encoded.dictionary, "#")).to_pylist())
    counts: Counter[str] = Counter()
    numbered = []
    for name in names.take(pa.array(repeated)).to_pylist():
        counts[name] += 1
        while (one := f"{name}#{counts[name] + 1}") in taken:
            counts[name] += 1
        taken.add(one)
        numbered.append(one)
    return pc.replace_with_mask(names, pa.array(~is_first), pa.array(numbered, pa.string()))
