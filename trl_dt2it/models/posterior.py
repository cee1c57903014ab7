r"""Uncertainty of rewards: a Laplace posterior of the linear `score` head, and its file beside the model.

A reward is linear in what the head reads, \(r = w \cdot \phi\) (a bias cancels in every difference), and the loss
of a pair is a function of \(w \cdot x\) with \(x = \phi_{chosen} - \phi_{rejected}\). Around the trained weights
the posterior is the Gaussian \(N(w, S)\) with

\(S^{-1} = H + \lambda I, \qquad H = \sum_i c_i \ell''_i x_i x_i^T,\)

where c is the weight of a pair and \(\ell''\) the second derivative of its loss. The prior \(N(0, I / \lambda)\) has
mean zero: about the trained weights themselves, the marginal likelihood would favor a prior without any width. Its
precision maximizes the marginal likelihood of Laplace's approximation (MacKay, 1992, "Bayesian interpolation"; for the
last layer alone: Daxberger et al., 2021, arXiv 2106.14806),

\(\tfrac{d}{2} \log \lambda - \tfrac{\lambda}{2} |w|^2 - \tfrac{1}{2} \log \det(H + \lambda I),\)

whose one maximum solves \(\sum_j h_j / (h_j + \lambda) = \lambda |w|^2\) with the eigenvalues h of H.

Two kinds of pairs tell less than others. With a `label_confidence` \(\pi\), \(\ell''\) is taken times
\((2 \pi - 1)^2\), the share of a pair's Fisher information at margin 0 that labels which are right with probability
\(\pi\) leave: a coin flip tells nothing, though its cross-entropy is curved. And where a loss is concave, as `gce` is
on pairs that the model contradicts, \(\ell''\) counts as 0, so that they determine nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.optimize import brentq
from torch import nn
from transformers.utils import cached_file

from ..utils import whole_file
from .modeling import is_head


# In a folder of its own: vLLM loads every `*.safetensors` beside a `model.safetensors` as weights of the model.
POSTERIOR_FILE = "reward_posterior/reward_posterior.safetensors"

_VERSION = "1"


@dataclass(frozen=True)
class RewardPosterior:
    """
    Gaussian posterior of a `score` head's weights, of H inputs.

    Args:
        head (`torch.Tensor` of shape `(H,)`, float32):
            Trained weights: the mean.
        factor (`torch.Tensor` of shape `(H, H)`, float32):
            Factor F of the covariance, F times its transpose.
        center (`torch.Tensor` of shape `(H,)`, float32):
            Mean input of the head over the answers that the posterior was fitted to.
        about (`dict`):
            `prior_precision`, `effective_parameters` (how many directions the pairs determine, between 0 and H),
            `num_pairs`, `total_weight` and `loss_type`.
    """

    head: torch.Tensor
    factor: torch.Tensor
    center: torch.Tensor
    about: dict[str, Any]

    def std(self, directions: torch.Tensor) -> torch.Tensor:
        """Compute the standard deviations `(...)` fp32 of the head's products with `directions` `(..., H)`."""
        return (directions.to(self.factor) @ self.factor).norm(dim=-1)

    def relative_std(self, inputs: torch.Tensor, distinct: Sequence[int] | None = None) -> torch.Tensor:
        """Compute the standard deviations `(N,)` of N rewards relative to the mean of those at the indices `distinct`,
        by default all, from the head's `inputs` `(N, H)`; of a single one, relative to the average answer of the
        training."""
        compared = inputs if distinct is None else inputs[list(distinct)]
        return self.std(inputs - (compared.mean(0) if len(compared) > 1 else self.center.to(inputs)))

    def to(self, device: torch.device) -> RewardPosterior:
        """Return a copy on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("head", "factor", "center")}
        return replace(self, **moved)


def prior_precision(eigenvalues: torch.Tensor, squared_norm: float) -> float:
    """Return the precision of the prior that maximizes the marginal likelihood, from the eigenvalues `(H,)` of the
    Hessian and the squared norm of the head."""
    highest = float(eigenvalues.max())
    if not (math.isfinite(highest) and math.isfinite(squared_norm) and highest > 0 and squared_norm > 0):
        raise ValueError(
            f"The loss has a largest curvature of {highest:g} and the head a squared norm of {squared_norm:g}; a "
            "posterior needs both positive and finite."
        )

    def excess(log_precision: float) -> float:
        precision = math.exp(log_precision)
        return float((eigenvalues / (eigenvalues + precision)).sum()) - precision * squared_norm

    # At the lower end the first term is at least 1/2 and the second at most 1/4; the first is never above H.
    low, high = min(highest, 1 / (4 * squared_norm)), 2 * len(eigenvalues) / squared_norm
    return math.exp(cast(float, brentq(excess, math.log(low), math.log(high), xtol=1e-10)))


def laplace_posterior(
    hessian: torch.Tensor, head: torch.Tensor, center: torch.Tensor, about: dict[str, Any]
) -> RewardPosterior:
    """Make the posterior of a Hessian `(H, H)` fp64 of the loss by the weights `head` `(H,)`, on the CPU."""
    # MPS has no fp64, and beside a model there may be no memory for eigenvectors.
    hessian, center, head = hessian.cpu(), center.cpu(), head.detach().to("cpu", torch.float32, copy=True)
    eigenvalues, factor = torch.linalg.eigh(hessian)
    eigenvalues = eigenvalues.clamp(min=0)  # below by rounding alone
    precision = prior_precision(eigenvalues, float(head.double().square().sum()))
    factor /= (eigenvalues + precision).sqrt()
    number = float((eigenvalues / (eigenvalues + precision)).sum())
    about = {**about, "prior_precision": precision, "effective_parameters": number}
    return RewardPosterior(head, factor.float(), center.float(), about)


def write_posterior(posterior: RewardPosterior, folder: str | os.PathLike) -> Path:
    """Write a posterior beside the model in a folder."""
    path = Path(folder) / POSTERIOR_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(posterior, name).contiguous() for name in ("head", "factor", "center")}
    with whole_file(path) as part:
        save_file(tensors, part, metadata={"version": _VERSION, "about": json.dumps(posterior.about)})
    return path


def read_posterior(name_or_path: str | os.PathLike, revision: str | None = None) -> RewardPosterior:
    """Read the posterior beside a model in a directory or on the Hub."""
    options: Any = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    path = cached_file(name_or_path, POSTERIOR_FILE, **options)
    if path is None:
        raise ValueError(
            f"{name_or_path} has no `{POSTERIOR_FILE}`, which standard deviations of rewards need; train with "
            "`reward_posterior=True`, or pass the trained model and its training pairs to a "
            "`MultimodalRewardTrainer` and call its `save_reward_posterior`."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("version") != _VERSION:
                raise KeyError("version")
            tensors = {name: file.get_tensor(name) for name in ("head", "factor", "center")}
        return RewardPosterior(**tensors, about=json.loads(metadata["about"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no posterior of version {_VERSION}; make it again, or delete it.") from error


@dataclass
class HeadInputs:
    """Inputs of the `score` head of a model in its last forward pass."""

    weight: Any = None  # (1, H), as the pass used it
    _seen: list[torch.Tensor] = field(default_factory=list)

    def see(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Take the input of a head, as a hook that is called before its forward pass."""
        self.weight = cast(torch.Tensor, module.weight).detach().clone()  # DeepSpeed gathers it for the pass alone
        self._seen.append(args[0].detach())

    def take(self, num_rewards: int, posterior: RewardPosterior | None = None) -> torch.Tensor:
        """Return the inputs `(R, H)` of the pass that has just computed R rewards; refuse a posterior of another head
        than it used."""
        seen, self._seen[:] = list(self._seen), []
        if not seen:
            raise ValueError(
                "The forward pass of this model called no linear `score` head, so that rewards have no standard "
                "deviations; load the model with `trl_dt2it.load_reward_model`."
            )
        if len(seen) != 1 or seen[0].ndim != 2 or len(seen[0]) != num_rewards:
            raise ValueError(
                "This model does not compute its rewards with one linear `score` head at the last real token, so they "
                "have no standard deviations; load it with `trl_dt2it.load_reward_model`."
            )
        if posterior is not None:
            used, head = self.weight.flatten().float(), posterior.head.to(self.weight.device)
            # In half precision a model may be read, and trained by DeepSpeed and FSDP, which save an exact copy.
            is_rounded = self.weight.dtype != torch.float32 or _is_half(head)
            if used.shape != head.shape or (used - head).norm() > (0.005 if is_rounded else 0) * head.norm():
                raise ValueError(
                    "The reward posterior was fitted to another `score` head than this model has; make it again with "
                    "`MultimodalRewardTrainer.save_reward_posterior`."
                )
        return seen[0]


def _is_half(values: torch.Tensor) -> bool:
    """Tell whether values were in half precision before."""
    return any(torch.equal(values.to(dtype).to(values.dtype), values) for dtype in (torch.bfloat16, torch.float16))


@contextmanager
def watching_head(model: nn.Module) -> Iterator[HeadInputs]:
    """Watch what the `score` head of a model reads; of an adapter, the copy that is in use. A compiled model runs
    uncompiled meanwhile, because its graph does not call hooks that came after it."""
    inputs = HeadInputs()
    heads = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_head(name)]
    handles = [head.register_forward_pre_hook(inputs.see) for head in heads]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield inputs
    finally:
        for handle in handles:
            handle.remove()
