r"""The losses: Bradley-Terry, with margin, scaled by strength, soft, bounded, with ties, ordinal, and listwise.

To add a loss, write a function of three arguments and enter it in `LOSSES` under its `loss_type`:

- `delta` `(B,)` fp32, the reward margin of each pair, less TRL's `margin` column where there is one; where pairs have
  a `label_confidence`, the function is called again with the answers swapped;
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
| `gce` | (1 - σ(Δ)^q) / q | 1 | Zhang and Sabuncu, 2018, arXiv 1805.07836, Eq. 6 |
| `btt` | -log σ(Δ - log k); for ties below | 1 | Rao and Kupper, 1967 |
| `ordinal` | -log[σ(θ_{j+1} - Δ) - σ(θ_j - Δ)] | 1 | McCullagh, 1980; arXiv 2603.02232 |
| `plackett_luce` | -log P of each choice, below | 1 per choice | Plackett, 1975; ListMLE, Xia et al., 2008 |

with c = `margin_scale`, p = `strength_power`, q = `gce_q`. TRL's `margin` column keeps its meaning: it is first
subtracted from Δ.

Where a pair has a `label_confidence` \(\pi\), the probability that its label is right, each loss \(L\) becomes its
expectation \(\pi L(\Delta) + (1 - \pi) L(-\Delta)\). A margin is asked for in both directions: with TRL's margin m,
\(\pi L(\Delta - m) + (1 - \pi) L(-\Delta - m)\). With `bt` that is the cross-entropy with π as the target.

`plackett_luce` takes the pairs of a prompt for the ranking that they come from. Each answer \(i\) that is better than
others is a choice among itself and these, \(j\), with the loss

\[ -\log \frac{e^{r_i}}{e^{r_i} + \sum_j a_{ij} e^{r_j}} = \log \Big(1 + \sum_j a_{ij} e^{-\Delta_{ij}}\Big), \]

so that all pairs of a ranking give its probability as in ListMLE: the best is chosen among all, the next among the
rest. The loss of a step is the mean over choices. Answers that are tied do not compete where they make no pair; a pair
of strength 0 counts half in either direction, and a pair whose label is right with a probability \(\pi\) by
\(\pi\) and \(1 - \pi\). \(a_{ij}\) is the weight of the pair over the largest of its choice, which weighs as
much as that. A choice is among the answers of one batch, where `group_pairs` brings those of a prompt together, and
with two answers, none of them tied, the loss is `bt`. A pair that is there twice, by two votes, weighs twice.

A `blind_margin` \(b\), the log odds of a pair's label to a model that sees no image, may leave the loss with the rest.
`blind_offset`: its \(\Delta\) is \(r_{chosen} - r_{rejected} + b\), so that both models together explain the label,
a product of experts (Clark et al., 2019, arXiv 1909.03683; He et al., 2019, arXiv 1908.10763).
`blind_weighting`: the pair has the further weight \(\ell(b) / (\ell(b) + \ell(\Delta))\), where
\(\ell\) is the loss `bt`; see [`blind_weight`].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.hooks import RemovableHandle

from ..models.shared_prefix import reward_order


# Of `delta`, `batch` and `config`, as above.
LossFunction = Callable[[torch.Tensor, Mapping[str, Any], Any], torch.Tensor]

STRENGTH_NORMALIZATIONS = ("rank", "quantile", "none")


def bradley_terry(delta: torch.Tensor, batch: Mapping[str, Any], config: Any) -> torch.Tensor:
    return -logsigmoid(delta)


def with_margin(delta: torch.Tensor, batch: Mapping[str, Any], config: Any) -> torch.Tensor:
    return -logsigmoid(delta - config.margin_scale * batch["strength"].float())


def soft(delta: torch.Tensor, batch: Mapping[str, Any], config: Any) -> torch.Tensor:
    strength = batch.get("strength")
    target = torch.ones_like(delta) if strength is None else 0.5 + 0.5 * strength.float()
    target = target * (1 - config.label_smoothing) + 0.5 * config.label_smoothing
    return -target * logsigmoid(delta) - (1 - target) * logsigmoid(-delta)


def generalized_cross_entropy(delta: torch.Tensor, batch: Mapping[str, Any], config: Any) -> torch.Tensor:
    """(1 - σ(Δ)^q) / q, in [0, 1/q]: -log σ(Δ) for q to 0, and 1 - σ(Δ) for q = 1. Its slope -σ(Δ)^q σ(-Δ) vanishes
    where the model contradicts the label."""
    return -torch.expm1(config.gce_q * logsigmoid(delta)) / config.gce_q


def rao_kupper(delta: torch.Tensor, batch: Mapping[str, Any], config: Any) -> torch.Tensor:
    """-log P(win) = -log σ(Δ - log k); -log P(tie) = -log σ(Δ - log k) - log σ(-Δ - log k) - log(k^2 - 1)."""
    log_k = torch.tensor(config.tie_factor, device=delta.device).log()
    win = -logsigmoid(delta - log_k)
    if batch.get("is_tie") is None:
        return win
    tie = win - logsigmoid(-delta - log_k) - torch.tensor(config.tie_factor**2 - 1, device=delta.device).log()
    return torch.where(batch["is_tie"], tie, win)


def ordinal(delta: torch.Tensor, batch: Mapping[str, Any], config: Any) -> torch.Tensor:
    """Cumulative-logit likelihood of the level that the strength falls into."""
    # σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a)) keeps the difference exact where both are close to 0 or to 1.
    cuts = torch.tensor([0.0, *config.ordinal_thresholds, float("inf")], device=delta.device)
    num_levels = len(config.ordinal_thresholds) + 1
    level = (batch["strength"].float() * num_levels).long().clamp(max=num_levels - 1)
    low, high = cuts[level], cuts[level + 1]
    upper = torch.where(high.isinf(), torch.zeros_like(delta), logsigmoid(high.clamp(max=1e30) - delta))
    return -(upper + logsigmoid(delta - low) + torch.log1p(-torch.exp(low - high)))


def plackett_luce(delta: torch.Tensor, batch: Mapping[str, Any], config: Any) -> torch.Tensor:
    """Mean loss of the choices that a pair takes part in; margins `(2, B)` are of the pair and of its reverse."""
    choices, share, counted = _choices(batch, torch.ones_like(delta[0]))
    terms = -delta.flatten() + share.log()
    # The answer itself is a term of 0.
    most = _over_choices(choices, terms.detach(), "amax").clamp(min=0)
    total = torch.exp(-most) + _over_choices(choices, torch.exp(terms - most[choices]), "sum")
    loss = counted * (most + total.log())[choices]
    counted, loss = counted.view(2, -1).sum(dim=0), loss.view(2, -1).sum(dim=0)
    return torch.where(counted > 0, loss / counted.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def _choices(batch: Mapping[str, Any], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the choice that each pair and each reversed pair takes part in, an answer of the batch, with its a_ij and
    what it counts for: three vectors `(2B,)`. The counts of a choice add up to its largest weight. `weight` is that of
    pairs that have none."""
    weight = batch.get("weight", weight).float()
    count = len(weight)
    right = batch.get("label_confidence")
    right = torch.ones_like(weight) if right is None else right.float()
    if (is_tie := batch.get("is_tie")) is not None:
        right = torch.where(is_tie, 0.5, right)
    answers = batch.get("answers")
    if answers is None:  # no answer is in two pairs
        answers = torch.arange(2 * count, device=weight.device).view(2, -1).T
    choices = answers[:count].T.flatten()
    others = answers[:count].flip(1).T.flatten()
    weight = torch.cat([weight * right, weight * (1 - right)])
    size = len(choices) + 4  # see `_over_choices`
    same = choices * size + others  # pairs that are there several times are one competitor
    together = weight.new_zeros(size**2).scatter_add(0, same, weight)[same]
    heaviest, total = _over_choices(choices, together, "amax")[choices], _over_choices(choices, weight, "sum")[choices]
    tiny = torch.finfo(torch.float32).tiny
    return choices, weight / heaviest.clamp(min=tiny), weight * heaviest / total.clamp(min=tiny)


