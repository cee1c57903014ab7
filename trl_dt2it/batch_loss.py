"""The loss of one batch of pairs: the rewards that a model gives, the loss and the weight of each pair, their mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import nn

from .losses import LossFunction, pair_weight, pairwise_loss
from .reward_config import MultimodalRewardConfig


class BatchLoss(NamedTuple):
    """
    What came out of a batch of B pairs.

    Parameters:
        loss (`torch.Tensor`):
            The mean with the weights, a scalar in fp32, to go backward from.
        rewards (`torch.Tensor` of shape `(B, 2)` and dtype `float32`):
            Rewards of chosen and rejected, without gradient.
        losses (`torch.Tensor` of shape `(B,)` and dtype `float32`):
            Loss of each pair, without gradient.
        weights (`torch.Tensor` of shape `(B,)` and dtype `float32`):
            Weight of each pair.
    """

    loss: torch.Tensor
    rewards: torch.Tensor
    losses: torch.Tensor
    weights: torch.Tensor


def batch_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    loss_type: str | LossFunction,
    args: MultimodalRewardConfig,
    total_weight: torch.Tensor | int | None = None,
    num_processes: int = 1,
) -> BatchLoss:
    """
    Loss of a batch of B pairs, averaged with the weights.

    Args:
        model, inputs:
            As in [`MultimodalRewardTrainer.compute_loss`].
        loss_type (`str` or `Callable`):
            As in [`pairwise_loss`].
        args ([`MultimodalRewardConfig`]):
            The settings of the loss.
        total_weight (`torch.Tensor` or `int`, *optional*):
            Weight of all pairs of the optimisation step over all processes; the batch's own without it.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of the processes over which `total_weight` is a sum.

    Returns:
        [`BatchLoss`]
    """
    pairs = inputs["pairs"]
    num_pairs = len(pairs["weight"])
    rewards = pair_rewards(model, {key: value for key, value in inputs.items() if key != "pairs"}, num_pairs)
    chosen, rejected = rewards[:, :num_pairs]
    losses = pairwise_loss(chosen, rejected, pairs, args, loss_type=loss_type)
    weights = pair_weight(pairs, args, loss_type)
    total = weights.sum() if total_weight is None else torch.as_tensor(total_weight)
    # DDP, FSDP and DeepSpeed average over processes what is here divided by a sum over processes.
    factor = 1 if total_weight is None else num_processes
    loss = (weights * losses).sum() * factor / total.clamp(min=torch.finfo(torch.float32).tiny)
    loss = loss + 0.0 * rewards[:, num_pairs:].sum()  # dummies, if any, take part with nothing
    return BatchLoss(loss, torch.stack([chosen, rejected], dim=1).detach().float(), losses.detach(), weights)


def pair_rewards(model: nn.Module, tensors: dict[str, torch.Tensor], num_pairs: int) -> torch.Tensor:
    """
    Rewards that a model gives the answers of B pairs, and of D dummies.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.
        tensors (`dict[str, torch.Tensor]`):
            A batch of the collator without `pairs`, on the model's device.
        num_pairs (`int`):
            B.

    Returns:
        `torch.Tensor` of shape `(2, B + D)` and dtype `float32`: chosen and rejected, dummies last.

    Raises:
        `ValueError`: if the model gives anything else.
    """
    logits = model(**tensors, use_cache=False).logits
    if logits.shape[-1] != 1 or len(logits) % 2 or not 0 <= len(logits) // 2 - num_pairs <= 2:
        raise ValueError(f"The model gave logits of shape {tuple(logits.shape)} for {num_pairs} pairs.")
    return logits.float().reshape(2, -1)


class EmbeddingNoise:
    """
    NEFTune's noise on the embeddings of a batch, uniform in +-alpha / sqrt(length * dim).

    transformers takes for the length that of the padded batch, so that the noise shrinks with the conversations that
    happen to be in it, and in one row per pair with their number. Here it is that of the longer conversation of the
    token's own pair, in every batch and layout: what transformers' is with one pair a batch.

    Args:
        alpha (`float`):
            `neftune_noise_alpha`.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: torch.Tensor | None = None

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Add the noise to what a model reads while it trains; `see` tells what comes next."""
        base = model.get_base_model() if is_peft_model(model) else model
        handle = base.get_input_embeddings().register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Take the lengths out of a batch of the collator, before the model reads it."""
        if (layout := inputs.get("pair_layout")) is not None:
            longest = layout[:, 0] + layout[:, 1:].amax(dim=1)
            self._lengths = longest.repeat_interleave(layout.sum(dim=1))[None]  # (1, T)
            return
        mask = inputs["attention_mask"]
        longest = mask.sum(dim=1).view(2, -1).amax(dim=0)  # the chosen of all pairs, then the rejected of all pairs
        self._lengths = longest.repeat(2)[:, None].expand(mask.shape)  # (R, L)

    def _add(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        # Some families look single tokens up besides the batch.
        if not module.training or self._lengths is None or output.shape[:2] != self._lengths.shape:
            return None
        scale = self.alpha / (self._lengths * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[..., None].to(output.dtype)
