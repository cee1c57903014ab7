"""Does a reward model learn as much from pairs of one prompt that are read together as from the same pairs apart?

Read-outs of four handwritten digits, several answers to a picture, ranked by the number of wrong digits. As many pairs
of 2, 4 or 8 answers to a prompt each: the accuracy on held-out pairs of a model that reads the pairs of a prompt in
one batch (`group_pairs`), of one that learns their ranking there (`plackett_luce`), and of one that reads them in
random order, from the same start, in as many steps of as many pairs. Pairs of a prompt are alike, so that a step of 32
learns from few prompts; with four answers also steps of 96. A killed run goes on where it was.

Prints a table and writes `benchmarks/results/group_quality.{json,md}`. Fails if the mean accuracy with four answers
differs by more than 0.01.

usage: python benchmarks/group_quality.py [SEED ...]
"""

import json
import random
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean

from datasets import Dataset
from lib.report import markdown, wall_seconds, write
from lib.tiny_training import OPTIMIZATION, tiny_trainer

from trl_dt2it.data import to_pairs
from trl_dt2it.data.mixing import with_columns
from trl_dt2it.demo import READER_DIR
from trl_dt2it.demo.digits import ANSWERS, WORDS, make_digits


SEEDS = (42, 43, 44)
NUM_ANSWERS, PAIRS, TEST_PAIRS, DIGITS = (2, 4, 8), 2400, 2000, [4]
STEPS = {32: 150, 96: 100}  # by the pairs of one
FOLDER = Path(__file__).parents[1] / "outputs" / "group_quality"
MOST_DIFFERENCE = 0.01
WAYS = {
    "apart": {"group_pairs": "false"},
    "together": {},
    "together, plackett_luce": {"loss_type": "plackett_luce"},
}


def ranked_digits(num_answers: int, seed: int) -> Dataset:
    """Pairs of prompts with so many answers, a few more than needed."""
    rng = random.Random(f"{num_answers}-{seed}")
    strips = make_digits("train", 2 * PAIRS // (num_answers - 1), num_digits=DIGITS, seed=seed)
    completions, scores = [], []
    for digits in strips["digits"]:
        answers: dict[str, int] = {}
        while len(answers) < num_answers:
            wrong = rng.choice(range(len(digits) + 1))
            places = rng.sample(range(len(digits)), wrong)
            read = [rng.choice("0123456789".replace(d, "")) if i in places else d for i, d in enumerate(digits)]
            answers[rng.choice(ANSWERS["plain"]).format(" ".join(WORDS[int(digit)] for digit in read))] = wrong
        completions.append(list(answers))
        scores.append([-float(wrong) for wrong in answers.values()])
    rows = with_columns(strips.select_columns(["prompt", "images"]), {"completions": completions, "scores": scores})
    pairs = to_pairs(rows).remove_columns("strength")
    return pairs.select(range(PAIRS))


def run(num_answers: int, step_pairs: int, way: str, seed: int, folder: Path) -> dict:
    about = {"answers": num_answers, "step_pairs": step_pairs, "way": way, "seed": seed}
    cells = folder / "cells.jsonl"
    known = [json.loads(line) for line in cells.read_text().splitlines()] if cells.exists() else []
    for cell in known:
        if about.items() <= cell.items():
            return cell
    train, test = ranked_digits(num_answers, seed), make_digits("test", TEST_PAIRS, num_digits=DIGITS, seed=seed)
    settings = {**OPTIMIZATION, "per_device_train_batch_size": step_pairs, "max_steps": STEPS[step_pairs], **WAYS[way]}
    with tempfile.TemporaryDirectory() as output:
        trainer = tiny_trainer(str(READER_DIR), train, None, output, seed, settings)
        seconds = wall_seconds(trainer.train)
        accuracy = trainer.evaluate(test)["eval_accuracy"]
    cell = {**about, "prompts": len(set(train["group_id"])), "accuracy": accuracy, "seconds": round(seconds, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    with cells.open("a") as file:
        file.write(json.dumps(cell) + "\n")
    print(cell, flush=True)
    return cell


def main(seeds: list[int]) -> None:
    rows, table, differences = [], [], {}
    kinds = [(answers, 32) for answers in NUM_ANSWERS] + [(4, 96)]
    for seed, (num_answers, step_pairs) in product(seeds, kinds):
        # With two answers, a ranking is a pair.
        for way in WAYS if num_answers > 2 else list(WAYS)[:2]:
            rows.append(run(num_answers, step_pairs, way, seed, FOLDER))
    for kind in kinds:
        own = [row for row in rows if (row["answers"], row["step_pairs"]) == kind]
        cells = [str(kind[0]), str(round(mean(row["prompts"] for row in own))), f"{STEPS[kind[1]]} of {kind[1]}"]
        means = {}
        for way in WAYS:
            if found := [row for row in own if row["way"] == way]:
                means[way] = mean(row["accuracy"] for row in found)
                each = ", ".join(f"{row['accuracy']:.3f}" for row in found)
                seconds = mean(row["seconds"] for row in found)
                cells.append(f"{means[way]:.4f} ({each}), {seconds:.0f} s")
            else:
                cells.append("")
        differences[kind] = means["together"] - means["apart"]
        table.append([*cells, f"{differences[kind]:+.4f}"])
    heads = ["answers to a prompt", "prompts", "steps of pairs", *WAYS, "together less apart"]
    about = (
        f"Accuracy on {TEST_PAIRS:,} held-out pairs, mean of {len(seeds)} seeds (each), and seconds of a training on "
        f"{PAIRS:,} pairs."
    )
    write("group_quality", f"{about}\n\n{markdown(heads, table)}", {"rows": rows, "optimization": OPTIMIZATION})
    if short := {kind: one for kind, one in differences.items() if kind[0] == 4 and abs(one) > MOST_DIFFERENCE}:
        sys.exit(f"With four answers, the accuracy differs: {short}.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or list(SEEDS))
