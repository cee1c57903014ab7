"""Results of a run: its record, its metrics in trackers, and its summary."""

from __future__ import annotations

import copy
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from ...data.columns import column_of
from ...data.contents import pair_contents
from ...debias.audit import audit_style
from ...debias.style import parts_by
from ...scoring.shards import read_scores
from ...training.config import MultimodalRewardConfig
from ...training.model_card import run_command
from ...utils import digest, printable, read_json, write_json
from ..callback import curation_metrics
from ..ledger import CurationLedger
from .config import CurationRun
from .training import close_trackers


RUN_FILE = "run.json"

PACKAGES = ("trl-dt2it", "trl", "transformers", "torch", "accelerate", "datasets", "peft")


def record_run(run: CurationRun, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write `run.json` into the folder of a run, with its command line but for secrets, and return what it holds."""
    args, earlier = run.training.args, read_record(run.output_dir)
    record = {
        "command": run_command(PartialState().num_processes, argv),
        # Run again after a kill, it is still the same run.
        "started": datetime.now(UTC).isoformat(timespec="seconds") if earlier is None else earlier["started"],
        "machine": machine(),
        "versions": versions(),
        "sets": {name: dict(specs) for name, specs in run.sets.specs.items()},
        "pairs": {name: _by_source(run.sets.raw(name)) for name in run.sets.specs},
        "images": {"image_root": args.image_root, "max_image_pixels": args.max_image_pixels},
        "models": [{"model_name_or_path": one.name_or_path, "seed": one.seed} for one in run.models],
        "rounds": [[step.settings() for step in steps] for steps in run.rounds],
        "balance_style": run.balance,
        "training": run.training.settings(),
    }
    write_json(run.output_dir / RUN_FILE, record, default=str)
    return record


def _by_source(rows: Dataset) -> dict[str, int]:
    return dict(Counter(map(str, column_of(rows, "source").to_pylist())).most_common())


def read_record(directory: str | os.PathLike) -> dict[str, Any] | None:
    """Read what [`record_run`] wrote; `None` if it has not."""
    return read_json(Path(directory) / RUN_FILE)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine() -> str:
    """Describe the hardware in a few words."""
    count = PartialState().num_processes
    processes = f"{count} process" + ("es" if count > 1 else "")
    if PartialState().device.type == "cuda":
        return f"{processes}, {torch.cuda.get_device_name()}"
    return f"{processes}, {os.cpu_count()} CPU cores, {sys.platform} {platform.machine()}"


_TRUTHS = ("noise_before", "noise_after", "flip_precision", "flip_recall")


def report_decision(run: CurationRun, place: int, counts: Mapping[str, Any]) -> None:
    """Report what the pool is like after a decision, the `place`-th from 1, and before the first what it was like, to
    the trackers that `report_to` names.
    """
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


FINAL_NAMES = {
    "unbalanced": "base data as it came",
    "base": "base data only",
    "uncurated": "+ uncurated",
    "curated": "+ curated",
    "oracle": "+ true labels (oracle)",
}

MOST_AUDITED = 20_000  # of a larger pool so many are drawn: enough for the third digit, and some seconds

# Less than this, of an accuracy on one source or of a leakage, is not called harm.
LEAST_CHANGE = 0.01

GAINS = (("gain by balancing style", "base", "unbalanced"), ("gain by curation", "curated", "uncurated"))


def label_noise(pool: Dataset, flipped: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """How many labels of a pool are wrong, where the truth is known.

    Shapes: `flipped, kept` `(N,)` `bool`.
    """
    if "is_flipped" not in pool.column_names:
        return {}
    wrong = column_of(pool, "is_flipped").to_numpy(zero_copy_only=False).astype(bool)
    found = float((wrong & flipped).sum())
    return {
        "noise_before": round(float(wrong.mean()), 6),
        "noise_after": round(float((wrong ^ flipped)[kept].mean()) if kept.any() else 0.0, 6),
        "flip_precision": round(found / max(1, int(flipped.sum())), 6),
        "flip_recall": round(found / max(1, int(wrong.sum())), 6),
    }


def accuracy(folder: Path, dataset: Dataset) -> dict[str, float]:
    """Share of pairs whose chosen answer has the higher reward; a tie is wrong."""
    table = read_scores(folder)
    right = table["chosen"].to_numpy() > table["rejected"].to_numpy()
    source = column_of(dataset, "source").take(table["row"]).to_numpy(zero_copy_only=False)
    names = sorted({str(name) for name in source})
    parts = {f"accuracy/{name}": float(right[source == name].mean()) for name in names if len(names) > 1}
    return {"accuracy": float(right.mean()), **parts}


def audit_pool(
    pool: Dataset, ledger: CurationLedger | None, contents: Callable[[Dataset], pa.Table] = pair_contents
) -> dict[str, dict[str, Any]]:
    """Audit the style of a pool as its sources label it, and as a ledger has it."""
    if len(pool) > MOST_AUDITED:
        pool = pool.select(np.sort(np.random.default_rng(0).choice(len(pool), MOST_AUDITED, replace=False)))
    audits = {"before": asdict(audit_style(pool))}
    if ledger is not None:
        audits["after"] = asdict(audit_style(ledger.apply(pool, contents=contents(pool))))
    return audits


def harm(final: Mapping[str, Mapping[str, Any]], audits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name what the curated pool has made worse: the test accuracy, of all pairs or of a source, below that of the
    base alone; or the style leakage of a source.
    """
    found = []
    base, curated = (final.get(name, {}) for name in ("base", "curated"))
    for key in (name for name in base if name.startswith("accuracy") and name in curated):
        fall = base[key] - curated[key]
        if fall <= (0 if key == "accuracy" else LEAST_CHANGE):
            continue
        pairs = "of the test pairs" if key == "accuracy" else f"of the test pairs of {key.removeprefix('accuracy/')!r}"
        found.append(
            f"The model with the curated pool is right in {curated[key]:.4f} {pairs}, that of the base alone in "
            f"{base[key]:.4f}: the pool does harm there; leave it out, or look for the source that does."
        )
    before, after = (audits.get(when, {"sources": {}})["sources"] for when in ("before", "after"))
    for source in sorted(set(before) & set(after)):
        was, now = before[source], after[source]
        if was["auc"] is None or now["auc"] is None:
            continue
        if now["interval"][0] > was["auc"] and now["auc"] - was["auc"] > LEAST_CHANGE:
            found.append(
                f"Style tells more of the labels of {source!r} after curation than before (leakage {was['auc']:.3f} "
                f"to {now['auc']:.3f}): either wrong labels hid it, or the model follows style; look at what was "
                "flipped there."
            )
    return found


def summarise_run(run: CurationRun, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a finished run."""
    counts = {name: record["counts"] for name, record in records.items()}
    rounds = {name: one for name, one in counts.items() if name.endswith(("/decide", "/judge"))}
    final = {}
    for name in run.final:
        stage = run.final_stage(name)
        final[name] = {
            "model_dir": str(run.output_dir / stage),
            "pairs": counts[stage]["pairs"],
            "steps": counts[stage]["steps"],
            **{key: value for key, value in counts.get(f"test/{name}", {}).items() if key.startswith("accuracy")},
        }
    audits = audit_pool(
        run.sets.usable("pool"), CurationLedger(run.output_dir / "ledger"), lambda _: run.sets.contents("pool")
    )
    shown = ("auc", "interval", "note")
    style = {
        when: {source: {key: part[key] for key in shown} for source, part in audit["sources"].items()}
        for when, audit in audits.items()
    }
    return {
        "output_dir": str(run.output_dir),
        "models": [{"model_name_or_path": one.name_or_path, "seed": one.seed} for one in run.models],
        "pool_pairs": counts[list(rounds)[0]]["pairs"],
        "rounds": rounds,
        "final": final,
        "style": style,
        "harm": harm(final, audits),
        "seconds": round(sum(record["seconds"] for record in records.values()), 1),
    }


def show_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what came of a run."""
    console = console or Console()
    rounds = list(summary["rounds"].items())
    has_truth = "noise_after" in rounds[0][1]
    table = Table("decision", title=f"Pool of {summary['pool_pairs']:,} pairs")
    for column in ("flipped", "kept", *(("wrong labels",) if has_truth else ())):
        table.add_column(column, justify="right")
    if has_truth:
        table.add_row("as it came", "0", f"{summary['pool_pairs']:,}", f"{rounds[0][1]['noise_before']:.1%}")
    for name, one in rounds:
        noise = [f"{one['noise_after']:.1%}"] if has_truth else []
        table.add_row(name, f"{one['flipped']:,}", f"{one['kept']:,}", *noise)
    console.print(table)
    models = summary["final"]
    heads, rows = accuracy_table(models)
    table = Table(heads[0], "pairs", title="Reward models" if len(heads) == 1 else "Test accuracy of reward models")
    for column in heads[1:]:
        table.add_column(Text(printable(column)), justify="right")  # the name of a source
    pairs = [f"{one['pairs']:,}" for one in models.values()]
    fallen = [
        name in models["curated"] and models["curated"][name] < models["base"][name]
        for name in list(models.values())[0]
        if name.startswith("accuracy") and {"base", "curated"} <= set(models)
    ]
    for place, (name, *cells) in enumerate(rows):
        if name == FINAL_NAMES["curated"] and any(fallen):
            cells = [
                f"[bold red]{cell}[/]" if is_worse else cell for cell, is_worse in zip(cells, fallen, strict=True)
            ]
        is_gain = place >= len(pairs)
        table.add_row(name, "" if is_gain else pairs[place], *cells, style="bold" if is_gain else None)
    console.print(table)
    for sentence in summary.get("harm", []):
        console.print(sentence, style="bold red", markup=False, highlight=False)


def accuracy_table(models: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Test accuracies of final models, over all pairs and by source, and what was gained."""
    measured = [name for one in list(models.values())[:1] for name in one if name.startswith("accuracy")]
    heads = ["trained on", *("all" if name == "accuracy" else name.removeprefix("accuracy/") for name in measured)]
    rows = [[FINAL_NAMES[name], *(f"{one[key]:.4f}" for key in measured)] for name, one in models.items()]
    for name, after, before in GAINS:
        if measured and {before, after} <= set(models):
            rows.append([name, *(f"{models[after][key] - models[before][key]:+.4f}" for key in measured)])
    return heads, rows
