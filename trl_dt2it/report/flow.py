"""Where the pairs of a ledger stand after each of its stages, and how many go from where to where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..curation.ledger import CurationLedger


# Labelled as at the source; the other way round; brought back by judges, either way; left out.
STATES = ("kept", "flipped", "relabelled", "dropped")


@dataclass(frozen=True)
class Flow:
    """The N pairs of a ledger, stage by stage."""

    pair_id: pa.Array
    steps: tuple[str, ...]  # "source", then the K stages that stand, as "round 1, flip"; those of persons last
    states: np.ndarray  # (K + 1, N), of type int8: position in `STATES` after each stage; at the source, all are kept
    flipped: np.ndarray  # (N,), whether it ends the other way round than its source has it, as some relabelled do
    source: np.ndarray  # (N,), "pool" where the ledger does not say
    strength: np.ndarray  # (N,), as the source has the pair, by the last scores; NaN where it was never scored

    def counts(self) -> np.ndarray:
        """Count the pairs in each state after each stage, `(K + 1, 4)`."""
        return np.stack([np.bincount(states, minlength=len(STATES)) for states in self.states])

    def transitions(self) -> np.ndarray:
        """Count the pairs that go from each state into each other one, `(K, 4, 4)`."""
        size = len(STATES)
        steps = zip(self.states[:-1].astype(int), self.states[1:].astype(int), strict=True)
        moves = [np.bincount(before * size + after, minlength=size**2).reshape(size, size) for before, after in steps]
        return np.stack(moves) if moves else np.zeros((0, size, size), dtype=int)

    def since(self) -> np.ndarray:
        """Return the stage from which on a pair stands as it does at the end, `(N,)`; 0 if from the source on."""
        changed = self.states[1:] != self.states[:-1]
        return np.where(changed, np.arange(1, len(self.states))[:, None], 0).max(axis=0, initial=0)


def read_flow(ledger: CurationLedger) -> Flow:
    """Follow all pairs through a ledger, without what is undone."""
    entries = ledger.standing
    names = ledger.state()["pair_id"].combine_chunks()
    states = np.zeros((len(entries) + 1, len(names)), dtype=np.int8)
    flipped = np.zeros(len(names), dtype=bool)
    source = np.full(len(names), "pool", dtype=object)
    strength = np.full(len(names), np.nan)
    for step, entry in enumerate(entries, 1):
        table = ledger.table(entry)
        places = pc.index_in(table["pair_id"].combine_chunks(), value_set=names).to_numpy()
        turned = table["flipped"].to_numpy()
        is_dropped = pc.equal(table["action"].cast(pa.string()), "drop").to_numpy()
        judged = any(name.startswith("vote_") for name in table.column_names)
        standing = np.where(turned, STATES.index("flipped"), STATES.index("kept"))
        if judged:
            standing = np.full(len(turned), STATES.index("relabelled"))
        states[step] = states[step - 1]
        states[step, places] = np.where(is_dropped, STATES.index("dropped"), standing)
        flipped[places] = turned
        told = table["source"].cast(pa.string())
        source[places] = np.where(told.is_null().to_numpy(), source[places], told.to_numpy())
        if "chosen_0" in table.column_names:
            value = table["strength"].to_numpy()
            strength[places] = np.where(turned, -value, value)
    return Flow(names, ("source", *map(step_title, entries)), states, flipped, source, strength)


def step_title(entry: Mapping[str, Any]) -> str:
    """Name a stage of a round: that the scores decided goes without saying."""
    if CurationLedger.is_manual(entry):
        return "by hand"
    stage = entry["stage"].removesuffix("decide").rstrip("-")
    return f"round {entry['round']}" + (f", {stage}" if stage else "")
