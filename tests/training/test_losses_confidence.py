"""Training with labels in doubt: `label_confidence` from the column to the step, against sets that say the same."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoProcessor

from trl_dt2it import MultimodalRewardTrainer
from trl_dt2it.data.mixing import concatenate, swap_pairs, with_columns
from trl_dt2it.training.collator import MultimodalPreferenceCollator
from trl_dt2it.training.selection import Draw, as_drawn

from ..families import family_dir
from ..rows import make_dataset, make_rows, text_rows
from ..trainers import config, losses, text_model, trainer_for, weights


CONFIDENCE = [0.9, 0.6, 0.25, 1.0, None, 0.0, 0.75]
STRENGTH = [1.0, 3.0, 2.0, 5.0, 0.5, 4.0, 2.5]
WEIGHT = [1.0, 0.5, 2.0, 1.0, 0.7, 3.0, 1.0]


def doubtful(**columns) -> Dataset:
    rows = zip(text_rows(7), CONFIDENCE, strict=True)
    data = Dataset.from_list([{**row, "label_confidence": confidence} for row, confidence in rows])
    return with_columns(data, columns)


def trainer_of(tmp_path, data, **args) -> MultimodalRewardTrainer:
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    args = config(tmp_path, **{"num_train_epochs": 2, **args})
    return MultimodalRewardTrainer(text_model(tokenizer), args=args, train_dataset=data, processing_class=tokenizer)


def trained(tmp_path, data, **args) -> MultimodalRewardTrainer:
    trainer = trainer_of(tmp_path, data, **args)
    trainer.train()
    return trainer


def assert_same(one, other):
    assert losses(one) == losses(other) and len(losses(one)) > 1
    for name, value in weights(one).items():
        assert torch.equal(weights(other)[name], value), name


def test_a_column_of_certainty_is_no_column(tmp_path):
    """Bit for bit, whether it holds 1.0 or nothing, and also where labels are flipped."""
    plain = doubtful(strength=STRENGTH).remove_columns("label_confidence")
    sure = with_columns(plain, {"label_confidence": [1.0, None, 1.0, 1.0, None, 1.0, 1.0]})
    one = trained(tmp_path, plain)
    assert_same(trained(tmp_path, sure), one)
    flips = np.arange(7) < 3
    flipped = trained(tmp_path, swap_pairs(plain, flips))
    assert_same(trained(tmp_path, swap_pairs(sure, flips)), flipped)
    assert losses(flipped) != losses(one)


@pytest.mark.parametrize("loss_type", ["strength_margin", "gce", "btt"])
def test_a_doubtful_pair_is_two_weighted_pairs(loss_type, tmp_path):
    """One step on pairs with confidences is one step on every pair with the weight c and its mirror with 1 - c."""
    data = doubtful(strength=STRENGTH, weight=WEIGHT)
    share = np.array([1.0 if c is None else c for c in CONFIDENCE])
    plain = data.remove_columns("label_confidence")
    kept = with_columns(plain, {"weight": share * WEIGHT})
    mirrored = with_columns(swap_pairs(plain, np.ones(7, dtype=bool)), {"weight": (1 - share) * WEIGHT})
    # Each strength twice: the same ranks. SGD, whose step is proportional to the gradient.
    args = {"loss_type": loss_type, "optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": 14}
    one = trained(tmp_path, data, **args)
    other = trained(tmp_path, concatenate_datasets([kept, mirrored]), **args)
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-5)
    start = weights(trainer_of(tmp_path, data, **args))
    for name, value in weights(one).items():
        moved = (value - start[name]).abs().max()
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-4, atol=max(1e-7, 1e-3 * moved.item()))
    # So is the evaluation.
    evaluated, expected = one.evaluate(data), one.evaluate(concatenate_datasets([kept, mirrored]))
    assert evaluated["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_batches_and_accumulation_do_not_matter(tmp_path):
    """Batches with and without doubts share a step, and its weight does not depend on them."""
    columns = {"strength": STRENGTH, "weight": WEIGHT, "label_confidence": CONFIDENCE}
    data = make_dataset(7, num_images=(1, 0), **columns)
    runs = {}
    for size, accumulation in ((7, 1), (3, 3), (1, 7)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        runs[size] = trainer_for("qwen3_vl", tmp_path, data, {"num_train_epochs": 2, **args})
        runs[size].train()
    for run in (runs[3], runs[1]):
        np.testing.assert_allclose(losses(run), losses(runs[7]), rtol=1e-5)
        for name, value in weights(runs[7]).items():
            torch.testing.assert_close(weights(run)[name], value, rtol=2e-3, atol=2e-4)


def test_a_stream_and_tokens_train_as_rows_in_memory(tmp_path):
    pairs = [{"chosen_ids": [5, 6, 7, 8 + i], "rejected_ids": [5, 6, 9]} for i in range(7)]
    rows = [{**pair, "label_confidence": c} for pair, c in zip(pairs, CONFIDENCE, strict=True)]

    def run(data):
        return trained(tmp_path, data, max_steps=3, train_sampling_strategy="sequential")

    data = Dataset.from_list(rows)
    whole = run(data)
    assert_same(run(data.to_iterable_dataset()), whole)
    assert losses(run(data.remove_columns("label_confidence"))) != losses(whole)
    for bad in (1.5, math.nan):
        wrong = Dataset.from_list([*rows[:2], {**rows[2], "label_confidence": bad, "pair_id": "third"}])
        message = rf"third: .*`label_confidence` is {bad}; give the probability that the label is right, in \[0, 1\]"
        for given in (wrong, wrong.to_iterable_dataset()):
            with pytest.raises(ValueError, match=message.replace("third: ", "")):
                run(given)


def test_the_evaluation_loss_by_hand_and_accuracy_of_the_labels_as_they_stand(tmp_path):
    data = doubtful()
    trainer = trainer_of(tmp_path, data)
    rewards = trainer.predict(data).predictions.astype(np.float64)
    delta = rewards[:, 0] - rewards[:, 1]
    share = np.array([1.0 if c is None else c for c in CONFIDENCE])
    expected = share * np.log1p(np.exp(-delta)) + (1 - share) * np.log1p(np.exp(delta))
    metrics = trainer.evaluate(data)
    assert metrics["eval_loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((delta > 0).mean())


def test_the_collator_says_what_the_loss_needs():
    collator = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir("qwen3_vl")))
    rows = make_rows(3, num_images=(0,), label_confidence=[0.5, None, 1])
    assert collator(rows)["pairs"]["label_confidence"].tolist() == [0.5, 1.0, 1.0]
    assert collator(rows)["pairs"]["label_confidence"].dtype == torch.float32
    assert "label_confidence" not in collator(rows[1:])["pairs"]
    with pytest.raises(ValueError, match=r"row 1: `label_confidence` is -0.1; .* or None if there is no doubt"):
        collator([rows[0], {**rows[1], "label_confidence": -0.1}])


def test_a_flipped_label_keeps_its_confidence_and_sets_without_one_have_none():
    """As 1 - c it would be the pair before the flip, and no flip would change anything."""
    plain = make_dataset(2, num_images=(0,))
    both = concatenate({"a": with_columns(plain, {"label_confidence": [0.8, None]}), "b": plain})
    assert both["label_confidence"][:] == [0.8, None, None, None]
    swapped = swap_pairs(both, np.ones(4, dtype=bool))
    assert swapped["label_confidence"][:] == [0.8, None, None, None] and swapped["chosen"][:] == both["rejected"][:]
    flipped = as_drawn(both[0], Draw(0, True, True, None))
    assert flipped["label_confidence"] == 0.8 and flipped["chosen"] == both[0]["rejected"]
