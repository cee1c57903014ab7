"""Does curation gain with label noise as annotators make it, and does it do no harm where the model reads badly?

Read-outs of handwritten digits: clean pairs, and a noisy pool with wrong labels of one of the kinds of
`trl_dt2it.demo.label_noise`. Two parts, each with every kind, rate and seed:

- strong: two digits, which the model of the clean pairs reads well. The uncurated pool, the paper's rule, ours,
  simpler rules and true labels are compared, all trained from the same base model, with as many steps.
- weak: four digits, where that model is right in 65 to 75 % of the test, and in the pool a second source that nobody
  can read, because the pixels of its images are shuffled. Its labels are all right, so each flip there does harm.

A cell is one part, kind, rate and seed. Each method appends a line per cell to `cells.jsonl` in `--folder` and is not
done again with the settings below; a killed run goes on where it was. Several processes share the cells by `--shard`.
Code is no setting: after a change of a rule, delete the lines that rest on it.

usage: python benchmarks/curation_study.py  (all cells, then the table)
       python benchmarks/curation_study.py run [--shard I/N] [--parts strong weak] [--kinds KIND ...] [--seeds N ...]
                                          [--models MODEL ...]
       python benchmarks/curation_study.py table
"""

import argparse
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
from datasets import Dataset
from lib.report import markdown, write
from lib.tiny_training import OPTIMIZATION, remember_rendered
from PIL import Image
from rich.console import Console

from trl_dt2it import MultimodalRewardConfig
from trl_dt2it.curation import CurationLedger
from trl_dt2it.curation.rounds.config import METHODS, PAPER_ROUND, CurationRun, read_run
from trl_dt2it.curation.rounds.run import plan_rounds
from trl_dt2it.curation.rounds.sets import pool_labels
from trl_dt2it.curation.rounds.stages import Stage, run_stages
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.data.columns import column_of
from trl_dt2it.demo import READER
from trl_dt2it.demo.digits import DEMO_LOADERS, make_digits
from trl_dt2it.demo.label_noise import NOISE_KINDS
from trl_dt2it.recipe import find_base_model
from trl_dt2it.utils import digest_of, parse_shard


@dataclass(frozen=True)
class Method:
    """Settings of a run, and the name in the table of each of its final models."""

    finals: Mapping[str, str]
    run: Mapping = field(default_factory=dict)  # arguments of `read_run`
    training: Mapping = field(default_factory=dict)  # arguments of `MultimodalRewardConfig`


# The steps of the paper's rounds stand as rounds: the same decisions, and the first scores are shared with the others.
PAPER = [{key: value for key, value in step.items() if key != "name"} for step in [*PAPER_ROUND, *PAPER_ROUND]]
ONCE = {"orientation": "source", "min_kept": 0.0}

# Enter a method here; a row of the table is a final model. What two methods of a cell have in common is done once.
ANCHORS = Method({"base": "base", "uncurated": "uncurated", "oracle": "oracle"}, {"rounds": PAPER})
OURS = (
    Method({"curated": "ours"}, {"rounds": METHODS["mixture"]}),
    Method({"curated": "ours, hard"}, {"rounds": METHODS["mixture"], "labels": "hard"}),
)
THE_PAPERS = Method({"curated": "paper"}, {"rounds": PAPER})
OTHERS = (
    Method({"curated": "ours, weighted"}, {"rounds": METHODS["mixture"], "labels": "weight"}),
    Method({"uncurated": "bounded loss"}, training={"loss_type": "gce"}),
    Method({"curated": "drop contradicted"}, {"rounds": [{"rules": [{"keep": "keep_consistent"}], **ONCE}]}),
    Method({"curated": "flip contradicted"}, {"rounds": [{"rules": [{"flip": "flip_negative"}], **ONCE}]}),
)
PARTS = {"strong": (ANCHORS, *OURS, THE_PAPERS, *OTHERS), "weak": (ANCHORS, *OURS)}
MODELS = tuple(name for method in PARTS["strong"] for name in method.finals.values())
PASSING = ("ours",)  # what has to pass
KINDS = tuple(kind for kind in NOISE_KINDS if kind != "uniform")
RATES, SEEDS = (0.2, 0.35), (42, 43, 44)

