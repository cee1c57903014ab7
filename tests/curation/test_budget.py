"""Judges asked in the order of expected gain: by hand, against simulated judges, and what votes do to labels."""

import numpy as np
import pytest

from trl_dt2it.curation.budget import ORDERS, estimate_accuracy, judge_curve, judge_order, weigh_votes
from trl_dt2it.curation.rules import UNREADABLE, relabel_by_vote


def order(posterior, margins, how, flipped=None, kept=None, **kwargs):
    count = len(posterior)
    flipped = [False] * count if flipped is None else flipped
    kept = [True] * count if kept is None else kept
    return judge_order(posterior, margins, how=how, flipped=flipped, kept=kept, **kwargs).tolist()


def test_orders_by_hand():
    posterior = [0.1, 0.45, 0.9, 0.3, 0.02, 0.3]
    margins = [2.0, 0.4, -1.5, -0.8, 3.0, 0.7]
    flipped = [False, False, True, False, False, False]
    kept = [True, True, True, True, True, False]
    # Wrong as they are now: 0.1, 0.45, 1 - 0.9, 0.3, 0.02; the dropped pair counts as 0.5. At 0.8 only those above 0.2
    # can gain, and at 0.95 those above 0.05.
    assert order(posterior, margins, "gain", flipped, kept) == [5, 1, 3]
    assert order(posterior, margins, "gain", flipped, kept, accuracy=0.95) == [5, 1, 3, 2, 0]
    assert order(posterior, margins, "uncertainty", flipped, kept) == [1, 5, 3, 2, 0, 4]
    assert order(posterior, margins, "margin", flipped, kept) == [1, 5, 3, 2, 0, 4]
    shuffled = order(posterior, margins, "random", flipped, kept)
    assert sorted(shuffled) == list(range(6)) and shuffled == order(posterior, margins, "random", flipped, kept)
    assert any(order(posterior, margins, "random", seed=seed) != shuffled for seed in range(3))
    # A label that the rules kept though it is likely wrong comes before all.
    assert order([0.5, 0.7, 0.5], [1, 2, 3], "gain") == [1, 0, 2]


def test_ties_go_by_margin_and_then_by_row():
    assert order([0.4] * 5, [1.0, -0.5, 0.5, np.nan, 1.0], "gain") == [1, 3, 2, 0, 4]
    assert order([0.4] * 5, [1.0, -0.5, 0.5, np.nan, 1.0], "uncertainty") == [3, 1, 2, 0, 4]
    assert order([0.4] * 3, [1.0] * 3, "uncertainty") == order([0.4] * 3, [-1.0] * 3, "margin") == [0, 1, 2]
    assert order([], [], "gain") == order([], [], "random") == []


def test_what_is_not_known_counts_as_the_mean_of_the_others():
    # The mean of 0.6, 0.3 and 0.3 is 0.4.
    assert order([0.6, np.nan, 0.3, 0.3], [0, 0, 1, 2], "gain") == [0, 1, 2, 3]
    assert order([np.nan] * 3, [3, 1, 2], "gain") == [1, 2, 0]


def test_a_wrong_argument_is_named():
    with pytest.raises(ValueError, match="`how` .*gain, uncertainty, margin, random"):
        order([0.5], [0.0], "best")
    for accuracy in (0.5, 1.1):
        with pytest.raises(ValueError, match="`accuracy`"):
            order([0.5], [0.0], "gain", accuracy=accuracy)
    with pytest.raises(ValueError, match="`posterior` is 1.5|`posterior`.*1.5"):
        order([1.5], [0.0], "gain")


