"""Preference pairs from a judge that is biased and noisy: how many are in the right order, and is the bias found?

The judge knows how many of four handwritten digits an answer reads wrongly. In lists it favours places by known
points, and with probability 0.15 a score is drawn evenly from the whole scale instead: in lists each score by itself,
of single answers the scores of all criteria together. It is asked through an HTTP server on this machine.

    python benchmarks/distill_digits.py [SEED ...]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars
from lib.report import markdown, write
from scipy.stats import spearmanr

from tests.debias.digit_judge import BIAS, DigitJudge, digit_prompts, wrong_digits
from tests.judge.server import JudgeServer
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.debias import distill
from trl_dt2it.judge import Endpoint, JudgeClient


NUM_PROMPTS, NUM_SHUFFLES, PAIRS_PER_PROMPT, ALIKE, NOISE = 300, 4, 3, 0.1, 0.15
LEAST_CORRECT, LEAST_CORRELATION, LARGEST_ERROR = 0.97, 0.9, 0.03
# Standard deviation of whole-number scores around the truth; 0 for scores that are exact but for bias and noise.
SPREADS = (0.0, 0.5)


def run(seed: int, spread: float) -> dict:
    """Figures of one run from prompts to pairs."""
    prompts, truth = digit_prompts(NUM_PROMPTS, seed=seed, alike=ALIKE)
    judge_of_digits = DigitJudge(truth, noise=NOISE, seed=seed, spread=spread)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, JudgeServer(judge_of_digits) as server:
        clients = {
            role: JudgeClient(
                Endpoint(server.base_url, role, temperature=temperature),
                Path(folder) / f"{role}.jsonl",
                show_progress=False,
            )
            for role, temperature in (("judge", 0.0), ("generator", 1.0))
        }
        pairs, report = distill(
            prompts, **clients, num_shuffles=NUM_SHUFFLES, pairs_per_prompt=PAIRS_PER_PROMPT, seed=seed
        )
        calls = len(server.requests)
    wrong = np.array([wrong_digits(row, truth) for row in leave_images_encoded(pairs)])
    gaps = wrong[:, 1] - wrong[:, 0]
    bias = next(one for one in report.position_bias if one.num_candidates == len(BIAS))
    errors = np.abs(np.array(bias.effects) - BIAS)
    return {
        "seed": seed,
        "spread": spread,
        "pairs": len(pairs),
        "correct": float((gaps > 0).mean()),
        "spearman": float(spearmanr(pairs["strength"][:], gaps).statistic),
        "bias_error": float(errors.max()),
        "standard_error": max(bias.standard_errors),
        "effects": list(bias.effects),
        "noise_rate": bias.noise_rate,
        "agreement": report.agreement.rate,
        "added": report.diversity["corrupted"] + report.diversity["rewritten"],
        "calls": calls,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(seeds: list[int]) -> None:
    disable_progress_bars()
    rows = [run(seed, spread) for spread in SPREADS for seed in seeds]
    names = [
        *("judge", "seed", "pairs", "correct order", "Spearman", "largest error of the bias", "its standard error"),
        *("noise found", "judgements agree", "candidates added", "calls", "time"),
    ]
    cells = [
        [
            "whole numbers" if row["spread"] else "exact",
            *(str(row["seed"]), str(row["pairs"]), f"{row['correct']:.4f}", f"{row['spearman']:.3f}"),
            *(f"{row['bias_error']:.4f}", f"{row['standard_error']:.4f}", f"{row['noise_rate']:.1%}"),
            *(f"{row['agreement']:.1%}", str(row["added"]), str(row["calls"]), f"{row['seconds']} s"),
        ]
        for row in rows
    ]
    planted = ", ".join(f"{worth:+g}" for worth in BIAS)
    text = [
        f"{NUM_PROMPTS} prompts with 4 candidates that read 0 to 4 of 4 handwritten digits wrongly, {ALIKE:.0%} of "
        f"the prompts with candidates that are alike; {NUM_SHUFFLES} orders. Planted position bias: {planted} points "
        f"on a scale of 1 to 10. With probability {NOISE} a score is drawn evenly from the whole scale: in lists each "
        "score by itself, of single answers all criteria together.",
        "",
        "The exact judge is right but for bias and noise. The other adds a normal error with a standard deviation of "
        "0.5 points and rounds to whole numbers, as language models do; its bias is known up to the standard error.",
        "",
        markdown(names, cells),
        "",
        "Spearman is between the strength of a pair and the difference in wrong digits. That difference has four "
        "values, which alone keeps the coefficient of a strength without ties below 0.97.",
    ]
    settings = {"prompts": NUM_PROMPTS, "shuffles": NUM_SHUFFLES, "noise": NOISE, "alike": ALIKE, "bias": BIAS}
    write("distill_digits", "\n".join(text), {"rows": rows, "settings": settings})
    exact = [row for row in rows if not row["spread"]]
    if any(
        row["correct"] < LEAST_CORRECT or row["spearman"] < LEAST_CORRELATION or row["bias_error"] > LARGEST_ERROR
        for row in exact
    ):
        sys.exit("A seed fell short.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
