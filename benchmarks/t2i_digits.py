"""Does a reward model learn which of two images fits a caption, whichever of them is shown first?

Trains the tiny VLM from scratch on reformulated digits pairs, once a seed, and evaluates on held-out handwriting in
both orders: the better image first, and second. Prints a table and writes `benchmarks/results/t2i_digits.{json,md}`.
Fails if a seed falls short of 0.9 in an order, or if its orders differ by more than 0.03.

usage: python benchmarks/t2i_digits.py [SEED ...]
"""

import sys
import tempfile
import time

from lib.report import markdown, write

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.data.t2i import reformulate_t2i
from trl_dt2it.data.t2i_templates import ENGLISH
from trl_dt2it.demo.digits import make_digits_t2i
from trl_dt2it.demo.tiny import build_tiny_vlm


TRAIN_PAIRS, EVAL_PAIRS = 3000, 1000
SETTINGS = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 32,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "loss_type": "bt",
}


def train(seed: int, output_dir: str) -> dict:
    words = [text for t in ENGLISH for text in (t.prompt, t.first_is_better, t.second_is_better, "".join(t.labels))]
    model = build_tiny_vlm(f"{output_dir}/base", seed=seed, extra_texts=words)
    rows = reformulate_t2i(make_digits_t2i("train", TRAIN_PAIRS, seed=seed), seed=seed, both_orders=True)
    held_out = reformulate_t2i(make_digits_t2i("test", EVAL_PAIRS, seed=seed), seed=seed, both_orders=True)
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
        disable_tqdm=True,
        **SETTINGS,
    )
    orders = {
        "first": held_out.filter(lambda pair_id: pair_id.endswith("-ab"), input_columns="pair_id"),
        "second": held_out.filter(lambda pair_id: pair_id.endswith("-ba"), input_columns="pair_id"),
    }
    trainer = MultimodalRewardTrainer(model=model, args=args, train_dataset=rows, eval_dataset=orders)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    trainer.end()
    return {
        "seed": seed,
        "better_first": metrics["eval_first_accuracy"],
        "better_second": metrics["eval_second_accuracy"],
        "train_seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
    }


def main(seeds: list[int]) -> None:
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as output_dir:
            rows.append(train(seed, output_dir))
        rows[-1]["difference"] = abs(rows[-1]["better_first"] - rows[-1]["better_second"])
    names = ["seed", "better image first", "better image second", "difference", "training, s", "steps"]
    cells = [
        [
            str(row["seed"]),
            *(f"{row[name]:.3f}" for name in ("better_first", "better_second", "difference")),
            f"{row['train_seconds']:.0f}",
            str(row["steps"]),
        ]
        for row in rows
    ]
    settings = {"train_pairs": TRAIN_PAIRS, "eval_pairs": EVAL_PAIRS, **SETTINGS}
    write("t2i_digits", markdown(names, cells), {"rows": rows, "settings": settings})
    if any(min(row["better_first"], row["better_second"]) < 0.9 or row["difference"] > 0.03 for row in rows):
        sys.exit("A seed fell short.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
