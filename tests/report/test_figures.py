"""Where pairs stand after each stage, which of them are shown, and calibration: all by hand."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from trl_dt2it.curation import CurationLedger, relabel_by_vote
from trl_dt2it.curation.budget import weigh_votes
from trl_dt2it.evaluation.metrics import wilson
from trl_dt2it.report.figures import STATES, Flow, calibrate, read_flow
from trl_dt2it.report.gallery import choose_pairs

from .run_folder import NASTY_ID, NASTY_SOURCE, STRENGTH


def test_pairs_are_followed_through_the_ledger(written_run):
    flow = read_flow(CurationLedger(written_run / "ledger"))
    assert flow.steps == ("source", "round 1", "round 1, judge", "round 2")
    assert STATES == ("kept", "flipped", "relabelled", "dropped")
    assert flow.counts().tolist() == [[40, 0, 0, 0], [25, 10, 0, 5], [25, 10, 3, 2], [30, 9, 0, 1]]
    moves = flow.transitions()
    assert moves.shape == (3, 4, 4) and (moves.sum(axis=(1, 2)) == 40).all()
    assert moves[1, 3].tolist() == [0, 0, 3, 2]  # of five dropped ones, judges bring three back
    assert moves[2, 2].tolist() == [2, 1, 0, 0]  # round 2 flips one of them, pair 10
    since = dict(zip(flow.pair_id.to_pylist(), flow.since().tolist(), strict=True))
    assert [since[f"pair-{number}"] for number in (1, 8, 10, 20, 39)] == [1, 3, 3, 0, 3]
    assert flow.flipped.tolist() == [number < 8 or number == 10 for number in range(40)]
    # Margins are as the source has the pairs, whatever became of them.
    assert flow.margin == pytest.approx(STRENGTH)
    assert flow.source.tolist() == ["a"] * 20 + [NASTY_SOURCE] * 20


def test_what_is_undone_and_what_a_person_said(run):
    ledger = CurationLedger(run / "ledger")
    ledger.correct({"pair-20": "flip", "pair-39": "keep"})
    flow = read_flow(ledger)
    assert flow.steps[-1] == "by hand" and flow.counts()[-1].tolist() == [30, 10, 0, 0]
    ledger.undo(2)
    assert read_flow(ledger).steps == ("source", "round 1", "round 1, judge")
    ledger.undo(1)
    empty = read_flow(ledger)
    assert len(empty.pair_id) == 0 and empty.transitions().shape == (0, 4, 4) and empty.since().tolist() == []


def test_pairs_that_judges_were_asked_about_though_they_were_kept(run):
    ledger = CurationLedger(run / "ledger")
    # After round 2, 0 is flipped, 8 is kept, and 39 is dropped.
    votes = np.array([[[1, 1]], [[-1, -1]], [[1, 1]], [[1, 1]]])
    state = {"flipped": np.array([1, 0, 0, 0], dtype=bool), "kept": np.array([1, 1, 0, 1], dtype=bool)}
    decision = weigh_votes(relabel_by_vote(votes), np.full(4, 0.5), strength=np.ones(4), **state)
    names = [NASTY_ID, "pair-8", "pair-39", "pair-9"]
    ledger.append(2, "judge", pair_ids=names, decision=decision, votes=votes, models=["judge"], orientation="source")
    flow = read_flow(ledger)
    found = dict(zip(flow.pair_id.to_pylist(), flow.states[-1].tolist(), strict=True))
    assert [STATES[found[name]] for name in names] == ["kept", "flipped", "relabelled", "kept"]


def chosen(states: str, strength: list[float], most: int) -> str:
    codes = np.array([["k", "f", "r", "d"].index(one) for one in states], dtype=np.int8)
    names = pa.array([str(number) for number in range(len(states))])
    nothing = np.zeros(len(states), dtype=bool)
    flow = Flow(names, ("source", "round 1"), np.stack([0 * codes, codes]), nothing, nothing, nothing)
    return "".join(map(str, choose_pairs(flow, np.array(strength), most)))


def test_the_strongest_flips_come_first_and_others_are_not_crowded_out():
    assert chosen("ffffkd", [1, 4, 2, 3, 0.5, -1], 6) == "132054"
    assert chosen("ffffkkd", [1, 4, 2, 3, 0.5, 0.1, -1], 4) == "1365"
    assert chosen("ffff", [1, 4, 2, np.nan], 3) == "120"
    assert chosen("kkkk", [1, 4, 2, 3], 3) == "023"
    assert chosen("rrdk", [1, 4, 2, 3], 9) == "0123"


def test_calibration_by_hand():
    # Two bins, of which each has four pairs; where the model prefers the rejected answer, it has not won.
    gap = np.array([0.4, 0.4, -0.4, 0.4, 3.0, 3.0, 3.0, -3.0, 0.0, np.nan])
    found = calibrate(gap, np.zeros(10), num_bins=2)
    assert found.count == 8 and found.ties == 1
    low, high = found.bins
    assert (low.low, low.high, low.count, high.count) == (0.5, 0.75, 4, 4)
    assert low.predicted == pytest.approx(expit(0.4)) and high.predicted == pytest.approx(expit(3.0))
    assert low.observed == high.observed == 0.75 and low.interval == wilson(3 / 4, 4)
    assert found.error == pytest.approx((abs(0.75 - expit(0.4)) + abs(0.75 - expit(3.0))) / 2)
    # Names of sides are no news: a set with all pairs turned is as badly calibrated as its model is wrong.
    assert calibrate(-gap, np.zeros(10), num_bins=2).bins[0].observed == 0.25
    assert calibrate([50.0], [0.0]).bins[-1].count == 1  # a probability of 1 is in the last bin
    assert calibrate([], []).count == 0 and calibrate([], []).error == 0
