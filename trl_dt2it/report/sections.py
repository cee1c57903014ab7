"""The call that writes a report, and its sections in the order of the page."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset

from ..curation.health import MOST_AUDITED, audit_pool, style_rises
from ..curation.rounds.config import SET_KINDS, Loaders
from ..curation.rounds.results import FINAL_NAMES, accuracy_table
from ..curation.rounds.sets import BALANCE
from ..data.contents import pair_contents
from ..data.rows import SIDES
from ..debias.reports import BlindNgram
from ..evaluation.looking import COLUMNS, LOOKING, NOTE, SHOWN, LookingReport
from ..evaluation.metrics import wilson
from ..evaluation.results import INTERVALS, EvalResult, published_scores
from ..utils import whole_file
from .figures import (
    STATES,
    Figure,
    Flow,
    accuracies,
    bars,
    calibrate,
    curve,
    draw_flow,
    histogram,
    read_flow,
    reliability,
    step_title,
)
from .gallery import gallery_items
from .health_section import health_section
from .page import RunFolder, Section, Table, read_run_folder, render, stack_rewards


_EVALUATION = "give the evaluation.json of recipes/evaluate.py"
MOST_FEATURES = 10
MOST_SOURCES = 24  # histograms; a mixture may have more sources than anyone looks at

_WEIGHTED = "Of the constructed data, weighted."

NO_RUN = "no run of rounds was given (`--run`)."
NOT_DECIDED = "the run has not decided about any pair yet."
NOT_SCORED = "no final model of a run was scored on a test set, and no scores lie beside an evaluation."

# Arguments of the trainings that the page shows.
_ARGUMENTS = (
    *("loss_type", "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "max_length"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_pixels", "bf16", "weight_decay"),
)


def write_report(
    output: str | os.PathLike,
    *,
    run: str | os.PathLike | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
    style_before: str | os.PathLike | None = None,
    style_after: str | os.PathLike | None = None,
    blind: str | os.PathLike | None = None,
    pool: Dataset | None = None,
    loaders: Loaders | None = None,
    gallery: int = 300,
    title: str | None = None,
) -> Path:
    """
    Write a report: one HTML file that is complete and fetches nothing.

    Args:
        output (`str` or `os.PathLike`):
            Path of the file.
        run (`str` or `os.PathLike`, *optional*):
            Folder of a run of `recipes/dt2it.py`, finished or not.
        evaluations (sequence of `str` or `os.PathLike`, *optional*):
            Each an `evaluation.json` of `recipes/evaluate.py`, beside which scores may lie.
        style_before, style_after (`str` or `os.PathLike`, *optional*):
            Audits of style before and after curation, from `StyleReport.to_json`; by default those in the run's
            folder, or else of its pool.
        blind (`str` or `os.PathLike`, *optional*):
            Audit without images, from `BlindReport.to_json` or `trl-dt2it audit --blind`.
        pool (`Dataset`, *optional*):
            The run's noisy set with `pair_id`; by default it is read as the run has read it.
        loaders (`Mapping[str, Callable]`, *optional*):
            Loaders of sources of the run's recipe, such as [`trl_dt2it.demo.digits.DEMO_LOADERS`].
        gallery (`int`, *optional*, defaults to `300`):
            Most pairs in the gallery, half of them the flips of the largest reward margins.
        title (`str`, *optional*):
            Title of the page.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: if there is nothing to report on, or a file has the wrong content.
    """
    if run is None and not evaluations and style_before is style_after is blind is None:
        raise ValueError("There is nothing to report on; give `run`, `evaluations`, or an audit of style or text.")
    folder = None if run is None else read_run_folder(Path(run), pool, loaders)
    read = [read_evaluation(path) for path in evaluations]
    ledger = None if folder is None else folder.ledger
    flow = None if ledger is None else read_flow(ledger)
    flow = flow if flow is not None and len(flow.pair_id) else None  # all of it may be undone
    sets = scored_sets(folder, read)
    audits = read_audits(folder, style_before, style_after)
    pairs, items = _gallery(folder, flow, gallery)
    health, looking = health_section(ledger), looking_section(read)
    sections = [
        *([] if health is None else [health]),
        trained(folder),
        margins(folder, flow),
        style_leakage(*audits),
        *([] if blind is None else [blind_accuracy(read_blind(blind))]),
        curation_flow(folder, flow),
        reward_distributions(sets),
        calibration(sets),
        benchmarks(read),
        *([] if looking is None else [looking]),
        pairs,
    ]
    title, subtitle = title or _title(folder, read), _subtitle(folder, flow)
    page = render(title, sections, subtitle=subtitle, warnings=_harm(folder, *audits[:2]), gallery=items)
    with whole_file(output) as part:
        part.write_bytes(page.encode("utf-8", "replace"))  # JSON may hold half a character
    return Path(output)


def _harm(run: RunFolder | None, audits: Mapping[str, Mapping[str, Any]], notes: Sequence[str]) -> list[str]:
    """List what curation has made worse, as far as the run has found, or the audits show."""
    found = [] if run is None else (run.summary or {}).get("harm", [])
    rises = [] if _WEIGHTED in notes else style_rises(audits)
    return list(dict.fromkeys([*found, *rises]))


def _title(run: RunFolder | None, evaluations: Sequence[Evaluation]) -> str:
    if run is not None:
        return f"Curation report: {run.directory.resolve().name}"
    return f"Evaluation report: {Path(evaluations[0].model).name}" if evaluations else "Audit report"


def _subtitle(run: RunFolder | None, flow: Flow | None) -> str:
    if run is None:
        return ""
    date = run.record["started"][:10] if run.record else "unknown date"
    rounds = "" if flow is None else f", {len(flow.pair_id):,} pairs in {len(flow.steps) - 1} stages of curation"
    return f"Run of {date}{rounds}" + ("" if run.summary else "; not ended yet")


def trained(run: RunFolder | None) -> Section:
    """Show models, data, counts, versions, command and time."""
    section = partial(Section, "run", "What was trained on what")
    if run is None:
        return section(missing=NO_RUN)
    record, stages = run.record or {}, run.stages
    seconds = sum(stage["seconds"] for stage in stages.values())
    trainings = {name: stage for name, stage in stages.items() if "steps" in stage["counts"]}
    facts = [("Stages done", f"{len(stages)}, {len(trainings)} trainings"), ("Time", _duration(seconds))]
    notes, tables = [], _models(run, trainings)
    if record:
        facts += [
            ("Started", record["started"].replace("T", " ").replace("+00:00", " UTC")),
            ("Machine", record["machine"]),
            ("Versions", ", ".join(f"{name} {value}" for name, value in record["versions"].items())),
            *([("Command", record["command"])] if record["command"] else []),
        ]
        tables += [_sets(record), _settings(record)]
    else:
        notes.append("The run has no run.json, so its settings, versions and command are not known.")
    return section(facts=facts, tables=tables, notes=notes)


def _models(run: RunFolder, trainings: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Tabulate the final models, with tests if there are any, and the models that only score."""
    final = (run.summary or {}).get("final", {})
    stages = {stage.removeprefix("final/"): stage for stage in trainings if stage.startswith("final/")}
    for name, model in final.items():
        # A model that has scored the pool is not trained again at the end.
        folder = Path(model["model_dir"]).as_posix()
        stages.update((name, stage) for stage in trainings if folder.endswith(f"/{stage}"))
    rows = []
    for name in sorted(stages, key=list(FINAL_NAMES).index):
        pairs, *others = _cells(trainings[stages[name]])
        tested = ["", ""] if run.rewards else []
        if (rewards := run.rewards.get(name)) is not None:
            accuracy = _accuracy(rewards)
            tested = [f"{accuracy:.4f}", _span(wilson(accuracy, len(rewards)), ".4f")]
        rows.append([FINAL_NAMES[name], pairs, *tested, *others, stages[name]])
    tables = []
    if rows:
        base = run.record["models"][0]["model_name_or_path"] if run.record else "its base model"
        heads = ("test accuracy", "95 %, Wilson") if run.rewards else ()
        columns = ("trained on", "pairs", *heads, "steps", "time", "stage")
        align = "l" + "r" * (len(columns) - 2) + "l"
        tables.append(Table(f"Reward models, each from {base}", columns, rows, align))
    names, accuracies = accuracy_table(final)
    if len(names) > 2:  # of several sources
        tables.append(Table("Test accuracy by source", names, accuracies))
    if scoring := [[stage, *_cells(one)] for stage, one in trainings.items() if stage not in stages.values()]:
        columns = ("stage", "pairs", "steps", "time")
        tables.append(Table("Trainings of models that score the pool", columns, scoring, is_folded=bool(rows)))
    return tables