def _over_choices(choices: torch.Tensor, values: torch.Tensor, how: str) -> torch.Tensor:
    """Sum values over the choices, or take their maximum: a vector with an entry for each answer, at least."""
    # Each pair has two answers, and so has each of at most two dummies; to ask for the largest would wait for a GPU.
    return values.new_zeros(len(choices) + 4).scatter_reduce(0, choices, values, how, include_self=how == "sum")


LOSSES: dict[str, LossFunction] = {
    "bt": bradley_terry,
    "margin": with_margin,
    "scaled": bradley_terry,
    "strength_margin": with_margin,
    "soft": soft,
    "gce": generalized_cross_entropy,
    "btt": rao_kupper,
    "ordinal": ordinal,
    "plackett_luce": plackett_luce,
}

NEEDS_STRENGTH = ("margin", "scaled", "strength_margin", "ordinal")
SCALED_BY_STRENGTH = ("scaled", "strength_margin")
LISTWISE = ("plackett_luce",)  # their `delta` is `(2, B)`, of each pair and of its reverse


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
    batch: Mapping[str, Any],
    config: Any,
    *,
    loss_type: str | LossFunction = "bt",
) -> torch.Tensor:
    """Compute the loss `(B,)` fp32 of each pair from its rewards `(B,)`."""
    names = ("strength", "margin", "label_confidence")
    vectors = {"rewards_rejected": rewards_rejected, **{name: batch.get(name) for name in names}}
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
    function = LOSSES[loss_type] if isinstance(loss_type, str) else loss_type
    confidence = vectors["label_confidence"]

    def loss_of(delta: torch.Tensor) -> torch.Tensor:
        if vectors["margin"] is not None:
            delta = delta - vectors["margin"].float()
        loss = function(delta, batch, config)
        if loss.shape != delta.shape:
            shapes = f"shape {tuple(loss.shape)}, expected {tuple(delta.shape)}"
            raise ValueError(f"The loss `{loss_name(loss_type)}` has {shapes}: one value per pair.")
        return loss

    delta = chosen - rejected
    if loss_type in LISTWISE:
        loss = function(_both_ways(delta, vectors["margin"]), batch, config)
    elif confidence is None:
        loss = loss_of(delta)
    else:
        # A label that does not count may have an infinite loss, and 0 times that is no number.
        right, wrong = torch.where(confidence > 0, delta, -delta), torch.where(confidence < 1, -delta, delta)
        loss = confidence.float() * loss_of(right) + (1 - confidence.float()) * loss_of(wrong)
    if config.center_rewards_coefficient is not None:
        loss = loss + config.center_rewards_coefficient * (chosen + rejected) ** 2
    return loss


