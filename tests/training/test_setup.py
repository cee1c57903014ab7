"""Setup of what is trained: adapters that go on, their head, new tokens, templates before lengths."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoProcessor, AutoTokenizer
from trl import RewardConfig

from trl_dt2it import MultimodalRewardTrainer, RewardScorer, load_reward_model
from trl_dt2it.demo.tiny import CHAT_TEMPLATE, build_tiny_tokenizer

from ..families import family_dir
from ..rows import make_dataset, make_rows, text_rows
from ..trainers import config, text_model, trainer_for, weights
from .test_trainer_saving import rewards_of


LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A trained adapter of Qwen3-VL, with its processor."""
    folder = tmp_path_factory.mktemp("adapter")
    trainer = trainer_for("qwen3_vl", folder, make_dataset(4), {"learning_rate": 1e-2}, peft_config=LoraConfig(**LORA))
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def longer_template(tmp_path_factory) -> Path:
    """A template that begins each conversation with 40 more words."""
    path = tmp_path_factory.mktemp("template") / "long.jinja"
    path.write_text("{{- 'judge ' * 40 }}" + CHAT_TEMPLATE)
    return path


def template_with_tokens(folder: Path, tokenizer, count: int = 8) -> Path:
    """A tokenizer with `count` more tokens, of which its template writes the first."""
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|new{index}|>" for index in range(count)]})
    tokenizer.chat_template = "{{- '<|new0|>' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_goes_on_where_it_was(adapter, tmp_path):
    data = make_dataset(4)
    trainer = trainer_for("qwen3_vl", tmp_path / "other", data, peft_config=LoraConfig(**LORA))
    expected_names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    model = MultimodalRewardTrainer(
        str(adapter), args=config(tmp_path, learning_rate=1e-2, reward_statistics_pairs=0), train_dataset=data
    )
    before = weights(model)
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert trained == expected_names and any("score" in name for name in trained)
    saved = rewards_of(load_reward_model(adapter), model.processing_class, data)
    torch.testing.assert_close(rewards_of(model.model, model.processing_class, data), saved, rtol=1e-5, atol=1e-5)
    model.train()
    after = weights(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    model.save_model()
    again = rewards_of(load_reward_model(tmp_path, allow_new_head=False), model.processing_class, data)
    torch.testing.assert_close(again, rewards_of(model.model, model.processing_class, data), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(again, saved, atol=1e-3)


def test_an_adapter_that_lies_alone_has_the_processor_of_its_base_model(adapter, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tmp_path)
    row = make_rows(1, num_images=(1,))[0]
    asked = row["prompt"], [row["chosen"]], row["images"]
    expected = RewardScorer.from_pretrained(adapter).score(*asked)
    assert RewardScorer.from_pretrained(tmp_path).score(*asked) == pytest.approx(expected, abs=1e-5)


def test_adapters_that_cannot_be_trained_are_refused(adapter, tmp_path):
    data = make_dataset(2)
    with pytest.raises(ValueError, match="is an adapter, .*; leave `peft_config` out, or merge the adapter"):
        MultimodalRewardTrainer(
            str(adapter), args=config(tmp_path), train_dataset=data, peft_config=LoraConfig(**LORA)
        )
    frozen = load_reward_model(adapter)
    with pytest.raises(ValueError, match="No parameter of the Peft.* is trained; load .* with `is_trainable=True`"):
        MultimodalRewardTrainer(frozen, args=config(tmp_path), train_dataset=data)
    as_saved = PeftConfig.from_pretrained(adapter)  # which PEFT saves as one to use, not to train
    assert as_saved.inference_mode
    trainer = trainer_for("qwen3_vl", tmp_path, data, peft_config=as_saved)
    assert sum(p.requires_grad for p in trainer.model.parameters()) > 1
    whole = load_reward_model(family_dir("qwen3_vl")).requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the Qwen3VLForSequenceClassification is trained"):
        MultimodalRewardTrainer(whole, args=config(tmp_path), train_dataset=data)
    onto_head = LoraConfig(r=2, target_modules=["q_proj", "score"])
    with pytest.raises(ValueError, match="stand on its `score` head, .* in place of `target_modules`"):
        MultimodalRewardTrainer(
            get_peft_model(load_reward_model(family_dir("qwen3_vl")), onto_head),
            args=config(tmp_path),
            train_dataset=data,
        )


@pytest.mark.parametrize(
    "adapters",
    [
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "ia3"],
)
def test_a_peft_model_without_a_head_gets_one(adapters, tmp_path):
    data = make_dataset(4)
    model = get_peft_model(load_reward_model(family_dir("qwen3_vl"), dtype="float32"), adapters)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "score" in name)
    trainer = MultimodalRewardTrainer(model, args=config(tmp_path, learning_rate=1e-2), train_dataset=data)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert [name for name in moved if "score" in name] == ["base_model.model.score.modules_to_save.default.weight"]
    trainer.save_model()
    reloaded = load_reward_model(tmp_path, allow_new_head=False)
    expected = rewards_of(trainer.model, trainer.processing_class, data)
    torch.testing.assert_close(rewards_of(reloaded, trainer.processing_class, data), expected, rtol=1e-5, atol=1e-5)


# The vision towers of the first four do not name the layer that their patches enter by.
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "qwen2_5_vl", "llava"])
def test_reentrant_checkpoints_train_every_adapter(family, tmp_path):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    gradients = []
    for args in ({"gradient_checkpointing": False}, checkpointing):
        args = {**args, "max_steps": 1, "max_grad_norm": 1e9, "learning_rate": 0.0, "reward_statistics_pairs": 0}
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        trainer = trainer_for(family, tmp_path, make_dataset(2, num_images=(1,)), args, peft_config=lora)
        gradients.append({})
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                keep = functools.partial(lambda p, into, name: into.update({name: p.grad.clone()}), name=name)
                parameter.register_post_accumulate_grad_hook(functools.partial(keep, into=gradients[-1]))
        trainer.train()
    plain, reentrant = gradients
    assert any("visual" in name or "vision" in name for name in plain)
    assert plain.keys() == reentrant.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(reentrant[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_reentrant_checkpoints_above_frozen_embeddings(tmp_path):
    model = load_reward_model(family_dir("qwen3_vl"), dtype="float32")
    model.get_input_embeddings().requires_grad_(False)
    args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = MultimodalRewardTrainer(
        model,
        args=config(tmp_path, freeze_vision_tower=True, freeze_projector=True, **args),
        train_dataset=make_dataset(2, num_images=(0,)),
    )
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    still = {name for name, p in trainer.model.named_parameters() if torch.equal(before[name], after[name])}
    assert still == {name for name, p in trainer.model.named_parameters() if not p.requires_grad}


def test_lengths_are_counted_with_the_template_that_is_trained_with(longer_template, tmp_path):
    data = make_dataset(4, num_images=(1,))
    plain = trainer_for("qwen3_vl", tmp_path, data, {"chat_template_path": None})
    longest = [max(plain._collator.lengths(row)) for row in plain.train_dataset]
    trainer = trainer_for("qwen3_vl", tmp_path, data, {"chat_template_path": str(longer_template)})
    extra = max(trainer._collator.lengths(trainer.train_dataset[0])) - longest[0]
    assert extra >= 40 and trainer.args.chat_template_path == str(longer_template)
    for processor in (trainer.processing_class, trainer.processing_class.tokenizer):
        assert processor.chat_template == longer_template.read_text()
    limit = sorted(longest)[1] + extra
    trainer = trainer_for(
        "qwen3_vl", tmp_path, data, {"chat_template_path": str(longer_template), "max_length": limit}
    )
    assert len(trainer.train_dataset) == sum(length + extra <= limit for length in longest)
    packed = trainer_for(
        "qwen3_vl", tmp_path, data, {"chat_template_path": str(longer_template), "max_tokens_per_batch": 2 * limit}
    )
    for batch in packed.get_train_dataloader():
        assert batch["input_ids"].numel() <= 2 * limit or len(batch["pairs"]["weight"]) == 1


def test_a_checkpoint_without_a_template_takes_the_given_one(longer_template, tmp_path):
    bare = shutil.copytree(family_dir("qwen3_vl"), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    data = make_dataset(2, num_images=(1,))
    arguments = {"chat_template_path": str(longer_template), "max_length": 2000}
    trainer = MultimodalRewardTrainer(str(bare), args=config(tmp_path, **arguments), train_dataset=data)
    assert len(trainer.train_dataset) == 2
    args = config(tmp_path, chat_template_path=str(tmp_path / "nothing"))
    with pytest.raises(Exception, match="nothing"):
        MultimodalRewardTrainer(str(bare), args=args, train_dataset=data)
    assert args.chat_template_path == str(tmp_path / "nothing")


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
def test_an_adapter_whose_template_adds_tokens_loads_again(family, tmp_path):
    other = template_with_tokens(tmp_path / "other", AutoTokenizer.from_pretrained(family_dir(family)))
    data = make_dataset(3)
    args = {"chat_template_path": str(other), "learning_rate": 1e-2}
    trainer = trainer_for(family, tmp_path / "run", data, args, peft_config=LoraConfig(**LORA))
    before = weights(trainer)
    trainer.train()
    trainer.save_model()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("trainable_tokens_delta" in name for name in moved)
    assert "lm_head" not in json.loads((tmp_path / "run" / "adapter_config.json").read_text())["modules_to_save"]
    expected = rewards_of(trainer.model, trainer.processing_class, data)

    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert processor.tokenizer.convert_tokens_to_ids("<|new7|>") == len(processor.tokenizer) - 1
    assert processor.apply_chat_template([{"role": "user", "content": "a"}]).startswith("<|new0|>")
    reloaded = load_reward_model(tmp_path / "run", allow_new_head=False)
    torch.testing.assert_close(rewards_of(reloaded, processor, data), expected, rtol=1e-5, atol=1e-5)
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load_reward_model(tmp_path / "merged", allow_new_head=False)
    torch.testing.assert_close(rewards_of(again, processor, data), expected, rtol=1e-4, atol=1e-4)
    if family != "qwen3_vl":
        return
    row = make_rows(1, num_images=(1,))[0]
    scorer = RewardScorer.from_pretrained(tmp_path / "run")
    asked = row["prompt"], [row["chosen"], row["rejected"]], row["images"]
    direct = RewardScorer(trainer.model.eval(), trainer.processing_class)
    assert scorer.score(*asked) == pytest.approx(direct.score(*asked), abs=1e-4)
    # Training goes on, with the template of the adapter or with the same one given again.
    for again_args in ({}, {"chat_template_path": str(other)}):
        onward = MultimodalRewardTrainer(
            str(tmp_path / "run"), args=config(tmp_path / "onward", **again_args), train_dataset=data
        )
        torch.testing.assert_close(
            rewards_of(onward.model, onward.processing_class, data), expected, rtol=1e-5, atol=1e-5
        )
        onward.train()


def test_a_text_adapter_whose_template_adds_tokens_loads_again(tmp_path):
    tokenizer = build_tiny_tokenizer()
    text_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    other = template_with_tokens(tmp_path / "other", AutoTokenizer.from_pretrained(tmp_path / "base"))
    rows = text_rows(4)
    trainer = MultimodalRewardTrainer(
        str(tmp_path / "base"),
        args=config(tmp_path / "run", chat_template_path=str(other), learning_rate=1e-2),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    trainer.save_model()
    data = Dataset.from_list(rows)
    expected = rewards_of(trainer.model, trainer.processing_class, data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    reloaded = load_reward_model(tmp_path / "run", allow_new_head=False)
    torch.testing.assert_close(rewards_of(reloaded, tokenizer, data), expected, rtol=1e-5, atol=1e-5)


def test_new_tokens_that_no_adapter_trains_are_refused(adapter, tmp_path):
    other = template_with_tokens(tmp_path / "other", AutoTokenizer.from_pretrained(family_dir("qwen3_vl")))
    data, args = make_dataset(2), config(tmp_path, chat_template_path=str(other))
    with pytest.raises(ValueError, match="adds 8 tokens, such as .*, which the adapters of the model do not"):
        MultimodalRewardTrainer(str(adapter), args=args, train_dataset=data)
    with pytest.raises(ValueError, match="adds 15 .* of `gemma4` cannot grow; take a template whose tokens it knows"):
        MultimodalRewardTrainer(str(family_dir("gemma4")), args=args, train_dataset=data)
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match="adds 8 tokens, whose embeddings IA3Config does not train"):
        MultimodalRewardTrainer(str(family_dir("qwen3_vl")), args=args, train_dataset=data, peft_config=ia3)
    onto_embeddings = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match='move "embed_tokens" from `target_modules` to `modules_to_save`'):
        MultimodalRewardTrainer(
            str(family_dir("qwen3_vl")), args=args, train_dataset=data, peft_config=onto_embeddings
        )
    everything = IA3Config(**{**ia3.to_dict(), "modules_to_save": ["embed_tokens"]})
    trainer = MultimodalRewardTrainer(
        str(family_dir("qwen3_vl")), args=args, train_dataset=data, peft_config=everything
    )
    trainer.train()
    trainer.save_model()
    expected = rewards_of(trainer.model, trainer.processing_class, data)
    reloaded = load_reward_model(tmp_path, allow_new_head=False)
    assert isinstance(reloaded, PeftModel)
    torch.testing.assert_close(rewards_of(reloaded, trainer.processing_class, data), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_with_room_for_new_tokens_stay_as_they_are(tmp_path):
    """As in Qwen's checkpoints, which hold rows in reserve; a resized base would not fit the adapter."""
    model = load_reward_model(family_dir("qwen3_vl"), dtype="float32")
    size = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size + 20)
    model.save_pretrained(tmp_path / "base")
    AutoProcessor.from_pretrained(family_dir("qwen3_vl")).save_pretrained(tmp_path / "base")
    other = template_with_tokens(tmp_path / "other", AutoTokenizer.from_pretrained(family_dir("qwen3_vl")))
    trainer = MultimodalRewardTrainer(
        str(tmp_path / "base"),
        args=config(tmp_path / "run", chat_template_path=str(other)),
        train_dataset=make_dataset(2),
    )
    assert trainer.model.get_input_embeddings().weight.shape[0] == size + 20


def test_a_whole_model_whose_template_adds_tokens_loads_again(tmp_path):
    other = template_with_tokens(tmp_path / "other", AutoTokenizer.from_pretrained(family_dir("qwen3_vl")))
    data = make_dataset(3)
    trainer = trainer_for("qwen3_vl", tmp_path / "run", data, {"chat_template_path": str(other)})
    trainer.train()
    trainer.save_model()
    expected = rewards_of(trainer.model, trainer.processing_class, data)
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    reloaded = load_reward_model(tmp_path / "run", allow_new_head=False)
    assert reloaded.config.text_config.vocab_size == len(processor.tokenizer)
    torch.testing.assert_close(rewards_of(reloaded, processor, data), expected, rtol=1e-5, atol=1e-5)


def test_sets_without_rows_are_named(tmp_path):
    data, base = make_dataset(2, num_images=(0,)), str(family_dir("qwen3_vl"))
    empty = data.select([])

    def start(train=data, evaluation=None, **args):
        return MultimodalRewardTrainer(
            base, args=config(tmp_path, **args), train_dataset=train, eval_dataset=evaluation
        )

    for problem, error, message in (
        ({"train": empty}, ValueError, "The train set has no rows; check"),
        ({"train": Dataset.from_dict({})}, ValueError, "The train set has no rows"),
        ({"evaluation": empty}, ValueError, "The eval set has no rows"),
        ({"evaluation": {"a": data, "b": empty}}, ValueError, "The eval set `b` has no rows"),
        ({"evaluation": {}}, ValueError, "`eval_dataset` is a dict without any set; pass `None`"),
        ({"evaluation": {"a": None}}, TypeError, "The eval set `a` is a NoneType; pass a `Dataset`"),
        ({"evaluation": list(data)}, TypeError, "The eval set is a list; pass a `Dataset`"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 3}, ValueError, "drops all 2 pairs"),
        ({"accelerator_config": {"dispatch_batches": True}}, ValueError, "`dispatch_batches` sends .*; leave it out"),
    ):
        with pytest.raises(error, match=message):
            start(**problem)
    with pytest.raises(TypeError, match="is a RewardConfig; pass a `MultimodalRewardConfig`, which has its fields"):
        MultimodalRewardTrainer(base, args=RewardConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=data)
    trainer = start()
    with pytest.raises(ValueError, match="The eval set has no rows"):
        trainer.evaluate(empty)
    streamed = IterableDataset.from_generator(lambda: iter(()), features=data.features)
    with pytest.raises(ValueError, match="The streamed train set gave no batch, so nothing was trained; check where"):
        start(streamed, max_steps=1, reward_statistics_pairs=0).train()
    with pytest.raises(ValueError, match="The train set has no rows"):
        start(IterableDataset.from_generator(lambda: iter(())), max_steps=1)


def test_messages_need_a_chat_template(tmp_path):
    processor = AutoProcessor.from_pretrained(family_dir("qwen3_vl"))
    processor.chat_template = None
    arguments = {"args": config(tmp_path), "processing_class": processor}
    with pytest.raises(ValueError, match="has no chat template to render them with; set `chat_template_path`"):
        MultimodalRewardTrainer(str(family_dir("qwen3_vl")), train_dataset=make_dataset(2), **arguments)
    plain = Dataset.from_list(text_rows(2, plain=True))
    MultimodalRewardTrainer(str(family_dir("qwen3_vl")), train_dataset=plain, **arguments).train()
