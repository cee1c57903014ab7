r"""The family of pairwise losses: Bradley-Terry, with margin, scaled by strength, soft, with ties, ordinal.

Everything here is a function of vectors of shape `(B,)` in fp32, one entry per pair, and gives one loss per pair;
the trainer averages them with the weights. With \(\Delta = r_{chosen} - r_{rejected}\), preference strength
\(s \in [0, 1]\) and \(\sigma\) the logistic function, the losses are

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

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch.nn.functional import logsigmoid


LossType = Literal["bt", "margin", "scaled", "strength_margin", "soft", "btt", "ordinal"]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)
# The losses that mean nothing without a strength.
STRENGTH_LOSS_TYPES = ("margin", "scaled", "strength_margin", "ordinal")


def loss_type_for(loss_type: str, *, has_strength: bool) -> str:
    """
    The loss that a configuration's `loss_type` stands for.

    Args:
        loss_type (`str`):
            `"auto"` or one of `LOSS_TYPES`.
        has_strength (`bool`):
            Whether the training set has a `strength` column.

    Returns:
        `str`: one of `LOSS_TYPES`.

    Raises:
        `ValueError`: if the loss means nothing without strengths and there are none.
    """
    if loss_type == "auto":
        return "strength_margin" if has_strength else "bt"
    if loss_type in STRENGTH_LOSS_TYPES and not has_strength:
        raise ValueError(f'`loss_type="{loss_type}"` needs a `strength` column in the train set.')
    return loss_type


def pairwise_loss(
    rewards_chosen: torch.Tensor,
    rewards_rejected: torch.Tensor,
    *,
    loss_type: str = "bt",
    strength: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
    is_tie: torch.Tensor | None = None,
    margin_scale: float = 1.0,
    label_smoothing: float = 0.0,
    tie_factor: float = 5.0,
    ordinal_thresholds: Sequence[float] = (1.0, 2.0, 3.0),
    center_rewards_coefficient: float | None = None,
) -> torch.Tensor:
    """
    Loss of each pair, in fp32.

    Args:
        rewards_chosen (`torch.Tensor` of shape `(B,)`):
            Rewards of the preferred answers, of any float dtype.
        rewards_rejected (`torch.Tensor` of shape `(B,)`):
            Rewards of the others.
        loss_type (`str`, *optional*, defaults to `"bt"`):
            One of `LOSS_TYPES`; the formulas stand at the head of this module.
        strength (`torch.Tensor` of shape `(B,)`, *optional*):
            Normalised preference strength in [0, 1].
        margin (`torch.Tensor` of shape `(B,)`, *optional*):
            TRL's `margin` column, in units of reward; subtracted from the difference of the rewards.
        is_tie (`torch.Tensor` of shape `(B,)` and dtype `bool`, *optional*):
            Pairs without a winner; only `"btt"` can use them.
        margin_scale (`float`, *optional*, defaults to `1.0`):
            Margin of a pair of strength 1, in units of reward.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            For `"soft"`: share, in [0, 1), of the target that is spread over both answers.
        tie_factor (`float`, *optional*, defaults to `5.0`):
            For `"btt"`: Rao and Kupper's k > 1; a difference below log k counts as hardly noticeable.
        ordinal_thresholds (`Sequence[float]`, *optional*, defaults to `(1.0, 2.0, 3.0)`):
            For `"ordinal"`: increasing positive cut points θ_1 < ... < θ_{K-1}, in units of reward, between the K
            levels into which [0, 1] is cut evenly. θ_0 is 0 and θ_K infinite.
        center_rewards_coefficient (`float`, *optional*):
            Adds this times (r_chosen + r_rejected)^2 (arXiv 2312.09244, Eq. 2).

    Returns:
        `torch.Tensor` of shape `(B,)` and dtype `float32`, >= 0.

    Raises:
        `ValueError`: if a vector does not have shape `(B,)`, if `loss_type` is unknown, or if it needs a strength and
        none is given.
    """
    for name, vector in (("rewards_rejected", rewards_rejected), ("strength", strength), ("margin", margin)):
        # A (B, 1) vector against a (B,) one would broadcast to (B, B) and give a plausible, wrong number.
        if vector is not None and vector.shape != rewards_chosen.shape:
            raise ValueError(f"`{name}` has shape {tuple(vector.shape)}, expected {tuple(rewards_chosen.shape)}.")
    if rewards_chosen.dim() != 1:
        raise ValueError(f"`rewards_chosen` has shape {tuple(rewards_chosen.shape)}, expected one dimension.")
    if loss_type in STRENGTH_LOSS_TYPES and strength is None:
        raise ValueError(f'loss_type="{loss_type}" needs a strength for each pair.')

    chosen, rejected = rewards_chosen.float(), rewards_rejected.float()
    delta = chosen - rejected
    if margin is not None:
        delta = delta - margin.float()

    if loss_type in ("bt", "scaled"):
        loss = -logsigmoid(delta)
    elif loss_type in ("margin", "strength_margin"):
        loss = -logsigmoid(delta - margin_scale * strength.float())  # type: ignore[union-attr]  # not None here
    elif loss_type == "soft":
        target = torch.ones_like(delta) if strength is None else 0.5 + 0.5 * strength.float()
        target = target * (1 - label_smoothing) + 0.5 * label_smoothing
        loss = -target * logsigmoid(delta) - (1 - target) * logsigmoid(-delta)
    elif loss_type == "btt":
        loss = _rao_kupper(delta, is_tie, tie_factor)
    elif loss_type == "ordinal":
        loss = _ordinal(delta, strength.float(), ordinal_thresholds)  # type: ignore[union-attr]  # nor here: checked above
    else:
        raise ValueError(f"Unknown loss_type {loss_type!r}; choose one of {', '.join(LOSS_TYPES)}.")

    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * (chosen + rejected) ** 2
    return loss


def pair_weight(
    loss_type: str,
    *,
    weight: torch.Tensor,
    strength: torch.Tensor | None = None,
    strength_power: float = 1.0,
) -> torch.Tensor:
    """
    Weight of each pair in the average: the `weight` column, times strength^power for the losses that scale by it.

    Args:
        loss_type (`str`):
            One of `LOSS_TYPES`.
        weight (`torch.Tensor` of shape `(B,)`):
            The `weight` column, >= 0, with 1 where there is none.
        strength (`torch.Tensor` of shape `(B,)`, *optional*):
            Normalised preference strength in [0, 1].
        strength_power (`float`, *optional*, defaults to `1.0`):
            Exponent of the strength.

    Returns:
        `torch.Tensor` of shape `(B,)` and dtype `float32`.
    """
    if loss_type in ("scaled", "strength_margin") and strength is not None:
        return weight.float() * strength.float() ** strength_power
    return weight.float()


def _rao_kupper(delta: torch.Tensor, is_tie: torch.Tensor | None, tie_factor: float) -> torch.Tensor:
    """-log P(win) = -log σ(Δ - log k); -log P(tie) = -log σ(Δ - log k) - log σ(-Δ - log k) - log(k^2 - 1)."""
    log_k = torch.tensor(tie_factor, device=delta.device).log()
    win = -logsigmoid(delta - log_k)
    if is_tie is None:
        return win
    tie = win - logsigmoid(-delta - log_k) - torch.tensor(tie_factor**2 - 1, device=delta.device).log()
    return torch.where(is_tie, tie, win)


def _ordinal(delta: torch.Tensor, strength: torch.Tensor, thresholds: Sequence[float]) -> torch.Tensor:
    """Cumulative-logit likelihood of the level that the strength falls into.

    σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a)) keeps the difference exact where both are close to 0 or to 1."""
    infinity = float("inf")
    cuts = torch.tensor([0.0, *thresholds, infinity], device=delta.device)
    num_levels = len(thresholds) + 1
    level = (strength * num_levels).long().clamp(max=num_levels - 1)
    low, high = cuts[level], cuts[level + 1]
    upper = torch.where(high.isinf(), torch.zeros_like(delta), logsigmoid(high.clamp(max=1e30) - delta))
    return -(upper + logsigmoid(delta - low) + torch.log1p(-torch.exp(low - high)))
