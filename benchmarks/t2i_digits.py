"""Does a reward model learn which of two images fits a caption, whichever of them is shown first?

Trains the tiny VLM from scratch on reformulated digits pairs, once a seed, and evaluates on held-out handwriting in
both orders: the better image first, and second. Prints a table and writes `benchmarks/results/t2i_digits.{json,md}`.
Fails if a seed falls short of 0.9 in an order, or if its orders differ by more than 0.03.

A VLM that is put to this has learned to see before, and the tiny one has random weights. So it is first trained on
read-outs of a single image, and these stay half of its rows, as other rows of a mixture are. Two controls show what
happens to a model that has not learned to see, and without balanced positions.

usage: python benchmarks/t2i_digits.py [SEED ...]
"""

import sys
import tempfile

from datasets import Dataset, concatenate_datasets
from lib.report import markdown, write
from lib.tiny_training import DIGITS_SETTINGS, fit

from trl_dt2it.data.t2i import reformulate_t2i
from trl_dt2it.demo.digits import make_digits, make_digits_t2i, two_image_texts
from trl_dt2it.demo.tiny import build_tiny_vlm


T2I_PAIRS, READ_OUT_PAIRS, EVAL_PAIRS = 3000, 3000, 1000
SEEING = {"num_train_epochs": 4}  # of the training on read-outs; all else is as in SETTINGS
SETTINGS = {**DIGITS_SETTINGS, "num_train_epochs": 8}
# The two sets have further columns, each its own.
COLUMNS = ["prompt", "chosen", "rejected", "images", "pair_id", "source"]
BALANCED = "T2I and read-outs"
ONE_SIDED = "the same, better image always first"
ALONE = "T2I only, from random weights"


def questions(split: str, num_pairs: int, seed: int, **options) -> Dataset:
    pairs = make_digits_t2i(split, num_pairs, seed=seed)
    return reformulate_t2i(pairs, seed=seed, **options).select_columns(COLUMNS)


def better_first(rows: Dataset) -> Dataset:
    """Of pairs in both orders, which alternate, the rows that show the better image first."""
    return rows.select(range(0, len(rows), 2))


def better_second(rows: Dataset) -> Dataset:
    return rows.select(range(1, len(rows), 2))


def training_rows(kind: str, seed: int) -> Dataset:
    if kind == ALONE:
        return questions("train", T2I_PAIRS + READ_OUT_PAIRS, seed)
    t2i = questions("train", T2I_PAIRS, seed, both_orders=kind == ONE_SIDED)
    if kind == ONE_SIDED:
        t2i = better_first(t2i)
    return concatenate_datasets([t2i, read_outs(seed)])


def read_outs(seed: int) -> Dataset:
    return make_digits("train", READ_OUT_PAIRS, seed=seed).select_columns(COLUMNS)


def train(kind: str, seed: int, output_dir: str) -> dict:
    model = build_tiny_vlm(f"{output_dir}/base", seed=seed, extra_texts=two_image_texts())
    held_out = questions("test", EVAL_PAIRS, seed, both_orders=True)
    eval_sets = {"first": better_first(held_out), "second": better_second(held_out)}
    if kind != ALONE:
        fit(model, read_outs(seed), {}, f"{output_dir}/seeing", seed, SETTINGS | SEEING, save=True)
        model = f"{output_dir}/seeing"
    run = fit(model, training_rows(kind, seed), eval_sets, output_dir, seed, SETTINGS)
    first, second = run["accuracies"]["first"], run["accuracies"]["second"]
    return {
        "rows": kind,
        "seed": seed,
        "better_first": first,
        "better_second": second,
        "difference": abs(first - second),
        "train_seconds": run["train_seconds"],
        "steps": run["steps"],
    }


def main(seeds: list[int]) -> None:
    rows = []
    for kind, seed in [*((BALANCED, seed) for seed in seeds), (ONE_SIDED, seeds[0]), (ALONE, seeds[0])]:
        with tempfile.TemporaryDirectory() as output_dir:
            rows.append(train(kind, seed, output_dir))
    names = ["training rows", "seed", "better image first", "better image second", "difference"]
    cells = [
        [
            row["rows"],
            str(row["seed"]),
            *(f"{row[name]:.3f}" for name in ("better_first", "better_second", "difference")),
            f"{row['train_seconds']:.0f}",
            str(row["steps"]),
        ]
        for row in rows
    ]
    settings = {"t2i_pairs": T2I_PAIRS, "read_out_pairs": READ_OUT_PAIRS, "eval_pairs": EVAL_PAIRS, **SETTINGS}
    write("t2i_digits", markdown([*names, "training, s", "steps"], cells), {"rows": rows, "settings": settings})
    judged = [row for row in rows if row["rows"] == BALANCED]
    if any(min(row["better_first"], row["better_second"]) < 0.9 or row["difference"] > 0.03 for row in judged):
        sys.exit("A seed fell short.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
