"""The tiny checkpoints that other tests build on: they load whole, render, process images, and depend on them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..families import FAMILIES, build_family, build_tokenizer, example_images, family_dir
from ..families_chat import CHATS


every_family = pytest.mark.parametrize("name", FAMILIES)


def conversation(n_images: int, answer: str) -> list[dict]:
    question = {"type": "text", "text": "Describe the picture."}
    return [
        {"role": "user", "content": [{"type": "image"}] * n_images + [question]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def process(processor, answers: list[str], images: list[list[Image.Image]]):
    """A padded batch of one conversation per answer."""
    pairs = zip(answers, images, strict=True)
    texts = [processor.apply_chat_template(conversation(len(group), answer)) for answer, group in pairs]
    return processor(
        text=texts, images=images, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False
    )


def last_hidden_states(model, inputs) -> torch.Tensor:
    """Hidden states (R, H) of the last real token of each row."""
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
    return hidden[torch.arange(len(hidden)), inputs["attention_mask"].sum(1) - 1]


@every_family
def test_checkpoint_loads_whole(name):
    directory = family_dir(name)
    config = AutoConfig.from_pretrained(directory)
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert config.model_type == name
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) < 250_000


@every_family
def test_processor_survives_saving(name):
    chat, processor = CHATS[name], AutoProcessor.from_pretrained(family_dir(name))
    tokenizer, built = processor.tokenizer, build_tokenizer(chat)
    text = f"{chat.image}A flower, naïve & 2 leaves.\n{chat.eos}"
    assert tokenizer(text).input_ids == built(text).input_ids
    assert tokenizer(text, add_special_tokens=False).input_ids[0] == tokenizer.convert_tokens_to_ids(chat.image)
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert type(processor) is type(FAMILIES[name](built)[1])
    text_config = AutoConfig.from_pretrained(family_dir(name)).get_text_config()
    assert text_config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) <= text_config.vocab_size


@every_family
@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_chat_template(name, n_images):
    chat, processor = CHATS[name], AutoProcessor.from_pretrained(family_dir(name))
    text = processor.apply_chat_template(conversation(n_images, "A flower."))
    assert text.count(chat.placeholder or chat.image) == n_images
    assert text.index("Describe the picture.") < text.index("A flower.")
    assert text.rstrip().endswith("A flower." + (chat.end_of_turn or chat.eos))
    assert text == processor.tokenizer.apply_chat_template(conversation(n_images, "A flower."), tokenize=False)


@every_family
def test_forward_depends_on_image_and_text(name):
    processor = AutoProcessor.from_pretrained(family_dir(name))
    model = AutoModelForImageTextToText.from_pretrained(family_dir(name))
    first, second, third = example_images(3)
    answers = ["A flower.", "A temple under a blue sky."]

    inputs = process(processor, answers, [[first], [second, third]])
    image_tokens = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert image_tokens[0] >= 1 and image_tokens[1] >= 2
    hidden = last_hidden_states(model, inputs)
    assert hidden.isfinite().all()

    other_image = first.transpose(Image.Transpose.ROTATE_180)  # of the same size, so that the tokens are the same
    changed = process(processor, answers, [[other_image], [second, third]])
    assert changed["input_ids"].equal(inputs["input_ids"])
    difference = (last_hidden_states(model, changed) - hidden).abs().amax(1)
    assert difference[0] > 1e-3 and difference[1] < 1e-5

    changed = process(processor, ["A bridge.", answers[1]], [[first], [second, third]])
    difference = (last_hidden_states(model, changed) - hidden).abs().amax(1)
    assert difference[0] > 1e-3 and difference[1] < 1e-5


@every_family
def test_forward_without_images(name):
    processor = AutoProcessor.from_pretrained(family_dir(name))
    model = AutoModelForImageTextToText.from_pretrained(family_dir(name))
    text = processor.apply_chat_template(conversation(0, "A flower."))
    inputs = processor(text=[text], return_tensors="pt", add_special_tokens=False)
    assert last_hidden_states(model, inputs).isfinite().all()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_early_qwen_checkpoints_have_their_legacy_names(name):
    with safe_open(family_dir(name) / "model.safetensors", framework="pt") as weights:
        keys = set(weights.keys())
    assert "model.embed_tokens.weight" in keys and "visual.patch_embed.proj.weight" in keys


def test_build_family_is_seeded_and_leaves_the_global_generator(tmp_path):
    before = torch.get_rng_state()
    states = []
    for directory, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = AutoModelForImageTextToText.from_pretrained(build_family("llava", tmp_path / directory, seed=seed))
        states.append(model.model.language_model.embed_tokens.weight)
    assert torch.get_rng_state().equal(before)
    assert states[0].equal(states[1]) and not states[0].equal(states[2])


def test_example_images():
    images = example_images(6, seed=3)
    assert len({image.size for image in images}) == 6
    assert all(28 <= side <= 60 for image in images for side in image.size)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in example_images(6, seed=3)]
    assert images[0].size != example_images(1, seed=4)[0].size
