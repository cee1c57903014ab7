"""The files that stock vLLM reads of a directory under `--runner pooling`; from the sources of release 0.32.

`benchmarks/vllm_parity.py` starts the real server; this file notices at once when the directory changes.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from trl_dt2it import load_reward_model
from trl_dt2it.models.rendering import render_conversation

from ..families import FAMILIES, family_dir
from ..pairs import processor_of
from ..rows import make_dataset
from ..trainers import trainer_for


MAX_PIXELS = 40 * 40


def check_model(directory: Path, family: str) -> None:
    """The configuration and the weights."""
    native = json.loads((family_dir(family) / "config.json").read_text())["architectures"][0]
    written = json.loads((directory / "config.json").read_text())
    # vLLM looks the name up with `ForConditionalGeneration` at its end, and makes a classifier of what it finds.
    assert written["architectures"] == [native.replace("ForConditionalGeneration", "ForSequenceClassification")]
    config = AutoConfig.from_pretrained(directory)
    # The outer one is read; releases before 0.32 read the number of labels from that of the text.
    for part in (config, config.get_text_config()):
        assert part.num_labels == 1
        # Without it, vLLM gives a sigmoid of the reward.
        assert part.problem_type == "regression"
    # `num_labels` is no key of the file: it is the length of this one, which is two where it is missing.
    for part in (written, written.get("text_config", written)):
        assert list(part["id2label"]) == ["0"]
        # Either makes vLLM derive a head from the language head, and pass over `score`.
        assert not {"classifier_from_token", "method"} & set(part)

    # vLLM takes these files and no pickle, once there is one of them.
    (file,) = directory.glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        shapes = {key: list(weights.get_slice(key).get_shape()) for key in weights.keys()}
    # One linear layer; a bias would be taken too.
    assert shapes.pop("score.weight") == [1, config.get_text_config().hidden_size]
    # The others have the names of the native model of today, which vLLM translates; one it does not know is an error.
    # A language head would be one.
    expected = load_reward_model(family_dir(family)).model.state_dict()
    assert shapes == {f"model.{key}": list(value.shape) for key, value in expected.items()}


def check_processor(directory: Path, family: str) -> None:
    """The outcome of a request."""
    # `AutoProcessor` of the directory is what vLLM calls on images and texts.
    processor = AutoProcessor.from_pretrained(directory)
    trained = processor_of(family)
    assert type(processor) is type(trained)
    # vLLM renders with the processor's template, and with the tokenizer's if it finds none.
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == trained.chat_template
    assert processor.chat_template == template
    assert AutoTokenizer.from_pretrained(directory).chat_template == template
    # It gives every content as blocks, as the trainer does, so that both have the same text.
    row = make_dataset(1, num_images=(2,))[0]
    messages = [*row["prompt"], *row["chosen"]]
    blocks = [{key: value for key, value in block.items() if value} for block in messages[0]["content"]]
    sent = [{"role": "user", "content": blocks}, messages[1]]
    text = processor.apply_chat_template(sent, tokenize=False, add_generation_prompt=False)
    assert text == render_conversation(messages, row["images"], trained)
    # The reward is read at the last token, which has to be the answer's; the default of the request is the right one.
    assert text != processor.apply_chat_template(sent, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_as_they_are_saved(family, tmp_path):
    load_reward_model(family_dir(family)).save_pretrained(tmp_path)
    check_model(tmp_path, family)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_the_directory_of_the_trainer(family, tmp_path):
    limits = {"max_pixels": MAX_PIXELS} if family == "qwen3_vl" else {}
    trainer = trainer_for(family, tmp_path / "run", make_dataset(2), args={"max_steps": 1, **limits})
    trainer.train()
    trainer.save_model(tmp_path / "model")
    check_model(tmp_path / "model", family)
    check_processor(tmp_path / "model", family)
    if limits:  # the images of a request are scaled to the limit of training
        size = AutoProcessor.from_pretrained(tmp_path / "model").image_processor.size
        assert size["longest_edge"] == MAX_PIXELS


def test_an_adapter_that_is_merged(tmp_path):
    """As `docs/serving.md` merges it."""
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"], init_lora_weights=False)
    trainer = trainer_for("qwen3_vl", tmp_path / "run", make_dataset(2), peft_config=lora)
    trainer.save_model(tmp_path / "adapter")
    merged = tmp_path / "merged"
    load_reward_model(tmp_path / "adapter", allow_new_head=False).merge_and_unload().save_pretrained(merged)
    AutoProcessor.from_pretrained(tmp_path / "adapter").save_pretrained(merged)
    check_model(merged, "qwen3_vl")
    check_processor(merged, "qwen3_vl")
    head = trainer.model.get_base_model().score.modules_to_save["default"].weight
    with safe_open(merged / "model.safetensors", "pt") as weights:
        assert torch.equal(weights.get_tensor("score.weight"), head.detach())
