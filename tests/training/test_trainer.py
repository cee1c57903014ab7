"""The trainer: TRL's numbers on text, training of all parts, exact metrics and invariances."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoProcessor,
)
from trl import RewardConfig, RewardTrainer

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.models.freezing import part_of

from ..families import FAMILIES, example_images, family_dir
from ..rows import make_dataset, text_rows
from ..trainers import MAIN_FAMILIES, common, losses, text_model, trainer_for, weights


# ------------------------------------------------------------------------------------------------------- TRL's numbers


@pytest.mark.parametrize(
    ("rows", "extra"),
    [
        ({}, {}),
        ({"implicit": True}, {"center_rewards_coefficient": 0.05}),
        ({"plain": True}, {"gradient_accumulation_steps": 2}),
        ({"margin": True}, {"gradient_checkpointing": False}),
        ({"max_length": True}, {"max_length": 75}),
    ],
    ids=["explicit", "implicit-centred", "plain-accumulated", "margin", "max-length"],
)
def test_text_model_on_text_gives_trl_losses_and_gradients(rows, extra, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    rows = dict(rows)
    has_margin, _ = rows.pop("margin", False), rows.pop("max_length", False)
    data = text_rows(12, **rows)
    if has_margin:
        data = [{**row, "margin": index / 4} for index, row in enumerate(data)]
    runs = []
    for trainer_class, config_class in (
        (RewardTrainer, RewardConfig),
        (MultimodalRewardTrainer, MultimodalRewardConfig),
    ):
        trainer = trainer_class(
            text_model(tokenizer),
            args=config_class(str(tmp_path), **{**common(), **extra}),
            train_dataset=Dataset.from_list(data),
            eval_dataset=Dataset.from_list(data[:4]),
            processing_class=tokenizer,
        )
        trainer.train()
        runs.append((trainer.state.log_history, weights(trainer), trainer.evaluate()))
    (expected_log, expected_weights, expected_eval), (log, final, evaluated) = runs
    assert len(log) == len(expected_log)
    steps = [pair for pair in zip(log, expected_log, strict=True) if "grad_norm" in pair[1]]
    assert steps
    for entry, expected in steps:
        assert entry.keys() == expected.keys()
        # TRL averages the extremes over micro-batches; over all pairs of a step they lie further out.
        skipped = {"min_reward", "max_reward"} if "gradient_accumulation_steps" in extra else set()
        for name in expected.keys() - skipped:
            assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for name, value in expected_weights.items():
        torch.testing.assert_close(final[name], value, rtol=1e-5, atol=1e-6)
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward", "eval_num_tokens"):
        assert evaluated[name] == pytest.approx(expected_eval[name], rel=1e-5), name


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_parameter_learns(family, tmp_path):
    trainer = trainer_for(family, tmp_path, make_dataset(4), {"num_train_epochs": 2})
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    still = {name for name in before if torch.equal(before[name], after[name])}
    # LLaVA reads the vision tower's last layer but one, so that what comes after it is never used.
    allowed = ("vision_tower.encoder.layers.1", "vision_tower.vision_model.encoder.layers.1", "post_layernorm")
    assert all(any(part in name for part in allowed) for name in still) if family == "llava" else not still, still
    assert np.isfinite(losses(trainer)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_in_all_its_parts(family, tmp_path):
    trainer = trainer_for(family, tmp_path, make_dataset(2, num_images=(1, 2)))
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert {part_of(name) for name in changed} == {"language_model", "vision_tower", "projector"}
    assert "score.weight" in changed
    assert np.isfinite(losses(trainer)).all()


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("parts", [("vision_tower",), ("projector",), ("vision_tower", "projector")])
def test_frozen_parts_stay_and_the_rest_learns(family, parts, tmp_path):
    args = {f"freeze_{part}": True for part in parts}
    trainer = trainer_for(family, tmp_path, make_dataset(4, num_images=(1,)), args)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert {part_of(name) for name in changed} == {"language_model", "vision_tower", "projector"} - set(parts)
    assert "score.weight" in changed


def test_default_loss_follows_the_columns(tmp_path):
    plain = trainer_for("qwen3_vl", tmp_path, make_dataset(2))
    assert plain.loss_type == "bt"
    graded = trainer_for("qwen3_vl", tmp_path, make_dataset(2, strength=[1.0, 3.0]))
    assert graded.loss_type == "strength_margin"
    with pytest.raises(ValueError, match='`loss_type="scaled"` needs a `strength` column'):
        trainer_for("qwen3_vl", tmp_path, make_dataset(2), {"loss_type": "scaled"})


def test_weighted_loss_by_hand(tmp_path):
    """strength_margin with ranks 1/4 and 3/4 and pair weights 2 and 1."""
    data = make_dataset(2, strength=[1.0, 3.0], weight=[2.0, 1.0])
    trainer = trainer_for("qwen3_vl", tmp_path, data, {"margin_scale": 0.5, "learning_rate": 0.0})
    trainer.model.eval()
    batch = trainer.data_collator([data.with_format(None)[i] for i in range(2)])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    delta = (outputs["logits"][:, 0] - outputs["logits"][:, 1]).tolist()
    margins, scale = [0.125, 0.375], [2 * 0.25, 1 * 0.75]
    terms = [w * np.log1p(np.exp(-(d - m))) for d, m, w in zip(delta, margins, scale, strict=True)]
    assert loss.item() == pytest.approx(sum(terms) / sum(scale), rel=1e-5)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_batch_size_and_accumulation_do_not_matter(family, tmp_path):
    """Seven weighted pairs in one step, cut in every way; the last micro-batch is shorter."""
    data = make_dataset(7, strength=[float(i) for i in range(7)], weight=[1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0])
    runs = {}
    for size, accumulation in ((7, 1), (4, 2), (2, 4), (1, 7)):
        args = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 2,
            "gradient_checkpointing": size == 4,
        }
        trainer = trainer_for(family, tmp_path, data, args)
        trainer.train()
        runs[size] = (losses(trainer), weights(trainer), trainer.state.log_history[0])
    for size in (4, 2, 1):
        np.testing.assert_allclose(runs[size][0], runs[7][0], rtol=1e-5)
        for name, value in runs[7][1].items():
            torch.testing.assert_close(runs[size][1][name], value, rtol=2e-3, atol=2e-4)
        for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens"):
            assert runs[size][2][name] == pytest.approx(runs[7][2][name], rel=1e-4, abs=1e-5)


def test_pixel_limits_reach_the_saved_processor(tmp_path):
    trainer = trainer_for(
        "qwen3_vl", tmp_path, make_dataset(2, num_images=(1,)), {"min_pixels": 32 * 32, "max_pixels": 48 * 48}
    )
    trainer.save_model(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.size["shortest_edge"] == 1024
    assert processor.image_processor.size["longest_edge"] == 2304
    grid = processor.image_processor(images=example_images(1)[0].resize((300, 200)), return_tensors="pt")
    patch = processor.image_processor.patch_size
    assert grid["image_grid_thw"].prod().item() * patch**2 <= 2304
    with pytest.raises(ValueError, match="no pixel limits"):
        trainer_for("llava", tmp_path, make_dataset(2), {"max_pixels": 1000})


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_metrics_are_exact_on_uneven_batches(tmp_path):
    data = make_dataset(5, source=["a", "b", "a", "a", "b"])
    received = []

    def compute_metrics(prediction):
        received.append(prediction.predictions)
        return {"wins": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).sum())}

    trainer = trainer_for("qwen3_vl", tmp_path, data, eval_dataset=data, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert received[0].shape == (5, 2)
    wins = received[0][:, 0] > received[0][:, 1]
    assert 0 < wins.sum() < 5
    assert metrics["eval_wins"] == wins.sum()
    assert metrics["eval_accuracy"] == wins.mean()
    assert metrics["eval_accuracy/a"] == wins[[0, 2, 3]].mean()
    assert metrics["eval_accuracy/b"] == wins[[1, 4]].mean()
    delta = (received[0][:, 0] - received[0][:, 1]).astype(np.float64)
    assert metrics["eval_margin"] == pytest.approx(delta.mean(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(-delta)).mean(), rel=1e-5)
    assert metrics["eval_mean_reward"] == pytest.approx(received[0].mean(), rel=1e-5)
    assert metrics["eval_min_reward"] == pytest.approx(received[0].min(), rel=1e-5)
    assert metrics["eval_max_reward"] == pytest.approx(received[0].max(), rel=1e-5)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_swapping_the_answers_negates(family, tmp_path):
    data = make_dataset(6)
    swapped = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    trainer = trainer_for(family, tmp_path, data, eval_dataset={"as_is": data, "swapped": swapped})
    metrics = trainer.evaluate()
    assert metrics["eval_as_is_margin"] == pytest.approx(-metrics["eval_swapped_margin"], abs=1e-6)
    assert metrics["eval_as_is_accuracy"] == pytest.approx(1 - metrics["eval_swapped_accuracy"])
    assert 0 < metrics["eval_as_is_accuracy"] < 1
    assert abs(metrics["eval_as_is_margin"]) > 1e-3


def test_best_model_by_the_metric_of_one_of_several_sets(tmp_path):
    data = make_dataset(4)
    args = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "num_train_epochs": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "b_accuracy",
    }
    trainer = trainer_for("qwen3_vl", tmp_path, data, args, eval_dataset={"a": data, "b": data.select([0])})
    trainer.train()
    assert trainer.state.best_metric in (0.0, 1.0)
    assert any("eval_a_accuracy" in entry for entry in trainer.state.log_history)


def test_streaming_equals_in_memory(tmp_path):
    data = make_dataset(5)
    args = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    memory = trainer_for("qwen3_vl", tmp_path, data, args, eval_dataset=data)
    stream = trainer_for(
        "qwen3_vl", tmp_path, data.to_iterable_dataset(), args, eval_dataset=data.to_iterable_dataset()
    )
    for trainer in (memory, stream):
        trainer.train()
    np.testing.assert_allclose(losses(stream), losses(memory), rtol=1e-5)
    ours, theirs = stream.evaluate(), memory.evaluate()
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_streamed_strength_has_to_be_scaled_beforehand(tmp_path):
    data = make_dataset(2, strength=[0.5, 1.0]).to_iterable_dataset()
    with pytest.raises(ValueError, match="it is streamed; scale"):
        trainer_for("qwen3_vl", tmp_path, data, {"max_steps": 1})
    trainer = trainer_for("qwen3_vl", tmp_path, data, {"max_steps": 1, "strength_normalization": "none"})
    trainer.train()
    assert trainer.loss_type == "strength_margin"
