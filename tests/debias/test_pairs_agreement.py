"""Agreement of two scores: order, gaps, counts."""

import itertools

import numpy as np
import pytest

from trl_dt2it.debias.distillation.pairs import AgreedPair, agreeing_pairs
from trl_dt2it.debias.reports import AgreementCounts


def test_pairs_that_both_order_alike():
    pairs, counts = agreeing_pairs([8.0, 5.0, 4.5], [6.0, 9.0, 3.0], min_gap=1.0)
    # 0 and 1 in opposite orders, 1 and 2 too close in lists.
    assert pairs == [AgreedPair(better=0, worse=2, listwise_gap=3.5, pointwise_gap=3.0)]
    assert pairs[0].strength == 3.25
    assert counts == AgreementCounts(agreed=1, opposed=1, close=1) and counts.rate == 0.5 and counts.pairs == 3


def test_the_better_one_is_the_better_one_wherever_it_stands():
    pairs, _ = agreeing_pairs([2.0, 9.0], [1.0, 7.0], min_gap=1.0)
    assert (pairs[0].better, pairs[0].worse, pairs[0].listwise_gap, pairs[0].pointwise_gap) == (1, 0, 7.0, 6.0)


def test_a_gap_of_just_the_least_counts():
    pairs, _ = agreeing_pairs([1.3, 0.3], [0.1 * 13, 0.3], min_gap=1.0)  # 1.3 - 0.3 is 0.99999...
    assert len(pairs) == 1
    assert agreeing_pairs([1.2999, 0.3], [1.3, 0.3], min_gap=1.0) == ([], AgreementCounts(close=1))


def test_against_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lists, points = rng.integers(1, 11, (2, 5)).astype(float)
        pairs, counts = agreeing_pairs(lists, points, min_gap=2.0)
        expected, opposed = set(), 0
        for one, two in itertools.permutations(range(5), 2):
            if lists[one] - lists[two] >= 2 and points[one] - points[two] >= 2:
                expected.add((one, two))
            opposed += lists[one] - lists[two] >= 2 and points[two] - points[one] >= 2
        assert {(pair.better, pair.worse) for pair in pairs} == expected
        assert counts == AgreementCounts(len(expected), opposed, 10 - len(expected) - opposed)


def test_nothing_to_compare():
    assert agreeing_pairs([5.0], [5.0], min_gap=1.0) == ([], AgreementCounts())
    assert AgreementCounts(close=3).rate is None
    assert AgreementCounts(1, 2, 3) + AgreementCounts(4, 5, 6) == AgreementCounts(5, 7, 9)
    assert AgreementCounts(3, 1, 9).rate == pytest.approx(0.75)
