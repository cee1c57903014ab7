"""The reward model inside of TRL's own GRPO and RLOO trainers, where images have to reach it."""

import functools

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_dt2it.demo.digits import make_digits
from trl_dt2it.scoring.scorer import RewardScorer

from ..families import example_images
from ..policies import ON_THE_CPU, policy_and_reward_model
from ..processes import ROOT, start_script


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """A policy and a reward model."""
    return policy_and_reward_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def scorer(models) -> RewardScorer:
    return RewardScorer.from_pretrained(models[1], device="cpu")


def prompt(question: str) -> list:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def reply(text: str) -> list:
    return [{"role": "assistant", "content": text}]


def test_rewards_are_in_the_order_of_the_completions_and_prompts_are_shared(scorer):
    images = example_images(2)
    prompts = [prompt("What?"), prompt("What?"), prompt("What?"), prompt("Why?"), prompt("What?")]
    shown = [[images[0]], [images[0].copy()], [images[1]], [images[1]], [images[0]]]
    texts = ["one", "two two", "one", "three", "four"]
    calls = []
    handle = scorer.model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    rewards = scorer.as_reward_func()(
        prompts=prompts,
        completions=list(map(reply, texts)),
        completion_ids=[[1]] * 5,
        images=shown,
        trainer_state=None,
    )
    handle.remove()
    assert calls[0]["pair_layout"].shape == (4, 3)  # the first two share their prompt
    expected = [scorer.score(p, [t], i)[0] for p, t, i in zip(prompts, texts, shown, strict=True)]
    assert rewards == pytest.approx(expected, abs=1e-5) and len({round(r, 4) for r in rewards}) == 5
    # A column `image`, prompts that hold their images, as the trainers make them, and plain strings.
    single = scorer.as_reward_func()(prompts, list(map(reply, texts)), image=[one[0] for one in shown])
    assert single == pytest.approx(expected, abs=1e-5)
    filled = [
        [{"role": "user", "content": [{"type": "image", "image": i[0]}, p[0]["content"][1]]}]
        for p, i in zip(prompts, shown, strict=True)
    ]
    for columns in ({}, {"images": shown}):
        assert scorer.as_reward_func()(filled, list(map(reply, texts)), **columns) == pytest.approx(expected, abs=1e-5)
    plain = scorer.as_reward_func()(["What?", "Why?"], ["one", "two"])
    assert plain == pytest.approx([scorer.score("What?", ["one"])[0], scorer.score("Why?", ["two"])[0]], abs=1e-5)


def test_what_cannot_be_scored_has_no_reward_or_the_wished_one(scorer):
    texts = ["one", "<|im_end|> two", ""]
    for wished in (None, -9.0):
        rewards = scorer.as_reward_func(invalid_reward=wished)(["What?"] * 3, texts)
        assert rewards[1] == wished
        assert [rewards[0], rewards[2]] == pytest.approx(scorer.score("What?", ["one", ""]), abs=1e-5)
    assert scorer.as_reward_func()(["What?"], texts[1:2]) == [None]


def test_its_name(scorer):
    assert scorer.as_reward_func().__name__ == "reward"  # of the model's folder
    assert scorer.as_reward_func("helpful").__name__ == "helpful"


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_two_steps_in_a_real_trainer_with_images_that_reach_the_reward(kind, models, scorer, tmp_path):
    config, trainer_class = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    args = config(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        **ON_THE_CPU,
    )
    calls = []
    reward_func = scorer.as_reward_func("image_reward")

    @functools.wraps(reward_func)
    def recording(**kwargs):
        rewards = reward_func(**kwargs)
        calls.append((kwargs["prompts"], kwargs["completions"], kwargs["images"], rewards))
        return rewards

    data = make_digits("train", 4).select_columns(["prompt", "images"])
    trainer = trainer_class(model=models[0], reward_funcs=recording, args=args, train_dataset=data)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2 and len(calls) == 2
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    for entry, (prompts, completions, images, rewards) in zip(logged, calls, strict=True):
        assert entry["rewards/image_reward/mean"] == pytest.approx(sum(rewards) / 4, abs=1e-4)
        expected = [scorer.score(p, [c], i)[0] for p, c, i in zip(prompts, completions, images, strict=True)]
        assert rewards == pytest.approx(expected, abs=1e-5)
        other = scorer.score(prompts[0], completions[:1], [images[0][0].rotate(180)])[0]
        assert abs(other - rewards[0]) > 1e-4
        texts = [one[-1]["content"] for one in completions]
        assert len(set(texts)) > 1 and images[0][0].size[1] == 32
    changed = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) > 10


def test_the_recipe_trains(models, tmp_path):
    flags = ["--model_name_or_path", "tiny-qwen3-vl", "--dtype", "float32", "--reward_model", models[1]]
    flags += ["--dataset_name", "digits", "--num_prompts", "4", "--output_dir", str(tmp_path), "--max_steps", "1"]
    flags += ["--max_completion_length", "4", "--per_device_train_batch_size", "2", "--num_generations", "2"]
    flags += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--logging_steps", "1"]
    printed = start_script(ROOT / "recipes/grpo_with_reward_model.py", *flags).finish()
    assert "Mean reward:" in printed and (tmp_path / "model.safetensors").is_file()
