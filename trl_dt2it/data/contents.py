"""Identify pairs by content: names that survive a reordering, duplicates and contradictions."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from transformers.utils import logging

from ..utils import digest
from .columns import arrow_rows, column_of, leave_images_encoded, map_tables
from .images import ImageOptions, change_images, is_address, open_encoded
from .messages import T2I_IDENTITY
from .rows import (
    SIDES,
    RowError,
    blocks,
    canonical,
    canonical_text,
    encoded_content,
    image_identity,
    media_identity,
    message_text,
    row_images,
    to_json,
    without_empty,
)
from .t2i import collapse, find_caption, prefers_first


logger = logging.get_logger(__name__)

_T2I = ("caption", "chosen_image", "rejected_image")
_EXTRAS = ("videos", "tools", "chat_template_kwargs")  # which no question about two images has

# Columns that `content_id` reads.
_CONTENT = ("prompt", *SIDES, "image", "images", *_EXTRAS, *T2I_IDENTITY, *_T2I)

_PICTURED = ("image", "images", "videos", "chosen_image", "rejected_image")

CONTENT_COLUMNS = ("content", "content_text")  # hashes of a pair
_CONTENT_FEATURES = Features(dict.fromkeys(CONTENT_COLUMNS, Value("string")))
FLIPPED = "curation_flipped"  # True for rows of a curated set that are swapped, compared to their source


class PairDigest(NamedTuple):
    """A pair in a few bytes."""

    key: bytes  # the same for both preferences
    is_swapped: bool
    is_mirror: bool = False  # of a text-to-image pair in both orders, the row with the better image second


class Duplicates(NamedTuple):
    """Rows that repeat or contradict another row; each array is of shape `(D,)`."""

    rows: np.ndarray
    others: np.ndarray
    is_contradiction: np.ndarray


def pair_digest(row: Mapping[str, Any]) -> PairDigest:
    """Hash what [`content_id`] covers, whichever answer is preferred, and with a prompt apart or in both answers."""
    if (pair := t2i_identity(row)) is not None:
        images = [json.dumps(image) for image in (pair.chosen, pair.rejected)]
        return PairDigest(_hash("t2i", pair.caption, *sorted(images)), images[0] > images[1], pair.order == "ba")
    context = {**media_identity(row), **{name: row.get(name) for name in ("tools", "chat_template_kwargs")}}
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


def find_duplicates(
    high: np.ndarray, low: np.ndarray, is_swapped: np.ndarray, is_bad: np.ndarray, is_mirror: np.ndarray | None = None
) -> Duplicates:
    """Find rows that repeat an earlier row, and all rows of contradictions, of which nothing tells which is right.
    Keys come in two halves; bad rows are skipped, and those of `is_mirror` are no duplicates of others."""
    # One half of the keys leaves hardly any row without a duplicate, and half as much to hash.
    rows = pd.Series(np.flatnonzero(pd.Series(high).duplicated(keep=False) & ~is_bad))
    key, swapped = [high[rows], low[rows]], is_swapped[rows]
    # Of the rows with this key, the first with each preference, if there is any.
    firsts = [rows.where(swapped == label).groupby(key).transform("min") for label in (False, True)]
    is_contradiction = firsts[0].notna() & firsts[1].notna()
    earlier = rows.groupby(key if is_mirror is None else [*key, is_mirror[rows]]).transform("min")
    others = earlier.mask(is_contradiction, firsts[1].mask(swapped, firsts[0])).astype(np.int64)
    is_either = is_contradiction | (rows != others)
    return Duplicates(*(column[is_either].to_numpy() for column in (rows, others, is_contradiction)))


def duplicate_error(other: str, is_contradiction: bool) -> RowError:
    """Make the error of a row that repeats or contradicts the row of that name."""
    if is_contradiction:
        return RowError("contradictory_pair", f"{other} prefers the other answer; keep the one that is right.")
    return RowError("duplicate_pair", f"it is the same pair as {other}; keep one of them.")


def pair_ids(dataset: Dataset, *, num_proc: int | None = None) -> pa.Array:
    """
    Name every pair, no two alike.

    The name is the row's `pair_id` or else its [`~trl_dt2it.data.content_id`], for which images are read but not
    decoded; that of a text-to-image pair stays when the pair is reformulated with another seed. A repeated name gets
    `#2`, `#3`, ... behind it, in the order of the rows. [`CurationLedger.apply`] writes the names into the column
    `pair_id`, so that they stay when rows are swapped, dropped or put in another order.

    Args:
        dataset, num_proc (`Dataset`, `int`):
            Preference rows, and number of processes that hash them.

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
            problem = f"have no `pair_id`, and there is no column `{missing[0]}` to tell them apart by"
            advice = "name the rows, or load them with `trl_dt2it.data.load_preferences`."
            raise ValueError(f"{len(unnamed)} of {len(dataset)} rows {problem}; {advice}")
        rows = dataset if len(unnamed) == len(dataset) else dataset.select(unnamed)
        rows = leave_images_encoded(rows.with_format(None))
        rows = rows.select_columns([name for name in _CONTENT if name in rows.column_names])
        features = Features({"pair_id": Value("string")})
        table = map_tables(rows, _content_ids, features, num_proc=num_proc, desc="Naming pairs")
        names = pc.replace_with_mask(names, names.is_null(), table["pair_id"].combine_chunks())
    return _distinct(names)


