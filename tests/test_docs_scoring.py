"""The page about using a reward model: its examples run and print what it says."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from trl_dt2it import load_reward_model
from trl_dt2it.models.posterior import laplace_posterior, read_posterior, write_posterior

from .families import family_dir
from .test_docs import ON_THE_CPU, ROOT, code_blocks


PAGE = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    folder = family_dir("qwen3_vl")
    monkeypatch.chdir(tmp_path)
    model = load_reward_model(folder, dtype="float32")
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0  # as the trainer writes them
    model.save_pretrained("outputs/my-reward-model")
    AutoProcessor.from_pretrained(folder).save_pretrained("outputs/my-reward-model")
    head = model.score.weight.detach()[0]
    about = {"num_pairs": 1, "total_weight": 1.0, "loss_type": "bt"}
    spread = torch.diag(torch.linspace(1, 9, len(head), dtype=torch.float64))
    write_posterior(laplace_posterior(spread, head, 0 * head, about), "outputs/my-reward-model")
    names: dict = {}
    for block in code_blocks("python", PAGE):
        block = block.replace("Qwen/Qwen3-VL-2B-Instruct", str(folder)).replace(
            "max_length=", f"{ON_THE_CPU}max_length="
        )
        block = block.replace("loss_type=", f"{ON_THE_CPU}loss_type=")
        exec(compile(block, "docs", "exec"), names)
    best, columns, dpo_columns = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert best == f"{names['answers'][names['rewards'].index(max(names['rewards']))]} True"
    assert columns == "['chosen_reward', 'rejected_reward']"
    assert dpo_columns == "['prompt', 'chosen', 'rejected', 'images']"
    assert names["trainer"].state.global_step == 12
    assert names["standard"] == pytest.approx([(reward - 0.5) / 2 for reward in names["rewards"]], abs=1e-4)
    assert len(names["stds"]) == 3 and min(names["stds"]) > 0
    assert names["careful"].index == np.argmax(np.subtract(names["rewards"], names["stds"]))
    assert read_posterior("outputs/my-reward-model").about["num_pairs"] == 8
    rows = names["scored"]
    again = names["scorer"].score_pairs(names["pairs"])
    assert abs(again[:, 0] - rows["chosen_reward"][:]).max() < 1e-5


def test_the_recipe_exists():
    for path in re.findall(r"recipes/[\w/]+\.(?:py|yaml)", PAGE):
        assert (ROOT / path).exists()
