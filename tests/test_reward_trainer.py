"""The trainer: TRL's numbers on text, exact metrics, invariances, freezing, adapters, checkpoints and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoProcessor,
    BitsAndBytesConfig,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer, load_reward_model
from trl_dt2it.data.schema import RowError
from trl_dt2it.demo.tiny import build_tiny_vlm
from trl_dt2it.freezing import part_of

from .families import FAMILIES, example_images, family_dir
from .rows import make_dataset, make_rows, text_rows


MAIN_FAMILIES = ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"]


def config(output_dir, **kwargs) -> MultimodalRewardConfig:
    return MultimodalRewardConfig(str(output_dir), **{**common(), **kwargs})


def common() -> dict:
    return {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def trainer_for(family: str, output_dir, train, args=None, **kwargs) -> MultimodalRewardTrainer:
    return MultimodalRewardTrainer(
        str(family_dir(family)), args=config(output_dir, **(args or {})), train_dataset=train, **kwargs
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


# ------------------------------------------------------------------------------------------------------- TRL's numbers


def text_model(tokenizer) -> Qwen3ForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text_config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, num_labels=1, initializer_range=0.2, **sizes
    )
    text_config.pad_token_id = tokenizer.pad_token_id
    return Qwen3ForSequenceClassification(text_config)


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


# ------------------------------------------------------------------------------------------------- saving and adapters


@torch.no_grad()
def rewards_of(model, processor, data) -> torch.Tensor:
    from trl_dt2it import MultimodalPreferenceCollator
    from trl_dt2it.preparation import leave_images_encoded

    batch = MultimodalPreferenceCollator(processor)(list(leave_images_encoded(data)))
    del batch["pairs"]
    return model.eval()(**batch).logits[:, 0]


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_saved_and_reloaded_gives_the_same_reward(family, tmp_path):
    data = make_dataset(3)
    trainer = trainer_for(family, tmp_path, data, {"learning_rate": 1e-2})
    trainer.train()
    trainer.save_model(tmp_path)
    expected = rewards_of(trainer.model, trainer.processing_class, data)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is type(trainer.processing_class)
    for load in (AutoModelForSequenceClassification.from_pretrained, load_reward_model):
        torch.testing.assert_close(rewards_of(load(tmp_path), processor, data), expected, rtol=1e-5, atol=1e-5)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".pt", ".pth", ".pkl")) for name in names)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_lora_saved_reloaded_and_merged_gives_the_same_reward(family, tmp_path):
    data = make_dataset(3)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = trainer_for(
        family, tmp_path, data, {"learning_rate": 1e-2, "freeze_vision_tower": True}, peft_config=lora
    )
    assert lora.modules_to_save is None  # the user's object is left alone
    trainer.train()
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trainable)
    # Gemma 3's projector is a bare parameter, which takes no adapter.
    expected_parts = {"language_model"} if family == "gemma3" else {"language_model", "projector"}
    assert {part_of(name) for name in trainable} == expected_parts
    trainer.save_model(tmp_path)
    expected = rewards_of(trainer.model, trainer.processing_class, data)

    reloaded = load_reward_model(tmp_path, allow_new_head=False)
    torch.testing.assert_close(rewards_of(reloaded, trainer.processing_class, data), expected, rtol=1e-5, atol=1e-5)
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(rewards_of(again, trainer.processing_class, data), expected, rtol=1e-4, atol=1e-4)


def test_qlora_in_four_bits(tmp_path):
    """bitsandbytes on the CPU, under bf16 autocast, which TRL's bf16 adapters need."""
    base = build_tiny_vlm(tmp_path / "base", hidden_size=128, vision_hidden_size=128)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    data = make_dataset(4)
    trainer = MultimodalRewardTrainer(
        base,
        args=config(tmp_path, bf16=True, learning_rate=1e-2),
        train_dataset=data,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        quantization_config=four_bits,
    )
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    assert trainer.model.is_quantized
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(tmp_path)
    reloaded = load_reward_model(tmp_path, allow_new_head=False, quantization_config=four_bits, dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = rewards_of(trainer.model, trainer.processing_class, data)
        actual = rewards_of(reloaded, trainer.processing_class, data)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.05, atol=0.1)


def test_an_adapter_without_its_head_is_refused(tmp_path):
    trainer = trainer_for(
        "qwen3_vl", tmp_path, make_dataset(2), peft_config=LoraConfig(r=2, target_modules="all-linear")
    )
    trainer.save_model(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "score" not in name}
    save_file(kept, path)
    with pytest.raises(ValueError, match="has no `score` head among its weights"):
        load_reward_model(tmp_path)
    torch.save(kept, tmp_path / "adapter_model.bin")
    path.unlink()
    with pytest.raises(OSError, match="adapter_model.safetensors"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_resumed_run_equals_the_undisturbed_one_bitwise(family, tmp_path):
    data = make_dataset(8, strength=[float(i) for i in range(8)])
    args = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "gradient_checkpointing": False}
    whole = trainer_for(family, tmp_path / "run", data, args)
    whole.train()
    resumed = trainer_for(family, tmp_path / "run", data, args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_training_arguments_keep_what_loaded_the_model(tmp_path, recwarn):
    trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(2), {"model_init_kwargs": {"dtype": "bfloat16"}})
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.args.model_init_kwargs == {"dtype": "bfloat16"}


# -------------------------------------------------------------------------------------------------------------- misuse


def test_a_wrong_word_in_the_configuration_fails_at_once(tmp_path):
    for name, value in (("loss_type", "bradley"), ("on_bad_row", "skip"), ("strength_normalization", "z")):
        with pytest.raises(ValueError, match=f"`{name}` is '{value}'; choose one of"):
            config(tmp_path, **{name: value})
    for name, value in (("label_smoothing", 1.0), ("tie_factor", 1.0), ("ordinal_thresholds", [2.0, 1.0])):
        with pytest.raises(ValueError, match=f"`{name}` is .*; it must be"):
            config(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="`min_pixels` is 9; it must be <= max_pixels"):
        config(tmp_path, min_pixels=9, max_pixels=4)


