"""Reward models on several processes, under DeepSpeed and under FSDP.

Every process runs the vision tower equally often, a step without images leaves the tower alone all the same, and what
is trained has an fp32 copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.utils import logging

from ..models.freezing import part_of
from ..models.modeling import RewardHead, is_head
from ..utils import with_values
from .config import Trainer
from .setup import is_reentrant


logger = logging.get_logger(__name__)


def is_sharded(trainer: Trainer) -> bool:
    """Tell whether DeepSpeed or FSDP divides the model or its optimizer over the processes."""
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


def needs_equal_calls(trainer: Trainer) -> bool:
    """Tell whether all processes have to run each module equally often."""
    # Always where the model is sharded, and under DDP where it does not look for unused parameters.
    if trainer.accelerator.num_processes == 1:
        return False
    return is_sharded(trainer) or not trainer.args.ddp_find_unused_parameters


def refuse_reentrant_twice(trainer: Trainer) -> None:
    """Refuse reentrant checkpoints where a step may run the vision tower twice, for images and for videos."""
    # DDP and DeepSpeed reduce each gradient as soon as it is there, and it would be there twice.
    if (
        trainer.accelerator.num_processes > 1
        and not trainer.is_fsdp_enabled
        and trainer.args.gradient_checkpointing
        and is_reentrant(trainer.args)
        and len(trainer._collator.media) > 1
        and any(part_of(name) == "vision_tower" for name, p in trainer.model.named_parameters() if p.requires_grad)
    ):
        raise ValueError(
            "The sets have images and videos, and reentrant gradient checkpointing (which adapters need under ZeRO-3) "
            "cannot train a vision tower on both on several processes; set `use_reentrant=False`, "
            "`gradient_checkpointing=False` or `freeze_vision_tower=True`."
        )


def vision_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters that only images and videos give a gradient."""
    named = model.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and part_of(name) != "language_model"]


def split_vision_groups(trainer: Trainer) -> None:
    """Split the vision tower into its own groups of the optimizer, with the key `is_vision`."""
    # Before DeepSpeed flattens each group. It steps on whole groups, gradients or not.
    vision = {id(parameter) for parameter in vision_parameters(trainer.model)}
    groups = []
    for group in getattr(trainer.optimizer, "param_groups", []):
        for is_vision in (False, True):
            if chosen := [parameter for parameter in group["params"] if (id(parameter) in vision) == is_vision]:
                groups.append({**group, "params": chosen, "is_vision": is_vision})
    if groups:
        trainer.optimizer.param_groups = groups


def skip_idle_groups(optimizer: Any, is_idle: Callable[[], bool]) -> None:
    """Have DeepSpeed's optimizer of ZeRO-1, 2 or 3 skip the groups of the vision tower while `is_idle()`."""
    step = getattr(optimizer, "_optimizer_step", None)
    if step is None:  # ZeRO-0 does not divide groups
        return
    of_group = getattr(optimizer, "sub_group_to_group_id", None)

    def step_unless_idle(number: int) -> None:
        group = optimizer.optimizer.param_groups[number if of_group is None else of_group[number]]
        if not (group.get("is_vision") and is_idle()):
            step(number)

    optimizer._optimizer_step = step_unless_idle


def shard_head(trainer: Trainer) -> None:
    """Make the `score` head an FSDP2 unit of its own, in fp32."""
    # A unit has one dtype, and the head would be cast with the norm and the embeddings.
    if not _is_fsdp2(trainer):
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is None:
        return
    mesh = getattr(trainer.accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(trainer.accelerator.parallelism_config.fsdp_dim_names)]
    for module in trainer.model.modules():
        if isinstance(module, RewardHead) and not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(), offload_policy=plugin.cpu_offload)


def _is_fsdp2(trainer: Trainer) -> bool:
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 2


