r"""The pairwise losses: Bradley-Terry, with margin, scaled by strength, soft, with ties, ordinal.

To add a loss, write a function of three arguments and enter it in `LOSSES` under its `loss_type`:

- `delta` `(B,)` fp32, the difference of the rewards of chosen and rejected, less TRL's `margin` where there is one;
- `batch`, the `pairs` of a batch of the collator: vectors `(B,)`, such as `weight`, and `strength` (in [0, 1]) and
  `is_tie` where the set has strengths;
- `config`, the [`MultimodalRewardConfig`], which holds the settings of all losses.

It returns the loss of each pair, `(B,)`. Name it in `NEEDS_STRENGTH` or `SCALED_BY_STRENGTH` where that holds, and add
it to the tables below, in the README, `docs/training.md` and `docs/method.md`, and to `tests/training/test_losses.py`.
A loss that only one training needs is passed as it is: `MultimodalRewardConfig(loss_type=my_loss)`.

With \(\Delta = r_{chosen} - r_{rejected}\), preference strength \(s \in [0, 1]\) and \(\sigma\) the logistic function,
the losses are

| `loss_type` | loss of a pair | weight of a pair | source |
|---|---|---|---|
| `bt` | -log σ(Δ) | 1 | Bradley and Terry, 1952 |
| `margin` | -log σ(Δ - c s) | 1 | Llama 2, arXiv 2307.09288, Eq. 2 |
| `scaled` | -log σ(Δ) | s^p | HelpSteer2-Preference, arXiv 2410.01257, Eq. 4 |
| `strength_margin` | -log σ(Δ - c s) | s^p | both of the above |
| `soft` | -z log σ(Δ) - (1 - z) log σ(-Δ) | 1 | arXiv 2411.12843; z = (1 + s) / 2, then label smoothing |
| `btt` | -log σ(Δ - log k); for ties below | 1 | Rao and Kupper, 1967 |
| `ordinal` | -log[σ(θ_{j+1} - Δ) - σ(θ_j - Δ)] | 1 | McCullagh, 1980; arXiv 2603.02232 |

with c = `margin_scale`, p = `strength_power`. TRL's own `margin` column, where there is one, is subtracted from Δ
before any of this, so it keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.nn.functional import logsigmoid


class LossSettings(Protocol):
    """The fields of [`MultimodalRewardConfig`] that the losses read."""

    margin_scale: float
    strength_power: float
    label_smoothing: float
    tie_factor: float
    ordinal_thresholds: list[float]
    center_rewards_coefficient: float | None


LossFunction = Callable[[torch.Tensor, Mapping[str, Any], LossSettings], torch.Tensor]


def bradley_terry(delta: torch.Tensor, batch: Mapping[str, Any], config: LossSettings) -> torch.Tensor:
    return -logsigmoid(delta)


def with_margin(delta: torch.Tensor, batch: Mapping[str, Any], config: LossSettings) -> torch.Tensor:
    return -logsigmoid(delta - config.margin_scale * batch["strength"].float())


def soft(delta: torch.Tensor, batch: Mapping[str, Any], config: LossSettings) -> torch.Tensor:
    strength = batch.get("strength")
    target = torch.ones_like(delta) if strength is None else 0.5 + 0.5 * strength.float()
    target = target * (1 - config.label_smoothing) + 0.5 * config.label_smoothing
    return -target * logsigmoid(delta) - (1 - target) * logsigmoid(-delta)


def rao_kupper(delta: torch.Tensor, batch: Mapping[str, Any], config: LossSettings) -> torch.Tensor:
    """-log P(win) = -log σ(Δ - log k); -log P(tie) = -log σ(Δ - log k) - log σ(-Δ - log k) - log(k^2 - 1)."""
    log_k = torch.tensor(config.tie_factor, device=delta.device).log()
    win = -logsigmoid(delta - log_k)
    if batch.get("is_tie") is None:
        return win
    tie = win - logsigmoid(-delta - log_k) - torch.tensor(config.tie_factor**2 - 1, device=delta.device).log()
    return torch.where(batch["is_tie"], tie, win)


def ordinal(delta: torch.Tensor, batch: Mapping[str, Any], config: LossSettings) -> torch.Tensor:
    """Cumulative-logit likelihood of the level that the strength falls into.

    σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a)) keeps the difference exact where both are close to 0 or to 1.
    """
    cuts = torch.tensor([0.0, *config.ordinal_thresholds, float("inf")], device=delta.device)
    num_levels = len(config.ordinal_thresholds) + 1
    level = (batch["strength"].float() * num_levels).long().clamp(max=num_levels - 1)
    low, high = cuts[level], cuts[level + 1]
    upper = torch.where(high.isinf(), torch.zeros_like(delta), logsigmoid(high.clamp(max=1e30) - delta))
    return -(upper + logsigmoid(delta - low) + torch.log1p(-torch.exp(low - high)))


LOSSES: dict[str, LossFunction] = {
    "bt": bradley_terry,
    "margin": with_margin,
    "scaled": bradley_terry,
    "strength_margin": with_margin,
    "soft": soft,
    "btt": rao_kupper,
    "ordinal": ordinal,
}

NEEDS_STRENGTH = ("margin", "scaled", "strength_margin", "ordinal")

SCALED_BY_STRENGTH = ("scaled", "strength_margin")


def loss_type_for(loss_type: str | LossFunction, *, has_strength: bool) -> str | LossFunction:
    """Resolve `"auto"`, and refuse a loss that means nothing without strengths where the training set has none."""
    if loss_type == "auto":
        return "strength_margin" if has_strength else "bt"
    if loss_type in NEEDS_STRENGTH and not has_strength:
        raise ValueError(f'`loss_type="{loss_type}"` needs a `strength` column in the train set.')
    return loss_type


def loss_name(loss_type: str | LossFunction) -> str:
    """Name of a loss, for logs and files; a function goes by its own."""
    return loss_type if isinstance(loss_type, str) else getattr(loss_type, "__name__", type(loss_type).__name__)


def pairwise_loss(
    rewards_chosen: torch.Tensor,
    rewards_rejected: torch.Tensor,
    batch: Mapping[str, Any] | None = None,
    config: LossSettings | None = None,
    *,
    loss_type: str | LossFunction = "bt",
) -> torch.Tensor:
    """Loss of each pair, in fp32.

    Shapes: `rewards_chosen` `(B,)`, `rewards_rejected` `(B,)`, returns `(B,)` `float32`.
    """
    batch = batch or {}
    vectors = {"rewards_rejected": rewards_rejected, "strength": batch.get("strength"), "margin": batch.get("margin")}
    for name, vector in vectors.items():
        # A (B, 1) vector against a (B,) one would broadcast to (B, B) and give a plausible, wrong number.
        if vector is not None and vector.shape != rewards_chosen.shape:
            raise ValueError(f"`{name}` has shape {tuple(vector.shape)}, expected {tuple(rewards_chosen.shape)}.")
    if rewards_chosen.dim() != 1:
        raise ValueError(f"`rewards_chosen` has shape {tuple(rewards_chosen.shape)}, expected one dimension.")
    if isinstance(loss_type, str) and loss_type not in LOSSES:
        raise ValueError(f"Unknown loss_type {loss_type!r}; choose one of {', '.join(LOSSES)}.")
    if loss_type in NEEDS_STRENGTH and vectors["strength"] is None:
        raise ValueError(f'loss_type="{loss_type}" needs a strength for each pair.')

    chosen, rejected = rewards_chosen.float(), rewards_rejected.float()
    delta = chosen - rejected
    if vectors["margin"] is not None:
        delta = delta - vectors["margin"].float()
    function = LOSSES[loss_type] if isinstance(loss_type, str) else loss_type
    loss = function(delta, batch, cast(LossSettings, config))
    if loss.shape != delta.shape:
        raise ValueError(
            f"The loss `{loss_name(loss_type)}` has shape {tuple(loss.shape)}, expected {tuple(delta.shape)}: one "
            "value per pair, which the trainer averages."
        )
    if config is not None and config.center_rewards_coefficient is not None:
        loss = loss + config.center_rewards_coefficient * (chosen + rejected) ** 2
    return loss


def pair_weight(
    batch: Mapping[str, torch.Tensor], config: LossSettings, loss_type: str | LossFunction
) -> torch.Tensor:
    """Weight of each pair in the average, `(B,)` fp32: the `weight` column, and strength^power for losses scaled by
    it.
    """
    weight = batch["weight"].float()
    if loss_type in SCALED_BY_STRENGTH and batch.get("strength") is not None:
        weight = weight * batch["strength"].float() ** config.strength_power
    return weight


STRENGTH_NORMALIZATIONS = ("rank", "quantile", "none")


@dataclass(frozen=True)
class StrengthNormalizer:
    """Maps raw strengths to [0, 1], per source, after what was seen by [`fit_strength`]."""

    # `"rank"`: the share of the source's pairs that are weaker, ties counted half, so that the mean is 0.5.
    # `"quantile"`: the strength over the 0.95 quantile of its source, cut at 1. `"none"`: left as it is; it must lie
    # in [0, 1]
    how: str
    neutral: float = 0.5  # What a pair of unknown strength gets
    seen: dict[str, np.ndarray] = field(default_factory=dict)  # Sorted strengths of each source, fp64

    def __call__(self, strength: Sequence[float | None], source: Sequence[str | None]) -> np.ndarray:
        """

        Shapes: returns `(N,)` `float64`.
        """
        raw = np.array([np.nan if s is None else s for s in strength], dtype=np.float64)
        result = np.full(len(raw), self.neutral)
        known = ~np.isnan(raw)
        if self.how == "none":
            outside = known & ((raw < 0) | (raw > 1))
            if outside.any():
                raise ValueError(
                    f"The strength {raw[outside][0]} lies outside [0, 1]; set `strength_normalization` to "
                    '"rank" or "quantile", or scale the column.'
                )
            result[known] = raw[known]
            return result
        names = np.array([_name(s) for s in source], dtype=object)
        for name in set(names[known].tolist()):
            rows = known & (names == name)
            reference = self.seen.get(name)
            if reference is None or len(reference) == 0:  # a source that training has not seen
                continue
            result[rows] = _rank(raw[rows], reference) if self.how == "rank" else _quantile(raw[rows], reference)
        return result


def fit_strength(
    strength: Sequence[float | None], source: Sequence[str | None] | None, *, how: str, neutral: float = 0.5
) -> StrengthNormalizer:
    """Looks at a training set's strengths, per source, and returns the map that puts them on a common scale."""
    raw = np.array([np.nan if s is None else s for s in strength], dtype=np.float64)
    names = np.array([_name(s) for s in (source if source is not None else [None] * len(raw))], dtype=object)
    known = ~np.isnan(raw)
    seen = {name: np.sort(raw[known & (names == name)]) for name in sorted(set(names.tolist()))}
    return StrengthNormalizer(how=how, neutral=neutral, seen=seen)


def fit_dataset_strength(dataset: Dataset | IterableDataset, *, how: str, neutral: float = 0.5) -> StrengthNormalizer:
    """As [`fit_strength`], for the columns `strength` and `source` of a data set."""
    if not isinstance(dataset, IterableDataset):
        sources = dataset["source"] if "source" in dataset.column_names else None
        return fit_strength(dataset["strength"], sources, how=how, neutral=neutral)
    if how != "none":
        raise ValueError(
            f'`strength_normalization="{how}"` has to see the whole train set, and it is streamed; scale the '
            '`strength` column to [0, 1] and set "none".'
        )
    return StrengthNormalizer(how=how, neutral=neutral)


def _name(source: str | None) -> str:
    return "" if source is None else source


def _rank(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    weaker = np.searchsorted(reference, values, side="left")
    not_stronger = np.searchsorted(reference, values, side="right")
    return (weaker + not_stronger) / (2 * len(reference))


def _quantile(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    scale = np.quantile(reference, 0.95)
    return np.clip(values / scale, 0, 1) if scale > 0 else np.ones_like(values)
