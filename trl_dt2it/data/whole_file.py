"""Files that are there whole or not at all, whenever the program is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a path to write to, beside the wanted one, which takes its place when all is written.

    Args:
        path (`str` or `os.PathLike`):
            The file; its folder is made if it is not there.

    Yields:
        `Path`: where to write. If writing fails, `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)
