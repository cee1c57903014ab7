"""The loss of a batch, and the metrics that TRL logs, exact on uneven batches and several processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn

from .config import MultimodalRewardConfig
from .losses import LossFunction, pair_weight, pairwise_loss


class BatchLoss(NamedTuple):
    """The loss of a batch of B pairs: a scalar, `rewards` `(B, 2)`, `losses` `(B,)` and `weights` `(B,)`, fp32."""

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
    """Compute the loss of a batch of B pairs, averaged with the weights."""
    pairs = inputs["pairs"]
    num_pairs = len(pairs["weight"])
    rewards = pair_rewards(model, {key: value for key, value in inputs.items() if key != "pairs"}, num_pairs)
    chosen, rejected = rewards[:, :num_pairs]
    losses = pairwise_loss(chosen, rejected, pairs, args, loss_type=loss_type)
    weights = pair_weight(pairs, args, loss_type)
    total = weights.sum() if total_weight is None else torch.as_tensor(total_weight)
    # The weight is summed over processes, and DDP, FSDP and DeepSpeed average the loss over them.
    factor = 1 if total_weight is None else num_processes
    loss = (weights * losses).sum() * factor / total.clamp(min=torch.finfo(torch.float32).tiny)
    loss = loss + 0.0 * rewards[:, num_pairs:].sum()  # dummies take part without effect
    return BatchLoss(loss, torch.stack([chosen, rejected], dim=1).detach().float(), losses.detach(), weights)


def pair_rewards(model: nn.Module, tensors: dict[str, torch.Tensor], num_pairs: int) -> torch.Tensor:
    """Compute the rewards `(2, B + D)` fp32 of B pairs and D dummies."""
    logits = model(**tensors, use_cache=False).logits
    if logits.shape[-1] != 1 or len(logits) % 2 or not 0 <= len(logits) // 2 - num_pairs <= 2:
        raise ValueError(f"The model returned logits of shape {tuple(logits.shape)} for {num_pairs} pairs.")
    return logits.float().reshape(2, -1)


class EmbeddingNoise:
    """NEFTune's noise on the embeddings of a batch, uniform in +-alpha / sqrt(length * dim)."""

    # transformers takes the length of the padded batch, so that the noise shrinks with the conversations that happen
    # to be in it, and in one row per pair with their number. Here it is that of the longer conversation of the token's
    # pair, in every batch and layout: transformers' noise with one pair per batch.

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: torch.Tensor | None = None

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Add noise while a model trains, of the batches passed to `see`."""
        base = model.get_base_model() if is_peft_model(model) else model
        handle = base.get_input_embeddings().register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Take the lengths of a batch, before the model reads it."""
        if (layout := inputs.get("pair_layout")) is not None:
            longest = layout[:, 0] + layout[:, 1:].amax(dim=1)
            self._lengths = longest.repeat_interleave(layout.sum(dim=1))[None]  # (1, T)
            return
        mask = inputs["attention_mask"]
        longest = mask.sum(dim=1).view(2, -1).amax(dim=0)  # all chosen come before all rejected
        self._lengths = longest.repeat(2)[:, None].expand(mask.shape)  # (R, L)

    def _add(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        # Some families also look up single tokens.
        if not module.training or self._lengths is None or output.shape[:2] != self._lengths.shape:
            return None
        scale = self.alpha / (self._lengths * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[..., None].to(output.dtype)


class PairRecord(NamedTuple):
    """The evaluation of one pair; `position` is its index in the set."""

    position: int
    chosen: float
    rejected: float
    loss: float
    weight: float
    source: str | None


@dataclass
class TrainMetrics:
    """Sums over the pairs and tokens since the last log, on the device so that no step waits for them."""

    sums: torch.Tensor | None = None  # (5,) fp64: pairs, wins of chosen, summed margins, summed rewards, tokens
    low: torch.Tensor = field(default_factory=lambda: torch.tensor(float("inf")))
    high: torch.Tensor = field(default_factory=lambda: torch.tensor(float("-inf")))

    @torch.no_grad()
    def add(self, chosen: torch.Tensor, rejected: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Add a batch: rewards `(B,)` and its number of tokens, a scalar."""
        # MPS has no fp64; the counts of one logging window fit fp32 there.
        dtype = torch.float32 if chosen.device.type == "mps" else torch.float64
        both = torch.stack([chosen, rejected]).to(dtype)
        wins, margins = both[0] > both[1], both[0] - both[1]
        sums = (torch.ones_like(margins), wins, margins, both[0] + both[1], num_tokens)
        batch = torch.stack([values.sum().to(dtype) for values in sums])
        self.sums = batch if self.sums is None else self.sums + batch
        self.low = torch.minimum(self.low.to(both), both.min())
        self.high = torch.maximum(self.high.to(both), both.max())

    def collect(self, accelerator: Accelerator) -> tuple[dict[str, float], int]:
        """Return the metrics and number of tokens of all processes since the last call; all must call it."""
        if self.sums is None:  # perhaps not on other processes
            dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
            self.sums = torch.zeros(5, dtype=dtype, device=accelerator.device)
        bounds = torch.stack([self.low.to(self.sums), self.high.to(self.sums)])
        everywhere = accelerator.gather(torch.cat([self.sums, bounds])[None])  # (processes, 7)
        pairs, wins, margins, rewards, tokens = everywhere[:, :5].sum(0).tolist()
        low, high = everywhere[:, 5].min().item(), everywhere[:, 6].max().item()
        self.sums, self.low, self.high = None, torch.tensor(float("inf")), torch.tensor(float("-inf"))
        if pairs == 0:
            return {}, 0
        return {
            "min_reward": low,
            "mean_reward": rewards / (2 * pairs),
            "max_reward": high,
            "accuracy": wins / pairs,
            "margin": margins / pairs,
        }, int(tokens)


def evaluation_metrics(records: Sequence[PairRecord]) -> dict[str, float]:
    """Compute the metrics of an evaluation set from one record per pair."""
    if not records:
        return {}
    _, chosen, rejected, loss, weight = np.array([record[:5] for record in records], dtype=np.float64).T
    wins = chosen > rejected
    metrics = {
        "loss": float(np.average(loss, weights=weight)) if weight.sum() > 0 else 0.0,
        "min_reward": float(min(chosen.min(), rejected.min())),
        "mean_reward": float((chosen + rejected).mean() / 2),
        "max_reward": float(max(chosen.max(), rejected.max())),
        "accuracy": float(wins.mean()),
        "margin": float((chosen - rejected).mean()),
    }
    for source in sorted({record.source for record in records if record.source is not None}):
        metrics[f"accuracy/{source}"] = float(wins[[record.source == source for record in records]].mean())
    return metrics