@contextmanager
def evaluable(trainer: Trainer) -> Iterator[None]:
    """Prepare a model for an evaluation before training."""
    # Below ZeRO-3 every process has the whole model, and transformers refuses to make an engine for inference;
    # accelerate prepares a model for FSDP2 with an optimizer only.
    accelerator = trainer.accelerator
    plugin: Any = getattr(accelerator.state, "deepspeed_plugin", None)
    if trainer.is_deepspeed_enabled and trainer.deepspeed is None and plugin.zero_stage != 3:
        with with_values(trainer, is_deepspeed_enabled=False):
            yield
        return
    if _is_fsdp2(trainer) and not accelerator._models:
        shard_head(trainer)
        trainer.model = trainer.model_wrapped = fsdp2_prepare_model(accelerator, trainer.model)
        accelerator._models.append(trainer.model)
    yield


def take_back_preparation(trainer: Trainer) -> None:
    """Undo the preparation of an evaluation before training."""
    # It marks the bare model as prepared, so that training would not wrap it in DDP: each process would silently train
    # by itself. Under ZeRO-3 it leaves an engine without an optimizer.
    if trainer.is_fsdp_enabled:
        return
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
        trainer.model_wrapped, trainer.deepspeed = trainer.model, None
    is_alone = trainer.accelerator.num_processes == 1 and not trainer.is_deepspeed_enabled
    if trainer.model_wrapped is trainer.model and not is_alone:
        trainer.model._is_accelerate_prepared = False
        trainer.accelerator._models.clear()


def name_groups(trainer: Trainer) -> list[list[str]]:
    """Return the names of each optimizer group's parameters, before FSDP2 replaces the parameters."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]


def point_groups_at(trainer: Trainer, groups: list[list[str]]) -> None:
    """Put the parameters of the sharded model into the optimizer groups of [`name_groups`]."""
    # accelerate finds them by the address of their data, which is 0 for every parameter without data on this process.
    named = fsdp2_canonicalize_names(dict(trainer.model.named_parameters()))
    for group, names in zip(trainer.optimizer.param_groups, groups, strict=True):
        group["params"] = [named[name] for name in names]


def keep_trained_in_fp32(trainer: Trainer) -> None:
    """Give trainable weights in half precision an fp32 copy where nothing else does."""
    # bf16 has 8 bits, so that a step of 1e-5 of a weight would be rounded away. DeepSpeed in half precision keeps such
    # a copy. Otherwise the weights themselves become fp32, and autocast computes in half precision; without autocast,
    # frozen weights become fp32 too, so that all dtypes agree.
    is_mixed = trainer.accelerator.mixed_precision != "no"
    if trainer.is_deepspeed_enabled and is_mixed:
        dtype = torch.float16 if trainer.accelerator.mixed_precision == "fp16" else torch.bfloat16
        for module in trainer.model.modules():
            if isinstance(module, RewardHead):
                module.keeps_fp32 = False
                module.to(dtype)
        return
    half = (torch.float16, torch.bfloat16)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if not any(parameter.dtype in half for parameter in trained):
        return
    if not is_mixed:
        trained = list(trainer.model.parameters())
        logger.warning(
            "The model was loaded in half precision, but `bf16` and `fp16` are off, so that it trains in float32; set "
            "`bf16=True` to compute in half precision."
        )
    for parameter in trained:
        if parameter.dtype in half:
            parameter.data = parameter.data.float()


def exact_head(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gather the fp32 weights of the trained `score` head that DeepSpeed keeps apart; every process has to call it."""
    engine = getattr(trainer, "deepspeed", None)
    if engine is None or trainer.optimizer is None or trainer.accelerator.mixed_precision == "no":
        return {}
    from deepspeed.utils import safe_get_full_fp32_param

    named = engine.module.named_parameters()
    exact = {n: safe_get_full_fp32_param(p) for n, p in named if p.requires_grad and is_head(n)}
    return {n: w.detach().float().reshape(-1, w.shape[-1]).cpu() for n, w in exact.items() if w is not None}


def with_dtypes(
    state_dict: dict[str, torch.Tensor], head: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the weights to save: the exact head, the head in fp32, and the body in `dtype`."""
    saved = {}
    for name, weight in state_dict.items():
        if name in head:
            weight = head[name].reshape(weight.shape)
        elif is_head(name) and weight.is_floating_point():
            weight = weight.float()
        elif dtype is not None and weight.dtype == torch.float32:
            weight = weight.to(dtype)
        saved[name] = weight
    return saved
