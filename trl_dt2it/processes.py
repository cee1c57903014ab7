"""The processes of a launch: how they wait, decide and fail as one, and keep a folder to one run.

Work of one process while the others wait may take hours: asking judges, a report, an upload. In the default process
group a collective gives up after its time-out (ten minutes with NCCL), so waiting happens in a gloo group without one.

A run in a folder holds `running.lock` and describes itself in `running.json` (`running-1-of-4.*` with `--shard 1/4`).
Neither does alone. The kernel's lock ends with its process, however that dies, so a killed run is taken over at once.
But NFS, Lustre with `localflock`, FUSE and some container file systems may hold it for one machine only; there the
record is what another machine sees. From there nobody can tell whether the run is alive, so a person has to, unless
Slurm itself has restarted the job. Child processes know their run by an environment variable.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import random
import secrets
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from errno import ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import patch_environment
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from transformers.integrations import deepspeed
from transformers.utils import logging

from .utils import is_alive, remove_unfinished, without_secrets, write_json


logger = logging.get_logger(__name__)

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # the longest wait of processes for each other
RUN_VARIABLE = "TRL_DT2IT_RUN"  # the environment variable that tells child processes the token of their run
LOCK_WAIT = 3.0  # seconds that a process which was just killed may take to be gone
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_NO_LOCKS = {ENOSYS, ENOLCK, ENOTSUP, EOPNOTSUPP}  # errors of file systems without `flock`
_groups: dict[str, Any] = {}  # the default group, and the patient group that was made beside it


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function on the first process, however long it takes; return its result, or raise its error, on all of
    them. Every process has to call it."""
    if PartialState().num_processes == 1:
        return function()
    outcome: list[Any] = [None]
    with failing_together():
        if PartialState().is_main_process:
            outcome[0] = function()
    dist.broadcast_object_list(outcome, group=_patient_group())
    return outcome[0]


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the first process run the block, then the first of each other machine, which may have its own caches, then
    all others, however long it takes; an error of one of the first is raised on all of them."""
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    for _ in range(turn):
        raise_together(None)
    with failing_together() if turn < 2 else nullcontext():
        yield
    if turn == 0:
        raise_together(None)  # of the processes whose turn is the second


def wait_for_everyone() -> None:
    """Wait for all processes, however long the slowest takes."""
    raise_together(None)


def gather(value: T) -> list[T]:
    """Return the values of all processes, in their order, on each of them, however long the slowest takes."""
    if PartialState().num_processes == 1:
        return [value]
    values: list[Any] = [None] * PartialState().num_processes
    dist.all_gather_object(values, value, group=_patient_group())
    return values


def raise_together(error: Exception | None) -> None:
    """Raise the first process's error on all of them, with a note that names the process. Every process has to call
    it; without an error it costs the sum of one number, off the accelerator."""
    state = PartialState()
    if state.num_processes > 1:
        failures = torch.tensor([error is not None], dtype=torch.int64)
        dist.all_reduce(failures, group=_patient_group())
        if int(failures) == 0:
            return
        errors = gather(None if error is None else portable(error))
        rank, first = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        if rank != state.process_index:
            error = first
            error.add_note(f"It was raised on process {rank} of {state.num_processes}.")
    if error is not None:
        raise error


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise the error of a process's block, once all are at the end of theirs, as [`raise_together`]."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_together(failure)


def portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process."""
    with suppress(Exception):
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def check_shared_folder(folder: str | os.PathLike, wait: float = 10.0) -> None:
    """Make a folder on the first process, and raise a `ValueError` on all of them unless all see it within `wait`
    seconds. Every process has to call it."""
    state = PartialState()
    if state.num_processes == 1:
        return
    folder = Path(folder).absolute()

    def mark() -> str:
        marker = folder / f".shared-{uuid.uuid4().hex}"
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        return marker.name

    marker, deadline = folder / on_main_process(mark), time.monotonic() + wait
    while not (is_seen := marker.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = gather((is_seen, str(folder), f"process {state.process_index} on {socket.gethostname()}"))
    if state.is_main_process:
        marker.unlink()
    if blind := [f"{name}, which looks in {path}" for is_seen, path, name in seen if not is_seen]:
        raise ValueError(
            f"{len(blind)} of {len(seen)} processes do not see what the first writes in {seen[0][1]}, such as "
            f"{blind[0]}; pass a folder on a file system that all machines share."
        )


@contextmanager
def whole_weights() -> Iterator[None]:
    """Have `from_pretrained` load the whole model on the process that calls it, and on no other."""
    # With ZeRO-3, transformers would shard the weights of any model among all processes, which have to load it
    # together; with FSDP's `cpu_ram_efficient_loading`, only the first process of a machine would get weights.
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with patch_environment(**{_FSDP_LOADING: "false"}):
            yield
    finally:
        if config is not None and (alive := config()) is not None:
            deepspeed.set_hf_deepspeed_config(alive)


@contextmanager
def same_random_state() -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _patient_group() -> dist.ProcessGroup:
    """Return the group to wait in, made by every process at the first call, and anew with a new default group."""
    if _groups.get("default") is not dist.group.WORLD:
        _groups.update(default=dist.group.WORLD, patient=dist.new_group(backend="gloo", timeout=PATIENCE))
    return _groups["patient"]


@atexit.register
def _close_gloo() -> None:
    """Destroy gloo's groups before the interpreter ends: their threads would abort a process that has done its work.
    NCCL's groups are left alone, since they may wait for processes that have failed."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    patient = _groups.pop("patient", None) if _groups.pop("default", None) is dist.group.WORLD else None
    if patient is not None:
        dist.destroy_process_group(patient)
    del patient
    if dist.get_backend() == "gloo":
        dist.destroy_process_group()


class RunLockedError(ValueError):
    """Another run is at work in the folder."""


@contextmanager
def run_lock(folder: str | os.PathLike, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Be the only run in a folder, or with the part (i, n) of it; raise a [`RunLockedError`] if another is at work.
    Every process of a launch has to call it."""
    folder = Path(folder).absolute()
    with ExitStack() as held:
        on_main_process(lambda: _take(folder, shard, held))
        yield


def _take(folder: Path, shard: tuple[int, int], held: ExitStack) -> None:
    """Hold the lock of a run until `held` is closed, unless the run that this process belongs to has it."""
    folder.mkdir(parents=True, exist_ok=True)
    is_part = shard != (0, 1)
    name = f"running-{shard[0]}-of-{shard[1]}" if is_part else "running"
    record = folder / f"{name}.json"
    known = {path.with_suffix(".json") for end in ("lock", "json") for path in folder.glob(f"running*.{end}")}
    others = [folder / "running.json"] if is_part else sorted(known - {record})
    own = os.environ.get(RUN_VARIABLE)
    if own and any((_read(path) or {}).get("token") == own for path in (record, *others)):
        return
    held.callback(_acquire(record, LOCK_WAIT).release)
    for other in others:  # after its own, so that of two that start at once at most one goes on
        if other.with_suffix(".lock").exists() or other.exists():
            lock = _acquire(other, 0)
            other.unlink(missing_ok=True)
            lock.release()
    token = secrets.token_hex(16)

    def remove() -> None:
        if (_read(record) or {}).get("token") == token:
            record.unlink(missing_ok=True)

    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": PartialState().num_processes,
        "command": shlex.join([Path(sys.argv[0]).name, *without_secrets(sys.argv[1:3])]),
        "job": _job(),
        "token": token,
    }
    write_json(record, about)
    held.callback(remove)
    held.enter_context(patch_environment(**{RUN_VARIABLE: token}))
    if not is_part:
        remove_unfinished(folder)


