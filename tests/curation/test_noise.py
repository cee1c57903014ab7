"""The estimate of the noise: it finds what was planted, says when it does not know, and flips nothing then."""

import logging
from functools import partial

import numpy as np
import pytest

from trl_dt2it.curation import noise
from trl_dt2it.curation.noise import estimate_noise, flip_mixture, mean_rewards
from trl_dt2it.curation.rules import Flip, Keep, decide, flip_weakest_half, keep_confident


def plain(rng, count, rate):
    """A model that is right in 82 % and errs where it is unsure; wrong labels are spread evenly."""
    return 1.5 * (0.8 * rng.gamma(1.5, 1, count) + rng.normal(0, 1, count)), rng.random(count) < rate


def weak(rng, count, rate):
    """A model that is right in 60 %."""
    return rng.normal(0.253, 1, count), rng.random(count) < rate


def hard(rng, count, rate):
    """As `plain`, and people err on hard pairs, where the model is unsure too."""
    gap = rng.gamma(1.5, 1, count)
    wrong = 1 / (1 + np.exp(1.2 * gap))
    margin = 1.5 * (0.8 * gap + rng.normal(0, 1, count))
    return margin, rng.random(count) < np.clip(wrong * rate / wrong.mean(), 0, 0.95)


def heavy_tails(rng, count, rate):
    """A model that errs at any margin."""
    return 1.5 * (0.8 * rng.gamma(1.5, 1, count) + rng.standard_t(2, count)), rng.random(count) < rate


def drawn(make, count, rate, seed):
    """Margins as labelled, which labels are wrong, and margins of 200 clean pairs."""
    rng = np.random.default_rng(seed)
    margins, wrong = make(rng, count, rate)
    return np.where(wrong, -margins, margins), wrong, make(rng, 200, 0.0)[0]


def left(wrong, flip):
    return 100 * (wrong ^ flip).mean()


@pytest.mark.parametrize("count", [200, 1000, 20_000])
@pytest.mark.parametrize("make", [plain, weak, hard, heavy_tails])
def test_no_noise_does_more_harm_than_doing_nothing(make, count):
    for rate in (0.0, 0.1, 0.35):
        with_reference, alone = [], []
        for seed in range(8):
            strength, wrong, reference = drawn(make, count, rate, seed)
            before = left(wrong, np.zeros(count, dtype=bool))
            with_reference.append(left(wrong, estimate_noise(strength, reference).flip) - before)
            estimate = estimate_noise(strength)
            alone.append(left(wrong, estimate.flip) - before)
            assert estimate.is_identified or not estimate.flip.any()
        assert np.mean(with_reference) <= 1.5 if count == 200 else 1.0
        assert np.mean(alone) <= 2.0


# The best that a rule can leave that sees the margin alone, and knows all but the labels (`noise_simulation`).
@pytest.mark.parametrize(
    ("make", "rate", "best"), [(plain, 0.2, 12.7), (plain, 0.35, 17.4), (hard, 0.35, 18.8), (heavy_tails, 0.2, 17.0)]
)
def test_with_a_reference_the_rule_is_near_the_best_that_is_possible(make, rate, best):
    ours, paper = [], []
    for seed in range(10):
        strength, wrong, reference = drawn(make, 2000, rate, seed)
        ours.append(left(wrong, flip_mixture(strength, reference=reference)))
        paper.append(left(wrong, flip_weakest_half(strength)))
    assert np.mean(ours) <= best + 1.5 and np.mean(ours) <= np.mean(paper) + 1.0


def test_probabilities_mean_what_they_say():
    """Of the labels called wrong with about 20, 50 or 80 %, as many are."""
    posterior, is_wrong, rates, inside = [], [], [], []
    for seed in range(30):
        strength, wrong, reference = drawn(plain, 1000, 0.25, seed)
        estimate = estimate_noise(strength, reference)
        posterior.append(estimate.posterior)
        is_wrong.append(wrong)
        rates.append(estimate.rate)
        inside.append(estimate.interval[0] <= wrong.mean() <= estimate.interval[1])
    posterior, is_wrong = np.concatenate(posterior), np.concatenate(is_wrong)
    for low, high in ((0.05, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 1.0)):
        chosen = (posterior > low) & (posterior <= high)
        assert chosen.sum() > 300 and is_wrong[chosen].mean() == pytest.approx(posterior[chosen].mean(), abs=0.1)
    assert np.mean(rates) == pytest.approx(0.25, abs=0.03) and np.mean(inside) >= 0.75


