"""What a curation run is made of, out of a configuration file, checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers.integrations import is_deepspeed_zero3_enabled

from ..demo import READER, READER_DIR, TINY
from .round_balance import read_balance
from .round_data import SourceSets
from .round_judges import Judging, read_judging
from .round_settings import Step, read_rounds
from .round_training import RewardTraining


FINALS = ("unbalanced", "base", "uncurated", "curated", "oracle")


@dataclass(frozen=True)
class BaseModel:
    """
    A model to start from.

    Parameters:
        name_or_path (`str`):
            Hub id or directory, or `"tiny-qwen3-vl"`, which is made on the spot, or `"tiny-qwen3-vl-reader"`, which
            ships with the package.
        seed (`int`):
            Seed of its trainings.
    """

    name_or_path: str
    seed: int


@dataclass
class CurationRun:
    """
    All that the stages of a run share.

    Parameters:
        output_dir (`Path`):
            Folder of the run.
        training ([`RewardTraining`]):
            How models are trained.
        models (`Sequence[BaseModel]`):
            Models that score; the first is trained at the end.
        sets ([`SourceSets`]):
            The sets `base`, `pool`, and maybe `test`.
        rounds (`Sequence[Sequence[Step]]`):
            Steps of each round.
        final (`Sequence[str]`):
            What is trained at the end, of [`FINALS`].
        judging ([`Judging`], *optional*):
            Judges.
        balance (`dict`, *optional*):
            How the style of the base is balanced, as [`read_balance`] gives it.
        rows_per_shard (`int`):
            Pairs of a file of scores.
        shard (`tuple[int, int]`):
            Which of several machines this is.
    """

    output_dir: Path
    training: RewardTraining
    models: Sequence[BaseModel]
    sets: SourceSets
    rounds: Sequence[Sequence[Step]]
    final: Sequence[str]
    judging: Judging | None = None
    balance: dict[str, Any] | None = None
    rows_per_shard: int = 4096
    shard: tuple[int, int] = (0, 1)

    def model_dir(self, model: int = 0) -> str:
        """Where a base model is loaded from."""
        one = self.models[model]
        if one.name_or_path == READER:
            return str(READER_DIR)
        return str(self.output_dir / f"base-model/seed-{one.seed}") if one.name_or_path == TINY else one.name_or_path

    def base_stage(self, model: int) -> str | None:
        """The first stage that trains a model on the base alone, if any does."""
        steps = [(number, step) for number, steps in enumerate(self.rounds, 1) for step in steps]
        names = [step_name(number, step) for number, step in steps if step.train_on == "base"]
        return f"{names[0]}/train/model-{model}" if names else None

    def final_stage(self, name: str) -> str:
        """The stage that trains a final model: one that has scored the pool is not trained again."""
        return (self.base_stage(0) if name == "base" else None) or f"final/{name}"


def read_run(
    training: RewardTraining,
    *,
    base: Mapping[str, Any],
    pool: Mapping[str, Any],
    test: Mapping[str, Any] | None = None,
    method: str = "mixture",
    rounds: Sequence[Mapping[str, Any]] | None = None,
    folds: int = 2,
    models: Sequence[Mapping[str, Any]] = ({},),
    default_model: str | None = None,
    judge: Mapping[str, Any] | None = None,
    balance_style: Mapping[str, Any] | bool | None = None,
    final: Sequence[str] = ("curated",),
    rows_per_shard: int = 4096,
    shard: tuple[int, int] = (0, 1),
) -> CurationRun:
    """
    A run out of a configuration file, checked.

    Args:
        training ([`RewardTraining`]):
            How models are trained; its output directory is that of the run.
        base, pool, test (`Mapping`):
            The sets, as in [`read_sets`].
        method, rounds, folds:
            As in [`read_rounds`].
        models (`Sequence[Mapping]`, *optional*):
            Models that score, each with `model_name_or_path` and `seed` where they differ from the configuration's.
        default_model (`str`, *optional*):
            The configuration's model.
        judge (`Mapping`, *optional*):
            As in [`read_judging`].
        balance_style (`Mapping` or `bool`, *optional*):
            As in [`read_balance`].
        final (`Sequence[str]`, *optional*, defaults to `("curated",)`):
            What is trained at the end, of [`FINALS`].
        rows_per_shard, shard:
            As in [`score_in_shards`].

    Returns:
        [`CurationRun`]

    Raises:
        `ValueError`: if a key is not known, or a value is out of range.
    """
    specs = {"base": base, "pool": pool, **({} if test is None else {"test": test})}
    if unknown := [name for name in final if name not in FINALS]:
        raise ValueError(f"`final` names {unknown[0]!r}; choose of {', '.join(FINALS)}.")
    if "unbalanced" in final and not balance_style:
        raise ValueError("`final` names 'unbalanced', but no style is balanced; give `balance_style`, or name 'base'.")
    if training.args.eval_strategy != "no" and test is None:
        raise ValueError("`eval_strategy` needs something to evaluate on; give `test`, or leave it out.")
    if training.args.load_best_model_at_end or training.args.save_strategy == "best":
        raise ValueError("The rounds score with the last weights of a training; leave `load_best_model_at_end` out.")
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "The rounds load a whole model on each GPU to score, which DeepSpeed ZeRO-3 does not allow; launch them "
            "with ZeRO-2, as in recipes/accelerate/deepspeed_zero2.yaml."
        )
    if rows_per_shard < 1:
        raise ValueError(f"`rows_per_shard` is {rows_per_shard}; it must be at least 1.")
    read = list[BaseModel]()
    for one in models:
        if unknown := [key for key in one if key not in ("model_name_or_path", "seed")]:
            raise ValueError(f"A model has the unknown key `{unknown[0]}`; known are model_name_or_path and seed.")
        name = one.get("model_name_or_path", default_model)
        if name is None:
            raise ValueError("No model is named; give `model_name_or_path`.")
        read.append(BaseModel(name, one.get("seed", training.args.seed)))
    if not read or len(set(read)) < len(read):
        raise ValueError("`models` has to name at least one model, and none twice with one seed.")
    run = CurationRun(
        Path(cast(str, training.args.output_dir)),
        training,
        read,
        SourceSets(specs, training.args, lambda: run.model_dir()),
        read_rounds(method, rounds, folds=folds, judge=judge is not None),
        tuple(final),
        None if judge is None else read_judging(judge),
        read_balance(balance_style),
        rows_per_shard,
        shard,
    )
    if "oracle" in final and "is_flipped" not in run.sets.raw("pool").column_names:
        raise ValueError("`final` names 'oracle', but the pool has no column `is_flipped` that tells true labels.")
    return run


def step_name(number: int, step: Step) -> str:
    """How the stages of a step begin."""
    return f"round-{number}" + ("" if step.name is None else f"/{step.name}")
