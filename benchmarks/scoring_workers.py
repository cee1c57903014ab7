"""How much faster does `RewardScorer.score_pairs` score a set of images with two workers than without?

Pairs with a 512 x 512 image each, as PNG bytes, from the data set to the rewards: tokens counted, images decoded and
preprocessed, forward pass. The model is a tiny one that sees an image at 64 x 64, and texts are short, so that it
takes a small share of the time, as a model on a GPU does; here it competes with the workers for the cores.
The two are timed in turn, so that a machine with other work slows down both; the rewards have to be the same.

Prints a table and writes `benchmarks/results/scoring_workers.{json,md}`. Fails below 1.6 times the speed without
workers. It takes two idle cores to show it.

usage: python benchmarks/scoring_workers.py [RUNS]
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset
from lib.report import in_turn, markdown, ratio, wall_seconds, write
from lib.vlm import build_pairs

from trl_dt2it import RewardScorer, load_reward_model
from trl_dt2it.demo.tiny import build_tiny_vlm
from trl_dt2it.models.modeling import load_processing_class, set_pixel_limits
from trl_dt2it.training.losses import pair_rewards


PAIRS, WORKERS = 1536, 2
SIDE = 64
FLOOR = 1.6


def rows_with_bytes(directory: Path) -> Dataset:
    """Pairs with their images as PNG bytes, none of which is decoded before it is scored."""
    build_pairs(directory / "pairs", count=PAIRS, image_side=512, prompt_words=8, answer_words=(4, 8))
    rows = [json.loads(line) for line in (directory / "pairs" / "trl.jsonl").read_text().splitlines()]
    return Dataset.from_list(
        [
            {**row, "images": [{"bytes": Path(path).read_bytes(), "path": None} for path in row["images"]]}
            for row in rows
        ]
    )


def seconds_of_forward(scorer: RewardScorer, dataset: Dataset) -> float:
    """The forward passes of a part of the set, and nothing else, in seconds for a pair."""
    batches = [scorer.collator([dataset[index] for index in range(first, first + 8)]) for first in range(0, 32, 8)]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            pair_rewards(scorer.model, {name: value for name, value in batch.items() if name != "pairs"}, 8)

    forward()
    return wall_seconds(forward) / 32


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        build_tiny_vlm(directory / "model", seed=0)
        processor = load_processing_class(directory / "model")
        set_pixel_limits(processor, max_pixels=SIDE * SIDE)
        scorer = RewardScorer(load_reward_model(directory / "model").eval(), processor)
        dataset = rows_with_bytes(directory)
        rewards: dict[str, np.ndarray] = {}

        def score(name: str, number: int) -> None:
            rewards[name] = scorer.score_pairs(dataset, num_workers=number, show_progress=False)

        names = {"no workers": 0, f"{WORKERS} workers": WORKERS}
        ways = {name: lambda name=name, number=number: score(name, number) for name, number in names.items()}
        seconds = in_turn(ways, runs)
        forward = seconds_of_forward(scorer, dataset)
    alone, together = names
    speedup = ratio(seconds[alone], seconds[together])
    cells = [
        [name, f"{median(times):.2f}", f"{PAIRS / median(times):.0f}", f"{ratio(seconds[alone], times):.2f}x"]
        for name, times in seconds.items()
    ]
    share = forward * PAIRS / median(seconds[alone])
    text = [
        f"{PAIRS} pairs with a 512 x 512 image each, from PNG bytes to the rewards, on a CPU; medians of {runs} runs "
        f"in turn. Without workers the forward passes take {share:.0%} of the time. {FLOOR:g}x is asked for.",
        "",
        markdown(["", "s", "pairs/s", "speed"], cells),
    ]
    write("scoring_workers", "\n".join(text), {"seconds": seconds, "speedup": speedup, "share_of_forward": share})
    if not np.array_equal(rewards[alone], rewards[together]):
        sys.exit("The rewards differ.")
    if speedup < FLOOR:
        sys.exit(f"Only {speedup:.2f} times as fast as without workers.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
