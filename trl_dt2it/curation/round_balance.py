"""Balancing the style of the constructed data: weights that a stage of the rounds finds once for all trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers.utils import logging

from ..data.mixing import with_columns
from ..debias.audit import audit_style
from ..debias.balance import style_weights
from ..utils import on_main_process, whole_file
from .curation_run import CurationRun


logger = logging.get_logger(__name__)

STAGE = "balance-style"
_WEIGHTS = "weights.parquet"


def balance_base(run: CurationRun, folder: Path) -> dict[str, Any]:
    """Find the weights of the base as `balance` says, write them and audits of style without and with them into the
    folder of the stage, and return counts."""
    rows = run.sets.usable("base")

    def work() -> dict[str, Any]:
        weight, report = style_weights(rows, **(run.balance or {}))
        (logger.warning if report.one_sided else logger.info)(report.summary())
        with whole_file(folder / _WEIGHTS) as part:
            pq.write_table(pa.table({"weight": weight}), part)
        counts: dict[str, Any] = {"pairs": len(rows), "effective_pairs": round(report.effective_size, 1)}
        counts["one_sided_pairs"] = sum(one.num_pairs for one in report.one_sided)
        counts["small_weights"] = report.num_small
        for when, one in (("before", rows), ("after", _weighted(rows, weight))):
            audit = audit_style(one)
            with whole_file(folder / f"style_{when}.json") as part:
                part.write_text(audit.to_json() + "\n", encoding="utf-8")
            counts[f"auc_{when}"] = audit.overall.auc
        return counts

    return on_main_process(work)


def balanced_base(run: CurationRun) -> Dataset:
    """Return the constructed data with the weights that the stage found, or as it came if nothing is balanced."""
    rows = run.sets.usable("base")
    if run.balance is None:
        return rows
    return _weighted(rows, pq.read_table(run.output_dir / STAGE / _WEIGHTS)["weight"].combine_chunks())


def _weighted(rows: Dataset, weight: Any) -> Dataset:
    return with_columns(rows, {"weight": pa.array(weight, pa.float64())})