@pytest.mark.parametrize("accuracy", [0.7, 0.9])
@pytest.mark.parametrize(("p", "is_kept"), [(0.05, True), (0.25, True), (0.45, True), (0.8, True), (0.3, False)])
def test_the_gain_is_what_a_judge_of_that_accuracy_gains(p, is_kept, accuracy):
    count, rng = 200_000, np.random.default_rng(0)
    flipped = rng.random(count) < 0.5
    now_wrong = rng.random(count) < p
    wrong = now_wrong ^ flipped  # as of the source
    is_right = rng.random(count) < accuracy
    votes = np.where(wrong == is_right, -1, 1)[:, None, None].repeat(2, axis=2)
    kept = np.full(count, is_kept)
    decision = weigh_votes(
        relabel_by_vote(votes),
        np.where(flipped, 1 - p, p),
        flipped=flipped,
        kept=kept,
        strength=np.ones(count),
        accuracy=accuracy,
    )
    assert decision.keep.all()
    before = now_wrong.mean() if is_kept else 0.5  # a dropped pair is a coin toss
    gain = before - (wrong ^ decision.flip).mean()
    expected = max(0.0, p + accuracy - 1) if is_kept else accuracy - 0.5
    assert gain == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(count) * 2)
    is_asked = len(judge_order([p], [0.0], how="gain", flipped=[False], kept=[is_kept], accuracy=accuracy)) == 1
    assert is_asked == (expected > 0) and (is_asked or (decision.flip == flipped).all())
    # The posterior after the votes is the share of wrong labels among pairs of the same verdict.
    for verdict in (True, False):
        rows = (decision.posterior > 0.5) == verdict
        if rows.any():
            assert decision.posterior[rows].mean() == pytest.approx(wrong[rows].mean(), abs=0.01)


def test_votes_by_hand():
    votes = np.array([[[-1, -1]], [[-1, -1]], [[1, 1]], [[1, -1]], [[-1, -1]], [[0, 1]], [[1, UNREADABLE]], [[1, 1]]])
    posterior = [0.3, 0.1, 0.9, 0.4, 0.3, 0.3, 0.3, 0.7]
    flipped = np.array([0, 0, 1, 1, 0, 0, 0, 1], dtype=bool)
    kept = np.array([1, 1, 1, 1, 0, 0, 1, 1], dtype=bool)
    strength = np.arange(1.0, 9.0)
    by_votes = relabel_by_vote(votes)
    found = weigh_votes(by_votes, posterior, flipped=flipped, kept=kept, strength=strength, accuracy=0.8)
    # Turned: 0.3 is above 1 - 0.8, and so is 1 - 0.7. Not: 0.1, and the flip that is wrong with 1 - 0.9.
    assert found.flip.tolist() == [True, False, True, True, True, False, False, False]
    assert found.keep.tolist() == [True, True, True, True, True, False, True, True]
    assert found.strength.tolist() == [1.0, 2.0, 3.0, 4.0, 1.0, 0.5, 7.0, 1.0]
    overruled = "judges do not outweigh the model"
    assert found.reason.tolist() == [
        *("judges reverse the label", overruled, overruled, "judges disagree"),
        *("judges reverse the label", "judges disagree", "vote unreadable", "judges agree with the label"),
    ]
    # 0.3 * 0.8 / (0.3 * 0.8 + 0.7 * 0.2), and so on.
    after = [0.24 / 0.38, 0.08 / 0.26, 0.18 / 0.26, 0.4, 0.24 / 0.38, 0.3, 0.3, 0.14 / 0.38]
    assert found.posterior == pytest.approx(after)
    # What nobody knew and no clear verdict tells is not known after it either.
    unknown = weigh_votes(by_votes, np.full(8, np.nan), flipped=flipped, kept=kept, strength=strength, accuracy=0.8)
    assert np.isnan(unknown.posterior).tolist() == [False, False, False, True, False, True, True, False]
    alone = weigh_votes(by_votes, posterior, flipped=flipped, kept=kept & False, strength=strength)
    for name in ("flip", "keep", "strength", "reason"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(by_votes, name))
    sure = weigh_votes(by_votes, np.zeros(8), flipped=flipped & False, kept=kept, strength=strength, accuracy=1.0)
    assert sure.flip[:2].all() and np.isfinite(sure.posterior).all()


