"""The paper's recipe as a list of stages: train, score what the model has not seen, decide, ask judges, train anew.

The list is a pure function of the settings and the data ([`plan_rounds`]); [`run_stages`] does what is not done yet.
Every training starts from the base model, on the constructed data and on what the ledger makes of the noisy pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from ..scoring.shards import score_in_shards
from ..training.setup import image_options
from ..utils import on_main_process
from .curation_run import CurationRun, step_name
from .ledger import CurationLedger
from .round_balance import STAGE as BALANCE
from .round_balance import balance_base
from .round_judges import Judging
from .round_report import accuracy
from .round_sets import corrections, fold_rows, training_set
from .round_settings import Step
from .round_steps import ask_judges, decide_step, ledger_stage
from .round_tracking import report_decision
from .round_training import scorer, train_model
from .stages import Stage


@dataclass
class _Plan:
    """The stages so far, and what the ledger has been told by them."""

    run: CurationRun
    stages: list[Stage] = field(default_factory=list)
    entries: list[tuple[int, str]] = field(default_factory=list)  # round and stage of what the ledger holds
    decided: tuple[str, ...] = ()  # the last stage that wrote into it


def plan_rounds(run: CurationRun) -> list[Stage]:
    """
    What a run consists of.

    Args:
        run ([`CurationRun`]):
            The run.

    Returns:
        `list[Stage]`: for [`run_stages`] and [`show_plan`].
    """
    plan = _Plan(run)
    plan.stages += [one.stage for one in run.models if one.stage is not None]
    if run.balance is not None:
        settings = {"base": run.sets.digest("base"), **run.balance}
        expected = {"pairs": len(run.sets.raw("base"))}
        plan.stages.append(Stage(BALANCE, partial(balance_base, run), settings, expected=expected))
    for number, steps in enumerate(run.rounds, 1):
        for step in steps:
            _plan_step(plan, number, step)
    for name in run.final:
        stage = run.final_stage(name)
        if stage not in [one.name for one in plan.stages]:
            _plan_training(plan, stage, 0, name)
        if "test" in run.sets.specs:
            _plan_scoring(plan, f"test/{name}", stage, "test")
    return plan.stages


def _plan_step(plan: _Plan, number: int, step: Step) -> None:
    run, label = plan.run, step_name(number, step)
    folds = cast(int, step.folds) if step.train_on == "current" else 1
    scored: list[list[str]] = []
    for model in range(len(run.models)):
        scored.append([])
        for fold in range(folds):
            name = f"model-{model}" + (f"-fold-{fold}" if folds > 1 else "")
            part = (fold, folds) if folds > 1 else None
            is_base = step.train_on == "base"
            trained = cast(str, run.base_stage(model)) if is_base else f"{label}/train/{name}"
            # On the base alone, each model is trained once, whatever steps it scores in.
            if trained not in [one.name for one in plan.stages]:
                _plan_training(plan, trained, model, "base" if is_base else "curated", part)
            _plan_scoring(plan, f"{label}/score/{name}", trained, "pool", part)
            scored[-1].append(f"{label}/score/{name}")
    count = len(run.sets.raw("pool"))
    before, inputs = tuple(plan.entries), tuple(name for names in scored for name in names)
    decide = partial(decide_step, run, number=number, step=step, scored=scored, before=before)
    stage = Stage(f"{label}/decide", decide, step.settings(), (*inputs, *plan.decided), {"pairs": count})
    _plan_decision(plan, number, step, stage, "decide")
    if step.judge:
        from .judging import most_judging_cost  # needs the judge's extra

        judging = cast(Judging, run.judging)
        most = most_judging_cost(run.sets.raw("pool"), judging.endpoints, image_options=image_options(run.sets.args))
        expected = {"pairs": count, "calls": most.calls, "USD": most.cost}
        ask = partial(ask_judges, run, number=number, step=step, before=tuple(plan.entries))
        stage = Stage(f"{label}/judge", ask, judging.settings(), plan.decided, expected)
        _plan_decision(plan, number, step, stage, "judge")


def _plan_decision(plan: _Plan, number: int, step: Step, stage: Stage, kind: str) -> None:
    plan.entries.append((number, ledger_stage(step, kind)))
    place = len(plan.entries)

    def decide(folder: Path) -> Mapping[str, Any]:
        counts = cast("Mapping[str, Any]", stage.run(folder))
        on_main_process(lambda: report_decision(plan.run, place, counts))
        return counts

    plan.stages.append(replace(stage, run=decide, is_replayed=True))
    plan.decided = (stage.name,)


def _plan_training(plan: _Plan, name: str, model: int, kind: str, fold: tuple[int, int] | None = None) -> None:
    """A training on the base and the pool as `kind` says, without one of the folds of the pool."""
    run, base = plan.run, plan.run.models[model]
    inputs: tuple[str, ...] = () if base.stage is None else (base.stage.name,)
    if run.balance is not None and kind != "unbalanced":
        inputs += (BALANCE,)
    settings: dict[str, Any] = {
        "training": run.training.settings(),
        "model": {"name_or_path": base.name_or_path, "seed": base.seed},
        "base": run.sets.digest("base"),
        "kind": kind,
    }
    if base.stage is None:
        settings["files"] = _files_of(run.model_dir(model))
    pairs = len(run.sets.raw("base"))
    if kind not in ("unbalanced", "base"):
        settings |= {"pool": run.sets.digest("pool"), "fold": fold}
        pairs += round(len(run.sets.raw("pool")) * (1 if fold is None else 1 - 1 / fold[1]))
    entries = tuple(plan.entries) if kind == "curated" else ()
    # After a person has looked at the report, the final model is trained anew; the rounds are not repeated.
    if name == "final/curated" and (by_hand := corrections(run)):
        settings["corrections"] = by_hand

    def train(folder: Path) -> dict[str, Any]:
        return train_model(
            folder,
            training_set(run, kind, fold=fold, entries=entries),
            run.training,
            model=run.model_dir(model),
            seed=base.seed,
            eval_dataset=run.sets.usable("test") if "test" in run.sets.specs else None,
            push_to_hub=name == "final/curated",
            audit_style=name.startswith("final/"),
            ledger=CurationLedger(run.output_dir / "ledger") if name == "final/curated" else None,
        )

    expected = {"pairs": pairs, "steps": run.training.num_steps(pairs)}
    plan.stages.append(Stage(name, train, settings, (*inputs, *(plan.decided if entries else ())), expected))


def _plan_scoring(plan: _Plan, name: str, trained: str, set_name: str, fold: tuple[int, int] | None = None) -> None:
    """A scoring of a set, or of one fold of it, by the model of a training."""
    run, count = plan.run, len(plan.run.sets.raw(set_name))

    def score(folder: Path) -> dict[str, Any] | None:
        rows = run.sets.usable(set_name)
        with scorer(run.output_dir / trained, run.training) as rewards:
            counts = score_in_shards(
                folder,
                rows,
                rewards,
                pair_ids=run.sets.names(set_name),
                rows=None if fold is None else fold_rows(run, fold, inside=True),
                rows_per_shard=run.rows_per_shard,
                shard=run.shard,
            )
        return {**counts, **accuracy(folder, rows)} if counts and set_name == "test" else counts

    settings = {set_name: run.sets.digest(set_name), "fold": fold, "rows_per_shard": run.rows_per_shard}
    expected = {"pairs": count if fold is None else round(count / fold[1])}
    plan.stages.append(Stage(name, score, settings, (trained,), expected, is_shared=True))


def _files_of(name_or_path: str) -> list[Any]:
    """Names and sizes of the files of a model on disk, which may change under its name."""
    folder = Path(name_or_path)
    return sorted((file.name, file.stat().st_size) for file in folder.glob("*.*")) if folder.is_dir() else []
