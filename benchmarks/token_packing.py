"""How many pairs a second does `max_tokens_per_batch` train on, against batches of a fixed number of pairs?

The set's pairs vary 20-fold in length: images from 64 to 1024 pixels a side, or none, and answers from a few words to
some hundred. `MultimodalRewardTrainer` trains on it on a CPU, in fp32: with packed batches; with the largest fixed
number of pairs whose worst batch stays under the same number of tokens, which is what one has to choose without
packing; and with as many pairs as the packed batches have on average. Each with one row per pair and with two padded
rows; in one process, and in two of one thread each. An epoch of each in turn, the first to warm up; then medians. How
long eight processes would wait for the one with the most tokens is computed from the batches, not measured.

Prints a table and writes `benchmarks/results/token_packing.{json,md}`.

usage: python benchmarks/token_packing.py [EPOCHS]
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, load_from_disk
from datasets import Image as ImageFeature
from lib.report import markdown, write
from PIL import Image

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.demo.tiny import build_tiny_vlm
from trl_dt2it.training.batching import plan_batches


PAIRS = 64
SHORTEST, LONGEST = 100, 2000  # tokens of a pair, prompt and image once and both answers
MAX_TOKENS = 8192
PIXELS = 32  # an image token is a square of this side
WORDS = "the answer describes a red flower among green leaves and one old temple beside still water".split()


def make_pairs(folder: Path) -> Dataset:
    """Pairs whose sizes are spread evenly on a logarithmic scale; six in ten have an image."""
    generator = random.Random(0)
    rows = []
    for index in range(PAIRS):
        size = round(SHORTEST * (LONGEST / SHORTEST) ** (index / (PAIRS - 1)))
        side = 0
        if index % 5 < 3:
            side = round((size * generator.uniform(0.2, 0.6)) ** 0.5)
            side = min(max(side, 64 // PIXELS), 1024 // PIXELS)
            pixels = np.random.default_rng(index).integers(0, 256, (side * PIXELS, side * PIXELS, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.jpg")
        left = max(size - side**2 - 30, 40)  # for words, of which each is about a token
        longer = round(left * generator.uniform(0.4, 0.75))
        answers = [" ".join(generator.choices(WORDS, k=number)) for number in (longer, left - longer)]
        generator.shuffle(answers)
        chosen, rejected = ([{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in answers)
        question = [{"type": "image"}] * bool(side) + [{"type": "text", "text": "Which answer is better, and why?"}]
        images = [{"bytes": None, "path": str(folder / f"{index}.jpg")}] if side else []
        prompt = [{"role": "user", "content": question}]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": images})
    features = Dataset.from_list([{k: v for k, v in row.items() if k != "images"} for row in rows]).features
    return Dataset.from_list(rows, features=Features({**features, "images": List(ImageFeature())}))


def make_trainer(folder: Path, **options: Any) -> MultimodalRewardTrainer:
    args = MultimodalRewardConfig(
        str(folder / "out"),
        num_train_epochs=1,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    return MultimodalRewardTrainer(
        str(folder / "base"), args=args, train_dataset=load_from_disk(str(folder / "pairs"))
    )


def cost(sizes: Any, padded: bool) -> int:
    return int(len(sizes) * max(sizes) if padded else sum(sizes))


def largest_fixed(sizes: list[int], padded: bool) -> int:
    """Most pairs a batch of which even the longest of the set stay under the cap."""
    ordered = sorted(sizes, reverse=True)
    return max(number for number in range(1, PAIRS + 1) if cost(ordered[:number], padded) <= MAX_TOKENS)


def waiting(sizes: list[int], padded: bool, fixed: int | None) -> float:
    """Share of its time that one of eight processes waits, if time goes with tokens; on many pairs of such sizes."""
    generator = np.random.default_rng(0)
    many = (generator.choice(sizes, 20_000) * generator.uniform(0.95, 1.05, 20_000)).astype(int)
    if fixed is None:
        plan = plan_batches(many, MAX_TOKENS, world_size=8, padded=padded)
        batches = [many[plan.rows[batch]] for batch in plan.batches]
    else:
        batches = [many[start : start + fixed] for start in range(0, len(many), fixed)]
    costs = np.array([cost(batch, padded) for batch in batches[: len(batches) // 8 * 8]]).reshape(-1, 8)
    return float(1 - costs.mean(1).sum() / costs.max(1).sum())


def work(folder: Path, epochs: int) -> None:
    """Trains in this process, which may be one of two, and writes what was measured into the folder."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads((os.cpu_count() or 1) if world_size == 1 else 1)
    runs: list[dict[str, Any]] = []
    for layout, share in (("one", "true"), ("two", "false")):
        packed = make_trainer(folder, share_prefix=share, max_tokens_per_batch=MAX_TOKENS)
        sizes, padded, plan = packed._lengths, share == "false", packed._plan
        assert sizes is not None and plan is not None
        mean = round(PAIRS / len(plan.batches))
        for name, number in (
            ("packed", None),
            ("fixed, same peak", largest_fixed(sizes, padded)),
            ("fixed, same mean", mean),
        ):
            options = {"share_prefix": share, "per_device_train_batch_size": number}
            trainer = packed if number is None else make_trainer(folder, **options)
            shapes: list[int] = []

            def record(examples: Any, collate: Any = trainer.data_collator, shapes: list[int] = shapes) -> Any:
                batch = collate(examples)
                shapes.append(batch["input_ids"].numel())
                return batch

            trainer.data_collator = record
            run: dict[str, Any] = {"rows_per_pair": layout, "batches": name, "sizes": [min(sizes), max(sizes)]}
            run["waiting_of_8_processes"] = round(waiting(sizes, padded, number), 3)
            runs.append({**run, "trainer": trainer, "tokens": shapes, "seconds": []})
    for epoch in range(epochs + 1):
        for run in runs:
            run["tokens"].clear()
            start = time.perf_counter()
            run["trainer"].train()
            if epoch:
                run["seconds"].append(time.perf_counter() - start)
    if int(os.environ.get("RANK", 0)) == 0:
        for run in runs:
            del run["trainer"]
        (folder / f"{world_size}.json").write_text(json.dumps(runs))