def _both_ways(delta: torch.Tensor, margin: torch.Tensor | None) -> torch.Tensor:
    """Return the reward margins `(2, B)` of pairs and of their reverses, less TRL's `margin`."""
    return torch.stack([delta, -delta]) - (0.0 if margin is None else margin.float())


@torch.enable_grad()
def pair_curvature(
    rewards: torch.Tensor, batch: Mapping[str, Any], config: Any, *, loss_type: str | LossFunction = "bt"
) -> torch.Tensor:
    """Compute the second derivatives `(2, B)` fp32 of each pair's loss from its rewards `(2, B)`: by their difference,
    and by their sum, which `center_rewards_coefficient` alone curves. Where a loss is concave, its curvature counts
    as 0."""
    if loss_type in LISTWISE:
        return _listwise_curvature(rewards, batch, config, loss_type=cast(str, loss_type))
    by_difference, by_sum = shifts = [torch.zeros_like(rewards[0], requires_grad=True) for _ in range(2)]
    chosen = rewards[0].detach() + (by_sum + by_difference) / 2
    rejected = rewards[1].detach() + (by_sum - by_difference) / 2
    total = pairwise_loss(chosen, rejected, batch, config, loss_type=loss_type).sum()
    slopes = torch.autograd.grad(total, shifts, create_graph=True)
    curvatures = []
    for slope, shift in zip(slopes, shifts, strict=True):
        # A piecewise linear loss has none.
        second = (
            torch.autograd.grad(slope.sum(), shift, retain_graph=True, allow_unused=True)
            if slope.requires_grad
            else (None,)
        )
        curvatures.append(torch.zeros_like(shift) if second[0] is None else second[0])
    return torch.stack(curvatures).detach().clamp(min=0)


def _listwise_curvature(
    rewards: torch.Tensor, batch: Mapping[str, Any], config: Any, *, loss_type: str
) -> torch.Tensor:
    """Compute [`pair_curvature`] of a choice against its competitors; that of these against each other, which no pair
    of the choice is, is left out, so that with three answers or more it is too small and not too large."""
    margins = _both_ways(rewards[0].float() - rewards[1].float(), batch.get("margin")).detach().requires_grad_()
    share = pair_weight(batch, config, loss_type)
    total = (share * LOSSES[loss_type](margins, batch, config)).sum()
    (slope,) = torch.autograd.grad(total, margins, create_graph=True)
    # Rows of the Hessian of a choice add up to the chance of the answer times that of the competitor.
    (rows,) = torch.autograd.grad(slope.sum(), margins)
    by_difference = (rows.sum(dim=0) / share.clamp(min=1e-12)).clamp(min=0)
    return torch.stack([by_difference, torch.full_like(by_difference, 2 * (config.center_rewards_coefficient or 0.0))])


