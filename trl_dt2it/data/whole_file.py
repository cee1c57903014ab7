"""Files and folders that are there whole or not at all, whenever the program is killed or the power goes."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


_UNFINISHED = re.compile(r".*\.(?P<host>[\w-]+)-(?P<pid>\d+)-[0-9a-f]{8}\.part")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a path to write to, beside the wanted one, which takes its place when all is written.

    Several processes and machines may write one file at a time: each has its own place, and the last one wins. What
    was written is on the disk before it takes the place, and so is the change of name before this returns.

    Args:
        path (`str` or `os.PathLike`):
            The file; its folder is made if it is not there.

    Yields:
        `Path`: where to write. If writing fails, `path` stays as it was, and what was written goes.
    """
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


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a folder to write into, beside the wanted one, which takes its place when all is written.

    Args:
        path (`str` or `os.PathLike`):
            The folder. What is there before goes, or is moved aside by [`move_aside`] before this ends.

    Yields:
        `Path`: an empty folder. If writing fails, `path` stays as it was.
    """
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
    """
    Move a file or folder to the first free of `NAME.old-1`, `NAME.old-2`, ..., beside it.

    Args:
        path (`Path`):
            What is to be moved.

    Returns:
        `Path`: where it is now.
    """
    number = 1
    while (place := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(place)
    return place


def moved_aside(path: Path) -> list[Path]:
    """What [`move_aside`] made of a path, the newest first."""
    found = {}
    for place in path.parent.glob(f"{path.name}.old-*"):
        number = place.name.removeprefix(f"{path.name}.old-")
        if number.isdecimal():
            found[int(number)] = place
    return [found[number] for number in sorted(found, reverse=True)]


def is_aside(path: Path) -> bool:
    """Whether a path is, or is in, something that [`move_aside`] moved."""
    return any(re.fullmatch(r".*\.old-\d+", part) for part in path.parts)


def remove_unfinished(folder: Path) -> int:
    """
    Remove what processes of this machine that are dead have left unfinished in a folder, however deep.

    Returns:
        `int`: how many files and folders went.
    """
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
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _unfinished(path: Path) -> Path:
    """A name that no other process or machine takes; its end says whose it is."""
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
