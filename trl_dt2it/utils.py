"""Files written whole, digests, text fit for a terminal, shards, overrides; nothing that takes time to import."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from rich.table import Table
from rich.text import Text


# A function that does what [`run_parts`] does on other processes or machines.
Engine: TypeAlias = Callable[..., Iterator[tuple[int, Any]]]
ENGINE: ContextVar[Engine | None] = ContextVar("ENGINE", default=None)  # see `trl_dt2it.scale`

_UNFINISHED = re.compile(r".*\.(?P<host>[\w-]+)-(?P<pid>\d+)-[0-9a-f]{8}\.part")


def digest(*contents: str | bytes | bytearray | memoryview | Iterable[str | bytes], size: int | None = None) -> str:
    """Hash texts and bytes, or streams of them, in turn: hex digits of SHA-256, or of `size` bytes of BLAKE2b."""
    state = hashlib.sha256() if size is None else hashlib.blake2b(digest_size=size)
    for content in contents:
        for part in [content] if isinstance(content, (str, bytes, bytearray, memoryview)) else content:
            state.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """Hash a file as [`digest`] does, a part at a time."""
    with path.open("rb") as file:
        return digest(iter(lambda: file.read(2**20), b""))


def read_packaged(name: str) -> Any:
    """Read a YAML file of the package, by its path in it."""
    return yaml.safe_load((files("trl_dt2it") / name).read_text(encoding="utf-8"))


def digest_of(value: Any) -> str:
    """Hash a JSON value, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True, default=str))


def printable(text: object, most: int | None = None, *, instead: str = "\ufffd") -> str:
    """Replace control characters, line breaks, marks of direction and lone surrogates, and cut after `most`."""
    return "".join(char if char.isprintable() else instead for char in str(text)[:most])


def check_value(what: str, value: object, is_right: bool, told: str) -> None:
    """Refuse a wrong value of an argument or a setting with a `ValueError` that ends with what is `told`."""
    if not is_right:
        raise ValueError(f"{what} is {value!r}; {told}.")


def parse_shard(text: str | None) -> tuple[int, int]:
    """Read `--shard`: `"1/4"` as `(1, 4)`, and `None` as `(0, 1)`, which is everything."""
    if text is None:
        return 0, 1
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"`--shard` is {text!r}; it must be i/n with 0 <= i < n, such as 0/4.")
    return int(part), int(parts)


def run_parts(
    function: Callable[..., Any], parts: Sequence[Any], desc: str, *, setup: Callable[[], Any] | None = None
) -> Iterator[tuple[int, Any]]:
    """Apply a function to parts by the engine in use, or here, one after the other, and yield the number of each with
    its result as it is made. The function takes first what `setup` makes, once for each worker."""
    if (engine := ENGINE.get()) is not None:
        yield from engine(function, parts, desc, setup=setup)
    else:
        made = () if setup is None or not parts else (setup(),)
        yield from ((number, function(*made, part)) for number, part in enumerate(parts))


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path for a file or folder, which replaces `path` once all is on disk, or is removed after an error."""
    # Several processes and machines may write a file at a time: each writes to its own path, and the last wins.
    path = Path(path)
    part = _unfinished(path)
    try:
        yield part
        for file in (*part.rglob("*"), part):
            _sync(file)
        if part.is_dir() and path.is_dir():  # a folder cannot replace another
            before = _unfinished(path)
            os.replace(path, before)
            os.replace(part, path)
            _remove(before)
        else:
            os.replace(part, path)
    except BaseException:
        _remove(part)
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
    """Yield an empty folder to write into, which replaces `path` once all is on disk, as [`whole_file`]."""
    with whole_file(path) as part:
        part.mkdir()
        yield part


def move_aside(path: Path) -> Path:
    """Move a file or folder to the first free of `NAME.old-1`, `NAME.old-2` and so on, and return that path."""
    aside = (path.with_name(f"{path.name}.old-{number}") for number in itertools.count(1))
    return path.rename(next(new for new in aside if not new.exists()))


def moved_aside(path: Path) -> list[Path]:
    """Return the paths to which [`move_aside`] has moved a path, the newest first."""
    numbers = (old.name.removeprefix(f"{path.name}.old-") for old in path.parent.glob(f"{path.name}.old-*"))
    newest_first = sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)
    return [path.with_name(f"{path.name}.old-{number}") for number in newest_first]


def is_aside(path: Path) -> bool:
    """Tell a path that [`move_aside`] has moved, or that lies in such a folder."""
    return any(re.fullmatch(r".*\.old-\d+", part) for part in path.parts)


def remove_unfinished(folder: Path) -> int:
    """Remove unfinished files and folders of dead processes of this machine, however deep; return their number."""
    matches = ((part, _UNFINISHED.fullmatch(part.name)) for part in folder.rglob("*.part"))
    dead = [part for part, at in matches if at and at["host"] == _host() and not is_alive(int(at["pid"]))]
    for part in dead:
        _remove(part)
    return len(dead)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
    """Return a path that no other process or machine takes, named after this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = os.fsdecode(os.fsencode(path.name)[:160])  # file systems take names of 255 bytes
    return path.with_name(f"{stem}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.part")


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:60] or "-"


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk; some file systems cannot sync folders."""
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


@contextmanager
def with_values(holder: Any, **values: object) -> Iterator[None]:
    """Override attributes of an object or a class."""
    before = {name: getattr(holder, name) for name in values}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)


def without_secrets(command: Sequence[str]) -> list[str]:
    """Replace the values of flags that name a token, a key or a password by `***`."""
    words: list[str] = []
    hide = False
    for word in command:
        flag, equals, _ = word.partition("=")
        is_secret = flag.startswith("--") and flag.lower().endswith(("token", "key", "password", "secret"))
        words.append("***" if hide else f"{flag}=***" if is_secret and equals else word)
        hide = is_secret and not equals
    return words


def screen_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, last: str | None = None, title: str | None = None
) -> Table:
    """Make a table for the terminal: names, right-aligned numbers and, with `last`, a column of text. Markup and
    control characters in cells and title are not obeyed."""
    first, *numbers = columns
    table = Table(first, title=None if title is None else Text(printable(title), style="table.title"))
    for name in numbers:
        table.add_column(Text(name), justify="right")
    if last is not None:
        table.add_column(last)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def from_json(value: Any) -> Any:
    """Parse a setting that a YAML file has as it is, and a command line as JSON."""
    return json.loads(value) if isinstance(value, str) else value
