"""Balancing the style of the constructed data: weights that a stage of the rounds finds once for all trainings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers.utils import logging

from ..data.swapping import with_columns
from ..data.whole_file import whole_file
from ..debias.audit import audit_style
from ..debias.balance import ONE_SIDED, style_weights
from ..debias.style import STYLE_FEATURES
from ..processes import on_main_process


if TYPE_CHECKING:
    from .curation_run import CurationRun

logger = logging.get_logger(__name__)

STAGE = "balance-style"
_WEIGHTS = "weights.parquet"
_DEFAULTS = {"by": "source", "max_weight": 10.0, "features": None}
_KNOWN = (*_DEFAULTS, "one_sided")


def read_balance(given: Mapping[str, Any] | bool | None) -> dict[str, Any] | None:
    """
    How style is to be balanced, out of a configuration file.

    Args:
        given (`Mapping` or `bool`, *optional*):
            `by`, `max_weight`, `features` and `one_sided` of [`~trl_dt2it.debias.balance_style`]; `True` for the
            defaults, by source and with weights up to 10.

    Returns:
        `dict`, *optional*: with defaults filled in; `None` if nothing is to be balanced.

    Raises:
        `ValueError`: if a key or a feature is not known, or a value is out of range.
    """
    if given is None or given is False:
        return None
    options = {} if given is True else given
    if not isinstance(options, Mapping):
        raise ValueError(f"`balance_style` is {given!r}; give true, or by, max_weight and features.")
    if unknown := [key for key in options if key not in _KNOWN]:
        raise ValueError(f"`balance_style` has the unknown key `{unknown[0]}`; known are {', '.join(_KNOWN)}.")
    settings = {**_DEFAULTS, **options}
    if settings["max_weight"] is not None and not settings["max_weight"] > 1:
        raise ValueError(f"`max_weight` of `balance_style` is {settings['max_weight']}; give a number above 1.")
    if settings.get("one_sided", "leave") not in ONE_SIDED:
        known = ", ".join(ONE_SIDED)
        raise ValueError(f"`one_sided` of `balance_style` is {settings['one_sided']!r}; give one of {known}.")
    if unknown := [name for name in settings["features"] or () if name not in STYLE_FEATURES]:
        known = ", ".join(STYLE_FEATURES)
        raise ValueError(f"`balance_style` names the feature {unknown[0]!r}; known are {known}.")
    return settings


def balance_base(run: CurationRun, folder: Path) -> dict[str, Any]:
    """
    Finds the weights, and audits style without and with them.

    Args:
        run ([`CurationRun`]):
            The run, which says how in `balance`.
        folder (`Path`):
            Folder of the stage, which gets `weights.parquet`, `style_before.json` and `style_after.json`.

    Returns:
        `dict`: `pairs`, `effective_pairs` (Kish), `one_sided_pairs`, whose style leans one way only, `small_weights`,
        and the `auc` of a probe of style before and after, where there are enough pairs to tell.
    """
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
    """The constructed data with the weights that the stage found; as it came if nothing is balanced."""
    rows = run.sets.usable("base")
    if run.balance is None:
        return rows
    return _weighted(rows, pq.read_table(run.output_dir / STAGE / _WEIGHTS)["weight"].combine_chunks())


def _weighted(rows: Dataset, weight: Any) -> Dataset:
    return with_columns(rows, {"weight": pa.array(weight, pa.float64())})
