"""Does the interval of an audit of style hold what the probe reaches on new pairs, as often as it says?

Draws sets of pairs whose style tells the chosen answer with a known accuracy, audits each, and compares the interval
with the accuracy, on 40,000 new pairs, of the probe fitted on the whole set. Three designs: independent pairs with
normal differences, two of which carry the leakage; groups of 4 pairs with differences as real style has them (most
features rarely differ, some have heavy tails), six of which carry it; and groups of 10. In groups, differences and
labels are correlated.

Prints a table and writes `benchmarks/results/style_audit_coverage.{json,md}`. Fails if an interval holds the truth in
less than 93 % or more than 97 % of the sets by more than twice what is chance, or if an estimate is exactly 0.5 in
more than a tenth.

usage: python benchmarks/style_audit_coverage.py [SETS]
"""

import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from lib.report import interval_coverage, markdown, write
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

from trl_dt2it.debias.audit import fit_probe, leakage
from trl_dt2it.debias.style import STYLE_FEATURES, PairStyle


NUM = len(STYLE_FEATURES)
# How differences are distributed, which features carry the leakage, pairs of a group, their correlation.
DESIGNS = {
    "independent": ("normal", (0, 7), 1, 0.0),
    "groups of 4": ("style", (0, 7, 10, 12, 19, 25), 4, 0.5),
    "groups of 10": ("normal", (0, 7), 10, 0.3),
}
ACCURACIES, SIZES = (0.5, 0.543, 0.57, 0.6, 0.63), (200, 400, 1000, 3000)
LEAST, MOST = 0.93, 0.97


def differences(normal: np.ndarray, kind: str) -> np.ndarray:
    """Differences before anyone chose, from normal ones."""
    if kind == "style":
        normal = normal.copy()
        rare = normal[:, 9:18]
        normal[:, 9:18] = np.where(np.abs(rare) > norm.ppf(0.975), np.sign(rare), 0.0)  # in 5 % of the pairs
        normal[:, 18:24] *= np.abs(normal[:, 18:24])
        normal[:, 24:] = np.where(np.abs(normal[:, 24:]) > 1, np.sign(normal[:, 24:]), 0.0)
    return normal


def coefficients(kind: str, carriers: tuple[int, ...], accuracy: float) -> np.ndarray:
    """Log odds under which the best probe has an accuracy."""
    direction = np.zeros(NUM)
    direction[list(carriers)] = 1.0
    score = np.abs(differences(np.random.default_rng(9).normal(size=(200_000, NUM)), kind) @ direction)
    size = brentq(lambda one: float(expit(one * score).mean()) - accuracy, 0, 200) if accuracy > 0.5 else 0.0
    return direction * size


def draw(count: int, design: str, odds: np.ndarray, rng: np.random.Generator) -> PairStyle:
    kind, _, size, correlation = DESIGNS[design]
    group = np.arange(count) // size
    both = [rng.normal(size=(count, NUM + 1)), rng.normal(size=(group[-1] + 1, NUM + 1))[group]]
    normal = np.sqrt(1 - correlation) * both[0] + np.sqrt(correlation) * both[1]
    style = differences(normal[:, :NUM], kind)
    chosen = np.where(norm.cdf(normal[:, NUM]) < expit(style @ odds), 1.0, -1.0)
    return PairStyle(STYLE_FEATURES, style * chosen[:, None], np.ones(NUM), np.ones(count), group)


def cell(design: str, accuracy: float, count: int, sets: int) -> dict:
    """Measure the intervals of all sets of one kind."""
    odds = coefficients(*DESIGNS[design][:2], accuracy)
    rng = np.random.default_rng(5)
    normal = differences(rng.normal(size=(40_000, NUM)), DESIGNS[design][0])
    new = normal * np.where(rng.random(len(normal)) < expit(normal @ odds), 1.0, -1.0)[:, None]
    found = []
    for index in range(sets):
        pairs = draw(count, design, odds, np.random.default_rng([index, count, round(1000 * accuracy)]))
        audit = leakage(pairs)
        found.append([*audit.interval, audit.auc, 0.5 + np.sign(new @ fit_probe(pairs)).mean() / 2])
    low, high, auc, truth = np.array(found).T
    measured = interval_coverage(low, high, auc, truth)
    about = {"design": design, "pairs": count, "best": accuracy}
    return {**about, **measured, "exactly_half": float((auc == 0.5).mean())}


def main(sets: int) -> None:
    cells = [(design, accuracy, count, sets) for design in DESIGNS for count in SIZES for accuracy in ACCURACIES]
    with ProcessPoolExecutor(2) as pool:
        record = list(pool.map(cell, *zip(*cells, strict=True)))
    names = ("pairs", "best probe", "reached", "mean AUC", "holds the truth", "below it", "above it", "width")
    rows = [
        [one["design"], f"{one['pairs']:,}", f"{one['best']:.3f}"]
        + [f"{one[key]:.3f}" for key in ("reached", "estimate", "coverage", "below", "above", "width")]
        for one in record
    ]
    coverage = [one["coverage"] for one in record]
    half = max(one["exactly_half"] for one in record)
    text = (
        f"{sets} sets a line. Nominal: 0.950; of {sets} sets, chance alone is {np.sqrt(0.95 * 0.05 / sets):.3f}. "
        '"Best probe" is the accuracy of the best linear probe, "reached" the mean accuracy on new pairs of the '
        "probes fitted on the sets.\n\n"
        f"{markdown(('design', *names), rows)}\n\n"
        f"Coverage is {np.mean(coverage):.3f} in the mean, {min(coverage):.3f} at least and {max(coverage):.3f} at "
        f"most. An AUC is exactly 0.5 in {half:.3f} of the sets of a line at most."
    )
    write("style_audit_coverage", text, {"sets": sets, "rows": record})
    chance = 2 * np.sqrt(0.95 * 0.05 / sets)
    if not LEAST - chance <= min(coverage) <= max(coverage) <= MOST + chance or half > 0.1:
        raise SystemExit(f"Coverage is {min(coverage):.3f} to {max(coverage):.3f}, exactly 0.5 in {half:.3f}.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
