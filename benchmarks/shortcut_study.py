"""Do blind margins and counterfactual pairs keep a reward model from shortcuts in the text of its training set?

The better answer of a training pair has a shortcut (`trl_dt2it.demo.digits.SHORTCUTS`) with a chance, the strength: a
wording, a favored number, or a wording that goes with the question. The shipped reader is trained on such pairs as
they are, with blind weighting and with blind offset, both with margins of the text probe and of a reward model that
sees no image, with counterfactual pairs, and with these and blind margins of the text probe, in as many steps. Two
sets:

- digits: read-outs of two handwritten digits.
- photographs: which of the three that scikit-learn and matplotlib bring a small piece is of. Their answers hold no
  number, so there is no favored one.

Tested on held-out pairs that all have the shortcut in the worse answer (reversed), and on these and as many that have
it in the better one (absent, as it tells nothing). Compared with training on as many pairs of strength 0.5, the
unbiased set; at 0.5 itself, what a method loses against the pairs as they are is its cost.

A cell is pictures, shortcut, strength and seed. Each method appends a line per cell to `cells.jsonl` in `--folder` and
is not done again with the settings below; a killed run goes on where it was. Several processes share the cells by
`--shard`. Code is no setting: after a change of a method, delete the lines that rest on it.

Writes `benchmarks/results/shortcut_study.{json,md,png}`. Fails if weighting or offset closes less than 0.6 of the gap
between the pairs as they are and the unbiased set on reversed pairs, or less than 0.8 with counterfactual pairs, or if
one costs more than 0.01.

usage: python benchmarks/shortcut_study.py  (all cells, then the table)
       python benchmarks/shortcut_study.py run [--shard I/N] [--pictures SET ...] [--kinds KIND ...]
                                          [--strengths P ...] [--seeds N ...] [--models METHOD ...] [--estimate]
       python benchmarks/shortcut_study.py table
"""

import argparse
import io
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
from datasets import Dataset, Features, Value
from lib.photographs import photographs, pieces
from lib.report import RESULTS, markdown, write
from lib.tiny_training import OPTIMIZATION, fit, remember_rendered, tiny_config
from matplotlib import pyplot
from PIL import Image

from trl_dt2it.data.messages import FEATURES, preference
from trl_dt2it.data.mixing import concatenate, with_columns
from trl_dt2it.debias import blind_margins, counterfactual_pairs, model_blind_margins
from trl_dt2it.demo import READER_DIR
from trl_dt2it.demo.digits import SHORTCUT_ANSWERS, make_digits
from trl_dt2it.utils import digest_of, parse_shard


@dataclass(frozen=True)
class Method:
    """The changes to a training set, and the setting that it is trained with."""

    setting: str | None = None  # of the trainer, which reads the blind margins
    probe: str | None = None  # that makes them: "text" or "model"
    counterfactuals: bool = False


AS_IT_IS, UNBIASED = "as it is", "unbiased"
METHODS = {
    AS_IT_IS: Method(),
    "weighting, text": Method("blind_weighting", "text"),
    "weighting, model": Method("blind_weighting", "model"),
    "offset, text": Method("blind_offset", "text"),
    "offset, model": Method("blind_offset", "model"),
    "counterfactuals": Method(counterfactuals=True),
    "counterfactuals, weighting": Method("blind_weighting", "text", counterfactuals=True),
    "counterfactuals, offset": Method("blind_offset", "text", counterfactuals=True),
}
COMPARED = tuple(METHODS)[1:]
# Least share of the gap that a method with blind margins has to close, and the most that it may cost.
LEAST = {name: 0.8 if one.counterfactuals else 0.6 for name, one in METHODS.items() if one.setting}
MOST_COST, LEAST_GAP = 0.01, 0.03  # a smaller gap is chance, and has no share

