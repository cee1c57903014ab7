"""Decisions of several rules: one after the other, by source, and never against a whole source."""

import operator
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from trl_dt2it.curation.noise import flip_mixture, group_by_source
from trl_dt2it.curation.rules import (
    Flip,
    Keep,
    decide,
    flip_negative,
    flip_weakest_half,
    keep_confident,
    keep_consistent,
    parameters_of,
    with_reference,
)


def test_rules_follow_one_another():
    strength = np.array([-3.0, -1.0, 0.5, 2.0, np.nan, -2.0])
    rules = [Flip(flip_weakest_half), Keep(keep_consistent), Keep(partial(keep_confident, share=0.5))]
    decision = decide(strength, rules, min_kept=0)
    # Of -3, -1 and -2 the lowest is flipped. 3, 0.5 and 2 are consistent, and of these three the two highest stay.
    assert decision.flip.tolist() == [True, False, False, False, False, False]
    assert decision.keep.tolist() == [True, False, False, True, False, False]
    np.testing.assert_array_equal(decision.strength, [3, -1, 0.5, 2, np.nan, -2])
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
    # A rule without a `source` judges too small sources as part of all: of these, the lowest three are in b, which is
    # large enough alone.
    mixed = decide(strength, [Flip(flip_weakest_half, by="source", min_pairs=3)], source=source, min_kept=0)
    assert np.flatnonzero(mixed.flip).tolist() == [5]
    for given in (pa.array(source), pa.chunked_array([source[:2], source[2:]]), np.array(source, dtype=object)):
        same = decide(strength, [Flip(flip_weakest_half, by="source", min_pairs=1)], source=given, min_kept=0)
        np.testing.assert_array_equal(same.flip, alone.flip)
    coded = pa.array(source).dictionary_encode()
    assert decide(strength, [Keep(keep_confident, by="source")], source=coded, min_kept=0).keep.all()


def test_no_source_is_emptied(caplog):
    strength = [-1.0, -3.0, -2.0, np.nan, *[1.0] * 4, -1.0, np.nan]
    source = ["bad"] * 4 + ["good"] * 4 + ["single", "unscored"]
    decision = decide(strength, [Keep(keep_consistent)], source=source, min_kept=0.5)
    assert "keep 0 of 3 pairs of 'bad'; the strongest 2 of the others come back" in caplog.text
    assert "good" not in caplog.text
    decide([-1.0] * 10, [Keep(keep_consistent)], source=["\x1b[2J"] * 10, min_kept=0.5)
    assert "\x1b" not in caplog.text and r"pairs of '\x1b[2J'" in caplog.text
    # The strongest come back, in a tie the first, and none that is not scored.
    assert np.flatnonzero(decision.keep).tolist() == [0, 2, 4, 5, 6, 7, 8]
    assert decision.reason[0] == "brought back, for its source to keep enough"
    assert decision.reason[9] == "not scored" and not decide([np.nan] * 10, []).keep.any()
    assert not decide(strength, [Keep(keep_consistent)], source=source, min_kept=0).keep[[0, 1, 2, 8, 9]].any()
    assert decide([-1.0] * 70, [Keep(keep_consistent)], min_kept=0.1).keep.sum() == 7
    assert decide([], [Flip(flip_mixture), Keep(keep_confident)]).keep.shape == (0,)


def test_a_rule_without_a_signature_is_asked_as_it_is():
    rule = operator.methodcaller("__lt__", 0)  # in C, of which `inspect` knows nothing
    assert decide([1.0, -1.0], [Flip(rule, by="source")], source=["a", "b"]).flip.tolist() == [False, True]


def test_misuse_of_decide_is_named():
    with pytest.raises(ValueError, match="`min_kept` is 2"):
        decide([1.0], [], min_kept=2)
    with pytest.raises(ValueError, match="no `source` is given"):
        decide([1.0], [Keep(keep_consistent, by="source")])
    with pytest.raises(ValueError, match="2 pairs and 1 entries of `source`"):
        decide([1.0, 2.0], [], source=["a"])
    with pytest.raises(ValueError, match="`by` is 'pair'; give \"source\""):
        Flip(flip_negative, by="pair")
    with pytest.raises(ValueError, match=r"rule <lambda> gave float64 values of shape \(2,\) for 2 pairs"):
        decide([1.0, 2.0], [Keep(lambda given: given)])


