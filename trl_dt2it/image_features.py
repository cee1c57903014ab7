"""Images in a forward pass: encoded once for two rows that show the same, and refused where only placeholders come."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel


# What M-RoPE positions are computed from, besides tokens: one entry an image or video.
ROPE_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

# What a model takes per kind, and the method that encodes it.
_KINDS = (("image", "pixel_values", "get_image_features"), ("video", "pixel_values_videos", "get_video_features"))


def refuse_unseen(config: PreTrainedConfig, input_ids: torch.Tensor, inputs: dict[str, Any], training: bool) -> None:
    """
    Refuse placeholders of images or videos that come without pixels, which a model scores as if they were words.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the reward model, with the ids of placeholders.
        input_ids (`torch.Tensor`):
            Token ids.
        inputs (`dict`):
            What the base model takes besides tokens.
        training (`bool`):
            Whether the model is trained. Then, on an accelerator, a batch with some pixels is taken as it is: to look
            at its tokens would make the host wait for the device at each step.

    Raises:
        `ValueError`: if there are such placeholders.
    """
    ready = inputs.get("mm_encoder_outputs") or {}
    is_seen = {kind: inputs.get(pixels) is not None or ready.get(kind) is not None for kind, pixels, _ in _KINDS}
    is_costly = training and input_ids.device.type != "cpu" and any(is_seen.values())
    if all(is_seen.values()) or is_costly or torch.compiler.is_compiling():
        return
    found = {kind: bool(torch.isin(input_ids, _placeholder_ids(config, kind, input_ids)).any()) for kind in is_seen}
    if is_seen["video"] and not found["video"]:  # a family that writes frames as images
        return
    for kind, pixels, _ in _KINDS:
        if found[kind] and not is_seen[kind]:
            raise ValueError(
                f"The tokens hold placeholders of {kind}s without `{pixels}` to put in their place; pass all that the "
                "processor gives (in GRPO and RLOO, `RewardScorer(...).as_reward_func()` in place of the model)."
            )


def _placeholder_ids(config: PreTrainedConfig, kind: str, like: torch.Tensor) -> torch.Tensor:
    ids = (getattr(config, f"{kind}_token_{end}", None) for end in ("id", "index"))
    return like.new_tensor([token_id for token_id in ids if token_id is not None])


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
