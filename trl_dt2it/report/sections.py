"""Sections about a run of rounds: what was trained on what, strengths, the flow of curation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..curation.rounds.config import SET_KINDS
from ..curation.rounds.results import FINAL_NAMES, accuracy_table
from ..evaluation.metrics import wilson
from .figures import histogram
from .flow import STATES, Flow
from .flow_figure import draw_flow
from .page import Section, Table
from .run_folder import RunFolder


MOST_SOURCES = 24  # histograms; a mixture may have more sources than anyone looks at
NO_RUN = "no run of rounds was given (`--run`)."
NOT_DECIDED = "the run has not decided about any pair yet."


def trained(run: RunFolder | None) -> Section:
    """What was trained on what: models, data, counts, versions, command and time."""
    key, title = "run", "What was trained on what"
    if run is None:
        return Section(key, title, missing=NO_RUN)
    record, stages = run.record or {}, run.stages
    seconds = sum(stage["seconds"] for stage in stages.values())
    trainings = {name: one for name, one in stages.items() if "steps" in one["counts"]}
    facts = [("Stages done", f"{len(stages)}, {len(trainings)} trainings"), ("Time", duration(seconds))]
    notes = []
    if record:
        facts += [
            ("Started", record["started"].replace("T", " ").replace("+00:00", " UTC")),
            ("Machine", record["machine"]),
            ("Versions", ", ".join(f"{name} {value}" for name, value in record["versions"].items())),
            *([("Command", record["command"])] if record["command"] else []),
        ]
    else:
        notes.append("The run has no run.json, so its settings, versions and command are not known.")
    tables = _models(run, trainings)
    if record:
        tables += [_sets(record), _settings(record)]
    warnings = (run.summary or {}).get("harm", [])
    return Section(key, title, warnings=warnings, facts=facts, tables=tables, notes=notes)


def _models(run: RunFolder, trainings: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The models that are trained at the end, tested where there is a test set; and those that only score."""
    finals = {stage: stage.removeprefix("final/") for stage in trainings if stage.startswith("final/")}
    for name, one in (run.summary or {}).get("final", {}).items():
        # One that has scored the pool is not trained again at the end.
        finals |= {stage: name for stage in trainings if Path(one["model_dir"]).as_posix().endswith(f"/{stage}")}
    named = {name: stage for stage, name in finals.items()}
    rows = []
    for name in sorted(named, key=list(FINAL_NAMES).index):
        one = trainings[named[name]]
        pairs, *others = _cells(one)
        tested = _tested(run.rewards.get(name)) if run.rewards else []
        rows.append([FINAL_NAMES[name], pairs, *tested, *others, named[name]])
    heads = ("test accuracy", "95 %, Wilson") if run.rewards else ()
    columns = ("trained on", "pairs", *heads, "steps", "time", "stage")
    base = run.record["models"][0]["model_name_or_path"] if run.record else "its base model"
    scoring = [[stage, *_cells(one)] for stage, one in trainings.items() if stage not in finals]
    tables = []
    if rows:
        align = "l" + "r" * (len(columns) - 2) + "l"
        tables.append(Table(f"Reward models, each from {base}", columns, rows, align))
    names, accuracies = accuracy_table((run.summary or {}).get("final", {}))
    if len(names) > 2:  # of several sources
        tables.append(Table("Test accuracy by source", tuple(names), accuracies, "l" + "r" * (len(names) - 1)))
    if scoring:
        columns = ("stage", "pairs", "steps", "time")
        tables.append(Table("Trainings of models that score the pool", columns, scoring, is_folded=bool(rows)))
    return tables


def _cells(stage: Mapping[str, Any]) -> list[str]:
    counts = stage["counts"]
    return [f"{counts['pairs']:,}", f"{counts['steps']:,}", duration(stage["seconds"])]


def _tested(rewards: np.ndarray | None) -> list[str]:
    if rewards is None:
        return ["", ""]
    hits = int((rewards[:, 0] > rewards[:, 1]).sum())
    interval = wilson(hits / len(rewards), len(rewards))
    return [f"{hits / len(rewards):.4f}", f"{interval.low:.4f} to {interval.high:.4f}"]


def _sets(record: Mapping[str, Any]) -> Table:
    rows = []
    for name, specs in record["sets"].items():
        for source, spec in specs.items():
            kind = next((key for key in SET_KINDS if key in spec), "")
            where = _plain(spec.get(kind))
            others = "".join(f", {key} {_plain(value)}" for key, value in spec.items() if key != kind)
            # Rows may say their source themselves.
            size = record["pairs"][name].get(source)
            rows.append([name, source, f"{kind}: {where}{others}", _count(size)])
        if not set(specs) >= set(record["pairs"][name]):
            rows.append([name, "in all", "", _count(sum(record["pairs"][name].values()))])
    return Table("Data", ("set", "source", "rows from", "pairs"), rows, "lllr")