def pair_weight(batch: Mapping[str, torch.Tensor], config: Any, loss_type: str | LossFunction) -> torch.Tensor:
    """Return the weight `(B,)` fp32 of each pair: its `weight`, times strength^power for losses scaled by it, or its
    share of the choices of a listwise loss."""
    if loss_type in LISTWISE:
        return _choices(batch, batch["weight"])[2].view(2, -1).sum(dim=0)
    weight = batch["weight"].float()
    if loss_type in SCALED_BY_STRENGTH and batch.get("strength") is not None:
        weight = weight * batch["strength"].float() ** config.strength_power
    return weight


def with_blind_margin(rewards: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Move rewards `(2, B)` of chosen and rejected apart by the `blind_margin` of each pair, where it is known."""
    if (blind := batch.get("blind_margin")) is None:
        return rewards
    half = torch.where(blind.isnan(), 0.0, blind / 2)  # by halves, so that their sum, which may be centered, stays
    return rewards.float() + torch.stack([half, -half])


@torch.no_grad()
def blind_weight(rewards: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    r"""
    Compute the share of each pair's loss that counts where the pair can be told without its image.

    It is \(\ell(b) / (\ell(b) + \ell(\Delta))\) with \(\ell(x) = -\log \sigma(x)\), the blind margin \(b\) and the
    reward margin \(\Delta\): the shortcut-failure coefficient of arXiv 2503.03122. \(\ell\) is the plain loss of
    Bradley and Terry under any `loss_type`, so that both are measured alike: strengths and TRL's `margin` do not
    enter. Where the pair has a `label_confidence`, it is the expectation over both labels.

    Args:
        rewards (`torch.Tensor`):
            Rewards `(2, B)` of chosen and rejected.
        batch (`Mapping[str, torch.Tensor]`):
            Vectors `(B,)`: `blind_margin`, NaN where it is not known, and `label_confidence`; either may be absent.

    Returns:
        `torch.Tensor`: `(B,)` fp32 in [0, 1], detached; 1 for a pair without a blind margin.
    """
    blind, confidence = batch.get("blind_margin"), batch.get("label_confidence")
    if blind is None:
        return torch.ones_like(rewards[0], dtype=torch.float32)
    delta = rewards[0].float() - rewards[1].float()
    logs = [_log_bradley_terry(margin.float(), confidence) for margin in (blind, delta)]
    # In logarithms, so that two losses of zero have a ratio.
    return torch.where(blind.isnan(), 1.0, torch.sigmoid(logs[0] - logs[1]))


def _log_bradley_terry(margin: torch.Tensor, confidence: torch.Tensor | None) -> torch.Tensor:
    """Logarithm `(B,)` of the loss `bt`, which is finite for any finite margin."""

    def log_loss(x: torch.Tensor) -> torch.Tensor:
        loss = -logsigmoid(x)  # close to exp(-x) where x is large
        return torch.where(x > 15, -x, loss.log())

    if confidence is None:
        return log_loss(margin)
    share = confidence.float()
    return torch.logaddexp(share.log() + log_loss(margin), (1 - share).log() + log_loss(-margin))


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
            if len(outside := raw[(raw < 0) | (raw > 1)]):
                raise ValueError(
                    f"The strength {outside[0]} lies outside [0, 1]; set `strength_normalization` to "
                    '"rank" or "quantile", or scale the column.'
                )
            return np.where(known, raw, self.neutral)
        result = np.full(len(raw), self.neutral)
        for name in set(names[known]) & self.seen.keys():  # a source that training has not seen stays neutral
            rows, seen = known & (names == name), self.seen[name]
            if self.how == "rank":
                weaker, not_stronger = (np.searchsorted(seen, raw[rows], side=side) for side in ("left", "right"))
                result[rows] = (weaker + not_stronger) / (2 * len(seen))
            else:
                scale = np.quantile(seen, 0.95)
                result[rows] = np.clip(raw[rows] / scale, 0, 1) if scale > 0 else 1
        return result


def fit_strength(
    strength: Sequence[float | None], source: Sequence[str | None] | None, *, how: str, neutral: float = 0.5
) -> StrengthNormalizer:
    """Fit the normalizer to a training set's strengths, per source."""
    raw, names = _arrays(strength, source if source is not None else [None] * len(strength))
    known = ~np.isnan(raw)
    seen = {name: np.sort(raw[known & (names == name)]) for name in sorted(set(names[known]))}
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
    return np.array([*strength], dtype=np.float64), np.array(["" if s is None else s for s in source], dtype=object)


def pair_rewards(
    model: nn.Module, tensors: dict[str, torch.Tensor], num_pairs: int, answers: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the rewards `(2, B + D)` fp32 of B pairs and D dummies; `answers` `(B + D, 2)` if they share some."""
    logits = model(**tensors, use_cache=False).logits
    if answers is not None:
        return logits.float().flatten()[answers.T]
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

    def on(self, model: Any) -> RemovableHandle:
        """Add noise while a model trains, of the batches passed to `see`, until the context of the handle ends."""
        return model.get_input_embeddings().register_forward_hook(self._add)

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Take the lengths of a batch, before the model reads it."""
        if (layout := inputs.get("pair_layout")) is not None:
            longest = layout[:, 0] + layout[:, 1:].amax(dim=1)
            self._lengths = longest.repeat_interleave(layout.sum(dim=1))[None]  # (1, T)
            return
        mask = inputs["attention_mask"]
        lengths = mask.sum(dim=1)
        if (counts := inputs["pairs"].get("num_answers")) is not None:
            prompts = torch.tensor([prompt for prompt, _ in reward_order(counts.tolist())], device=mask.device)
            longest = lengths.new_zeros(len(counts)).scatter_reduce(0, prompts, lengths, "amax")[prompts]
        else:  # all chosen come before all rejected
            longest = lengths.view(2, -1).amax(dim=0).repeat(2)
        self._lengths = longest[:, None].expand(mask.shape)  # (R, L)

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


class TrainMetrics:
    """Sums over the pairs and tokens since the last log, on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        # MPS has no fp64; the counts of one logging window fit fp32 there.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # Pairs, wins of chosen, margins, rewards, tokens; pairs with a blind margin, those that it tells rightly, the
        # shares of their losses that count, the weights of all pairs, and their squares.
        self.sums = torch.zeros(10, dtype=dtype, device=device)
        self.bounds = self.sums.new_full((2,), float("-inf"))  # highest negated reward, highest reward

    @torch.no_grad()
    def add(
        self,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        num_tokens: torch.Tensor,
        blind_margin: torch.Tensor | None = None,
        weighted: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Add a batch: rewards `(B,)` and its number of tokens, a scalar; blind margins that count, NaN where there is
        none, and with blind weighting the shares of the losses that count, and the weights of all, each `(B,)`."""
        both = torch.stack([chosen, rejected]).to(self.sums)
        margins = both[0] - both[1]
        batch = [torch.ones_like(margins), both[0] > both[1], margins, both[0] + both[1], num_tokens]
        unknown = torch.full_like(margins, torch.nan)
        blind_margin = unknown if blind_margin is None else blind_margin
        batch += [~blind_margin.isnan(), blind_margin > 0]
        if weighted is not None:
            share, weight = weighted
            batch += [share * batch[-2], weight, weight.to(self.sums) ** 2]
        self.sums[: len(batch)] += torch.stack([values.sum().to(self.sums) for values in batch])
        self.bounds = torch.maximum(self.bounds, torch.stack([-both.min(), both.max()]))

    def collect(self, accelerator: Accelerator) -> tuple[dict[str, float], int]:
        """Return the metrics and number of tokens of all processes since the last call; all must call it."""
        everywhere = accelerator.gather(torch.cat([self.sums, self.bounds])[None])  # (processes, 12)
        pairs, wins, margins, rewards, tokens, *blind = everywhere[:, :10].sum(0).tolist()
        known, blind_wins, shares, weight, squares = blind
        negated_low, high = everywhere[:, 10:].amax(0).tolist()
        self.sums.zero_()
        self.bounds.fill_(float("-inf"))
        if pairs == 0:
            return {}, 0
        metrics = {"min_reward": -negated_low, "mean_reward": rewards / (2 * pairs), "max_reward": high}
        if known:
            metrics["blind/accuracy"] = blind_wins / known
        if known and squares:
            metrics["blind/weight"] = shares / known
        if squares:  # as many pairs of equal weight determine a mean as well
            metrics["blind/effective_pairs"] = weight**2 / (pairs * squares)
        return {**metrics, "accuracy": wins / pairs, "margin": margins / pairs}, int(tokens)


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