def test_the_estimate_by_hand_of_two_sizes_of_margins():
    """All pairs are of two margins, at which the reference says how often the model is right: 70 and 95 %."""
    small, large = np.repeat([1, -1], [700, 300]) * 0.5, np.repeat([1, -1], [950, 50]) * 3.0
    rate = 0.2
    count = [int(1000 * (rate * right + (1 - rate) * (1 - right))) for right in (0.7, 0.95)]  # contradicted
    strength = np.r_[np.repeat([1, -1], [1000 - count[0], count[0]]) * 0.5]
    strength = np.r_[strength, np.repeat([1, -1], [1000 - count[1], count[1]]) * 3.0]
    estimate = estimate_noise(strength, np.r_[small, large])
    assert estimate.rate == pytest.approx(rate, abs=0.05) and estimate.accuracy == pytest.approx(0.825, abs=0.03)
    # P(wrong | contradicted) = e g / (e g + (1 - e)(1 - g)): 0.37 at the small margin, 0.83 at the large one.
    at = dict(zip(strength.tolist(), estimate.posterior.tolist(), strict=True))
    assert at[-0.5] == pytest.approx(0.14 / 0.38, abs=0.12) and at[-3.0] == pytest.approx(0.19 / 0.23, abs=0.08)
    assert set(strength[estimate.flip].tolist()) == {-3.0} and estimate.flip.sum() == count[1]


def test_the_order_the_unit_and_pairs_without_a_score_change_nothing():
    strength, _, reference = drawn(plain, 600, 0.3, 0)
    estimate = estimate_noise(strength, reference)
    order = np.random.default_rng(1).permutation(600)
    shuffled = estimate_noise(strength[order], reference[::-1])
    np.testing.assert_allclose(shuffled.posterior, estimate.posterior[order], rtol=1e-9)
    for unit in (1e-200, 7.0, 1e200):
        scaled = estimate_noise(strength * unit, reference * unit)
        np.testing.assert_allclose(scaled.posterior, estimate.posterior, rtol=1e-6)
        assert scaled.interval == pytest.approx(estimate.interval)
    spread = np.full(1200, np.nan)
    spread[::2] = strength
    np.testing.assert_array_equal(estimate_noise(spread, reference).posterior[::2], estimate.posterior)
    assert np.isnan(estimate_noise(spread, reference).posterior[1::2]).all()


def test_what_cannot_be_told_is_not_flipped():
    rng = np.random.default_rng(4)
    for seed in range(30):
        # A model that guesses, or labels that do: signs are coin flips.
        coins = np.random.default_rng(seed).normal(size=400)
        for reference in (None, plain(rng, 200, 0.0)[0], rng.normal(size=200)):
            estimate = estimate_noise(coins, reference)
            assert not estimate.flip.any()
        assert estimate.reading == "not read" and not estimate.is_identified and not estimate.posterior.any()
    # Votes are all of one size: rate and accuracy cannot be told apart, but by a reference.
    votes = np.r_[np.ones(600), -np.ones(400)]
    estimate = estimate_noise(votes)
    assert not estimate.is_identified and not estimate.flip.any() and estimate.interval[1] > 0.3
    assert estimate.contradicted == 0.4
    # Of votes that are right in 95 %, 40 % against the label are noise.
    known = estimate_noise(votes, np.r_[np.ones(190), -np.ones(10)])
    assert known.rate == pytest.approx((0.4 - 0.05) / 0.9, abs=0.04) and known.flip.sum() == 400
    for few in (rng.normal(size=19) - 5, np.array([*[np.nan] * 30, 1.0]), np.zeros(50), np.empty(0)):
        estimate = estimate_noise(few)
        assert np.isnan(estimate.rate) and estimate.reading == "unknown" and not estimate.flip.any()
        np.testing.assert_array_equal(estimate.posterior, np.where(np.isnan(few), np.nan, 0.0))
    with pytest.raises(ValueError, match="19 scored references; give at least 20"):
        flip_mixture(votes, reference=np.ones(19))


