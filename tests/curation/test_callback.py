"""The callback in real trainings: against hand-made data sets and plain runs, bit for bit, and misuse."""

import numpy as np
import pytest
from datasets import Dataset

from trl_dt2it.curation import Flip, IterativeCurationCallback, Keep, flip_negative, keep_consistent

from ..rows import make_dataset
from ..trainers import losses, trainer_for
from .trainings import BY_TOKENS, RULES, Known, N, assert_same_weights, data, keep_all, log_of, rounds_of, trained


WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
REBALANCED = {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2}


# ---------------------------------------------------------------------------------------------- against other runs


@pytest.mark.parametrize(
    ("args", "lora"),
    [({"logging_steps": 4}, True), (WORKERS, False), (BY_TOKENS, False), (BY_LENGTH, True), (REBALANCED, False)],
    ids=["random", "workers", "tokens", "length", "rebalanced"],
)
def test_rules_that_change_nothing_change_nothing(args, lora, tmp_path):
    """The same batches, dropout, losses and weights as without the callback, though the model scores all pairs."""
    plain = trained(tmp_path, args=args, lora=lora)
    curated = trained(tmp_path, args=args, lora=lora, rules=[Keep(keep_all)])
    assert [entry["epoch"] for entry in rounds_of(curated)] == [1, 2]
    assert log_of(curated) == log_of(plain)
    assert_same_weights(curated, plain)
    assert len({entry["learning_rate"] for entry in log_of(plain)}) == len(log_of(plain))
    if lora:  # dropout depends on the random state, which this scorer moves
        drawing = trained(tmp_path, args=args, lora=lora, rules=[Keep(keep_all)], scorer=Known([1.0] * N))
        assert log_of(drawing) == log_of(plain)
        assert_same_weights(drawing, plain)


@pytest.mark.parametrize("args", [{}, WORKERS, BY_TOKENS], ids=["random", "workers", "tokens"])
def test_flips_are_those_of_a_data_set_flipped_by_hand(args, tmp_path):
    """Margins stay where they are; so does everything but the two sides."""
    strength = [1.0, -1.0] * 5 + [-3.0]
    dataset = data(margin=[i / 4 for i in range(N)])
    rows = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if strength[i] < 0 else row
        for i, row in enumerate(dataset)
    ]
    by_hand = Dataset.from_list(rows, features=dataset.features)
    args = {**args, "num_train_epochs": 2, "loss_type": "margin"}
    plain = trained(tmp_path, by_hand, args)
    curated = trained(tmp_path, dataset, args, rules=[Flip(flip_negative)], scorer=Known(strength), start_epoch=0)
    assert log_of(curated) == log_of(plain)
    assert_same_weights(curated, plain)
    assert losses(trained(tmp_path, dataset, args)) != losses(plain)
    assert rounds_of(curated)[0]["curation/flipped"] == 6


def test_workers_that_persist_see_flips_and_strengths_at_once(tmp_path):
    strength = [2.0, -1.0, 5.0, 4.0, -2.0, 3.0, -6.0, 1.0, 0.5, 0.2, -3.0]
    rules = [Flip(flip_negative)]
    runs = [
        trained(tmp_path, args=args, rules=rules, scorer=Known(strength), refresh_strength=True)
        for args in ({}, {**WORKERS, "dataloader_prefetch_factor": 4})
    ]
    assert log_of(runs[0]) == log_of(runs[1])
    assert_same_weights(*runs)
    plain = trained(tmp_path)
    per_epoch = len(losses(plain)) // 3
    assert losses(runs[1])[:per_epoch] == losses(plain)[:per_epoch]
    assert losses(runs[1])[per_epoch] != losses(plain)[per_epoch]


def test_dropped_pairs_of_planned_batches_have_no_weight(tmp_path):
    strength = [1.0, -1.0, 2.0] * 3 + [1.0, -2.0]
    plain = trained(tmp_path, data(weight=[float(one > 0) for one in strength]), {**BY_TOKENS, "num_train_epochs": 2})
    curated = trained(
        tmp_path,
        args={**BY_TOKENS, "num_train_epochs": 2},
        rules=[Keep(keep_consistent)],
        scorer=Known(strength),
        start_epoch=0,
    )
    assert log_of(curated) == log_of(plain)
    assert_same_weights(curated, plain)
    assert rounds_of(curated)[0]["curation/dropped"] == 4


def test_dropped_pairs_are_not_drawn_and_steps_stay(tmp_path):
    strength = [1.0, -1.0, 2.0] * 3 + [1.0, -2.0]
    record = []
    curated = trained(tmp_path, record=record, rules=[Keep(keep_consistent)], scorer=Known(strength))
    plain = trained(tmp_path)
    assert [e["learning_rate"] for e in log_of(curated)] == [e["learning_rate"] for e in log_of(plain)]
    assert curated.state.global_step == plain.state.global_step == 18
    rows = [row for batch, _ in record for row in batch]
    first, second, third = rows[:N], rows[N : 2 * N], rows[2 * N :]
    assert sorted(first) == list(range(N))
    kept = {row for row in range(N) if strength[row] > 0}
    assert set(second) == set(third) == kept and len(kept) == 7
    assert len(second) == len(third) == N and second != third
    assert sorted(np.bincount(second, minlength=N)[list(kept)]) == [1, 1, 1, 2, 2, 2, 2]
    assert all(weight == 1.0 for _, batch in record for weight in batch)


