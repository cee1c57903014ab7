"""Figures of the decisions of a run of rounds, in the trackers that `report_to` names.

The trainings report by themselves, each as a run of its own. The decisions, between them, make one run more, with a
step for each decision; step 0 is the pool as it came. No tracker stays open in between: it would take the trainings'
figures for its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from accelerate.utils import patch_environment
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from ..debias.audit import audit_style
from ..debias.style import parts_by
from ..training.config import MultimodalRewardConfig
from ..utils import digest
from .callback_round import curation_metrics
from .curation_run import CurationRun
from .ledger import CurationLedger
from .round_training import close_trackers


_TRUTHS = ("noise_before", "noise_after", "flip_precision", "flip_recall")


def report_decision(run: CurationRun, place: int, counts: Mapping[str, Any]) -> None:
    """Report what the pool is like after a decision, the `place`-th from 1, and before the first what it was like, to
    the trackers that `report_to` names."""
    if not run.training.args.report_to:
        return
    entries = {0: pool_metrics(run, after=0)} if place == 1 else {}
    entries[place] = pool_metrics(run)
    entries[place] |= {f"curation/{name}": counts[name] for name in _TRUTHS if name in counts}
    log_to_trackers(run, entries)


def pool_metrics(run: CurationRun, after: int | None = None) -> dict[str, float]:
    """Return metrics of the pool as the ledger has it, after all rounds or up to one; 0 is the pool as it came."""
    pool, ledger = run.sets.usable("pool"), CurationLedger(run.output_dir / "ledger")
    contents = run.sets.contents("pool")
    known = ledger.labels(run.sets.names("pool"), after, contents=contents)
    sources = cast("Mapping[str | None, np.ndarray]", parts_by(pool, "source"))
    metrics = curation_metrics(known["flipped"], known["kept"], known["strength"], np.arange(len(pool)), sources)
    return metrics | audit_style(ledger.apply(pool, after=after, contents=contents)).metrics()


def log_to_trackers(run: CurationRun, entries: Mapping[int, Mapping[str, float]]) -> None:
    """Hand metrics by step to the trackers."""
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
