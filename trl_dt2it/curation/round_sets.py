"""What the models of a run are trained on: the constructed data, and what the ledger makes of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from ..data.columns import column_of
from ..data.mixing import concatenate, swap_pairs
from ..utils import move_aside, on_main_process
from .ledger import CurationLedger
from .round_balance import balanced_base
from .round_data import folds_of


if TYPE_CHECKING:
    from .curation_run import CurationRun

logger = logging.get_logger(__name__)


def training_set(
    run: CurationRun, kind: str, *, fold: tuple[int, int] | None = None, entries: Sequence[tuple[int, str]] = ()
) -> Dataset:
    """Return the rows of a training: the base, alone (`"base"`) and without the weights of its style (`"unbalanced"`),
    or with the pool as it is (`"uncurated"`), as the ledger has it after `entries` (`"curated"`), or with its true
    labels (`"oracle"`), but for part i of n, `fold`."""
    if kind == "unbalanced":
        return run.sets.usable("base")
    base = balanced_base(run)
    if kind == "base":
        return base
    pool = run.sets.usable("pool")
    if fold is not None:
        pool = pool.select(fold_rows(run, fold, inside=False))
    if kind == "oracle":
        pool = swap_pairs(pool, column_of(pool, "is_flipped").to_numpy(zero_copy_only=False).astype(bool))
    elif kind == "curated":
        pool = ledger_at(run, entries).apply(pool, contents=run.sets.contents("pool"))
    return concatenate({"base": base, "pool": pool})


def fold_rows(run: CurationRun, fold: tuple[int, int], *, inside: bool) -> np.ndarray:
    """Return the rows of one part (i, n) of the pool, or of all others, ascending."""
    part, parts = fold
    folds = folds_of(run.sets.usable("pool"), run.sets.names("pool"), parts)
    return np.flatnonzero((folds == part) == inside)


def ledger_at(
    run: CurationRun,
    entries: Sequence[tuple[int, str]],
    *,
    next_entry: tuple[int, str] | None = None,
    digest: str = "",
) -> CurationLedger:
    """Return the ledger as it is at a point of the run, where `entries` count, and `next_entry` if the stage with the
    `digest` has written it before a kill. What an earlier run with other settings wrote later is undone; a ledger of
    another pool is moved aside. Every process has to call it."""
    folder, own = run.output_dir / "ledger", run.sets.fingerprint("pool")

    def rewind() -> None:
        _change_ledger(folder, own)
        ledger = CurationLedger(folder)
        for entry in ledger.standing:
            key = entry["round"], entry["stage"]
            is_own = key == next_entry and entry["settings"].get("digest") == digest
            if key not in entries and not is_own and not ledger.is_manual(entry):
                ledger.undo(*key)

    on_main_process(rewind)
    return CurationLedger(folder)


def _change_ledger(folder: Path, own: str) -> None:
    """Put the ledger of a pool into its place, if another pool's is there."""
    before = _source_set(folder)
    if before in (None, own):
        return
    aside, mine = (folder.with_name(f"ledger-{name}") for name in (before, own))
    if aside.exists():  # two ledgers of one pool, which only somebody who has copied them can have
        move_aside(aside)
    folder.rename(aside)
    said = ""
    if _source_set(mine) == own:
        mine.rename(folder)
        said = "; the one of this pool is back from where it was moved before"
    logger.warning(f"The ledger of another pool is now in {aside}{said}.")


def _source_set(folder: Path) -> str | None:
    """Return which pool a ledger is of; `None` if there is none, or it does not say. None is made."""
    if not (folder / "ledger.json").is_file():
        return None
    return CurationLedger(folder).source_set


def corrections(run: CurationRun) -> list[str]:
    """Return hashes of what persons decided in the ledger of a run's pool, as far as it stands."""
    own = run.sets.fingerprint("pool")
    folder = run.output_dir / "ledger"
    if _source_set(folder) not in (None, own):
        folder = run.output_dir / f"ledger-{own}"
    if not (folder / "ledger.json").is_file():  # and none is to be made for a plan
        return []
    ledger = CurationLedger(folder)
    return [entry["sha256"] for entry in ledger.standing if ledger.is_manual(entry)]


def pool_labels(run: CurationRun, ledger: CurationLedger) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs of the pool are flipped by a ledger, and which are kept."""
    known = ledger.labels(run.sets.names("pool"), contents=run.sets.contents("pool"))
    return known["flipped"], known["kept"]