def _cells(stage: Mapping[str, Any]) -> list[str]:
    counts = stage["counts"]
    return [_count(counts["pairs"]), _count(counts["steps"]), _duration(stage["seconds"])]


def _sets(record: Mapping[str, Any]) -> Table:
    rows = []
    for name, specs in record["sets"].items():
        pairs = record["pairs"][name]
        for source, spec in specs.items():
            kind = next((key for key in SET_KINDS if key in spec), "")
            others = "".join(f", {key} {_plain(value)}" for key, value in spec.items() if key != kind)
            rows.append([name, source, f"{kind}: {_plain(spec.get(kind))}{others}", _count(pairs.get(source))])
        if not set(specs) >= set(pairs):  # rows may name their source themselves
            rows.append([name, "in all", "", _count(sum(pairs.values()))])
    return Table("Data", ("set", "source", "rows from", "pairs"), rows, "lllr")


def _settings(record: Mapping[str, Any]) -> Table:
    args = record["training"]["args"]
    rows = [[name, str(args[name])] for name in _ARGUMENTS if args.get(name) is not None]
    for number, steps in enumerate(record["rounds"], 1):
        for step in steps:
            rules = [
                " ".join(f"{key}{' ' if key in ('flip', 'keep') else '='}{value}" for key, value in rule.items())
                for rule in step["rules"]
            ]
            rows.append([", ".join(filter(None, [f"round {number}", step.get("name")])), "; ".join(rules)])
    title = "Settings of every training, and rules of the rounds"
    return Table(title, ("setting", "value"), rows, "ll", is_folded=True)


