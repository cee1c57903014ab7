"""What a ledger's state makes of a data set."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers.utils import logging

from ..data.columns import column_of
from ..data.contents import FLIPPED, pair_ids
from ..data.mixing import swap_pairs, with_columns
from .ledger_tables import state_of


logger = logging.get_logger(__name__)


def apply_state(
    dataset: Dataset, state: pa.Table, *, refresh_strength: bool = False, num_proc: int | None = None
) -> Dataset:
    """Swap the pairs that a state flips and leave out those that it drops; refuse rows of which it knows none."""
    names = pair_ids(dataset, num_proc=num_proc)
    known = state_of(names, state)
    spoken = known["is_known"]
    if len(state) and len(names) and not (spoken | known["has_changed"]).any():
        raise ValueError(
            f"The ledger speaks of {len(state):,} pairs and of none of these {len(names):,} rows, "
            f"{names[0].as_py()!r} the first; apply it to the set that was scored."
        )
    now = np.zeros(len(dataset), dtype=bool)
    if FLIPPED in dataset.column_names:
        now = column_of(dataset, FLIPPED).fill_null(False).to_numpy(zero_copy_only=False)
    wanted = np.where(spoken, known["flipped"], now)
    warn_of_changes(names, known["has_changed"])
    columns = {"pair_id": names, FLIPPED: pa.array(wanted)}
    if refresh_strength:
        given = np.full(len(dataset), np.nan)
        if "strength" in dataset.column_names:
            given = column_of(dataset, "strength").cast(pa.float64()).to_numpy(zero_copy_only=False)
        new = np.maximum(known["strength"], 0.0)
        columns["strength"] = pa.array(np.where(np.isnan(new), given, new), from_pandas=True)
    rows = np.flatnonzero(known["kept"])
    logger.info(
        f"Of {len(dataset):,} pairs, the ledger speaks of {spoken.sum():,}, flips "
        f"{(wanted & known['kept']).sum():,} and drops {len(dataset) - len(rows):,}."
    )
    return swap_pairs(with_columns(dataset, columns), wanted != now, rows if len(rows) < len(dataset) else None)


def warn_of_changes(names: pa.Array, has_changed: np.ndarray) -> None:
    """Warn of pairs that are no longer what was decided about."""
    rows = np.flatnonzero(has_changed)
    if len(rows):
        logger.warning(
            f"{len(rows):,} of {len(names):,} pairs, {names[int(rows[0])].as_py()!r} the first, have another prompt, "
            "other answers (edited or swapped) or other images than when the ledger decided about them; this is not "
            "applied to them. Put the rows back, or decide anew: score them and append a round."
        )
