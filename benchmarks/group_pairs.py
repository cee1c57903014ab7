"""How much faster are the pairs of one prompt read together, and what does that do to memory and to single pairs?

On a random Qwen3-VL, of prompts with four answers each, whose six pairs make a batch: a training step of the trainer,
collation and optimizer included, with the prompt read once (`group_pairs`), in one row per pair, and in two rows per
pair with the image encoded once; all in turn, against the number of operations that the three need. Beside it the peak
memory of a process that does the same, a set whose prompts all differ, and an epoch of a set like VLFeedback's, in
which 80 % of the prompts have six pairs.

Prints tables and writes `benchmarks/results/group_pairs.{json,md}`.

usage: python benchmarks/group_pairs.py [RUNS]
"""

import copy
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from lib.operations import count
from lib.report import in_turn, markdown, peak_memory, printed_by, ratio, wall_seconds, write
from lib.tiny_training import tiny_config
from lib.vlm import LENGTHS, load, rows_of

from trl_dt2it import MultimodalRewardTrainer
from trl_dt2it.data.rows import message_text


SHAPES = ("300/135", "1100/100")
ANSWERS, PROMPTS = 4, 6
LAYOUTS = {
    "one row per prompt": {"group_pairs": "true"},
    "one row per pair": {"group_pairs": "false"},
    "two rows per pair": {"share_prefix": "false", "group_pairs": "false"},
}
WANTED = {"300/135": (3.6, 5.3), "1100/100": (4.5, 7.7)}  # times as fast as one row, and as two rows, per pair
LEAST_SHARE, LEAST_OF_SINGLES = 0.85, 0.98


def ranked(directory: Path, shape: str, sizes: list[int], seed: int = 0) -> list[dict]:
    """All pairs of prompts with so many answers each, those of a prompt next to each other."""
    rng, words = random.Random(seed), LENGTHS[shape]["answer_words"]
    rows = []
    for row, size in zip(rows_of(directory, shape, len(sizes)), sizes, strict=True):
        vocabulary = message_text(row["chosen"][0]).split()
        answers = [" ".join(rng.choices(vocabulary, k=rng.randint(*words))) for _ in range(size)]
        for sides in itertools.combinations(answers, 2):
            pair = copy.deepcopy(row)
            for side, answer in zip(("chosen", "rejected"), sides, strict=True):
                pair[side] = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            rows.append(pair)
    return rows


def trainer_of(directory: Path, rows: list[dict], layout: str, batch_size: int, **more) -> MultimodalRewardTrainer:
    model, processor = load(directory)
    settings = {"train_sampling_strategy": "sequential", "reward_statistics_pairs": 0, "image_root": str(directory)}
    settings |= {"per_device_train_batch_size": batch_size, **LAYOUTS[layout], **more}
    args = tiny_config(str(directory / "outputs"), 42, settings)
    data = Dataset.from_list(rows)
    return MultimodalRewardTrainer(model, args=args, train_dataset=data, processing_class=processor)


def steps_of(trainer: MultimodalRewardTrainer) -> Iterator[dict]:
    """Train, step by step, as the trainer does; yields each batch after its step."""
    trainer.create_optimizer()
    trainer.model.train()
    while True:
        for batch in trainer.get_train_dataloader():
            trainer.training_step(trainer.model, copy.copy(batch), None)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            yield batch


def measure_speed(directory: Path, shape: str, runs: int) -> dict:
    rows = ranked(directory, shape, [ANSWERS] * PROMPTS)
    pairs = ANSWERS * (ANSWERS - 1) // 2
    trainers = {layout: trainer_of(directory, rows, layout, pairs) for layout in LAYOUTS}
    operations, tokens = {}, {}
    for layout, trainer in trainers.items():
        batch = next(iter(trainer.get_train_dataloader()))
        tensors = {name: value for name, value in batch.items() if name != "pairs"}
        operations[layout] = count(trainers[layout].model, tensors)
        whole = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        tokens[layout] = int(whole)
    steps = {layout: steps_of(trainer) for layout, trainer in trainers.items()}
    seconds = in_turn({layout: (lambda step=step: next(step)) for layout, step in steps.items()}, runs)
    together, *others = LAYOUTS
    print(shape, {layout: [round(one, 2) for one in taken] for layout, taken in seconds.items()}, flush=True)
    return {
        "shape": shape,
        "seconds": seconds,
        "tokens": tokens,
        "speedup": {name: ratio(seconds[name], seconds[together]) for name in others},
        "limit": {name: operations[name] / operations[together] for name in others},
    }