def test_reversed_labels_are_turned_and_said(caplog):
    strength, wrong, reference = drawn(plain, 1000, 0.0, 3)
    mask = flip_mixture(-strength, reference=reference)
    seen = (strength > 0).mean()
    assert f"contradicts {seen:.1%} of the labels of 1,000 pairs, far more than by chance" in caplog.text
    # What the model ranks as its label does stays.
    assert mask.sum() > 0.9 * seen * 1000 and not mask[-strength >= 0].any()


def test_sources_have_rates_of_their_own_and_share_the_accuracy(caplog):
    caplog.set_level(logging.INFO)
    after, unread = {"noisy": [], "small and clean": [], "small and noisy": [], "not read": []}, 0
    touched = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        parts = {
            "noisy": plain(rng, 2000, 0.3),
            "small and clean": plain(rng, 60, 0.0),
            "small and noisy": plain(rng, 150, 0.35),
            "not read": (rng.normal(0, 1.2, 500), rng.random(500) < 0.1),
        }
        margins, wrong = (np.concatenate(both) for both in zip(*parts.values(), strict=True))
        source = np.repeat(list(parts), [len(part[1]) for part in parts.values()])
        strength = np.where(wrong, -margins, margins)
        rules = [Flip(partial(flip_mixture, reference=plain(rng, 200, 0.0)[0]), by="source"), Keep(keep_confident)]
        decision = decide(strength, rules, source=source)
        assert set(decision.estimates) == set(parts) and not decision.flip[strength >= 0].any()
        for name in parts:
            inside = source == name
            after[name].append(left(wrong[inside], decision.flip[inside]))
            estimate = decision.estimates[name]
            told = estimate.posterior if estimate.is_identified else np.full(inside.sum(), np.nan)
            np.testing.assert_array_equal(decision.posterior[inside], told)
        touched += decision.flip[source == "not read"].any()
        assert (~decision.keep).sum() > 150
        if decision.estimates["not read"].reading == "not read":
            # Then it is not touched by later rules either.
            unread += 1
            assert set(decision.reason[source == "not read"]) == {"kept, for the model does not read its source"}
            assert decision.keep[source == "not read"].all()
    assert unread >= 8 and touched <= 1
    means = {name: np.mean(values) for name, values in after.items()}
    assert means["noisy"] < 17.5 and means["small and clean"] < 2 and means["small and noisy"] < 27
    assert "'not read', which does not tell wrong labels from a model that cannot read such pairs" in caplog.text


def test_the_posterior_is_that_of_the_orientation_that_was_scored():
    strength, _, reference = drawn(plain, 1000, 0.3, 0)
    alone = decide(strength, [Flip(partial(flip_mixture, reference=reference))])
    # After a rule that flips all, the label as scored is wrong with 1 minus the probability that the rule says.
    turned = decide(
        -strength, [Flip(lambda margins: margins == margins), Flip(partial(flip_mixture, reference=reference))]
    )
    np.testing.assert_allclose(turned.posterior, 1 - alone.posterior)
    np.testing.assert_array_equal(turned.flip, ~alone.flip)


def test_many_pairs_are_not_surer_than_curves_can_be():
    """The likelihood of a million pairs would be sure of the least wrong curve; its power is bounded."""
    strength, wrong, reference = drawn(heavy_tails, 400_000, 0.2, 0)
    estimate = estimate_noise(strength, reference)
    assert estimate.interval[1] - estimate.interval[0] > 0.04
    assert left(wrong, estimate.flip) < left(wrong, flip_weakest_half(strength)) + 1


def test_grid_of_curves_is_a_probability():
    grid = noise._grid()
    for log_prior in (grid.known, grid.alone, grid.foreign, grid.noise):
        assert np.exp(log_prior).sum() == pytest.approx(1)
    accuracy = noise._accuracy(grid, np.linspace(0, 50, 100))
    assert accuracy.min() >= 0.5 - 1e-9 and accuracy.max() <= 1 and len(accuracy) == len(grid.known)
    assert len(grid.level) == len(grid.slope) == len(grid.shared) == len(grid.noise)


