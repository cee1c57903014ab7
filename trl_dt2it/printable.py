"""Text that strangers wrote, fit for a terminal or a picture; and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def digest(*contents: str | bytes | bytearray | memoryview | Iterable[str | bytes], size: int | None = None) -> str:
    """Hash texts and bytes, or streams of them, one behind the other: hexadecimal digits of SHA-256 or, with `size`,
    of that many bytes of BLAKE2b."""
    state = hashlib.sha256() if size is None else hashlib.blake2b(digest_size=size)
    for content in contents:
        for part in [content] if isinstance(content, (str, bytes, bytearray, memoryview)) else content:
            state.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return state.hexdigest()


def digest_of(value: Any) -> str:
    """Hash what JSON can hold, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True, default=str))


def printable(text: object, most: int | None = None, *, instead: str = "\ufffd") -> str:
    """Replace control characters, line breaks, marks of direction and lone surrogates, and cut after `most`."""
    return "".join(char if char.isprintable() else instead for char in str(text)[:most])
