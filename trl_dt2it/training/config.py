"""Configuration of [`MultimodalRewardTrainer`]: TRL's [`~trl.RewardConfig`] with options for images and strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias, cast

from transformers.trainer_pt_utils import AcceleratorConfig
from trl import RewardConfig

from .losses import LISTWISE, LOSSES, STRENGTH_NORMALIZATIONS, loss_name


Trainer: TypeAlias = Any  # [`MultimodalRewardTrainer`], in modules that it imports


_SWITCH = ("auto", "true", "false")


def _option(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    """Make a field with the text and the choices that a command line shows."""
    return field(default=default, metadata={"help": text, **({"choices": list(choices)} if choices else {})})


@dataclass
class MultimodalRewardConfig(RewardConfig):
    r"""
    Configuration class for the [`MultimodalRewardTrainer`].

    This class includes only the parameters that [`~trl.RewardConfig`] lacks or gives another default.

    Parameters:
        > Parameters that control the model

        freeze_vision_tower, freeze_projector (`bool`, *optional*, defaults to `False`):
            Whether to freeze the vision tower, or the modules between it and the language model, and, with a PEFT
            configuration, keep adapters out of it.
        share_prefix (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether to lay out a pair as one row, the prompt and its images once in front of both answers, with the
            rewards and gradients of two rows: `"auto"` does so for the families for which it is proven
            (`docs/models.md`), `True` raises an error for the others, `False` always makes two rows.

        > Parameters that control the data preprocessing

        min_pixels, max_pixels (`int`, *optional*):
            Fewest and most pixels to which the processor scales an image, saved with it. Only for processors with
            pixel limits (the Qwen-VL and GLM-4V families).
        max_length (`int` or `None`, *optional*, defaults to `None`):
            Maximum number of tokens of a conversation, image tokens included. Longer pairs are dropped and counted;
            nothing is truncated. One image often exceeds TRL's 1024.
        image_root (`str`, *optional*):
            Folder of relative image paths. With it, no image outside of the folder is read.
        max_image_pixels (`int`, *optional*, defaults to `67108864`):
            Most pixels that an image may claim before it is decoded.
        allowed_image_hosts (`list[str]`, *optional*):
            Hosts from which images may be fetched by URL. By default no URL is fetched.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            Treatment of a row that cannot be trained on: `"raise"` an error at start that names it and the reason, or
            `"quarantine"` it: drop it and list it in `_quarantine_<set>.jsonl` in the output directory.
        image_check (`str`, *optional*, defaults to `"header"`):
            Check of the images at start: of the `"header"` (type, size, location), of the `"full"` image, or `"none"`.

        > Parameters that control the loss

        loss_type (`str` or `Callable`, *optional*, defaults to `"auto"`):
            `"bt"` (Bradley-Terry), `"margin"` (Llama 2), `"scaled"` (HelpSteer2-Preference), `"strength_margin"`
            (both), `"soft"` (label smoothing, or judges' vote share), `"gce"` (bounded, for wrong labels), `"btt"`
            (ties, Rao-Kupper), `"ordinal"` or `"plackett_luce"` (of all answers of a prompt in the batch, ListMLE).
            `"auto"` is `"strength_margin"` if the training set has a `strength` column and `"bt"` otherwise. See
            [`trl_dt2it.training.losses`] for the formulas, and for a function `(delta, batch, config)` of your own.
        strength_normalization (`str`, *optional*, defaults to `"rank"`):
            Map of `strength` to [0, 1], per `source`: `"rank"`, `"quantile"`, or `"none"`, which a stream needs.
        neutral_strength (`float`, *optional*, defaults to `0.5`):
            Normalized strength, in [0, 1], of a pair of unknown strength.
        margin_scale (`float`, *optional*, defaults to `1.0`):
            Margin of a pair of strength 1, in units of reward, >= 0.
        strength_power (`float`, *optional*, defaults to `1.0`):
            Exponent of the strength in the weight of a pair, >= 0.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            For `"soft"`: share of the target that is spread over both answers, in [0, 1).
        gce_q (`float`, *optional*, defaults to `0.7`):
            For `"gce"`: q of the generalized cross-entropy, in (0, 1]. The loss of a pair is at most 1 / q; near 0 it
            is Bradley-Terry's, and with 1 the probability of the rejected answer.
        tie_factor (`float`, *optional*, defaults to `5.0`):
            For `"btt"`: Rao and Kupper's k, > 1. Pairs of strength 0 are ties.
        ordinal_thresholds (`list[float]`, *optional*, defaults to `[1.0, 2.0, 3.0]`):
            For `"ordinal"`: increasing positive cut points between the levels of strength, in units of reward.
        blind_offset, blind_weighting (`bool`, *optional*, defaults to `False`):
            What to make of the column `blind_margin` of the train set, so that the model does not learn what can be
            had without looking at the image. `blind_offset` adds it to the reward margin that the loss sees, so that
            the model learns the rest. `blind_weighting` multiplies the loss of a pair by l_blind / (l_blind + l), as
            in arXiv 2503.03122. See [`trl_dt2it.training.losses`].
        blind_model (`str`, *optional*):
            Hub id or directory of a model that is trained beside the main one, as in arXiv 2503.03122: on the same
            batches without their images, with the loss `bt`, from this start. Its margins before each step take the
            place of the column, for `blind_offset` or `blind_weighting`; a pair without an image has none. Every
            process holds it and its optimizer whole and in fp32, 16 bytes a parameter.

        > Parameters that control the training

        group_pairs (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"true"` or `"false"`: whether pairs that have prompt and images in common (by content, and only
            within a `group_id`) are read together in a batch: each of their answers once, behind the prompt that they
            share; where the family has no `share_prefix`, in a row each, with their images encoded once. With
            `train_sampling_strategy` `"random"` and `"group_by_length"` they are brought into one batch, also in
            batches by tokens of families that share; otherwise those share that happen to be in one.
        max_answers_per_group (`int`, *optional*, defaults to `16`):
            Most answers of a prompt that share it, at least 2.
        max_tokens_per_batch (`int`, *optional*):
            Most tokens of a process's batch, image tokens included, in place of `per_device_train_batch_size`; needs
            `train_sampling_strategy="random"`. One row per pair counts its prompt once, two rows count their padding
            too. A longer pair gets a batch of its own. Every pair comes once per epoch, and all processes have equally
            many batches. A column `length_column_name` of the set is taken for the numbers of tokens.
        reward_statistics_pairs (`int`, *optional*, defaults to `1000`):
            Number of training pairs, drawn with the seed (from the start of a streamed set), that the final model
            scores. The mean and standard deviation of their rewards are saved in its configuration, as `reward_mean`
            and `reward_std`, for `RewardScorer(..., normalize=True)`; checkpoints have none. `0` scores none.
        reward_posterior (`bool`, *optional*, defaults to `False`):
            Whether the final model scores all training pairs once more, to save beside it the posterior of its head
            from which `RewardScorer.score(..., return_std=True)` takes standard deviations; not of a streamed set.
    """

    # Parameters that control the model
    freeze_vision_tower: bool = _option(False, "Train everything but the vision tower.")
    freeze_projector: bool = _option(False, "Train all but the modules between vision tower and language model.")
    share_prefix: str = _option("auto", "Lay out a pair as one row, its prompt once.", _SWITCH)

    # Parameters that control the data preprocessing
    min_pixels: int | None = _option(None, "Fewest pixels to which the processor scales an image.")
    max_pixels: int | None = _option(None, "Most pixels to which the processor scales an image.")
    max_length: int | None = _option(None, "Most tokens of a conversation; longer pairs are dropped and counted.")
    image_root: str | None = _option(None, "Folder of relative image paths; no image outside of it is read.")
    max_image_pixels: int = _option(64 * 1024 * 1024, "Most pixels that an image may claim before it is decoded.")
    allowed_image_hosts: list[str] | None = _option(None, "Hosts to fetch images from by URL. By default none.")
    on_bad_row: str = _option("raise", "Treatment of a row that cannot be trained on.", ("raise", "quarantine"))
    image_check: str = _option("header", "Check of the images at start.", ("full", "header", "none"))

    # Parameters that control the loss
    # Or, outside of the command line, a function.
    loss_type: str = _option("auto", "Loss; `auto`: `strength_margin` with strengths, else `bt`.", ("auto", *LOSSES))
    strength_normalization: str = _option("rank", "Map of `strength` to [0, 1], per source.", STRENGTH_NORMALIZATIONS)
    neutral_strength: float = _option(0.5, "Normalized strength of a pair of unknown strength.")
    margin_scale: float = _option(1.0, "Margin of a pair of strength 1, in units of reward.")
    strength_power: float = _option(1.0, "Exponent of the strength in the weight of a pair.")
    label_smoothing: float = _option(0.0, "For `soft`: share of the target that is spread over both answers.")
    gce_q: float = _option(0.7, "For `gce`: 1 is the most robust to wrong labels, near 0 is `bt`.")
    tie_factor: float = _option(5.0, "For `btt`: Rao and Kupper's k, greater than 1.")
    ordinal_thresholds: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0],
        metadata={"help": "For `ordinal`: increasing positive cut points between the levels of strength."},
    )
    blind_offset: bool = _option(False, "Learn what a model without the image does not know (`blind_margin`).")
    blind_weighting: bool = _option(False, "Count pairs less that a model tells without their image (`blind_margin`).")

    blind_model: str | None = _option(None, "Model to train beside without images, whose margins are `blind_margin`.")

    # Parameters that control the training
    group_pairs: str = _option("auto", "Read a prompt and its answers once for all of its pairs.", _SWITCH)
    max_answers_per_group: int = _option(16, "Most answers of a prompt that share it.")
    max_tokens_per_batch: int | None = _option(None, "Most tokens of a batch, packed with as many pairs as fit.")
    reward_statistics_pairs: int = _option(1000, "Pairs to score for `reward_mean` and `reward_std`; 0 for none.")
    reward_posterior: bool = _option(False, "Save what standard deviations of rewards are computed from.")

    def __post_init__(self) -> None:
        for name in ("share_prefix", "group_pairs"):  # YAML and Python pass booleans, a command line strings
            setattr(self, name, str(getattr(self, name)).lower())
        # The YAML parser checks neither choices nor ranges, so a wrong value would pass silently.
        for name, spec in self.__dataclass_fields__.items():
            choices, value = spec.metadata.get("choices"), getattr(self, name)
            if choices and name in MultimodalRewardConfig.__annotations__ and value not in choices:
                if name != "loss_type" or not callable(value):
                    raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(choices)}.")
        cuts, least, most = [0.0, *self.ordinal_thresholds], self.min_pixels, self.max_pixels
        is_rising = all(low < high for low, high in pairwise(cuts))
        ranges = {
            "neutral_strength": (0 <= self.neutral_strength <= 1, "in [0, 1]"),
            "margin_scale": (self.margin_scale >= 0, ">= 0"),
            "strength_power": (self.strength_power >= 0, ">= 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "gce_q": (0 < self.gce_q <= 1, "in (0, 1]"),
            "tie_factor": (self.tie_factor > 1, "> 1"),
            "max_answers_per_group": (self.max_answers_per_group >= 2, ">= 2"),
            "reward_statistics_pairs": (self.reward_statistics_pairs >= 0, ">= 0"),
            "ordinal_thresholds": (is_rising and len(cuts) > 1, "positive and increasing"),
            "min_pixels": (least is None or most is None or least <= most, "<= max_pixels"),
            "max_tokens_per_batch": (self.max_tokens_per_batch is None or self.max_tokens_per_batch > 0, "> 0"),
            "group_pairs": (
                self.loss_type not in LISTWISE or self.group_pairs != "false",
                f'"auto" or "true" with `loss_type="{self.loss_type}"`, which ranks the answers of a prompt',
            ),
            "blind_weighting": (not (self.blind_weighting and self.blind_offset), "False with `blind_offset`"),
        }
        if self.blind_model is not None:
            ranges |= {
                "blind_model": (
                    self.blind_weighting or self.blind_offset,
                    "None without those settings, which use it",
                ),
                "reward_posterior": (not self.reward_posterior, "False with `blind_model`, which knows no final loss"),
                "fp16": (not self.fp16, "False with `blind_model`; train in bf16 or fp32"),
            }
        for name, (is_within, condition) in ranges.items():
            if not is_within:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be {condition}.")
        super().__post_init__()
        if self.max_tokens_per_batch is None:
            return
        # Packing would override these settings.
        accelerator = cast(AcceleratorConfig, self.accelerator_config)  # `__post_init__` has resolved it
        parallel = self.parallelism_config
        conflicts = {
            f'train_sampling_strategy="{self.train_sampling_strategy}"': self.train_sampling_strategy != "random",
            "auto_find_batch_size": self.auto_find_batch_size,
            "dataloader_drop_last": self.dataloader_drop_last,
            "split_batches": accelerator.split_batches,
            "dispatch_batches": accelerator.dispatch_batches,
            "parallelism_config": parallel is not None and parallel.non_data_parallel_size > 1,
        }
        for name, is_set in conflicts.items():
            if is_set:
                raise ValueError(f"`max_tokens_per_batch` and `{name}` exclude each other; leave one of them out.")

    def to_dict(self) -> dict[str, Any]:
        """As in [`~trl.RewardConfig`], with the name of a loss that is a function."""
        return {**super().to_dict(), "loss_type": loss_name(self.loss_type)}
