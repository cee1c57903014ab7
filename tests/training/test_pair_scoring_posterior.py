"""The posterior of a training: the Hessian of its own loss, whatever the batches, the layout and the model."""

import os

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig

from trl_dt2it import MultimodalRewardTrainer
from trl_dt2it.data.mixing import swap_pairs
from trl_dt2it.models.posterior import POSTERIOR_FILE, read_posterior
from trl_dt2it.processes import wait_for_everyone
from trl_dt2it.training import pair_scoring
from trl_dt2it.training.losses import pair_weight, pairwise_loss
from trl_dt2it.training.pair_scoring import fit_reward_posterior
from trl_dt2it.training.selection import Selection

from ..pairs import plain_two_rows
from ..processes import Run
from ..rows import make_dataset
from ..trainers import config, trainer_for


COLUMNS = {"strength": [0.0, 3.0, 1.0, 2.0, 1.0, 3.0], "weight": [1.0, 0.5, 2.0, 0.0, 1.0, 1.0]}


def precision_of(posterior) -> torch.Tensor:
    return torch.linalg.inv((posterior.factor @ posterior.factor.T).double())


def hessian_of(posterior) -> torch.Tensor:
    return precision_of(posterior) - posterior.about["prior_precision"] * torch.eye(len(posterior.head))


def by_autograd(trainer, head: torch.nn.Linear) -> torch.Tensor:
    """The Hessian of the summed loss of all pairs by the weights of the head, in one batch of plain rows."""
    seen = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    collator = trainer.data_collator
    collator.share_prefix = False
    batch = collator(list(trainer.train_dataset))
    pairs = batch.pop("pairs")
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(**plain_two_rows(batch))
    handle.remove()
    args, loss_type = trainer.args, trainer.loss_type

    def loss(weight):
        chosen, rejected = (seen[0] @ weight).chunk(2)
        each = pairwise_loss(chosen, rejected, pairs, args, loss_type=loss_type)
        return (pair_weight(pairs, args, loss_type) * each).sum()

    return torch.autograd.functional.hessian(loss, head.weight.detach().flatten())


@pytest.mark.parametrize(
    "family, settings",
    [
        ("qwen3_vl", {"loss_type": "bt"}),
        ("qwen3_vl", {"loss_type": "strength_margin", "center_rewards_coefficient": 0.1}),
        ("gemma3", {"loss_type": "btt", "share_prefix": "false"}),
        ("llava", {"loss_type": "ordinal"}),
        ("qwen3_vl", {"max_tokens_per_batch": 400}),
    ],
)
def test_it_is_the_hessian_of_the_training_loss(family, settings, tmp_path):
    settings = {"learning_rate": 1e-2, "max_steps": 2, "reward_posterior": True, **settings}
    trainer = trainer_for(family, tmp_path, make_dataset(6, **COLUMNS), args=settings)
    trainer.train()
    posterior = trainer._posterior
    expected = by_autograd(trainer, trainer.model.score).double()
    torch.testing.assert_close(hessian_of(posterior), expected, rtol=5e-3, atol=2e-3 * expected.abs().max().item())
    assert torch.equal(posterior.head, trainer.model.score.weight.detach()[0])
    assert posterior.about["num_pairs"] == 5 and posterior.about["loss_type"] == trainer.loss_type


def test_an_adapter_has_that_of_its_own_head(tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear")
    args = {"learning_rate": 1e-2, "max_steps": 2, "reward_posterior": True}
    trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(6), args=args, peft_config=lora)
    trainer.train()
    head = trainer.model.base_model.model.score
    trained, original = head.modules_to_save["default"], head.original_module
    assert not torch.equal(trained.weight, original.weight)
    assert torch.equal(trainer._posterior.head, trained.weight.detach()[0])
    expected = by_autograd(trainer, trained).double()
    found = hessian_of(trainer._posterior)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=2e-3 * expected.abs().max().item())
    trainer.save_model(tmp_path / "model")
    assert torch.equal(read_posterior(tmp_path / "model").factor, trainer._posterior.factor)


def fitted(tmp_path, data, **args):
    args = {"loss_type": "bt", **args}
    return fit_reward_posterior(trainer_for("qwen3_vl", tmp_path, data, args=args))


def test_batches_layouts_and_orders_change_nothing(tmp_path):
    data = make_dataset(7)
    expected = fitted(tmp_path, data)
    swapped = swap_pairs(data, np.array([True, False, True, False, True, False, True]))
    for other, args in (
        (data, {"per_device_train_batch_size": 7}),
        (data, {"per_device_train_batch_size": 1, "share_prefix": "false"}),
        (data, {"max_tokens_per_batch": 300}),
        (data.select(range(6, -1, -1)), {}),
        (swapped, {}),
    ):
        found = fitted(tmp_path, other, **args)
        torch.testing.assert_close(precision_of(found), precision_of(expected), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.center, expected.center, rtol=1e-4, atol=1e-5)


def test_a_pair_of_weight_two_is_two_pairs(tmp_path):
    data = make_dataset(4)
    twice = fitted(tmp_path, data.select([0, 1, 2, 3, 1]))
    heavy = fitted(tmp_path, make_dataset(4, weight=[1.0, 2.0, 1.0, 1.0]))
    torch.testing.assert_close(precision_of(heavy), precision_of(twice), rtol=1e-3, atol=1e-3)
    assert (heavy.about["num_pairs"], heavy.about["total_weight"]) == (4, 5.0)