def pair_contents(
    dataset: Dataset, *, image_root: str | os.PathLike | None = None, num_proc: int | None = None
) -> pa.Table:
    """
    Hash the content of every pair, by which a ledger knows whether a pair is still the one that it has decided about.

    A hash is the [`~trl_dt2it.data.content_id`] of the pair as its source labels it: rows with `curation_flipped` are
    swapped back first. So it stays when a ledger is applied, and changes when answers are swapped, or anything that a
    model reads is edited. Images count by their bytes, wherever they lie, and are read but not decoded.

    Args:
        dataset, num_proc (`Dataset`, `int`):
            As in [`pair_ids`].
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from.

    Returns:
        `pa.Table` with the columns `pair_id`, from [`pair_ids`]; `content`, null where an image cannot be read; and
        `content_text`, without the images. Both are null for rows that are neither preference rows nor text-to-image
        pairs, or that cannot be read.
    """
    names = pair_ids(dataset, num_proc=num_proc)
    if not any(set(sides) <= set(dataset.column_names) for sides in (SIDES, _T2I)):
        return pa.table({"pair_id": names, **dict.fromkeys(CONTENT_COLUMNS, pa.nulls(len(names), pa.string()))})
    rows = leave_images_encoded(dataset.with_format(None))
    rows = rows.select_columns([name for name in (*_CONTENT, "pair_id", FLIPPED) if name in rows.column_names])
    options = ImageOptions(image_root=None if image_root is None else os.fspath(image_root))
    kwargs = {"num_proc": num_proc, "desc": "Hashing pairs", "fn_kwargs": {"options": options}}
    table = map_tables(rows, _contents, _CONTENT_FEATURES, **kwargs)
    return pa.table({"pair_id": names, **{name: table[name].combine_chunks() for name in CONTENT_COLUMNS}})


def source_fingerprint(names: pa.Array) -> str:
    """Hash the names of a source set, in their order."""
    slices = (names.slice(start, 10_000).to_pylist() for start in range(0, len(names), 10_000))
    return digest(str(len(names)), ("\0".join(part) + "\0" for part in slices))[:16]


def _content_ids(table: pa.Table) -> pa.Table:
    return pa.table({"pair_id": [content_id(row) for row in arrow_rows(table)]})


def _contents(table: pa.Table, options: ImageOptions) -> pa.Table:
    hashes = zip(*(_content(row, options) for row in arrow_rows(table)), strict=True)
    return pa.table(list(map(list, hashes)), schema=_CONTENT_FEATURES.arrow_schema)


def _content(row: Mapping[str, Any], options: ImageOptions) -> tuple[str | None, str | None]:
    if row.get(FLIPPED):
        sides = [pair for pair in (SIDES, _T2I[1:]) if set(pair) <= set(row)]
        row = {**row, **{side: row[other] for pair in sides for side, other in (pair, pair[::-1])}}
    pictured = [name for name in _PICTURED if row.get(name) is not None]
    try:
        # Images by their number: the text of a pair of two images is about the first and the second.
        numbers = count()
        numbered = {**row, **{name: change_images(row[name], lambda _: b"%d" % next(numbers)) for name in pictured}}
        if (pair := t2i_identity(numbered)) is not None:  # the order of its images was drawn
            numbered = dict(zip(_T2I, (pair.caption, b"0", b"1"), strict=True))
        text = content_id(numbered)
    except (RowError, TypeError, ValueError, KeyError, AttributeError):  # a row that no check has seen yet
        return None, None
    try:
        return content_id({**row, **_read_media(row, pictured, options)})[:32], text[:32]
    except (RowError, OSError, ValueError):
        return None, text[:32]


def prompt_key(row: Mapping[str, Any]) -> str | None:
    """Hash what both answers of a row follow (messages, tools, template arguments, and images as they lie there) and
    its `group_id`; `None` where they follow nothing."""
    prompt = row.get("prompt")
    if not prompt:
        chosen, rejected = (row.get(side) for side in SIDES)
        if not isinstance(chosen, list) or not isinstance(rejected, list) or chosen[:-1] != rejected[:-1]:
            return None
        prompt = chosen[:-1]
    context = [prompt, *(row.get(name) for name in ("tools", "chat_template_kwargs"))]
    media = media_identity(row)
    if not prompt and not any(media.values()):
        return None
    return digest(to_json([*map(without_empty, context), media, row.get("group_id")]), size=16)


def media_hash(row: Mapping[str, Any], options: ImageOptions | None = None) -> str | None:
    """Hash the images and videos of a row by their bytes, wherever they lie; `None` where one cannot be read."""
    pictured = [name for name in _PICTURED if row.get(name) is not None]
    try:
        return digest(to_json(media_identity(_read_media(row, pictured, options or ImageOptions()))), size=16)
    except (RowError, OSError, ValueError):
        return None


