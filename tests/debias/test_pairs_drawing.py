"""Drawing pairs: even over bins, capped for each prompt, the same whatever the order."""

from collections import Counter

import numpy as np
import pytest

from trl_dt2it.debias.distillation.pairs import BIN_IS_FULL, DRAWN, PROMPT_IS_FULL, draw_pairs, strength_bins


def pairs_of(counts, *, prompts=None, generator="a"):
    """So many pairs of each bin, each of a prompt of its own."""
    bins = np.repeat(np.arange(len(counts)), counts)
    keys = [f"{generator}-{place}" for place in range(len(bins))]
    return bins, keys if prompts is None else prompts, [generator] * len(bins), keys


def drawn_by_bin(bins, found, num_bins):
    return np.bincount(bins[found == DRAWN], minlength=num_bins).tolist()


def test_bins_have_one_width_and_take_what_lies_outside():
    strengths = np.array([0.5, 1.0, 2.99, 3.0, 6.9, 7.0, 9.0, 12.0])
    assert strength_bins(strengths, np.linspace(1.0, 9.0, 5)).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert strength_bins(np.array([1.0, 9.0]), [1.0, 9.0]).tolist() == [0, 0]
    assert strength_bins(np.array([]), np.linspace(1.0, 9.0, 4)).tolist() == []


def test_no_bin_has_more_than_the_median_bin():
    bins, prompts, generators, keys = pairs_of([100, 40, 20, 5, 0])
    found = draw_pairs(bins, prompts, generators, keys, pairs_per_prompt=None)
    assert drawn_by_bin(bins, found, 5) == [30, 30, 20, 5, 0]
    assert Counter(found.tolist()) == {DRAWN: 85, BIN_IS_FULL: 80}


def test_each_generator_is_even_by_itself():
    parts = [pairs_of([50, 10, 10], generator="a"), pairs_of([3, 3, 80], generator="b")]
    bins = np.concatenate([part[0] for part in parts])
    prompts, generators, keys = ([value for part in parts for value in part[place]] for place in (1, 2, 3))
    found = draw_pairs(bins, prompts, generators, keys, pairs_per_prompt=None)
    own = np.array(generators) == "a"
    assert drawn_by_bin(bins[own], found[own], 3) == [10, 10, 10]
    assert drawn_by_bin(bins[~own], found[~own], 3) == [3, 3, 3]


def test_a_limit_takes_from_all_bins_alike():
    bins, prompts, generators, keys = pairs_of([100, 40, 20, 5])
    found = draw_pairs(bins, prompts, generators, keys, pairs_per_prompt=None, max_pairs=42)
    assert sorted(drawn_by_bin(bins, found, 4)) == [5, 12, 12, 13]


def test_a_prompt_gives_no_more_than_its_share_and_scarce_bins_first():
    # Ten prompts, each with nine weak pairs and one strong pair.
    bins = np.array([0] * 90 + [1] * 10)
    prompts = [f"p{place % 10}" for place in range(100)]
    keys = list(map(str, range(100)))
    found = draw_pairs(bins, prompts, ["a"] * 100, keys, pairs_per_prompt=2)
    taken = Counter(prompt for prompt, status in zip(prompts, found, strict=True) if status == DRAWN)
    assert max(taken.values()) == 2
    assert drawn_by_bin(bins, found, 2) == pytest.approx([10, 10], abs=1)
    assert Counter(found.tolist())[PROMPT_IS_FULL] > 60


def test_one_bin_keeps_all():
    bins, prompts, generators, keys = pairs_of([37])
    assert (draw_pairs(bins, prompts, generators, keys, pairs_per_prompt=None) == DRAWN).all()


def test_the_order_of_pairs_does_not_matter_and_the_seed_does():
    rng = np.random.default_rng(0)
    bins, prompts, generators, keys = pairs_of([60, 20, 10])
    prompts = [f"p{number}" for number in rng.integers(0, 20, len(keys))]

    def drawn(order, seed):
        found = draw_pairs(
            bins[order],
            [prompts[place] for place in order],
            [generators[place] for place in order],
            [keys[place] for place in order],
            pairs_per_prompt=2,
            seed=seed,
        )
        return {keys[place] for place, status in zip(order, found, strict=True) if status == DRAWN}

    straight = np.arange(len(keys))
    assert drawn(straight, 42) == drawn(rng.permutation(len(keys)), 42)
    assert drawn(straight, 42) != drawn(straight, 43)


def test_nothing_to_draw():
    assert draw_pairs(np.array([], dtype=int), [], [], [], pairs_per_prompt=2).tolist() == []
