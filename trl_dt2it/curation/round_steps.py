"""The steps of a round that need no model: deciding by scores, and asking judges about what was dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.columns import column_of
from ..scoring.shards import gather_scores
from ..training.setup import image_options
from ..utils import on_main_process, read_json, whole_file
from .combining import combine_scores
from .deciding import decide
from .ledger import CurationLedger
from .round_judges import Judging
from .round_report import label_noise
from .round_sets import ledger_at, pool_labels
from .round_settings import Step
from .votes import UNREADABLE, relabel_by_vote


if TYPE_CHECKING:
    from .curation_run import CurationRun
    from .judging import PairVotes

Entries = Sequence[tuple[int, str]]


def ledger_stage(step: Step, kind: str) -> str:
    """Return what the ledger calls a decision of a step."""
    return kind if step.name is None else f"{step.name}-{kind}"


def decide_step(
    run: CurationRun, folder: Path, *, number: int, step: Step, scored: Sequence[Sequence[str]], before: Entries
) -> dict[str, Any]:
    """Decide about all pairs of the pool by the scores of the stages of each model, write it into the ledger, which
    holds `before` by now, and return counts."""
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
    a [`~trl_dt2it.judge.JudgeError`] is raised, and the next run asks about the rest."""
    digest, entry = _digest(folder), (number, ledger_stage(step, "judge"))
    ledger = ledger_at(run, before, next_entry=entry, digest=digest)
    pool, names = run.sets.usable("pool"), run.sets.names("pool")
    judging = cast(Judging, run.judging)

    from .judging import judge_pairs  # needs the judge's extra

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
    from ..judge.endpoint import JudgeError

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
    from .judging import NO_ANSWER

    columns = [votes[name].to_pylist() for name in votes.column_names if name.startswith("status_")]
    statuses = Counter(status for column in columns for status in column)
    unanswered = sum(any(status in NO_ANSWER for status in row) for row in zip(*columns, strict=True))
    counts = {"judged": len(votes) - unanswered, "unanswered": unanswered} if unanswered else {"judged": len(votes)}
    return {**counts, "replies": dict(statuses.most_common())}
