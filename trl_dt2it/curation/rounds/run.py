"""The plan of a run as a list of stages, and the steps that decide and ask judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import release_memory

from ...data.columns import column_of
from ...judge.endpoint import JudgeError
from ...processes import on_main_process
from ...scoring.shards import gather_scores, score_in_shards
from ...training.setup import image_options
from ...utils import read_json, whole_file, write_json
from ..budget import estimate_accuracy, expected_gain, judge_curve, judge_order, weigh_votes
from ..health import describe_health, num_references, show_health
from ..judging import NO_ANSWER, Judging, PairVotes, estimate_judging, judge_pairs
from ..ledger import CurationLedger
from ..noise import combine_scores, mean_rewards
from ..rules import UNREADABLE, decide, relabel_by_vote, with_reference
from .config import CurationRun, Step, step_name
from .results import accuracy, label_noise, report_decision, wrong_labels
from .sets import (
    BALANCE,
    balance_base,
    corrections,
    fold_rows,
    label_posterior,
    ledger_at,
    pool_labels,
    reference_rows,
    training_set,
)
from .stages import Stage
from .training import load_score, train_model


Entries = Sequence[tuple[int, str]]

# Parts of a set share no group of these, see `SourceSets.groups`; runs of earlier releases had other parts.
APART = {"apart": "prompts and images that look alike"}


@dataclass
class _Plan:
    """The stages so far, and what they have written into the ledger."""

    run: CurationRun
    stages: list[Stage] = field(default_factory=list)
    entries: list[tuple[int, str]] = field(default_factory=list)  # round and stage of each decision in the ledger
    decided: tuple[str, ...] = ()  # the last stage that decided
    # The stages that score, for each model and step so far: of the pool, and of the reference.
    scored: list[tuple[list[str], list[str]]] = field(default_factory=list)

    def add_decision(self, stage: Stage, entry: tuple[int, str]) -> None:
        self.stages.append(stage)
        self.entries.append(entry)
        self.decided = (stage.name,)


def plan_rounds(run: CurationRun) -> list[Stage]:
    """Plan a run: models, balancing, the steps of each round, final trainings and their tests."""
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
    run, label, parts = plan.run, step_name(number, step), plan.run.num_reference_parts
    # Models of the base alone know the same of each pair of the pool: more than one only so that each leaves a part of
    # a small base out. Each scores its share of the pool, so that its margins are of one kind with those of its part.
    folds = max(parts, 1) if step.is_base else cast(int, step.folds)
    scored, referenced = list[list[str]](), list[list[str]]()
    for model in range(len(run.models)):
        scored.append([])
        referenced.append([])
        for fold in range(folds):
            name = f"model-{model}" + (f"-fold-{fold}" if folds > 1 else "")
            part = (fold, folds) if folds > 1 else None
            first = cast(str, run.first_base_step) if step.is_base else label
            trained, without_part = f"{first}/train/{name}", fold % parts if parts else None
            # On the base alone, each model is trained once, whatever steps it scores in.
            if trained not in [one.name for one in plan.stages]:
                kind, trained_part = ("base", None) if step.is_base else ("curated", part)
                _plan_training(plan, trained, model, kind, trained_part, without_part=without_part)
            _plan_scoring(plan, f"{label}/score/{name}", trained, "pool", part)
            scored[-1].append(f"{label}/score/{name}")
            if parts and step.takes_reference:
                _plan_scoring(plan, f"{label}/reference/{name}", trained, "base", part)
                referenced[-1].append(f"{label}/reference/{name}")
    plan.scored += zip(scored, referenced, strict=True)
    if step.with_earlier:
        # A mean is told by a reference that all of its scores are known of.
        together = [one for one in plan.scored if one[1] or not referenced[0]]
        scored, referenced = [one[0] for one in together], [one[1] for one in together if referenced[0]] or [[]]
    expected: dict[str, float] = {"pairs": len(run.sets.raw("pool"))}
    inputs = (*chain.from_iterable(scored), *chain.from_iterable(referenced), *plan.decided)
    before = tuple(plan.entries)
    decide = partial(decide_step, run, number=number, step=step, scored=scored, referenced=referenced, before=before)
    stage = Stage(f"{label}/decide", decide, step.settings(), inputs, expected, is_replayed=True)
    plan.add_decision(stage, (number, ledger_stage(step, "decide")))
    if step.judge:
        judging = cast(Judging, run.judging)
        most = estimate_judging(run.sets.raw("pool"), judging.endpoints, image_options=image_options(run.sets.args))
        expected = {**expected, "calls": most.calls, "USD": most.cost}
        for name, limit in (("calls", "max_calls"), ("USD", "max_cost")):
            limits = [getattr(kwargs["budget"], limit) for kwargs in judging.client_kwargs]
            expected[name] = expected[name] if None in limits else min(expected[name], sum(limits))
        ask = partial(ask_judges, run, number=number, step=step, before=tuple(plan.entries))
        settings = judging.settings()
        settings |= {"seed": run.training.args.seed} if judging.order == "random" else {}
        stage = Stage(f"{label}/judge", ask, settings, plan.decided, expected, is_replayed=True)
        plan.add_decision(stage, (number, ledger_stage(step, "judge")))


def _plan_training(
    plan: _Plan,
    name: str,
    model: int,
    kind: str,
    fold: tuple[int, int] | None = None,
    without_part: int | None = None,
) -> None:
    """Plan a training on the set of [`training_set`]."""
    run, base = plan.run, plan.run.models[model]
    inputs: tuple[str, ...] = () if base.stage is None else (base.stage.name,)
    if run.balance is not None and kind != "unbalanced":
        inputs += (BALANCE,)
    model_settings = {"name_or_path": base.name_or_path, "seed": base.seed}
    settings: dict[str, Any] = {"training": run.training.settings(), "model": model_settings, "kind": kind}
    settings["base"] = run.sets.digest("base")
    if base.stage is None:
        # The files of a model on disk may change under its name.
        folder = Path(run.model_dir(model))
        files = folder.glob("*.*") if folder.is_dir() else ()
        settings["files"] = sorted((file.name, file.stat().st_size) for file in files)
    pairs = len(run.sets.raw("base"))
    if kind not in ("unbalanced", "base"):
        settings |= {"pool": run.sets.digest("pool"), "fold": fold}
        pairs += round(len(run.sets.raw("pool")) * (1 if fold is None else 1 - 1 / fold[1]))
    if without_part is not None:
        settings["without_part"] = f"{without_part} of {run.num_reference_parts}"
        pairs -= num_references(len(run.sets.raw("base")))
    settings |= {} if fold is None and without_part is None else APART
    entries = tuple(plan.entries) if kind == "curated" else ()
    is_final = name == "final/curated"
    labels = run.labels if is_final else "hard"
    settings |= {} if labels == "hard" else {"labels": labels}
    # After a person's corrections, the final model is trained anew; the rounds are not repeated.
    if is_final and (by_hand := corrections(run)):
        settings["corrections"] = by_hand

    def train(folder: Path) -> dict[str, Any]:
        return train_model(
            folder,
            training_set(run, kind, fold=fold, entries=entries, without_part=without_part, labels=labels),
            run.training,
            model=run.model_dir(model),
            seed=base.seed,
            eval_dataset=run.sets.usable("test") if "test" in run.sets.specs else None,
            push_to_hub=is_final,
            audit_style=name.startswith("final/"),
            ledger=CurationLedger(run.output_dir / "ledger") if is_final else None,
        )

    expected: dict[str, float] = {"pairs": pairs, "steps": run.training.num_steps(pairs)}
    if (times := run.training.times_seen(pairs)) is not None:
        expected["times seen"] = times
    plan.stages.append(Stage(name, train, settings, (*inputs, *(plan.decided if entries else ())), expected))


def _plan_scoring(plan: _Plan, name: str, trained: str, set_name: str, fold: tuple[int, int] | None = None) -> None:
    """Plan the scoring of a set, or of one fold of it, by the model of a training; of the base, of the reference."""
    run, count, shares = plan.run, len(plan.run.sets.raw(set_name)), 1 if fold is None else fold[1]
    if set_name == "base":
        count, shares = num_references(count), len(run.models_with_part(fold or (0, 1)))

    def score(folder: Path) -> dict[str, Any] | None:
        rows = run.sets.usable(set_name)
        selected = None if fold is None else fold_rows(run, fold, inside=True)
        if set_name == "base":
            selected = reference_rows(run, fold)
            if len(selected) == 0:
                return {"pairs": 0}
        counts = score_in_shards(
            folder,
            rows,
            partial(load_score, run.output_dir / trained, run.training),
            pair_ids=run.sets.names(set_name),
            rows=selected,
            rows_per_shard=run.rows_per_shard,
            shard=run.shard,
        )
        release_memory()
        return {**counts, **accuracy(folder, rows)} if counts and set_name == "test" else counts

    settings = {set_name: run.sets.digest(set_name), "fold": fold, "rows_per_shard": run.rows_per_shard}
    settings |= {} if fold is None and set_name != "base" else APART
    expected = {"pairs": round(count / shares)}
    plan.stages.append(Stage(name, score, settings, (trained,), expected, is_shared=True))


def ledger_stage(step: Step, kind: str) -> str:
    """Return the name of a decision of a step in the ledger."""
    return kind if step.name is None else f"{step.name}-{kind}"


def decide_step(
    run: CurationRun,
    folder: Path,
    *,
    number: int,
    step: Step,
    scored: Sequence[Sequence[str]],
    before: Entries,
    referenced: Sequence[Sequence[str]] = ((),),
) -> dict[str, Any]:
    """Decide by the scores of each model's stages, of the pool and of the reference, those of the step last; write the
    decision into the ledger, and return counts."""
    pool, names = run.sets.usable("pool"), run.sets.names("pool")
    # Here, because all processes check rows together, and the first alone decides.
    num_base = len(run.sets.usable("base")) if referenced[0] else 0

    def make(ledger: CurationLedger) -> dict[str, Any]:
        scores = _gather(run, scored, len(pool))
        if step.orientation == "current":
            flipped, _ = pool_labels(run, ledger)
            scores[flipped] = scores[flipped, ::-1]
        source = column_of(pool, "source")
        # On one scale, whichever it is.
        known = [_gather(run, referenced, num_base)] if referenced[0] else []
        known = [one[~np.isnan(one).all(axis=tuple(range(1, one.ndim)))] for one in known]
        every, count = np.concatenate([scores, *known]), len(scores)
        margins, means = combine_scores(every, how=cast(Any, step.combine)), mean_rewards(every)
        reference = margins[count:] if known else None
        rules = with_reference(step.read_rules(), reference, means[count:])
        decision = decide(margins[:count], rules, source=source, mean_reward=means[:count], min_kept=step.min_kept)
        health = describe_health(decision.estimates, reference)
        if health is not None:
            show_health(health)
        return {
            "pair_ids": names,
            "decision": decision,
            "sources": source,
            "scores": scores[..., -len(run.models) :],
            "models": [f"{one.name_or_path}, seed {one.seed}" for one in run.models],
            "orientation": step.orientation,
            "health": health,
        }

    return _write_once(run, folder, (number, ledger_stage(step, "decide")), before, step.settings(), make)


def _gather(run: CurationRun, stages: Sequence[Sequence[str]], count: int) -> np.ndarray:
    return gather_scores([[run.output_dir / name for name in parts] for parts in stages], count)


def ask_judges(run: CurationRun, folder: Path, *, number: int, step: Step, before: Entries) -> dict[str, Any]:
    """Ask judges about the pairs that the last decision dropped, or about all, and add their votes to the ledger;
    return counts. A pair without a clear verdict stays as it is, and so does one that the budget has no room for, if
    the judging has an order; a [`~trl_dt2it.judge.JudgeError`] if more than `max_unanswered` have no answer for
    another reason, about which the next run asks."""
    pool, names, judging = run.sets.usable("pool"), run.sets.names("pool"), cast(Judging, run.judging)

    def make(ledger: CurationLedger) -> dict[str, Any]:
        known = ledger.labels(names, contents=run.sets.contents("pool"))
        flipped, kept, strength = (known[name] for name in ("flipped", "kept", "strength"))
        posterior = label_posterior(known)
        state = {"flipped": flipped, "kept": kept}
        rows = may_ask = np.flatnonzero(~kept) if judging.pairs == "dropped" else np.arange(len(kept))
        if judging.order is not None:
            # Without an accuracy, all pairs whose label may be wrong are in the order, and `num_worth` ends it.
            about: dict[str, Any] = {"how": judging.order, "accuracy": judging.accuracy or 1.0, **state}
            order = judge_order(posterior, strength, seed=run.training.args.seed, **about)
            rows = order[np.isin(order, may_ask)]

        def num_worth(asked: PairVotes, count: int) -> int:
            done, next_rows = rows[: len(asked.votes)], rows[len(asked.votes) :][:count]
            by_votes = relabel_by_vote(asked.votes[asked.answered], cast(Any, judging.votes))
            accuracy = estimate_accuracy(by_votes, posterior[done[asked.answered]])
            gain = expected_gain(posterior[next_rows], flipped[next_rows], kept[next_rows], accuracy)
            return int((np.cumsum(gain <= 0) == 0).sum())

        verdicts = judge_pairs(
            pool.select(rows),
            judging.clients(run.output_dir),
            swap=judging.swap,
            language=judging.language,
            image_options=image_options(run.sets.args),
            within_budget=judging.order is not None,
            num_worth=num_worth if judging.order == "gain" and judging.accuracy is None else None,
            show_progress=not run.training.args.disable_tqdm,
        )
        rows = rows[: len(verdicts.votes)]
        is_late = verdicts.over_budget & (judging.order is not None)
        missing, total = int((verdicts.unanswered & ~is_late).sum()), int((~is_late).sum())
        if missing > judging.max_unanswered * total:
            told = {"over_budget": "the budget had no room for {} questions", "transport": "{} questions failed"}
            counts = Counter(verdicts.status[~is_late].ravel().tolist()).most_common()
            reasons = " and ".join(told[status].format(count) for status, count in counts if status in told)
            raise JudgeError(
                f"{missing} of {total} pairs have no answer of all judges ({reasons}); start again to ask about them, "
                "with a larger budget if that was the reason, or let them stay with `max_unanswered` of the judge."
            )
        answered = verdicts.answered
        some, votes = rows[answered], verdicts.votes[answered]
        by_votes, before_votes = relabel_by_vote(votes, cast(Any, judging.votes)), posterior[some]
        accuracy = judging.accuracy or estimate_accuracy(by_votes, before_votes)
        seen = {name: value[some] for name, value in {**state, "strength": strength}.items()}
        decision = weigh_votes(by_votes, before_votes, accuracy=accuracy, **seen)
        _write_votes(folder, names.take(pa.array(rows)), verdicts)
        if judging.order is not None:
            calls, truth = np.full(len(some), 2 * len(judging.endpoints)), wrong_labels(pool)
            curve = judge_curve(decision, some, calls, flipped=flipped, kept=kept, wrong=truth)
            about = {"order": judging.order, "judge_accuracy": round(accuracy, 3), "curve": curve}
            write_json(folder / "asked.json", {"not asked (no gain)": len(may_ask) - len(rows), **about})
        return {
            "pair_ids": names.take(pa.array(some)),
            "decision": decision,
            "sources": column_of(pool, "source").take(pa.array(some)),
            "models": [f"{one.model} at {one.location}" for one in judging.endpoints],
            "votes": votes,
            "orientation": "source",
        }

    counts = _write_once(run, folder, (number, ledger_stage(step, "judge")), before, judging.settings(), make)
    return {**on_main_process(lambda: _vote_counts(folder)), **counts}


def _write_once(
    run: CurationRun,
    folder: Path,
    entry: tuple[int, str],
    before: Entries,
    settings: Mapping[str, Any],
    make: Callable[[CurationLedger], dict[str, Any]],
) -> dict[str, Any]:
    """Add a decision to the ledger as of `before`, unless a run was killed right after it; count the pool after it."""
    digest = read_json(folder / "begun.json")["digest"]
    ledger, contents = ledger_at(run, before, next_entry=entry, digest=digest), run.sets.contents("pool")
    about: dict[str, Any] = {"settings": {"digest": digest, **settings}, "source_set": run.sets.fingerprint("pool")}

    def standing() -> dict[str, Any] | None:
        return next((one for one in ledger.standing if (one["round"], one["stage"]) == entry), None)

    def work() -> dict[str, Any]:
        written = standing()
        if written is None or written["settings"].get("digest") != digest:
            ledger.append(entry[0], entry[1], **about, contents=contents, **make(ledger))
        flipped, kept = pool_labels(run, ledger)
        reasons = ledger.table(cast(dict, standing()), ["reason"])["reason"]
        counts = {
            "pairs": len(flipped),
            "flipped": int((flipped & kept).sum()),
            "kept": int(kept.sum()),
            **label_noise(run.sets.usable("pool"), flipped, kept),
            "reasons": dict(Counter(reasons.to_pylist()).most_common()),
        }
        report_decision(run, len(before) + 1, counts)
        return counts

    return on_main_process(work)


def _write_votes(folder: Path, names: pa.Array, verdicts: PairVotes) -> None:
    """Write vote and status of each judge's reply about each pair, in both orders."""
    columns: dict[str, Any] = {"pair_id": names}
    for judge, order in np.ndindex(verdicts.votes.shape[1:]):
        votes = verdicts.votes[:, judge, order]
        columns[f"vote_{judge}_{order}"] = pa.array(votes, mask=votes == UNREADABLE)
        columns[f"status_{judge}_{order}"] = pa.array(verdicts.status[:, judge, order], pa.string())
    columns["problem"] = pa.array([verdicts.problems.get(index) for index in range(len(names))], pa.string())
    with whole_file(folder / "votes.parquet") as part:
        pq.write_table(pa.table(columns), part)


def _vote_counts(folder: Path) -> dict[str, Any]:
    votes, asked = pq.read_table(folder / "votes.parquet"), read_json(folder / "asked.json")
    columns = [votes[name].to_pylist() for name in votes.column_names if name.startswith("status_")]
    rows = list(zip(*columns, strict=True))
    late = [row for row in rows if asked is not None and "over_budget" in row]
    unanswered = sum(any(status in NO_ANSWER for status in row) for row in rows)
    counts: dict[str, Any] = {"judged": len(rows) - unanswered}
    if unanswered > len(late):
        counts["unanswered"] = unanswered - len(late)
    if asked is not None:
        counts |= {"not asked (budget)": len(late), **asked}
    statuses = Counter(status for row in rows for status in row)
    if asked is not None:
        del statuses["over_budget"]
    return {**counts, "replies": dict(statuses.most_common())}
