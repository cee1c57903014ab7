"""Mean and standard deviation of the rewards of a training set, which `RewardScorer(..., normalize=True)` reads.

They stand in the model's configuration as `reward_mean` and `reward_std`. An adapter has no configuration of a model:
a `config.json` beside it would make transformers take its directory for the base model. There they are in a file of
their own, which [`load_reward_model`] reads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging


if TYPE_CHECKING:
    from datasets import Dataset

    from .reward_trainer import MultimodalRewardTrainer

logger = logging.get_logger(__name__)

STATISTICS_FILE = "reward_statistics.json"
_NAMES = ("reward_mean", "reward_std")


def set_reward_statistics(config: PreTrainedConfig, statistics: dict[str, float] | None) -> None:
    """Writes `reward_mean` and `reward_std` into a configuration, or takes out what is there."""
    for name in _NAMES:
        vars(config).pop(name, None)
    for name, value in (statistics or {}).items():
        setattr(config, name, value)


def measure_reward_statistics(trainer: MultimodalRewardTrainer) -> dict[str, float] | None:
    """
    Mean and standard deviation of the rewards that a trainer's model gives both answers of its training pairs, as many
    of them as `reward_statistics_pairs` says.

    Every process has to call it, after training. The random generators stay as they are. The training is done, and
    nothing that goes wrong here may cost it: an error on any process becomes a warning on all of them.

    Args:
        trainer ([`MultimodalRewardTrainer`]):
            The trainer.

    Returns:
        `dict[str, float]`, *optional*: `reward_mean` and `reward_std`, the same on every process; the latter is 0 if
        all rewards are equal. `None` if no pair is to be scored, a pair cannot be scored, or a reward is not finite.
    """
    try:
        return _measure(trainer)
    except Exception as error:
        logger.warning(
            "`reward_mean` and `reward_std` are left out of the trained model's configuration, because its training "
            f"pairs cannot all be scored: {type(error).__name__}: {error}"
        )
        return None


def _measure(trainer: MultimodalRewardTrainer) -> dict[str, float] | None:
    # The trainer's parts are heavy, and this module is imported with the package.
    import numpy as np

    from .pair_scoring import score_with_trainer

    rows, lengths = _sample(trainer)
    if len(rows) == 0:
        return None
    rewards = score_with_trainer(
        trainer, rows, lengths, batch_size=trainer._train_batch_size, desc="Reward mean and std"
    ).astype(np.float64)
    if not np.isfinite(rewards).all():
        logger.warning("Some rewards of the training set are not finite, so that their mean is not written.")
        return None
    mean, std = float(rewards.mean()), float(rewards.std())
    if std <= 1e-6 * max(1.0, abs(mean)):  # equal, but for the rounding of different batches
        logger.warning(f"All rewards of the training set are {mean:g}; they cannot be normalised.")
        std = 0.0
    return dict(zip(_NAMES, (mean, std), strict=True))


def write_beside_adapter(config: PreTrainedConfig, folder: str | os.PathLike) -> None:
    """
    Writes the mean and the standard deviation that a configuration holds into an adapter's directory.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the base model in training.
        folder (`str` or `os.PathLike`):
            Where the adapter is. A file of an earlier training is removed if there are no values now.
    """
    path = Path(folder) / STATISTICS_FILE
    values = {name: vars(config)[name] for name in _NAMES if name in vars(config)}
    if values:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def read_beside_adapter(config: PreTrainedConfig, name_or_path: str | os.PathLike, revision: str | None) -> None:
    """
    Puts an adapter's mean and standard deviation into the configuration of its base model, whose own are of other
    rewards.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the base model, changed in place.
        name_or_path (`str` or `os.PathLike`):
            Hub id or directory of the adapter.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Raises:
        `ValueError`: if the file holds anything else.
    """
    path = cached_file(name_or_path, STATISTICS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    values = None
    if path is not None:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if (
            not isinstance(values, dict)
            or sorted(values) != sorted(_NAMES)
            or not all(map(_is_finite, values.values()))
        ):
            raise ValueError(f"{path} does not hold the finite numbers {' and '.join(_NAMES)}; delete it.")
    set_reward_statistics(config, values)


def _sample(trainer: MultimodalRewardTrainer) -> tuple[Sequence[Any] | Dataset, Any]:
    """Pairs to score, and their numbers of tokens if they are known."""
    import numpy as np
    from datasets import IterableDataset

    from .processes import gather, raise_together

    args, dataset = trainer.args, trainer.train_dataset
    most = args.reward_statistics_pairs
    if isinstance(dataset, IterableDataset):
        # Rows that were read before: a later one may be bad, and a training that is over must not fail by it.
        step = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows, failure = [], None
        try:
            rows = list(islice(dataset, min(most, trainer.state.global_step * step)))
        except Exception as error:
            failure = error
        raise_together(failure)
        # Where the stream was split over the processes, they may have different numbers of rows.
        return rows[: min(gather(len(rows)))], None
    dataset = cast("Dataset", dataset)
    lengths = None if trainer._lengths is None else np.asarray(trainer._lengths)
    if most >= len(dataset):
        return dataset, lengths
    seed = args.seed if args.data_seed is None else args.data_seed
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), size=most, replace=False))
    return dataset.select(chosen), None if lengths is None else lengths[chosen]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
