"""Rules: what they decide on ties, NaN, one-sided and tiny inputs; that the noise estimate is right; and decisions."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import norm

from trl_dt2it.curation import noise
from trl_dt2it.curation.rules import (
    UNREADABLE,
    Flip,
    Keep,
    combine_scores,
    decide,
    estimate_noise,
    flip_mixture,
    flip_negative,
    flip_weakest_half,
    keep_confident,
    keep_consistent,
    relabel_by_vote,
)


NAN = np.nan
FLIPS = {
    "flip_weakest_half": flip_weakest_half,
    "flip_negative": flip_negative,
    "flip_mixture": flip_mixture,
    "flip_mixture with reference": partial(flip_mixture, reference=np.r_[np.linspace(0.1, 3, 60), -0.2]),
}
KEEPS = {"keep_consistent": keep_consistent, "keep_confident": keep_confident}


def test_scores_of_several_models_worked_out_by_hand():
    scores = np.zeros((4, 2, 2))
    scores[:, 0] = [[3, 0], [1, 30], [0, 0], [2, NAN]]
    scores[:, 1] = [[0, 10], [2, 0], [0, 0], [1, 1]]
    # Differences: 3, -1, 0, 1 by the first model and -10, 30, 0, NaN by the second.
    np.testing.assert_allclose(combine_scores(scores), [-3.5, 14.5, 0, NAN])
    first, second = np.sqrt(11 / 4), np.sqrt(1000 / 3)
    expected = [(3 / first - 10 / second) / 2, (-1 / first + 30 / second) / 2, 0, NAN]
    np.testing.assert_allclose(combine_scores(scores, "zscore"), expected)
    # Ranks of |d|: 4, 2.5, 1, 2.5 of four, and 2, 3, 1 of three; a difference of 0 has no sign.
    expected = [(4 / 4 - 2 / 3) / 2, (-2.5 / 4 + 3 / 3) / 2, 0, NAN]
    np.testing.assert_allclose(combine_scores(scores, "rank"), expected)
    np.testing.assert_allclose(combine_scores(scores[:, :, 0]), [3, -1, 0, 1])


@pytest.mark.parametrize("how", ["raw", "zscore", "rank"])
def test_swapping_the_answers_negates_the_strength(how):
    scores = np.random.default_rng(0).normal(size=(200, 2, 3))
    scores[::7, 0, 1], scores[::5, 1], scores[::3, :, 2] = NAN, scores[::5, 0], 0.25
    np.testing.assert_array_equal(combine_scores(scores[:, ::-1], how), -combine_scores(scores, how))


def test_no_model_outweighs_another_but_in_raw_scores():
    scores = np.random.default_rng(0).normal(size=(500, 2, 2))
    loud = scores * [1.0, 1e6]
    for how in ("zscore", "rank"):
        np.testing.assert_allclose(combine_scores(loud, how), combine_scores(scores, how), rtol=1e-9)
    assert np.corrcoef(combine_scores(loud), scores[:, 0, 1] - scores[:, 1, 1])[0, 1] > 0.999


@pytest.mark.parametrize("how", ["raw", "zscore", "rank"])
def test_combining_few_or_equal_scores(how):
    assert combine_scores(np.empty((0, 2, 3)), how).shape == (0,)
    assert combine_scores([[[5.0], [2.0]]], how).tolist() == [{"raw": 3.0}.get(how, 1.0)]
    assert combine_scores(np.ones((3, 2, 2)), how).tolist() == [0, 0, 0]
    assert np.isnan(combine_scores(np.full((3, 2, 2), NAN), how)).all()
    given = np.array([[[1e200], [0]], [[0], [1e200]]])  # squares would overflow
    assert np.isfinite(combine_scores(given, how)).all()
    untouched = given.copy()
    combine_scores(given, how)
    np.testing.assert_array_equal(given, untouched)


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match=r"shape \(3, 3\); it must be \(pairs, 2, models\)"):
        combine_scores(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="model 1 for pair 2 is infinite"):
        combine_scores(np.pad([[[np.inf]]], ((2, 0), (1, 0), (1, 0))))
    with pytest.raises(ValueError, match="`how` is 'mean'"):
        combine_scores(np.zeros((3, 2)), "mean")
    with pytest.raises(ValueError, match="strength of pair 1 is infinite"):
        flip_negative([0, -np.inf])
    with pytest.raises(ValueError, match=r"shape \(2, 2\); give one number per pair"):
        keep_consistent(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("strength", "half", "negative", "consistent", "confident"),
    [
        ([], [], [], [], []),
        ([-1], [], [0], [], [0]),
        ([1], [], [], [0], [0]),
        ([NAN], [], [], [], []),
        ([0], [], [], [], [0]),
        ([-1, -2], [1], [0, 1], [], [0]),
        ([-1, -1], [0], [0, 1], [], [0]),
        ([NAN, -3, 0, -1, -3, 2, -2, NAN], [1, 4], [1, 3, 4, 6], [5], [2, 3, 5]),
        ([-3, -2, -1], [0], [0, 1, 2], [], [1, 2]),
        ([3, 2, 1, 1], [], [], [0, 1, 2, 3], [0, 1]),
    ],
)
def test_simple_rules_worked_out_by_hand(strength, half, negative, consistent, confident):
    rules = {flip_weakest_half: half, flip_negative: negative, keep_consistent: consistent}
    for rule, rows in {**rules, partial(keep_confident, share=0.5): confident}.items():
        assert np.flatnonzero(rule(strength)).tolist() == rows
    # Too few for an estimate of noise.
    assert not flip_mixture(strength).any()


def test_margins_and_shares():
    assert flip_negative([-2, -1, -0.5, NAN, 0], margin=1).tolist() == [True, False, False, False, False]
    strength = np.arange(70.0)
    for share, count in ((0, 0), (0.1, 7), (0.11, 8), (0.9, 63), (1, 70)):
        assert np.flatnonzero(keep_confident(strength, share)).tolist() == list(range(70 - count, 70))
    with pytest.raises(ValueError, match="`margin` is -1"):
        flip_negative([1.0], -1)
    with pytest.raises(ValueError, match="`share` is 1.1"):
        keep_confident([1.0], 1.1)
    with pytest.raises(ValueError, match="`threshold` is 1"):
        flip_mixture([1.0], 1)


@pytest.mark.parametrize("rule", [*FLIPS.values(), *KEEPS.values()], ids=[*FLIPS, *KEEPS])
def test_every_rule_is_defined_on_every_kind_of_strengths(rule):
    rng = np.random.default_rng(0)
    is_flip = rule in FLIPS.values()
    for count in (0, 1, 2, 19, 20, 300):
        for strength in (
            np.zeros(count),
            np.ones(count),
            -np.ones(count),
            np.full(count, NAN),
            rng.normal(size=count),
        ):
            mask = rule(strength)
            assert mask.dtype == bool and mask.shape == (count,)
            assert not mask[np.isnan(strength)].any()
            # What no model can know is not flipped, nor is a label that all models agree with.
            if is_flip and not (strength < 0).any():
                assert not mask.any()
            # NaN in between changes nothing for the others, and nothing depends on the unit of rewards.
            spread = np.full(2 * count, NAN)
            spread[::2] = strength
            np.testing.assert_array_equal(rule(spread)[::2], mask)
    strength = rng.permutation(np.r_[rng.normal(1, 1, 500), rng.normal(-1, 1, 200)])
    # A pair that the model likes more is flipped no sooner, and kept no later.
    mask = rule(strength)
    inside, outside = (strength[mask], strength[~mask]) if is_flip else (strength[~mask], strength[mask])
    assert len(inside) and inside.max() < outside.min()
    if "reference" not in dict(zip(FLIPS.values(), FLIPS, strict=True)).get(rule, ""):
        np.testing.assert_array_equal(rule(strength * 1000), mask)
    order = rng.permutation(len(strength))
    np.testing.assert_array_equal(rule(strength[order]), mask[order])


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
    flip_mixture(-strength)
    assert f"contradicts {mirrored.rate:.0%} of the labels of 3,000 pairs" in caplog.text


def test_what_cannot_be_told_is_not_flipped():
    rng = np.random.default_rng(4)
    flipped = []
    for seed in range(200):
        # A model that guesses, or labels that do: signs are coin flips.
        strength = np.random.default_rng(seed).normal(size=400)
        flipped.append(flip_mixture(strength).mean())
    assert np.mean(np.array(flipped) > 0) < 0.15
    assert not estimate_noise(rng.normal(size=19) - 5).is_identified
    estimate = estimate_noise([*[NAN] * 30, 1.0])
    assert np.isnan(estimate.rate) and not estimate.is_identified
    np.testing.assert_array_equal(estimate.posterior, [*[NAN] * 30, 0.0])


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


def test_rules_follow_one_another():
    strength = np.array([-3.0, -1.0, 0.5, 2.0, NAN, -2.0])
    rules = [Flip(flip_weakest_half), Keep(keep_consistent), Keep(partial(keep_confident, share=0.5))]
    decision = decide(strength, rules, min_kept=0)
    # Of -3, -1 and -2 the lowest is flipped. 3, 0.5 and 2 are consistent, and of these three the two highest stay.
    assert decision.flip.tolist() == [True, False, False, False, False, False]
    assert decision.keep.tolist() == [True, False, False, True, False, False]
    np.testing.assert_array_equal(decision.strength, [3, -1, 0.5, 2, NAN, -2])
    assert decision.reason.tolist() == [
        "flipped by flip_weakest_half",
        "dropped by keep_consistent",
        "dropped by keep_confident",
        "kept",
        "not scored",
        "dropped by keep_consistent",
    ]
    assert decision.counts()["dropped by keep_consistent"] == 2
    # Two flips of all negative ones, then of all positive ones: a pair that is flipped back is as it was.
    twice = decide([-1.0, 2.0], [Flip(flip_negative), Flip(lambda given: given > 1.5), Flip(flip_negative)])
    assert twice.flip.tolist() == [True, False] and twice.strength.tolist() == [1, 2]
    assert twice.reason.tolist() == ["flipped by flip_negative", "kept"]


def test_a_rule_by_source_sees_one_source_at_a_time():
    strength = np.array([-1.0, -5.0, -2.0, -6.0, -3.0, -7.0])
    source = ["a", "b", "a", "b", None, "b"]
    alone = decide(strength, [Flip(flip_weakest_half, by="source", min_pairs=1)], source=source, min_kept=0)
    assert np.flatnonzero(alone.flip).tolist() == [2, 5]
    together = decide(strength, [Flip(flip_weakest_half)], source=source, min_kept=0)
    assert np.flatnonzero(together.flip).tolist() == [1, 3, 5]
    # Too small ones are judged as part of all: of them, the lowest three are in b, which is large enough alone.
    mixed = decide(strength, [Flip(flip_weakest_half, by="source", min_pairs=3)], source=source, min_kept=0)
    assert np.flatnonzero(mixed.flip).tolist() == [5]
    for given in (pa.array(source), pa.chunked_array([source[:2], source[2:]]), np.array(source, dtype=object)):
        same = decide(strength, [Flip(flip_weakest_half, by="source", min_pairs=1)], source=given, min_kept=0)
        np.testing.assert_array_equal(same.flip, alone.flip)
    coded = pa.array(source).dictionary_encode()
    assert decide(strength, [Keep(keep_confident, by="source")], source=coded, min_kept=0).keep.all()


def test_noise_in_one_source_is_flipped_there():
    rng = np.random.default_rng(7)
    rates = {"clean": 0.02, "noisy": 0.45, "reversed": 0.9}
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
    assert ours["clean"] < 0.03 < pooled["clean"]
    assert all(ours[name] < 0.15 for name in rates)
    for name in rates:
        assert ours[name] <= pooled[name] + 0.01 and ours[name] <= paper[name] + 0.01
    assert ours["small"] == pooled["small"] < 0.3


def test_no_source_is_emptied(caplog):
    strength = [-1.0, -3.0, -2.0, NAN, *[1.0] * 4, -1.0, NAN]
    source = ["bad"] * 4 + ["good"] * 4 + ["single", "unscored"]
    decision = decide(strength, [Keep(keep_consistent)], source=source, min_kept=0.5)
    assert "keep 0 of 4 pairs of bad; the strongest 2 of the others come back" in caplog.text
    assert "good" not in caplog.text
    # The strongest come back, in a tie the first, and one that is not scored last of all.
    assert np.flatnonzero(decision.keep).tolist() == [0, 2, 4, 5, 6, 7, 8, 9]
    assert decision.reason[0] == "brought back, for its source to keep enough" == decision.reason[9]
    assert not decide(strength, [Keep(keep_consistent)], source=source, min_kept=0).keep[[0, 1, 2, 8, 9]].any()
    assert decide([-1.0] * 70, [Keep(keep_consistent)], min_kept=0.1).keep.sum() == 7
    assert decide([], [Flip(flip_mixture), Keep(keep_confident)]).keep.shape == (0,)


def test_misuse_of_decide_is_named():
    with pytest.raises(ValueError, match="`min_kept` is 2"):
        decide([1.0], [], min_kept=2)
    with pytest.raises(ValueError, match="no `source` is given"):
        decide([1.0], [Keep(keep_consistent, by="source")])
    with pytest.raises(ValueError, match="2 strengths and 1 entries of `source`"):
        decide([1.0, 2.0], [], source=["a"])
    with pytest.raises(ValueError, match="`by` is 'pair'; give \"source\""):
        Flip(flip_negative, by="pair")
    with pytest.raises(ValueError, match=r"rule <lambda> gave float64 values of shape \(2,\) for 2 pairs"):
        decide([1.0, 2.0], [Keep(lambda given: given)])


@pytest.mark.parametrize(
    ("votes", "unanimous", "majority"),
    [
        # Both orders of one judge.
        ([[1, 1]], "keep", "keep"),
        ([[-1, -1]], "flip", "flip"),
        ([[1, -1]], "drop", "drop"),
        ([[1, 0]], "drop", "keep"),
        ([[-1, 0]], "drop", "flip"),
        ([[0, 0]], "drop", "drop"),
        ([[UNREADABLE, 1]], "drop", "drop"),
        # Two judges.
        ([[1, 1], [1, 1]], "keep", "keep"),
        ([[1, 1], [1, -1]], "drop", "keep"),
        ([[-1, -1], [-1, 1]], "drop", "flip"),
        ([[1, 1], [-1, -1]], "drop", "drop"),
        ([[1, 1], [1, UNREADABLE]], "drop", "drop"),
    ],
)
def test_votes_worked_out_by_hand(votes, unanimous, majority):
    as_floats = np.where(np.array(votes) == UNREADABLE, NAN, votes)
    for how, expected in (("unanimous", unanimous), ("majority", majority)):
        for given in (np.array([votes], dtype=np.int8), as_floats[None]):
            decision = relabel_by_vote(given, how)
            action = "drop" if not decision.keep[0] else "flip" if decision.flip[0] else "keep"
            assert action == expected
            assert action == "drop" or decision.strength[0] > 0
            if UNREADABLE in np.array(votes):
                assert np.isnan(decision.strength[0]) and decision.reason[0] == "vote unreadable"
    swapped = relabel_by_vote(np.where(np.isnan(as_floats), NAN, -as_floats)[None])
    assert swapped.keep[0] == (unanimous != "drop") and swapped.flip[0] == (unanimous == "keep")


def test_bad_votes_are_named():
    assert len(relabel_by_vote(np.empty((0, 3, 2)))) == 0
    with pytest.raises(ValueError, match=r"shape \(4, 2\); it must be \(pairs, judges, 2\)"):
        relabel_by_vote(np.ones((4, 2)))
    with pytest.raises(ValueError, match="Vote 1 of judge 0 for pair 2 is 2"):
        relabel_by_vote([[[1, 1]], [[0, 0]], [[1, 2]]])
    with pytest.raises(ValueError, match="`how` is 'most'"):
        relabel_by_vote(np.ones((1, 1, 2)), "most")
