"""A curation run, read from a configuration file and checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers.integrations import is_deepspeed_zero3_enabled

from ..debias.balance import ONE_SIDED
from ..debias.style import STYLE_FEATURES
from .round_data import Loaders, SourceSets
from .round_judges import Judging, read_judging
from .round_settings import Step, read_rounds
from .round_training import RewardTraining
from .stages import Stage


_BALANCE = {"by": "source", "max_weight": 10.0, "features": None}
FINALS = ("unbalanced", "base", "uncurated", "curated", "oracle")


@dataclass(frozen=True)
class BaseModel:
    """A model to start from, and the seed of its trainings."""

    name_or_path: str
    seed: int
    directory: str | None = field(default=None, compare=False)  # where it lies, if not under its name
    stage: Stage | None = field(default=None, compare=False)  # what makes it, if the run does


@dataclass
class CurationRun:
    """All that the stages of a run share."""

    output_dir: Path
    training: RewardTraining
    models: Sequence[BaseModel]  # that score; the first is trained at the end
    sets: SourceSets  # `base`, `pool`, and maybe `test`
    rounds: Sequence[Sequence[Step]]
    final: Sequence[str]  # of [`FINALS`]
    judging: Judging | None = None
    balance: dict[str, Any] | None = None  # from [`read_balance`]
    rows_per_shard: int = 4096
    shard: tuple[int, int] = (0, 1)  # i of n machines

    def model_dir(self, model: int = 0) -> str:
        """Return where a base model is loaded from."""
        one = self.models[model]
        return str(self.output_dir / one.stage.name) if one.stage is not None else one.directory or one.name_or_path

    def base_stage(self, model: int) -> str | None:
        """Return the first stage that trains a model on the base alone, if any does."""
        steps = [(number, step) for number, steps in enumerate(self.rounds, 1) for step in steps]
        names = [step_name(number, step) for number, step in steps if step.train_on == "base"]
        return f"{names[0]}/train/model-{model}" if names else None

    def final_stage(self, name: str) -> str:
        """Return the stage that trains a final model: one that has scored the pool is not trained again."""
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
    find_model: Callable[[str, int], BaseModel] = BaseModel,
    loaders: Loaders | None = None,
) -> CurationRun:
    """Read a run from the keys of a configuration file; raise a `ValueError` on an unknown key or a bad value.
    `find_model` resolves a name and a seed, and `loaders` load further kinds of sources, as in [`read_sets`]."""
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
        read.append(find_model(name, one.get("seed", training.args.seed)))
    if not read or len(set(read)) < len(read):
        raise ValueError("`models` has to name at least one model, and none twice with one seed.")
    run = CurationRun(
        Path(cast(str, training.args.output_dir)),
        training,
        read,
        SourceSets(specs, training.args, lambda: run.model_dir(), loaders),
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


def read_balance(given: Mapping[str, Any] | bool | None) -> dict[str, Any] | None:
    """Read how style is to be balanced: keys of [`~trl_dt2it.debias.balance_style`], or `True` for the defaults, by
    source and with weights up to 10; `None` if not at all."""
    if given is None or given is False:
        return None
    options = {} if given is True else given
    if not isinstance(options, Mapping):
        raise ValueError(f"`balance_style` is {given!r}; give true, or by, max_weight and features.")
    if unknown := [key for key in options if key not in (*_BALANCE, "one_sided")]:
        raise ValueError(
            f"`balance_style` has the unknown key `{unknown[0]}`; known are {', '.join(_BALANCE)} and one_sided."
        )
    settings = {**_BALANCE, **options}
    if settings["max_weight"] is not None and not settings["max_weight"] > 1:
        raise ValueError(f"`max_weight` of `balance_style` is {settings['max_weight']}; give a number above 1.")
    if settings.get("one_sided", "leave") not in ONE_SIDED:
        known = ", ".join(ONE_SIDED)
        raise ValueError(f"`one_sided` of `balance_style` is {settings['one_sided']!r}; give one of {known}.")
    if unknown := [name for name in settings["features"] or () if name not in STYLE_FEATURES]:
        known = ", ".join(STYLE_FEATURES)
        raise ValueError(f"`balance_style` names the feature {unknown[0]!r}; known are {known}.")
    return settings


def step_name(number: int, step: Step) -> str:
    """Return how the names of a step's stages begin."""
    return f"round-{number}" + ("" if step.name is None else f"/{step.name}")
