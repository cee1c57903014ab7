"""Ray as the engine of the package: functions of rows and of parts are applied by workers of a cluster."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import datasets
import pyarrow as pa
from tqdm.auto import tqdm

from ..utils import ENGINE


_NO_RAY = "Ray is not installed; install the extra: pip install 'trl-dt2it[ray]'."


@contextmanager
def on_ray(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """
    Let a Ray cluster do the work of what is called within.

    Checks of rows, hashes, decontamination and other functions of single rows ([`~trl_dt2it.data.validate`],
    [`~trl_dt2it.data.pair_ids`], [`~trl_dt2it.data.decontaminate`], ...), and the shards of
    [`~trl_dt2it.data.prepare_shard`], are applied by the workers; what they give, and in which order, is the same as
    without. A worker or a machine that is lost has its work done by another. Workers read the files of a data set by
    their paths: on several machines, data, `HF_HOME` and output have to be on a file system that all of them see.

    Args:
        address (`str`, *optional*):
            Address of a cluster, such as `"auto"` for the one that this machine is part of. By default a cluster of
            this machine alone is started, and ended at the end.
        num_cpus (`int`, *optional*):
            Cores of a cluster that is started; all by default.

    Raises:
        `ModuleNotFoundError`: if Ray is not installed.
        `ConnectionError`: if there is no cluster at the address.

    Example:

    ```python
    >>> from trl_dt2it.data import validate
    >>> from trl_dt2it.scale import on_ray

    >>> with on_ray("auto"):
    ...     clean, quarantine = validate(pairs)
    ```
    """
    if find_spec("ray") is None:
        raise ModuleNotFoundError(_NO_RAY)
    import ray

    starts = not ray.is_initialized()
    if starts:
        options: dict[str, Any] = {"include_dashboard": False, "num_cpus": num_cpus} if address is None else {}
        ray.init(address=address, logging_level=logging.WARNING, **options)
    token = ENGINE.set(run_on_workers)
    try:
        yield
    finally:
        ENGINE.reset(token)
        if starts:
            ray.shutdown()


def run_on_workers(
    function: Callable[..., Any],
    parts: Sequence[Any],
    desc: str,
    *,
    setup: Callable[[], Any] | None = None,
    num_gpus: float = 0,
    num_workers: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Apply a function to parts on the workers of the cluster, and yield the number of each with its result as it is
    made. With `setup`, up to `num_workers` actors make something once, each with so many GPUs, and the function takes
    it first. An error of the function is raised here, and the parts that others work on are given up."""
    import ray.data

    if not parts:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one line of our own
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    items = [{"part": number, "given": pickle.dumps(part)} for number, part in enumerate(parts)]
    given = ray.data.from_items(items, override_num_blocks=len(items))
    how: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "num_gpus": num_gpus or None}
    if setup is None:
        made = given.map_batches(partial(_apply, function), **how)
    else:
        size = (1, min(len(parts), num_workers or len(parts)))
        arguments = {"setup": setup, "function": function}
        made = given.map_batches(_Actor, fn_constructor_kwargs=arguments, concurrency=size, **how)
    with tqdm(total=len(parts), desc=desc or None, unit="part") as bar:
        for row in made.iter_rows():
            is_made, result = pickle.loads(row["result"])
            if not is_made:
                raise result
            bar.update()
            yield row["part"], result


class _Actor:
    """A worker that has made something, such as a model on its GPU, which the parts need."""

    def __init__(self, setup: Callable[[], Any], function: Callable[[Any, Any], Any]) -> None:
        self.function = partial(function, setup())

    def __call__(self, table: pa.Table) -> pa.Table:
        return _apply(self.function, table)


def _apply(function: Callable[[Any], Any], table: pa.Table) -> pa.Table:
    """Apply a function to the part of a table of one row; an error of it is a result, as the caller's to raise."""
    datasets.disable_progress_bars()
    try:
        result: tuple[bool, Any] = True, function(pickle.loads(table["given"][0].as_py()))
    except Exception as error:
        result = False, _portable(error)
    return pa.table({"part": table["part"], "result": pa.array([pickle.dumps(result)], pa.large_binary())})


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
