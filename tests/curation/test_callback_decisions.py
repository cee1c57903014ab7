"""What the callback decides between epochs, in real trainings and by hand."""

import numpy as np
import pytest
import torch
from transformers import TrainerState

from trl_dt2it.curation import (
    Flip,
    IterativeCurationCallback,
    Keep,
    NoiseEstimate,
    flip_mixture,
    flip_negative,
    keep_consistent,
)
from trl_dt2it.curation.callback import blend, curation_metrics, draw_folds, load_state, redistribute
from trl_dt2it.curation.health import num_references
from trl_dt2it.training.pair_scoring import score_pairs

from ..rows import make_dataset
from ..trainers import trainer_for
from .trainings import Known, N, callback_of, data, keep_all, rounds_of, trained


# -------------------------------------------------------------------------------------------------------- decisions


def test_the_model_in_training_scores_by_default(tmp_path):
    curated = trained(tmp_path, args={"num_train_epochs": 2, "learning_rate": 0.0}, rules=[Flip(flip_negative)])
    scores = score_pairs(curated.model, data(), curated.data_collator, batch_size=2)
    expected = scores[:, 0].astype(np.float64) - scores[:, 1]
    state = callback_of(curated).state
    np.testing.assert_array_equal(state.average, expected)
    assert state.selection.flipped.tolist() == (expected < 0).tolist() and 0 < state.selection.flipped.sum() < N
    entry = rounds_of(curated)[0]
    assert entry["curation/mean_strength"] == pytest.approx(np.abs(expected).mean())
    assert entry["curation/noise_rate"] == pytest.approx((expected < 0).mean())


def test_rounds_come_when_they_are_due(tmp_path):
    scorer = Known([1.0] * N)
    curated = trained(tmp_path, args={"num_train_epochs": 6}, scorer=scorer, every=2, start_epoch=1)
    assert [entry["epoch"] for entry in rounds_of(curated)] == [1, 3, 5]
    assert len(scorer.asked) == 3 and callback_of(curated).state.round == 3


def test_rules_see_the_average_and_decide_from_the_labels(tmp_path):
    """A pair that is flipped can come back, and the mean of two rounds decides, with the weights of the momentum."""
    first = [-1.0, -1.0] + [1.0] * (N - 2)
    second = [2.0, 4.0] + [-0.5] + [1.0] * (N - 3)
    curated = trained(tmp_path, scorer=Known(first, second), rules=[Flip(flip_negative)], momentum=0.75)
    state = callback_of(curated).state
    assert state.average[:4].tolist() == [-0.25, 0.25, 0.625, 1.0]
    assert [entry["curation/flipped"] for entry in rounds_of(curated)] == [2, 1]
    assert np.flatnonzero(state.selection.flipped).tolist() == [0]


def test_several_models_and_sources(tmp_path):
    dataset = data(source=["a", "b"] * 5 + ["b"])

    def ensemble(rows):
        index = np.array(rows["row_index"][:])
        chosen = np.stack([index - 5.0, index - 2.0], axis=-1)
        return np.stack([chosen, np.zeros_like(chosen)], axis=1)  # mean strength: row - 3.5

    curated = trained(
        tmp_path, dataset, {"num_train_epochs": 2}, scorer=ensemble, rules=[Flip(flip_negative)], only_sources=["b"]
    )
    selection = callback_of(curated).state.selection
    assert np.flatnonzero(selection.flipped).tolist() == [1, 3]
    assert np.isnan(callback_of(curated).state.average[[0, 2, 4, 6, 8]]).all()
    both = trained(tmp_path, dataset, {"num_train_epochs": 2}, scorer=ensemble, rules=[Flip(flip_negative)])
    entry = rounds_of(both)[0]
    assert (entry["curation/flipped/a"], entry["curation/flipped/b"], entry["curation/flipped"]) == (2, 2, 4)
    assert entry["curation/noise_rate/a"] == 2 / 5 and entry["curation/kept/b"] == 6
    # |row - 3.5| of a's rows 0, 2, 4, 6, 8
    assert entry["curation/mean_strength/a"] == pytest.approx((3.5 + 1.5 + 0.5 + 2.5 + 4.5) / 5)