def test_images_and_a_text_model(tmp_path):
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    with pytest.raises(ValueError, match="train set has images, but the model reads text only"):
        MultimodalRewardTrainer(
            text_model(tokenizer), args=config(tmp_path), train_dataset=make_dataset(2), processing_class=tokenizer
        )


def test_a_misspelt_column_is_named(tmp_path):
    data = make_dataset(2).rename_column("rejected", "rejcted")
    with pytest.raises(ValueError, match="has the columns .*rejcted.*; it needs `chosen` and `rejected`"):
        trainer_for("qwen3_vl", tmp_path, data)


def bad_rows() -> list[dict]:
    rows = make_rows(6, num_images=(1,), pair_id=[f"p{i}" for i in range(6)])
    rows[2]["images"] = [{"bytes": b"no image", "path": None}]
    rows[4]["images"] = [{"bytes": None, "path": "gone.png"}]
    rows[5]["chosen"] = rows[5]["rejected"]
    return rows


def test_bad_rows_stop_the_run_at_start(tmp_path):
    message = "3 of 6 rows of the train set cannot be used .*The first, p2: .*Mend them"
    with pytest.raises(ValueError, match=message):
        trainer_for("qwen3_vl", tmp_path, Dataset.from_list(bad_rows()))


def test_bad_rows_are_set_aside_if_wished(tmp_path, caplog):
    data = Dataset.from_list(bad_rows())
    trainer = trainer_for("qwen3_vl", tmp_path, data, {"on_bad_row": "quarantine"}, eval_dataset=data)
    assert trainer.train_dataset["pair_id"] == ["p0", "p1", "p3"]
    for name in ("train", "eval"):
        listed = [json.loads(line) for line in (tmp_path / f"_quarantine_{name}.jsonl").read_text().splitlines()]
        assert [(entry["pair_id"], entry["row"]) for entry in listed] == [("p2", 2), ("p4", 4), ("p5", 5)]
        assert [entry["reason"] for entry in listed] == ["image_corrupt", "image_missing", "equal_answers"]
        assert all(entry["message"] for entry in listed)
    assert "Left 3 of 6 rows out of the train set" in caplog.text
    trainer.train()
    with pytest.raises(ValueError, match="No row of the train set can be used"):
        trainer_for("qwen3_vl", tmp_path, data.select([2, 4]), {"on_bad_row": "quarantine"})


def test_bad_rows_of_a_stream(tmp_path, caplog):
    data = Dataset.from_list(bad_rows()).to_iterable_dataset()
    args = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    with pytest.raises(RowError, match="p2: "):
        trainer_for("qwen3_vl", tmp_path, data, args).train()
    trainer = trainer_for("qwen3_vl", tmp_path, data, {**args, "on_bad_row": "quarantine"})
    trainer.train()
    assert "Left out of the train set: p2, image_corrupt" in caplog.text


def test_too_long_pairs_are_left_out_and_counted(tmp_path, caplog):
    data = make_dataset(6, num_images=(0, 2))
    probe = trainer_for("qwen3_vl", tmp_path, data)
    lengths = [max(probe.data_collator.lengths(row)) for row in data]
    limit = sorted(lengths)[2]
    trainer = trainer_for("qwen3_vl", tmp_path, data, {"max_length": limit})
    assert len(trainer.train_dataset) == 3
    assert f"Left 3 of 6 pairs out of the train set: longer than {limit} tokens." in caplog.text
    with pytest.raises(ValueError, match="None is left; raise `max_length`"):
        trainer_for("qwen3_vl", tmp_path, data, {"max_length": 3})


def test_paths_are_read_under_the_image_root(tmp_path):
    rows = make_rows(2, num_images=(1,))
    for index, row in enumerate(rows):
        example_images(1, seed=index)[0].save(tmp_path / f"{index}.png")
        row["images"] = [f"{index}.png"]
    trainer = trainer_for("qwen3_vl", tmp_path, Dataset.from_list(rows), {"image_root": str(tmp_path)})
    trainer.train()
    rows[1]["images"] = ["../1.png"]
    with pytest.raises(ValueError, match=r"1 of 2 rows .*image_outside_root"):
        trainer_for("qwen3_vl", tmp_path, Dataset.from_list(rows), {"image_root": str(tmp_path)})


def test_the_decoder_of_datasets_never_sees_the_path(tmp_path):
    """`datasets` decodes whatever path a row holds; ours refuses what leaves the root."""
    example_images(1)[0].save(tmp_path / "secret.png")
    (tmp_path / "root").mkdir()
    row = {**make_rows(1, num_images=(1,))[0], "images": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}
    from datasets import Features, Image, List

    plain = Dataset.from_list([row])
    data = plain.cast(Features({**plain.features, "images": List(Image())}))
    assert data[0]["images"][0].size
    with pytest.raises(ValueError, match="image_outside_root"):
        trainer_for("qwen3_vl", tmp_path, data, {"image_root": str(tmp_path / "root")})
    assert Path(tmp_path / "secret.png").exists()


def test_a_native_model_instance_is_refused(tmp_path):
    from transformers import AutoModelForImageTextToText

    native = AutoModelForImageTextToText.from_pretrained(family_dir("qwen3_vl"))
    with pytest.raises(ValueError, match="load it with `trl_dt2it.load_reward_model`"):
        MultimodalRewardTrainer(native, args=config(tmp_path), train_dataset=make_dataset(2))
