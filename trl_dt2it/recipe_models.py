"""What recipes have in common about models: a reward model that scores, as their command lines name it, a tiny model
made on the spot, and the processes that share the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState

from .demo import READER, READER_DIR, TINY
from .models.shared_prefix import usable_attention
from .utils import main_process_first, on_main_process, whole_weights


if TYPE_CHECKING:
    from trl import GRPOConfig, ModelConfig, RewardConfig

    from .curation.rounds.config import BaseModel
    from .scoring.scorer import RewardScorer


@dataclass
class ScorerArguments:
    """
    Which reward model a recipe scores with.

    Parameters:
        model (`str`):
            Directory or Hub id of a reward model or of an adapter.
        dtype (`str`, *optional*):
            Dtype of the weights; by default the checkpoint's.
        attn_implementation (`str`, *optional*):
            Attention implementation, such as `flash_attention_2`.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens of a batch.
        num_workers (`int`, *optional*, defaults to `0`):
            Worker processes that count tokens and decode images while the model computes, for each process.
        revision (`str`, *optional*):
            Branch, tag or commit of a model on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that ships with the checkpoint may run.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to say only what would be read and written.
    """

    model: str | None = field(default=None, metadata={"help": "Directory or Hub id of a reward model."})
    dtype: str | None = field(default=None, metadata={"help": "Dtype of the weights."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    batch_tokens: int = field(default=16384, metadata={"help": "Most tokens of a batch."})
    num_workers: int = field(default=0, metadata={"help": "Worker processes that decode images."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the checkpoint may run."})
    dry_run: bool = field(default=False, metadata={"help": "Say only what would be read and written."})

    def named_model(self) -> str:
        """`model`, or a `ValueError` where there is none."""
        if self.model is None:
            raise ValueError("Give `model`, the directory or Hub id of a reward model.")
        return self.model

    def load(self, **options: Any) -> RewardScorer:
        """
        The reward model.

        Args:
            options:
                Other arguments of [`RewardScorer.from_pretrained`], such as `image_options`.

        Returns:
            [`RewardScorer`]
        """
        from .scoring.scorer import RewardScorer  # heavy, and not needed for `--help`

        return RewardScorer.from_pretrained(
            self.named_model(),
            dtype=self.dtype,
            attn_implementation=usable_attention(self.attn_implementation),
            batch_tokens=self.batch_tokens,
            num_workers=self.num_workers,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            **options,
        )


def share_work() -> PartialState:
    """The processes that a launcher has started, also where there is no accelerator: there each would think, unless
    told otherwise, that it is the only one. A recipe calls it before anything asks for a `PartialState`."""
    return PartialState(cpu=not torch.accelerator.is_available())


def with_tiny(name: str, output_dir: str | Path, seed: int, *, keep: bool = False) -> str:
    """
    The model that a recipe starts from; every process has to call it.

    Args:
        name (`str`):
            Hub id or directory, or `tiny-qwen3-vl` for one that is made in `output_dir`, or `tiny-qwen3-vl-reader` for
            the one that ships with the package.
        output_dir (`str` or `Path`):
            Folder of the recipe's results.
        seed (`int`):
            Seed of the weights of the one that is made.
        keep (`bool`, *optional*, defaults to `False`):
            Whether one that is there already stays as it is.

    Returns:
        `str`: Hub id or directory.
    """
    if name == READER:
        return str(READER_DIR)
    if name != TINY:
        return name
    from .demo.tiny import build_tiny_vlm

    base = Path(output_dir) / "_base"
    with main_process_first():
        # The processor's file is written last. On other machines it is there if they share the folder.
        is_there = (base / "processor_config.json").is_file()
        if not is_there or (PartialState().is_main_process and not keep):
            with whole_weights():
                build_tiny_vlm(base, seed=seed)
    return str(base)


def find_base_model(name: str, seed: int, *, sets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> BaseModel:
    """The model that a run of rounds on these sets starts from; names of tiny models are as in [`with_tiny`]."""
    from .curation.rounds.config import BaseModel  # heavy, and not needed for `--help`
    from .curation.rounds.stages import Stage
    from .demo.sets import texts_of
    from .demo.tiny import build_tiny_vlm

    if name != TINY:
        return BaseModel(name, seed, str(READER_DIR) if name == READER else None)
    texts = texts_of(sets)

    def build(folder: Path) -> dict[str, Any]:
        on_main_process(lambda: build_tiny_vlm(folder, seed=seed, extra_texts=texts))
        return {"seed": seed}

    stage = Stage(f"base-model/seed-{seed}", build, {"model": TINY, "seed": seed, "texts": texts})
    return BaseModel(name, seed, stage=stage)


def init_kwargs(model_args: ModelConfig, training_args: RewardConfig | GRPOConfig) -> dict[str, Any]:
    """How the model to train is loaded: as TRL's model arguments say, but `model_init_kwargs` has the last word.
    An attention implementation that cannot run on this machine gives way to one that can."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": usable_attention(model_args.attn_implementation),
        "dtype": model_args.dtype,
        **(cast("dict[str, Any] | None", training_args.model_init_kwargs) or {}),  # resolved by `__post_init__`
    }
