"""The estimate of the noise: it finds what was planted, and flips nothing that cannot be told."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import norm

from trl_dt2it.curation import noise
from trl_dt2it.curation.noise import estimate_noise, flip_mixture, shared_slope
from trl_dt2it.curation.rules import Flip, decide, flip_negative, flip_weakest_half


# Distributions of the strengths of right labels, in units of their standard deviation, before `mean` is added.
SHAPES = {
    "normal": lambda rng, count: rng.normal(size=count),
    "logistic": lambda rng, count: rng.logistic(size=count) * np.sqrt(3) / np.pi,
    # Hard, middling and easy pairs.
    "levels": lambda rng, count: rng.choice([-1.0, 0, 1], count) * 0.9 + rng.normal(size=count) * 0.68,
    "heavy tails": lambda rng, count: rng.standard_t(4, count) / np.sqrt(2),
}


def planted(rng, count, rate, mean=1.5, shape="normal"):
    """Strengths, and which labels are wrong."""
    wrong = rng.random(count) < rate
    return np.where(wrong, -1, 1) * (mean + SHAPES[shape](rng, count)), wrong


def left(strength, wrong, rule=flip_mixture):
    """Share of labels that are wrong after the flips."""
    return (wrong ^ rule(strength)).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 0.35, 0.45, 0.7])
def test_the_planted_noise_is_found(shape, rate):
    strength, wrong = planted(np.random.default_rng(1), 40_000, rate, shape=shape)
    estimate = estimate_noise(strength)
    assert estimate.is_identified
    assert estimate.rate == pytest.approx(rate, abs=0.02)
    assert estimate.mean == pytest.approx(1.5, abs=0.2) and estimate.std == pytest.approx(1.0, abs=0.2)
    # Probabilities that mean what they say: of the labels called wrong with 0.5 to 0.9, as many are.
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.0)):
        inside = (estimate.posterior > low) & (estimate.posterior <= high)
        if shape == "normal" and inside.sum() > 200:
            assert wrong[inside].mean() == pytest.approx(estimate.posterior[inside].mean(), abs=0.05)


def test_on_normal_strengths_the_posterior_is_the_exact_one():
    strength, _ = planted(np.random.default_rng(0), 50_000, 0.3)
    right, wrong = 0.7 * norm.pdf(strength, 1.5), 0.3 * norm.pdf(strength, -1.5)
    estimate = estimate_noise(strength)
    np.testing.assert_allclose(estimate.posterior, wrong / (right + wrong), atol=0.05)
    assert estimate.slope == pytest.approx(2 * 1.5, rel=0.15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 0.35, 0.45])
def test_the_mixture_leaves_fewer_wrong_labels_than_a_fixed_rule(shape, rate):
    for mean in (1.0, 1.5, 2.5):
        strength, wrong = planted(np.random.default_rng(2), 5000, rate, mean, shape)
        ours = left(strength, wrong)
        if rate == 0.45 and not flip_mixture(strength).any():  # near one half, signs may not tell
            estimate = estimate_noise(strength)
            assert not estimate.is_identified or estimate.evidence < 3.84 or estimate.reading < 15.1
            continue
        # The least of any bound that knows the truth; then the paper's half, and every negative one.
        bounds = np.quantile(strength, np.linspace(0, 1, 201))
        best = min(left(strength, wrong, lambda given, bound=bound: given < bound) for bound in bounds)
        assert ours <= best + 0.03
        assert ours <= min(left(strength, wrong, flip_weakest_half), left(strength, wrong, flip_negative)) + 0.01


def test_reversed_labels_mirror_the_estimate(caplog):
    strength, _ = planted(np.random.default_rng(3), 3000, 0.3)
    estimate, mirrored = estimate_noise(strength), estimate_noise(-strength)
    assert mirrored.rate == pytest.approx(1 - estimate.rate, abs=1e-4)
    np.testing.assert_allclose(mirrored.posterior, 1 - estimate.posterior, atol=1e-3)
    mask = flip_mixture(-strength)
    # What was seen is said, not what is estimated; and what the model ranks as its label does stays.
    seen = (strength > 0).mean()
    assert 0.6 < seen < mirrored.rate and f"contradicts {seen:.1%} of the labels of 3,000 pairs" in caplog.text
    assert mask.any() and not mask[-strength >= 0].any()


def test_what_cannot_be_told_is_not_flipped():
    rng = np.random.default_rng(4)
    flipped = []
    for seed in range(100):
        # A model that guesses, or labels that do: signs are coin flips.
        strength = np.random.default_rng(seed).normal(size=400)
        flipped.append(flip_mixture(strength).mean())
    assert np.mean(np.array(flipped) > 0) == 0
    assert not estimate_noise(rng.normal(size=19) - 5).is_identified
    estimate = estimate_noise([*[np.nan] * 30, 1.0])
    assert np.isnan(estimate.rate) and not estimate.is_identified
    np.testing.assert_array_equal(estimate.posterior, [*[np.nan] * 30, 0.0])


@pytest.mark.parametrize("count", [20, 50, 200])
def test_few_clean_pairs_are_not_flipped_wildly(count):
    spoiled, paper, wild = [], [], 0
    for seed in range(100):
        strength, wrong = planted(np.random.default_rng(seed), count, 0.05, 1.2)
        spoiled.append(left(strength, wrong))
        paper.append(left(strength, wrong, flip_weakest_half))
        wild += flip_mixture(strength).mean() > 0.3
    assert np.mean(spoiled) <= np.mean(paper) + 0.01
    assert wild <= 2


def test_a_reference_finds_noise_in_few_pairs():
    rng = np.random.default_rng(5)
    reference = planted(rng, 300, 0)[0]
    rule = partial(flip_mixture, reference=reference)
    for rate in (0.0, 0.2, 0.5):
        errors, remaining = [], []
        for seed in range(50):
            strength, wrong = planted(np.random.default_rng(seed), 60, rate)
            errors.append(estimate_noise(strength, reference).rate - rate)
            remaining.append(left(strength, wrong, rule))
        assert abs(np.mean(errors)) < 0.04
        assert np.mean(remaining) < 0.1
    # Without one, one half cannot be told from a guess.
    strength, _ = planted(np.random.default_rng(0), 60, 0.5)
    assert not estimate_noise(strength).is_identified
    # A reference on which the model guesses, or is wrong, says that nothing may be flipped.
    for useless in (rng.normal(size=100), -reference, np.zeros(50)):
        assert not flip_mixture(-np.ones(100), reference=useless).any()
    with pytest.raises(ValueError, match="19 scored references; give at least 20"):
        flip_mixture(strength, reference=np.ones(19))


def test_a_fit_that_looks_at_some_of_many_pairs_is_that_of_all(monkeypatch):
    for rate in (0.01, 0.35):
        strength, _ = planted(np.random.default_rng(6), 200_000, rate)
        some = estimate_noise(strength)
        monkeypatch.setattr(noise, "_POINTS", len(strength))
        every = estimate_noise(strength)
        monkeypatch.undo()
        assert some.rate == pytest.approx(every.rate, abs=1e-3) and every.rate == pytest.approx(rate, abs=0.01)
        assert some.slope == pytest.approx(every.slope, rel=0.02)
        np.testing.assert_allclose(some.posterior, every.posterior, atol=0.01)


def test_noise_in_one_source_is_flipped_there():
    rng = np.random.default_rng(7)
    rates = {"clean": 0.02, "noisy": 0.35, "reversed": 0.9}
    strengths, wrongs = zip(*(planted(rng, 3000, rate, 1.2) for rate in rates.values()), strict=True)
    source = np.repeat(list(rates), 3000)
    # A source of 30 has no estimate of its own.
    few, few_wrong = planted(rng, 30, 0.3, 1.2)
    strength, wrong = np.concatenate([*strengths, few]), np.concatenate([*wrongs, few_wrong])
    source = np.r_[source, ["small"] * 30]

    def remaining(rule, by):
        decision = decide(strength, [Flip(rule, by=by)], source=source)
        still = wrong ^ decision.flip
        return {name: still[source == name].mean() for name in [*rates, "small"]}

    ours, pooled, paper = (
        remaining(*way) for way in ((flip_mixture, "source"), (flip_mixture, None), (flip_weakest_half, None))
    )
    assert ours["clean"] < 0.03 < pooled["clean"] and ours["reversed"] < pooled["reversed"]
    assert all(ours[name] < 0.16 for name in rates)
    for name in rates:
        assert ours[name] <= pooled[name] + 0.01 and ours[name] <= paper[name] + 0.01
    assert ours["small"] <= few_wrong.mean()


def test_a_source_is_flipped_on_its_own_evidence_only(caplog):
    """Pairs that the model cannot read look like noise of one half beside those that it reads: none is touched."""
    touched: list[list[bool]] = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        readable, wrong = planted(rng, 1800, 0.3, 1.5)
        others = {
            "unreadable": rng.normal(0, 0.28, 400),
            "unreadable, as loud": rng.normal(0, 1.8, 1000),
            "hardly read": rng.normal(0.08, 0.5, 600),  # right in 56 %, and no label is wrong
            "read a little wrong": rng.normal(-0.08, 0.5, 600),
            "small and clean": planted(rng, 60, 0.0, 1.5)[0],
        }
        source = np.repeat(["readable", *others], [1800, *map(len, others.values())])
        strength = np.concatenate([readable, *others.values()])
        for rule in (flip_mixture, partial(flip_mixture, reference=planted(rng, 200, 0.0, 1.5)[0])):
            caplog.clear()
            flip = decide(strength, [Flip(rule, by="source")], source=source).flip
            touched.append([flip[source == name].any() for name in others])
            assert (wrong ^ flip[:1800]).mean() < 0.5 * wrong.mean() and not flip[strength >= 0].any()
            seen = (others["unreadable"] < 0).mean()
            assert f"contradicts {seen:.1%} of the labels of the 400 pairs of 'unreadable', which does not tell" in (
                caplog.text
            )
    # The test of noise is at the 5 % level, that of guessing stricter.
    share = dict(zip(others, np.mean(touched, axis=0), strict=True))
    assert max(share.values()) <= 0.1 and share["unreadable"] == share["unreadable, as loud"] == 0


def test_noise_of_a_small_source_is_flipped_by_its_own_rate_at_the_slope_of_all():
    before, after = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        parts = [planted(rng, 2000, 0.0, 2.0), planted(rng, 120, 0.3, 2.0)]
        strength, wrong = (np.concatenate(both) for both in zip(*parts, strict=True))
        flip = decide(strength, [Flip(flip_mixture, by="source")], source=["large"] * 2000 + ["small"] * 120).flip
        assert flip[:2000].mean() < 0.01
        before.append(wrong[2000:].mean())
        after.append((wrong ^ flip)[2000:].mean())
    assert np.mean(after) < np.mean(before) - 0.07 and max(np.array(after) - before) <= 0


def test_a_weak_model_flips_nothing_that_its_own_errors_explain():
    flipped = []
    for rate, count in ((0.0, 200), (0.1, 1000), (0.2, 1000)):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            # Right in 60 % of the pairs: what it contradicts is told by its own doubt.
            strength = np.where(rng.random(count) < rate, -1, 1) * rng.normal(0.253, 1, count)
            flipped.append(flip_mixture(strength).any())
    assert np.mean(flipped) <= 0.05
    votes = np.r_[np.ones(600), -np.ones(400)]  # all equally large: noise and doubt are the same
    estimate = estimate_noise(votes)
    assert not estimate.is_identified and estimate.interval[0] == 0 and estimate.interval[1] > 0.38
    assert estimate.contradicted == 0.4 and not flip_mixture(votes).any()


def test_the_interval_covers_the_rate():
    inside = []
    for seed in range(80):
        low, high = estimate_noise(planted(np.random.default_rng(seed), 500, 0.2, 1.5)[0]).interval
        inside.append(low <= 0.2 <= high)
    assert 0.9 <= np.mean(inside) <= 0.99


def test_the_slope_of_sources_is_theirs_whatever_their_rates():
    rng = np.random.default_rng(8)
    rates = (0.0, 0.2, 0.5, 0.9)
    parts = [planted(rng, 20_000, rate, mean=1.0)[0] for rate in rates]
    # Right labels are normal with mean 1 and standard deviation 1, so k is 2.
    slope = shared_slope(parts)
    assert slope == pytest.approx(2.0, rel=0.05)
    for unit in (10, 1e-200, 1e200):  # squares of which neither overflow nor vanish
        assert shared_slope([part * unit for part in parts]) == pytest.approx(slope / unit, rel=1e-3)
    for part, rate in zip(parts, rates, strict=True):
        assert estimate_noise(part, slope=slope).rate == pytest.approx(rate, abs=0.02)
    # A source by itself: the same as the fit of both.
    assert shared_slope(parts[1:2]) == pytest.approx(estimate_noise(parts[1]).slope, rel=0.02)


def test_coin_flips_have_no_slope_and_a_slope_of_0_flips_nothing():
    rng = np.random.default_rng(9)
    coins = [rng.normal(size=400) for _ in range(4)]
    assert shared_slope(coins) == 0 and shared_slope([]) == 0 and shared_slope([np.ones(3)]) == 0
    assert not estimate_noise(coins[0], slope=0.0).is_identified
    assert not any(estimate_noise(part, slope=3.0).is_identified for part in coins)
    with pytest.raises(ValueError, match="`slope` is nan"):
        estimate_noise(coins[0], slope=np.nan)
    with pytest.raises(ValueError, match="leave one of them out"):
        estimate_noise(coins[0], np.ones(30), slope=1.0)


def test_what_a_rule_was_told_counts_more_than_the_slope_of_all():
    strength, _ = planted(np.random.default_rng(10), 1000, 0.3)
    source = np.repeat(["a", "b"], 500)
    for told in ({"slope": 0.0}, {"reference": -np.ones(50)}):
        decision = decide(strength, [Flip(partial(flip_mixture, **told), by="source")], source=source)
        assert not decision.flip.any()
