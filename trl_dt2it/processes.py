"""The processes of a run: waiting for each other, deciding and failing as one, sharing a folder, loading models.

Whatever one process does while the others wait may take hours: asking judges, a report, an upload. In the default
process group a collective gives up after its time-out (ten minutes with NCCL), so waiting happens in a group of its
own, over gloo, which does not.
"""

from __future__ import annotations

import atexit
import os
import pickle
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers.integrations import deepspeed


T = TypeVar("T")

PATIENCE = timedelta(days=30)
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_groups: dict[str, Any] = {}  # the default group and the patient one that was made beside it


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function on the first process and return its result on all of them, however long it takes; an error there
    is raised on all of them. Every process has to call it."""
    if PartialState().num_processes == 1:
        return function()
    outcome: list[Any] = [None]
    failure = None
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            failure = error
    raise_together(failure)
    dist.broadcast_object_list(outcome, group=_patient_group())
    return outcome[0]


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the first process run the block, then the first of each other machine, which may have caches of its own, and
    then all others, however long it takes; an error of one that goes first is raised on all of them."""
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    for _ in range(turn):
        raise_together(None)
    try:
        yield
    except Exception as error:
        if turn < 2:
            raise_together(error)
        raise
    for _ in range(turn, 2):
        raise_together(None)


def wait_for_everyone() -> None:
    """Wait until all processes are here, however long the slowest takes."""
    raise_together(None)


def gather(value: T) -> list[T]:
    """Return the values of all processes, in their order, on each of them; the slowest may take its time."""
    if PartialState().num_processes == 1:
        return [value]
    values: list[Any] = [None] * PartialState().num_processes
    dist.all_gather_object(values, value, group=_patient_group())
    return values


def raise_together(error: Exception | None) -> None:
    """Raise the error of the first process that has one on all of them, with a note that says which. Every process has
    to call it; where none has an error it costs the sum of one number, off the accelerator."""
    state = PartialState()
    if state.num_processes > 1:
        failures = torch.tensor([error is not None], dtype=torch.int64)
        dist.all_reduce(failures, group=_patient_group())
        if int(failures) == 0:
            return
        found = gather(None if error is None else portable(error))
        rank = next(rank for rank, one in enumerate(found) if one is not None)
        if rank != state.process_index:
            error = cast(Exception, found[rank])
            error.add_note(f"It was raised on process {rank} of {state.num_processes}.")
    if error is not None:
        raise error


def portable(error: Exception) -> Exception:
    """Return an error as it may be sent to another process."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def check_shared_folder(folder: str | os.PathLike, wait: float = 10.0) -> None:
    """Raise a `ValueError` on all processes unless they all see the folder, which the first makes, within some
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
    blind = [(place, name) for is_seen, place, name in seen if not is_seen]
    if blind:
        place, name = blind[0]
        raise ValueError(
            f"{len(blind)} of {len(seen)} processes do not see what the first writes in {seen[0][1]}, such as {name}, "
            f"which looks in {place}; pass a folder on a file system that all machines share."
        )


@contextmanager
def whole_weights() -> Iterator[None]:
    """Have `from_pretrained` load the whole model on the process that calls it, and on no other."""
    # With ZeRO-3, transformers would divide the weights of any model among all processes, which have to load it
    # together; with FSDP's `cpu_ram_efficient_loading`, only the first process of a machine may get weights.
    config, efficient = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get(_FSDP_LOADING)
    deepspeed.unset_hf_deepspeed_config()
    if efficient is not None:
        os.environ[_FSDP_LOADING] = "false"
    try:
        yield
    finally:
        if config is not None and (alive := config()) is not None:
            deepspeed.set_hf_deepspeed_config(alive)
        if efficient is not None:
            os.environ[_FSDP_LOADING] = efficient


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave the random generators of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _patient_group() -> dist.ProcessGroup:
    """Return the group to wait in, which every process makes at the first call, and anew after the default group."""
    if _groups.get("default") is not dist.group.WORLD:
        _groups.update(default=dist.group.WORLD, patient=dist.new_group(backend="gloo", timeout=PATIENCE))
    return _groups["patient"]


@atexit.register
def _close_gloo() -> None:
    """Take gloo's groups down before the interpreter ends: threads that are still running abort a process that has
    done all its work. NCCL's groups are left alone, which may wait for processes that have failed."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    patient = _groups.pop("patient", None) if _groups.pop("default", None) is dist.group.WORLD else None
    if patient is not None:
        dist.destroy_process_group(patient)
    del patient
    if dist.get_backend() == "gloo":
        dist.destroy_process_group()
