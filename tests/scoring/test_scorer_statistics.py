"""Mean and standard deviation of the training set: those of the final model, and wherever the model goes."""

import json
import random

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer, load_reward_model
from trl_dt2it.models.modeling import STATISTICS_FILE
from trl_dt2it.scoring.scorer import RewardScorer

from ..pairs import model_of, processor_of
from ..rows import make_dataset, make_rows
from ..trainers import config, trainer_for


def statistics(trainer) -> tuple[float, float]:
    return trainer.model.config.reward_mean, trainer.model.config.reward_std


def scores(trainer, data) -> np.ndarray:
    return RewardScorer(trainer.model, trainer.processing_class).score_pairs(data, show_progress=False)


def test_they_are_those_of_the_final_model_and_go_with_it(tmp_path):
    data, states = make_dataset(5), []
    for pairs in (0, 1000):
        trainer = trainer_for("qwen3_vl", tmp_path, data, args={"reward_statistics_pairs": pairs})
        trainer.train()
        states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
        assert hasattr(trainer.model.config, "reward_mean") == (pairs > 0)
    assert states[0] == states[1]  # nothing is drawn from the generators
    rewards = scores(trainer, data).astype(np.float64)
    assert statistics(trainer) == pytest.approx((rewards.mean(), rewards.std()), abs=1e-5)
    trainer.save_model(tmp_path / "model")
    assert not (tmp_path / "model" / STATISTICS_FILE).exists()
    scorer = RewardScorer.from_pretrained(tmp_path / "model", normalize=True)
    normal = scorer.score_pairs(data, show_progress=False)
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=1e-3)
    np.testing.assert_allclose(normal, (rewards - rewards.mean()) / rewards.std(), atol=1e-3)


def test_a_large_set_is_scored_in_part_by_the_seed(tmp_path):
    data = make_dataset(9)
    for extra in ({}, {"max_tokens_per_batch": 500}):
        args = {"reward_statistics_pairs": 3, "seed": 5, "max_steps": 1, **extra}
        trainer = trainer_for("qwen3_vl", tmp_path, data, args=args)
        trainer.train()
        drawn = np.random.default_rng(5).choice(9, size=3, replace=False)
        rewards = scores(trainer, data)
        assert statistics(trainer) == pytest.approx((rewards[drawn].mean(), rewards[drawn].std()), abs=1e-5)
        assert abs(rewards.mean() - rewards[drawn].mean()) > 1e-3


def test_of_a_stream_the_first_pairs_that_training_read(tmp_path):
    rows = make_rows(8, num_images=(1,))
    rows[7]["images"] = []  # an error, if anybody reads it; training looks one batch ahead
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = trainer_for("qwen3_vl", tmp_path, stream, args={"max_steps": 2, "reward_statistics_pairs": 1000})
    trainer.train()
    rewards = scores(trainer, make_dataset(4, num_images=(1,)))  # two steps of two
    assert statistics(trainer) == pytest.approx((rewards.mean(), rewards.std()), abs=1e-5)


def test_a_resumed_run_has_those_of_the_undisturbed_one(tmp_path):
    data, args = make_dataset(6), {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    whole = trainer_for("qwen3_vl", tmp_path, data, args=args)
    whole.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    assert "reward_mean" not in saved  # they are measured once, at the end
    resumed = trainer_for("qwen3_vl", tmp_path, data, args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert statistics(resumed) == statistics(whole)


def test_an_adapter_keeps_them_in_a_file_and_a_merged_model_in_its_configuration(tmp_path):
    data = make_dataset(4)
    base = model_of("qwen3_vl")
    base.config.reward_mean, base.config.reward_std = 7.0, 0.5
    base.save_pretrained(tmp_path / "base")
    processor_of("qwen3_vl").save_pretrained(tmp_path / "base")
    folder, folders = tmp_path / "adapter", {}
    for pairs in (1000, 0):
        args = {"reward_statistics_pairs": pairs, "learning_rate": 1e-2}
        lora = LoraConfig(r=2, target_modules="all-linear")
        trainer = MultimodalRewardTrainer(
            str(tmp_path / "base"), args=config(tmp_path, **args), train_dataset=data, peft_config=lora
        )
        trainer.train()
        trainer.save_model(folder)
        folders[pairs] = load_reward_model(folder).config
        assert (folder / STATISTICS_FILE).exists() == (pairs > 0) and not (folder / "config.json").exists()
        if pairs:
            expected, rewards = statistics(trainer), scores(trainer, data)
            adapted = RewardScorer.from_pretrained(folder, normalize=True)
            np.testing.assert_allclose(
                adapted.score_pairs(data), (rewards - rewards.mean()) / rewards.std(), atol=1e-3
            )
            adapted.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert expected == pytest.approx((rewards.mean(), rewards.std()), abs=1e-5)
    assert expected[0] != pytest.approx(7.0)
    # Those of the base, from which training began, are of other rewards, and those of the first training too.
    assert not hasattr(folders[0], "reward_mean") and not hasattr(folders[0], "reward_std")
    for saved in (folders[1000], load_reward_model(tmp_path / "merged", allow_new_head=False).config):
        assert (saved.reward_mean, saved.reward_std) == expected
    (folder / STATISTICS_FILE).write_text('{"reward_mean": "much"}')
    with pytest.raises(ValueError, match=r"reward_statistics\.json does not hold the finite numbers"):
        load_reward_model(folder)


def test_equal_rewards_have_no_spread_and_broken_ones_no_mean(tmp_path):
    data = make_dataset(3)
    for value, found in ((0.0, (0.0, 0.0)), (float("nan"), None)):
        trainer = trainer_for("qwen3_vl", tmp_path, data, args={"learning_rate": 0.0})
        torch.nn.init.constant_(trainer.model.score.weight, value)
        trainer.train()
        assert (statistics(trainer) if found else getattr(trainer.model.config, "reward_mean", None)) == found
    trainer.model.config.reward_mean = trainer.model.config.reward_std = 0.0
    with pytest.raises(ValueError, match="a positive `reward_std`"):
        RewardScorer(trainer.model, trainer.processing_class, normalize=True)


def test_the_number_of_pairs_is_checked(tmp_path):
    assert MultimodalRewardConfig(str(tmp_path), use_cpu=True, bf16=False).reward_statistics_pairs == 1000
    with pytest.raises(ValueError, match="`reward_statistics_pairs` is -1; it must be >= 0"):
        config(tmp_path, reward_statistics_pairs=-1)
