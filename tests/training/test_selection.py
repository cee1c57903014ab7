"""The draws of an epoch: the plain order while all are kept, kept pairs in turns otherwise, and rows as drawn."""

import pickle

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dt2it.training.batching import EpochLengthGroupedSampler, TokenBatchSampler, plan_batches
from trl_dt2it.training.selection import (
    Draw,
    PlannedBatchSampler,
    PlannedSampler,
    SelectedRows,
    Selection,
    SelectionSampler,
)


def rows_of(sampler) -> list[int]:
    return [draw.row for draw in sampler]


@pytest.mark.parametrize("epoch", [0, 3])
def test_with_all_pairs_the_order_is_that_of_accelerate(epoch):
    plain = SeedableRandomSampler(range(13), data_seed=42)
    plain.set_epoch(epoch)
    selection = Selection.of_all(13, seed=42)
    selection.epoch = epoch
    assert rows_of(SelectionSampler(selection)) == list(plain)
    assert rows_of(SelectionSampler(selection, shuffle=False)) == list(range(13))


@settings(max_examples=100, deadline=None)
@given(kept=st.lists(st.booleans(), min_size=1, max_size=40).filter(any), seed=st.integers(0, 5))
def test_an_epoch_is_full_and_fair(kept, seed):
    selection = Selection.of_all(len(kept), seed)
    selection.kept = np.array(kept)
    rows = rows_of(SelectionSampler(selection))
    assert len(rows) == len(kept) == len(SelectionSampler(selection))
    counts = np.bincount(rows, minlength=len(kept))
    assert not counts[~selection.kept].any()
    seen = counts[selection.kept]
    assert seen.max() - seen.min() <= 1
    # It goes through all before any comes again.
    number = selection.kept.sum()
    for start in range(0, len(rows), number):
        turn = rows[start : start + number]
        assert len(set(turn)) == len(turn)


def test_the_order_follows_from_seed_epoch_and_selection_alone():
    selection = Selection.of_all(50, seed=1)
    selection.kept[::3] = False
    first = rows_of(SelectionSampler(selection))
    torch.rand(5)
    assert rows_of(SelectionSampler(selection)) == first
    selection.epoch = 1
    second = rows_of(SelectionSampler(selection))
    assert second != first and set(second) == set(first)
    # Turns of one epoch differ, too: 33 are kept, so that 17 come a second time.
    assert first[33:] != first[:17]
    selection.epoch, selection.seed = 0, 9
    assert rows_of(SelectionSampler(selection)) not in (first, second)


def test_a_held_out_pair_is_not_drawn_in_its_epoch():
    selection = Selection.of_all(4)
    selection.kept[3] = False
    selection.held_out = np.array([True, False, False, False])
    assert sorted(set(rows_of(SelectionSampler(selection)))) == [1, 2]
    assert [selection.draw(row).is_drawn for row in range(4)] == [False, True, True, False]
    assert selection.kept.tolist() == [True, True, True, False]


def test_planned_orders_keep_every_place():
    selection = Selection.of_all(6)
    selection.flipped[2], selection.kept[4] = True, False
    grouped = EpochLengthGroupedSampler(2, [3, 1, 4, 1, 5, 9], seed=0)
    draws = list(PlannedSampler(grouped, selection))
    assert [draw.row for draw in draws] == list(grouped) and len(PlannedSampler(grouped, selection)) == 6
    assert {draw.row for draw in draws if draw.is_flipped} == {2}
    assert {draw.row for draw in draws if not draw.is_drawn} == {4}

    packed = TokenBatchSampler(plan_batches([5] * 6, 10))
    batches = list(PlannedBatchSampler(packed, selection))
    assert [[draw.row for draw in batch] for batch in batches] == list(packed)
    assert len(PlannedBatchSampler(packed, selection)) == 3
    PlannedBatchSampler(packed, selection).set_epoch(1)
    assert packed.epoch == 1


ROWS = Dataset.from_list(
    [
        {
            **{"prompt": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}", "chosen_ids": [i], "rejected_ids": [-i]},
            **{"margin": i / 2, "strength": float(i), "weight": 2.0, "label_confidence": 0.8, "source": "s"},
            **{"blind_margin": [1.5, -2.0, None][i]},
        }
        for i in range(3)
    ]
)


def test_rows_are_read_as_drawn():
    rows = SelectedRows(ROWS)
    assert len(rows) == 3
    as_it_is, flipped = rows.__getitems__([Draw(2, False, True, None), Draw(1, True, True, None)])
    assert as_it_is == ROWS[2]
    sides = {"chosen": "r1", "rejected": "c1", "chosen_ids": [-1], "rejected_ids": [1], "blind_margin": 2.0}
    assert flipped == {**ROWS[1], **sides}  # margin, strength, weight and confidence as they were
    assert rows[Draw(2, True, True, None)]["blind_margin"] is None
    assert rows[Draw(1, False, False, None)] == {**ROWS[1], "weight": 0.0}
    assert rows[Draw(1, False, True, 7.5)] == {**ROWS[1], "strength": 7.5}
    assert rows[Draw(1, False, True, float("nan"))] == {**ROWS[1], "strength": None}
    assert rows[Draw(1, False, True, 0.0)]["strength"] == 0.0
    assert rows[Draw(1, False, True, None, 0.6)] == {**ROWS[1], "label_confidence": 0.6}
    assert rows[Draw(1, False, True, None, None, 0.25)] == {**ROWS[1], "weight": 0.5}
    assert rows[Draw(1, False, False, None, 0.6, 0.25)] == {**ROWS[1], "weight": 0.0, "label_confidence": 0.6}
    plain = SelectedRows(ROWS.remove_columns(["weight", "label_confidence"]))
    assert plain[Draw(1, False, True, None, 0.6, 0.25)] == {**ROWS[1], "weight": 0.25, "label_confidence": 0.6}


def test_a_draw_carries_the_strength_of_its_row():
    selection = Selection.of_all(3)
    selection.strength = np.array([0.5, np.nan, 2.0])
    draws = [selection.draw(row) for row in range(3)]
    assert [draws[0].strength, draws[2].strength] == [0.5, 2.0] and np.isnan(draws[1].strength)
    # Plain Python values, which is what travels to the workers.
    assert pickle.loads(pickle.dumps(draws[2])) == Draw(2, False, True, 2.0)
    assert [type(value) for value in draws[2]] == [int, bool, bool, float, type(None), type(None)]
    selection.confidence, selection.weight = np.array([0.5, np.nan, 1.0]), np.array([0.0, 1.0, 0.5])
    assert selection.draw(0) == Draw(0, False, True, 0.5, 0.5, 0.0)
    assert selection.draw(1)[4:] == (None, 1.0) and selection.draw(2)[4:] == (1.0, 0.5)
    assert [type(value) for value in selection.draw(0)[4:]] == [float, float]