def test_rules_are_told_of_pairs_known_to_be_right(tmp_path):
    """A rule gets the average strengths of the reference; others are not disturbed by it."""
    told = []

    def flip_below(strength, reference=None):
        told.append(reference)
        return strength < reference.mean()

    reference = make_dataset(20, seed=3, row_index=list(range(20)))
    scorer = Known([float(i) for i in range(20)], [float(i) for i in range(20)], [0.0] * 20)
    args = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 8}
    options = {"rules": [Flip(flip_below), Keep(keep_all)], "momentum": 0.5, "reference": reference}
    curated = trained(tmp_path, args=args, scorer=scorer, **options)
    # In each round the train set and the reference; the strengths of the second round are all 0.
    assert [len(asked) for asked in scorer.asked] == [N, 20, N, 20]
    assert [one.tolist() for one in told] == [list(range(20)), [i / 2 for i in range(20)]]
    assert np.flatnonzero(callback_of(curated).state.selection.flipped).tolist() == list(range(10))
    again = Known([0.0] * 20)
    trained(tmp_path, args=args, scorer=again, resume=tmp_path / "checkpoint-8", **options)
    assert told[-1].tolist() == [i / 2 for i in range(20)]


def test_no_source_is_emptied(tmp_path, caplog):
    dataset = data(source=["a"] * 8 + ["b"] * 3)
    strength = [1.0] * 8 + [-3.0, -1.0, -2.0]
    curated = trained(
        tmp_path, dataset, {"num_train_epochs": 2}, scorer=Known(strength), rules=[Keep(keep_consistent)], min_kept=0.1
    )
    assert np.flatnonzero(callback_of(curated).state.selection.kept).tolist() == [*range(8), 9]


def test_pairs_without_a_score_stay_as_they_are(tmp_path):
    strength = [float("nan"), -1.0] + [1.0] * (N - 2)
    curated = trained(tmp_path, scorer=Known(strength), rules=[Keep(keep_consistent)])
    assert np.flatnonzero(~callback_of(curated).state.selection.kept).tolist() == [1]


def test_folds_are_scored_by_a_model_that_did_not_see_them_in_this_epoch(tmp_path):
    scorer, record = Known([1.0] * N), []
    curated = trained(
        tmp_path, args={"num_train_epochs": 4}, record=record, scorer=scorer, rules=[Keep(keep_all)], folds=3
    )
    rows = [row for batch, _ in record for row in batch]
    epochs = [set(rows[N * i : N * (i + 1)]) for i in range(4)]
    assert [sorted(set(range(N)) - epoch) for epoch in epochs] == [*map(sorted, scorer.asked), []]
    assert sorted(row for asked in scorer.asked for row in asked) == list(range(N))
    assert len(rows) == 4 * N and rounds_of(curated)[0]["curation/kept"] == len(scorer.asked[0])


# ------------------------------------------------------------------------------------------------------------ by hand


def test_blend_by_hand():
    nan = float("nan")
    result = blend(np.array([1.0, nan, 4.0, nan]), np.array([3.0, 2.0, nan, nan]), 0.25)
    np.testing.assert_array_equal(result, [2.5, 2.0, 4.0, nan])


def test_redistribute_by_hand():
    raw = np.array([1.0, 2.0, 3.0, np.nan, 9.0])
    margins = np.array([0.5, 0.1, -0.2, 0.9, 7.0])
    np.testing.assert_array_equal(redistribute(raw, margins, [np.array([0, 1, 2, 3])]), [3, 2, 1, np.nan, 9])


def test_folds_by_hand():
    folds = draw_folds(10, 3, seed=5)
    assert sorted(np.bincount(folds)) == [3, 3, 4]
    assert folds.tolist() == draw_folds(10, 3, seed=5).tolist() != draw_folds(10, 3, seed=6).tolist()


def test_metrics_by_hand():
    flipped, kept = np.array([True, True, False, False]), np.array([True, False, True, True])
    margins, rows = np.array([1.0, -4.0, 3.0, 5.0]), np.array([0, 1, 2])
    assert curation_metrics(flipped, kept, margins, rows, {"a": rows}) == {
        "curation/kept": 2,
        "curation/flipped": 1,  # another one was flipped and then dropped
        "curation/dropped": 1,
        "curation/noise_rate": pytest.approx(2 / 3),
        "curation/mean_strength": 2.0,
    }


# ------------------------------------------------------------------------------------------------ trusted pairs


def test_trusted_pairs_that_are_held_out_tell_how_far_the_scorer_can_be_believed(tmp_path):
    """Sources that are not curated are trusted: a part of them is not trained on, and is the reference of the rule."""
    trusted, count = 84, 84 + 40
    wrong = np.arange(count) >= count - 10  # of the curated pairs, the last ten labels
    dataset = make_dataset(
        count,
        source=["trusted"] * trusted + ["noisy"] * 40,
        pair_id=[f"pair-{i}" for i in range(count)],
        row_index=list(range(count)),
    )
    scorer, record = Known(np.where(wrong, -2.0, 2.0).tolist()), []
    curated = trained(
        tmp_path,
        dataset,
        {"num_train_epochs": 2},
        record=record,
        scorer=scorer,
        only_sources=["noisy"],
        rules=[Flip(flip_mixture, by="source")],
        ledger=tmp_path / "ledger",
        start_epoch=0,
    )
    callback, held_out = callback_of(curated), scorer.asked[1]
    assert len(held_out) == num_references(trusted) == 21 and max(held_out) < trusted
    assert sorted({row for batch, _ in record for row in batch}) == sorted(set(range(count)) - set(held_out))
    assert np.flatnonzero(callback.state.selection.flipped).tolist() == np.flatnonzero(wrong).tolist()
    health = callback.ledger.rounds[0]["health"]
    assert health["reference"]["pairs"] == 21 and health["reference"]["accuracy"] == 1.0
    assert health["sources"]["noisy"]["flipped"] == 10