PICTURES = ("digits", "photographs")
KINDS = ("wording", "question_answer", "number")
STRENGTHS, NONE, SEEDS = (0.9, 0.5, 0.8, 0.7), 0.5, (42, 43, 44)
TRAIN_PAIRS, TEST_PAIRS, COUNTERFACTUALS = 1200, 1000, 0.5
TRAINING = {"max_steps": 120, **OPTIMIZATION, "reward_statistics_pairs": 0}
BLIND_TRAINING, BLIND_FOLDS = {**TRAINING, "max_steps": 40}, 2
FOLDER = Path(__file__).parents[1] / "outputs" / "shortcut_study"  # unless `--folder` names another
CELLS = "cells.jsonl"

PHOTOGRAPHS = {"china.jpg": "temple", "flower.jpg": "flower", "grace_hopper.jpg": "officer"}
QUESTIONS = (
    "What is shown here?",
    "What is this a piece of?",
    "Name the subject of the image.",
    "Please tell me what you see.",
)
TILE, PIECE = 36, 32  # pixels of a side of a tile of a photograph, and of a piece of it


@lru_cache(maxsize=2)
def tiles(split: str) -> dict[str, list[Image.Image]]:
    """Tiles of each photograph: seven in ten for training, the others for testing."""
    images, found = {file: image for own in photographs().values() for file, image in own.items()}, {}
    for file, name in PHOTOGRAPHS.items():
        own = pieces([images[file]], TILE, whole=False)
        random.Random(name).shuffle(own)
        middle = 7 * len(own) // 10
        found[name] = own[:middle] if split == "train" else own[middle:]
    return found


def make_photographs(split: str, num_pairs: int, seed: int, shortcut: str, strength: float) -> Dataset:
    """Pairs about a piece of a photograph, with a shortcut as [`make_digits`] plants it."""
    # One stream for each decision, so that sets of several strengths differ in wording alone.
    content, wording, style = (random.Random(f"{split}-{seed}-{name}") for name in ("content", "wording", "style"))
    rows: list[dict] = []
    for index in range(num_pairs):
        right, wrong = content.sample(list(PHOTOGRAPHS.values()), 2)
        number, x, y = content.randrange(len(tiles(split)[right])), *content.choices(range(TILE - PIECE + 1), k=2)
        buffer = io.BytesIO()
        tiles(split)[right][number].crop((x, y, x + PIECE, y + PIECE)).save(buffer, format="PNG")
        question, is_planted = wording.choice(QUESTIONS), style.random() < strength
        texts = []
        for read, has_shortcut in ((right, is_planted), (wrong, not is_planted)):
            other = wording.choice(SHORTCUT_ANSWERS[1:])
            if shortcut == "wording":
                frame = SHORTCUT_ANSWERS[0] if has_shortcut else other
            else:
                frame = SHORTCUT_ANSWERS[has_shortcut != (question in QUESTIONS[:2])]
            texts.append(frame.format(read))
        row = preference(question, *texts, [buffer.getvalue()], group=f"{right}-{number}-{x}-{y}")
        rows.append({**row, "pair_id": f"photographs-{split}-{seed}-{index}", "source": "photographs"})
    return Dataset.from_list(rows, features=Features({**FEATURES, "pair_id": Value("string")}))


def make_rows(pictures: str, split: str, num_pairs: int, seed: int, kind: str, strength: float) -> Dataset:
    if pictures == "photographs":
        return make_photographs(split, num_pairs, seed, kind, strength)
    return make_digits(split, num_pairs, seed=seed, num_digits=[2], shortcut=kind, shortcut_strength=strength)


def reads_differ(one: str, other: str) -> bool:
    """Tell if two answers name different photographs, whatever their wordings."""
    return one.partition(" shows ")[2] != other.partition(" shows ")[2]


def margins(probe: str, rows: Dataset, cell: dict, folder: Path) -> np.ndarray:
    """Blind margins of a training set, by a model once a cell."""
    if probe == "text":
        return blind_margins(rows)
    path = folder / f"margins-{digest_of([cell, TRAIN_PAIRS, BLIND_TRAINING, BLIND_FOLDS])}.npy"
    if not path.exists():
        args, options = tiny_config(str(folder / "blind"), cell["seed"], BLIND_TRAINING), {"num_folds": BLIND_FOLDS}
        np.save(path, model_blind_margins(rows, str(READER_DIR), args, images="none", seed=cell["seed"], **options))
    return np.load(path)