def margins(run: RunFolder | None, flow: Flow | None) -> Section:
    """Show the reward margins of each source before and after curation."""
    section = partial(Section, "strength", "Reward margins before and after")
    if flow is None:
        return section(missing=NO_RUN if run is None else NOT_DECIDED)
    counts = Counter(flow.source.tolist())
    turned = np.where(flow.flipped, -flow.margin, flow.margin)
    is_kept = flow.states[-1] != STATES.index("dropped")
    figures, rows = [], []
    for number, (source, count) in enumerate(counts.most_common()):
        inside = (flow.source == source) & ~np.isnan(flow.margin)
        before, after = flow.margin[inside], turned[inside & is_kept]
        if number < MOST_SOURCES and len(before):
            series = {"before": before, "after": after}
            heading = f"{source}, {count:,} pairs"
            figures.append(histogram(f"strength-{number}", heading, series, xlabel="reward of chosen − rejected"))
        rows.append([source, _count(count), *_spread(before), _count(len(after)), *_spread(after)])
    columns = ("source", "pairs", "mean before", "below 0", "kept", "mean after", "below 0")
    notes = []
    if len(counts) > MOST_SOURCES:
        notes.append(f"Figures of the {MOST_SOURCES} largest sources; all {len(counts)} are in the table.")
    return section(
        lead="How much higher the last models that scored a pair put its chosen answer. Below 0, they prefer the "
        "other answer. Before: all pairs as their sources label them; after: kept pairs as they are now.",
        legend=(("outline", "before"), ("filled", "after")),
        figures=figures,
        tables=(Table("By source", columns, rows),),
        notes=notes,
    )


