"""How several processes decide as one, and how nothing is drawn from the random generators of a training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


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
