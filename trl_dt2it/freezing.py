"""Which parameters belong to the vision tower and which to the projector, and keeping them as they are."""

from __future__ import annotations

import re

from peft import PeftConfig
from torch import nn


# Names of modules (one component of a parameter's path) over all supported families. What lies inside the vision
# tower but leads to the language model, such as Qwen's merger, is projector.
PROJECTOR_NAMES = (
    "connector",
    "deepstack_merger_list",
    "embed_vision",
    "image_newline",
    "merger",
    "multi_modal_projector",
)
VISION_TOWER_NAMES = ("vision_model", "vision_tower", "visual")


def part_of(name: str) -> str:
    """
    The part of a vision-language model that a parameter or module belongs to.

    Args:
        name (`str`):
            Dotted path, such as `model.visual.blocks.0.attn.qkv.weight`.

    Returns:
        `str`: `"projector"`, `"vision_tower"` or `"language_model"` (the head included).
    """
    components = set(name.split("."))
    if components & set(PROJECTOR_NAMES):
        return "projector"
    if components & set(VISION_TOWER_NAMES):
        return "vision_tower"
    return "language_model"


def freeze(model: nn.Module, *, vision_tower: bool = False, projector: bool = False) -> int:
    """
    Stops the gradient of the named parts.

    Args:
        model (`nn.Module`):
            Reward model of a supported family.
        vision_tower (`bool`, *optional*, defaults to `False`):
            Whether to freeze the vision tower.
        projector (`bool`, *optional*, defaults to `False`):
            Whether to freeze what lies between vision tower and language model.

    Returns:
        `int`: number of parameters frozen.

    Raises:
        `ValueError`: if a part is to be frozen that the model does not have.
    """
    total = 0
    for part, wanted in (("vision_tower", vision_tower), ("projector", projector)):
        if not wanted:
            continue
        parameters = [parameter for name, parameter in model.named_parameters() if part_of(name) == part]
        if not parameters:
            raise ValueError(f"`freeze_{part}=True`, but {type(model).__name__} has no {part.replace('_', ' ')}.")
        for parameter in parameters:
            parameter.requires_grad_(False)
        total += sum(parameter.numel() for parameter in parameters)
    return total


def keep_adapters_out(peft_config: PeftConfig, *, vision_tower: bool = False, projector: bool = False) -> None:
    """
    Keeps PEFT from adapting frozen parts, which `target_modules="all-linear"` would; a user's own `exclude_modules`
    stays.

    Args:
        peft_config ([`~peft.PeftConfig`]):
            Changed in place.
        vision_tower (`bool`, *optional*, defaults to `False`):
            Whether to leave out the vision tower.
        projector (`bool`, *optional*, defaults to `False`):
            Whether to leave out the projector.
    """
    if not (vision_tower or projector) or getattr(peft_config, "exclude_modules", None) is not None:
        return
    is_projector = rf".*\b({'|'.join(map(re.escape, PROJECTOR_NAMES))})\b.*"
    is_vision = rf".*\b({'|'.join(map(re.escape, VISION_TOWER_NAMES))})\b.*"
    if vision_tower and projector:
        pattern = f"({is_projector}|{is_vision})"
    elif projector:
        pattern = is_projector
    else:
        pattern = f"(?!{is_projector}){is_vision}"
    peft_config.exclude_modules = pattern  # type: ignore[attr-defined]
