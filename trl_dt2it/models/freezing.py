"""Parts of a model: what is frozen or trained, and what is saved beside an adapter."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, logging

from .families import FAMILIES


logger = logging.get_logger(__name__)

# Names of modules, each one component of a parameter's path.
PROJECTOR_NAMES = sorted({name for family in FAMILIES.values() for name in family.projector})

VISION_TOWER_NAMES = sorted({family.vision_tower for family in FAMILIES.values()})


def is_head(name: str) -> bool:
    """Tell whether a parameter or module is the `score` head or belongs to it, in an adapter's wrapper too."""
    return "score" in name.split(".")


def part_of(name: str) -> str:
    """The part of a vision-language model that a parameter or module belongs to."""
    components = set(name.split("."))
    if components & set(PROJECTOR_NAMES):
        return "projector"
    if components & set(VISION_TOWER_NAMES):
        return "vision_tower"
    return "language_model"


def freeze(model: nn.Module, *, vision_tower: bool = False, projector: bool = False) -> int:
    """Stops the gradient of the named parts."""
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
    """A copy of a PEFT configuration that trains and saves the `score` head with the adapters."""
    config: Any = copy.deepcopy(peft_config)  # the attributes below are those of most, not of all configurations
    config.task_type = "SEQ_CLS"
    config.inference_mode = False  # as a configuration that was read from a saved adapter does not say
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


def with_new_tokens(peft_config: PeftConfig, model: PreTrainedModel, new_tokens: Sequence[int]) -> PeftConfig:
    """Let adapters train, and save, the embeddings of tokens that a chat template brings."""
    if not new_tokens:
        return peft_config
    name = embedding_name(model).rsplit(".", 1)[-1]
    if name in (getattr(peft_config, "modules_to_save", None) or []):
        return peft_config
    config: Any = peft_config
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) and name in (targets or []):
        raise ValueError(
            f"`chat_template_path` adds {len(new_tokens)} tokens, whose embeddings an adapter cannot train alone; "
            f'move "{name}" from `target_modules` to `modules_to_save`.'
        )
    if not hasattr(config, "trainable_token_indices"):
        raise ValueError(
            f"`chat_template_path` adds {len(new_tokens)} tokens, whose embeddings {type(config).__name__} does not "
            f'train; use LoRA, or add "{name}" to `modules_to_save`.'
        )
    given = config.trainable_token_indices or {}
    layers = dict(given) if isinstance(given, dict) else {name: given}
    layers[name] = sorted({*layers.get(name, []), *new_tokens})
    config.trainable_token_indices = layers
    return config


def embedding_name(model: PreTrainedModel) -> str:
    """The dotted path of a model's token embeddings."""
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)


def num_embeddings(model: PreTrainedModel) -> int:
    """How many token embeddings a model has."""
    return cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]


def num_tokens_of_adapter(base: PreTrainedModel, peft_config: Any, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Number of token embeddings that a base model needs for an adapter, or `None` if it has them."""
    path, current = embedding_name(base), num_embeddings(base)
    found = [shape[0] for key, shape in shapes.items() if f".{path}." in key and key.endswith("weight")]
    indices = getattr(peft_config, "trainable_token_indices", None) or {}
    if isinstance(indices, dict):
        indices = indices.get(path.rsplit(".", 1)[-1], [])
    needed = max(found, default=max([current - 1, *indices]) + 1)
    return None if needed == current else needed


def with_trained_head(model: Any) -> None:
    """Let a model that has adapters train its `score` head, which PEFT freezes unless it was told of it, and save it
    with them: a new head would stay random, and what is saved could not be loaded.
    """
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
    """Let what enters checkpointed layers require gradients. Reentrant checkpointing gives the weights of a layer none
    otherwise: those of an adapter in a vision tower, or of layers above frozen embeddings, would never move.
    """
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


def _require_gradient_of_output(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def _require_gradient_of_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A copy of the arguments whose first tensor of floats, the pixels, requires a gradient."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            named[name] = value if value.requires_grad else value.detach().requires_grad_(True)
            break
    return tuple(named[index] for index in range(len(args))), {name: named[name] for name in kwargs}


STATISTICS_FILE = "reward_statistics.json"

STATISTICS = ("reward_mean", "reward_std")


def set_reward_statistics(config: PreTrainedConfig, statistics: dict[str, float] | None) -> None:
    """Writes `reward_mean` and `reward_std` into a configuration, or takes out what is there."""
    for name in STATISTICS:
        vars(config).pop(name, None)
    for name, value in (statistics or {}).items():
        setattr(config, name, value)


def write_beside_adapter(config: PreTrainedConfig, folder: str | os.PathLike) -> None:
    """Writes the mean and the standard deviation that a configuration holds into an adapter's directory."""
    path = Path(folder) / STATISTICS_FILE
    values = {name: vars(config)[name] for name in STATISTICS if name in vars(config)}
    if values:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def read_beside_adapter(config: PreTrainedConfig, name_or_path: str | os.PathLike, revision: str | None) -> None:
    """Puts an adapter's mean and standard deviation into the configuration of its base model, whose own are of other
    rewards.
    """
    path = cached_file(name_or_path, STATISTICS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    values = None
    if path is not None:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if (
            not isinstance(values, dict)
            or sorted(values) != sorted(STATISTICS)
            or not all(map(_is_finite, values.values()))
        ):
            raise ValueError(f"{path} does not hold the finite numbers {' and '.join(STATISTICS)}; delete it.")
    set_reward_statistics(config, values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
