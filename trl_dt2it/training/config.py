"""Configuration of [`MultimodalRewardTrainer`]: TRL's [`~trl.RewardConfig`] and what images and strengths need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from transformers.trainer_pt_utils import AcceleratorConfig
from trl import RewardConfig

from .losses import LOSSES, STRENGTH_NORMALIZATIONS, loss_name


BAD_ROW_CHOICES = ("raise", "quarantine")

IMAGE_CHECKS = ("full", "header", "none")

SHARE_PREFIX_CHOICES = ("auto", "true", "false")


@dataclass
class MultimodalRewardConfig(RewardConfig):
    r"""
    Configuration class for the [`MultimodalRewardTrainer`].

    This class includes only the parameters that [`~trl.RewardConfig`] does not have, or for which it has another
    default.

    Parameters:
        > Parameters that control the model

        freeze_vision_tower (`bool`, *optional*, defaults to `False`):
            Whether to train everything but the vision tower. With a PEFT configuration, whether to keep adapters out
            of it.
        freeze_projector (`bool`, *optional*, defaults to `False`):
            The same for the modules between the vision tower and the language model.
        share_prefix (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether the prompt and its images stand once in front of both answers, which gives the same rewards and
            gradients as two rows per pair in up to half the time: `"auto"` does so for the families for which it is
            proven (`docs/models.md`), `True` raises an error for the others, `False` always makes two rows.

        > Parameters that control the data preprocessing

        min_pixels (`int`, *optional*):
            Smallest number of pixels to which the processor scales an image. Kept in the saved processor, so that
            training and serving see the same image. Only for processors with pixel limits (the Qwen-VL and GLM-4V
            families).
        max_pixels (`int`, *optional*):
            Largest such number.
        max_length (`int` or `None`, *optional*, defaults to `None`):
            Pairs of which one side is longer than this, image tokens included, are dropped, and counted on screen.
            Nothing is ever truncated. `None` keeps all pairs and spares the pass over the data.
        image_root (`str`, *optional*):
            Folder that relative image paths start from. With it, no image outside of the folder is read.
        max_image_pixels (`int`, *optional*, defaults to `67108864`):
            An image that claims more pixels than this is refused before it is decoded.
        allowed_image_hosts (`list[str]`, *optional*):
            Hosts from which images may be fetched by URL. By default no URL is.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            What to do with a row that cannot be trained on: `"raise"` an error that names the row and the reason, at
            start, or `"quarantine"`: take it out, count it on screen by reason, and write it with its reason to
            `_quarantine_<set>.jsonl` in the output directory (never uploaded).
        image_check (`str`, *optional*, defaults to `"header"`):
            What is checked of the images at start: the `"header"` (type, size, place; some 10,000 images a second),
            the `"full"` image (decoded, as in training), or `"none"`.

        > Parameters that control the loss

        loss_type (`str` or `Callable`, *optional*, defaults to `"auto"`):
            `"bt"` (Bradley-Terry), `"margin"` (Llama 2), `"scaled"` (HelpSteer2-Preference), `"strength_margin"`
            (both), `"soft"` (label smoothing, or judges' vote share), `"btt"` (ties, Rao-Kupper) or `"ordinal"`.
            `"auto"` is `"strength_margin"` where the training set has a `strength` column and `"bt"` where it has
            none. A function `(delta, batch, config)` gives the loss of each pair, and is recorded by its name. The
            formulas, and what a function receives, stand in [`trl_dt2it.training.losses`].
        strength_normalization (`str`, *optional*, defaults to `"rank"`):
            How the `strength` column is brought to [0, 1], per `source`: `"rank"`, `"quantile"` or `"none"`. A
            streamed set needs `"none"`.
        neutral_strength (`float`, *optional*, defaults to `0.5`):
            Normalised strength, in [0, 1], of a pair whose strength is unknown.
        margin_scale (`float`, *optional*, defaults to `1.0`):
            Margin of a pair of strength 1, in units of reward, >= 0.
        strength_power (`float`, *optional*, defaults to `1.0`):
            Exponent of the strength in the weight of a pair, >= 0.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            For `"soft"`: share of the target that is spread over both answers, in [0, 1).
        tie_factor (`float`, *optional*, defaults to `5.0`):
            For `"btt"`: Rao and Kupper's k, > 1. Pairs of strength 0 are ties.
        ordinal_thresholds (`list[float]`, *optional*, defaults to `[1.0, 2.0, 3.0]`):
            For `"ordinal"`: increasing positive cut points between the levels of strength, in units of reward.

        > Parameters that control the training

        max_tokens_per_batch (`int`, *optional*):
            Packs each batch of a process with as many pairs as have at most this many tokens together, image tokens
            included; training then does not read `per_device_train_batch_size`, nor does it take another
            `train_sampling_strategy` than `"random"`. With one row per pair, a pair counts its prompt once and both
            answers; with two, the padding counts too. A pair that has more alone gets a batch of its own; such pairs
            are counted on screen. Every pair comes once an epoch, and every process has as many batches. The blank
            image that keeps several processes in step is not counted. Where the set has the column
            `length_column_name`, it is taken for the numbers of tokens.
        reward_statistics_pairs (`int`, *optional*, defaults to `1000`):
            At the end of training so many pairs of the training set, drawn with the seed, are scored by the final
            model, and the mean and the standard deviation of their rewards are written into its configuration, as
            `reward_mean` and `reward_std`, for `RewardScorer(..., normalize=True)`. With 1000 pairs the mean is known
            to some 3% of the standard deviation. A smaller set is scored whole; of a streamed one the first pairs
            are, no more than training read. `0` scores none and writes nothing. Checkpoints of a training that goes
            on have no such values.

    > [!NOTE]
    > `max_length` defaults to `None` instead of [`~trl.RewardConfig`]'s `1024`, which one image often exceeds.
    """

    _VALID_DICT_FIELDS = RewardConfig._VALID_DICT_FIELDS

    # Parameters that control the model
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Train everything but the vision tower."})
    freeze_projector: bool = field(
        default=False, metadata={"help": "Train everything but the modules between vision tower and language model."}
    )

    share_prefix: str = field(
        default="auto",
        metadata={
            "help": "Whether the prompt and its images stand once in front of both answers.",
            "choices": list(SHARE_PREFIX_CHOICES),
        },
    )

    # Parameters that control the data preprocessing
    min_pixels: int | None = field(
        default=None, metadata={"help": "Smallest number of pixels to which the processor scales an image."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Largest number of pixels to which the processor scales an image."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Pairs of which one side is longer, image tokens included, are dropped and counted."},
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that relative image paths start from; no image outside of it is read."},
    )
    max_image_pixels: int = field(
        default=64 * 1024 * 1024,
        metadata={"help": "An image that claims more pixels than this is refused before it is decoded."},
    )
    allowed_image_hosts: list[str] | None = field(
        default=None, metadata={"help": "Hosts from which images may be fetched by URL. By default no URL is."}
    )
    on_bad_row: str = field(
        default="raise",
        metadata={"help": "What to do with a row that cannot be trained on.", "choices": list(BAD_ROW_CHOICES)},
    )
    image_check: str = field(
        default="header",
        metadata={"help": "What is checked of the images at start.", "choices": list(IMAGE_CHECKS)},
    )

    # Parameters that control the loss
    loss_type: str = field(  # a function too, of which a command line knows nothing
        default="auto",
        metadata={
            "help": "Loss of a pair. `auto` is `strength_margin` with a `strength` column and `bt` without.",
            "choices": ["auto", *LOSSES],
        },
    )
    strength_normalization: str = field(
        default="rank",
        metadata={
            "help": "How the `strength` column is brought to [0, 1], per source.",
            "choices": list(STRENGTH_NORMALIZATIONS),
        },
    )
    neutral_strength: float = field(
        default=0.5, metadata={"help": "Normalised strength of a pair whose strength is unknown."}
    )
    margin_scale: float = field(default=1.0, metadata={"help": "Margin of a pair of strength 1, in units of reward."})
    strength_power: float = field(default=1.0, metadata={"help": "Exponent of the strength in the weight of a pair."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "For `soft`: share of the target that is spread over both answers."}
    )
    tie_factor: float = field(default=5.0, metadata={"help": "For `btt`: Rao and Kupper's k, greater than 1."})
    ordinal_thresholds: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0],
        metadata={"help": "For `ordinal`: increasing positive cut points between the levels of strength."},
    )

    # Parameters that control the training
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Packs each batch with as many pairs as have at most this many tokens together."},
    )
    reward_statistics_pairs: int = field(
        default=1000,
        metadata={"help": "Training pairs to score at the end, for `reward_mean` and `reward_std`; 0 for none."},
    )

    def __post_init__(self) -> None:
        self.share_prefix = str(self.share_prefix).lower()  # YAML and Python give booleans, a command line strings
        # The YAML parser checks neither choices nor ranges, so a wrong value would pass in silence.
        for name, spec in self.__dataclass_fields__.items():
            if spec.metadata.get("choices") and name in MultimodalRewardConfig.__annotations__:
                value = getattr(self, name)
                if name != "loss_type" or not callable(value):
                    _check_choice(name, value, spec.metadata["choices"])
        _check_range("neutral_strength", self.neutral_strength, 0 <= self.neutral_strength <= 1, "in [0, 1]")
        _check_range("margin_scale", self.margin_scale, self.margin_scale >= 0, ">= 0")
        _check_range("strength_power", self.strength_power, self.strength_power >= 0, ">= 0")
        _check_range("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")
        _check_range("tie_factor", self.tie_factor, self.tie_factor > 1, "> 1")
        pairs = self.reward_statistics_pairs
        _check_range("reward_statistics_pairs", pairs, pairs >= 0, ">= 0")
        cuts = [0.0, *self.ordinal_thresholds]
        rising = all(low < high for low, high in zip(cuts, cuts[1:], strict=False))
        _check_range(
            "ordinal_thresholds", self.ordinal_thresholds, rising and len(cuts) > 1, "positive and increasing"
        )
        if self.min_pixels is not None and self.max_pixels is not None:
            _check_range("min_pixels", self.min_pixels, self.min_pixels <= self.max_pixels, "<= max_pixels")
        if self.max_tokens_per_batch is not None:
            _check_range("max_tokens_per_batch", self.max_tokens_per_batch, self.max_tokens_per_batch > 0, "> 0")
        super().__post_init__()
        if self.max_tokens_per_batch is not None:
            self._check_packing()

    def to_dict(self) -> dict[str, Any]:
        """As in [`~trl.RewardConfig`], with a loss that is a function by its name."""
        return {**super().to_dict(), "loss_type": loss_name(self.loss_type)}

    def _check_packing(self) -> None:
        """Packing decides what is in a batch, so what decides the same thing otherwise would have no effect."""
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


def _check_choice(name: str, value: Any, choices: list[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(choices)}.")


def _check_range(name: str, value: Any, is_fine: bool, condition: str) -> None:
    if not is_fine:
        raise ValueError(f"`{name}` is {value!r}; it must be {condition}.")
