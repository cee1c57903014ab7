"""How much faster does `RewardScorer` score eight candidates of a prompt than one conversation after the other?

On a random Qwen3-VL, for shapes of a prompt and its answers: `score` with all eight candidates, prompt and image read
once; the same eight answers one by one, each a conversation of its own as transformers reads it (chat template, image
and forward pass anew each time); and as one padded batch of eight with the image eight times. Everything counts, from
the image to the number. The three are timed in turn, so that a machine with other work slows down all of them.

Prints a table and writes `benchmarks/results/scoring_throughput.{json,md}`. Fails below four times one by one where
the prompt has 1,100 tokens and an answer 100.

usage: python benchmarks/scoring_throughput.py [RUNS]
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from lib.report import in_turn, markdown, ratio, write
from lib.vlm import load, rows_of
from PIL import Image

from trl_dt2it import RewardScorer


ASKED = "1100/100"
SHAPES = (ASKED, "300/60", "300/135")
CANDIDATES = 8
FLOOR = 4.0


@torch.no_grad()
def plain_rewards(model, processor, prompt: str, answers: list[str], image: Image.Image) -> list[float]:
    """Conversations in one padded batch, each with its image, with nothing of ours but the class of the model."""
    question = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}
    conversations = [
        [question, {"role": "assistant", "content": [{"type": "text", "text": answer}]}] for answer in answers
    ]
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    return model(**inputs).logits[:, 0].tolist()


def measure(directory: Path, scorer: RewardScorer, shape: str, runs: int) -> dict:
    rows = rows_of(directory, shape, CANDIDATES // 2)
    prompt = rows[0]["prompt"][0]["content"][1]["text"]
    answers = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    image = Image.open(rows[0]["images"][0]).convert("RGB")
    given = (scorer.model, scorer.collator.processing_class, prompt)
    ways = {
        "RewardScorer": lambda: scorer.score(prompt, answers, [image]),
        "one by one": lambda: [plain_rewards(*given, [answer], image)[0] for answer in answers],
        "one padded batch": lambda: plain_rewards(*given, answers, image),
    }
    rewards = {name: way() for name, way in ways.items()}
    difference = max(
        abs(a - b) for found in rewards.values() for a, b in zip(rewards["RewardScorer"], found, strict=True)
    )
    seconds = in_turn(ways, runs, warmup=0)
    return {
        "shape": shape,
        "seconds": seconds,
        "speedups": {name: ratio(seconds[name], seconds["RewardScorer"]) for name in list(ways)[1:]},
        "difference": difference,
    }


def main(runs: int) -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(Path(folder))
        scorer = RewardScorer(model.eval(), processor)
        results = [measure(Path(folder), scorer, shape, runs) for shape in SHAPES]
    names = ["prompt/answer tokens", "RewardScorer, s", "one by one, s", "one padded batch, s"]
    names += ["faster than one by one", "faster than a batch", "largest difference"]
    cells = [
        [
            result["shape"],
            *(f"{median(times):.2f}" for times in result["seconds"].values()),
            *(f"{speedup:.2f}x" for speedup in result["speedups"].values()),
            f"{result['difference']:.1e}",
        ]
        for result in results
    ]
    text = [
        f"{CANDIDATES} candidates of one prompt with one image, from the image to the rewards, fp32, medians of "
        f"{runs} runs in turn. {FLOOR:g}x one by one is asked for at {ASKED}; the longer the answers beside the "
        "prompt, the less there is to share.",
        "",
        markdown(names, cells),
    ]
    write("scoring_throughput", "\n".join(text), {"results": results, "runs": runs, "candidates": CANDIDATES})
    (asked,) = [result for result in results if result["shape"] == ASKED]
    if asked["speedups"]["one by one"] < FLOOR:
        sys.exit(f"Less than {FLOOR:g} times as fast as one by one.")
    if max(result["difference"] for result in results) > 1e-4:
        sys.exit("The rewards differ.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