def _spread(values: np.ndarray) -> list[str]:
    return [f"{values.mean():+.2f}", f"{(values < 0).mean():.1%}"] if len(values) else ["", ""]


def read_audit(path: str | os.PathLike) -> dict[str, Any]:
    """Read an audit, as [`~trl_dt2it.debias.StyleReport.to_json`] writes it."""
    content = _read_json(Path(path), "`StyleReport.to_json`")
    if not isinstance(content, dict) or not {"overall", "sources"} <= set(content):
        raise ValueError(f"{path} is no audit of style; give what `StyleReport.to_json` wrote.")
    return content


def read_audits(
    run: RunFolder | None, before: str | os.PathLike | None, after: str | os.PathLike | None
) -> tuple[dict[str, dict[str, Any]], list[str], str]:
    """Read the audits that are passed, in a run's folder, or of its balancing, or else audit its pool; return them
    with notes, and the reason if there is none."""
    given = {"before": before, "after": after}
    audits = {when: read_audit(path) for when, path in given.items() if path is not None}
    if audits or run is None:
        return audits, [], "no audit was given (`--style_before`, `--style_after`), and no run."
    for folder, notes in ((run.directory, []), (run.directory / BALANCE, [_WEIGHTED])):
        files = {when: folder / f"style_{when}.json" for when in given}
        if audits := {when: read_audit(file) for when, file in files.items() if file.is_file()}:
            return audits, notes, ""
    if run.pool is None:
        return {}, [], f"{run.problem}."
    is_drawn = len(run.pool) > MOST_AUDITED
    notes = [f"Measured on {MOST_AUDITED:,} pairs, drawn of {len(run.pool):,}."] if is_drawn else []
    root = run.image_options().image_root
    ledger = run.ledger if run.ledger is not None and run.ledger.rounds else None
    return audit_pool(run.pool, ledger, lambda pool: pair_contents(pool, image_root=root)), notes, ""


def style_leakage(audits: Mapping[str, Mapping[str, Any]], notes: list[str], why_not: str) -> Section:
    """Show how far style tells which answer was chosen, before and after, and the features that carry it."""
    section = partial(Section, "style", "Style leakage")
    if not audits:
        return section(missing=why_not)
    rows, names = [], list(dict.fromkeys(name for audit in audits.values() for name in audit["sources"]))
    for source in ["all pairs", *(names if len(names) > 1 else [])]:
        for when, audit in audits.items():
            part = audit["overall"] if source == "all pairs" else audit["sources"].get(source)
            if part is not None:
                leakage = ["", "", part["note"] or ""]
                if part["auc"] is not None:
                    leakage = [f"{part['auc']:.3f}", _span(part["interval"]), ""]
                rows.append([source, when, _count(part["num_pairs"]), *leakage])
    columns = ("pairs of", "", "pairs", "AUC", "95 % interval", "note")
    features = {when: audit["overall"]["features"] for when, audit in audits.items()}
    first, last = (list(features.values())[index] for index in (0, -1))
    effects = {
        name: max(abs(part[name]["auc"] - 0.5) for part in (first, last) if name in part) for name in first | last
    }
    telling = sorted(effects, key=effects.__getitem__, reverse=True)[:MOST_FEATURES]
    telling = [name for name in telling if name in first]
    figures, legend = [], list[tuple[str, str]]()
    if telling:
        series = {when: {name: part[name]["auc"] for name in telling} for when, part in features.items() if part}
        figures = [bars("style", "What carries it", series, xlabel="chance that chosen has more", middle=0.5)]
        # Of two series, the first are marks, and the last bars.
        legend = list(zip(("tick", "filled")[-len(series) :], series, strict=True))
    return section(
        lead="How well style alone (length, markdown, tone, ...) tells which answer was chosen, in pairs that the "
        "probe has not seen. 0.5 is not at all, 1 is always.",
        legend=legend,
        figures=figures,
        tables=(Table("Leakage", columns, rows, "llrrrl"),),
        notes=notes,
    )