def main(epochs: int) -> None:
    worker = [str(Path(__file__).resolve()), "--worker"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [" ".join(WORDS)] * 500
        build_tiny_vlm(folder / "base", num_layers=2, vision_depth=2, patch_size=16, extra_texts=words)
        make_pairs(folder).save_to_disk(str(folder / "pairs"))
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TRANSFORMERS_VERBOSITY": "error"}
        for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
            command = [sys.executable, *launcher, *worker, name, str(epochs)]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        measured = [json.loads((folder / f"{number}.json").read_text()) for number in (1, 2)]
    rows = []
    for one, two in zip(*measured, strict=True):
        tokens = one.pop("tokens")
        rates = [round(statistics.median(PAIRS / s for s in run["seconds"]), 2) for run in (one, two)]
        row = {**one, "seconds": one["seconds"], "seconds_of_2_processes": two["seconds"]}
        row.update(pairs_per_second=rates[0], pairs_per_second_of_2_processes=rates[1])
        row.update(pairs_per_batch=round(PAIRS / len(tokens), 1), tokens_per_epoch=sum(tokens))
        row.update(mean_batch=round(sum(tokens) / len(tokens)), largest_batch=max(tokens))
        rows.append(row)
    report(rows, epochs)


def report(rows: list[dict], epochs: int) -> None:
    heads = ["rows per pair", "batches", "pairs/s", "", "pairs/s, 2 processes", "", "pairs a batch", "tokens an epoch"]
    heads += ["mean batch", "largest batch", "8 processes wait"]
    table = []
    for row in rows:
        peer = next(
            r for r in rows if (r["rows_per_pair"], r["batches"]) == (row["rows_per_pair"], "fixed, same peak")
        )
        cells = [row["rows_per_pair"], row["batches"]]
        for name in ("pairs_per_second", "pairs_per_second_of_2_processes"):
            cells += [f"{row[name]:.1f}", f"{row[name] / peer[name]:.2f} x"]
        cells += [f"{row['pairs_per_batch']:.1f}", f"{row['tokens_per_epoch']:,}", f"{row['mean_batch']:,}"]
        cells += [f"{row['largest_batch']:,}", f"{row['waiting_of_8_processes']:.0%}"]
        table.append(cells)
    shortest, longest = rows[0]["sizes"]
    lines = [
        markdown(heads, table),
        "",
        f"{PAIRS} pairs of {shortest} to {longest} tokens, `max_tokens_per_batch={MAX_TOKENS}`, medians of {epochs} "
        'epochs on a CPU; "x" is against the fixed batches of the same peak. The last column is computed.',
    ]
    write("token_packing", "\n".join(lines), {"rows": rows, "epochs": epochs})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