def _acquire(record: Path, wait: float) -> BaseFileLock:
    lock: BaseFileLock = FileLock(record.with_suffix(".lock"))
    try:
        try:
            lock.acquire(timeout=wait, poll_interval=0.05)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, Timeout) or getattr(error, "errno", ENOSYS) not in _NO_LOCKS:
                raise
            lock = SoftFileLock(record.with_suffix(".softlock"))
            lock.acquire(timeout=wait, poll_interval=0.05)
    except Timeout:
        raise RunLockedError(f"{_told(record)}; wait for it, stop it, or use another folder.") from None
    about, host = _read(record), socket.gethostname()
    if about is not None and about.get("host") != host and not _is_requeued(about):
        lock.release()
        doubt = f"whether it still runs cannot be told from {host}; if it does not, delete {record}"
        raise RunLockedError(f"{_told(record)}, and {doubt}.")
    if about is not None:
        logger.warning(f"{_told(record, 'was')} and has ended without a word; this run goes on from what it left.")
    return lock


def _told(record: Path, is_or_was: str = "is") -> str:
    """Begin a sentence about the run that is or was at work in a folder."""
    about = _read(record) or {}
    pid, host = about.get("pid"), about.get("host")
    if not isinstance(pid, int) or (host == socket.gethostname() and not is_alive(pid) and is_or_was == "is"):
        return f"Another run, which has not said yet who it is, is at work in {record.parent}"
    since, command = about.get("since"), about.get("command")
    return f"{record.parent} {is_or_was} in use by process {pid} on {host} since {since} ({command})"


def _job() -> list[Any] | None:
    """Return the id of this job of Slurm, and the number of its restarts."""
    number = os.environ.get("SLURM_JOB_ID")
    return None if number is None else [number, int(os.environ.get("SLURM_RESTART_COUNT", "0"))]


def _is_requeued(about: Mapping[str, Any]) -> bool:
    """Tell whether Slurm has restarted the job that left a record, as this job."""
    before, now = about.get("job"), _job()
    return bool(before and now and before[0] == now[0] and before[1] < now[1])


def _read(record: Path) -> dict[str, Any] | None:
    try:
        about = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else {}
