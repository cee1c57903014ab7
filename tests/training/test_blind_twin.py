"""The blind twin: what it learns is what a training without images learns, and its margins are those of that model."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor

from trl_dt2it import MultimodalRewardTrainer, load_reward_model
from trl_dt2it.data.controls import without_images
from trl_dt2it.data.mixing import with_columns
from trl_dt2it.training.pair_scoring import score_with_trainer

from ..families import family_dir
from ..rows import make_dataset, text_rows
from ..trainers import config, losses, weights


WEIGHT, CONFIDENCE = [1.0, 0.5, 2.0, 1.0, 0.7, 3.0], [0.9, 0.6, 0.25, 1.0, None, 0.75]
ORDER = {"train_sampling_strategy": "sequential"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("twin") / "base"
    torch.manual_seed(5)
    load_reward_model(family_dir("qwen3_vl"), dtype="float32").save_pretrained(folder)
    AutoProcessor.from_pretrained(family_dir("qwen3_vl")).save_pretrained(folder)
    return str(folder)


def pairs(num_images=(1,)) -> Dataset:
    columns = {"weight": WEIGHT, "label_confidence": CONFIDENCE}
    return make_dataset(6, num_images=num_images, **columns)


def trainer_of(folder, model: str, data: Dataset, **args) -> MultimodalRewardTrainer:
    return MultimodalRewardTrainer(model, args=config(folder, **ORDER, **args), train_dataset=data)


def twin_of(folder, base: str, data: Dataset, **args) -> MultimodalRewardTrainer:
    return trainer_of(
        folder, base, data, **{"blind_weighting": "blind_offset" not in args, "blind_model": base, **args}
    )


def twin_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer._blind.model.named_parameters()}


def largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize("args", [{}, {"gradient_accumulation_steps": 3, "share_prefix": "false"}], ids=str)
def test_the_twin_learns_what_a_training_without_images_learns(args, base, tmp_path):
    # With Adam's usual epsilon, the sign of what is round-off decides.
    args = {**args, "weight_decay": 0.1, "num_train_epochs": 2, "adam_epsilon": 1e-3, "optim": "adamw_torch"}
    own = twin_of(tmp_path / "own", base, pairs(), **args)
    own.train()
    alone = trainer_of(tmp_path / "alone", base, without_images(pairs()), loss_type="bt", **args)
    start = weights(alone)
    alone.train()
    expected = weights(alone)
    assert largest(start, expected) > 1e-3
    assert largest(twin_weights(own), expected) <= 2e-5


def test_the_loss_sees_the_margins_of_the_twin_before_its_step(base, tmp_path):
    data = pairs(num_images=(1, 0, 2))
    still = {"learning_rate": 0.0, "num_train_epochs": 1}
    blind = trainer_of(tmp_path / "blind", base, without_images(data))
    rewards = score_with_trainer(blind, without_images(data), batch_size=3, desc="")
    margins = (rewards[:, 0] - rewards[:, 1]).tolist()
    known = [None if index % 3 == 1 else margin for index, margin in enumerate(margins)]  # rows without an image
    fixed = with_columns(data, {"blind_margin": known})
    for how in ({"blind_weighting": True}, {"blind_offset": True}):
        own = twin_of(tmp_path / "own", base, data, **how, **still)
        own.train()
        by_column = trainer_of(tmp_path / "column", base, fixed, **how, **still)
        by_column.train()
        plain = trainer_of(tmp_path / "plain", base, data, **still)
        plain.train()
        assert losses(own) == pytest.approx(losses(by_column), rel=1e-4)
        assert losses(own) != pytest.approx(losses(plain), rel=1e-3)
        ours, theirs = own.state.log_history[0], by_column.state.log_history[0]
        blind_names = {name for name in theirs if name.startswith("blind/")}
        assert "blind/accuracy" in blind_names and {name for name in ours if name.startswith("blind/")} == blind_names
        for name in blind_names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    right = [margin > 0 for margin in known[:2] if margin is not None]  # the first batch of two
    assert ours["blind/accuracy"] == np.mean(right)


def test_resumed_run_equals_the_undisturbed_one_bitwise(base, tmp_path):
    args = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    whole = twin_of(tmp_path / "run", base, pairs(), **args)
    whole.train()
    resumed = twin_of(tmp_path / "run", base, pairs(), **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert largest(weights(resumed), weights(whole)) == 0
    assert largest(twin_weights(resumed), twin_weights(whole)) == 0


def test_a_checkpoint_without_a_twin_is_not_resumed_with_one(base, tmp_path):
    args = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, base, pairs(), **args).train()
    with pytest.raises(ValueError, match="checkpoint-1 was written without a `blind_model`; resume without it"):
        twin_of(tmp_path, base, pairs(), **args).train(resume_from_checkpoint=True)


def test_misuse_stops_at_start(base, tmp_path):
    with pytest.raises(ValueError, match="`blind_model` is 'x'; it must be None without those settings"):
        config(tmp_path, blind_model="x")
    with pytest.raises(ValueError, match="`reward_posterior` is True; it must be False with `blind_model`"):
        config(tmp_path, blind_model="x", blind_offset=True, reward_posterior=True)
    told = with_columns(pairs(), {"blind_margin": [1.0] * 6})
    with pytest.raises(ValueError, match="has a column `blind_margin`, which `blind_model` makes; leave one of them"):
        twin_of(tmp_path, base, told)
    with pytest.raises(ValueError, match="`blind_model` needs a train set of rows with images or videos, not of"):
        twin_of(tmp_path, base, Dataset.from_list(text_rows(4)))
