"""A reward model with the sizes of the published Qwen3-VL-2B, random weights, and the processor of the small one."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin, Qwen3VLConfig

from trl_dt2it.models.modeling import mark_as_reward_model, reward_model_class

from .vlm import build_config, build_processor


TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "deepstack_visual_indexes": [5, 11, 17],
}


def build(
    directory: Path, device: torch.device, *, dtype: torch.dtype = torch.bfloat16, small: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Args:
        directory (`Path`):
            Receives the processor, and keeps it for the next call.
        device (`torch.device`):
            Where the weights are drawn, with one seed.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Dtype of the weights.
        small (`bool`, *optional*, defaults to `False`):
            Whether to take the small sizes, to try a script on a CPU.

    Returns:
        `tuple`: the reward model in training mode, and the processor.
    """
    if not (directory / "processor_config.json").exists():
        build_processor(directory)
    processor = AutoProcessor.from_pretrained(directory)
    sizes: dict[str, Any] = {"hidden_size": 256, "num_layers": 2} if small else {}
    config: Qwen3VLConfig = build_config(processor.tokenizer, **sizes)
    if not small:
        for part, values in ((config.text_config, TEXT), (config.vision_config, VISION)):
            for name, value in values.items():
                setattr(part, name, value)
    mark_as_reward_model(config)
    torch.manual_seed(0)
    with device:
        model = reward_model_class(Qwen3VLConfig)._from_config(config, dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh weights look at all tokens nearly alike. As trained ones do, these prefer some to others, so that
            # rewards depend on what stands before.
            if name.endswith("q_norm.weight"):
                parameter.fill_(2.0)
    return model.train(), processor