def _read_media(row: Mapping[str, Any], names: list[str], options: ImageOptions) -> dict[str, Any]:
    return {name: change_images(row[name], lambda image: read_encoded(image, options)) for name in names}


def read_encoded(image: Any, options: ImageOptions) -> Any:
    """Read the bytes of an encoded image, wherever they lie, but nothing from the network; any other image stays."""
    image = encoded_content(image)
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
    is_repeated = pd.Series(encoded.indices.to_numpy()).duplicated().to_numpy()
    repeated = np.flatnonzero(is_repeated)
    logger.info(f"{len(repeated):,} of {len(names):,} rows have the name of a row before them, and get a number.")
    # Only a name with the mark in it can be in the way of a new one.
    taken = set(encoded.dictionary.filter(pc.match_substring(encoded.dictionary, "#")).to_pylist())
    counts: Counter[str] = Counter()
    numbered = []
    for name in names.take(pa.array(repeated)).to_pylist():
        counts[name] += 1
        while (new := f"{name}#{counts[name] + 1}") in taken:
            counts[name] += 1
        taken.add(new)
        numbered.append(new)
    return pc.replace_with_mask(names, pa.array(is_repeated), pa.array(numbered, pa.string()))


class T2IIdentity(NamedTuple):
    """A text-to-image pair, however it is asked about."""

    caption: str
    chosen: list[Any]
    rejected: list[Any]
    order: str | None


def content_id(row: Mapping[str, Any]) -> str:
    """
    Hash the content of a row, as its stable identity.

    The hash covers the messages (roles, texts, block types, tool calls), `tools`, `chat_template_kwargs`, images and
    videos; not `strength`, `source` and the like. A string content and one text block are the same. Bytes and paths
    survive an Arrow round trip; a decoded image is another image than the bytes that it came from.

    A text-to-image pair is its caption, its better and its worse image, before and after [`reformulate_t2i`], whatever
    the wording, its language and the order of the images. The two rows of a pair in both orders are two rows.

    Args:
        row (`Mapping[str, Any]`):
            Row that [`check_row`] accepts, or text-to-image pair.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        [`RowError`]: if an image has a type without identity, or does not decode.
    """
    if (pair := t2i_identity(row)) is not None:
        return digest(to_json(pair))
    content: dict[str, Any] = {field: canonical(row.get(field)) for field in ("prompt", *SIDES)} | media_identity(row)
    for field in ("tools", "chat_template_kwargs"):
        content[field] = without_empty(row.get(field)) or None
    return digest(to_json(content))


def t2i_identity(row: Mapping[str, Any]) -> T2IIdentity | None:
    """Read the text-to-image pair that a row is about: from the columns of such a pair; or, of a question about two
    images, from the columns of `T2I_IDENTITY`, or else from a wording, verdicts and the end of a `pair_id` as known.
    """
    caption, images = row.get("caption"), [row.get("chosen_image"), row.get("rejected_image")]
    if isinstance(caption, str) and row.get("chosen") is None and not any(image is None for image in images):
        chosen, rejected = map(image_identity, images)
        return None if chosen == rejected else T2IIdentity(collapse(caption), chosen, rejected, None)
    images = row_images(row)
    if (
        len(images) != 2
        or any(image is None for image in images)
        or any(without_empty(row.get(name)) for name in _EXTRAS)
    ):
        return None
    prompt = row.get("prompt")
    answers: list[Any] = [row.get(side) for side in SIDES]
    if not all(isinstance(answer, (list, tuple)) and answer for answer in answers):
        return None
    if prompt is None and answers[0][:-1] == answers[1][:-1]:  # whole conversations
        prompt, answers = answers[0][:-1], [answer[-1:] for answer in answers]
    if not isinstance(prompt, (list, tuple)) or any(len(answer) != 1 for answer in answers):
        return None
    turns = [message for message in prompt if message.get("role") != "system"]
    if len(turns) != 1 or turns[0].get("role") != "user":
        return None
    better, worse = (message_text(answer[0]) for answer in answers)
    caption, first = row.get("t2i_caption"), row.get("t2i_first")
    is_marked = isinstance(caption, str) and isinstance(first, str)
    if is_marked and first in (better, worse) and better != worse:
        is_first: bool | None = better == first
    else:  # by the words: of a row without the columns, or of which somebody rewrote the verdicts
        if not is_marked:
            caption = find_caption(" ".join(block.get("text") or "" for block in blocks(turns[0])))
        is_first = prefers_first(better)
        if not isinstance(caption, str) or is_first is None or prefers_first(worse) is not (not is_first):
            return None
    named = re.search(r"-(ab|ba)(#\d+)?$", str(row.get("pair_id") or ""))
    order = row.get("t2i_order") if is_marked else named and named[1]
    chosen, rejected = map(image_identity, images if is_first else images[::-1])
    return None if chosen == rejected else T2IIdentity(collapse(str(caption)), chosen, rejected, order)
