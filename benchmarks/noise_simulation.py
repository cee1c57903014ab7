"""Does the flip rule leave fewer wrong labels than doing nothing, and than the paper's half, whatever the noise?

Simulated models and annotators, of which the truth is known: accuracies of 60 to 98 %, errors that are rare or common
where the model is sure, votes of constant size; wrong labels spread evenly, on hard pairs, on easy ones, on longer
answers, or of a model that guesses. For each, at noise rates of 0 to 0.35 and 50 to 20,000 pairs, with 200 clean pairs
as `reference` and without: the share of wrong labels that each rule leaves, the mean of DRAWS draws, beside that of
the best bounds on the reward margin, which only the truth tells.

Prints a table and writes `benchmarks/results/noise_simulation.{json,md}`.

usage: python benchmarks/noise_simulation.py [DRAWS] [SCENARIO ...]
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import numpy as np
from lib.report import markdown, write
from scipy.special import expit
from scipy.stats import rankdata
from transformers.utils import logging

from trl_dt2it.curation import estimate_noise, flip_weakest_half


Draw = Callable[[np.random.Generator, int, float], tuple[np.ndarray, np.ndarray]]

RATES, COUNTS, REFERENCES = (0.0, 0.1, 0.2, 0.35), (50, 200, 1000, 20_000), 200


def _even(rng: np.random.Generator, count: int, rate: float) -> np.ndarray:
    return rng.random(count) < rate


def _at(rng: np.random.Generator, probability: np.ndarray, rate: float) -> np.ndarray:
    """Draws wrong labels in proportion to a probability, with a mean rate."""
    return rng.random(len(probability)) < np.clip(probability * rate / probability.mean(), 0, 0.95)


def _gap(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.gamma(1.5, 1, count)


# Reward margins, positive where the model is right, and which labels are wrong.
def weak(rng, count, rate):
    """Right in 60 % of the pairs."""
    return rng.normal(0.253, 1, count), _even(rng, count, rate)


def heavy_tails(rng, count, rate):
    """Errors at any margin."""
    return 1.5 * (0.8 * _gap(rng, count) + rng.standard_t(2, count)), _even(rng, count, rate)


def plain(rng, count, rate):
    """Right in 82 %; errors at small margins; even noise."""
    return 1.5 * (0.8 * _gap(rng, count) + rng.normal(0, 1, count)), _even(rng, count, rate)


def hard(rng, count, rate):
    """The same model; people err on hard pairs, where it is unsure too."""
    gap = _gap(rng, count)
    return 1.5 * (0.8 * gap + rng.normal(0, 1, count)), _at(rng, expit(-1.2 * gap), rate)


def harder(rng, count, rate):
    """A better model; people err on hard pairs alone."""
    gap = _gap(rng, count)
    return 1.5 * (0.8 * gap + rng.normal(0, 0.6, count)), _at(rng, expit(-3 * (gap - 0.5)), rate)


def easy(rng, count, rate):
    """People err more on easy pairs."""
    gap = _gap(rng, count)
    return 1.5 * (0.8 * gap + rng.normal(0, 1, count)), _at(rng, expit(1.2 * (gap - 2)), rate)


def longer(rng, count, rate):
    """People prefer the longer answer, and the model leans to it too."""
    sign = rng.choice([-1.0, 1.0], count)
    margin = 1.5 * (0.8 * _gap(rng, count) + 0.5 * sign + rng.normal(0, 1, count))
    return margin, (sign < 0) & _even(rng, count, 2 * rate)


def strong(rng, count, rate):
    """Right in 98 %."""
    return 4 * (0.8 * rng.gamma(2, 1, count) + 0.4 * rng.normal(0, 1, count)), _even(rng, count, rate)


def lapses(rng, count, rate):
    """A good model that guesses 16 % of the pairs, as sure as of the others."""
    margin = 1.5 * (0.8 * _gap(rng, count) + rng.normal(0, 0.6, count))
    guessed = rng.random(count) < 0.16
    return np.where(guessed, rng.choice([-1, 1], count) * np.abs(margin), margin), _even(rng, count, rate)


def confident(rng, count, rate):
    """Right in 85 %, and nearly as sure where it errs."""
    right = rng.random(count) < 0.85
    return np.where(right, 1, -0.8) * rng.gamma(8, 0.3, count), _even(rng, count, rate)


def ranks(rng, count, rate):
    """`plain`, as ranks."""
    margin, wrong = plain(rng, count, rate)
    return np.sign(margin) * rankdata(np.abs(margin)) / count, wrong


def votes(rng, count, rate):
    """All margins of one size, right in 80 %."""
    return np.where(rng.random(count) < 0.8, 1.0, -1.0), _even(rng, count, rate)


def guesses(rng, count, rate):
    """A model that reads nothing."""
    return rng.normal(0, 1, count), _even(rng, count, rate)


SCENARIOS: dict[str, Draw] = {
    one.__name__: one
    for one in (
        *(weak, heavy_tails, plain, hard, harder, easy, longer, strong),
        *(lapses, confident, ranks, votes, guesses),
    )
}


@cache
def best_gain(name: str, rate: float) -> float:
    """Returns by how much the best rule lowers the share of wrong labels: flip where most labels are wrong."""
    margins, wrong = SCENARIOS[name](np.random.default_rng(10**6), 400_000, rate)
    margins = np.where(wrong, -margins, margins)
    edges = np.unique(np.quantile(margins, np.linspace(0, 1, 401)))
    bins = np.searchsorted(edges, margins, side="right") - 1
    every, bad = np.bincount(bins), np.bincount(bins, wrong)
    return float((bad - np.minimum(bad, every - bad)).sum() / len(wrong))


def cell(job: tuple[str, float, int, int]) -> dict:
    """Measures all rules in one setting, in percent."""
    name, rate, count, draws = job
    logging.set_verbosity_error()
    rows = []
    for seed in range(draws):
        rng = np.random.default_rng([seed, count])
        margins, wrong = SCENARIOS[name](rng, count, rate)
        reference, _ = SCENARIOS[name](rng, REFERENCES, 0.0)
        margins = np.where(wrong, -margins, margins)
        alone, told = estimate_noise(margins), estimate_noise(margins, reference)
        masks = (np.zeros(count, bool), flip_weakest_half(margins), alone.flip, told.flip)
        inside = [low <= wrong.mean() <= high for low, high in (alone.interval, told.interval)]
        rows.append([*((wrong ^ mask).mean() for mask in masks), alone.is_identified, told.is_identified, *inside])
    means = dict(
        zip(
            ("nothing", "paper", "alone", "reference", "alone identified", "reference identified"),
            100 * np.mean(np.array(rows, float), axis=0)[:6],
            strict=True,
        )
    )
    means |= dict(
        zip(("alone covered", "reference covered"), 100 * np.mean(np.array(rows, float), 0)[6:], strict=True)
    )
    return {
        "scenario": name,
        "rate": rate,
        "pairs": count,
        "best": means["nothing"] - 100 * best_gain(name, rate),
        **means,
    }


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    names = sys.argv[2:] or list(SCENARIOS)
    jobs = [(name, rate, count, draws) for name in names for rate in RATES for count in COUNTS]
    with ProcessPoolExecutor(2) as pool:
        cells = list(pool.map(cell, jobs))
    table, failed = [], {"worse than nothing": [], "over 1.5 above best": [], "above the paper's": []}
    for one in cells:
        where = f"{one['scenario']} {one['rate']} {one['pairs']}"
        if one["reference"] > one["nothing"] + 1 or one["alone"] > one["nothing"] + 2:
            failed["worse than nothing"].append(where)
        if one["pairs"] >= 1000 and one["reference"] > one["best"] + 1.5:
            failed["over 1.5 above best"].append(f"{where} ({one['reference'] - one['best']:.1f})")
        if one["reference"] > one["paper"]:
            failed["above the paper's"].append(f"{where} ({one['reference'] - one['paper']:.1f})")
        figures = (one[name] for name in ("nothing", "best", "paper", "alone", "reference"))
        told = (f"{one[f'{way} identified']:.0f}, {one[f'{way} covered']:.0f}" for way in ("alone", "reference"))
        table.append([one["scenario"], str(one["rate"]), f"{one['pairs']:,}", *(f"{x:.1f}" for x in figures), *told])
    heads = ("scenario", "noise", "pairs", "nothing", "best possible", "paper's half", "ours alone")
    heads += ("ours with a reference", "identified, covered % (alone)", "identified, covered % (reference)")
    notes = [f"- {name}: {len(where)} of {len(cells)}. {'; '.join(where)}" for name, where in failed.items()]
    text = f"Wrong labels left, %, mean of {draws} draws.\n\n{markdown(heads, table)}\n\n" + "\n".join(notes)
    if sys.argv[2:]:
        print(text)
    else:
        write("noise_simulation", text, {"draws": draws, "cells": cells, "failed": failed})


if __name__ == "__main__":
    main()
