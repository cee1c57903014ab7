"""Configurations and processors of the tiny checkpoints: one function per family, keeping what is odd about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.smolvlm import processing_smolvlm


if processing_smolvlm.num2words is None:  # it spells out the number of video frames; images do without
    processing_smolvlm.num2words = str

HIDDEN = 64
LAYERS = 2


def _text(tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> dict[str, Any]:
    """Arguments that all text configurations share."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN // 4,
        "max_position_embeddings": 4096,
    }
    return {**shape, **ids, **kwargs}


def _vision(**kwargs: Any) -> dict[str, Any]:
    """Arguments that the CLIP-like vision configurations share: 4 x 4 patches."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**shape, "image_size": 28, "patch_size": 7, **kwargs}


def _rope(**kwargs: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **kwargs}


Parts = tuple[PreTrainedConfig, ProcessorMixin]


def _qwen_vl(name: str, tokenizer: PreTrainedTokenizerFast, patch_size: int, text: dict, vision: dict) -> Parts:
    """The Qwen-VL line: images of any size, M-RoPE, 2 x 2 patches per image token."""
    prefix, processor = {
        "qwen2_vl": ("Qwen2VL", "Qwen2VL"),
        "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2_5_VL"),
        "qwen3_vl": ("Qwen3VL", "Qwen3VL"),
        "qwen3_vl_moe": ("Qwen3VLMoe", "Qwen3VL"),
        "qwen3_5": ("Qwen3_5", "Qwen3VL"),
    }[name]
    video = "Qwen3VL" if processor == "Qwen3VL" else "Qwen2VL"
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text,
        vision_config={"depth": 2, "num_heads": 2, "patch_size": patch_size, **vision},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": (2 * patch_size) ** 2, "longest_edge": (8 * patch_size) ** 2}
    image_processor = transformers.Qwen2VLImageProcessor(patch_size=patch_size, size=size)
    video_processor = getattr(transformers, f"{video}VideoProcessor")(patch_size=patch_size)
    return config, getattr(transformers, f"{processor}Processor")(image_processor, tokenizer, video_processor)


def qwen2_vl(tokenizer: PreTrainedTokenizerFast) -> Parts:
    text = _text(tokenizer, rope_parameters=_rope(mrope_section=[2, 3, 3]))
    text.pop("head_dim")
    return _qwen_vl("qwen2_vl", tokenizer, 7, text, {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2})


def qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """The first vision layer attends within windows of 2 x 2 image tokens."""
    text = _text(tokenizer, rope_parameters=_rope(mrope_section=[2, 3, 3]))
    text.pop("head_dim")
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": HIDDEN}
    return _qwen_vl("qwen2_5_vl", tokenizer, 7, text, {**vision, "window_size": 28, "fullatt_block_indexes": [1]})


_QWEN3_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}


def qwen3_vl(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """Features of the first vision layer go into the first text layer (DeepStack)."""
    text = _text(tokenizer, rope_parameters=_rope(mrope_section=[2, 3, 3], mrope_interleaved=True))
    return _qwen_vl("qwen3_vl", tokenizer, 8, text, {**_QWEN3_VISION, "deepstack_visual_indexes": [0]})


def qwen3_vl_moe(tokenizer: PreTrainedTokenizerFast) -> Parts:
    text = _text(tokenizer, rope_parameters=_rope(mrope_section=[2, 3, 3], mrope_interleaved=True))
    text.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
    return _qwen_vl("qwen3_vl_moe", tokenizer, 8, text, {**_QWEN3_VISION, "deepstack_visual_indexes": [0]})


def qwen3_5(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """A gated delta net layer, then a full attention layer that rotates a quarter of each head."""
    rope = _rope(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25)
    text = _text(tokenizer, rope_parameters=rope, layer_types=["linear_attention", "full_attention"])
    text.update(head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4)
    text.update(linear_key_head_dim=16, linear_value_head_dim=16)
    return _qwen_vl("qwen3_5", tokenizer, 8, text, _QWEN3_VISION)


def glm4v(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """M-RoPE on half of each head."""
    text = _text(tokenizer, rope_parameters=_rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5))
    text.pop("head_dim")
    ids = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 64}
    config = transformers.Glm4vConfig(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        tie_word_embeddings=False,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
    )
    size = {"shortest_edge": 2 * 14 * 14, "longest_edge": 2 * 56 * 56}  # frames count twice
    processor = transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(patch_size=7, size=size),
        tokenizer,
        transformers.Glm4vVideoProcessor(patch_size=7),
    )
    return config, processor


def gemma3(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """A sliding layer with a window of 16, then a full layer; image tokens see each other in both directions."""
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        text_config=_text(tokenizer, query_pre_attn_scalar=HIDDEN // 4, **layers),
        vision_config=_vision(model_type="siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    image_processor = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return config, transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=4)


def gemma4(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """As the larger models: sliding and full layers, image tokens see each other; with per-layer embeddings."""
    text = _text(tokenizer, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    text.update(use_bidirectional_attention="vision", global_head_dim=32)
    text.update(hidden_size_per_layer_input=8, vocab_size_per_layer_input=text["vocab_size"])
    vision = {key: value for key, value in _vision().items() if key != "image_size"}
    vision.update(num_key_value_heads=2, head_dim=16, patch_size=4, pooling_kernel_size=2)
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config={**vision, "position_embedding_size": 128},
        audio_config=None,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )
    image = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}  # 70 is the least that is allowed
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(**image),
        tokenizer,
        transformers.Gemma4VideoProcessor(**image),
        image_seq_length=70,
    )
    return config, processor


def llava(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """Features of the last but one CLIP layer, without the class token."""
    config = transformers.LlavaConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_vision(model_type="clip_vision_model", projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**size),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def llava_next(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """Any resolution: the whole image and its tiles, with a newline feature per row."""
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaNextConfig(
        text_config=_text(tokenizer, model_type="mistral", sliding_window=None),
        vision_config=_vision(model_type="clip_vision_model", projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **size),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def llava_onevision(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """As LLaVA-NeXT for one image; several images in a conversation come without tiles."""
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    text = _text(tokenizer, model_type="qwen2")
    text.pop("head_dim")
    config = transformers.LlavaOnevisionConfig(
        text_config=text,
        vision_config=_vision(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    size = {"height": 28, "width": 28}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return config, processor


def internvl(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """Up to 4 tiles and a thumbnail; pixel shuffle leaves 4 tokens of each."""
    text = _text(tokenizer, model_type="qwen2")
    text.pop("head_dim")
    config = transformers.InternVLConfig(
        text_config=text,
        vision_config=_vision(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    size = {"height": 28, "width": 28}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
    )
    return config, processor


def _idefics(prefix: str, tokenizer: PreTrainedTokenizerFast, *more: Any) -> Parts:
    """Images are split into tiles of 28 pixels, 4 tokens each, and a thumbnail."""
    config = getattr(transformers, f"{prefix}Config")(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_vision(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    size = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    image_processor = getattr(transformers, f"{prefix}ImageProcessor")(**size)
    return config, getattr(transformers, f"{prefix}Processor")(image_processor, tokenizer, *more, image_seq_len=4)


def smolvlm(tokenizer: PreTrainedTokenizerFast) -> Parts:
    size = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}
    return _idefics("SmolVLM", tokenizer, transformers.SmolVLMVideoProcessor(**size, fps=1, num_frames=4))


def idefics3(tokenizer: PreTrainedTokenizerFast) -> Parts:
    return _idefics("Idefics3", tokenizer)


def mistral3(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """Pixtral at any size; the projector merges 2 x 2 patches, and each row of image tokens ends in a break token."""
    config = transformers.Mistral3Config(
        text_config=_text(tokenizer, model_type="mistral", sliding_window=None),
        vision_config=_vision(model_type="pixtral", image_size=56),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    image_processor = transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=7)
    return config, transformers.PixtralProcessor(image_processor, tokenizer, patch_size=7, spatial_merge_size=2)


def aya_vision(tokenizer: PreTrainedTokenizerFast) -> Parts:
    """Tiles and a thumbnail; a sliding layer with a window of 16, then a full layer without rotation."""
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.AyaVisionConfig(
        text_config=_text(tokenizer, model_type="cohere2", **layers),
        vision_config=_vision(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    image_processor = transformers.GotOcr2ImageProcessor(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return config, transformers.AyaVisionProcessor(
        image_processor, tokenizer, patch_size=7, img_size=28, downsample_factor=2
    )


FAMILIES: dict[str, Callable[[PreTrainedTokenizerFast], Parts]] = {
    function.__name__: function
    for function in (
        *(qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, gemma3, gemma4, llava, llava_next, llava_onevision),
        *(internvl, smolvlm, idefics3, mistral3, glm4v, aya_vision),
    )
}
