"""Parts of a model: freezing them, and training them with adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .families import FAMILIES
from .modeling import embedding_name


logger = logging.get_logger(__name__)

# Names of modules, each one component of a parameter's path.
PROJECTOR_NAMES = sorted({name for family in FAMILIES.values() for name in family.projector})
VISION_TOWER_NAMES = sorted({family.vision_tower for family in FAMILIES.values()})


def part_of(name: str) -> str:
    """Return the part of a model that a parameter or module belongs to."""
    components = set(name.split("."))
    if components & set(PROJECTOR_NAMES):
        return "projector"
    if components & set(VISION_TOWER_NAMES):
        return "vision_tower"
    return "language_model"


def freeze(model: nn.Module, part: str) -> None:
    """Stop the gradients of `"vision_tower"` or `"projector"`."""
    parameters = [parameter for name, parameter in model.named_parameters() if part_of(name) == part]
    if not parameters:
        raise ValueError(f"`freeze_{part}=True`, but {type(model).__name__} has no {part.replace('_', ' ')}.")
    for parameter in parameters:
        parameter.requires_grad_(False)


def with_reward_head(peft_config: PeftConfig, frozen: Sequence[str] = ()) -> PeftConfig:
    """Copy a PEFT configuration, to train and save the `score` head too and keep adapters out of frozen parts."""
    config: Any = copy.deepcopy(peft_config)  # the attributes below are those of most, not of all configurations
    config.task_type = "SEQ_CLS"
    config.inference_mode = False  # a configuration read from a saved adapter has it set
    modules = list(getattr(config, "modules_to_save", None) or [])
    config.modules_to_save = modules if "score" in modules else [*modules, "score"]
    if not frozen or getattr(config, "exclude_modules", None) is not None:
        return config
    projector, vision = (rf".*\b({'|'.join(names)})\b.*" for names in (PROJECTOR_NAMES, VISION_TOWER_NAMES))
    if "projector" not in frozen:
        config.exclude_modules = f"(?!{projector}){vision}"
    else:
        config.exclude_modules = f"({projector}|{vision})" if "vision_tower" in frozen else projector
    return config


def with_new_tokens(peft_config: PeftConfig, model: PreTrainedModel, new_tokens: Sequence[int]) -> PeftConfig:
    """Have adapters train and save the embeddings of the tokens that a chat template adds."""
    if not new_tokens:
        return peft_config
    name = embedding_name(model).rsplit(".", 1)[-1]
    if name in (getattr(peft_config, "modules_to_save", None) or []):
        return peft_config
    config: Any = peft_config
    targets = getattr(config, "target_modules", None)
    adds = f"`chat_template_path` adds {len(new_tokens)} tokens, whose embeddings"
    if not isinstance(targets, str) and name in (targets or []):
        advice = f'move "{name}" from `target_modules` to `modules_to_save`'
        raise ValueError(f"{adds} an adapter cannot train alone; {advice}.")
    if not hasattr(config, "trainable_token_indices"):
        kind = type(config).__name__
        raise ValueError(f'{adds} {kind} does not train; use LoRA, or add "{name}" to `modules_to_save`.')
    given = config.trainable_token_indices or {}
    layers = dict(given) if isinstance(given, dict) else {name: given}
    layers[name] = sorted({*layers.get(name, []), *new_tokens})
    config.trainable_token_indices = layers
    return config


def with_trained_head(model: Any) -> None:
    """Train and save the `score` head of a model with adapters, in place."""
    # PEFT freezes a head that is not in `modules_to_save`: a new one would stay random and be missing from the files.
    base, name = model.get_base_model(), model.active_adapters[0]
    head = base.score
    if isinstance(head, ModulesToSaveWrapper) and any(parameter.requires_grad for parameter in head.parameters()):
        return
    if not isinstance(head, (nn.Linear, ModulesToSaveWrapper)):
        raise ValueError(
            "The adapters of the model stand on its `score` head, which is small enough to be trained whole; put "
            '"score" into `modules_to_save` in place of `target_modules`.'
        )
    if isinstance(head, nn.Linear):
        head = base.score = ModulesToSaveWrapper(head, name)
        config = model.peft_config[name]
        config.modules_to_save = [*(getattr(config, "modules_to_save", None) or []), "score"]
    head.set_adapter(name)
    logger.warning("The `score` head, which the adapters left out, is trained and saved with them.")


def let_gradients_into_checkpoints(model: nn.Module) -> None:
    """Have the inputs of checkpointed layers require gradients."""
    # Reentrant checkpointing gives the weights of a layer none otherwise: those of an adapter in a vision tower, or of
    # layers above frozen embeddings, would never move.
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
            continue
        try:
            embeddings = module.get_input_embeddings()
        except NotImplementedError:  # a vision tower that names none
            module.register_forward_pre_hook(_require_gradient_of_input, with_kwargs=True)
        else:
            embeddings.register_forward_hook(_require_gradient_of_output)


def _require_gradient_of_output(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def _require_gradient_of_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Copy the arguments and have the first tensor of floats, the pixels, require a gradient."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            named[name] = value if value.requires_grad else value.detach().requires_grad_(True)
            break
    return tuple(named[index] for index in range(len(args))), {name: named[name] for name in kwargs}