def test_without_trusted_pairs_it_says_what_cannot_be_found(tmp_path, caplog):
    told = "a bias that the model has throughout cannot be told from wrong labels"
    trained(tmp_path, scorer=Known([1.0] * N), rules=[Flip(flip_mixture)])
    assert told in caplog.text
    caplog.clear()
    trained(tmp_path, scorer=Known([1.0] * N), rules=[Flip(flip_negative)])  # which believes the model anyway
    assert told not in caplog.text


# ---------------------------------------------------------------------------------------------- doubt about labels


def doubting(strength, *, estimates=None):
    """Flips below 0, and says how probable a wrong label is, but of a strength of 3."""
    posterior = np.where(strength < 0, 0.6 - strength / 10, 0.1)
    posterior[np.abs(strength) == 3] = np.nan
    estimates[None] = NoiseEstimate(posterior, strength < 0, is_identified=True)
    return strength < 0


@pytest.mark.parametrize("labels", ["soft", "weight"])
def test_doubt_about_labels_reaches_the_epochs_that_follow(labels, tmp_path):
    strength, own = [-1.0, 2.0, -3.0, -4.0] + [1.0] * 7, [0.5, 1.0] + [2.0] * 9
    dataset, seen = data(weight=own), []
    curated = trainer_for("qwen3_vl", tmp_path, dataset, {"num_train_epochs": 2, "learning_rate": 0.0})
    options = {"scorer": Known(strength), "rules": [Flip(doubting)], "labels": labels, "ledger": tmp_path / "ledger"}
    callback = IterativeCurationCallback(curated, **options)
    curated.add_callback(callback)
    compute_loss = curated.compute_loss

    def recording(model, inputs, *rest, **more):
        pairs = inputs["pairs"]
        confidence = pairs.get("label_confidence", torch.ones_like(pairs["weight"]))
        columns = pairs["row_index"].tolist(), confidence.tolist(), pairs["weight"].tolist()
        seen.append(dict(zip(columns[0], zip(*columns[1:], strict=True), strict=True)))
        return compute_loss(model, inputs, *rest, **more)

    curated.compute_loss = recording
    curated.train()
    steps = len(seen) // 2
    before, after = (
        {row: one for batch in part for row, one in batch.items()} for part in (seen[:steps], seen[steps:])
    )
    assert before == {row: (1.0, own[row]) for row in range(N)}
    # Of flipped pairs, that of the new label: 0.7 of 1 and 1.0 of 4, which nobody doubts; of 3 nothing is known.
    confidence = [0.7, 0.9, 1.0, 1.0] + [0.9] * 7
    if labels == "soft":
        expected = {row: (pytest.approx(confidence[row]), own[row]) for row in range(N)}
    else:
        expected = {row: (1.0, pytest.approx(own[row] * (2 * confidence[row] - 1))) for row in range(N)}
    assert after == expected
    # A checkpoint holds it, and a person who looks at a pair ends the doubt about it.
    callback.selection.save(tmp_path)
    state = load_state(tmp_path, callback._settings, callback._fingerprint)
    name = {"soft": "confidence", "weight": "weight"}[labels]
    np.testing.assert_array_equal(getattr(state.selection, name), getattr(callback.selection, name))
    callback.ledger.correct({"pair-0": "keep", "pair-1": "flip"})
    callback.on_epoch_begin(None, TrainerState(epoch=1.0, num_train_epochs=2), None)
    assert [callback.selection.draw(row)[4:] for row in (0, 1)] == 2 * [(None, {"soft": None, "weight": 1.0}[labels])]


def test_doubt_needs_a_rule_that_knows_it(tmp_path):
    trainer = trainer_for("qwen3_vl", tmp_path, data(), {})
    with pytest.raises(ValueError, match="`labels` is 'soft', but no rule says how probable a wrong label is"):
        IterativeCurationCallback(trainer, rules=[Flip(flip_negative)], labels="soft")
    with pytest.raises(ValueError, match="`labels` is 'firm'; give one of hard, soft, weight"):
        IterativeCurationCallback(trainer, labels="firm")
