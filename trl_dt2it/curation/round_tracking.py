"""Figures of the decisions of a run of rounds, in the trackers that `report_to` names.

The trainings report by themselves, each as a run of its own. The decisions, between them, make one run more, with a
step for each decision; step 0 is the pool as it came. No tracker stays open in between: it would take the trainings'
figures for its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from accelerate.utils import patch_environment
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks, is_wandb_available

from ..debias.audit import audit_style
from ..debias.pair_style import parts_by
from ..printable import digest
from ..reward_config import MultimodalRewardConfig
from .applying import apply_state
from .callback_round import curation_metrics
from .ledger import CurationLedger
from .ledger_tables import state_of


if TYPE_CHECKING:
    from .curation_run import CurationRun

_TRUTHS = ("noise_before", "noise_after", "flip_precision", "flip_recall")


def report_decision(run: CurationRun, place: int, counts: Mapping[str, Any]) -> None:
    """
    Reports what the pool is like after a decision, and before the first one what it was like.

    Args:
        run ([`CurationRun`]):
            The run. Without `report_to`, nothing is done.
        place (`int`):
            The how-manyth decision it was, from 1.
        counts (`Mapping`):
            What came of it, as in `summary.json`.
    """
    if not run.training.args.report_to:
        return
    entries = {0: pool_metrics(run, after=0)} if place == 1 else {}
    entries[place] = pool_metrics(run)
    entries[place] |= {f"curation/{name}": counts[name] for name in _TRUTHS if name in counts}
    log_to_trackers(run, entries)


def pool_metrics(run: CurationRun, after: int | None = None) -> dict[str, float]:
    """
    Figures of the pool as the ledger has it.

    Args:
        run ([`CurationRun`]):
            The run.
        after (`int`, *optional*):
            Only what was decided up to and with this round; 0 gives the pool as it came.

    Returns:
        `dict[str, float]`: as [`~trl_dt2it.curation.callback_round.curation_metrics`] and
        [`~trl_dt2it.debias.StyleReport.metrics`] give them.
    """
    pool, ledger = run.sets.usable("pool"), CurationLedger(run.output_dir / "ledger")
    state = ledger.state(after, contents=run.sets.contents("pool"))
    known, rows = state_of(run.sets.names("pool"), state), np.arange(len(pool))
    flipped, kept = known["flipped"].astype(bool), known["kept"].astype(bool)
    sources = cast("Mapping[str | None, np.ndarray]", parts_by(pool, "source"))
    metrics = curation_metrics(flipped, kept, known["strength"], rows, sources)
    return metrics | audit_style(apply_state(pool, state)).metrics()


def log_to_trackers(run: CurationRun, entries: Mapping[int, Mapping[str, float]]) -> None:
    """
    Hands figures to the trackers.

    Args:
        run ([`CurationRun`]):
            The run.
        entries (`Mapping[int, Mapping[str, float]]`):
            Figures by step.
    """
    args: MultimodalRewardConfig = copy.copy(run.training.args)
    args.run_name = f"{args.run_name or run.output_dir.name}-curation"
    # The same run and folder again at every decision, also when the run of rounds goes on after a kill.
    name = digest(str(run.output_dir.resolve()))[:16]
    folder = run.output_dir / "runs" / "curation"
    variables = {"wandb_run_id": name, "wandb_resume": "allow", "wandb_log_model": "false"}
    with patch_environment(tensorboard_logging_dir=str(folder), **variables):
        trackers: list[TrainerCallback] = [one() for one in get_reporting_integration_callbacks(args.report_to)]
        control = TrainerControl()
        for tracker in trackers:
            tracker.on_train_begin(args, TrainerState(), control, model=None)
            for step, metrics in entries.items():
                tracker.on_log(args, TrainerState(global_step=step), control, model=None, logs=dict(metrics))
            tracker.on_train_end(args, TrainerState(), control, model=None)
        close_trackers(args)


def close_trackers(args: MultimodalRewardConfig) -> None:
    """
    Ends the run that Weights & Biases keeps open after a training, so that the next one gets its own.

    Args:
        args ([`MultimodalRewardConfig`]):
            Its `report_to` says which trackers there are.
    """
    if "wandb" in (args.report_to or ()) and is_wandb_available():
        import wandb

        wandb.finish()
