"""The plan of a run as a list of stages, and the steps that decide and ask judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...data.columns import column_of
from ...scoring.shards import gather_scores, score_in_shards
from ...training.setup import image_options
from ...utils import on_main_process, read_json, whole_file
from ..judging import Judging
from ..ledger import CurationLedger
from ..noise import combine_scores
from ..rules import UNREADABLE, decide, relabel_by_vote
from .config import CurationRun, Step, step_name
from .results import accuracy, label_noise, report_decision
from .sets import STAGE as BALANCE
from .sets import balance_base, corrections, fold_rows, ledger_at, pool_labels, training_set
from .stages import Stage
from .training import scorer, train_model


if TYPE_CHECKING:
    from ..judging import PairVotes


Entries = Sequence[tuple[int, str]]


def ledger_stage(step: Step, kind: str) -> str:
    """Return what the ledger calls a decision of a step."""
    return kind if step.name is None else f"{step.name}-{kind}"


def decide_step(
    run: CurationRun, folder: Path, *, number: int, step: Step, scored: Sequence[Sequence[str]], before: Entries
) -> dict[str, Any]:
    """Decide about all pairs of the pool by the scores of the stages of each model, write it into the ledger, which
    holds `before` by now, and return counts.
    """
    digest, entry = _digest(folder), (number, ledger_stage(step, "decide"))
    ledger = ledger_at(run, before, next_entry=entry, digest=digest)
    pool, names = run.sets.usable("pool"), run.sets.names("pool")

    def work() -> dict[str, Any]:
        if not _is_written(ledger, entry, digest):  # else a run was killed right after it
            scores = gather_scores([[run.output_dir / name for name in parts] for parts in scored], len(pool))
            if step.orientation == "current":
                flipped, _ = pool_labels(run, ledger)
                scores[flipped] = scores[flipped, ::-1]
            source = column_of(pool, "source")
            strength = combine_scores(scores, how=cast(Any, step.combine))
            ledger.append(
                *entry,
                pair_ids=names,
                decision=decide(strength, step.read_rules(), source=source, min_kept=step.min_kept),
                sources=source,
                scores=scores,
                models=[f"{one.name_or_path}, seed {one.seed}" for one in run.models],
                settings={"digest": digest, **step.settings()},
                orientation=cast(Any, step.orientation),
                source_set=run.sets.fingerprint("pool"),
                contents=run.sets.contents("pool"),
            )
        return _counts(run, ledger, entry)

    return on_main_process(work)


def ask_judges(run: CurationRun, folder: Path, *, number: int, step: Step, before: Entries) -> dict[str, Any]:
    """Ask judges about the pairs that the last decision dropped, write into the ledger those that come back, and
    return counts. A pair without a clear verdict stays dropped; while more pairs than `max_unanswered` have no answer,
    a [`~trl_dt2it.judge.JudgeError`] is raised, and the next run asks about the rest.
    """
    digest, entry = _digest(folder), (number, ledger_stage(step, "judge"))
    ledger = ledger_at(run, before, next_entry=entry, digest=digest)
    pool, names = run.sets.usable("pool"), run.sets.names("pool")
    judging = cast(Judging, run.judging)

    from ..judging import judge_pairs  # needs the judge's extra

    def work() -> dict[str, Any]:
        if not _is_written(ledger, entry, digest):
            dropped = np.flatnonzero(~pool_labels(run, ledger)[1])
            found = judge_pairs(
                pool.select(dropped),
                judging.clients(run.output_dir),
                swap=judging.swap,
                language=judging.language,
                image_options=image_options(run.sets.args),
                show_progress=not run.training.args.disable_tqdm,
            )
            _check_answered(found, judging)
            _write_votes(folder, names.take(pa.array(dropped)), found)
            answered = np.flatnonzero(found.answered)
            rows = pa.array(dropped[answered])
            ledger.append(
                *entry,
                pair_ids=names.take(rows),
                decision=relabel_by_vote(found.votes[answered], cast(Any, judging.votes)),
                sources=column_of(pool, "source").take(rows),
                models=[f"{one.model} at {one.location}" for one in judging.endpoints],
                votes=found.votes[answered],
                settings={"digest": digest, **judging.settings()},
                orientation="source",
                contents=run.sets.contents("pool"),
            )
        votes = pq.read_table(folder / "votes.parquet")
        return {**_vote_counts(votes), **_counts(run, ledger, entry)}

    return on_main_process(work)


def _check_answered(found: PairVotes, judging: Judging) -> None:
    """End the stage if too many pairs have no answer, and say what to do."""
    from ...judge.endpoint import JudgeError

    missing, total = int(found.unanswered.sum()), len(found.unanswered)
    if missing <= judging.max_unanswered * total:
        return
    counts = {status: count for status, count in found.counts().items() if status in ("transport", "over_budget")}
    told = " and ".join(
        f"the budget had no room for {count} questions" if status == "over_budget" else f"{count} questions failed"
        for status, count in counts.items()
    )
    raise JudgeError(
        f"{missing} of {total} pairs have no answer of all judges ({told}); start again to ask about them, with a "
        "larger budget if that was the reason, or let them stay as they are with `max_unanswered` of the judge."
    )


def _digest(folder: Path) -> str:
    return read_json(folder / "begun.json")["digest"]


def _standing(ledger: CurationLedger, entry: tuple[int, str]) -> dict[str, Any] | None:
    """Return what the ledger says of a stage of a round, if it stands."""
    return next((one for one in ledger.standing if (one["round"], one["stage"]) == entry), None)


def _is_written(ledger: CurationLedger, entry: tuple[int, str], digest: str) -> bool:
    written = _standing(ledger, entry)
    return written is not None and written["settings"].get("digest") == digest


def _counts(run: CurationRun, ledger: CurationLedger, entry: tuple[int, str]) -> dict[str, Any]:
    """Count the pool after a decision, and what that did, by reason."""
    flipped, kept = pool_labels(run, ledger)
    reasons = ledger.table(cast(dict, _standing(ledger, entry)), ["reason"])
    return {
        "pairs": len(flipped),
        "flipped": int((flipped & kept).sum()),
        "kept": int(kept.sum()),
        **label_noise(run.sets.usable("pool"), flipped, kept),
        "reasons": dict(Counter(reasons["reason"].to_pylist()).most_common()),
    }


def _write_votes(folder: Path, names: pa.Array, found: PairVotes) -> None:
    """Write what each judge said of each pair in both orders, with the status of each reply."""
    columns: dict[str, Any] = {"pair_id": names}
    for judge in range(found.votes.shape[1]):
        for order in range(2):
            votes = found.votes[:, judge, order]
            columns[f"vote_{judge}_{order}"] = pa.array(votes, mask=votes == UNREADABLE)
            columns[f"status_{judge}_{order}"] = pa.array(found.status[:, judge, order], pa.string())
    columns["problem"] = pa.array([found.problems.get(place) for place in range(len(names))], pa.string())
    with whole_file(folder / "votes.parquet") as part:
        pq.write_table(pa.table(columns), part)


def _vote_counts(votes: pa.Table) -> dict[str, Any]:
    from ..judging import NO_ANSWER

    columns = [votes[name].to_pylist() for name in votes.column_names if name.startswith("status_")]
    statuses = Counter(status for column in columns for status in column)
    unanswered = sum(any(status in NO_ANSWER for status in row) for row in zip(*columns, strict=True))
    counts = {"judged": len(votes) - unanswered, "unanswered": unanswered} if unanswered else {"judged": len(votes)}
    return {**counts, "replies": dict(statuses.most_common())}


@dataclass
class _Plan:
    """The stages so far, and what the ledger has been told by them."""

    run: CurationRun
    stages: list[Stage] = field(default_factory=list)
    entries: list[tuple[int, str]] = field(default_factory=list)  # round and stage of what the ledger holds
    decided: tuple[str, ...] = ()  # the last stage that wrote into it


def plan_rounds(run: CurationRun) -> list[Stage]:
    """What a run consists of."""
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
        from ..judging import most_judging_cost  # needs the judge's extra

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
