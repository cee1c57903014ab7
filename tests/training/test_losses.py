"""Every loss against values worked out by hand, at batch 3 so that a broadcast would show."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_dt2it import MultimodalRewardConfig
from trl_dt2it.training import losses
from trl_dt2it.training.losses import LOSSES, loss_name, pair_weight

from ..rows import make_dataset
from ..trainers import config, trainer_for
from ..trainers import losses as logged_losses


CHOSEN = torch.tensor([1.0, 0.5, -2.0])
REJECTED = torch.tensor([0.0, 0.5, 1.0])
DELTA = [1.0, 0.0, -3.0]
STRENGTH = torch.tensor([0.25, 1.0, 0.5])


def softplus(x: float) -> float:
    """-log sigmoid(-x)"""
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairwise_loss(
    chosen, rejected, loss_type="bt", *, strength=None, margin=None, is_tie=None, label_confidence=None, **settings
):
    """The loss with the defaults of the configuration, but for some settings."""
    fields = MultimodalRewardConfig.__dataclass_fields__
    names = ("margin_scale", "label_smoothing", "gce_q", "tie_factor", "center_rewards_coefficient")
    defaults = {name: fields[name].default for name in names}
    defaults["ordinal_thresholds"] = fields["ordinal_thresholds"].default_factory()
    batch = {"strength": strength, "margin": margin, "is_tie": is_tie, "label_confidence": label_confidence}
    return losses.pairwise_loss(
        chosen, rejected, batch, SimpleNamespace(**{**defaults, **settings}), loss_type=loss_type
    )


def weight_of(loss_type, *, weight, strength=None, strength_power=1.0):
    return pair_weight(
        {"weight": weight, "strength": strength}, SimpleNamespace(strength_power=strength_power), loss_type
    )


def assert_losses(actual: torch.Tensor, expected: list[float]) -> None:
    assert actual.shape == (3,)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_bt():
    # softplus(-1) = 0.313262, log 2 = 0.693147, softplus(3) = 3.048587
    assert_losses(pairwise_loss(CHOSEN, REJECTED), [0.3132617, 0.6931472, 3.0485874])


def test_trl_margin_is_subtracted_from_the_difference():
    loss = pairwise_loss(CHOSEN, REJECTED, margin=torch.tensor([0.5, 1.0, -1.0]))
    assert_losses(loss, [softplus(-0.5), softplus(1.0), softplus(2.0)])


def test_margin_grows_with_strength():
    loss = pairwise_loss(CHOSEN, REJECTED, loss_type="margin", strength=STRENGTH, margin_scale=2.0)
    # margins 0.5, 2 and 1
    assert_losses(loss, [softplus(-0.5), softplus(2.0), softplus(4.0)])


def test_scaled_weights_and_leaves_the_loss():
    loss = pairwise_loss(CHOSEN, REJECTED, loss_type="scaled", strength=STRENGTH)
    assert_losses(loss, [softplus(-1.0), softplus(0.0), softplus(3.0)])
    weight = weight_of("scaled", weight=torch.tensor([2.0, 1.0, 1.0]), strength=STRENGTH, strength_power=2.0)
    assert_losses(weight, [2 * 0.0625, 1.0, 0.25])


def test_strength_margin_does_both():
    loss = pairwise_loss(CHOSEN, REJECTED, loss_type="strength_margin", strength=STRENGTH)
    assert_losses(loss, [softplus(-0.75), softplus(1.0), softplus(3.5)])
    assert_losses(weight_of("strength_margin", weight=torch.ones(3), strength=STRENGTH), [0.25, 1.0, 0.5])


@pytest.mark.parametrize("loss_type", ["bt", "margin", "soft", "gce", "btt", "ordinal"])
def test_other_losses_take_the_weight_column_alone(loss_type):
    weight = torch.tensor([2.0, 0.0, 0.5])
    assert_losses(weight_of(loss_type, weight=weight, strength=STRENGTH), [2.0, 0.0, 0.5])


def test_soft_with_vote_share():
    # strength 0.25 is a vote share of 0.625
    shares = [0.625, 1.0, 0.75]
    expected = [z * softplus(-d) + (1 - z) * softplus(d) for z, d in zip(shares, DELTA, strict=True)]
    assert_losses(pairwise_loss(CHOSEN, REJECTED, loss_type="soft", strength=STRENGTH), expected)


def test_soft_with_label_smoothing():
    expected = [0.95 * softplus(-d) + 0.05 * softplus(d) for d in DELTA]
    assert_losses(pairwise_loss(CHOSEN, REJECTED, loss_type="soft", label_smoothing=0.1), expected)


def test_gce():
    # sigmoid(1) = 0.731059 and its root 0.855020; sigmoid(-3) = 0.047426 and its root 0.217775
    loss = pairwise_loss(CHOSEN, REJECTED, loss_type="gce", gce_q=0.5)
    assert_losses(loss, [2 * (1 - 0.8550195), 2 * (1 - math.sqrt(0.5)), 2 * (1 - 0.2177749)])
    assert_losses(pairwise_loss(CHOSEN, REJECTED, loss_type="gce", gce_q=1.0), [sigmoid(-d) for d in DELTA])
    assert_losses(pairwise_loss(CHOSEN, REJECTED, loss_type="gce"), [(1 - sigmoid(d) ** 0.7) / 0.7 for d in DELTA])


def test_gce_has_the_slope_of_the_paper_and_forgives_confident_contradictions():
    chosen = torch.tensor([1.0, 0.0, -3.0, -40.0, 40.0, -1e4, 1e4], requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(7), loss_type="gce")
    loss.sum().backward()
    slopes = [-(sigmoid(d) ** 0.7) * sigmoid(-d) for d in (*DELTA, -40.0, 40.0)] + [0.0, 0.0]
    torch.testing.assert_close(chosen.grad, torch.tensor(slopes), rtol=1e-5, atol=1e-7)
    assert torch.isfinite(loss).all() and loss.min() >= 0 and loss.max().item() == pytest.approx(1 / 0.7)
    # Small losses keep their digits: 1 - (1 - e)^q = q e, where 1 - sigmoid(40) rounds to 0.
    assert loss[4].item() == pytest.approx(math.exp(-40), rel=1e-5)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7, 1.0])
def test_gce_is_nearly_symmetric(q):
    """The losses of both labels of a pair add up to a number between bounds (the paper's Lemma 1 for two classes),
    so that wrong labels move the minimum little; with q = 1, to 1."""
    delta = torch.linspace(-30, 30, 241)
    zero = torch.zeros_like(delta)
    both = sum(pairwise_loss(*sides, loss_type="gce", gce_q=q) for sides in ((delta, zero), (zero, delta)))
    assert both.min().item() == pytest.approx((2 - 2 ** (1 - q)) / q, rel=1e-5) and both.max() <= 1 / q + 1e-6


def test_gce_for_small_q_is_bradley_terry():
    delta = torch.tensor([-30.0, -3.0, 0.0, 1.0, 30.0])
    for q, tolerance in ((1e-2, 0.2), (1e-4, 2e-3), (1e-6, 2e-5)):
        loss = pairwise_loss(delta, torch.zeros(5), loss_type="gce", gce_q=q)
        torch.testing.assert_close(loss, pairwise_loss(delta, torch.zeros(5)), rtol=tolerance, atol=1e-7)


def test_btt():
    k = 3.0
    is_tie = torch.tensor([False, True, True])
    loss = pairwise_loss(CHOSEN, REJECTED, loss_type="btt", is_tie=is_tie, tie_factor=k)
    win = sigmoid(1.0 - math.log(k))
    ties = [(k * k - 1) * sigmoid(d - math.log(k)) * sigmoid(-d - math.log(k)) for d in DELTA[1:]]
    assert_losses(loss, [-math.log(win), -math.log(ties[0]), -math.log(ties[1])])


@pytest.mark.parametrize("delta", [-4.0, -0.3, 0.0, 2.0])
def test_btt_is_a_distribution(delta):
    """Win, tie and loss have probabilities that add up to one (Rao and Kupper, 1967)."""
    zero = torch.zeros(1)
    d = torch.tensor([delta])
    yes, no = torch.tensor([True]), torch.tensor([False])
    win = pairwise_loss(d, zero, loss_type="btt", is_tie=no)
    lose = pairwise_loss(zero, d, loss_type="btt", is_tie=no)
    tie = pairwise_loss(d, zero, loss_type="btt", is_tie=yes)
    assert (torch.exp(-win) + torch.exp(-lose) + torch.exp(-tie)).item() == pytest.approx(1.0, abs=1e-6)


def test_ordinal():
    # Four levels over thresholds 1, 2, 3: strength 0.25 is level 1, 1.0 is level 3, 0.5 is level 2.
    loss = pairwise_loss(CHOSEN, REJECTED, loss_type="ordinal", strength=STRENGTH)
    expected = [
        -math.log(sigmoid(2 - 1.0) - sigmoid(1 - 1.0)),
        -math.log(1 - sigmoid(3 - 0.0)),
        -math.log(sigmoid(3 + 3.0) - sigmoid(2 + 3.0)),
    ]
    assert_losses(loss, expected)


def test_ordinal_far_out_stays_finite_with_a_gradient():
    chosen = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(2), loss_type="ordinal", strength=torch.tensor([0.0, 1.0]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    # Level 0 ends at 1: far above it the loss rises with slope 1; the top level falls with slope 1.
    torch.testing.assert_close(chosen.grad, torch.tensor([1.0, -1.0]))


def test_centering():
    loss = pairwise_loss(CHOSEN, REJECTED, center_rewards_coefficient=0.1)
    expected = [softplus(-1.0) + 0.1, softplus(0.0) + 0.1, softplus(3.0) + 0.1]
    assert_losses(loss, expected)


CONFIDENCE = torch.tensor([0.9, 1.0, 0.25])


def test_confidence_mixes_the_losses_of_both_labels():
    loss = pairwise_loss(CHOSEN, REJECTED, label_confidence=CONFIDENCE)
    assert_losses(
        loss,
        [
            0.9 * softplus(-1.0) + 0.1 * softplus(1.0),
            softplus(0.0),
            0.25 * softplus(3.0) + 0.75 * softplus(-3.0),
        ],
    )
    # A margin is asked for in either direction, and the rewards are centered once.
    settings = {"margin": torch.tensor([0.5, 1.0, -1.0]), "center_rewards_coefficient": 0.1}
    expected = [
        0.9 * softplus(-0.5) + 0.1 * softplus(1.5) + 0.1,
        softplus(1.0) + 0.1,
        0.25 * softplus(2.0) + 0.75 * softplus(-4.0) + 0.1,
    ]
    assert_losses(pairwise_loss(CHOSEN, REJECTED, label_confidence=CONFIDENCE, **settings), expected)
    settings = {"loss_type": "strength_margin", "strength": STRENGTH}
    expected = [
        0.9 * softplus(-0.75) + 0.1 * softplus(1.25),
        softplus(1.0),
        0.25 * softplus(3.5) + 0.75 * softplus(-2.5),
    ]
    assert_losses(pairwise_loss(CHOSEN, REJECTED, label_confidence=CONFIDENCE, **settings), expected)


def test_confidence_is_the_target_of_bt_and_joins_that_of_soft():
    """The gradient of a cross-entropy: the model's probability less the target."""
    chosen = CHOSEN.clone().requires_grad_()
    pairwise_loss(chosen, REJECTED, label_confidence=CONFIDENCE).sum().backward()
    expected = [sigmoid(d) - c for d, c in zip(DELTA, CONFIDENCE.tolist(), strict=True)]
    assert_losses(chosen.grad, expected)
    targets = torch.tensor([0.625, 1.0, 0.75])  # of the strengths
    joined = CONFIDENCE * targets + (1 - CONFIDENCE) * (1 - targets)
    soft = pairwise_loss(CHOSEN, REJECTED, loss_type="soft", strength=STRENGTH, label_confidence=CONFIDENCE)
    assert_losses(soft, pairwise_loss(CHOSEN, REJECTED, label_confidence=joined).tolist())


def test_a_label_that_is_certain_has_no_loss_of_its_opposite():
    """Which may be infinite: 0 times that would be no number."""
    chosen = torch.tensor([100.0, -100.0, 0.0], requires_grad=True)
    confidence = torch.tensor([1.0, 0.0, 0.8])
    loss = pairwise_loss(chosen, torch.zeros(3), lambda delta, *_: torch.exp(-delta), label_confidence=confidence)
    assert loss.tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    loss.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([0.0, 0.0, 0.2 - 0.8])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_answers_swapped_and_the_opposite_confidence_are_the_same_pair(loss_type):
    columns = {"strength": torch.tensor([0.2, 0.9, 0.6]), "margin": torch.tensor([0.3, -0.2, 0.0])}
    columns |= {"is_tie": torch.tensor([False, True, False]), "loss_type": loss_type}
    plain = pairwise_loss(CHOSEN, REJECTED, label_confidence=CONFIDENCE, **columns)
    swapped = pairwise_loss(REJECTED, CHOSEN, label_confidence=1 - CONFIDENCE, **columns)
    torch.testing.assert_close(swapped, plain)
    # Certainty is the loss as it is, bit for bit, and that the label is wrong that of the other label.
    without = pairwise_loss(CHOSEN, REJECTED, **columns)
    assert torch.equal(pairwise_loss(CHOSEN, REJECTED, label_confidence=torch.ones(3), **columns), without)
    none = pairwise_loss(REJECTED, CHOSEN, label_confidence=torch.zeros(3), **columns)
    assert torch.equal(none, without)
    tie = pairwise_loss(CHOSEN, REJECTED, "btt", is_tie=torch.ones(3, dtype=bool), label_confidence=CONFIDENCE)
    torch.testing.assert_close(tie, pairwise_loss(CHOSEN, REJECTED, "btt", is_tie=torch.ones(3, dtype=bool)))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradient_is_that_of_finite_differences(loss_type):
    strength = torch.tensor([0.2, 0.9, 0.6])
    is_tie = torch.tensor([False, True, False])

    def total(chosen: torch.Tensor) -> torch.Tensor:
        return pairwise_loss(chosen, REJECTED, loss_type=loss_type, strength=strength, is_tie=is_tie).sum()

    chosen = CHOSEN.clone().requires_grad_()
    total(chosen).backward()
    step = 1e-2
    for index in range(3):
        shift = torch.zeros(3)
        shift[index] = step
        numeric = (total(CHOSEN + shift) - total(CHOSEN - shift)) / (2 * step)
        assert chosen.grad[index].item() == pytest.approx(numeric.item(), abs=2e-3)


def test_bf16_rewards_are_compared_in_fp32():
    chosen, rejected = torch.tensor([1000.0]).bfloat16(), torch.tensor([996.0]).bfloat16()
    assert pairwise_loss(chosen, rejected).item() == pytest.approx(softplus(-4.0), rel=1e-6)


@pytest.mark.parametrize("name", ["margin", "strength", "label_confidence"])
def test_a_column_vector_is_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` has shape \(3, 1\), expected \(3,\)"):
        pairwise_loss(CHOSEN, REJECTED, loss_type="margin", **{"strength": STRENGTH, name: torch.ones(3, 1)})
    with pytest.raises(ValueError, match="expected one dimension"):
        pairwise_loss(CHOSEN[:, None], REJECTED[:, None])


def test_missing_strength_and_unknown_loss():
    with pytest.raises(ValueError, match='loss_type="scaled" needs a strength'):
        pairwise_loss(CHOSEN, REJECTED, loss_type="scaled")
    with pytest.raises(ValueError, match="Unknown loss_type 'hinge'; choose one of bt, margin"):
        pairwise_loss(CHOSEN, REJECTED, loss_type="hinge")


def test_a_function_is_a_loss_as_well():
    def hinge(delta, batch, config):
        return (config.margin_scale * batch["strength"] - delta).clamp(min=0)

    loss = pairwise_loss(CHOSEN, REJECTED, loss_type=hinge, strength=STRENGTH, margin_scale=2.0)
    assert_losses(loss, [0.0, 2.0, 4.0])
    assert_losses(weight_of(hinge, weight=torch.ones(3), strength=STRENGTH), [1.0, 1.0, 1.0])
    assert [loss_name(hinge), loss_name("bt")] == ["hinge", "bt"]
    with pytest.raises(ValueError, match=r"The loss `<lambda>` has shape \(\), expected \(3,\): one value per pair"):
        pairwise_loss(CHOSEN, REJECTED, loss_type=lambda delta, batch, config: delta.mean())


def fitted(margins_of, loss_type="bt", **columns) -> torch.Tensor:
    """The direction of the linear reward with the least loss, of pairs given by the differences of their features."""
    theta, zero = torch.zeros(margins_of.shape[1], requires_grad=True), torch.zeros(len(margins_of))
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = pairwise_loss(margins_of @ theta, zero, loss_type, **columns).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach() / theta.detach().norm()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wrong_labels_mislead_gce_less_and_known_confidences_help(seed):
    """Pairs of a linear reward, in units of the angle (1 - cosine) to the truth that the fit misses."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(8, generator=generator)
    truth = truth / truth.norm()
    pairs = torch.randn(2000, 8, generator=generator)
    is_right = torch.rand(2000, generator=generator) < torch.sigmoid(3 * pairs @ truth)
    pairs = torch.where(is_right[:, None], pairs, -pairs)
    # A quarter of the labels goes by the taste of an annotator, against the truth in feature 0.
    by_taste = torch.rand(2000, generator=generator) < 0.25
    taste = -torch.sign(pairs[:, :1]) * torch.sign(truth[0])
    mislabeled = torch.where(by_taste[:, None], taste * pairs, pairs)
    misses = {name: 1 - (fitted(mislabeled, name) @ truth).item() for name in ("bt", "gce")}
    assert misses["gce"] < 0.6 * misses["bt"]
    # Half of the labels is right with 0.95, and half with 0.6.
    confidence = torch.where(torch.arange(2000) < 1000, 0.95, 0.6)
    is_kept = torch.rand(2000, generator=generator) < confidence
    noisy = torch.where(is_kept[:, None], pairs, -pairs)
    for name in ("bt", "gce"):
        plain, aware = fitted(noisy, name), fitted(noisy, name, label_confidence=confidence)
        assert aware @ truth > plain @ truth


def test_a_function_trains_and_is_saved_by_its_name(tmp_path):
    """`bt` under another name: the same losses, in a configuration that can be pickled and written as JSON."""
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    plain = trainer_for("qwen3_vl", tmp_path / "plain", make_dataset(4), args)
    plain.train()
    own = lambda delta, batch, config: LOSSES["bt"](delta, batch, config)  # noqa: E731  # which pickle refuses
    trainer = trainer_for("qwen3_vl", tmp_path / "own", make_dataset(4), {**args, "loss_type": own})
    trainer.train()
    assert logged_losses(trainer) == logged_losses(plain) and len(logged_losses(trainer)) == 2
    assert trainer.args.loss_type is trainer.loss_type is own and trainer.args.to_dict()["loss_type"] == "<lambda>"
    saved = torch.load(tmp_path / "own" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.loss_type == "<lambda>" and saved.margin_scale == trainer.args.margin_scale
    trainer.create_model_card()
    assert "- loss: `<lambda>`" in (tmp_path / "own" / "README.md").read_text()
    with pytest.raises(ValueError, match="`loss_type` is 'hinge'; choose one of auto, bt"):
        config(tmp_path, loss_type="hinge")
