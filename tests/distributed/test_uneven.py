"""Two processes on uneven and mixed data: each row counts once, no rank waits, a resumed run goes on as it was."""

import pytest
import torch
from safetensors.torch import load_file

from .launching import train


def test_accuracy_on_uneven_data_is_exact(tmp_path):
    """Five pairs, batches of two, two processes: one row is repeated to fill the last batch, and must not count."""
    result = train(tmp_path, 2, 2, "qwen3_vl")
    predictions = torch.tensor(result["seen"][0])
    assert predictions.shape == (5, 2)
    wins = (predictions[:, 0] > predictions[:, 1]).double()
    assert 0 < wins.sum() < 5
    assert result["before"]["eval_accuracy"] == wins.mean().item()
    assert result["before"]["eval_accuracy/a"] == wins[[0, 2, 3]].mean().item()
    assert result["before"]["eval_accuracy/b"] == wins[[1, 4]].mean().item()
    margin = (predictions[:, 0] - predictions[:, 1]).mean().item()
    assert result["before"]["eval_margin"] == pytest.approx(margin, rel=1e-5)


def test_a_streamed_evaluation_set_counts_each_row_once(tmp_path):
    memory = train(tmp_path / "memory", 1, 2, "qwen3_vl")
    stream = train(tmp_path / "stream", 2, 2, "qwen3_vl", stream=True)
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_accuracy/a", "eval_accuracy/b"):
        assert stream["before"][name] == pytest.approx(memory["before"][name], rel=1e-5), name


def test_resumed_on_two_processes_equals_the_undisturbed_run_bitwise(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, 2, 2, "qwen3_vl", **options)
    expected = load_file(tmp_path / "model.safetensors")
    resumed = train(tmp_path, 2, 2, "qwen3_vl", resume=str(tmp_path / "checkpoint-1"), **options)
    assert [entry["loss"] for entry in resumed["log"]] == [entry["loss"] for entry in whole["log"]]
    actual = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_rank_without_images_does_not_hang(tmp_path):
    """Alternating rows with and without an image: in each step one rank has text alone."""
    result = train(tmp_path, 2, 1, "qwen3_vl", num_images=[1, 0], train_sampling_strategy="sequential")
    assert len(result["log"]) == 8
