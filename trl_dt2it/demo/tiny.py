"""A vision-language model of about a million weights with a real processor, and its trained reader."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from ..data.t2i import reformulate_t2i
from .digits import TILE, all_texts, make_digits, make_digits_t2i, two_image_texts


PAIRS = 3000  # of each kind, which the reader learns from

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)

_COLUMNS = ["prompt", "chosen", "rejected", "images", "pair_id", "source"]

# Words stay with their leading space and figures stay single, as in Qwen's own tokenizer.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for block in message['content'] %}
            {%- if block['type'] == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif block['type'] == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif block['type'] == 'text' %}
                {{- block['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_tiny_tokenizer(vocab_size: int = 1024, extra_texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen's special tokens on the texts of the digits set."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` must be at least {smallest} to hold every byte, got {vocab_size}.")
    backend = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n"]
    backend.train_from_iterator([*all_texts(), *roles, *extra_texts], trainer)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_vlm(
    output_dir: str | os.PathLike,
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 3,
    vision_hidden_size: int = 64,
    vision_depth: int = 3,
    patch_size: int = 8,
    vocab_size: int = 1024,
    extra_texts: Sequence[str] = (),
) -> str:
    """Build a tiny Qwen3-VL with random weights and its processor, and save both."""
    if hidden_size % 32 or vision_hidden_size % 16:
        given = f"got {hidden_size} and {vision_hidden_size}"
        raise ValueError(f"`hidden_size` must be a multiple of 32, and `vision_hidden_size` one of 16; {given}.")
    tokenizer = build_tiny_tokenizer(vocab_size, extra_texts)
    token_id = dict(tokenizer.get_added_vocab())
    # The three sections (time, height, width) share out the 16 rotary frequencies of a head.
    rotary = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // 32,
            "num_key_value_heads": max(1, hidden_size // 64),
            "head_dim": 32,
            "max_position_embeddings": tokenizer.model_max_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rotary},
            # Qwen's 0.02 is meant for wide layers; in narrow layers the signal would start out too weak.
            "initializer_range": hidden_size**-0.5 / 2,
            "pad_token_id": token_id["<|endoftext|>"],
            "eos_token_id": token_id["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_heads": 4,
            "out_hidden_size": hidden_size,
            "patch_size": patch_size,
            "deepstack_visual_indexes": list(range(min(vision_depth - 1, num_layers))),
            "num_position_embeddings": (TILE // patch_size) ** 2,
            "initializer_range": hidden_size**-0.5 / 2,
        },
        image_token_id=token_id["<|image_pad|>"],
        video_token_id=token_id["<|video_pad|>"],
        vision_start_token_id=token_id["<|vision_start|>"],
        vision_end_token_id=token_id["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.save_pretrained(output_dir)
    # Up to 1,024 image tokens: no strip is ever shrunk, and a photograph still fits.
    pixels = {"shortest_edge": (2 * patch_size) ** 2, "longest_edge": 1024 * (2 * patch_size) ** 2}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch_size, size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=patch_size, size=pixels),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(output_dir)
    return str(output_dir)


def train_tiny_reader(output_dir: str | Path, *, seed: int = 42, seeing_epochs: int = 4, epochs: int = 8) -> str:
    """Train the tiny model to read a digit and to compare two images, and save it without the reward head."""
    read_outs = make_digits("train", PAIRS, seed=seed).select_columns(_COLUMNS)
    images = reformulate_t2i(make_digits_t2i("train", PAIRS, seed=seed), seed=seed).select_columns(_COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        base = build_tiny_vlm(f"{folder}/base", seed=seed, extra_texts=two_image_texts())
        seeing = _train(base, read_outs, f"{folder}/seeing", seed, seeing_epochs)
        trained = _train(seeing, concatenate_datasets([images, read_outs]), f"{folder}/comparing", seed, epochs)
        reader = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        reader.model.load_state_dict(_backbone(trained))
        reader.bfloat16().save_pretrained(output_dir)
        AutoProcessor.from_pretrained(base).save_pretrained(output_dir)
    return str(output_dir)


def _backbone(directory: str) -> dict[str, torch.Tensor]:
    from ..models.modeling import load_reward_model  # heavy, and not needed by `build_tiny_vlm`

    return load_reward_model(directory, dtype="float32").model.state_dict()


def _train(model: str, rows: Dataset, output_dir: str, seed: int, epochs: int) -> str:
    from ..training.config import MultimodalRewardConfig
    from ..training.trainer import MultimodalRewardTrainer

    args = MultimodalRewardConfig(
        output_dir,
        seed=seed,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        warmup_steps=0.1,
        weight_decay=0.01,
        loss_type="bt",
        gradient_checkpointing=False,
        image_check="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        reward_statistics_pairs=0,
    )
    trainer = MultimodalRewardTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    return output_dir


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir")
    train_tiny_reader(parser.parse_args().output_dir)