def study(method: Method, cell: dict, folder: Path) -> dict:
    pictures, kind, strength, seed = cell.values()
    rows, settings, found = make_rows(pictures, "train", TRAIN_PAIRS, seed, kind, strength), dict(TRAINING), {}
    if method.setting:
        told = margins(method.probe, rows, cell, folder)
        rows, settings[method.setting] = with_columns(rows, {"blind_margin": told}), True
        found |= {"blind_accuracy": float(np.mean(told > 0)), "blind_loss": float(np.mean(np.logaddexp(0, -told)))}
    if method.counterfactuals:
        differ = reads_differ if pictures == "photographs" else None
        made = counterfactual_pairs(rows, share=COUNTERFACTUALS, seed=seed, differ=differ)
        rows, found["counterfactuals"] = concatenate({"pairs": rows, "counterfactuals": made}), len(made)
    tests = {
        name: make_rows(pictures, "test", TEST_PAIRS, seed, kind, planted)
        for name, planted in (("reversed", 0.0), ("planted", 1.0))
    }
    run = fit(str(READER_DIR), rows, tests, str(folder / "training"), seed, settings)
    scores = {**run["accuracies"], "absent": mean(run["accuracies"].values())}
    return {**found, "accuracies": scores, "train_seconds": run["train_seconds"]}


def settings_of(pictures: str, name: str) -> str:
    """A digest of the settings that a method depends on."""
    method, settings = METHODS[name], [TRAINING, TRAIN_PAIRS, TEST_PAIRS, asdict(METHODS[name])]
    settings += [(TILE, PIECE)] if pictures == "photographs" else []
    settings += [BLIND_TRAINING, BLIND_FOLDS] if method.probe == "model" else []
    settings += [COUNTERFACTUALS] if method.counterfactuals else []
    return digest_of(settings)


def planned(options: argparse.Namespace) -> list[dict]:
    """Cells, those that tell most first: a seed's with 0.9 and 0.5, kind by kind, then its other strengths."""
    cells = [
        {"pictures": pictures, "kind": kind, "strength": strength, "seed": seed}
        for seed in options.seeds
        for are_first in (True, False)
        for kind in options.kinds
        for pictures in options.pictures
        for strength in options.strengths
        if (strength in STRENGTHS[:2]) == are_first and (pictures, kind) != ("photographs", "number")
    ]
    index, count = parse_shard(options.shard)
    return cells[index::count]


