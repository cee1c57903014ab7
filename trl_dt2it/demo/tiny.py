"""A vision-language model of about a million weights with a real processor."""

import os
from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from . import READER_DIR
from .digits import TILE, all_texts


SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)

# Words stay with their leading space and figures stay single, as in Qwen's own tokenizer.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (READER_DIR / "chat_template.jinja").read_text(encoding="utf-8")


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
    extra_texts: Sequence[str] = (),
) -> str:
    """Build a tiny Qwen3-VL with random weights and its processor, and save both."""
    if hidden_size % 32 or vision_hidden_size % 16:
        given = f"got {hidden_size} and {vision_hidden_size}"
        raise ValueError(f"`hidden_size` must be a multiple of 32, and `vision_hidden_size` one of 16; {given}.")
    tokenizer = build_tiny_tokenizer(extra_texts=extra_texts)
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
