"""Batches by tokens: plans worked out by hand, what holds for all of them, and training on them."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState
from transformers.trainer_pt_utils import BatchRebalanceSampler

from trl_dt2it.training.batching import (
    EpochLengthGroupedSampler,
    SetEpoch,
    TokenBatchSampler,
    plan_batches,
    plan_training,
)

from ..rows import make_dataset
from ..trainers import config, losses, trainer_for, weights


def planned(sizes, max_tokens, **kwargs) -> list[list[int]]:
    """Sizes of the pairs of each batch."""
    plan = plan_batches(sizes, max_tokens, **kwargs)
    return [sorted((sizes[row] for row in plan.rows[batch]), reverse=True) for batch in plan.batches]


# ------------------------------------------------------------------------------------------------------ plans by hand


def test_first_fit_decreasing_by_hand():
    # 70 takes 30, 60 takes 40, 50 takes 20 and 20 and 10.
    sizes = [20, 70, 10, 40, 60, 30, 50, 20]
    assert planned(sizes, 100) == [[70, 30], [60, 40], [50, 20, 20, 10]]


def test_padded_by_hand():
    # Two times 40 is 80, a third pair would make it 120; three times 30 is 90.
    assert planned([30, 40, 30, 40, 30], 100, padded=True) == [[30, 30, 30], [40, 40]]
    # Three batches are needed, and 80 is enough for three.
    assert planned([30, 40, 30, 40, 10, 30], 100, padded=True) == [[40, 40], [30, 30], [30, 10]]


def test_batches_are_filled_evenly():
    # Eight at a time would leave two for the last batch.
    assert planned([10] * 10, 80) == [[10] * 5, [10] * 5]
    assert planned([10] * 10, 80, padded=True) == [[10] * 5, [10] * 5]


def test_a_pair_that_is_too_long_is_alone_and_counted(caplog):
    assert planned([500, 60, 300, 40], 100) == [[500], [300], [60, 40]]
    assert planned([500, 60, 300, 40], 100, padded=True) == [[500], [300], [60], [40]]
    assert plan_training([500, 60, 300, 40], 100, world_size=1, padded=False).num_too_long == 2
    assert "2 of 4 pairs have more than `max_tokens_per_batch=100` tokens; each has a batch of its own" in caplog.text


def test_every_process_gets_a_batch():
    # Two batches for three processes: the cap shrinks until there are three, as even as they get.
    assert planned([40, 30, 20, 10, 10, 10], 60, world_size=3) == [[40], [30, 10], [20, 10, 10]]
    # Sizes 50 and 50 fit in one batch only, which is halved.
    assert planned([50, 50], 100, world_size=2) == [[50], [50]]


def test_lengths_of_a_window_count_as_the_longest():
    # 97 is within 1/32 of 100, 96 is not: together they count as 100 + 100 + 96, though they are 293.
    plan = plan_batches([96, 97, 100], 296)
    assert plan.rows.tolist() == [2, 1, 0]
    assert plan.window.tolist() == [0, 0, 1]
    assert len(plan.batches) == 1
    assert len(plan_batches([96, 97, 100], 295).batches) == 2


def test_refusals():
    with pytest.raises(ValueError, match="2 pairs are too few for 3 processes"):
        plan_batches([10, 10], 100, world_size=3)
    with pytest.raises(ValueError, match="`max_tokens_per_batch=15` makes 3 batches of 3 pairs, which 2 processes"):
        plan_batches([10, 10, 10], 15, world_size=2)


# -------------------------------------------------------------------------------------------------- what always holds


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400) | st.sampled_from([32, 33, 64, 500]), min_size=1, max_size=60),
    max_tokens=st.integers(1, 900),
    world_size=st.integers(1, 4),
    padded=st.booleans(),
    seed=st.integers(0, 3),
)
def test_invariants(sizes, max_tokens, world_size, padded, seed):
    try:
        plan = plan_batches(sizes, max_tokens, world_size=world_size, padded=padded)
    except ValueError:
        # Batches cannot be more than pairs, so that this is all that can go wrong.
        assert len(sizes) < world_size or len(sizes) % world_size
        return
    assert len(plan.batches) % world_size == 0
    for epoch in range(3):
        samplers = [TokenBatchSampler(plan, rank=rank, seed=seed) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        ranks = [list(sampler) for sampler in samplers]
        assert [len(batches) for batches in ranks] == [len(samplers[0])] * world_size
        batches = [batch for rank in ranks for batch in rank]
        assert sorted(row for batch in batches for row in batch) == list(range(len(sizes)))
        for batch in batches:
            lengths = [sizes[row] for row in batch]
            cost = len(lengths) * max(lengths) if padded else sum(lengths)
            assert len(batch) == 1 or cost <= max_tokens
        assert ranks == [list(sampler) for sampler in samplers]


def test_a_large_set_is_planned_well():
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(np.log(100), np.log(2000), 200_000)).astype(int)  # 20-fold
    plan = plan_batches(sizes, 8192, world_size=8)
    lengths = sizes[plan.rows]
    totals = np.array([lengths[batch].sum() for batch in plan.batches])
    assert totals.max() <= 8192
    assert totals.mean() > 0.96 * 8192
    steps = totals.reshape(-1, 8)
    # All but the last step, which takes what is left.
    assert (steps.max(1) / steps.min(1))[:-1].max() < 1.06
    padded = plan_batches(sizes, 8192, world_size=8, padded=True)
    costs = np.array([len(batch) * lengths[batch].max() for batch in padded.batches])
    assert costs.max() <= 8192 and costs.mean() > 0.85 * 8192


def test_epochs_differ_and_repeat():
    sampler = TokenBatchSampler(plan_batches([10] * 12, 40), seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    # Not only the order of the steps: other pairs meet.
    assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}
    assert list(TokenBatchSampler(sampler.plan, seed=4)) != epochs[0]


def test_the_order_of_length_groups_follows_from_seed_and_epoch():
    lengths = [1, 9, 2, 8, 3, 7, 4, 6]
    sampler = EpochLengthGroupedSampler(2, lengths, seed=5)
    first = list(sampler)
    assert sorted(first) == list(range(8))
    torch.rand(3)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert first == list(EpochLengthGroupedSampler(2, lengths, seed=5))


def test_the_callback_tells_the_epoch():
    callback = SetEpoch()
    callback.on_epoch_begin(None, TrainerState(epoch=1.0), None)  # without a sampler
    callback.sampler = TokenBatchSampler(plan_batches([1], 1))
    callback.on_epoch_begin(None, TrainerState(epoch=2.4), None)
    assert callback.sampler.epoch == 2


# ----------------------------------------------------------------------------------------------------------- training

# The first has one row per pair, the second two.
BOTH = ["qwen3_vl", "gemma3"]


def dataset(num_rows: int) -> Dataset:
    return make_dataset(
        num_rows,
        strength=[float(i % 5) for i in range(num_rows)],
        weight=[[1.0, 0.5, 2.0, 1.0, 0.0, 3.0][i % 6] for i in range(num_rows)],
        row_index=list(range(num_rows)),
    )


# Rewards of the training pairs are not measured at the end: they would pass through the collator that is watched.
ONLY_TRAINING = {"reward_statistics_pairs": 0}


def recorded(trainer) -> list[dict]:
    """The batches of the trainer's collator from now on."""
    collate, batches = trainer.data_collator, []

    def record(examples):
        batches.append(collate(examples))
        return batches[-1]

    trainer.data_collator = record
    return batches