# -------------------------------------------------------------------------------------------------- estimates of rules


def noisy(count, seed=0):
    """Margins of which a quarter is turned, and margins of clean pairs."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(count) < 0.25
    return np.where(wrong, -1, 1) * rng.normal(2, 1, count), rng.normal(2, 1, 200)


def test_estimates_are_those_of_the_rows_that_each_call_saw():
    margins, reference = noisy(400)
    source = ["a", "b", "b", None] * 100

    def mine(strength, estimates=None):
        return flip_mixture(strength, reference=reference, estimates=estimates)

    # A rule that sees one source at a time and does not know its name.
    decision = decide(margins, [Flip(mine, by="source", min_pairs=1)], source=source)
    assert set(decision.estimates) == {"a", "b", None}
    for name, estimate in decision.estimates.items():
        rows = [row for row, one in enumerate(source) if one == name]
        np.testing.assert_array_equal(decision.posterior[rows], estimate.posterior)
        np.testing.assert_array_equal(decision.flip[rows], estimate.flip)
    bound = partial(flip_mixture, source=source, reference=reference)
    with pytest.raises(ValueError, match="leave its `source` to"):
        decide(margins, [Flip(bound)])


def test_what_is_bound_to_a_rule_is_not_bound_anew(caplog):
    margins, reference = noisy(400)
    own = partial(flip_mixture, reference=reference)
    assert "reference" not in parameters_of(Flip(own)) and "source" in parameters_of(Flip(own))
    (rule,) = with_reference([Flip(own)], -np.ones(30))
    assert rule.rule.keywords["reference"] is reference
    (rule,) = with_reference([Flip(flip_mixture)], reference)
    np.testing.assert_array_equal(rule.rule.keywords["reference"], reference)
    means = np.zeros(len(reference))
    (rule,) = with_reference([Flip(flip_mixture)], reference, means)
    assert rule.rule.keywords["reference_mean_reward"] is means
    (rule,) = with_reference([Flip(own)], -np.ones(30), np.ones(30))  # the means are of another reference
    assert rule.rule is own
    (rule,) = with_reference([Flip(lambda given, reference: given < 0)], reference, means)
    assert set(rule.rule.keywords) == {"reference"}
    few = np.r_[np.ones(19), np.full(81, np.nan)]
    (rule,) = with_reference([Flip(flip_mixture)], few)
    assert rule.rule is flip_mixture and "Under 20 pairs known to be right have a score" in caplog.text


def test_mean_rewards_follow_their_pairs():
    seen = []

    def rule(given, mean_reward):
        seen.append((given.tolist(), mean_reward.tolist()))
        return given < 0

    margins, means = [1.0, -2.0, np.nan, -3.0], [0.1, 0.2, 0.3, 0.4]
    decide(margins, [Keep(lambda given: given < 1), Flip(rule, by="source")], source=list("abab"), mean_reward=means)
    assert seen == [([-2.0, -3.0], [0.2, 0.4])]
    with pytest.raises(ValueError, match="There are 4 pairs and 3 of `mean_reward`; pass one per pair."):
        decide(margins, [Flip(flip_negative)], mean_reward=means[:3])


def test_sources_as_arrow_dictionaries_of_any_make():
    again = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 2]), pa.array(["a", "a", "b"]))
    assert {name: rows.tolist() for name, rows in group_by_source(again, 4).items()} == {"a": [0, 1, 2], "b": [3]}
    names = [f"s{number}" for number in range(128)]
    many = pa.DictionaryArray.from_arrays(pa.array(range(128), pa.int8()), pa.array(names))
    assert list(group_by_source(many, 128)) == names
