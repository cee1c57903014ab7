"""A name for every pair, under which the ledger keeps what is known of it."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from transformers.utils import logging

from ..data.arrow_rows import arrow_rows, look_at_all
from ..data.canonical import T2I_IDENTITY
from ..data.encoded import column_of, leave_images_encoded
from ..data.identity import content_id
from ..data.rows import SIDES


logger = logging.get_logger(__name__)

# What `content_id` looks at.
_CONTENT = ("prompt", *SIDES, "image", "images", "videos", "tools", "chat_template_kwargs", *T2I_IDENTITY)


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


def source_fingerprint(names: pa.Array) -> str:
    """
    A short hash that tells one source set from another.

    Args:
        names (`pa.Array`):
            What [`pair_ids`] gives for the set.

    Returns:
        `str`: 16 hexadecimal digits; the same for the same names in the same order.
    """
    digest = hashlib.sha256(str(len(names)).encode())
    for start in range(0, len(names), 10_000):
        digest.update("\0".join(names.slice(start, 10_000).to_pylist()).encode() + b"\0")
    return digest.hexdigest()[:16]


def _content_ids(table: pa.Table, json_columns: Features) -> pa.Table:
    return pa.table({"pair_id": [content_id(row) for row in arrow_rows(table, json_columns)]})


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
