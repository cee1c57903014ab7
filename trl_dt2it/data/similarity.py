"""When two questions are one question and two images one image, however they are written or encoded."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

# Rather than a hash of our own, which would need the same tests: `imagehash`, kept up since 2013 (BSD-2-Clause,
# 80 kB; of what it needs only PyWavelets is new here: MIT, 9 MB).
import imagehash
import numpy as np
from PIL import Image

from .canonical import IMAGE_MARKER
from .rows import blocks, row_images
from .t2i_templates import find_caption


# Side of the square of low frequencies whose signs make the hash. `benchmarks/decontamination.py` compares sizes and
# kinds of hashes.
_SIDE = 12
HASH_BITS = _SIDE**2
HASH_WORDS = -(-HASH_BITS // 64)


def normalise(text: str) -> str:
    """
    A question without what people change when they copy one: case, punctuation, white space, width of characters,
    image markers.

    Args:
        text (`str`):
            The question.

    Returns:
        `str`: letters, digits, combining marks and symbols.
    """
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_MARKER, " ")).casefold()
    kept = _ignored().sub("", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFKC", kept)  # marks may stand behind another letter now


def row_questions(row: Mapping[str, Any]) -> list[str]:
    """
    The questions that a row asks, normalised: what its user says in all turns together, and in each turn; and the
    caption of a question about a text-to-image pair, told by the column `t2i_caption` or by a known wording.

    Args:
        row (`Mapping[str, Any]`):
            A preference row, or any row with `question` or `caption`.

    Returns:
        `list[str]`: different ones. Empty if the row has none; a prompt of images alone asks `""`.
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
    """
    A hash that images share, but for some bits, if they look alike.

    Args:
        image (`PIL.Image.Image`):
            An image from [`load_image`].

    Returns:
        `np.ndarray` of shape `(HASH_WORDS,)` and type uint64.
    """
    bits = imagehash.phash(image, hash_size=_SIDE).hash.ravel()
    return np.packbits(np.pad(bits, (0, 64 * HASH_WORDS - HASH_BITS))).view(np.uint64)


def distances(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """
    Numbers of bits in which hashes differ.

    Args:
        hashes (`np.ndarray` of shape `(N, HASH_WORDS)` and type uint64):
            Hashes.
        others (`np.ndarray` of shape `(M, HASH_WORDS)` and type uint64):
            Other hashes.

    Returns:
        `np.ndarray` of shape `(N, M)` and type int64.
    """
    return np.bitwise_count(hashes[:, None] ^ others[None]).sum(axis=-1, dtype=np.int64)


@lru_cache(maxsize=1)
def _ignored() -> re.Pattern:
    """Punctuation, white space and what does not show."""
    kinds = ("P", "Z", "Cc", "Cf")
    ignored = [char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char).startswith(kinds)]
    return re.compile(f"[{re.escape(''.join(ignored))}]+")
