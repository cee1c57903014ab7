"""The posterior of a head: its prior by brute force, its spread by sampling, its coverage by simulation."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid

from trl_dt2it.models.posterior import (
    POSTERIOR_FILE,
    laplace_posterior,
    prior_precision,
    read_posterior,
    watching_head,
    write_posterior,
)


ABOUT = {"num_pairs": 3, "total_weight": 3.0, "loss_type": "bt"}


def hessian_of(rank: int, size: int, scale: float = 1.0) -> torch.Tensor:
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return scale * rows.T @ rows


def posterior_of(size: int = 5, center: float = 0.0):
    head = torch.linspace(-1, 1, size)
    return laplace_posterior(hessian_of(8, size), head, torch.full((size,), center), ABOUT)


def log_evidence(precision: np.ndarray, hessian: torch.Tensor, squared_norm: float) -> np.ndarray:
    """Laplace's log marginal likelihood, by determinants, up to a constant."""
    size = len(hessian)
    covariances = hessian.numpy() + precision[:, None, None] * np.eye(size)
    return size / 2 * np.log(precision) - precision / 2 * squared_norm - np.linalg.slogdet(covariances)[1] / 2


@pytest.mark.parametrize("rank, scale, norm", [(12, 1.0, 0.3), (3, 1.0, 2.0), (1, 1e-4, 5.0), (12, 1e4, 1e-3)])
def test_the_prior_maximizes_the_marginal_likelihood(rank, scale, norm):
    hessian = hessian_of(rank, 6, scale)
    found = prior_precision(torch.linalg.eigvalsh(hessian).clamp(min=0), norm)
    grid = np.exp(np.linspace(-14, 14, 20_001))
    best = grid[log_evidence(grid, hessian, norm).argmax()]
    assert found == pytest.approx(best, rel=2e-3)


def test_the_prior_of_one_weight_by_hand():
    # h / (h + p) = p n with h = 2, n = 1/4: p^2 + 2 p - 8 = 0, so p = 2.
    assert prior_precision(torch.tensor([2.0], dtype=torch.float64), 0.25) == pytest.approx(2.0)
    for eigenvalue, norm in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="a posterior needs both positive and finite"):
            prior_precision(torch.tensor([eigenvalue], dtype=torch.float64), norm)


def test_the_covariance_is_the_inverse_of_hessian_and_prior():
    posterior = posterior_of()
    precision = hessian_of(8, 5) + posterior.about["prior_precision"] * torch.eye(5)
    torch.testing.assert_close((posterior.factor @ posterior.factor.T).double(), torch.linalg.inv(precision))
    share = torch.linalg.eigvalsh(hessian_of(8, 5)) / torch.linalg.eigvalsh(precision)
    assert posterior.about["effective_parameters"] == pytest.approx(share.sum().item(), rel=1e-5)
    assert {**ABOUT}.items() <= posterior.about.items()


def test_standard_deviations_are_those_of_sampled_heads():
    posterior, inputs = posterior_of(), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(200_000, 5, generator=torch.Generator().manual_seed(1))
    rewards = (posterior.head + noise @ posterior.factor.T) @ inputs.T
    torch.testing.assert_close(posterior.std(inputs), rewards.std(0), rtol=1e-2, atol=0)
    relative = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(posterior.relative_std(inputs), relative.std(0), rtol=1e-2, atol=0)


def test_relative_standard_deviations_know_no_common_shift():
    posterior, inputs = posterior_of(center=2.0), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(posterior.relative_std(inputs + 7), posterior.relative_std(inputs))
    first, second = posterior.relative_std(inputs[:2])
    assert first.item() == pytest.approx(second.item()) == pytest.approx(posterior.std(inputs[0] - inputs[1]) / 2)
    # A single answer has nothing to be compared with but the average of the training.
    torch.testing.assert_close(posterior.relative_std(inputs[:1])[0], posterior.std(inputs[0] - 2))


