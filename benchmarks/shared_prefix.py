"""How much faster is one row per pair than two, how near is that to the limit, and what does it do to memory?

On a random Qwen3-VL, for four shapes of a pair: the time of forward and backward pass of four pairs in one row and in
two, in turn, against the number of operations that the two layouts need (linear layers and attention, vision
included); the peak memory of a process that does the same; and the time to score eight candidates of a prompt in one
row, in eight rows, and one by one.

Prints tables and writes `benchmarks/results/shared_prefix.{json,md}`.

usage: python benchmarks/shared_prefix.py [RUNS]
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from lib.operations import count
from lib.report import in_turn, markdown, peak_memory, printed_by, ratio, write
from lib.vlm import batches, load, rows_of, step

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.models.rendering import encode_completions
from trl_dt2it.models.shared_prefix import pack_completions


SHAPES = ("300/60", "1100/100", "1100/400", "100/300")
PAIRS = 4


def measure_speed(directory: Path, shape: str, runs: int) -> dict:
    model, processor = load(directory)
    layouts = batches(processor, rows_of(directory, shape, PAIRS))
    seconds = in_turn({name: lambda batch=batch: step(model, batch) for name, batch in layouts.items()}, runs)
    operations = {name: count(model, layouts[name]) for name in ("one row", "two rows")}
    limit = operations["two rows"] / operations["one row"]
    speedup = ratio(seconds["two rows"], seconds["one row"])
    return {
        "shape": shape,
        "seconds": seconds,
        "operations": operations,
        "limit": limit,
        "speedup": speedup,
        "speedup_over_image_once": ratio(seconds["two rows, image once"], seconds["one row"]),
        "share_of_limit": speedup / limit,
    }


def memory_of(directory: Path, shape: str, layout: str) -> int:
    """Peak memory of a process of its own above what it held before the first step, in bytes."""
    return printed_by(__file__, "--memory", str(directory), shape, layout)


def measure_memory(directory: Path, shape: str, layout: str) -> None:
    model, processor = load(directory)
    batch = batches(processor, rows_of(directory, shape, PAIRS))[layout]
    print(json.dumps(peak_memory(lambda: [step(model, batch) for _ in range(2)])))


@torch.no_grad()
def measure_scoring(directory: Path, runs: int, candidates: int = 8) -> dict:
    model, processor = load(directory)
    model.eval()
    collator = MultimodalPreferenceCollator(processor)
    rows = rows_of(directory, "1100/100", PAIRS)
    rendered = collator.render(rows[0])
    answers = [row[side] for row in rows for side in ("chosen", "rejected")][:candidates]
    rendered.texts = [processor.apply_chat_template([*rows[0]["prompt"], *answer]) for answer in answers]
    branches, images = encode_completions([rendered], processor)
    group = [branch[0] for branch in branches]
    packed = {**pack_completions([group], collator.image_token_ids), **images}
    singles = [{**{key: value[None] for key, value in branch.items()}, **images} for branch in group]
    together = {
        key: torch.nn.utils.rnn.pad_sequence([branch[key] for branch in group], batch_first=True) for key in group[0]
    }
    together["attention_mask"] = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(branch["input_ids"]) for branch in group], batch_first=True
    )
    together |= {key: torch.cat([value] * candidates) for key, value in images.items()}

    scores = {
        "one row": lambda: model(**packed).logits[:, 0],
        "eight rows in a batch": lambda: model(**together).logits[:, 0],
        "one by one": lambda: torch.cat([model(**single).logits[:, 0] for single in singles]),
    }
    results = {name: score() for name, score in scores.items()}
    difference = max((results["one row"] - result).abs().max().item() for result in results.values())
    seconds = in_turn(scores, runs)
    speedups = {name: ratio(seconds[name], seconds["one row"]) for name in scores}
    return {"seconds": seconds, "speedups": speedups, "largest_difference": difference, "candidates": candidates}


def main(runs: int) -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        load(directory)
        speed = [measure_speed(directory, shape, runs) for shape in SHAPES]
        memory = {
            shape: {layout: memory_of(directory, shape, layout) for layout in ("one row", "two rows")}
            for shape in SHAPES
        }
        scoring = measure_scoring(directory, runs)
    names = ["prompt/answer tokens", "one row, s", "two rows, s", "faster by", "operations, fewer by"]
    names += ["share of the limit", "faster than two rows with the image once"]
    table = [
        [
            result["shape"],
            *(f"{median(result['seconds'][name]):.2f}" for name in ("one row", "two rows")),
            f"{result['speedup']:.2f}x",
            f"{result['limit']:.2f}x",
            f"{result['share_of_limit']:.2f}",
            f"{result['speedup_over_image_once']:.2f}x",
        ]
        for result in speed
    ]
    parts = [f"Forward and backward pass of {PAIRS} pairs, fp32, medians of {runs} runs in turn.", ""]
    parts += [markdown(names, table), "", "Peak memory of the same, above that of the loaded model.", ""]
    table = [
        [
            shape,
            *(f"{peaks[name] / 1e9:.2f}" for name in ("one row", "two rows")),
            f"{peaks['two rows'] / peaks['one row']:.2f}x",
        ]
        for shape, peaks in memory.items()
    ]
    parts += [markdown(["prompt/answer tokens", "one row, GB", "two rows, GB", "less by"], table), ""]
    parts += [f"Scoring {scoring['candidates']} candidates of one prompt, 1100/100 tokens, without gradients.", ""]
    table = [
        [name, f"{median(scoring['seconds'][name]):.2f}", f"{scoring['speedups'][name]:.2f}x"]
        for name in scoring["seconds"]
    ]
    parts += [markdown(["layout", "s", "one row is faster by"], table), ""]
    parts += [f"Largest difference of a reward: {scoring['largest_difference']:.1e}."]
    write("shared_prefix", "\n".join(parts), {"speed": speed, "memory": memory, "scoring": scoring, "runs": runs})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        torch.set_num_threads(2)
        measure_memory(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
