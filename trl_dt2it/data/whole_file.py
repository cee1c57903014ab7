"""Files and folders that are there whole or not at all, whenever the program is killed or the power goes."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


_UNFINISHED = re.compile(r".*\.(?P<host>[\w-]+)-(?P<pid>\d+)-[0-9a-f]{8}\.part")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` once all is on the disk, or is removed if writing fails."""
    # Several processes and machines may write one file at a time: each writes to its own path, and the last wins.
    path = Path(path)
    part = _unfinished(path)
    try:
        yield part
        _sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json(path: str | os.PathLike, value: Any, *, indent: int | None = 2, **options: Any) -> None:
    """Write a value as a JSON file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=indent, **options) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; `None` if there is none."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder to write into, which replaces `path` once all of it is on the disk, as [`whole_file`]."""
    path = Path(path)
    part = _unfinished(path)
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            _sync(file)
        _sync(part)
        if path.is_dir():  # a folder takes no other's place
            before = _unfinished(path)
            os.replace(path, before)
            os.replace(part, path)
            shutil.rmtree(before, ignore_errors=True)
        else:
            os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync(path.parent)


def move_aside(path: Path) -> Path:
    """Move a file or folder to the first free of `NAME.old-1`, `NAME.old-2`, ..., beside it, and return that path."""
    number = 1
    while (place := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(place)
    return place


def moved_aside(path: Path) -> list[Path]:
    """Return the paths to which [`move_aside`] has moved a path, the newest first."""
    found = {}
    for place in path.parent.glob(f"{path.name}.old-*"):
        number = place.name.removeprefix(f"{path.name}.old-")
        if number.isdecimal():
            found[int(number)] = place
    return [found[number] for number in sorted(found, reverse=True)]


def is_aside(path: Path) -> bool:
    """Tell a path that [`move_aside`] has moved, or that lies in such a folder."""
    return any(re.fullmatch(r".*\.old-\d+", part) for part in path.parts)


def remove_unfinished(folder: Path) -> int:
    """Remove what dead processes of this machine have left unfinished in a folder, however deep; return its count."""
    removed = 0
    for part in list(folder.rglob("*.part")):
        match = _UNFINISHED.fullmatch(part.name)
        if match is None or match["host"] != _host() or is_alive(int(match["pid"])):
            continue
        removed += 1
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
    return removed


def is_alive(pid: int) -> bool:
    """Tell a running process of this machine from one that has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _unfinished(path: Path) -> Path:
    """Return a name that no other process or machine takes, which ends in whose it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # File systems take names of 255 bytes.
    stem = os.fsdecode(os.fsencode(path.name)[:160])
    return path.with_name(f"{stem}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.part")


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:60] or "-"


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder; some file systems cannot tell of folders."""
    try:
        file = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(file)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(file)