def test_strengths_are_dealt_out_anew(tmp_path):
    """As a data set in which the strengths of each source have been given to other pairs by hand."""
    source = ["a"] * 6 + ["b"] * 5
    raw = [0.0, 4.0, 2.0, None, 1.0, 3.0, 30.0, 10.0, 20.0, 0.0, 40.0]
    strength = [6.0, 1.0, -5.0, 9.0, -4.0, 3.0, 1.0, 2.0, 3.0, 4.0, -0.5]
    # a: pairs 1, 5, 4, 2, 0 by how sure the model is; pair 3 stays unknown. b: pairs 10, 6, 7, 8, 9.
    by_hand = [4.0, 0.0, 3.0, None, 2.0, 1.0, 10.0, 20.0, 30.0, 40.0, 0.0]
    dataset = data(source=source, strength=raw)
    flipped = Dataset.from_list(
        [
            {
                **(row | {"chosen": row["rejected"], "rejected": row["chosen"]} if strength[i] < 0 else row),
                "strength": by_hand[i],
            }
            for i, row in enumerate(dataset)
        ],
        features=dataset.features,
    )
    plain = trained(tmp_path, flipped, {"num_train_epochs": 1})
    curated = trained(
        tmp_path,
        dataset,
        {"num_train_epochs": 1},
        rules=[Flip(flip_negative)],
        scorer=Known(strength),
        start_epoch=0,
        refresh_strength=True,
    )
    assert log_of(curated) == log_of(plain)
    assert_same_weights(curated, plain)


# ----------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` is 0; it must be at least 1"),
        ({"start_epoch": -1}, "`start_epoch` is -1"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"min_kept": 0.0}, "`min_kept` is 0.0; it must be above 0"),
        ({"folds": 1}, "`folds` is 1; it must be from 2"),
        ({"folds": 2, "every": 2}, "`every` is 2; it must be 1 with `folds`"),
        ({"only_sources": ["x"]}, "`only_sources` names x, which is not in the column `source`"),
        ({"reference": make_dataset(3)}, "`reference` is 3 pairs; it must be at least 20"),
        ({"reference": make_dataset(20), "rules": RULES}, "no rule takes it"),
        ({"combine": "mean"}, "`combine` is 'mean'; it must be raw, zscore or rank"),
    ],
)
def test_misuse_fails_at_start(options, message, tmp_path):
    trainer = trainer_for("qwen3_vl", tmp_path, data(source=["a"] * N))
    with pytest.raises(ValueError, match=message):
        IterativeCurationCallback(trainer, **options)


def test_sets_that_cannot_be_curated(tmp_path):
    streamed = trainer_for(
        "qwen3_vl", tmp_path, data().remove_columns("strength").to_iterable_dataset(), {"max_steps": 1}
    )
    with pytest.raises(ValueError, match="not streamed"):
        IterativeCurationCallback(streamed)
    plain = trainer_for("qwen3_vl", tmp_path, data().remove_columns("strength"))
    with pytest.raises(ValueError, match="has no column `strength`"):
        IterativeCurationCallback(plain, refresh_strength=True)


def test_a_callback_that_was_not_added_changes_nothing(tmp_path):
    args = {"num_train_epochs": 2, "gradient_checkpointing": False, "save_strategy": "epoch"}
    plain = trained(tmp_path, args=args)
    trainer = trainer_for("qwen3_vl", tmp_path, data(), args)
    callback = IterativeCurationCallback(trainer, rules=RULES, start_epoch=0)
    trainer.add_callback(callback)
    assert trainer.selection is callback.selection
    trainer.remove_callback(callback)
    assert trainer.selection is None
    trainer.train()
    assert log_of(trainer) == log_of(plain)
    assert_same_weights(trainer, plain)
    assert list(tmp_path.glob("checkpoint-*")) and not list(tmp_path.rglob("curation_state.*"))


def test_the_first_of_two_callbacks_counts(tmp_path):
    strengths = [1.0, -1.0] * 5 + [-3.0], [-1.0, 1.0] * 5 + [3.0]
    options = {"rules": [Flip(flip_negative)], "start_epoch": 0}
    args = {"num_train_epochs": 2, "gradient_checkpointing": False}
    alone = trained(tmp_path, args=args, scorer=Known(strengths[0]), **options)
    trainer = trainer_for("qwen3_vl", tmp_path, data(), args)
    first, second = (IterativeCurationCallback(trainer, scorer=Known(one), **options) for one in strengths)
    trainer.add_callback(first)
    trainer.add_callback(second)
    selection = first.selection
    trainer.train()
    assert trainer.selection is first.selection is selection and selection.flipped.sum() == 6
    assert log_of(trainer) == log_of(alone)
    assert_same_weights(trainer, alone)


def test_scores_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"an array of shape \(11,\) for 11 pairs"):
        trained(tmp_path, scorer=lambda rows: np.zeros(len(rows)))