def cap_for(family: str, tmp_path, data, share: float) -> int:
    """A cap that several pairs fit into: this share of all there is."""
    probe = packed_trainer(family, tmp_path, data, {"max_tokens_per_batch": 10**9})
    return int(sum(probe._lengths) * share)


def packed_trainer(family: str, tmp_path, data, args: dict):
    return trainer_for(family, tmp_path, data, {**ONLY_TRAINING, "num_train_epochs": 1, **args})


@pytest.mark.parametrize("family", BOTH)
def test_batches_stay_under_the_cap(family, tmp_path):
    data = dataset(14)
    cap = cap_for(family, tmp_path, data, 0.3)
    trainer = trainer_for(
        family, tmp_path, data, {**ONLY_TRAINING, "max_tokens_per_batch": cap, "num_train_epochs": 2}
    )
    batches = recorded(trainer)
    trainer.train()
    assert len(batches) == trainer.state.max_steps and 6 <= len(batches) <= 14
    for batch in batches:
        assert batch["input_ids"].numel() <= cap
        assert ("pair_layout" in batch) == (family == "qwen3_vl")
    half = len(batches) // 2
    for epoch in (batches[:half], batches[half:]):
        assert sorted(index for batch in epoch for index in batch["pairs"]["row_index"].tolist()) == list(range(14))
    assert max(batch["input_ids"].numel() for batch in batches) > 0.7 * cap
    sizes = [len(batch["pairs"]["row_index"]) for batch in batches]
    assert len(set(sizes)) > 1
    assert np.isfinite(losses(trainer)).all()


