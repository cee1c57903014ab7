"""On a GPU in bf16: is one row per pair as exact as two, how much faster, in how much memory, and how fast are scores?

On a Qwen3-VL with the sizes of the published 2B model and random weights, with torch's attention and with the kernels
of FlashAttention 2 that torch carries (see `lib/torch_flash.py`):

- `speed`: forward and backward pass of one row per pair, of two rows with each image once and of two plain rows, in
  turn, by the clock of the GPU, with and without gradient checkpointing, against the number of operations that the
  layouts need; and the most memory that each takes above the weights.
- `busy`: for how much of that time the GPU computes, without checkpointing.
- `scoring`: eight candidates of a prompt through `RewardScorer`: in one row, as a padded batch, and one by one; from
  the image to the number.
- `exactness`: how far rewards and gradients lie from those of the same weights in fp32, as norm of the difference over
  norm, in bf16 and with fp32 weights under autocast. Round-off makes both layouts miss; one row must not miss by more.
- `training`: the digits recipe, seconds and held-out accuracy, with one row per pair and with two.

Prints tables and writes `benchmarks/results/gpu_shared_prefix.{json,md}`, after each part anew. `--device cpu --small`
tries the script.

usage: python benchmarks/gpu_shared_prefix.py [--parts PART ...] [--runs N] [--workdir DIR] [--output_dir DIR]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from lib.gpu_tables import tables
from lib.operations import count
from lib.published import build
from lib.report import RESULTS, in_turn, ratio, wall_seconds, write
from lib.torch_flash import install, kernel_shares_heads, set_attention
from lib.vlm import batches, rows_of, step
from PIL import Image
from torch.nn.functional import logsigmoid

from trl_dt2it import RewardScorer


ROOT = Path(__file__).parents[1]


SHAPES = {"300/135": 8, "1100/100": 4, "1100/400": 4}  # tokens of prompt and answer, and pairs of a batch
ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2"}
LAYOUTS = ("one row", "two rows, image once", "two rows")
DRAWS = (("300/135", 0), ("300/135", 4), ("300/135", 8), ("1100/100", 0))  # shape, and the first of four pairs
CANDIDATES = 8


def on(device: torch.device, batch: dict) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def seconds_of(function) -> float:
    """By the GPU's own clock, from the first kernel to the last."""
    if not torch.cuda.is_available():
        return wall_seconds(function)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(function) -> int | None:
    """Most memory above what is held before; `None` where the card has not enough. It is also the first warm-up."""
    if not torch.cuda.is_available():
        function()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        function()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def matrix_rate(device: torch.device, size: int) -> float:
    """Operations a second of a large matrix product in bf16, which is what the card can do at best."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = in_turn({"product": lambda: a @ b}, runs=10, warmup=3, clock=seconds_of)["product"]
    return 2 * size**3 / sorted(seconds)[5]


def speed(options) -> Iterator[dict]:
    model, processor = build(options.workdir, options.device, small=options.small)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for attention, implementation in ATTENTION.items():
            set_attention(model, implementation)
            for shape, pairs in options.shapes.items():
                rows = rows_of(options.workdir, shape, 12)[:pairs]
                layouts = {name: on(options.device, batch) for name, batch in batches(processor, rows).items()}
                steps = {name: lambda batch=batch: step(model, batch) for name, batch in layouts.items()}
                peaks = {}
                for name in LAYOUTS:
                    peaks[name] = peak_bytes(steps[name])
                    model.zero_grad()
                fitting = {name: steps[name] for name in LAYOUTS if peaks[name] is not None}
                operations = {name: count(model, layouts[name]) for name in ("one row", "two rows")}
                result = {
                    "attention": attention,
                    "checkpointing": checkpointing,
                    "shape": shape,
                    "pairs": pairs,
                    "peak_bytes": peaks,
                    "operations": operations,
                    "limit": operations["two rows"] / operations["one row"],
                    "seconds": in_turn(fitting, options.runs, warmup=0, clock=seconds_of),
                }
                for name in LAYOUTS[1:]:
                    if {name, "one row"} <= fitting.keys():
                        result[f"faster than {name}"] = ratio(result["seconds"][name], result["seconds"]["one row"])
                yield result


def busy(options) -> Iterator[dict]:
    """How long kernels run within a step; the clock says more where the CPU does not launch them fast enough."""
    model, processor = build(options.workdir, options.device, small=options.small)
    for attention, implementation in ATTENTION.items():
        set_attention(model, implementation)
        for shape, pairs in options.shapes.items():
            given = batches(processor, rows_of(options.workdir, shape, 12)[:pairs])
            for name in ("one row", "two rows"):
                batch = on(options.device, given[name])
                step(model, batch)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    step(model, batch)
                    torch.cuda.synchronize()
                seconds = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
                yield {"attention": attention, "shape": shape, "layout": name, "seconds": seconds}


@torch.no_grad()
def scoring(options) -> Iterator[dict]:
    model, processor = build(options.workdir, options.device, small=options.small)
    exact, _ = build(options.workdir, options.device, small=options.small)
    together, padded = (RewardScorer(model, processor, share_prefix=share) for share in ("auto", "false"))
    plain = RewardScorer(exact.float(), processor, share_prefix="false")
    for attention, implementation in ATTENTION.items():
        set_attention(model, implementation)
        for shape in options.shapes:
            rows = rows_of(options.workdir, shape, 12)[: CANDIDATES // 2]
            prompt = rows[0]["prompt"][0]["content"][1]["text"]
            answers = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
            given = [prompt, answers, [Image.open(rows[0]["images"][0]).convert("RGB")]]
            scores = {
                "one row": lambda given=given: together.score(*given),
                "padded batch, image once": lambda given=given: padded.score(*given),
                "one by one": lambda given=given: one_by_one(padded, *given),
            }
            expected = torch.tensor(one_by_one(plain, *given))
            errors = {name: relative(torch.tensor(score()), expected) for name, score in scores.items()}
            seconds = in_turn(scores, options.runs)
            speedups = {name: ratio(seconds[name], seconds["one row"]) for name in scores}
            found = {"attention": attention, "shape": shape, "seconds": seconds, "speedups": speedups}
            yield {**found, "errors": errors}


def one_by_one(scorer: RewardScorer, prompt: str, answers: list[str], images: list[Image.Image]) -> list[float]:
    return [scorer.score(prompt, [answer], images)[0] for answer in answers]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def exactness(options) -> Iterator[dict]:
    """fp32 weights are those of bf16, so that all compute the same function."""
    model, processor = build(options.workdir, options.device, small=options.small)
    exact, _ = build(options.workdir, options.device, small=options.small)
    exact.float()
    for each in (model, exact):
        each.gradient_checkpointing_enable({"use_reentrant": False})  # computes the same, in less memory
    for shape, first in DRAWS if not options.small else (("100/300", 0),):
        pairs = rows_of(options.workdir, shape, 12)[first : first + (2 if options.small else 4)]
        layouts = {name: on(options.device, batch) for name, batch in batches(processor, pairs).items()}
        set_attention(exact, "sdpa")
        expected = rewards_and_gradients(exact, layouts["two rows"])
        settings = [("fp32", exact, "sdpa")]
        settings += [(kind, one, name) for name in ATTENTION for kind, one in (("bf16", model), ("autocast", exact))]
        for kind, one, attention in settings:
            set_attention(one, ATTENTION[attention])
            for layout in LAYOUTS:
                with torch.autocast(options.device.type, torch.bfloat16, enabled=kind == "autocast"):
                    rewards, gradients = rewards_and_gradients(one, layouts[layout])
                result = {"draw": [shape, first], "numbers": kind, "attention": attention, "layout": layout}
                result["rewards"] = relative(rewards, expected[0])
                result["margins"] = relative(torch.sub(*rewards.chunk(2)), torch.sub(*expected[0].chunk(2)))
                result["gradients"] = distance(gradients, expected[1])
                del gradients
                yield result


def rewards_and_gradients(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    rewards = model(**batch).logits[:, 0].float()
    (-logsigmoid(torch.sub(*rewards.chunk(2)))).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return rewards.detach(), gradients


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """All gradients as one vector: norm of the difference over norm."""
    assert found.keys() == expected.keys()
    difference = sum((found[name].float() - expected[name]).double().pow(2).sum() for name in expected)
    return (difference / sum(gradient.double().pow(2).sum() for gradient in expected.values())).sqrt().item()


def training(options) -> Iterator[dict]:
    """The digits recipe on the GPU as a user runs it: weights in fp32 under bf16 autocast, and torch's attention."""
    for layout, share in (("one row", "auto"), ("two rows", "false")):
        output = options.workdir / f"digits-{share}"
        command = [sys.executable, str(ROOT / "recipes/train_reward_model.py")]
        command += ["--config", str(ROOT / "recipes/configs/digits.yaml"), "--eval_strategy", "no"]
        command += ["--use_cpu", str(options.device.type == "cpu"), "--bf16", "true"]
        command += ["--share_prefix", share, "--output_dir", str(output), *(["--max_steps", "2"] * options.small)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        summary = json.loads((output / "summary.json").read_text())
        yield {
            "layout": layout,
            "steps": summary["steps"],
            "seconds": summary["train_seconds"],
            "accuracy": summary["eval_accuracy"],
        }


PARTS = {"speed": speed, "busy": busy, "scoring": scoring, "exactness": exactness, "training": training}


def main(options) -> None:
    options.workdir.mkdir(parents=True, exist_ok=True)
    found = options.workdir / "found.json"  # of the parts that ran before, each in a process of its own
    record = json.loads(found.read_text()) if found.exists() else {}
    install()
    if options.device.type == "cuda":
        record["card"] = torch.cuda.get_device_name()
        record["kernel shares heads"] = kernel_shares_heads()
        record["matrix_rate"] = matrix_rate(options.device, 8192)
    for part in options.parts:
        record |= {part: [], f"runs of {part}": options.runs}
        for result in PARTS[part](options):
            record[part].append(result)
            found.write_text(json.dumps(record))
            print(part, json.dumps(result)[:500], flush=True)
        write("gpu_shared_prefix", tables(record, LAYOUTS), record, options.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script on a CPU")
    workdir = Path(tempfile.gettempdir()) / "gpu_shared_prefix"
    parser.add_argument("--workdir", type=Path, default=workdir, help="keeps images, processor and parts that ran")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.shapes = {"100/300": 2} if options.small else SHAPES
    main(options)
