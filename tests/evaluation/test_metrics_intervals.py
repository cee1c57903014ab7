"""Intervals against the formula, against a bootstrap that draws rows one by one, and against the truth."""

import math
import random

import numpy as np
import pytest
from scipy.stats import t

from trl_dt2it.evaluation.benchmarks import BENCHMARKS
from trl_dt2it.evaluation.benchmarks.benchmark import Ratio
from trl_dt2it.evaluation.metrics import Tally, bootstrap_intervals, compute_metrics, row_keys, tally, wilson

from .benchmark_rows import mm_rlhf_rows


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (5, 5), (152, 170), (1041, 1247), (1, 3)])
def test_wilson_is_the_formula(hits, total):
    z, p = 1.959963984540054, hits / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    assert wilson(hits / total, total) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-9)


def counted(rows, scores):
    benchmark = BENCHMARKS["mm-rlhf-rewardbench"]
    return tally(benchmark, *row_keys(benchmark, rows), scores)


def test_the_bootstrap_draws_prompts_and_keeps_their_pairs_together():
    rows = mm_rlhf_rows(random.Random(3), 30)
    scores = np.random.default_rng(0).normal([0.7, 0.0], size=(len(rows), 2))
    found = bootstrap_intervals(counted(rows, scores), num_resamples=4000, seed=1)
    # The plain way: draw ids, give each copy an id of its own, compute the metrics of what was drawn.
    rng, drawn = random.Random(0), []
    ids = sorted({row["id"] for row in rows})
    for _ in range(1500):
        copies = [
            ({**rows[i], "id": f"{draw}"}, scores[i])
            for draw, one in enumerate(rng.choices(ids, k=len(ids)))
            for i in range(len(rows))
            if rows[i]["id"] == one
        ]
        drawn.append(
            compute_metrics("mm-rlhf-rewardbench", [row for row, _ in copies], *np.array([s for _, s in copies]).T)
        )
    for name in ("acc", "acc_plus"):
        values = [metrics[name] for metrics in drawn if name in metrics]
        expected = np.quantile(values, [0.025, 0.975])
        # Of 30 prompts, `acc_plus` moves in steps of 1/30.
        assert found[name] == pytest.approx(tuple(expected), abs=1 / 30 + 1e-9), name
    # A category of a few prompts is less certain than percentiles of the draws have it.
    for name in ("acc/mcq", "acc_plus/long"):
        values = [metrics[name] for metrics in drawn if name in metrics]
        low, high = np.quantile(values, [0.025, 0.975])
        assert found[name].high - found[name].low > 0.9 * (high - low), name
    # Pairs of a prompt that are all right or all wrong say less than as many prompts.
    lucky = {one: rng.random() < 0.6 for one in ids}
    alike = np.array([[1.0, 0.0] if lucky[row["id"]] else [0.0, 1.0] for row in rows])
    together = bootstrap_intervals(counted(rows, alike), seed=0)["acc"]
    apart = bootstrap_intervals(counted([{**row, "id": str(i)} for i, row in enumerate(rows)], alike), seed=0)["acc"]
    assert together.high - together.low > 1.4 * (apart.high - apart.low)


def test_the_same_seed_draws_the_same_and_a_mean_has_an_interval():
    benchmark = BENCHMARKS["vl-rewardbench"]
    rows = [{"id": f"{name}{index}"} for name in ("RLHF-V-", "svit-", "mmmu_") for index in range(40)]
    scores = np.random.default_rng(0).normal([0.5, 0.0], size=(120, 2))
    count = tally(benchmark, *row_keys(benchmark, rows), scores)
    first, again, other = (bootstrap_intervals(count, num_resamples=250, seed=seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert set(first) == set(count.values()) == {"overall", "macro", "general", "hallucination", "reasoning"}
    for name, value in count.values().items():
        assert first[name].low < value < first[name].high


def units(*prompts: tuple[int, int]) -> Ratio:
    """Prompts with so many right pairs of so many."""
    return Ratio(*np.array(prompts, dtype=float).T)


def test_single_pairs_have_wilsons_interval_with_students_quantile():
    ratio = units(*[(1, 1)] * 15, *[(0, 1)] * 5)
    (found,) = bootstrap_intervals(Tally({"acc": ratio}, {}, {})).values()
    q = t.ppf(0.975, 19)
    center, half = 0.75 + q * q / 40, q * math.sqrt(0.75 * 0.25 / 20 + q * q / 1600)
    assert found == pytest.approx(((center - half) / (1 + q * q / 20), (center + half) / (1 + q * q / 20)))


def test_six_prompts_that_are_all_right_count_as_six_pairs():
    found = bootstrap_intervals(Tally({"acc": units(*[(4, 4)] * 6), "none": units(*[(0, 4)] * 6)}, {}, {}))
    assert found["acc"] == pytest.approx(wilson(1, 6)) and found["acc"].low < 0.65
    assert found["none"] == pytest.approx(wilson(0, 6))
    # A mean of two shares of six each counts as twelve.
    both = Tally({"a": units(*[(4, 4)] * 6), "b": units(*[(4, 4)] * 6)}, {"mean": ("a", "b")}, {})
    assert bootstrap_intervals(both)["mean"] == pytest.approx(wilson(1, 12))


def test_one_prompt_says_as_much_as_one_pair():
    (found,) = bootstrap_intervals(Tally({"acc": units((3, 4))}, {}, {})).values()
    assert found.low < 0.2 and found.high > 0.95


@pytest.mark.parametrize("correlation", [0.0, 1.0])
@pytest.mark.parametrize("accuracy", [0.7, 0.95])
def test_intervals_of_few_prompts_hold_the_truth(accuracy, correlation):
    rng, held = np.random.default_rng(0), np.zeros(3)
    sizes = np.array([2, 3, 4, 5, 3, 5, 3, 2, 4, 6, 3, 5, 2, 6, 4, 3])
    is_first = np.arange(16) < 6
    for _ in range(150):
        chance = (rng.random(16) < accuracy).astype(float) if correlation else np.full(16, accuracy)
        hits, total = rng.binomial(sizes, chance).astype(float), sizes.astype(float)
        ratios = {name: Ratio(hits * mask, total * mask) for name, mask in (("a", is_first), ("b", ~is_first))}
        found = bootstrap_intervals(Tally(ratios, {"mean": ("a", "b")}, {}), num_resamples=100)
        held += [low <= accuracy <= high for low, high in found.values()]
        assert all(low < high for low, high in found.values())
    assert (held >= 0.92 * 150).all(), held
