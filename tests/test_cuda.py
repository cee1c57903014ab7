"""On a GPU, where there is one: layouts, mixed precision, losses, training and scores, against the CPU."""

import copy

import pytest
import torch

from trl_dt2it import RewardScorer, load_reward_model
from trl_dt2it.training import losses

from .families import FAMILIES, family_dir
from .pairs import (
    SHARING_FAMILIES,
    collate,
    gradient_difference,
    model_of,
    plain_two_rows,
    processor_of,
    rewards_and_gradients,
)
from .rows import make_dataset, make_rows
from .trainers import config, trainer_for
from .trainers import losses as logged_losses


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ON_THE_GPU = {"use_cpu": False, "dataloader_pin_memory": True}


@pytest.fixture(autouse=True)
def _fp32_is_fp32(monkeypatch):
    """torch convolves in TF32 otherwise, which the towers with convolutions feel."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def to_gpu(batch: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_in_fp32_as_on_the_cpu(family):
    """One row per pair where the family can, two rows with each image once, and two plain rows."""
    rows = make_rows(4, num_images=(1, 2, 0))
    model, two = model_of(family), collate(family, rows)
    expected, expected_gradients = rewards_and_gradients(model, plain_two_rows(two))
    batches = [two, plain_two_rows(two)]
    if family in SHARING_FAMILIES:
        batches.append(collate(family, rows, share_prefix=True))
    model.cuda()
    for batch in batches:
        rewards, gradients = rewards_and_gradients(model, to_gpu(batch))
        assert (rewards.cpu() - expected).abs().max() <= 1e-4
        found = {name: gradient.cpu() for name, gradient in gradients.items()}
        assert gradient_difference(found, expected_gradients) <= 1e-3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", SHARING_FAMILIES)
def test_one_row_in_bf16_misses_by_no_more_than_two(family, autocast):
    """Against float32, with weights in bf16 and with those in float32 under autocast."""
    rows = make_rows(6, num_images=(1, 0))
    one, two = to_gpu(collate(family, rows, share_prefix=True)), to_gpu(plain_two_rows(collate(family, rows)))
    model = model_of(family).cuda()
    if not autocast:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    expected, _ = rewards_and_gradients(model, two)
    low = copy.deepcopy(model) if autocast else load_reward_model(family_dir(family), dtype="bfloat16").train().cuda()
    low.load_state_dict(model.state_dict())
    errors = []
    for batch in (one, two):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            rewards, gradients = rewards_and_gradients(low, batch)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        errors.append(((rewards.float() - expected).norm() / expected.norm()).item())
    assert errors[0] <= max(2 * errors[1], 0.02)


@pytest.mark.parametrize("loss_type", losses.LOSSES)
def test_losses(loss_type, tmp_path):
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 6)
    strength, settings = torch.tensor([0.0, 0.2, 0.5, 0.6, 0.9, 1.0]), config(tmp_path)
    expected = losses.pairwise_loss(chosen, rejected, {"strength": strength}, settings, loss_type=loss_type)
    on_gpu = [chosen.cuda(), rejected.cuda(), {"strength": strength.cuda()}]
    torch.testing.assert_close(losses.pairwise_loss(*on_gpu, settings, loss_type=loss_type).cpu(), expected)


@pytest.mark.parametrize("share_prefix", ["auto", "false"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_training_follows_that_on_the_cpu(family, bf16, share_prefix, tmp_path):
    rows = make_dataset(8, num_images=(1, 0))
    args = {"max_steps": 3, "share_prefix": share_prefix, "eval_strategy": "steps", "eval_steps": 3, "seed": 1}
    found = {}
    for name, extra in {"cpu": {}, "gpu": {**ON_THE_GPU, "bf16": bf16}}.items():
        trainer = trainer_for(family, tmp_path / name, rows, args={**args, **extra}, eval_dataset=rows)
        trainer.train()
        found[name] = torch.tensor([*logged_losses(trainer), trainer.evaluate()["eval_mean_reward"]])
    assert trainer.accelerator.device.type == "cuda"
    torch.testing.assert_close(found["gpu"], found["cpu"], atol=0.1 if bf16 else 5e-3, rtol=0.1 if bf16 else 5e-3)


def test_batches_by_tokens_on_the_gpu(tmp_path):
    rows = make_dataset(8, num_images=(1, 0))
    args = {"max_steps": 3, "max_tokens_per_batch": 400, "gradient_checkpointing": True, **ON_THE_GPU, "bf16": True}
    trainer = trainer_for("qwen3_vl", tmp_path, rows, args=args)
    trainer.train()
    assert torch.tensor(logged_losses(trainer)).isfinite().all()
    assert len(logged_losses(trainer)) == 3


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "gemma3"])
def test_scores_are_those_of_the_cpu(family):
    """Answers of a prompt, and pairs."""
    rows = make_dataset(4, num_images=(1, 0))
    images = [make_rows(1, num_images=(1,))[0]["images"][0]["bytes"]]
    answers = ["A red flower.", "An old temple beside still water.", "Leaves."]
    found = []
    for device in ("cpu", "cuda"):
        scorer = RewardScorer(model_of(family).to(device), processor_of(family))
        rewards = torch.tensor(scorer.score("What is there?", answers, images))
        found.append(torch.cat([rewards, torch.from_numpy(scorer.score_pairs(rows)).flatten()]))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
