"""Strengths on a common scale, per source."""

import numpy as np
import pytest

from trl_dt2it.training.losses import fit_strength


NAN = float("nan")


def test_rank_is_the_share_of_weaker_pairs_per_source():
    strength = [1.0, 2.0, 2.0, 4.0, 0.9, 0.7, None]
    source = ["a", "a", "a", "a", "b", "b", "a"]
    normalizer = fit_strength(strength, source, how="rank")
    # a: 1 -> 0.5 of 4; 2 -> 1 weaker and 2 equal, (1 + 3) / 8; 4 -> (3 + 4) / 8.  b: 0.7 -> 1/4, 0.9 -> 3/4.
    np.testing.assert_allclose(normalizer(strength, source), [0.125, 0.5, 0.5, 0.875, 0.75, 0.25, 0.5])


def test_rank_has_mean_one_half():
    rng = np.random.default_rng(0)
    strength = rng.integers(0, 4, 1000).astype(float)
    values = fit_strength(strength, None, how="rank")(strength, [None] * 1000)
    assert values.mean() == pytest.approx(0.5, abs=1e-12)
    assert np.all(np.argsort(values, kind="stable") == np.argsort(strength, kind="stable"))


def test_new_values_are_placed_among_those_seen():
    normalizer = fit_strength([1.0, 2.0, 3.0, 4.0], None, how="rank")
    np.testing.assert_allclose(normalizer([0.0, 2.5, 9.0, NAN], [None] * 4), [0.0, 0.5, 1.0, 0.5])


def test_quantile():
    strength = list(np.arange(101.0))
    normalizer = fit_strength(strength, None, how="quantile", neutral=0.3)
    np.testing.assert_allclose(normalizer([0.0, 47.5, 95.0, 100.0, None], [None] * 5), [0, 0.5, 1, 1, 0.3])


def test_a_source_not_seen_gets_the_neutral_value():
    normalizer = fit_strength([1.0], ["a"], how="rank", neutral=0.4)
    np.testing.assert_allclose(normalizer([1.0, 7.0], ["a", "b"]), [0.5, 0.4])


def test_constant_strengths():
    np.testing.assert_allclose(fit_strength([2.0, 2.0], None, how="rank")([2.0], [None]), [0.5])
    np.testing.assert_allclose(fit_strength([0.0, 0.0], None, how="quantile")([0.0], [None]), [1.0])


def test_none_wants_the_unit_interval():
    normalizer = fit_strength([0.2, 1.0], None, how="none")
    np.testing.assert_allclose(normalizer([0.2, None, 1.0], [None] * 3), [0.2, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"strength 3.0 lies outside \[0, 1\]; set .* or scale the column"):
        normalizer([3.0], [None])