def read_blind(path: str | os.PathLike) -> dict[str, Any]:
    """Read an audit without images, as [`~trl_dt2it.debias.BlindReport.to_json`] or the recipe writes it."""
    content = _read_json(Path(path), "`BlindReport.to_json`")
    content = content.get("blind", content) if isinstance(content, dict) else {}
    if not isinstance(content, dict) or not {"overall", "sources", "num_without_image"} <= set(content):
        raise ValueError(f"{path} is no audit without images; give what `trl-dt2it audit --blind` wrote.")
    return content


def blind_accuracy(audit: Mapping[str, Any]) -> Section:
    """Show how far text tells which answer was chosen, and the n-grams that carry it."""
    sources, rows = audit["sources"], []
    for source, part in {"all pairs": audit["overall"], **(sources if len(sources) > 1 else {})}.items():
        measured = ["", "", part["note"] or ""]
        if part["accuracy"] is not None:
            measured = [f"{part['accuracy']:.3f}", _span(part["interval"]), ""]
        rows.append([source, _count(part["num_pairs"]), _count(part["num_groups"]), *measured])
    columns = ("pairs of", "pairs", "groups", "accuracy", "95 % interval", "note")
    ngrams = [BlindNgram(**ngram) for ngram in audit["overall"]["ngrams"][:MOST_FEATURES]]
    cells = [[n.label, f"{n.share:.1%}", f"{n.chosen:.1%}", f"{n.log_odds:+.2f}"] for n in ngrams]
    heads = ("in one of the two answers", "share of pairs", "chosen has it", "log odds")
    left_out = audit["num_without_image"]
    return Section(
        "blind",
        "Without the image",
        lead="How often question and answers alone, without the image, tell which answer was chosen, in pairs that "
        "the probe has not seen. 0.5 is chance; what is above it, a reward model can learn without looking.",
        tables=(
            Table("Blind accuracy", columns, rows, "lrrrrl"),
            *([Table("What carries it", heads, cells)] if cells else []),
        ),
        notes=[f"{left_out:,} pairs without image are left out."] if left_out else [],
    )


def curation_flow(run: RunFolder | None, flow: Flow | None) -> Section:
    """Show the state of the pairs stage by stage."""
    section = partial(Section, "flow", "Curation flow")
    if run is None or flow is None:
        return section(missing=NO_RUN if run is None else NOT_DECIDED)
    counts = flow.counts()
    shown = [index for index, state in enumerate(STATES) if state != "relabelled" or counts[:, index].any()]
    states = [STATES[index] for index in shown]
    dropped, noise = counts[:, STATES.index("dropped")] / max(1, len(flow.pair_id)), _noise(run)
    columns = ("after", *states, "in the set", *(("wrong labels",) if noise else ()))
    rows = [
        [step, *map(_count, row), f"{1 - share:.1%}", *([noise.get(step, "")] if noise else [])]
        for step, row, share in zip(flow.steps, counts[:, shown], dropped, strict=True)
    ]
    tables, by_source = [Table("Pairs after each stage", columns, rows)], []
    for source in dict.fromkeys(flow.source.tolist()):
        own = flow.states[-1][flow.source == source]
        by_source.append([source, _count(len(own)), *(_count((own == index).sum()) for index in shown)])
    tables.append(Table("At the end, by source", ("source", "pairs", *states), by_source))
    reasons = [
        [name, reason, _count(number)]
        for name, stage in run.stages.items()
        for reason, number in stage["counts"].get("reasons", {}).items()
    ]
    if reasons:
        tables.append(Table("Why", ("stage", "reason", "pairs"), reasons, "llr", is_folded=True))
    curves, calls = _judging(run)
    tables += calls
    marks = dict(zip(STATES, ("grey", "solid", "soft", "faint"), strict=True))
    return section(
        lead="Each stack is the whole pool: kept pairs stand as their source labels them, flipped ones the other way "
        "round; relabelled ones were brought back by judges, and dropped ones are left out for now. A later round may "
        "decide anew.",
        legend=[(marks[state], state) for state in states],
        figures=(draw_flow(flow), *curves),
        tables=tables,
    )