@pytest.mark.parametrize("accuracy", [0.65, 0.8, 0.95])
def test_the_accuracy_of_a_judge_is_estimated(accuracy):
    rng, count = np.random.default_rng(0), 20_000
    posterior = rng.beta(1, 3, count)
    wrong = rng.random(count) < posterior
    votes = np.where(wrong == (rng.random(count) < accuracy), -1, 1)[:, None, None].repeat(2, axis=2)
    votes[::5, 0, 1] *= -1  # no clear verdict
    assert estimate_accuracy(relabel_by_vote(votes), posterior) == pytest.approx(accuracy, abs=0.015)
    # Seen from the other orientation it is the same; where nothing is known, or little is asked, it is 0.8.
    assert estimate_accuracy(relabel_by_vote(-votes), 1 - posterior) == estimate_accuracy(
        relabel_by_vote(votes), posterior
    )
    assert estimate_accuracy(relabel_by_vote(votes), np.full(count, np.nan)) == pytest.approx(0.8)
    assert estimate_accuracy(relabel_by_vote(votes[:0]), []) == pytest.approx(0.8)
    # Fifty sure verdicts that are right stand beside forty of fifty.
    sure = relabel_by_vote(np.ones((50, 1, 2), dtype=int))
    assert estimate_accuracy(sure, np.zeros(50)) == pytest.approx(0.9, abs=0.001)


def test_the_curve_by_hand():
    wrong = np.array([1, 0, 1, 0, 1], dtype=bool)
    flipped, kept = np.array([0, 1, 0, 0, 0], dtype=bool), np.array([1, 1, 0, 1, 1], dtype=bool)
    # Right: pair 3. Wrong: 0, 1, 4; pair 2 is dropped. Votes turn 0, bring back 2 flipped, and say nothing of 1.
    votes = np.array([[[-1, -1]], [[-1, -1]], [[1, -1]]])
    rows = np.array([0, 2, 1])
    state = {"flipped": flipped[rows], "kept": kept[rows]}
    decision = weigh_votes(relabel_by_vote(votes), np.full(3, 0.4), strength=np.ones(3), **state)
    curve = judge_curve(decision, rows, np.array([2, 2, 2]), flipped=flipped, kept=kept, wrong=wrong)
    assert curve == {"calls": [0, 2, 4, 6], "changed": [0, 1, 2, 2], "noise": [0.75, 0.5, 0.4, 0.4]}
    many = weigh_votes(
        relabel_by_vote(np.ones((5, 1, 2), dtype=int)),
        np.full(5, 0.4),
        flipped=flipped,
        kept=kept,
        strength=np.ones(5),
    )
    assert "noise" not in judge_curve(many, np.arange(5), np.full(5, 4), flipped=flipped, kept=kept)
    nothing = weigh_votes(relabel_by_vote(votes[:0]), [], flipped=flipped[:0], kept=kept[:0], strength=np.ones(0))
    assert judge_curve(nothing, rows[:0], rows[:0], flipped=flipped, kept=kept)["calls"] == [0]


def test_the_order_of_gain_needs_the_fewest_calls():
    rng, count, accuracy = np.random.default_rng(1), 4000, 0.8
    posterior = np.where(rng.random(count) < 0.5, rng.beta(0.5, 8, count), rng.beta(3, 4, count))
    wrong = rng.random(count) < posterior
    flipped, kept = posterior > 0.5, np.ones(count, dtype=bool)
    votes = np.where(wrong == (rng.random(count) < accuracy), -1, 1)[:, None, None].repeat(2, axis=2)
    curves = {}
    for how in ORDERS:
        rows = judge_order(posterior, posterior - 0.5, how=how, flipped=flipped, kept=kept)
        state = {"flipped": flipped[rows], "kept": kept[rows], "strength": np.ones(len(rows))}
        decision = weigh_votes(relabel_by_vote(votes[rows]), posterior[rows], **state)
        calls = np.full(len(rows), 2)
        curves[how] = judge_curve(decision, rows, calls, flipped=flipped, kept=kept, wrong=wrong)
    final = {how: curve["noise"][-1] for how, curve in curves.items()}
    # No verdict that is not asked for in the order of gain would have changed anything.
    assert len(set(final.values())) == 1 and curves["gain"]["calls"][-1] < count
    for how in ("uncertainty", "margin"):
        assert curves[how]["noise"][20] <= curves["random"]["noise"][20]
