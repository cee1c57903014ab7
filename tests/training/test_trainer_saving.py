"""Saves of the trainer: full models, adapters and checkpoints give the same rewards, and go on as they were."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoProcessor,
    BitsAndBytesConfig,
)

from trl_dt2it import MultimodalRewardTrainer, load_reward_model
from trl_dt2it.demo.tiny import build_tiny_vlm
from trl_dt2it.models.freezing import part_of

from ..rows import make_dataset
from ..trainers import MAIN_FAMILIES, config, losses, trainer_for, weights


@torch.no_grad()
def rewards_of(model, processor, data) -> torch.Tensor:
    from trl_dt2it import MultimodalPreferenceCollator
    from trl_dt2it.data.columns import leave_images_encoded

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
    """bitsandbytes on the CPU, with double quantization, see
    [`test_bitsandbytes_spoils_a_packed_layer_that_is_saved`]. Adapters and head stay in fp32 and go on as they are."""
    base = build_tiny_vlm(tmp_path / "base", hidden_size=128, vision_hidden_size=128)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    data = make_dataset(4)
    trainer = MultimodalRewardTrainer(
        base,
        args=config(tmp_path, bf16=True, learning_rate=1e-2, max_steps=3, reward_statistics_pairs=0),
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

    saved = load_file(tmp_path / "adapter_model.safetensors")
    default = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for bf16, dtype in ((True, "bfloat16"), (False, "float32")):
        onward = MultimodalRewardTrainer(
            str(tmp_path),
            args=config(
                tmp_path / "onward",
                bf16=bf16,
                max_steps=1,
                reward_statistics_pairs=0,
                model_init_kwargs={"dtype": dtype},
            ),
            train_dataset=data,
            quantization_config=default,
        )
        assert {p.dtype for p in onward.model.parameters() if p.requires_grad} == {torch.float32}
        for name, value in get_peft_model_state_dict(onward.model).items():
            assert torch.equal(value, saved[name]), name
        layers = [module for module in onward.model.modules() if isinstance(module, Linear4bit)]
        assert {layer.compute_dtype for layer in layers} == {torch.bfloat16 if bf16 else torch.float32}
        assert default.bnb_4bit_compute_dtype == torch.float32  # the user's object is left alone
        onward.train()
        after = get_peft_model_state_dict(onward.model)
        assert not any(torch.equal(after[name], value) for name, value in saved.items() if "lora_B" in name)


def test_the_head_of_a_quantized_reward_model_is_not_rounded(tmp_path):
    base = build_tiny_vlm(tmp_path / "base", num_layers=1, vision_depth=1)
    model = load_reward_model(base, dtype="float32")
    model.save_pretrained(tmp_path / "rm")
    AutoProcessor.from_pretrained(base).save_pretrained(tmp_path / "rm")
    trainer = MultimodalRewardTrainer(
        str(tmp_path / "rm"),
        args=config(tmp_path / "run", bf16=True),
        train_dataset=make_dataset(2),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    )
    head = trainer.model.get_base_model().score.modules_to_save["default"]
    assert torch.equal(head.weight, model.score.weight)
    assert not torch.equal(head.weight, model.score.weight.bfloat16().float())


@pytest.mark.parametrize("is_double", [True, False])
def test_bitsandbytes_spoils_a_packed_layer_that_is_saved(is_double):
    """A forward pass without gradients packs 4-bit weights on CPUs with AVX-512-bf16, and saving unpacks them, but
    leaves the scales of blocks transposed unless these are quantized, too. An evaluation and a save then spoil the
    model in memory. Once this fails without double quantization, [`set_up_4bit_weights`] may let it pass."""
    torch.manual_seed(0)
    weight = torch.randn(128, 256) * torch.logspace(-1, 1, 128)[:, None]  # scales that differ from block to block
    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=is_double, module=layer
    )
    layer = layer.to("cpu").eval()
    inputs = torch.randn(4, 256, dtype=torch.bfloat16, requires_grad=True)
    expected = layer(inputs).detach()
    with torch.no_grad():
        layer(inputs.detach())
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX-512-bf16, so that nothing is packed")
    layer.state_dict()
    error = (layer(inputs).detach() - expected).abs().max() / expected.abs().max()
    assert error < 0.02 if is_double else error > 0.1


def test_four_bits_on_a_cpu_are_refused_without_double_quantization(tmp_path):
    base = build_tiny_vlm(tmp_path / "base", num_layers=1, vision_depth=1)
    data, lora = make_dataset(2), LoraConfig(r=2, target_modules="all-linear")
    single = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    loaded = load_reward_model(base, quantization_config=single)  # only to score it will do
    message = "On a CPU, 4-bit weights need double quantization.*; set `use_bnb_nested_quant`, or"
    for model, init_kwargs, quantization in (
        (base, {}, single),
        (base, {"quantization_config": single}, None),
        (loaded, {}, None),
    ):
        with pytest.raises(ValueError, match=message):
            MultimodalRewardTrainer(
                model,
                args=config(tmp_path, model_init_kwargs=init_kwargs),
                train_dataset=data,
                peft_config=lora,
                quantization_config=quantization,
            )


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
    """Without `bf16` the loaded half precision trains in fp32, with a warning, and is what is saved."""
    trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(2), {"model_init_kwargs": {"dtype": "bfloat16"}})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.save_model()
    assert load_reward_model(tmp_path).dtype == torch.bfloat16
    assert trainer.args.model_init_kwargs == {"dtype": "bfloat16"}


def test_only_checkpoints_hold_the_fp32_weights_of_a_model_in_half_precision(tmp_path):
    """`push_to_hub` and the recipe save by an internal call too, as transformers does to save without a push."""
    args = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True, "max_steps": 1}
    trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(2), {**args, "save_strategy": "steps", "save_steps": 1})
    trainer.train()
    trainer.save_model(_internal_call=True)
    for folder, dtype in ((tmp_path, torch.bfloat16), (tmp_path / "checkpoint-1", torch.float32)):
        saved = load_file(folder / "model.safetensors")
        assert {value.dtype for name, value in saved.items() if name != "score.weight"} == {dtype}
        assert saved["score.weight"].dtype == torch.float32


def test_an_evaluation_in_bf16_leaves_the_training_in_fp32(tmp_path):
    data = make_dataset(2)
    args = {"bf16": True, "bf16_full_eval": True, "max_steps": 1}
    trainer = trainer_for("qwen3_vl", tmp_path, data, args, eval_dataset=data)
    trainer.evaluate()
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
