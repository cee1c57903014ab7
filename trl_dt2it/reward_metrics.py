"""Exact training and evaluation metrics under the names that TRL logs.

TRL averages the means of batches, which is wrong when batches differ in size, and on several processes counts the
rows twice that pad the last batch (huggingface/trl#7010). Here sums are kept in training, and one record per pair in
evaluation, see [`~trl_dt2it.eval_batches`].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from .batch_loss import BatchLoss


class PairRecord(NamedTuple):
    """What evaluation keeps of a pair. `position` is its index in the evaluation set."""

    position: int
    chosen: float
    rejected: float
    loss: float
    weight: float
    source: str | None


@dataclass
class TrainMetrics:
    """Running sums over the pairs and tokens since the last log, kept on the device so that no step waits for them."""

    sums: torch.Tensor | None = None  # (5,) fp64: pairs, wins of chosen, sum of differences, sum of rewards, tokens
    low: torch.Tensor = field(default_factory=lambda: torch.tensor(float("inf")))
    high: torch.Tensor = field(default_factory=lambda: torch.tensor(float("-inf")))

    @torch.no_grad()
    def add(self, chosen: torch.Tensor, rejected: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Adds a batch: rewards of shape `(B,)`, and its number of tokens, a scalar."""
        # MPS has no fp64; the counts of one logging window fit fp32 there.
        dtype = torch.float32 if chosen.device.type == "mps" else torch.float64
        chosen, rejected = chosen.to(dtype), rejected.to(dtype)
        batch = torch.stack(
            [
                torch.tensor(len(chosen), dtype=dtype, device=chosen.device),
                (chosen > rejected).sum().to(dtype),
                (chosen - rejected).sum(),
                (chosen + rejected).sum(),
                num_tokens.to(dtype),
            ]
        )
        both = torch.cat([chosen, rejected])
        self.sums = batch if self.sums is None else self.sums + batch
        self.low = torch.minimum(self.low.to(both), both.min())
        self.high = torch.maximum(self.high.to(both), both.max())

    def collect(self, accelerator: Accelerator) -> tuple[dict[str, float], int]:
        """
        Metrics over all processes since the last call, and the number of tokens; all processes must call it.

        Returns:
            `tuple[dict[str, float], int]`: `min_reward`, `mean_reward`, `max_reward`, `accuracy` and `margin`, or an
            empty dict when there was no pair; tokens of all processes.
        """
        if self.sums is None:  # here, but perhaps not on other processes
            dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
            self.sums = torch.zeros(5, dtype=dtype, device=accelerator.device)
        bounds = torch.stack([self.low.to(self.sums), self.high.to(self.sums)])
        everywhere = accelerator.gather(torch.cat([self.sums, bounds])[None])  # (processes, 7)
        pairs, wins, differences, rewards, tokens = everywhere[:, :5].sum(0).tolist()
        low, high = everywhere[:, 5].min().item(), everywhere[:, 6].max().item()
        self.sums, self.low, self.high = None, torch.tensor(float("inf")), torch.tensor(float("-inf"))
        if pairs == 0:
            return {}, 0
        return {
            "min_reward": low,
            "mean_reward": rewards / (2 * pairs),
            "max_reward": high,
            "accuracy": wins / pairs,
            "margin": differences / pairs,
        }, int(tokens)


def pair_records(positions: Sequence[int], pairs: Mapping[str, Any], found: BatchLoss) -> list[PairRecord]:
    """What evaluation keeps of a batch, of its `pairs` and of what [`batch_loss`] gave for them."""
    columns = (positions, *found.rewards.T.tolist(), found.losses.tolist(), found.weights.tolist(), pairs["source"])
    return [PairRecord(*values) for values in zip(*columns, strict=True)]


def evaluation_metrics(records: Sequence[PairRecord]) -> dict[str, float]:
    """
    Metrics of an evaluation set from one record per pair.

    Args:
        records (`Sequence[PairRecord]`):
            The pairs, each of them once.

    Returns:
        `dict[str, float]`: `loss` (averaged with the weights), `min_reward`, `mean_reward`, `max_reward`, `accuracy`
        (share with r_chosen > r_rejected; a tie counts as wrong), `margin`, and `accuracy/<source>` where pairs have
        a source. Empty without records.
    """
    if not records:
        return {}
    chosen = np.array([r.chosen for r in records])
    rejected = np.array([r.rejected for r in records])
    loss = np.array([r.loss for r in records])
    weight = np.array([r.weight for r in records])
    wins = chosen > rejected
    metrics = {
        "loss": float(np.average(loss, weights=weight)) if weight.sum() > 0 else 0.0,
        "min_reward": float(min(chosen.min(), rejected.min())),
        "mean_reward": float((chosen + rejected).mean() / 2),
        "max_reward": float(max(chosen.max(), rejected.max())),
        "accuracy": float(wins.mean()),
        "margin": float((chosen - rejected).mean()),
    }
    for source in sorted({r.source for r in records if r.source is not None}):
        metrics[f"accuracy/{source}"] = float(wins[[r.source == source for r in records]].mean())
    return metrics