def test_a_doubtful_label_tells_less(tmp_path):
    """Of a pair, (2 p - 1)^2 of the Fisher information at margin 0; the probabilities of p = 0.8 by hand."""
    doubtful = fitted(tmp_path, make_dataset(4, label_confidence=[1.0, 0.5, 0.8, 1.0]))
    lighter = fitted(tmp_path, make_dataset(4, weight=[1.0, 0.0, 0.36, 1.0]))
    torch.testing.assert_close(precision_of(doubtful), precision_of(lighter), rtol=1e-3, atol=1e-3)
    right = [0.8 * 0.5 + 0.2 * 0.5, 0.8 * sigmoid(1e-4) + 0.2 * sigmoid(-1e-4)]  # at margins 0 and 1e-4
    slope = (right[1] - right[0]) / 1e-4
    assert slope**2 / (right[0] * (1 - right[0])) == pytest.approx(0.36 / 4, rel=1e-3)


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def fail_on(rank: str, output) -> None:
    """The first process has no room for eigenvectors, or the second, which has no batch, none for the sums."""
    trainer = trainer_for("qwen3_vl", output / os.environ["RANK"], make_dataset(1), args={"loss_type": "bt"})
    zeros = torch.zeros

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    if os.environ["RANK"] == rank == "0":
        pair_scoring.laplace_posterior = fail
    elif os.environ["RANK"] == rank:
        torch.zeros = lambda *size, **options: (fail if torch.float64 in options.values() else zeros)(*size, **options)
    posterior = pair_scoring.try_reward_posterior(trainer)
    wait_for_everyone()  # as the training goes on
    (output / f"{os.environ['RANK']}.txt").write_text(str(posterior))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_processes_have_no_posterior_where_one_fails(rank, tmp_path):
    Run(fail_on, rank, tmp_path, num_processes=2).finish()
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(2)] == ["None", "None"]


def test_what_a_selection_dropped_does_not_count(tmp_path):
    trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(5), args={"loss_type": "bt"})
    selection = Selection.of_all(5)
    selection.kept[:2], selection.flipped[3] = False, True
    selection.held_out = np.array([False, False, True, False, False])  # in the last epoch alone
    callback = type("Callback", (), {"selection": selection})()
    trainer.callback_handler.callbacks.append(callback)
    found = fit_reward_posterior(trainer)
    expected = fitted(tmp_path, make_dataset(5).select([2, 3, 4]))
    torch.testing.assert_close(precision_of(found), precision_of(expected), rtol=1e-3, atol=1e-3)
    assert found.about["num_pairs"] == 3


def test_the_model_stays_as_it_is_and_the_random_state_too(tmp_path):
    weights, states = [], []
    for flag in (False, True):
        args = {"max_steps": 2, "learning_rate": 1e-2, "reward_posterior": flag}
        trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(4), args=args)
        trainer.train()
        trainer.save_model(tmp_path / str(flag))
        weights.append((tmp_path / str(flag) / "model.safetensors").read_bytes())
        states.append(torch.get_rng_state())
        assert (tmp_path / str(flag) / POSTERIOR_FILE).is_file() == flag
    assert weights[0] == weights[1] and torch.equal(*states)
    # That of another model is not left beside a new one.
    plain = trainer_for("qwen3_vl", tmp_path, make_dataset(4), args={"max_steps": 1})
    plain.train()
    plain.save_model(tmp_path / "True")
    assert not (tmp_path / "True" / POSTERIOR_FILE).exists()


def test_a_model_that_was_trained_before_gets_one(tmp_path):
    data, args = make_dataset(4), {"learning_rate": 1e-2, "max_steps": 2, "reward_posterior": True}
    trainer = trainer_for("qwen3_vl", tmp_path, data, args=args)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    expected = read_posterior(tmp_path / "model")
    later = MultimodalRewardTrainer(str(tmp_path / "model"), args=config(tmp_path / "x"), train_dataset=data)
    found = later.save_reward_posterior(str(tmp_path / "later"))
    torch.testing.assert_close(precision_of(found), precision_of(expected), rtol=1e-3, atol=1e-3)
    assert torch.equal(read_posterior(tmp_path / "later").factor, found.factor)


def test_what_cannot_be_fitted_is_said_and_costs_no_training(tmp_path, caplog):
    stream = IterableDataset.from_generator(lambda: iter(list(make_dataset(4))))
    with pytest.raises(ValueError, match="`reward_posterior` reads every training pair once more"):
        trainer_for("qwen3_vl", tmp_path, stream, args={"max_steps": 1, "reward_posterior": True})
    with pytest.raises(ValueError, match="the train set is streamed; load it whole"):
        trainer_for("qwen3_vl", tmp_path, stream, args={"max_steps": 1}).save_reward_posterior()

    def line(delta, batch, args):
        return -delta

    args = {"max_steps": 1, "loss_type": line, "reward_posterior": True}
    trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(4), args=args)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "The trained model has no reward posterior: ValueError: The loss has a largest curvature" in caplog.text
    unweighted = trainer_for("qwen3_vl", tmp_path, make_dataset(2, weight=[0.0, 0.0]))
    with pytest.raises(ValueError, match="All pairs of the train set have the weight 0"):
        unweighted.save_reward_posterior()


def test_a_model_with_another_head_is_refused(tmp_path):
    trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(2))
    trainer.model.score = torch.nn.Sequential(torch.nn.LayerNorm(64), trainer.model.score)
    fit_reward_posterior(trainer)  # its last layer is as linear as any
    trainer.model.score = torch.nn.Bilinear(64, 64, 1)
    trainer.model.score.forward = lambda inputs: inputs[:, :1]
    with pytest.raises(ValueError, match="called no linear `score` head"):
        fit_reward_posterior(trainer)
