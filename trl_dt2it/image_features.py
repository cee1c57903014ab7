"""Two rows per pair that show the same images: the vision tower runs once, and its features are used twice."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel


# What M-RoPE positions are computed from, besides tokens: one entry an image or video.
ROPE_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

# What a model takes per kind, and the method that encodes it.
_KINDS = (("image", "pixel_values", "get_image_features"), ("video", "pixel_values_videos", "get_video_features"))


def encode_once(base: PreTrainedModel, inputs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """
    Encodes the images and videos of a batch and gives the inputs of a batch that shows them `repeats` times.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            Base model of a reward model.
        inputs (`dict`):
            What the base model takes besides tokens, with the images of the first `1 / repeats` of the rows.
        repeats (`int`):
            How often the rows, as one block after the other, show these images.

    Returns:
        `dict`: `inputs` with features in place of pixels.
    """
    inputs = dict(inputs)
    outputs = {}
    for kind, pixels, method in _KINDS:
        if inputs.get(pixels) is None:
            continue
        encode = getattr(base, method)
        wanted = {name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs}
        features = encode(**wanted, return_dict=True)
        features.pooler_output = _repeat(features.pooler_output, repeats)
        if features.get("deepstack_features") is not None:  # of several layers
            features.deepstack_features = [_repeat(layer, repeats) for layer in features.deepstack_features]
        outputs[kind] = features
        del inputs[pixels]
    for name in set(ROPE_INPUTS) & set(inputs):
        inputs[name] = torch.cat([inputs[name]] * repeats)
    return {**inputs, "mm_encoder_outputs": outputs} if outputs else inputs


def _repeat(features: torch.Tensor | list | tuple, repeats: int) -> torch.Tensor | list:
    """Features of all images in one tensor, or one tensor an image."""
    if isinstance(features, torch.Tensor):
        return torch.cat([features] * repeats)
    return list(features) * repeats