def measure_singles(directory: Path, shape: str, runs: int) -> dict:
    """Prompts that all differ, with and without looking for pairs of one prompt."""
    rows = ranked(directory, shape, [2] * PROMPTS)
    steps = {
        group: steps_of(trainer_of(directory, rows, "one row per pair", 2, group_pairs=group))
        for group in ("auto", "false")
    }
    seconds = in_turn({group: (lambda step=step: next(step)) for group, step in steps.items()}, runs)
    return {"shape": shape, "seconds": seconds, "speedup": ratio(seconds["false"], seconds["auto"])}


def measure_epoch(directory: Path, shape: str) -> dict:
    """An epoch of a set like VLFeedback's: of ten prompts, eight have four answers, one three and one two."""
    rows = ranked(directory, shape, [4, 4, 4, 4, 3, 4, 4, 4, 4, 2])
    seconds = {}
    for layout in ("one row per prompt", "one row per pair"):
        trainer = trainer_of(directory, rows, layout, 12, num_train_epochs=1, train_sampling_strategy="random")
        seconds[layout] = wall_seconds(trainer.train)
    faster = seconds["one row per pair"] / seconds["one row per prompt"]
    return {"shape": shape, "pairs": len(rows), "seconds": seconds, "speedup": faster}


def memory_of(directory: Path, shape: str, layout: str) -> dict[str, int]:
    """Peak memory of processes of their own above what they held before the first step, in bytes: of two steps, and of
    a forward pass, which keeps its activations, and makes no gradients, whose size is the same in all layouts."""
    arguments = ("--memory", str(directory), shape, layout)
    return {part: printed_by(__file__, *arguments, part) for part in ("step", "forward")}


def measure_memory(directory: Path, shape: str, layout: str, part: str) -> None:
    trainer = trainer_of(directory, ranked(directory, shape, [ANSWERS]), layout, 6)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)  # whose state is none

    def forward() -> torch.Tensor:
        trainer.model.train()
        return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))

    function = forward if part == "forward" else lambda: list(itertools.islice(steps_of(trainer), 2))
    print(json.dumps(peak_memory(function)))


def main(runs: int) -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        load(directory)
        for shape in SHAPES:
            rows_of(directory, shape, 10)  # as many as any part needs
        # First, because the trainings below leave less of it.
        memory = {shape: {layout: memory_of(directory, shape, layout) for layout in LAYOUTS} for shape in SHAPES}
        print(memory, flush=True)
        speed = [measure_speed(directory, shape, runs) for shape in SHAPES]
        singles, epoch = measure_singles(directory, "300/135", 3 * runs), measure_epoch(directory, "300/135")
    together, *others = LAYOUTS
    heads = ["prompt/answer tokens", *(f"{layout}: tokens, s" for layout in LAYOUTS)]
    for name in others:
        heads += [f"faster than {name}", "of the operations' limit", f"memory of a step, less than {name}"]
        heads += ["of the activations alone"]
    table, short = [], []
    for one in speed:
        shape, row = one["shape"], [one["shape"]]
        row += [f"{one['tokens'][layout]:,}, {median(one['seconds'][layout]):.2f}" for layout in LAYOUTS]
        for name, wanted in zip(others, WANTED[shape], strict=True):
            speedup, limit = one["speedup"][name], one["limit"][name]
            less = [memory[shape][name][part] / memory[shape][together][part] for part in ("step", "forward")]
            row += [f"{speedup:.2f}x", f"{speedup / limit:.2f} of {limit:.2f}x", *(f"{one:.2f}x" for one in less)]
            if speedup < wanted:
                short.append(f"{shape}: {speedup:.2f} times as fast as {name}, not {wanted}")
            if speedup / limit < LEAST_SHARE:
                short.append(f"{shape}: {speedup / limit:.2f} of the limit against {name}")
        table.append(row)
    if singles["speedup"] < LEAST_OF_SINGLES:
        short.append(f"single pairs: {singles['speedup']:.3f} of the speed")
    text = [
        f"A training step of the {ANSWERS * (ANSWERS - 1) // 2} pairs of {ANSWERS} answers to a prompt, fp32, medians "
        f"of {runs} runs in turn.",
        markdown(heads, table),
        f"Of prompts that all differ ({singles['shape']}), looking for pairs of one prompt makes "
        f"{singles['speedup']:.3f} of the speed. An epoch of a set like VLFeedback's ({epoch['pairs']} pairs, "
        f"{epoch['shape']}, in random order, 12 pairs a batch) takes {epoch['seconds'][together]:.0f} s, and in one "
        f"row per pair {epoch['seconds'][others[0]]:.0f} s: {epoch['speedup']:.2f} times as fast.",
    ]
    record = {"speed": speed, "memory": memory, "singles": singles, "epoch": epoch, "runs": runs}
    write("group_pairs", "\n\n".join(text), record)
    if short:
        sys.exit("Fell short:\n" + "\n".join(short))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        torch.set_num_threads(2)
        measure_memory(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