def _judging(run: RunFolder) -> tuple[list[Figure], list[Table]]:
    """Show what each call to judges did, of the stages that asked them in an order."""
    figures, rows = list[Figure](), list[list[str]]()
    for name, counts in ((name, stage["counts"]) for name, stage in run.stages.items()):
        if "curve" not in counts:
            continue
        points, title = counts["curve"], f"{name}: judges asked in the order {counts['order']}"
        what, values = "share of wrong labels", points.get("noise")
        if values is None:
            what, values = "labels changed", points["changed"]
        figures.append(curve(f"judging-{len(rows)}", title, points["calls"], values, xlabel="calls", ylabel=what))
        noise = [f"{points['noise'][index]:.1%}" for index in (0, -1)] if "noise" in points else ["", ""]
        left = [_count(counts[f"not asked ({why})"]) for why in ("budget", "no gain")]
        numbers = map(_count, (points["calls"][-1], counts["judged"], points["changed"][-1]))
        rows.append([name, counts["order"], *numbers, *noise, *left])
    heads = ("stage", "order", "calls", "pairs", "changed", "wrong before", "wrong after", "no budget", "no gain")
    return figures, [Table("Calls to judges", heads, rows, "llrrrrrrr")] if rows else []


def _noise(run: RunFolder) -> dict[str, str]:
    """Return the share of wrong labels after each stage, where the truth is known."""
    shares: dict[str, str] = {}
    for name, counts in ((name, stage["counts"]) for name, stage in run.stages.items()):
        if "noise_after" in counts:
            number, _, step = name.removeprefix("round-").partition("/")
            shares.setdefault("source", f"{counts['noise_before']:.1%}")
            title = step_title({"round": number, "stage": step.replace("/", "-")})
            shares[title] = f"{counts['noise_after']:.1%}"
    return shares


@dataclass(frozen=True)
class Evaluation:
    """Results of one model."""

    model: str
    results: Sequence[EvalResult]  # with intervals as lists
    pooled: dict[str, Any] | None  # `micro`, `mean` and `n` over all
    scores: dict[str, np.ndarray]  # (n, 2), of chosen and rejected, by benchmark, where their file lies beside


def read_evaluation(path: str | os.PathLike) -> Evaluation:
    """Read `evaluation.json`, or one result as JSON."""
    path = Path(path)
    content = _read_json(path, "recipes/evaluate.py")
    found = content.get("results", [content]) if isinstance(content, dict) else []
    try:
        results = [_known(EvalResult, one) for one in found]
        results = [
            one if one.looking is None else replace(one, looking=_known(LookingReport, one.looking)) for one in results
        ]
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds no result of an evaluation ({error}); {_EVALUATION}.") from error
    if not results:
        raise ValueError(f"{path} holds no result of an evaluation; {_EVALUATION}.")
    model = content.get("model") or results[0].settings.get("model") or path.stem
    files = {one.title: path.parent / f"{Path(one.name).name}.parquet" for one in results}
    tables = {title: pq.read_table(file, columns=list(SIDES)) for title, file in files.items() if file.is_file()}
    scores = {title: stack_rewards(table) for title, table in tables.items()}
    return Evaluation(str(model), results, content.get("pooled"), scores)


def _known(kind: type, content: Mapping[str, Any]) -> Any:
    """Make a dataclass of its own keys; others are of another release, or of a person."""
    return kind(**{field.name: content[field.name] for field in fields(kind) if field.name in content})


