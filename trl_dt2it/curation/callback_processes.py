"""How several processes decide as one and know that they share a folder, and how nothing is drawn from the random
generators of a training."""

from __future__ import annotations

import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


T = TypeVar("T")


def on_main_process(function: Callable[[], T]) -> T:
    """What a function gives on the first process, on all of them; an error there is raised everywhere, so that no
    process waits for one that has ended."""
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            failure = error
            outcome[1] = f"On the first process: {type(error).__name__}: {error}"
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise failure or RuntimeError(outcome[1])
    return outcome[0]


def check_shared_folder(folder: str | os.PathLike, wait: float = 10.0) -> None:
    """
    Check that all processes see one and the same folder, which the first of them makes.

    Every process must call it, and all raise together.

    Args:
        folder (`str` or `os.PathLike`):
            Folder that all processes read what one has written in.
        wait (`float`, *optional*, defaults to `10.0`):
            How many seconds a file may take to appear on the other machines.

    Raises:
        `ValueError`: if a process does not see what the first has written.
    """
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
    seen = gather_object([(is_seen, str(folder), f"process {state.process_index} on {socket.gethostname()}")])
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
def same_random_state() -> Iterator[None]:
    """Leaves the random generators of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
