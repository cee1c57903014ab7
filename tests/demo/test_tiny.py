"""The tiny vision-language model: a real checkpoint with a real processor, the same on every build."""

import filecmp
import os

import pytest
import torch
from PIL import Image as PILImage
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from trl_dt2it.demo.digits import WORDS, all_texts, make_digits
from trl_dt2it.demo.tiny import SPECIAL_TOKENS, build_tiny_tokenizer, build_tiny_vlm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build_tiny_vlm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


def encode(processor, row, side="chosen"):
    text = processor.apply_chat_template(row["prompt"] + row[side])
    return processor(text=text, images=row["images"], return_tensors="pt")


def test_checkpoint_is_native_and_about_a_million_weights(checkpoint, model, processor):
    assert type(model) is Qwen3VLForConditionalGeneration and type(processor) is Qwen3VLProcessor
    assert os.path.exists(os.path.join(checkpoint, "model.safetensors"))
    assert 800_000 < sum(weight.numel() for weight in model.parameters()) < 1_600_000
    assert len(model.model.visual.deepstack_merger_list) == 2
    rope = model.config.text_config.rope_parameters
    assert sum(rope["mrope_section"]) == model.config.text_config.head_dim // 2 == 16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_reload_gives_the_built_weights(tmp_path, checkpoint, model):
    state = torch.get_rng_state()
    again = build_tiny_vlm(tmp_path / "again", seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(os.listdir(checkpoint))
    assert sorted(os.listdir(again)) == names
    assert filecmp.cmpfiles(checkpoint, again, names, shallow=False) == (names, [], [])
    other = AutoModelForImageTextToText.from_pretrained(build_tiny_vlm(tmp_path / "other", seed=1))
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_every_text_makes_the_round_trip(processor):
    strange = "Größe 汉字 🙂 \t\n x=3.14; 'don't' \u200b <image> {braces} two"
    for text in [*all_texts(), strange]:
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
    assert processor.tokenizer.unk_token is None


@pytest.mark.parametrize(("numerals", "names"), [("words", WORDS), ("figures", tuple("0123456789"))])
def test_every_number_of_an_answer_is_one_token(processor, numerals, names):
    tokenizer = processor.tokenizer
    for row in make_digits("train", 100, num_digits=(1, 3), numerals=numerals, style_bias=0.5):
        for side in ("chosen", "rejected"):
            pieces = tokenizer.convert_ids_to_tokens(tokenizer(row[side][0]["content"][0]["text"])["input_ids"])
            assert sum(piece.lstrip("\u0120") in names for piece in pieces) == len(row["digits"])


def test_special_tokens(checkpoint, processor, model):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(SPECIAL_TOKENS)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("<|im_start|>user")["input_ids"], skip_special_tokens=True) == "user"
    config = model.config
    assert config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.text_config.vocab_size == len(tokenizer)


def test_chat_template(processor):
    row = make_digits("train", 1)[0]
    question, answer = row["prompt"][0]["content"][1]["text"], row["chosen"][0]["content"][0]["text"]
    prompt = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
    assert processor.apply_chat_template(row["prompt"] + row["chosen"]) == (
        f"{prompt}<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    assert processor.apply_chat_template(row["prompt"], add_generation_prompt=True) == prompt + (
        "<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template([{"role": "system", "content": "Be brief."}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
    )


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_image_tokens_follow_the_grid(processor, model, length):
    row = make_digits("train", 1, num_digits=(length,))[0]
    batch = encode(processor, row)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4 * length]]
    assert batch["pixel_values"].shape == (16 * length, 3 * 2 * 8 * 8)
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4 * length
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape == (1, batch["input_ids"].shape[1], len(processor.tokenizer)) and logits.isfinite().all()


def test_the_image_reaches_the_answer(processor, model):
    first, second = (dict(row) for row in make_digits("train", 2, seed=1))
    second |= {"prompt": first["prompt"], "chosen": first["chosen"]}
    with torch.no_grad():
        one, two = (model(**encode(processor, row)).logits[0, -1] for row in (first, second))
    assert (one - two).abs().max() > 1e-3


def test_batches_and_videos_pass_through_the_processor(processor, model):
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    frames = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    batch = processor(text=text, videos=[frames], return_tensors="pt", do_sample_frames=False)
    assert batch["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert (batch["input_ids"] == processor.video_token_id).sum() == 8
    images = [PILImage.new("RGB", (32, 32)), PILImage.new("RGB", (200, 120))]
    texts = [
        "<|vision_start|><|image_pad|><|vision_end|> a",
        "<|vision_start|><|image_pad|><|vision_end|> a longer one",
    ]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    tokens = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert tokens.tolist() == (batch["image_grid_thw"].prod(1) // 4).tolist()
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_sizes_can_be_chosen(tmp_path):
    path = build_tiny_vlm(tmp_path, hidden_size=64, num_layers=2, vision_hidden_size=32, vision_depth=2, patch_size=4)
    row = make_digits("train", 1)[0]
    batch = encode(AutoProcessor.from_pretrained(path), row)
    assert batch["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert AutoModelForImageTextToText.from_pretrained(path)(**batch).logits.isfinite().all()


def test_extra_texts_become_words():
    plain, taught = build_tiny_tokenizer(), build_tiny_tokenizer(extra_texts=["reformulation"] * 2)
    assert len(taught("reformulation")["input_ids"]) == 1 < len(plain("reformulation")["input_ids"])


def test_bad_sizes_are_named(tmp_path):
    with pytest.raises(ValueError, match="`vocab_size` must be at least 270"):
        build_tiny_tokenizer(100)
    with pytest.raises(ValueError, match="`hidden_size` must be a multiple of 32.*got 100 and 64"):
        build_tiny_vlm(tmp_path, hidden_size=100)
