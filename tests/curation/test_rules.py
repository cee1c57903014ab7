"""Rules: what they decide, worked out by hand, also on ties, NaN, one-sided and tiny inputs, and on votes."""

from functools import partial

import numpy as np
import pytest

from trl_dt2it.curation.noise import combine_scores, flip_mixture
from trl_dt2it.curation.rules import (
    UNREADABLE,
    flip_negative,
    flip_weakest_half,
    keep_confident,
    keep_consistent,
    relabel_by_vote,
)


FLIPS = {
    "flip_weakest_half": flip_weakest_half,
    "flip_negative": flip_negative,
    "flip_mixture": flip_mixture,
    "flip_mixture with reference": partial(flip_mixture, reference=np.r_[np.linspace(0.1, 3, 60), -0.2]),
}
KEEPS = {"keep_consistent": keep_consistent, "keep_confident": keep_confident}


def test_scores_of_several_models_worked_out_by_hand():
    scores = np.zeros((4, 2, 2))
    scores[:, 0] = [[3, 0], [1, 30], [0, 0], [2, np.nan]]
    scores[:, 1] = [[0, 10], [2, 0], [0, 0], [1, 1]]
    # Differences: 3, -1, 0, 1 by the first model and -10, 30, 0, NaN by the second.
    np.testing.assert_allclose(combine_scores(scores), [-3.5, 14.5, 0, np.nan])
    first, second = np.sqrt(11 / 4), np.sqrt(1000 / 3)
    expected = [(3 / first - 10 / second) / 2, (-1 / first + 30 / second) / 2, 0, np.nan]
    np.testing.assert_allclose(combine_scores(scores, "zscore"), expected)
    # Ranks of |d|: 4, 2.5, 1, 2.5 of four, and 2, 3, 1 of three; a difference of 0 has no sign.
    expected = [(4 / 4 - 2 / 3) / 2, (-2.5 / 4 + 3 / 3) / 2, 0, np.nan]
    np.testing.assert_allclose(combine_scores(scores, "rank"), expected)
    np.testing.assert_allclose(combine_scores(scores[:, :, 0]), [3, -1, 0, 1])


@pytest.mark.parametrize("how", ["raw", "zscore", "rank"])
def test_swapping_the_answers_negates_the_strength(how):
    scores = np.random.default_rng(0).normal(size=(200, 2, 3))
    scores[::7, 0, 1], scores[::5, 1], scores[::3, :, 2] = np.nan, scores[::5, 0], 0.25
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
    assert np.isnan(combine_scores(np.full((3, 2, 2), np.nan), how)).all()
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
    with pytest.raises(ValueError, match="reward margin of pair 1 is infinite"):
        flip_negative([0, -np.inf])
    with pytest.raises(ValueError, match=r"shape \(2, 2\); give one number per pair"):
        keep_consistent(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("strength", "half", "negative", "consistent", "confident"),
    [
        ([], [], [], [], []),
        ([-1], [], [0], [], [0]),
        ([1], [], [], [0], [0]),
        ([np.nan], [], [], [], []),
        ([0], [], [], [], [0]),
        ([-1, -2], [1], [0, 1], [], [0]),
        ([-1, -1], [0], [0, 1], [], [0]),
        ([np.nan, -3, 0, -1, -3, 2, -2, np.nan], [1, 4], [1, 3, 4, 6], [5], [2, 3, 5]),
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
    assert flip_negative([-2, -1, -0.5, np.nan, 0], margin=1).tolist() == [True, False, False, False, False]
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
            np.full(count, np.nan),
            rng.normal(size=count),
        ):
            mask = rule(strength)
            assert mask.dtype == bool and mask.shape == (count,)
            assert not mask[np.isnan(strength)].any()
            # What no model can know is not flipped, nor is a label that all models agree with.
            if is_flip and not (strength < 0).any():
                assert not mask.any()
            # NaN in between changes nothing for the others, and nothing depends on the unit of rewards.
            spread = np.full(2 * count, np.nan)
            spread[::2] = strength
            np.testing.assert_array_equal(rule(spread)[::2], mask)
    strength = rng.permutation(np.r_[rng.normal(1.5, 1, 800), rng.normal(-1.5, 1, 200)])
    # A pair that the model likes more is flipped no sooner, and kept no later.
    mask = rule(strength)
    inside, outside = (strength[mask], strength[~mask]) if is_flip else (strength[~mask], strength[mask])
    if rule is flip_mixture:  # which does not know how far to believe this model
        assert not len(inside)
        return
    assert len(inside) and inside.max() < outside.min()
    if "reference" not in dict(zip(FLIPS.values(), FLIPS, strict=True)).get(rule, ""):
        np.testing.assert_array_equal(rule(strength * 1000), mask)
    order = rng.permutation(len(strength))
    np.testing.assert_array_equal(rule(strength[order]), mask[order])


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
    as_floats = np.where(np.array(votes) == UNREADABLE, np.nan, votes)
    for how, expected in (("unanimous", unanimous), ("majority", majority)):
        for given in (np.array([votes], dtype=np.int8), as_floats[None]):
            decision = relabel_by_vote(given, how)
            action = "drop" if not decision.keep[0] else "flip" if decision.flip[0] else "keep"
            assert action == expected
            assert action == "drop" or decision.strength[0] > 0
            if UNREADABLE in np.array(votes):
                assert np.isnan(decision.strength[0]) and decision.reason[0] == "vote unreadable"
    swapped = relabel_by_vote(np.where(np.isnan(as_floats), np.nan, -as_floats)[None])
    assert swapped.keep[0] == (unanimous != "drop") and swapped.flip[0] == (unanimous == "keep")


def test_bad_votes_are_named():
    assert len(relabel_by_vote(np.empty((0, 3, 2)))) == 0
    with pytest.raises(ValueError, match=r"shape \(4, 2\); it must be \(pairs, judges, 2\)"):
        relabel_by_vote(np.ones((4, 2)))
    with pytest.raises(ValueError, match="Vote 1 of judge 0 for pair 2 is 2"):
        relabel_by_vote([[[1, 1]], [[0, 0]], [[1, 2]]])
    with pytest.raises(ValueError, match="`how` is 'most'"):
        relabel_by_vote(np.ones((1, 1, 2)), "most")
