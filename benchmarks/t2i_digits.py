"""Does a reward model learn which of two images fits a caption, whichever of them is shown first?

Trains the tiny VLM from scratch on reformulated digits pairs, once a seed, and evaluates on held-out handwriting in
both orders: the better image first, and second. As a control, the last run is trained on pairs that show the better
image first, always. Prints a table and writes `benchmarks/results/t2i_digits.{json,md}`. Fails if a seed falls short
of 0.9 in an order, or if its orders differ by more than 0.03.

A VLM that is put to this has learned to see before; the tiny one has random weights, and on two-image questions alone
it stays at chance for four epochs. So half of its training rows are read-outs of a single image, as other rows of a
mixture are.

usage: python benchmarks/t2i_digits.py [SEED ...]
"""

import sys
import tempfile
import time

from datasets import Dataset, concatenate_datasets
from lib.report import markdown, write

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.data.t2i import reformulate_t2i
from trl_dt2it.data.t2i_templates import ENGLISH
from trl_dt2it.demo.digits import make_digits, make_digits_t2i
from trl_dt2it.demo.tiny import build_tiny_vlm


TEMPLATE = ENGLISH[0]
T2I_PAIRS, READ_OUT_PAIRS, EVAL_PAIRS = 3000, 3000, 1000
SETTINGS = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 32,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "loss_type": "bt",
}
# The two sets have further columns, each its own.
COLUMNS = ["prompt", "chosen", "rejected", "images", "pair_id", "source"]


def questions(split: str, num_pairs: int, seed: int, **options) -> Dataset:
    pairs = make_digits_t2i(split, num_pairs, seed=seed)
    return reformulate_t2i(pairs, seed=seed, template=TEMPLATE, **options).select_columns(COLUMNS)


def better_first(rows: Dataset) -> Dataset:
    """Of pairs in both orders, which alternate, the rows that show the better image first."""
    return rows.select(range(0, len(rows), 2))


def better_second(rows: Dataset) -> Dataset:
    return rows.select(range(1, len(rows), 2))


def train(seed: int, output_dir: str, is_balanced: bool) -> dict:
    texts = [TEMPLATE.prompt, TEMPLATE.first_is_better, TEMPLATE.second_is_better, *TEMPLATE.labels]
    model = build_tiny_vlm(f"{output_dir}/base", seed=seed, extra_texts=texts)
    if is_balanced:
        t2i = questions("train", T2I_PAIRS, seed)
    else:
        t2i = better_first(questions("train", T2I_PAIRS, seed, both_orders=True))
    read_outs = make_digits("train", READ_OUT_PAIRS, seed=seed).select_columns(COLUMNS)
    held_out = questions("test", EVAL_PAIRS, seed, both_orders=True)
    args = MultimodalRewardConfig(
        output_dir=output_dir,
        seed=seed,
        per_device_eval_batch_size=100,
        image_check="none",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=25,
        report_to="none",
        **SETTINGS,
    )
    trainer = MultimodalRewardTrainer(
        model=model,
        args=args,
        train_dataset=concatenate_datasets([t2i, read_outs]),
        eval_dataset={"first": better_first(held_out), "second": better_second(held_out)},
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    trainer.end()
    accuracies = metrics["eval_first_accuracy"], metrics["eval_second_accuracy"]
    return {
        "seed": seed,
        "is_balanced": is_balanced,
        "better_first": accuracies[0],
        "better_second": accuracies[1],
        "difference": abs(accuracies[0] - accuracies[1]),
        "train_seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
    }


def main(seeds: list[int]) -> None:
    rows = []
    for seed, is_balanced in [*((seed, True) for seed in seeds), (seeds[0], False)]:
        with tempfile.TemporaryDirectory() as output_dir:
            rows.append(train(seed, output_dir, is_balanced))
    names = ["seed", "positions in training", "better image first", "better image second", "difference"]
    cells = [
        [
            str(row["seed"]),
            "balanced" if row["is_balanced"] else "better image always first",
            *(f"{row[name]:.3f}" for name in ("better_first", "better_second", "difference")),
            f"{row['train_seconds']:.0f}",
            str(row["steps"]),
        ]
        for row in rows
    ]
    settings = {"t2i_pairs": T2I_PAIRS, "read_out_pairs": READ_OUT_PAIRS, "eval_pairs": EVAL_PAIRS, **SETTINGS}
    write("t2i_digits", markdown([*names, "training, s", "steps"], cells), {"rows": rows, "settings": settings})
    balanced = [row for row in rows if row["is_balanced"]]
    if any(min(row["better_first"], row["better_second"]) < 0.9 or row["difference"] > 0.03 for row in balanced):
        sys.exit("A seed fell short.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
