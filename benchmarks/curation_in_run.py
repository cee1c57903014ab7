"""Curation between the epochs of one training, against the same training without it.

The pairs are those of `curation_quality.py` at noise 0.35. The tiny VLM is first trained on the clean ones, because a
model that knows nothing yet cannot tell a wrong label; then on all of them, with the callback and without. That
curates the noisy sources alone, before each epoch.

Prints a table and writes `benchmarks/results/curation_in_run.{json,md}`. Fails if, over the seeds, the callback does
not help.

usage: python benchmarks/curation_in_run.py [SEED ...]
"""

import sys
import tempfile
from statistics import mean

import numpy as np
from curation_quality import COLUMNS, EVAL_PAIRS, SOURCES, clean_pairs, planted, pool_pairs
from datasets import concatenate_datasets
from lib.report import markdown, write
from lib.tiny_training import DIGITS_SETTINGS, fit, tiny_trainer

from trl_dt2it import MultimodalRewardTrainer
from trl_dt2it.curation import CurationLedger, Flip, IterativeCurationCallback, Keep, flip_mixture, keep_confident
from trl_dt2it.data.mixing import swap_pairs
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.demo.tiny import build_tiny_vlm


CASE = "0.35"
CURATION = {"start_epoch": 0, "momentum": 0.5, "only_sources": SOURCES}
RULES = (Flip(flip_mixture, by="source"), Keep(keep_confident))
BASE_SETTINGS = {"max_steps": 300, "num_train_epochs": 1}  # the number of steps is what counts
SETTINGS = DIGITS_SETTINGS


def train(curated: bool, seed: int, base: str, output_dir: str) -> dict:
    wrong = planted(CASE, seed)
    pool = swap_pairs(pool_pairs(seed), wrong)
    rows = concatenate_datasets([clean_pairs(seed), pool])
    held_out = make_digits("test", EVAL_PAIRS, seed=seed).select_columns(COLUMNS)
    trainer = tiny_trainer(base, rows, held_out, output_dir, seed, SETTINGS)
    if curated:
        trainer.add_callback(
            IterativeCurationCallback(trainer, rules=RULES, ledger=f"{output_dir}/ledger", **CURATION)
        )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    row = {"curated": curated, "seed": seed, "accuracy": accuracy, "noise_before": float(wrong.mean())}
    if curated:
        row |= noise_after(trainer, wrong, output_dir)
    trainer.end()
    return row


def noise_after(trainer: MultimodalRewardTrainer, wrong: np.ndarray, output_dir: str) -> dict:
    """Of the pairs that the last round keeps, how many have a wrong label still."""
    state = CurationLedger(f"{output_dir}/ledger").state()
    place = {name: index for index, name in enumerate(pool_pairs(trainer.args.seed)["pair_id"][:])}
    rows = np.array([place[name] for name in state["pair_id"].to_pylist()])
    left = wrong[rows] ^ state["flipped"].to_numpy()
    kept = state["kept"].to_numpy()
    return {"kept": int(kept.sum()), "noise_after": float(left[kept].mean())}


def main(seeds: list[int]) -> None:
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            model, base = build_tiny_vlm(f"{folder}/vlm", seed=seed), f"{folder}/base"
            fit(model, clean_pairs(seed), {}, base, seed, SETTINGS | BASE_SETTINGS, save=True)
            for curated in (False, True):
                rows.append(train(curated, seed, base, f"{folder}/{curated}"))
                print(rows[-1], flush=True)
    cells = [
        [
            "with the callback" if row["curated"] else "without",
            str(row["seed"]),
            f"{row['accuracy']:.3f}",
            f"{row['noise_before']:.3f}",
            f"{row['noise_after']:.3f}" if row["curated"] else "",
            f"{row['kept']:,}" if row["curated"] else "",
        ]
        for row in sorted(rows, key=lambda row: (row["curated"], row["seed"]))
    ]
    names = ["one training", "seed", "held-out accuracy", "noise before", "noise after", "noisy pairs kept"]
    means = {curated: mean(row["accuracy"] for row in rows if row["curated"] == curated) for curated in (False, True)}
    text = (
        f"{markdown(names, cells)}\n\nMean accuracy without {means[False]:.3f}, with the callback {means[True]:.3f}; "
        f"{SETTINGS['num_train_epochs']} epochs from a model of the clean pairs."
    )
    settings = {**SETTINGS, **CURATION}
    write("curation_in_run", text, {"rows": rows, "settings": settings})
    if means[True] <= means[False]:
        sys.exit("The callback does not help.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
