"""Looking into a ledger: the history of a pair, what rounds did to sources, and where two rounds differ."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .ledger_files import LedgerFiles, standing_rounds
from .ledger_tables import ACTIONS, state_of


_NUMBERED = re.compile(r".*_\d+")


def history_of(files: LedgerFiles, pair_id: str) -> list[dict[str, Any]]:
    """Return what [`CurationLedger.history`] does."""
    record, found = files.read(), []
    standing = set(standing_rounds(record))
    for number, entry in enumerate(record["rounds"]):
        for row in pq.read_table(files.verified(entry), filters=[("pair_id", "==", pair_id)]).to_pylist():
            about = {"round": entry["round"], "stage": entry["stage"], "undone": number not in standing}
            about |= {name: value for name, value in row.items() if not _NUMBERED.fullmatch(name)}
            models = entry["models"] if "chosen_0" in row else []
            scores = {name: (row[f"chosen_{place}"], row[f"rejected_{place}"]) for place, name in enumerate(models)}
            judges = sum(name.startswith("vote_") for name in row) // 2
            votes = [(row[f"vote_{judge}_0"], row[f"vote_{judge}_1"]) for judge in range(judges)]
            found.append({**about, "scores": scores, "votes": votes})
    return found


def summarize(files: LedgerFiles) -> pa.Table:
    """Return what [`CurationLedger.summary`] does."""
    record = files.read()
    standing = set(standing_rounds(record))
    schema = pa.schema(
        [
            *(("round", pa.int64()), ("stage", pa.string()), ("undone", pa.bool_()), ("source", pa.string())),
            *((name, pa.int64()) for name in ("pairs", *ACTIONS)),
            ("mean_strength", pa.float64()),
        ]
    )
    parts = [schema.empty_table()]
    for number, entry in enumerate(record["rounds"]):
        table = files.table(entry, ["source", "action", "strength"])
        action = table["action"].cast(pa.string())
        columns = {"source": table["source"].cast(pa.string()), "strength": table["strength"]}
        columns |= {name: pc.equal(action, name).cast(pa.int64()) for name in ACTIONS}
        found = pa.table(columns).group_by("source", use_threads=False)
        found = found.aggregate([([], "count_all"), *((name, "sum") for name in ACTIONS), ("strength", "mean")])
        about = {"round": entry["round"], "stage": entry["stage"], "undone": number not in standing}
        values = [pa.array([value] * len(found)) for value in about.values()]
        values += [column.combine_chunks() for column in found.columns]
        parts.append(pa.table(values, schema=schema))
    return pa.concat_tables(parts)


def difference(first: pa.Table, second: pa.Table) -> pa.Table:
    """Return what [`CurationLedger.diff`] does, of two states."""
    one, other = (state["pair_id"].combine_chunks() for state in (first, second))
    names = one if one.equals(other) else pa.concat_arrays([one, other]).unique()
    columns: dict[str, np.ndarray] = {}
    for side, state in zip("ab", (first, second), strict=True):
        known = state_of(names, state)
        columns |= {f"{name}_{side}": known[name] for name in ("flipped", "kept")}
    differs = (columns["flipped_a"] != columns["flipped_b"]) | (columns["kept_a"] != columns["kept_b"])
    return pa.table({"pair_id": names, **columns}).filter(pa.array(differs))
