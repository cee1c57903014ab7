"""Second derivatives of every loss: by hand, and against differences of the loss itself."""

import pytest
import torch

from trl_dt2it.training.losses import LOSSES, pair_curvature, pairwise_loss

from ..trainers import config


REWARDS = torch.tensor([[1.0, 0.5, -2.0, 0.3], [0.0, 0.5, 1.0, -0.4]])
BATCH = {
    "strength": torch.tensor([0.25, 0.9, 0.5, 0.0]),
    "is_tie": torch.tensor([False, False, False, True]),
    "margin": torch.tensor([0.0, 0.5, -0.25, 0.0]),
    "weight": torch.ones(4),
}


def test_bradley_terry_by_hand():
    # Margins 1, 0, -3: sigmoid times one minus it.
    found = pair_curvature(REWARDS[:, :3], {"weight": torch.ones(3)}, config("out"))
    torch.testing.assert_close(found, torch.tensor([[0.1966119, 0.25, 0.0451767], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
@pytest.mark.parametrize("coefficient", [None, 0.3])
def test_every_loss_against_differences(loss_type, coefficient):
    args = config("out", center_rewards_coefficient=coefficient)
    found = pair_curvature(REWARDS, BATCH, args, loss_type=loss_type)
    step = 0.02
    for row, (left, right) in zip(found, ((0.5, -0.5), (0.5, 0.5)), strict=True):
        losses = [
            pairwise_loss(REWARDS[0] + s * left, REWARDS[1] + s * right, BATCH, args, loss_type=loss_type).double()
            for s in (-step, 0.0, step)
        ]
        expected = ((losses[0] - 2 * losses[1] + losses[2]) / step**2).clamp(min=0)  # `gce` is concave in part
        torch.testing.assert_close(row.double(), expected, rtol=1e-2, atol=4e-3)
    assert (found[1] == (0.0 if coefficient is None else 2 * coefficient)).all()


def test_lines_have_none_and_hills_count_as_flat():
    flat = pair_curvature(REWARDS, BATCH, config("out"), loss_type=lambda delta, batch, args: -delta)
    hinge = pair_curvature(REWARDS, BATCH, config("out"), loss_type=lambda d, batch, args: (1 - d).clamp(min=0))
    hill = pair_curvature(REWARDS, BATCH, config("out"), loss_type=lambda delta, batch, args: -(delta**2))
    for found in (flat, hinge, hill):
        assert torch.equal(found, torch.zeros(2, 4))


def test_it_works_without_gradients():
    with torch.no_grad():
        assert pair_curvature(REWARDS, BATCH, config("out"))[0].min() > 0
