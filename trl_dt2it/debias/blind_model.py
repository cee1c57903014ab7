"""Blind margins by a reward model: trained without the images, it scores pairs whose groups it has not seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from accelerate.utils import release_memory
from datasets import Dataset
from peft import PeftConfig
from scipy.optimize import brentq
from scipy.special import expit
from transformers import BitsAndBytesConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from ..data import controls
from ..data.columns import column_of, row_groups
from ..training.config import MultimodalRewardConfig
from ..training.pair_scoring import score_with_trainer
from ..training.setup import end_training, image_options
from ..training.trainer import MultimodalRewardTrainer
from .audit import folds


logger = logging.get_logger(__name__)

# Columns that ask for a margin of reward or weigh it, by which it would no longer be the log odds of the label.
_ABOUT_THE_MARGIN = ("margin", "strength", "blind_margin")


def model_blind_margins(
    dataset: Dataset,
    model: str,
    args: MultimodalRewardConfig,
    *,
    images: Literal["blank", "none"] = "blank",
    num_folds: int = 2,
    seed: int = 42,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> np.ndarray:
    r"""
    Compute the log odds that the chosen answer of each pair is better, by reward models that see no image.

    For each fold, [`MultimodalRewardTrainer`] trains a model on the pairs of the others with the loss `bt`, and it
    scores the fold, both without the images; no `group_id` is in two folds. Its reward margins are then multiplied by
    the factor, >= 0, under which they predict the labels of the fold best, so that a model that is too sure of itself
    does not take weight from pairs that it cannot tell: Platt's scaling through the origin, with his targets. That
    takes `num_folds` trainings on `1 - 1 / num_folds` of the set. Every process of a launch has to call it.

    Args:
        dataset (`Dataset`):
            Preference rows, as the trainer takes them. `weight` and `label_confidence` count; `strength` and `margin`
            do not.
        model (`str`):
            Hub id or directory of the model that each fold starts from, such as that of the main training, or, with
            `images="none"`, of a smaller text model. One that was trained on these pairs is no fair start.
        args ([`MultimodalRewardConfig`]):
            Configuration of the trainings. Nothing is saved, evaluated or pushed.
        images (`str`, *optional*, defaults to `"blank"`):
            `"blank"`: gray images of the same sizes. `"none"`: no images, and no place for them in the prompt.
        num_folds, seed (`int`, *optional*, default to `2` and `42`):
            Number of folds, and seed of their draw and of the trainings.
        peft_config, quantization_config (*optional*):
            As in [`MultimodalRewardTrainer`].

    Returns:
        `np.ndarray` of shape `(N,)`, float64: for the column `blind_margin`, the same on every process.

    Raises:
        `ValueError`: if the set has fewer groups than folds, if a row cannot be used, or if a margin is not finite.
    """
    if images not in ("blank", "none"):
        raise ValueError(f'`images` is {images!r}; it must be "blank" or "none".')
    if not isinstance(model, str):
        raise TypeError(f"`model` is a {type(model).__name__}; pass its name or directory, to start each fold from.")
    names = dataset.column_names
    group = row_groups(dataset)
    if not 2 <= num_folds <= (num_groups := len(np.unique(group))):
        raise ValueError(f"`num_folds` is {num_folds}; it must be from 2 to {num_groups}, the number of groups.")
    rows = dataset.remove_columns([name for name in _ABOUT_THE_MARGIN if name in names])
    weight, confidence = (_numbers(dataset, name) for name in ("weight", "label_confidence"))
    blind = controls.without_images(rows)
    if images == "blank":
        blind = controls.blank(rows, image_options=image_options(args))
    margins = np.empty(len(dataset))
    for number, (train, test) in enumerate(folds(group, num_folds, seed)):
        trainer = MultimodalRewardTrainer(
            model,
            args=_arguments(args, number, seed),
            train_dataset=blind.select(train),
            eval_dataset=blind.select(test),  # checked here, not after the training
            peft_config=copy.deepcopy(peft_config),
            quantization_config=quantization_config,
        )
        trainer.train()
        size = trainer.args.per_device_eval_batch_size
        rewards = score_with_trainer(trainer, blind.select(test), batch_size=size, desc=f"Blind, fold {number + 1}")
        end_training(trainer)
        del trainer
        release_memory()
        found = rewards[:, 0].astype(np.float64) - rewards[:, 1]
        if not np.isfinite(found).all():
            raise ValueError(f"Rewards of fold {number + 1} are not finite; train it with a lower `learning_rate`.")
        factor = calibration(found, weight[test], confidence[test])
        margins[test] = factor * found
        right = np.average(found > 0, weights=weight[test]) if weight[test].any() else np.nan
        logger.info(f"Blind, fold {number + 1}: {right:.3f} of its pairs are right, margins times {factor:.3g}.")
    return margins


def calibration(margins: np.ndarray, weight: np.ndarray, confidence: np.ndarray) -> float:
    """Fit the factor, >= 0, by which margins `(N,)` are the log odds of labels that are right with a `confidence`."""
    # With Platt's targets, which count a pair of each label more, the factor is finite where all margins are right.
    weight = weight / max(weight.mean(), np.finfo(float).tiny)
    target = confidence + (1 - 2 * confidence) / (len(margins) + 2)

    def slope(factor: float) -> float:
        return float(weight @ (margins * (expit(factor * margins) - target)))

    if slope(0.0) >= 0:
        return 0.0
    high = 1.0
    while slope(high) < 0:
        high *= 2
    return brentq(slope, 0.0, high)


def _numbers(dataset: Dataset, name: str) -> np.ndarray:
    """Read a column as `(N,)` fp64, with 1 where there is none."""
    if name not in dataset.column_names:
        return np.ones(len(dataset))
    return column_of(dataset, name).cast("float64").fill_null(1.0).to_numpy(zero_copy_only=False)


def _arguments(args: MultimodalRewardConfig, number: int, seed: int) -> MultimodalRewardConfig:
    """Return the configuration of a fold's training, of which nothing is kept."""
    own: Any = copy.deepcopy(args)
    own.output_dir = str(Path(cast(str, args.output_dir)) / f"blind-{number}")
    own.seed, own.run_name = seed, f"{args.run_name or Path(cast(str, args.output_dir)).name}-blind-{number}"
    own.loss_type, own.blind_offset, own.blind_weighting = "bt", False, False
    own.eval_strategy, own.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    own.load_best_model_at_end = own.push_to_hub = own.reward_posterior = False
    own.reward_statistics_pairs, own.on_bad_row = 0, "raise"  # a row without a margin is not left out in silence
    return own