def test_an_answer_that_is_repeated_is_one_answer():
    posterior, inputs = posterior_of(center=2.0), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    repeated = posterior.relative_std(inputs[[0, 1, 1, 1, 2]], [0, 1, 4])
    torch.testing.assert_close(repeated[[0, 1, 4]], posterior.relative_std(inputs))
    one = posterior.relative_std(inputs[[0, 0, 0]], [0])
    torch.testing.assert_close(one, posterior.relative_std(inputs[:1]).expand(3))


class Scored(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = torch.nn.Linear(5, 5), torch.nn.Linear(5, 1, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.score(self.body(inputs))


def test_a_model_that_is_compiled_is_watched_too():
    model, inputs = Scored(), torch.ones(3, 5)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(inputs)  # its graph is made without a hook
        with watching_head(compiled) as head:
            compiled(inputs)
            torch.testing.assert_close(head.take(3), model.body(inputs))


@pytest.mark.parametrize(
    "dtype, change, is_refused", [("fp32", 1e-4, True), ("bf16", 1e-4, False), ("bf16", 0.02, True)]
)
def test_a_head_in_fp32_has_to_be_the_same(dtype, change, is_refused):
    model = Scored()
    posterior = laplace_posterior(hessian_of(8, 5), model.score.weight.detach()[0], torch.zeros(5), ABOUT)
    model.score.weight.data *= 1 + change
    model.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    with torch.no_grad(), watching_head(model) as head:
        model(torch.ones(2, 5, dtype=model.score.weight.dtype))
        if is_refused:
            with pytest.raises(ValueError, match="fitted to another `score` head"):
                head.take(2, posterior)
        else:
            head.take(2, posterior)


def test_intervals_of_margins_hold_the_truth_as_often_as_they_say():
    """Labels drawn from a Bradley-Terry model with a linear head, which is fitted as in training."""
    generator, size, inside, sure = torch.Generator().manual_seed(0), 6, [], []
    for _ in range(60):
        truth = torch.randn(size, generator=generator, dtype=torch.float64)
        pairs = torch.randn(150, size, generator=generator, dtype=torch.float64)
        labels = torch.rand(150, generator=generator) < torch.sigmoid(pairs @ truth)
        pairs = torch.where(labels[:, None], pairs, -pairs)
        head = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        fit = torch.optim.LBFGS([head], max_iter=100, line_search_fn="strong_wolfe")

        def loss(head=head, pairs=pairs, fit=fit):
            fit.zero_grad()
            total = -logsigmoid(pairs @ head).sum() + 0.5 * head.square().sum()
            total.backward()
            return total

        fit.step(loss)
        chance = torch.sigmoid(pairs @ head.detach())
        hessian = (pairs.T * chance * (1 - chance)) @ pairs
        posterior = laplace_posterior(hessian, head.detach(), torch.zeros(size), ABOUT)
        test = torch.randn(200, size, generator=generator)
        distance = (test @ (posterior.head - truth.float())) / posterior.std(test)
        inside.append([(distance.abs() < bound).float().mean().item() for bound in (0.674, 1.645)])
        sure.append(posterior.about["effective_parameters"])
    assert np.mean(inside, 0) == pytest.approx([0.5, 0.9], abs=0.04)
    assert all(4 < one < 6 for one in sure)


def test_it_is_written_and_read(tmp_path):
    posterior = posterior_of(center=1.0)
    path = write_posterior(posterior, tmp_path)
    assert path == tmp_path / POSTERIOR_FILE
    # vLLM takes every such file beside a `model.safetensors` for weights.
    assert not list(tmp_path.glob("*.safetensors"))
    again = read_posterior(tmp_path)
    for name in ("head", "factor", "center"):
        assert torch.equal(getattr(again, name), getattr(posterior, name))
    assert again.about == posterior.about


def test_what_is_missing_or_broken_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="train with `reward_posterior=True`, or pass the trained model"):
        read_posterior(tmp_path)
    path = write_posterior(posterior_of(), tmp_path)
    save_file({"head": torch.ones(3)}, path, metadata={"version": "1", "about": json.dumps({})})
    for broken in (None, b"no tensors"):
        if broken is not None:
            path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"is no posterior of version 1; make it again, or delete it\."):
            read_posterior(tmp_path)