DIGITS = {"strong": [2], "weak": [4]}
BASE_PAIRS = {"strong": 300, "weak": 300}
POOL_PAIRS, UNREAD_PAIRS, TEST_PAIRS = 1200, 300, 2000
TRAINING = {
    "max_steps": 80,
    **OPTIMIZATION,
    "reward_statistics_pairs": 0,
    "per_device_eval_batch_size": 100,
    "image_check": "none",
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 100,
}
FOLDER = Path(__file__).parents[1] / "outputs" / "curation_study"  # unless `--folder` names another
CELLS = "cells.jsonl"


def shuffled_digits(source: str, options: Mapping) -> Dataset:
    """Pairs about images of shuffled pixels, which say nothing of what the digits are."""
    rows = make_digits(source=source, **options).with_format("arrow")

    def shuffle(table):
        made = table.to_pylist()
        for row in made:
            pixels = np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"])))
            generator, buffer = np.random.default_rng(list(row["pair_id"].encode())), io.BytesIO()
            flat = generator.permutation(pixels.reshape(-1, 3))
            Image.fromarray(flat.reshape(pixels.shape)).save(buffer, format="PNG")
            row["images"] = [{"bytes": buffer.getvalue(), "path": None}]
        return type(table).from_pylist(made, schema=table.schema)

    return rows.map(shuffle, batched=True).with_format(None)


LOADERS = {**DEMO_LOADERS, "shuffled_digits": shuffled_digits}


def sets(part: str, kind: str, noise: float, seed: int) -> dict[str, dict]:
    own = {"num_digits": DIGITS[part], "seed": seed}
    noisy = {**own, "split": "train", "num_pairs": POOL_PAIRS, "noise": noise, "noise_kind": kind}
    made = {
        "base": {"clean": {"digits": {**own, "num_pairs": BASE_PAIRS[part]}}},
        "pool": {"noisy": {"digits": noisy}},
        "test": {"read": {"digits": {**own, "split": "test", "num_pairs": TEST_PAIRS}}},
    }
    if part == "weak":
        unread = {**own, "split": "train", "num_pairs": UNREAD_PAIRS}
        made["pool"]["unread"] = {"shuffled_digits": unread}
        made["test"]["unread"] = {"shuffled_digits": {**unread, "split": "test"}}
    return made


