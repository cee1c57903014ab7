r"""The pairwise losses: Bradley-Terry, with margin, scaled by strength, soft, with ties, ordinal.

To add a loss, write a function of three arguments and enter it in `LOSSES` under its `loss_type`:

- `delta` `(B,)` fp32, the reward margin of each pair, less TRL's `margin` column where there is one;
- `batch`, the `pairs` of a batch of the collator: vectors `(B,)`, such as `weight`, and `strength` (in [0, 1]) and
  `is_tie` where the set has strengths;
- `config`, the [`MultimodalRewardConfig`], which holds the settings of all losses.

It returns the loss of each pair, `(B,)`. List it in `NEEDS_STRENGTH` or `SCALED_BY_STRENGTH` where that holds, add it
to the table below and to those of the README, `docs/training.md` and `docs/method.md`, and test it in
`tests/training/test_losses.py`. A loss for a single training is passed as it is:
`MultimodalRewardConfig(loss_type=my_loss)`.

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

with c = `margin_scale`, p = `strength_power`. TRL's `margin` column keeps its meaning: it is first subtracted from Δ.
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

STRENGTH_NORMALIZATIONS = ("rank", "quantile", "none")


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
    """Cumulative-logit likelihood of the level that the strength falls into."""
    # σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a)) keeps the difference exact where both are close to 0 or to 1.
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
    """Resolve `"auto"`, and refuse a loss that needs strengths where the training set has none."""
    if loss_type == "auto":
        return "strength_margin" if has_strength else "bt"
    if loss_type in NEEDS_STRENGTH and not has_strength:
        raise ValueError(f'`loss_type="{loss_type}"` needs a `strength` column in the train set.')
    return loss_type


def loss_name(loss_type: str | LossFunction) -> str:
    """Return the name of a loss, or of its function, for logs and files."""
    return loss_type if isinstance(loss_type, str) else getattr(loss_type, "__name__", type(loss_type).__name__)


def pairwise_loss(
    rewards_chosen: torch.Tensor,
    rewards_rejected: torch.Tensor,
    batch: Mapping[str, Any] | None = None,
    config: LossSettings | None = None,
    *,
    loss_type: str | LossFunction = "bt",
) -> torch.Tensor:
    """Compute the loss `(B,)` fp32 of each pair from its rewards `(B,)`."""
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
    if batch.get("margin") is not None:
        delta = delta - batch["margin"].float()
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
    """Return the weight `(B,)` fp32 of each pair: its `weight`, times strength^power for losses scaled by it."""
    weight = batch["weight"].float()
    if loss_type in SCALED_BY_STRENGTH and batch.get("strength") is not None:
        weight = weight * batch["strength"].float() ** config.strength_power
    return weight


@dataclass(frozen=True)
class StrengthNormalizer:
    """A map of raw strengths to [0, 1], per source, relative to the training set's."""

    # `"rank"`: the share of the source's pairs that are weaker, ties counted half, so that the mean is 0.5.
    # `"quantile"`: the strength over the 0.95 quantile of its source, at most 1. `"none"`: the strength, in [0, 1].
    how: str
    neutral: float = 0.5  # of a pair of unknown strength
    seen: dict[str, np.ndarray] = field(default_factory=dict)  # sorted strengths of each source, fp64

    def __call__(self, strength: Sequence[float | None], source: Sequence[str | None]) -> np.ndarray:
        """Map N strengths to `(N,)` fp64."""
        raw, names = _arrays(strength, source)
        known = ~np.isnan(raw)
        if self.how == "none":
            outside = known & ((raw < 0) | (raw > 1))
            if outside.any():
                raise ValueError(
                    f"The strength {raw[outside][0]} lies outside [0, 1]; set `strength_normalization` to "
                    '"rank" or "quantile", or scale the column.'
                )
            return np.where(known, raw, self.neutral)
        result = np.full(len(raw), self.neutral)
        normalize = _rank if self.how == "rank" else _quantile
        for name in set(names[known].tolist()):
            reference = self.seen.get(name)
            if reference is not None and len(reference) > 0:  # otherwise training has not seen the source
                rows = known & (names == name)
                result[rows] = normalize(raw[rows], reference)
        return result


def fit_strength(
    strength: Sequence[float | None], source: Sequence[str | None] | None, *, how: str, neutral: float = 0.5
) -> StrengthNormalizer:
    """Fit the normalizer to a training set's strengths, per source."""
    raw, names = _arrays(strength, source if source is not None else [None] * len(strength))
    known = ~np.isnan(raw)
    seen = {name: np.sort(raw[known & (names == name)]) for name in sorted(set(names.tolist()))}
    return StrengthNormalizer(how=how, neutral=neutral, seen=seen)


def fit_dataset_strength(dataset: Dataset | IterableDataset, *, how: str, neutral: float = 0.5) -> StrengthNormalizer:
    """Fit the normalizer to the columns `strength` and `source` of a data set."""
    if not isinstance(dataset, IterableDataset):
        sources = dataset["source"] if "source" in dataset.column_names else None
        return fit_strength(dataset["strength"], sources, how=how, neutral=neutral)
    if how != "none":
        raise ValueError(
            f'`strength_normalization="{how}"` has to see the whole train set, and it is streamed; scale the '
            '`strength` column to [0, 1] and set "none".'
        )
    return StrengthNormalizer(how=how, neutral=neutral)


def _arrays(strength: Sequence[float | None], source: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Strengths as fp64, NaN where unknown, and the names of their sources, empty where unknown."""
    raw = np.array([np.nan if s is None else s for s in strength], dtype=np.float64)
    return raw, np.array(["" if s is None else s for s in source], dtype=object)


def _rank(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    weaker = np.searchsorted(reference, values, side="left")
    not_stronger = np.searchsorted(reference, values, side="right")
    return (weaker + not_stronger) / (2 * len(reference))


def _quantile(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    scale = np.quantile(reference, 0.95)
    return np.clip(values / scale, 0, 1) if scale > 0 else np.ones_like(values)