def _settings(record: Mapping[str, Any]) -> Table:
    args = record["training"]["args"]
    names: tuple[str, ...] = (
        "loss_type",
        "learning_rate",
        "lr_scheduler_type",
        "num_train_epochs",
        "max_steps",
        "max_length",
    )
    names += ("per_device_train_batch_size", "gradient_accumulation_steps", "max_pixels", "bf16", "weight_decay")
    rows = [[name, str(args[name])] for name in names if args.get(name) is not None]
    for number, steps in enumerate(record["rounds"], 1):
        for step in steps:
            rules = "; ".join(
                " ".join(
                    f"{key} {value}" if key in ("flip", "keep") else f"{key}={value}" for key, value in rule.items()
                )
                for rule in step["rules"]
            )
            name = f"round {number}" + (f", {step['name']}" if step.get("name") else "")
            rows.append([name, rules])
    return Table(
        "Settings of every training, and rules of the rounds", ("setting", "value"), rows, "ll", is_folded=True
    )


def strengths(run: RunFolder | None, flow: Flow | None) -> Section:
    """Strength histograms of each source before and after curation."""
    key, title = "strength", "Strength before and after"
    if flow is None:
        return Section(key, title, missing=NO_RUN if run is None else NOT_DECIDED)
    counts = Counter(flow.source.tolist())
    turned = np.where(flow.flipped, -flow.strength, flow.strength)
    is_kept = flow.states[-1] != STATES.index("dropped")
    figures, rows = [], []
    for number, (source, count) in enumerate(counts.most_common()):
        inside = (flow.source == source) & ~np.isnan(flow.strength)
        before, after = flow.strength[inside], turned[inside & is_kept]
        if number < MOST_SOURCES and len(before):
            series = {"before": before, "after": after}
            heading = f"{source}, {count:,} pairs"
            figures.append(histogram(f"strength-{number}", heading, series, xlabel="reward of chosen − rejected"))
        rows.append(
            [
                source,
                f"{count:,}",
                _mean(before),
                _negative(before),
                _count(len(after)),
                _mean(after),
                _negative(after),
            ]
        )
    columns = ("source", "pairs", "mean before", "below 0", "kept", "mean after", "below 0")
    notes = []
    if len(counts) > MOST_SOURCES:
        notes.append(f"Figures of the {MOST_SOURCES} largest sources; all {len(counts)} are in the table.")
    return Section(
        key,
        title,
        lead="How much higher the last models that scored a pair put its chosen answer. Below 0, they would rather "
        "have the other one. Before: all pairs as their sources label them; after: kept pairs as they are now.",
        legend=(("outline", "before"), ("filled", "after")),
        figures=figures,
        tables=(Table("By source", columns, rows),),
        notes=notes,
    )


def curation_flow(run: RunFolder | None, flow: Flow | None) -> Section:
    """What became of the pairs, stage by stage."""
    key, title = "flow", "Curation flow"
    if run is None or flow is None:
        return Section(key, title, missing=NO_RUN if run is None else NOT_DECIDED)
    counts = flow.counts()
    there = [place for place, state in enumerate(STATES) if state != "relabelled" or counts[:, place].any()]
    states = [STATES[place] for place in there]
    total = max(1, len(flow.pair_id))
    noise = _noise(run, flow)
    rows = [
        [
            step,
            *(f"{row[place]:,}" for place in there),
            f"{1 - row[STATES.index('dropped')] / total:.1%}",
            *noise.get(step, []),
        ]
        for step, row in zip(flow.steps, counts, strict=True)
    ]
    width = max(map(len, rows))
    columns = ("after", *states, "in the set", "wrong labels")[:width]
    by_source = [
        [source, f"{len(own):,}", *(f"{(own == place).sum():,}" for place in there)]
        for source, own in ((one, flow.states[-1][flow.source == one]) for one in dict.fromkeys(flow.source.tolist()))
    ]
    tables = [Table("Pairs after each stage", columns, [row + [""] * (width - len(row)) for row in rows])]
    tables.append(Table("At the end, by source", ("source", "pairs", *states), by_source))
    reasons = [
        [name, reason, f"{number:,}"]
        for name, stage in run.stages.items()
        if "reasons" in stage["counts"]
        for reason, number in stage["counts"]["reasons"].items()
    ]
    if reasons:
        tables.append(Table("Why", ("stage", "reason", "pairs"), reasons, "llr", is_folded=True))
    return Section(
        key,
        title,
        lead="Each stack is the whole pool: kept pairs stand as their source labels them, flipped ones the other way "
        "round; relabelled ones were brought back by judges, and dropped ones are left out for now. A later round may "
        "decide anew.",
        legend=[
            (mark, state)
            for mark, state in zip(("grey", "solid", "soft", "faint"), STATES, strict=True)
            if state in states
        ],
        figures=(draw_flow(flow),),
        tables=tables,
    )


def _noise(run: RunFolder, flow: Flow) -> dict[str, list[str]]:
    """Shares of wrong labels after each stage, where the truth is known."""
    found = dict[str, list[str]]()
    for name, stage in run.stages.items():
        counts = stage["counts"]
        if "noise_after" in counts:
            number, *parts = name.removeprefix("round-").split("/")
            label = "-".join(part for part in parts if part != "decide")
            found.setdefault("source", [f"{counts['noise_before']:.1%}"])
            found[f"round {number}" + (f", {label}" if label else "")] = [f"{counts['noise_after']:.1%}"]
    return found


def duration(seconds: float) -> str:
    """Seconds in words that are short."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():+.2f}" if len(values) else ""


def _negative(values: np.ndarray) -> str:
    return f"{(values < 0).mean():.1%}" if len(values) else ""