def needed(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages that these depend on, in their order."""
    wanted = set(names)
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted.update(stage.inputs)
    return [stage for stage in stages if stage.name in wanted]


def labels(run: CurationRun) -> dict[str, float]:
    """Wrong labels among the kept pairs that can be read, before and after, and what happened to the others."""
    pool = run.sets.usable("pool")
    flipped, kept = pool_labels(run, CurationLedger(run.output_dir / "ledger"))
    wrong = column_of(pool, "is_flipped").to_numpy(zero_copy_only=False).astype(bool)
    is_read = column_of(pool, "source").to_numpy(zero_copy_only=False) != "unread"
    left, rows = wrong ^ flipped, kept & is_read
    return {
        "noise_before": float(wrong[is_read].mean()),
        "noise_after": float(left[rows].mean()) if rows.any() else 0.0,
        "kept": int(rows.sum()),
        "flipped": int((flipped & rows).sum()),
        "flipped_unread": int((flipped & ~is_read).sum()),
    }


def study(method: Method, part: str, kind: str, noise: float, seed: int, folder: Path) -> dict:
    specs, accuracies = sets(part, kind, noise, seed), {}
    args = MultimodalRewardConfig(output_dir=str(folder), seed=seed, **{**TRAINING, **method.training})
    run = read_run(
        RewardTraining(args, {"dtype": "float32"}),
        **specs,
        **method.run,
        final=list(method.finals),
        default_model=READER,
        find_model=partial(find_base_model, sets=specs),
        loaders=LOADERS,
    )
    stages = needed(plan_rounds(run), [f"test/{name}" for name in method.finals])
    with open(os.devnull, "w") as nowhere:
        records = run_stages(stages, folder, console=Console(file=nowhere))
    for name, model in method.finals.items():
        tested = records[f"test/{name}"]["counts"]
        accuracies[model] = tested.get("accuracy/read", tested["accuracy"])
        if part == "weak":
            accuracies[f"{model}, unread"] = tested["accuracy/unread"]
    return {"accuracies": accuracies, "curated": {model: labels(run) for model in names_of(method, "curated")}}


def names_of(method: Method, *finals: str) -> list[str]:
    """Names in the table of the final models of a method, of all by default."""
    return [model for final, model in method.finals.items() if not finals or final in finals]


def settings_of(part: str, method: Method) -> str:
    """A digest of the settings that a cell depends on."""
    sizes = (DIGITS[part], BASE_PAIRS[part], POOL_PAIRS, UNREAD_PAIRS, TEST_PAIRS)
    return digest_of([TRAINING, sizes, asdict(method)])


def run_cells(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    index, count = parse_shard(options.shard)
    cells = [
        {"part": part, "kind": kind, "noise": noise, "seed": seed}
        for seed in options.seeds
        for part in options.parts
        for noise in options.rates
        for kind in options.kinds
    ]
    remember_rendered()
    for cell in cells[index::count]:
        folder, done = options.folder / "-".join(map(str, cell.values())), read_records(options.folder)
        for method in PARTS[cell["part"]]:
            models, settings = names_of(method), settings_of(cell["part"], method)
            known = [one for one in done if one["cell"] == cell and one["settings"] == settings]
            if known or (options.models and not set(models) & set(options.models)):
                continue
            start, start_cpu = time.perf_counter(), time.process_time()
            record = {"cell": cell, "settings": settings, **study(method, **cell, folder=folder)}
            record["seconds"] = round(time.perf_counter() - start)
            record["cpu_seconds"] = round(time.process_time() - start_cpu)
            with (options.folder / CELLS).open("a") as file:  # one short write, so that processes do not mix lines
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
        shutil.rmtree(folder, ignore_errors=True)


def read_records(folder: Path) -> list[dict]:
    path = folder / CELLS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_cells(folder: Path) -> list[dict]:
    """The cells of which all methods but `OTHERS` were done with the settings as they are."""
    records, cells = read_records(folder), []
    for cell in {json.dumps(one["cell"]): one["cell"] for one in records}.values():
        own = {one["settings"]: one for one in records if one["cell"] == cell}
        digests = {settings_of(cell["part"], method): method in OTHERS for method in PARTS[cell["part"]]}
        if all(one in own or is_other for one, is_other in digests.items()):
            done = [own[one] for one in digests if one in own]
            parts = {key: {k: v for one in done for k, v in one[key].items()} for key in ("accuracies", "curated")}
            cells.append({**cell, **parts, "seconds": sum(one["seconds"] for one in done)})
    return sorted(cells, key=lambda cell: (cell["noise"], KINDS.index(cell["kind"]), cell["seed"]))


def others(cells: Sequence[dict]) -> str:
    """The simpler rules beside ours and the paper's, each in the cells where it was tried."""
    rows = []
    for name in (model for method in OTHERS for model in method.finals.values()):
        if own := [cell["accuracies"] for cell in cells if name in cell["accuracies"]]:
            shares = [f"{mean(closed(scores, model) for scores in own):.0%}" for model in (name, *PASSING, "paper")]
            rows.append([name, str(len(own)), *shares])
    return markdown(["simpler rule", "cells", "gap closed", *(f"by {name}" for name in (*PASSING, "paper"))], rows)


def closed(scores: Mapping[str, float], model: str) -> float:
    """Share of the gap between uncurated and oracle that a model closes."""
    return (scores[model] - scores["uncurated"]) / (scores["oracle"] - scores["uncurated"])


def table(part: str, cells: Sequence[dict]) -> tuple[str, list[str]]:
    """The table of a part, means over seeds, and what fell short."""
    anchors = ("base", "uncurated", "oracle")
    simple = {name for method in OTHERS for name in method.finals.values()}
    compared = [name for name in MODELS if name not in simple.union(anchors) and name in cells[0]["accuracies"]]
    names = [*anchors[:2], *compared, anchors[2]]
    curated = [name for name in names if all(name in cell["curated"] for cell in cells)]
    heads = ["kind", "noise", "seeds", *names, *(f"gap closed, {name}" for name in compared)]
    heads += [f"wrong labels, {name}" for name in curated]
    if part == "weak":
        heads += ["base, unread source", *(f"flips of the unread source, {name}" for name in curated)]
    rows, shares, short = [], {name: [] for name in compared}, []
    for kind, noise in dict.fromkeys((cell["kind"], cell["noise"]) for cell in cells):
        own = [cell for cell in cells if (cell["kind"], cell["noise"]) == (kind, noise)]
        scores = {name: mean(cell["accuracies"][name] for cell in own) for name in own[0]["accuracies"]}
        labels = {
            name: {key: mean(cell["curated"][name][key] for cell in own) for key in own[0]["curated"][name]}
            for name in curated
        }
        for name in compared:
            shares[name].append(closed(scores, name))
        row = [kind, str(noise), str(len(own)), *(f"{scores[name]:.4f}" for name in names)]
        row += [f"{shares[name][-1]:.0%}" for name in compared]
        row += ["{noise_before:.3f} to {noise_after:.3f}".format(**labels[name]) for name in curated]
        if part == "weak":
            row += [f"{scores['base, unread']:.3f}", *(f"{labels[name]['flipped_unread']:.1f}" for name in curated)]
            short += [f"{kind} at {noise}: {told}" for cell in own for told in harms(cell)]
        else:
            few = [name for name in PASSING if shares[name][-1] < 0.7]
            short += [f"{kind} at {noise}: {name} closes {shares[name][-1]:.0%} of the gap" for name in few]
            worse = [name for name in PASSING if scores[name] < scores["paper"]]
            short += [f"{kind} at {noise}: {name} is below the paper's rule" for name in worse]
        rows.append(row)
    if part == "strong":
        few = [name for name in PASSING if mean(shares[name]) < 0.85]
        short += [f"{name} closes {mean(shares[name]):.0%} of the gap on the mean of the cells" for name in few]
    means = ", ".join(f"{mean(shares[name]):.0%} {name}" for name in compared)
    return f"{markdown(heads, rows)}\n\nOf the gap between uncurated and oracle, the mean cell closes {means}.", short


def harms(cell: dict) -> list[str]:
    """List the harms of curation to a weak model."""
    found, told = cell["accuracies"], []
    for name in PASSING:
        labels, about = cell["curated"][name], f"{name} with seed {cell['seed']}"
        if labels["noise_after"] >= labels["noise_before"]:
            told.append(f"{about} does not lower label noise")
        if labels["flipped_unread"]:
            told.append(f"{about} flips {labels['flipped_unread']} labels of the unread source")
        if found[name] < min(found["base"], found["uncurated"]):
            told.append(f"{about} is below both base and uncurated")
    return told


def show_table(options: argparse.Namespace) -> None:
    cells, texts, short = read_cells(options.folder), [], []
    for part in PARTS:
        if own := [cell for cell in cells if cell["part"] == part]:
            text, missed = table(part, own)
            texts += [f"### {part}\n\n{text}"] + ([others(own)] if OTHERS[0] in PARTS[part] else [])
            short += missed
    if not texts:
        sys.exit("No cell is done; run the study first.")
    about = f"Accuracy on {TEST_PAIRS:,} clean held-out pairs, mean over seeds."
    write("curation_study", "\n\n".join([about, *texts]), {"cells": cells, "training": TRAINING})
    if short:
        sys.exit("Fell short:\n" + "\n".join(short))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=("run", "table"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, help="only methods that make one of these")
    parser.add_argument("--kinds", nargs="+", choices=NOISE_KINDS, default=KINDS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    if options.command != "table":
        run_cells(options)
    if options.command != "run":
        show_table(options)


if __name__ == "__main__":
    main()