def _read_json(path: Path, writer: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give what {writer} wrote.") from error


def scored_sets(run: RunFolder | None, evaluations: Sequence[Evaluation]) -> dict[str, np.ndarray]:
    """Collect all rewards of pairs with a known label, by title."""
    rewards = {} if run is None else run.rewards
    sets = {f"Test set, {FINAL_NAMES.get(name, name)}": values for name, values in rewards.items()}
    for evaluation in evaluations:
        model = f", {evaluation.model}" if len(evaluations) > 1 or sets else ""
        sets |= {f"{benchmark}{model}": scores for benchmark, scores in evaluation.scores.items()}
    return sets


def reward_distributions(sets: Mapping[str, np.ndarray]) -> Section:
    """Show the rewards of chosen and of rejected answers."""
    section = partial(Section, "rewards", "Rewards")
    if not sets:
        return section(missing=NOT_SCORED)
    figures, rows = [], []
    for number, (name, rewards) in enumerate(sets.items()):
        series = {"rejected": rewards[:, 1], "chosen": rewards[:, 0]}
        figures.append(histogram(f"rewards-{number}", name, series, xlabel="reward", zero=False))
        means = [f"{values.mean():+.2f} ± {values.std():.2f}" for values in rewards.T]
        rows.append([name, _count(len(rewards)), *means, f"{_accuracy(rewards):.4f}"])
    columns = ("rewards of", "pairs", "chosen", "rejected", "accuracy")
    return section(
        lead="How high the models score chosen and rejected answers. Only differences between answers to one prompt "
        "mean something.",
        legend=(("outline", "rejected"), ("filled", "chosen")),
        figures=figures,
        tables=(Table("Mean and standard deviation", columns, rows),),
    )


def calibration(sets: Mapping[str, np.ndarray]) -> Section:
    """Compare predicted win probabilities with observed shares."""
    section = partial(Section, "calibration", "Calibration")
    fits = {name: calibrate(rewards[:, 0], rewards[:, 1]) for name, rewards in sets.items()}
    fits = {name: fit for name, fit in fits.items() if fit.count}
    if not fits:
        return section(missing=NOT_SCORED)
    summary = [[name, _count(fit.count), _count(fit.ties), f"{fit.error:.3f}"] for name, fit in fits.items()]
    columns: tuple[str, ...] = ("rewards of", "pairs", "ties", "expected calibration error")
    tables = [Table("In short", columns, summary)]
    columns = ("predicted from", "pairs", "mean predicted", "observed", "95 %, Wilson")
    for name, fit in fits.items():
        rows = []
        for one in fit.bins:
            means = [f"{one.predicted:.3f}", f"{one.observed:.3f}"]
            rows.append([_span((one.low, one.high), ".2f"), _count(one.count), *means, _span(one.interval)])
        tables.append(Table(f"Bins: {name}", columns, rows, is_folded=True))
    return section(
        lead="Of pairs in which a model gives its favorite answer a win probability of p, which is the sigmoid of "
        "the difference of the rewards, a share of p should be labelled so. Points below the line: the model is "
        "surer than it should be.",
        legend=(("dot", "share of a bin, with its 95 % interval"), ("dashed", "as predicted")),
        figures=[reliability(f"calibration-{number}", *one) for number, one in enumerate(fits.items())],
        tables=tables,
    )


def benchmarks(evaluations: Sequence[Evaluation]) -> Section:
    """Tabulate benchmarks with intervals, beside published scores."""
    section = partial(Section, "benchmarks", "Benchmarks")
    if not evaluations:
        return section(missing="no result of recipes/evaluate.py was given (`--evaluation`).")
    tables, notes = [], []
    for evaluation in evaluations:
        for result in evaluation.results:
            columns: tuple[str, ...] = ("metric", "%", *INTERVALS, "n", "ties")
            tables.append(Table(f"{result.full_title}: {evaluation.model}", columns, result.cells))
            published = [
                [other.model, other.metric, f"{100 * other.value:.1f}", other.source, other.note]
                for other in published_scores(result.name)
                if other.metric in result.metrics
            ]
            if published:
                columns = ("model", "metric", "%", "source", "")
                tables.append(Table(f"{result.title}: published, not measured here", columns, published, "llrll"))
            notes += [note for note in result.notes if note not in notes]
        if pooled := evaluation.pooled:
            shares = [f"{100 * pooled[name]:.1f}" for name in ("micro", "mean")]
            row = [evaluation.model, *shares, _count(pooled["n"])]
            columns = ("model", "% of all pairs", "mean of benchmarks, %", "pairs")
            tables.append(Table("All of them as one", columns, [row]))
    lead = "Share of pairs in which the chosen answer has the higher reward; a tie is wrong."
    return section(lead=lead, tables=tables, notes=notes)


_TICKS = {"image": "own", "blank": "blank", "swapped": "another's", "half": "1/2", "quarter": "1/4"}


def looking_section(evaluations: Sequence[Evaluation]) -> Section | None:
    """Show accuracies with other images; `None` where no benchmark was evaluated with controls."""
    results = [(evaluation.model, one) for evaluation in evaluations for one in evaluation.results if one.looking]
    if not results:
        return None
    several = len({model for model, _ in results}) > 1
    facts, figures, tables, folded, notes = [], list[Figure](), list[Table](), list[Table](), [NOTE]
    for number, (model, result) in enumerate(results):
        looking: Any = result.looking
        title = f"{result.full_title}: {model}" if several else result.full_title
        facts.append((title, looking.text))
        values = {_TICKS[shown]: value for shown, value in looking.accuracy.items()}
        figures.append(accuracies(f"looking-{number}", title, values))
        tables.append(Table(title, COLUMNS, looking.cells))
        columns = ("metric", *(SHOWN[shown] for shown in looking.metrics))
        rows = [
            [metric, *(f"{100 * values[metric]:.1f}" for values in looking.metrics.values())]
            for metric in looking.metrics["image"]
        ]
        folded.append(Table(f"{title}: all metrics by the image shown, %", columns, rows, is_folded=True))
        notes.append(f"{title}: {looking.counted}")
    return Section(
        "looking",
        LOOKING,
        lead="Accuracy with the image of each pair, with a blank one of the same size, with another row's, and with "
        "1/2 and 1/4 of its pixels. A model that goes by the text alone is as good with another row's image; one that "
        "goes by the image alone comes to a half, the dashed line.",
        legend=(("solid", "with its own image"), ("soft", "with another"), ("tick", "95 % interval")),
        facts=[fact for fact in facts if fact[1]],
        figures=figures,
        tables=(*tables, *folded),
        notes=notes,
    )


def _gallery(run: RunFolder | None, flow: Flow | None, most: int) -> tuple[Section, dict[str, Any] | None]:
    """Return the section of the gallery, and the data of its script."""
    section = partial(Section, "gallery", "Pairs")
    if run is None or flow is None:
        return section(missing=NO_RUN if run is None else NOT_DECIDED), None
    if run.ledger is None or run.pool is None or not most:
        return section(missing=f"{run.problem or 'no pairs were asked for (`--gallery 0`)'}."), None
    items = gallery_items(run.pool, run.ledger, flow, most=most, options=run.image_options())
    source_set = run.ledger.source_set
    # A browser keeps verdicts under the name of the report.
    items |= {"source_set": source_set, "report": f"{source_set} {len(run.ledger.rounds)}"}
    lead = (
        "The strongest flips first. Say of each whether what became of it is right; then export the verdicts and "
        "add them to the ledger, where a person's decision overrides all rounds:"
    )
    command = f"python recipes/report.py --run {shlex.quote(str(run.directory))} --corrections corrections.json"
    return section(lead=lead, command=command), items


def _span(ends: Sequence[float], digits: str = ".3f") -> str:
    low, high = ends
    return f"{low:{digits}} to {high:{digits}}"


def _accuracy(rewards: np.ndarray) -> float:
    return float((rewards[:, 0] > rewards[:, 1]).mean())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
