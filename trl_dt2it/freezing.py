"""Which parameters belong to the vision tower and which to the projector, and keeping them as they are."""

from __future__ import annotations

import copy
import re
from typing import Any

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


def with_reward_head(
    peft_config: PeftConfig, *, keep_out_of_vision_tower: bool = False, keep_out_of_projector: bool = False
) -> PeftConfig:
    """
    A copy of a PEFT configuration that trains and saves the `score` head with the adapters.

    Args:
        peft_config ([`~peft.PeftConfig`]):
            The user's configuration, left as it is.
        keep_out_of_vision_tower (`bool`, *optional*, defaults to `False`):
            Whether adapters stay out of the vision tower, which `target_modules="all-linear"` would adapt. A
            user's own `exclude_modules` goes before.
        keep_out_of_projector (`bool`, *optional*, defaults to `False`):
            The same for the projector.

    Returns:
        [`~peft.PeftConfig`]
    """
    config: Any = copy.deepcopy(peft_config)  # the attributes below are those of most, not of all configurations
    config.task_type = "SEQ_CLS"
    modules = list(getattr(config, "modules_to_save", None) or [])
    config.modules_to_save = modules if "score" in modules else [*modules, "score"]
    parts = (keep_out_of_vision_tower, keep_out_of_projector)
    if not any(parts) or getattr(config, "exclude_modules", None) is not None:
        return config
    is_projector = rf".*\b({'|'.join(map(re.escape, PROJECTOR_NAMES))})\b.*"
    is_vision = rf".*\b({'|'.join(map(re.escape, VISION_TOWER_NAMES))})\b.*"
    patterns = {
        (True, True): f"({is_projector}|{is_vision})",
        (False, True): is_projector,
        (True, False): f"(?!{is_projector}){is_vision}",
    }
    config.exclude_modules = patterns[parts]
    return config
