"""The sets of a run: the balanced base, the folds, the training sets, and the ledger at a point of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers.utils import logging

from ...data.columns import column_of
from ...data.mixing import concatenate, swap_pairs, with_columns
from ...debias.audit import audit_style
from ...debias.balance import style_weights
from ...processes import on_main_process
from ...utils import move_aside, whole_file
from ..health import draw_references
from ..ledger import CurationLedger, Labels
from ..noise import estimate_noise
from .config import CurationRun, folds_of


logger = logging.get_logger(__name__)

BALANCE = "balance-style"  # the stage that weights the base

_WEIGHTS = "weights.parquet"


def balance_base(run: CurationRun, folder: Path) -> dict[str, Any]:
    """Write the weights of the base and audits of style without and with them; return counts."""
    rows = run.sets.usable("base")

    def work() -> dict[str, Any]:
        weight, report = style_weights(rows, **(run.balance or {}))
        (logger.warning if report.one_sided else logger.info)(report.summary())
        with whole_file(folder / _WEIGHTS) as part:
            pq.write_table(pa.table({"weight": weight}), part)
        counts: dict[str, Any] = {
            "pairs": len(rows),
            "effective_pairs": round(report.effective_size, 1),
            "one_sided_pairs": sum(one.num_pairs for one in report.one_sided),
            "small_weights": report.num_small,
        }
        for when, base in (("before", rows), ("after", _weighted(rows, weight))):
            audit = audit_style(base)
            with whole_file(folder / f"style_{when}.json") as part:
                part.write_text(audit.to_json() + "\n", encoding="utf-8")
            counts[f"auc_{when}"] = audit.overall.auc
        return counts

    return on_main_process(work)


def balanced_base(run: CurationRun) -> Dataset:
    """Return the constructed data, with the weights of [`balance_base`] if it is balanced."""
    rows = run.sets.usable("base")
    if run.balance is None:
        return rows
    return _weighted(rows, pq.read_table(run.output_dir / BALANCE / _WEIGHTS)["weight"].combine_chunks())


def _weighted(rows: Dataset, weight: Any) -> Dataset:
    return with_columns(rows, {"weight": pa.array(weight, pa.float64())})


def training_set(
    run: CurationRun,
    kind: str,
    *,
    fold: tuple[int, int] | None = None,
    entries: Sequence[tuple[int, str]] = (),
    without_part: int | None = None,
    labels: Labels = "hard",
) -> Dataset:
    """Return the set of a training: the base alone (`"base"`, or `"unbalanced"` without weights), or with the pool as
    it came (`"uncurated"`), as in the ledger after `entries` (`"curated"`), or with true labels (`"oracle"`); without
    a `fold` (i, n) of the pool, and without one of the [`reference_parts`] of the base; `labels` as in
    [`CurationLedger.apply`]."""
    if kind == "unbalanced":
        return run.sets.usable("base")
    base = balanced_base(run)
    if without_part is not None:
        base = base.select(np.setdiff1d(np.arange(len(base)), reference_parts(run)[without_part]))
    if kind == "base":
        return base
    pool = run.sets.usable("pool")
    if fold is not None:
        pool = pool.select(fold_rows(run, fold, inside=False))
    if kind == "oracle":
        pool = swap_pairs(pool, column_of(pool, "is_flipped").to_numpy(zero_copy_only=False).astype(bool))
    elif kind == "curated":
        contents, ledger = run.sets.contents("pool"), ledger_at(run, entries)
        pool = ledger.apply(pool, contents=contents, labels=labels)
    return concatenate({"base": base, "pool": pool})


def fold_rows(run: CurationRun, fold: tuple[int, int], *, inside: bool) -> np.ndarray:
    """Return the rows of a fold (i, n) of the pool, or of all others, ascending."""
    part, parts = fold
    folds = folds_of(run.sets.groups("pool"), parts)
    return np.flatnonzero((folds == part) == inside)


def reference_parts(run: CurationRun) -> list[np.ndarray]:
    """Return the rows of each part of the base that a model which scores does not train on, ascending: whole groups of
    [`SourceSets.groups`]; empty parts if one is too large to leave out."""
    groups, number = run.sets.groups("base"), run.num_reference_parts
    if number == 1:
        return [draw_references(groups)]
    part = folds_of(groups, number)
    parts = [np.flatnonzero(part == one) for one in range(number)]
    return parts if max(map(len, parts)) <= len(groups) / 2 else [part[:0] for part in parts]


def reference_rows(run: CurationRun, fold: tuple[int, int] | None = None) -> np.ndarray:
    """Return the rows of the base that the model of a `fold` (i, n) of the pool has not seen and scores, ascending:
    of its part, whose rows models with the same part share, so that each row is scored at most once."""
    fold = fold or (0, 1)
    sharing = run.models_with_part(fold)
    return reference_parts(run)[sharing.start][sharing.index(fold[0]) :: len(sharing)]


def ledger_at(
    run: CurationRun,
    entries: Sequence[tuple[int, str]],
    *,
    next_entry: tuple[int, str] | None = None,
    digest: str = "",
) -> CurationLedger:
    """Return the ledger at a point of the run, where `entries` count, and `next_entry` if the stage with this `digest`
    wrote it before a kill. Later entries of other settings are undone; a ledger of another pool is moved aside. Every
    process has to call it."""
    folder, own = run.output_dir / "ledger", run.sets.fingerprint("pool")

    def rewind() -> None:
        before = _source_set(folder)
        if before not in (None, own):
            aside, mine, said = folder.with_name(f"ledger-{before}"), folder.with_name(f"ledger-{own}"), ""
            if aside.exists():  # two ledgers of one pool, one of them a copy
                move_aside(aside)
            folder.rename(aside)
            if _source_set(mine) == own:
                mine.rename(folder)
                said = "; the one of this pool is back from where it was moved before"
            logger.warning(f"The ledger of another pool is now in {aside}{said}.")
        ledger = CurationLedger(folder)
        for entry in ledger.standing:
            key = entry["round"], entry["stage"]
            is_own = key == next_entry and entry["settings"].get("digest") == digest
            if key not in entries and not is_own and not ledger.is_manual(entry):
                ledger.undo(*key)

    on_main_process(rewind)
    return CurationLedger(folder)


def _source_set(folder: Path) -> str | None:
    """Return the pool that a ledger is of; `None` if there is no ledger (and none is made), or it does not know."""
    if not (folder / "ledger.json").is_file():
        return None
    return CurationLedger(folder).source_set


def corrections(run: CurationRun) -> list[str]:
    """Return hashes of the corrections that count in the ledger of a run's pool, wherever it lies."""
    own = run.sets.fingerprint("pool")
    folder = run.output_dir / "ledger"
    if _source_set(folder) not in (None, own):
        folder = run.output_dir / f"ledger-{own}"
    if not (folder / "ledger.json").is_file():  # a plan makes none
        return []
    ledger = CurationLedger(folder)
    return [entry["sha256"] for entry in ledger.standing if ledger.is_manual(entry)]


def pool_labels(run: CurationRun, ledger: CurationLedger) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of the pairs of the pool that a ledger flips and keeps."""
    known = ledger.labels(run.sets.names("pool"), contents=run.sets.contents("pool"))
    return known["flipped"], known["kept"]


def label_posterior(known: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the probability that the label of each pair, as its source has it, is wrong, from the state of the pairs
    in the ledger, or, where the last decision does not say, from their reward margins; NaN where it is not known."""
    wrong = known["posterior"]
    if np.isnan(wrong).all():
        noise = estimate_noise(np.where(known["flipped"], -known["strength"], known["strength"]))
        wrong = noise.posterior if noise.is_identified else wrong
    return wrong