@pytest.mark.parametrize("family", BOTH)
def test_a_step_of_unequal_batches_is_one_large_batch(family, tmp_path):
    """Weighted pairs in packed micro-batches of different numbers of pairs: loss and gradient of all in one."""
    data = dataset(7)
    cap = cap_for(family, tmp_path, data, 0.4)
    runs, numbers = [], []
    for args in (
        {"max_tokens_per_batch": cap, "gradient_accumulation_steps": 10},
        {"max_tokens_per_batch": 10**6},
        {"per_device_train_batch_size": 7, "train_sampling_strategy": "sequential"},
    ):
        args = {**args, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        trainer = packed_trainer(family, tmp_path, data, args)
        batches = recorded(trainer)
        before = weights(trainer)
        trainer.train()
        numbers.append(sorted(len(batch["pairs"]["weight"]) for batch in batches))
        runs.append((losses(trainer), {name: value - before[name] for name, value in weights(trainer).items()}))
    assert len(numbers[0]) > 1 and len(set(numbers[0])) > 1 and sum(numbers[0]) == 7
    assert numbers[1:] == [[7], [7]]
    assert len(runs[0][0]) == 1
    for loss, step in runs[:2]:
        np.testing.assert_allclose(loss, runs[2][0], rtol=1e-5)
        for name, value in runs[2][1].items():
            torch.testing.assert_close(step[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("family", "args"),
    [
        ("qwen3_vl", {"max_tokens_per_batch": 400}),
        ("gemma3", {"max_tokens_per_batch": 450, "gradient_accumulation_steps": 2}),
        ("qwen3_vl", {"train_sampling_strategy": "group_by_length"}),
        ("qwen3_vl", {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2}),
    ],
)
def test_resumed_in_its_second_epoch_equals_the_undisturbed_run_bitwise(family, args, tmp_path):
    data = dataset(10)
    args = {**args, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": False}
    whole = trainer_for(family, tmp_path / "run", data, args)
    whole.train()
    middle = whole.state.max_steps // 2 + 1
    assert middle < whole.state.max_steps
    resumed = trainer_for(family, tmp_path / "run", data, args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{middle}"))
    assert losses(resumed) == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_groups_of_similar_length(tmp_path):
    """One group is the whole set, so that it comes in order of length: image tokens count."""
    data = dataset(8)
    args = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 4}
    trainer = packed_trainer("qwen3_vl", tmp_path, data, args)
    assert trainer._lengths[1] > trainer._lengths[0] > trainer._lengths[2]  # two images, one, none
    assert isinstance(trainer._get_train_sampler(), EpochLengthGroupedSampler)
    batches = recorded(trainer)
    trainer.train()
    order = [row for batch in batches for row in batch["pairs"]["row_index"].tolist()]
    assert sorted(order) == list(range(8))
    lengths = [trainer._lengths[row] for row in order]
    assert lengths == sorted(lengths, reverse=True)

    # Evaluation keeps the order.
    assert [len(batch["pairs"]["weight"]) for batch in trainer.get_eval_dataloader(data)] == [2] * 4
    order = [row for batch in trainer.get_eval_dataloader(data) for row in batch["pairs"]["row_index"].tolist()]
    assert order == list(range(8))

    balanced = trainer_for("qwen3_vl", tmp_path, data, {"train_sampling_strategy": "batch_rebalance"})
    sampler = balanced._get_train_sampler()
    assert type(sampler) is BatchRebalanceSampler and sampler.lengths == trainer._lengths


# ------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"train_sampling_strategy": "group_by_length"}, 'train_sampling_strategy="group_by_length"'),
        ({"train_sampling_strategy": "sequential"}, 'train_sampling_strategy="sequential"'),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ],
)
def test_what_packing_leaves_no_room_for(args, name, tmp_path):
    with pytest.raises(ValueError, match=f"`max_tokens_per_batch` and `{name}` exclude each other"):
        config(tmp_path, max_tokens_per_batch=100, **args)


def test_the_cap_is_positive(tmp_path):
    with pytest.raises(ValueError, match="`max_tokens_per_batch` is 0; it must be > 0"):
        config(tmp_path, max_tokens_per_batch=0)


@pytest.mark.parametrize("args", [{"max_tokens_per_batch": 100}, {"train_sampling_strategy": "group_by_length"}])
def test_a_streamed_set_has_no_lengths(args, tmp_path):
    with pytest.raises(ValueError, match="Batches by length .*need the length .* streamed; load it whole"):
        trainer_for("qwen3_vl", tmp_path, make_dataset(2).to_iterable_dataset(), {**args, "max_steps": 1})


def test_lengths_of_a_column_are_taken(tmp_path, caplog):
    data = dataset(4)
    trainer = trainer_for("qwen3_vl", tmp_path, data.add_column("length", [7, 5, 5, 3]), {"max_tokens_per_batch": 10})
    assert trainer._lengths == [7, 5, 5, 3]
    assert "taken from the column `length`" in caplog.text
    assert sorted(map(len, trainer._get_train_sampler())) == [2, 2]
    with pytest.raises(ValueError, match="column `length` .* is taken .*, but row 1 .*; remove the column, or set"):
        trainer_for("qwen3_vl", tmp_path, data.add_column("length", [7, 0, 5, 3]), {"max_tokens_per_batch": 10})


def test_another_train_set_needs_another_trainer(tmp_path):
    trainer = trainer_for("qwen3_vl", tmp_path, dataset(4), {"max_tokens_per_batch": 400})
    trainer.train_dataset = trainer.train_dataset.select([0, 1])
    with pytest.raises(ValueError, match="make a new trainer"):
        trainer.get_train_dataloader()