def run_cells(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    known = {(json.dumps(one["cell"]), one["method"]): one["cpu_seconds"] for one in read_records(options.folder)}
    asked = [(cell, name) for cell in planned(options) for name in options.models]
    left = [(cell, name) for cell, name in asked if (json.dumps(cell), name) not in known]
    pace = mean(known.values()) if known else 35
    print(
        f"{len(left)} trainings are left, of {pace:.0f} processor seconds: {len(left) * pace / 3600:.1f} h.",
        flush=True,
    )
    if options.estimate:
        return
    rendered, before = remember_rendered(), None
    for cell, name in left:
        if cell != before:
            rendered.clear()
        before, start, start_cpu = cell, time.perf_counter(), time.process_time()
        record = {"cell": cell, "method": name, "settings": settings_of(cell["pictures"], name)}
        record |= study(METHODS[name], cell, options.folder)
        record["seconds"] = round(time.perf_counter() - start, 1)
        record["cpu_seconds"] = round(time.process_time() - start_cpu, 1)
        with (options.folder / CELLS).open("a") as file:  # one short write, so that processes do not mix lines
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


def read_records(folder: Path) -> list[dict]:
    """The records of the settings as they are."""
    path = folder / CELLS
    records = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    known = [one for one in records if one["method"] in METHODS]
    return [one for one in known if one["settings"] == settings_of(one["cell"]["pictures"], one["method"])]


class Found:
    """Accuracies by pictures, kind, strength and method, and in each by seed."""

    def __init__(self, records: Sequence[dict]) -> None:
        self.scores: dict[tuple, dict[int, dict[str, float]]] = {}
        for one in records:
            *key, seed = one["cell"].values()
            self.scores.setdefault((*key, one["method"]), {})[seed] = one["accuracies"]
        self.sets = [pictures for pictures in PICTURES if any(key[0] == pictures for key in self.scores)]

    def cells(self, pictures: str) -> list[tuple[str, float]]:
        """Kinds and strengths of which pairs as they are and unbiased ones were trained on."""
        done = {key[1:3] for key in self.scores if key[0] == pictures and key[3] == AS_IT_IS}
        return [cell for cell in product(KINDS, sorted(STRENGTHS)) if {cell, (cell[0], NONE)} <= done]

    def accuracy(self, pictures: str, kind: str, strength: float, name: str, test: str) -> float | None:
        """Mean over seeds."""
        key = (NONE, AS_IT_IS) if name == UNBIASED else (strength, name)
        scores = self.scores.get((pictures, kind, *key), {})
        return mean(one[test] for one in scores.values()) if scores else None

    def gains(self, pictures: str, kind: str, strength: float, name: str) -> list[tuple[float, float]]:
        """Of each seed, what a method gains on reversed pairs, and the gap to the unbiased set."""
        own, biased, unbiased = (
            self.scores.get((pictures, kind, *key), {})
            for key in ((strength, name), (strength, AS_IT_IS), (NONE, AS_IT_IS))
        )
        seeds = own.keys() & biased.keys() & unbiased.keys()
        tests = [[by[seed]["reversed"] for by in (own, biased, unbiased)] for seed in sorted(seeds)]
        return [(one - before, most - before) for one, before, most in tests]

    def costs(self, pictures: str, kinds: Sequence[str], name: str) -> list[float]:
        """Of each kind and seed, accuracy that a method loses where there is no shortcut."""
        lost = []
        for kind in kinds:
            own, plain = (self.scores.get((pictures, kind, NONE, one), {}) for one in (name, AS_IT_IS))
            lost += [plain[seed]["absent"] - own[seed]["absent"] for seed in own.keys() & plain]
        return lost


def closed(gains: Sequence[tuple[float, float]]) -> float | None:
    """Share of the gap that is closed, over seeds or cells."""
    if not gains or mean(gap for _, gap in gains) < LEAST_GAP:
        return None
    return mean(gain for gain, _ in gains) / mean(gap for _, gap in gains)


def shown(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def table(found: Found, pictures: str) -> tuple[str, list[str]]:
    """The tables of some pictures, and what fell short."""
    names, columns = COMPARED, [AS_IT_IS, *COMPARED, UNBIASED]
    scores, shares, costs, short = [], [], [], []
    cells = found.cells(pictures)
    for kind, strength in cells:
        about = [kind, f"{strength}", str(len(found.scores[pictures, kind, strength, AS_IT_IS]))]
        cell = (pictures, kind, strength)
        pairs = [[found.accuracy(*cell, name, test) for test in ("reversed", "absent")] for name in columns]
        scores.append([*about, *(" / ".join(shown(one, ".3f") for one in pair if one) for pair in pairs)])
        if strength == NONE:
            lost = [found.costs(pictures, [kind], name) for name in names]
            costs.append([kind, about[2], *(shown(mean(one) if one else None, "+.3f") for one in lost)])
            continue
        closes = [closed(found.gains(*cell, name)) for name in names]
        shares.append([*about, *(shown(one, ".0%") for one in closes)])
        short += [
            f"{pictures}, {kind} at {strength}: {name} closes {one:.0%}"
            for name, one in zip(names, closes, strict=True)
            if name in LEAST and one is not None and one < LEAST[name]
        ]
    kinds = [kind for kind, strength in cells if strength == NONE]
    pooled, lost = {}, {}
    for name in names:
        pooled[name] = closed([one for cell in cells if cell[1] != NONE for one in found.gains(pictures, *cell, name)])
        if all_costs := found.costs(pictures, kinds, name):
            lost[name] = mean(all_costs)
            short += [f"{pictures}: {name} costs {lost[name]:.3f}"] if name in LEAST and lost[name] > MOST_COST else []
    shares.append(["all", "", "", *(shown(pooled[name], ".0%") for name in names)])
    costs.append(["all", "", *(shown(lost.get(name), "+.3f") for name in names)])
    heads = ["shortcut", "strength", "seeds"]
    text = [
        f"### {pictures}",
        "Accuracy where the shortcut is reversed / absent:",
        markdown([*heads, *columns], scores),
        "Share of the gap between the pairs as they are and the unbiased set that is closed where the shortcut is "
        f"reversed (none where the gap is below {LEAST_GAP}):",
        markdown([*heads, *names], shares),
        "Cost, accuracy lost where there is no shortcut:",
        markdown([heads[0], heads[2], *names], costs),
    ]
    return "\n\n".join(text), short


def draw(found: Found, path: Path) -> None:
    """Share of the gap closed, by strength and method."""
    panels = [
        (pictures, kind) for pictures in found.sets for kind in dict.fromkeys(one for one, _ in found.cells(pictures))
    ]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.2 + 2.8 * len(panels), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (pictures, kind) in zip(axes[0], panels, strict=True):
        strengths = [strength for one, strength in found.cells(pictures) if one == kind and strength != NONE]
        for index, name in enumerate(COMPARED):
            shares = [closed(found.gains(pictures, kind, strength, name)) for strength in strengths]
            known = [(x, y) for x, y in zip(strengths, shares, strict=True) if y is not None]
            if known:
                axis.plot(*zip(*known, strict=True), "os^v*DP"[index], linestyle="-", color=f"C{index}", label=name)
        for least in (0.6, 0.8):
            axis.axhline(least, color="grey", linewidth=0.8, linestyle=":")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=f"{pictures}, {kind.replace('_', '-')}", xlabel="strength", xlim=(0.65, 0.95), ylim=(-0.3, 1.2))
        axis.set_xticks(sorted(strength for strength in STRENGTHS if strength != NONE))
    axes[0][0].set_ylabel("share of the gap closed")
    handles = {
        text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def show_table(options: argparse.Namespace) -> None:
    records = read_records(options.folder)
    found, texts, short = Found(records), [], []
    for pictures in found.sets:
        if found.cells(pictures):
            text, missed = table(found, pictures)
            texts.append(text)
            short += missed
    if not texts:
        sys.exit("No cell is done, or no unbiased set; run the study first.")
    pace = mean(one["cpu_seconds"] for one in records)
    about = (
        f"{TRAIN_PAIRS:,} training pairs, and {COUNTERFACTUALS:.0%} more where they are counterfactual; "
        f"{TRAINING['max_steps']} steps of {TRAINING['per_device_train_batch_size']} from the shipped reader; "
        f"{TEST_PAIRS:,} held-out pairs, each with the shortcut in either answer. Mean over seeds; "
        f"{pace:.0f} processor seconds a training."
    )
    draw(found, RESULTS / "shortcut_study.png")
    texts = [about, *texts, "![Share of the gap closed](shortcut_study.png)"]
    settings = {"training": TRAINING, "blind_training": BLIND_TRAINING, "blind_folds": BLIND_FOLDS}
    write("shortcut_study", "\n\n".join(texts), {"records": records, **settings})
    if short:
        sys.exit("Fell short:\n" + "\n".join(short))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=("run", "table"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--strengths", nargs="+", type=float, choices=STRENGTHS, default=list(STRENGTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--models", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--estimate", action="store_true", help="print how long the run takes, and stop")
    options = parser.parse_args()
    if options.command != "table":
        run_cells(options)
    if options.command != "run" and not options.estimate:
        show_table(options)


if __name__ == "__main__":
    main()
