"""Results of a run: its record, its metrics in trackers, and its summary."""

from __future__ import annotations

import copy
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from ...data.cards import run_command
from ...data.columns import column_of
from ...debias.audit import audit_style
from ...debias.style import parts_by
from ...scoring.shards import read_scores
from ...training.config import MultimodalRewardConfig
from ...training.setup import close_trackers
from ...utils import digest, printable, read_json, write_json
from ..callback import curation_metrics
from ..health import LEAST_CHANGE, audit_pool, style_rises
from ..ledger import CurationLedger
from .config import CurationRun


RUN_FILE = "run.json"
PACKAGES = ("trl-dt2it", "trl", "transformers", "torch", "accelerate", "datasets", "peft")

FINAL_NAMES = {
    "unbalanced": "base data as it came",
    "base": "base data only",
    "uncurated": "+ uncurated",
    "curated": "+ curated",
    "oracle": "+ true labels (oracle)",
}

GAINS = (("gain by balancing style", "base", "unbalanced"), ("gain by curation", "curated", "uncurated"))

_TRUTHS = ("noise_before", "noise_after", "flip_precision", "flip_recall")


def record_run(run: CurationRun, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write `run.json`, with the command line without secrets, into the folder of a run, and return its content."""
    args, earlier = run.training.args, read_record(run.output_dir)
    record = {
        "command": run_command(PartialState().num_processes, argv),
        # A run that continues after a kill is still the same run.
        "started": datetime.now(UTC).isoformat(timespec="seconds") if earlier is None else earlier["started"],
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "sets": {name: dict(specs) for name, specs in run.sets.specs.items()},
        "pairs": {
            name: dict(Counter(map(str, column_of(run.sets.raw(name), "source").to_pylist())).most_common())
            for name in run.sets.specs
        },
        "images": {"image_root": args.image_root, "max_image_pixels": args.max_image_pixels},
        "models": [{"model_name_or_path": one.name_or_path, "seed": one.seed} for one in run.models],
        "rounds": [[step.settings() for step in steps] for steps in run.rounds],
        "labels": run.labels,
        "balance_style": run.balance,
        "training": run.training.settings(),
    }
    write_json(run.output_dir / RUN_FILE, record, default=str)
    return record


def read_record(directory: str | os.PathLike) -> dict[str, Any] | None:
    """Read `run.json` of a run; `None` if there is none."""
    return read_json(Path(directory) / RUN_FILE)


def machine() -> str:
    """Describe the hardware in a few words."""
    count, cores = PartialState().num_processes, f"{os.cpu_count()} CPU cores, {sys.platform} {platform.machine()}"
    on = torch.cuda.get_device_name() if PartialState().device.type == "cuda" else cores
    return f"{count} process{'es' if count > 1 else ''}, {on}"


def report_decision(run: CurationRun, place: int, counts: Mapping[str, Any]) -> None:
    """Log the metrics of the pool after a decision, the `place`-th from 1, and before the first, to the trackers."""
    if not run.training.args.report_to:
        return
    entries = {0: pool_metrics(run, after=0)} if place == 1 else {}
    entries[place] = pool_metrics(run) | {f"curation/{name}": counts[name] for name in _TRUTHS if name in counts}
    args: MultimodalRewardConfig = copy.copy(run.training.args)
    args.run_name = f"{args.run_name or run.output_dir.name}-curation"
    # The same run and folder at every decision, also after a kill, beside those of the trainings.
    name, folder = digest(str(run.output_dir.resolve()))[:16], str(run.output_dir / "runs" / "curation")
    variables = {"wandb_run_id": name, "wandb_resume": "allow", "wandb_log_model": "false"}
    with patch_environment(tensorboard_logging_dir=folder, **variables):
        control = TrainerControl()
        for tracker in [make() for make in get_reporting_integration_callbacks(args.report_to)]:
            tracker.on_train_begin(args, TrainerState(), control, model=None)
            for step, metrics in entries.items():
                tracker.on_log(args, TrainerState(global_step=step), control, model=None, logs=dict(metrics))
            tracker.on_train_end(args, TrainerState(), control, model=None)
        close_trackers(args)


def pool_metrics(run: CurationRun, after: int | None = None) -> dict[str, float]:
    """Compute the metrics of the pool after a round of the ledger, by default the last; 0 is the pool as it came."""
    pool, contents = run.sets.usable("pool"), run.sets.contents("pool")
    ledger = CurationLedger(run.output_dir / "ledger")
    known = ledger.labels(run.sets.names("pool"), after, contents=contents)
    sources = cast("Mapping[str | None, np.ndarray]", parts_by(pool, "source"))
    metrics = curation_metrics(known["flipped"], known["kept"], known["strength"], np.arange(len(pool)), sources)
    return metrics | audit_style(ledger.apply(pool, after=after, contents=contents)).metrics()


def wrong_labels(pool: Dataset) -> np.ndarray | None:
    """Return a mask of the labels of a pool that are wrong; `None` where the truth is not known."""
    if "is_flipped" not in pool.column_names:
        return None
    return column_of(pool, "is_flipped").to_numpy(zero_copy_only=False).astype(bool)


def label_noise(pool: Dataset, flipped: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Measure the wrong labels of a pool before and after curation; empty where the truth is not known."""
    wrong = wrong_labels(pool)
    if wrong is None:
        return {}
    fixed = float((wrong & flipped).sum())
    return {
        "noise_before": round(float(wrong.mean()), 6),
        "noise_after": round(float((wrong ^ flipped)[kept].mean()) if kept.any() else 0.0, 6),
        "flip_precision": round(fixed / max(1, int(flipped.sum())), 6),
        "flip_recall": round(fixed / max(1, int(wrong.sum())), 6),
    }


def accuracy(folder: Path, dataset: Dataset) -> dict[str, float]:
    """Compute the share of pairs whose chosen answer has the higher reward; a tie is wrong."""
    table = read_scores(folder)
    right = table["chosen"].to_numpy() > table["rejected"].to_numpy()
    source = column_of(dataset, "source").take(table["row"]).to_numpy(zero_copy_only=False)
    names = sorted({str(name) for name in source})
    parts = {f"accuracy/{name}": float(right[source == name].mean()) for name in names if len(names) > 1}
    return {"accuracy": float(right.mean()), **parts}


def harm(final: Mapping[str, Mapping[str, Any]], audits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List what the curated pool has made worse: test accuracies, against the base alone, and style leakages."""
    sentences = []
    base, curated = (final.get(name, {}) for name in ("base", "curated"))
    for key in (name for name in base if name.startswith("accuracy") and name in curated):
        if base[key] - curated[key] > (0 if key == "accuracy" else LEAST_CHANGE):
            of = "" if key == "accuracy" else f" of {key.removeprefix('accuracy/')!r}"
            sentences.append(
                f"The model with the curated pool is right in {curated[key]:.4f} of the test pairs{of}, that of the "
                f"base alone in {base[key]:.4f}: leave the pool out, or look for the source that does harm."
            )
    return sentences + style_rises(audits)


def summarize_run(run: CurationRun, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Collect the figures of a finished run."""
    counts = {name: record["counts"] for name, record in records.items()}
    rounds = {name: one for name, one in counts.items() if name.endswith(("/decide", "/judge"))}
    final: dict[str, dict[str, Any]] = {}
    for name in run.final:
        stage, tested = run.final_stage(name), counts.get(f"test/{name}", {})
        final[name] = {"model_dir": str(run.output_dir / stage)}
        final[name] |= {key: counts[stage][key] for key in ("pairs", "steps")}
        final[name] |= {key: value for key, value in tested.items() if key.startswith("accuracy")}
    ledger = CurationLedger(run.output_dir / "ledger")
    audits = audit_pool(run.sets.usable("pool"), ledger, lambda _: run.sets.contents("pool"))
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
    """Print the figures of a finished run."""
    console = console or Console()
    rounds = list(summary["rounds"].items())
    has_truth = "noise_after" in rounds[0][1]
    table = Table("decision", title=f"Pool of {summary['pool_pairs']:,} pairs")
    for column in ("flipped", "kept", *(("wrong labels",) if has_truth else ())):
        table.add_column(column, justify="right")
    if has_truth:
        table.add_row("as it came", "0", f"{summary['pool_pairs']:,}", f"{rounds[0][1]['noise_before']:.1%}")
    for name, counts in rounds:
        noise = [f"{counts['noise_after']:.1%}"] if has_truth else []
        table.add_row(name, f"{counts['flipped']:,}", f"{counts['kept']:,}", *noise)
    console.print(table)
    for name, counts in rounds:
        if "curve" in counts:
            console.print(tell_judging(name, counts), markup=False, highlight=False)
    models = summary["final"]
    heads, rows = accuracy_table(models)
    table = Table(heads[0], "pairs", title="Reward models" if len(heads) == 1 else "Test accuracy of reward models")
    for column in heads[1:]:
        table.add_column(Text(printable(column)), justify="right")  # the name of a source
    for (name, *cells), kind in zip_longest(rows, models):
        if kind == "curated" and "base" in models:
            keys = [key for key in models["base"] if key.startswith("accuracy")]
            is_worse = [models["curated"][key] < models["base"][key] for key in keys]
            cells = [f"[bold red]{cell}[/]" if worse else cell for cell, worse in zip(cells, is_worse, strict=True)]
        pairs = "" if kind is None else f"{models[kind]['pairs']:,}"
        table.add_row(name, pairs, *cells, style="bold" if kind is None else None)
    console.print(table)
    for sentence in summary.get("harm", []):
        console.print(sentence, style="bold red", markup=False, highlight=False)


def tell_judging(name: str, counts: Mapping[str, Any]) -> str:
    """Tell in a sentence what the calls of a stage to judges did, after each quarter of them."""
    curve, points = counts["curve"], np.linspace(0, len(counts["curve"]["calls"]) - 1, 5).round().astype(int)
    is_known = "noise" in curve
    values = [curve["noise" if is_known else "changed"][point] for point in points]
    shown = " to ".join(f"{value:.1%}" if is_known else f"{value:,}" for value in values)
    return (
        f"{name}: {curve['calls'][-1]:,} calls in the order {counts['order']}, judges right in about "
        f"{counts['judge_accuracy']:.0%}, "
        f"{'wrong labels' if is_known else 'labels changed'} {shown}; not asked: "
        f"{counts['not asked (budget)']:,} pairs for lack of budget, {counts['not asked (no gain)']:,} without gain."
    )


def accuracy_table(models: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Tabulate the test accuracies of final models, over all pairs and by source, and the gains."""
    measured = [name for name in next(iter(models.values()), {}) if name.startswith("accuracy")]
    heads = ["trained on", *("all" if name == "accuracy" else name.removeprefix("accuracy/") for name in measured)]
    rows = [[FINAL_NAMES[name], *(f"{one[key]:.4f}" for key in measured)] for name, one in models.items()]
    for name, after, before in GAINS:
        if measured and {before, after} <= set(models):
            rows.append([name, *(f"{models[after][key] - models[before][key]:+.4f}" for key in measured)])
    return heads, rows
