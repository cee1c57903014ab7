"""Do the intervals of a benchmark of few prompts hold the truth, and how wide are they?

Draws results for the 46 prompts and 170 pairs of MM-RLHF-RewardBench: each pair is right with the same probability,
and pairs of a prompt go together with a correlation of 0, 0.3 or 1 (beta-binomial). For all pairs, the categories of
10 and 6 prompts, the share of prompts of which every pair is right, and the mean of the five categories: how often the
interval of `bootstrap_intervals` holds the truth, its mean width, and the same of plain percentiles of the draws.

Prints a table and writes `benchmarks/results/cluster_intervals.{json,md}`. Fails if an interval holds the truth in
less than 92 %, or is a single point.

usage: python benchmarks/cluster_intervals.py [SETS]
"""

import sys

import numpy as np
from lib.report import markdown, write

from trl_dt2it.evaluation.benchmarks.benchmark import pair_ratio, unit_ratio
from trl_dt2it.evaluation.metrics import Tally, bootstrap_intervals


SIZES = np.random.default_rng(0).permutation([2] * 11 + [3] * 13 + [4] * 6 + [5] * 11 + [6] * 5)
CATEGORY = np.array(["mcq"] * 10 + ["long"] * 10 + ["short"] * 10 + ["safety"] * 6 + ["video"] * 10)
UNIT = np.repeat(np.arange(len(SIZES)), SIZES)
PARTS = tuple(sorted(set(CATEGORY.tolist())))
METRICS = ("acc", "acc/mcq", "acc/safety", "acc_plus", "acc_plus/safety", "macro")
ACCURACIES, CORRELATIONS, LEAST = (0.5, 0.7, 0.85, 0.95, 0.98), (0.0, 0.3, 1.0), 0.92
RESAMPLES = 200


def outcomes(accuracy: float, correlation: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs are right, and how probable it was that every pair of each prompt is."""
    num, power = len(SIZES), SIZES.astype(float)
    if correlation == 0:
        return rng.random(len(UNIT)) < accuracy, accuracy**power
    if correlation == 1:
        return (rng.random(num) < accuracy)[UNIT], np.full(num, accuracy)
    a, b = np.array([accuracy, 1 - accuracy]) * (1 / correlation - 1)
    all_right = np.array([np.prod((a + np.arange(size)) / (a + b + np.arange(size))) for size in SIZES])
    return rng.random(len(UNIT)) < rng.beta(a, b, num)[UNIT], all_right


def counted(right: np.ndarray) -> Tally:
    ratios = {"acc": pair_ratio(right, UNIT)}
    ratios |= {f"acc/{part}": pair_ratio(right, UNIT, CATEGORY[UNIT] == part) for part in PARTS}
    plus = {name.replace("acc", "acc_plus"): unit_ratio(ratio) for name, ratio in ratios.items()}
    return Tally({**ratios, **plus}, {"macro": tuple(f"acc/{part}" for part in PARTS)}, {})


def percentiles(tally: Tally, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    times = rng.multinomial(len(SIZES), np.full(len(SIZES), 1 / len(SIZES)), size=RESAMPLES)
    with np.errstate(invalid="ignore"):
        drawn = {name: (times @ ratio.hits) / (times @ ratio.total) for name, ratio in tally.ratios.items()}
    drawn["macro"] = np.mean([drawn[part] for part in tally.averages["macro"]], axis=0)
    return {name: tuple(np.nanquantile(drawn[name], [0.025, 0.975])) for name in METRICS}


def main(sets: int) -> None:
    rows, record, least, points = [], [], 1.0, 0
    for correlation in CORRELATIONS:
        for accuracy in ACCURACIES:
            held = {name: np.zeros(4) for name in METRICS}
            for index in range(sets):
                rng = np.random.default_rng([index, round(100 * accuracy), round(100 * correlation)])
                right, all_right = outcomes(accuracy, correlation, rng)
                tally = counted(right)
                found = bootstrap_intervals(tally, num_resamples=RESAMPLES, seed=index)
                plain = percentiles(tally, rng)
                truth = dict.fromkeys(METRICS, accuracy)
                truth["acc_plus"], truth["acc_plus/safety"] = all_right.mean(), all_right[CATEGORY == "safety"].mean()
                for name in METRICS:
                    for place, (low, high) in ((0, found[name]), (2, plain[name])):
                        held[name][place] += low <= truth[name] <= high
                        held[name][place + 1] += high - low
                    points += found[name].low == found[name].high
            for name in METRICS:
                coverage, width, plain_coverage, plain_width = (held[name] / sets).tolist()
                least = min(least, coverage)
                keys = ("coverage", "width", "percentile_coverage", "percentile_width")
                figures = dict(zip(keys, (held[name] / sets).tolist(), strict=True))
                record.append({"correlation": correlation, "accuracy": accuracy, "metric": name, **figures})
                cells = (f"{coverage:.3f}", f"{width:.2f}", f"{plain_coverage:.3f}", f"{plain_width:.2f}")
                rows.append([f"{correlation:.1f}", f"{accuracy:.2f}", f"`{name}`", *cells])
    names = ("correlation", "accuracy", "metric", "holds the truth", "width", "percentiles hold it", "their width")
    text = (
        f"{sets:,} sets of 170 pairs of 46 prompts each; `mcq` has 10 prompts and `safety` 6. Nominal: 0.95. "
        "Correlation is that of pairs of one prompt. Percentiles are of plain draws of prompts.\n\n"
        f"{markdown(names, rows)}\n\n"
        f"Of {len(rows) * sets:,} intervals, {points} are a single point; the least coverage is {least:.3f}."
    )
    write("cluster_intervals", text, {"sets": sets, "resamples": RESAMPLES, "rows": record})
    if least < LEAST or points:
        raise SystemExit(f"An interval holds the truth in {least:.3f} only, or {points} are points.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
