"""Ray as the engine of the package: functions of rows and of parts are applied by workers of a cluster."""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.columns import is_ranked
from ..scoring.scorer import RewardScorer
from ..scoring.shards import add_ranked_rewards, add_rewards
from ..utils import ENGINE, run_parts


_NO_RAY = "Ray is not installed; install the extra: pip install 'trl-dt2it[ray]'."


@contextmanager
def on_ray(address: str | None = None, *, num_cpus: int | None = None, cpus_per_scorer: float = 1.0) -> Iterator[None]:
    """
    Let a Ray cluster do the work of what is called within.

    Checks of rows, hashes, decontamination and other functions of single rows ([`~trl_dt2it.data.validate`],
    [`~trl_dt2it.curation.pair_ids`], [`~trl_dt2it.data.decontaminate`], ...) are applied by the workers, and so is
    the scoring of data sets into files, by [`score_dataset`] and in rounds; what they give, and in which order, is the
    same as without. A worker or a machine that is lost has its work done by another. Workers read the files of a data
    set by their paths: on several machines, data, `HF_HOME` and output have to be on a file system that all of them
    see.

    Args:
        address (`str`, *optional*):
            Address of a cluster, such as `"auto"` for the one that this machine is part of. By default a cluster of
            this machine alone is started, and ended at the end.
        num_cpus (`int`, *optional*):
            Cores of a cluster that is started; all by default.
        cpus_per_scorer (`float`, *optional*, defaults to `1.0`):
            Cores of a worker that scores, which has one GPU besides where the cluster has any.

    Yields:
        `None`: what the cluster works for is called within the `with`.

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
        options["runtime_env"] = {"env_vars": {"TQDM_DISABLE": "1"}}  # of workers, whose warnings are shown here
        # Without an address, Ray would take a cluster of somebody else on this machine.
        ray.init(address=address or "local", logging_level=logging.WARNING, **options)
    token = ENGINE.set(partial(run_on_workers, cpus_per_scorer=cpus_per_scorer))
    try:
        yield
    finally:
        ENGINE.reset(token)
        if starts:
            ray.shutdown()


def score_dataset(
    model: str | os.PathLike,
    dataset: Dataset,
    output_dir: str | os.PathLike,
    *,
    rows_per_shard: int = 512,
    **kwargs: Any,
) -> Dataset:
    """
    Add the rewards of a reward model to a data set, as [`RewardScorer.score_dataset`] does, within [`on_ray`]: each
    worker loads the model, and this process does not.

    Args:
        model (`str` or `os.PathLike`):
            Hub id or directory of a reward model, seen by all workers.
        dataset, output_dir, rows_per_shard (`Dataset`, `str` or `os.PathLike`, `int`):
            As in [`RewardScorer.score_dataset`]. Files that are there are not made again, whatever was killed.
        kwargs:
            Other arguments of [`RewardScorer.from_pretrained`].

    Returns:
        `Dataset`: with the columns `chosen_reward` and `rejected_reward`, or `rewards` of ranked prompts.

    Raises:
        `ValueError`: as [`RewardScorer.score_dataset`] and [`RewardScorer.from_pretrained`] do.
    """
    load = partial(RewardScorer.from_pretrained, model, **kwargs)
    ((_, settings),) = run_parts(_settings_of, [partial(load, device="cpu")], "Reading the model")
    add = add_ranked_rewards if is_ranked(dataset) else add_rewards
    loads_score = partial(_score_of, load)
    return add(dataset, loads_score, output_dir=Path(output_dir), settings=settings, rows_per_shard=rows_per_shard)


def _settings_of(load: Callable[[], RewardScorer]) -> dict[str, Any]:
    return load().settings


def _score_of(load: Callable[[], RewardScorer]) -> Callable[[Dataset, str], np.ndarray]:
    scorer = load()
    return lambda rows, desc: scorer.score_pairs(rows, desc=desc)


def run_on_workers(
    function: Callable[..., Any],
    parts: Sequence[Any],
    desc: str,
    *,
    setup: Callable[[], Any] | None = None,
    cpus_per_scorer: float = 1.0,
) -> Iterator[tuple[int, Any]]:
    """Do what [`~trl_dt2it.utils.run_parts`] does on the workers of the cluster. With `setup`, each of them has a GPU,
    if there are any. An error of the function is raised here, and the parts that others work on are given up."""
    import ray
    import ray.data

    if not parts:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one line of our own
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that there are no bars
    items = [{"part": number, "given": pickle.dumps(part)} for number, part in enumerate(parts)]
    given = ray.data.from_items(items, override_num_blocks=len(items))
    how: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    if setup is None:
        made = given.map_batches(partial(_apply, function), **how)
    else:
        there = ray.cluster_resources()
        most = there.get("GPU") or there.get("CPU", 1) / cpus_per_scorer
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(len(parts), int(most))))
        how |= {"num_gpus": 1 if there.get("GPU") else None, "num_cpus": cpus_per_scorer, "compute": pool}
        made = given.map_batches(_Worker, fn_constructor_args=(setup, function), **how)
    with tqdm(total=len(parts), desc=desc or None, unit="part") as bar:
        for row in made.iter_rows():
            is_made, result = pickle.loads(row["result"])
            if not is_made:
                raise result
            bar.update()
            yield row["part"], result


class _Worker:
    """A worker that has made something, such as a model on its GPU, which the parts need."""

    def __init__(self, setup: Callable[[], Any], function: Callable[[Any, Any], Any]) -> None:
        try:
            self.function: Callable[[Any], Any] = partial(function, setup())
        except Exception as error:
            self.function = partial(_fail, error)

    def __call__(self, table: pa.Table) -> pa.Table:
        return _apply(self.function, table)


def _fail(error: Exception, _: Any) -> None:
    raise error


def _apply(function: Callable[[Any], Any], table: pa.Table) -> pa.Table:
    """Apply a function to the part of a table of one row; an error of it is a result, as the caller's to raise."""
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
