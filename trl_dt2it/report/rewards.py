"""Sections about rewards: how they are distributed, and whether a model wins as often as it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..curation.rounds.results import FINAL_NAMES
from .calibration import Calibration, calibrate
from .evaluations import Evaluation
from .figures import histogram, reliability
from .page import Section, Table
from .run_folder import RunFolder


WHY_NOT = "no final model of a run was scored on a test set, and no scores lie beside an evaluation."


def scored_sets(run: RunFolder | None, evaluations: Sequence[Evaluation]) -> dict[str, np.ndarray]:
    """
    All rewards of which the right answer is known.

    Args:
        run ([`RunFolder`], *optional*):
            A run, with its final models on the test set.
        evaluations (`Sequence[Evaluation]`):
            Evaluations, with the scores of their benchmarks.

    Returns:
        `dict[str, np.ndarray]`: rewards of chosen and rejected, `(n, 2)`, by what they are of.
    """
    found = {}
    for name, rewards in ({} if run is None else run.rewards).items():
        found[f"Test set, {FINAL_NAMES.get(name, name)}"] = rewards
    for evaluation in evaluations:
        model = f", {evaluation.model}" if len(evaluations) > 1 or found else ""
        found |= {f"{benchmark}{model}": scores for benchmark, scores in evaluation.scores.items()}
    return found


def reward_distributions(sets: Mapping[str, np.ndarray]) -> Section:
    """Rewards of chosen and of rejected answers."""
    key, title = "rewards", "Rewards"
    if not sets:
        return Section(key, title, missing=WHY_NOT)
    figures, rows = [], []
    for number, (name, rewards) in enumerate(sets.items()):
        series = {"rejected": rewards[:, 1], "chosen": rewards[:, 0]}
        figures.append(histogram(f"rewards-{number}", name, series, xlabel="reward", zero=False))
        right = (rewards[:, 0] > rewards[:, 1]).mean()
        means = [f"{values.mean():+.2f} ± {values.std():.2f}" for values in (rewards[:, 0], rewards[:, 1])]
        rows.append([name, f"{len(rewards):,}", *means, f"{right:.4f}"])
    columns = ("rewards of", "pairs", "chosen", "rejected", "accuracy")
    return Section(
        key,
        title,
        lead="How high the models score chosen and rejected answers. Only differences between answers to one prompt "
        "mean something.",
        legend=(("outline", "rejected"), ("filled", "chosen")),
        figures=figures,
        tables=(Table("Mean and standard deviation", columns, rows),),
    )


def calibration(sets: Mapping[str, np.ndarray]) -> Section:
    """Predicted win probability against the observed share."""
    key, title = "calibration", "Calibration"
    found = {name: calibrate(rewards[:, 0], rewards[:, 1]) for name, rewards in sets.items()}
    found = {name: one for name, one in found.items() if one.count}
    if not found:
        return Section(key, title, missing=WHY_NOT)
    figures = [reliability(f"calibration-{number}", *one) for number, one in enumerate(found.items())]
    summary = [[name, f"{one.count:,}", f"{one.ties:,}", f"{one.error:.3f}"] for name, one in found.items()]
    columns = ("rewards of", "pairs", "ties", "expected calibration error")
    return Section(
        key,
        title,
        lead="Of pairs in which a model gives its favourite answer a win probability of p, which is the sigmoid of "
        "the difference of the rewards, a share of p should be labelled so. Points below the line: the model is "
        "surer than it should be.",
        legend=(("dot", "share of a bin, with its 95 % interval"), ("dashed", "as predicted")),
        figures=figures,
        tables=(Table("In short", columns, summary), *(_bins(name, one) for name, one in found.items())),
    )


def _bins(name: str, found: Calibration) -> Table:
    rows = []
    for one in found.bins:
        if one.predicted is None or one.observed is None or one.interval is None:
            rows.append([f"{one.low:.2f} to {one.high:.2f}", "0", "", "", ""])
            continue
        interval = f"{one.interval.low:.3f} to {one.interval.high:.3f}"
        rows.append(
            [
                f"{one.low:.2f} to {one.high:.2f}",
                f"{one.count:,}",
                f"{one.predicted:.3f}",
                f"{one.observed:.3f}",
                interval,
            ]
        )
    columns = ("predicted from", "pairs", "mean predicted", "observed", "95 %, Wilson")
    return Table(f"Bins: {name}", columns, rows, is_folded=True)
