"""Batches by length on two processes: the loss of one large batch, and resumed runs that go on with the same pairs."""

import pytest
import torch
from safetensors.torch import load_file

from .launching import train


CAP = 230  # leaves the eight pairs four batches


def test_packed_on_two_processes_gives_what_one_batch_gives(tmp_path):
    one = train(tmp_path / "one", 1, 8, "qwen3_vl")
    two = train(tmp_path / "two", 2, 8, "qwen3_vl", max_tokens_per_batch=CAP, gradient_accumulation_steps=8)
    assert len(one["log"]) == len(two["log"]) == 2  # one step an epoch
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        assert ours["num_tokens"] == theirs["num_tokens"]


@pytest.mark.parametrize("options", [{"max_tokens_per_batch": CAP}, {"train_sampling_strategy": "group_by_length"}])
def test_resumed_in_its_second_epoch_equals_the_undisturbed_run_bitwise(options, tmp_path):
    options = {**options, "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, 2, 2, "qwen3_vl", **options)
    assert len(whole["log"]) == 4  # two steps an epoch
    expected = load_file(tmp_path / "model.safetensors")
    resumed = train(tmp_path, 2, 2, "qwen3_vl", resume=str(tmp_path / "checkpoint-3"), **options)
    assert [entry["loss"] for entry in resumed["log"]] == [entry["loss"] for entry in whole["log"]]
    actual = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
