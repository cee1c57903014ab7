"""Where the mean and standard deviation of a training set's rewards are kept, for `RewardScorer(..., normalize=True)`.

They stand in the model's configuration as `reward_mean` and `reward_std`. An adapter has no configuration of a model:
a `config.json` beside it would make transformers take its directory for the base model. There they are in a file of
their own, which [`load_reward_model`] reads.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file


STATISTICS_FILE = "reward_statistics.json"
STATISTICS = ("reward_mean", "reward_std")


def set_reward_statistics(config: PreTrainedConfig, statistics: dict[str, float] | None) -> None:
    """Writes `reward_mean` and `reward_std` into a configuration, or takes out what is there."""
    for name in STATISTICS:
        vars(config).pop(name, None)
    for name, value in (statistics or {}).items():
        setattr(config, name, value)


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
    values = {name: vars(config)[name] for name in STATISTICS if name in vars(config)}
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
            or sorted(values) != sorted(STATISTICS)
            or not all(map(_is_finite, values.values()))
        ):
            raise ValueError(f"{path} does not hold the finite numbers {' and '.join(STATISTICS)}; delete it.")
    set_reward_statistics(config, values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