def test_margins_of_the_sizes_of_the_reference_speak_for_a_model_that_reads_them():
    """Wrong labels turn signs alone: with other sizes, the same contradictions are rather of a source not read."""
    rng = np.random.default_rng(5)
    reference, true = (rng.normal(0.6, 1.2, count) for count in (300, 300))
    margins = np.where(rng.random(300) < 0.4, -true, true)
    alike, other = (estimate_noise(each, reference) for each in (margins, margins / 4))
    assert alike.contradicted == other.contradicted and alike.accuracy > other.accuracy + 0.02


def test_mean_rewards_are_those_of_the_pair_whatever_its_label():
    scores = np.array([[[1.0, 10], [3, 30]], [[2, 60], [2, 20]], [[6, np.nan], [0, 5]], [[-1, 0], [1, 0]]])
    # Of the first model 2, 2, 3 and 0, of the second 20, 40, none and 0, each divided by their deviation.
    first, second = np.array([2, 2, 3, 0]) / np.std([2, 2, 3, 0]), np.array([20, 40, np.nan, 0]) / np.std([20, 40, 0])
    np.testing.assert_allclose(mean_rewards(scores), (first + second) / 2)
    np.testing.assert_array_equal(mean_rewards(scores[:, ::-1]), mean_rewards(scores))
    np.testing.assert_allclose(mean_rewards(scores[:, :, 0]), first)
    np.testing.assert_array_equal(mean_rewards(np.ones((3, 2))), [1, 1, 1])
    assert np.isnan(mean_rewards(np.full((3, 2), np.nan))).all()
    with pytest.raises(ValueError, match=r"`scores` has shape \(3,\)"):
        mean_rewards(np.ones(3))
    with pytest.raises(ValueError, match="A score of model 0 for pair 1 is infinite"):
        mean_rewards([[0, 1], [np.inf, 0]])


def rewards(rng, count, rate, spread=1.0, shift=0.0, is_read=True):
    """Margins as labelled of a model that is right in 88 %, or guesses, mean rewards, and which labels are wrong."""
    margins = spread * (rng.normal(2.3, 2.0, count) if is_read else rng.normal(0, 3.0, count))
    wrong = rng.random(count) < rate
    return np.where(wrong, -margins, margins), rng.normal(shift, 1, count), wrong


def test_half_of_the_labels_wrong_is_told_from_a_model_that_guesses():
    """By sizes of margins and mean rewards, which labels do not change: signs are the same."""
    noisy, alone, guessed = [], [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        reference, known_means, _ = rewards(rng, 300, 0.0)
        known = {"reference": reference, "reference_mean_reward": known_means}
        margins, means, wrong = rewards(rng, 300, 0.5)
        noisy.append((wrong ^ flip_mixture(margins, mean_reward=means, **known)).mean())
        alone.append((wrong ^ flip_mixture(margins, reference=reference)).mean())
        for change in ({"shift": 0.8}, {"spread": 0.6}):
            margins, means, _ = rewards(rng, 300, 0.0, is_read=False, **change)
            guessed.append(flip_mixture(margins, mean_reward=means, **known).mean())
    assert np.mean(noisy) <= 0.35 < 0.42 <= np.mean(alone)  # sizes alone are too little to go by
    assert np.mean(guessed) <= 0.01


def test_most_labels_of_a_source_are_wrong():
    inside, after = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        reference, known_means, _ = rewards(rng, 200, 0.0)
        margins, means, wrong = rewards(rng, 300, 0.65)
        estimate = estimate_noise(margins, reference, mean_reward=means, reference_mean_reward=known_means)
        after.append((wrong ^ estimate.flip).mean())
        low, high = estimate.interval
        inside.append(low <= wrong.mean() <= high)
    assert np.mean(inside) >= 0.85 and np.mean(after) <= 0.2


def test_mean_rewards_are_one_per_pair():
    reference = np.random.default_rng(0).normal(2, 1, 30)
    with pytest.raises(ValueError, match="There are 30 pairs and 29 of `mean_reward`; pass one per pair."):
        estimate_noise(reference, reference, mean_reward=np.ones(29))
    with pytest.raises(ValueError, match="There are 30 pairs and 29 of `reference_mean_reward`; pass one per pair."):
        estimate_noise(reference, reference, mean_reward=np.ones(30), reference_mean_reward=np.ones(29))
    with pytest.raises(ValueError, match="`mean_reward` has shape"):
        flip_mixture(reference, reference=reference, mean_reward=np.ones((30, 2)))
