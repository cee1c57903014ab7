"""One run at a time in a folder.

```
output_dir/
  running.lock        held by the process that runs; `running-1-of-4.lock` by one that runs with `--shard 1/4`
  running.json        who that is: process, machine, since when, command; gone when it ends
```
Two locks, because neither does by itself. The kernel's (`flock`, by filelock, which falls back to a file with the
owner's process id where a file system has none) ends with its process, however that dies, so that a run that was
killed is taken over at once, and no other process that got its number by chance keeps it alive. But file systems of
clusters differ in how far it reaches: NFS and Lustre with the option `flock` hold it for all machines, Lustre with
`localflock`, many FUSE and some container file systems for one alone. There the record is what another machine sees.
Nobody can tell from there whether the run is alive, so that a person has to; only a job that Slurm itself has started
anew on another machine takes its own record over.

The first process of a launch holds the lock for all, whose ranks belong to it; processes that it starts know it by a
variable of the environment.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from errno import ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from transformers.utils import logging

from .data.whole_file import is_alive, remove_unfinished, write_json
from .processes import on_main_process


logger = logging.get_logger(__name__)

VARIABLE = "TRL_DT2IT_RUN"
_NO_LOCKS = {ENOSYS, ENOLCK, ENOTSUP, EOPNOTSUPP}  # what file systems without `flock` say
WAIT = 3.0  # seconds: how long a process that was just killed may take to be gone


class RunLockedError(ValueError):
    """Another run is at work in the folder."""


@contextmanager
def run_lock(folder: str | os.PathLike, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Be the only run in a folder, or the only one with a part (i, n) of it; raise a [`RunLockedError`] if another is.
    Every process of a launch has to call it."""
    folder = Path(folder).absolute()
    held: list[_Held] = []
    on_main_process(lambda: held.extend(_take(folder, shard)))
    try:
        yield
    finally:
        for one in held:
            one.release()


class _Held:
    """A lock that this process holds, with its record."""

    def __init__(self, lock: BaseFileLock, record: Path, token: str) -> None:
        self.lock, self.record, self.token = lock, record, token
        self.before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = token

    def release(self) -> None:
        if (_read(self.record) or {}).get("token") == self.token:
            self.record.unlink(missing_ok=True)
        self.lock.release()
        os.environ.pop(VARIABLE, None)
        if self.before is not None:
            os.environ[VARIABLE] = self.before


def _take(folder: Path, shard: tuple[int, int]) -> list[_Held]:
    """Take the lock of a run, unless the run that this process belongs to has it."""
    folder.mkdir(parents=True, exist_ok=True)
    is_part = shard != (0, 1)
    name = f"running-{shard[0]}-of-{shard[1]}" if is_part else "running"
    record = folder / f"{name}.json"
    others = [folder / "running.json"] if is_part else [one for one in _records(folder) if one != record]
    own = os.environ.get(VARIABLE)
    if own and any((_read(one) or {}).get("token") == own for one in (record, *others)):
        return []
    lock = _acquire(record, WAIT)
    try:
        for other in others:  # after its own is taken, so that of two that start at once at most one goes on
            if other.with_suffix(".lock").exists() or other.exists():
                taken = _acquire(other, 0)
                other.unlink(missing_ok=True)
                taken.release()
        token = secrets.token_hex(16)
        write_json(record, _about(token))
        if not is_part:
            remove_unfinished(folder)
    except BaseException:
        lock.release()
        raise
    return [_Held(lock, record, token)]


def _acquire(record: Path, wait: float) -> BaseFileLock:
    path = record.with_suffix(".lock")
    lock: BaseFileLock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=wait, poll_interval=0.05)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, Timeout) or getattr(error, "errno", ENOSYS) not in _NO_LOCKS:
                raise
            lock = SoftFileLock(path.with_suffix(".softlock"))
            lock.acquire(timeout=wait, poll_interval=0.05)
    except Timeout:
        raise RunLockedError(f"{_told(record)}; wait for it, stop it, or use another folder.") from None
    about = _read(record)
    if about is None:
        return lock
    if about.get("host") == socket.gethostname() or _is_requeued(about):
        logger.warning(f"{_told(record, 'was')} and has ended without a word; this run goes on from what it left.")
        return lock
    lock.release()
    raise RunLockedError(
        f"{_told(record)}, and whether it still runs cannot be told from {socket.gethostname()}; if it does not, "
        f"delete {record}."
    )


def _records(folder: Path) -> list[Path]:
    """List the records of all runs, and of all locks, of a folder."""
    return sorted({one.with_suffix(".json") for end in ("lock", "json") for one in folder.glob(f"running*.{end}")})


def _told(record: Path, is_or_was: str = "is") -> str:
    """Begin a sentence with who is at work in a folder."""
    about = _read(record) or {}
    pid, host = about.get("pid"), about.get("host")
    if not isinstance(pid, int) or (host == socket.gethostname() and not is_alive(pid) and is_or_was == "is"):
        return f"Another run, which has not said yet who it is, is at work in {record.parent}"
    since, command = about.get("since"), about.get("command")
    return f"{record.parent} {is_or_was} in use by process {pid} on {host} since {since} ({command})"


def _about(token: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": PartialState().num_processes,
        "command": shlex.join([Path(sys.argv[0]).name, *without_secrets(sys.argv[1:3])]),
        "job": _job(),
        "token": token,
    }


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


def _job() -> list[Any] | None:
    """Return the job of Slurm that this is, and how often it was started anew."""
    number = os.environ.get("SLURM_JOB_ID")
    return None if number is None else [number, int(os.environ.get("SLURM_RESTART_COUNT", "0"))]


def _is_requeued(about: Mapping[str, Any]) -> bool:
    """Tell whether this is the job that left a record, started anew by Slurm after it had ended."""
    before, now = about.get("job"), _job()
    return bool(before and now and before[0] == now[0] and before[1] < now[1])


def _read(record: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else {}
