"""What the models of a run are trained on: the constructed data, and what the ledger makes of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from ..data.encoded import column_of
from ..data.mixing import concatenate
from ..data.swapping import swap_pairs
from ..data.whole_file import move_aside
from ..processes import on_main_process
from .ledger import CurationLedger
from .ledger_files import LedgerFiles, is_manual, round_key, standing_rounds
from .ledger_tables import state_of
from .round_balance import balanced_base
from .round_data import folds_of


if TYPE_CHECKING:
    from .curation_run import CurationRun

logger = logging.get_logger(__name__)


def training_set(
    run: CurationRun, kind: str, *, fold: tuple[int, int] | None = None, entries: Sequence[tuple[int, str]] = ()
) -> Dataset:
    """
    Rows of a training.

    Args:
        run ([`CurationRun`]):
            The run.
        kind (`str`):
            What stands beside the base: nothing (`"base"`), nothing and the base as it came, though the run balances
            its style (`"unbalanced"`), the pool as it is (`"uncurated"`), as the ledger has it
            (`"curated"`), or with its true labels (`"oracle"`).
        fold (`tuple[int, int]`, *optional*):
            `(i, n)`: leaves the i-th of n parts of the pool out, i from 0.
        entries (`Sequence[tuple[int, str]]`, *optional*):
            Rounds and stages that the ledger holds at this point of the run.

    Returns:
        `Dataset`: memory-mapped, images encoded.
    """
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
    """
    Rows of the pool of one part, or of all others.

    Args:
        run ([`CurationRun`]):
            The run.
        fold (`tuple[int, int]`):
            Which part, from 0, of how many.
        inside (`bool`):
            Whether the rows of the part are wanted, or the others.

    Returns:
        `np.ndarray`: rows, ascending.
    """
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
    """
    The ledger as it is at a point of the run: what an earlier run with other settings wrote after it is undone.

    Every process has to call it. A ledger of another pool is moved beside, to `ledger-` and its fingerprint, and comes
    back when its pool does.

    Args:
        run ([`CurationRun`]):
            The run.
        entries (`Sequence[tuple[int, str]]`):
            Rounds and stages that count. Corrections by persons count besides.
        next_entry (`tuple[int, str]`, *optional*):
            What is to be written next; if it is there, written by the same stage before a kill, it stays.
        digest (`str`, *optional*):
            The digest of that stage.

    Returns:
        [`CurationLedger`]
    """
    folder, own = run.output_dir / "ledger", run.sets.fingerprint("pool")

    def rewind() -> None:
        _change_ledger(folder, own)
        record, ledger = LedgerFiles(folder).read(), CurationLedger(folder)
        for number in standing_rounds(record):
            entry = record["rounds"][number]
            is_own = round_key(entry) == next_entry and entry["settings"].get("digest") == digest
            if round_key(entry) not in entries and not is_own and not is_manual(entry["stage"]):
                ledger.undo(*round_key(entry))

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
    """Which pool a ledger is of; `None` if there is none, or it does not say. None is made."""
    if not (folder / "ledger.json").is_file():
        return None
    return LedgerFiles(folder).read()["source_set"]


def corrections(run: CurationRun) -> list[str]:
    """Hashes of what persons decided in the ledger of a run's pool, as far as it stands."""
    own = run.sets.fingerprint("pool")
    folder = run.output_dir / "ledger"
    if _source_set(folder) not in (None, own):
        folder = run.output_dir / f"ledger-{own}"
    if not (folder / "ledger.json").is_file():  # and none is to be made for a plan
        return []
    record = LedgerFiles(folder).read()
    standing = [record["rounds"][number] for number in standing_rounds(record)]
    return [entry["sha256"] for entry in standing if is_manual(entry["stage"])]


def pool_labels(run: CurationRun, ledger: CurationLedger) -> tuple[np.ndarray, np.ndarray]:
    """
    What a ledger says of the pool.

    Args:
        run ([`CurationRun`]):
            The run.
        ledger ([`CurationLedger`]):
            Its ledger.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: which of the N pairs are flipped, and which are kept.
    """
    known = state_of(run.sets.names("pool"), ledger.state(contents=run.sets.contents("pool")))
    return known["flipped"].astype(bool), known["kept"].astype(bool)
