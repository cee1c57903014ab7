"""One process and two, over gloo: the same losses, weights and metrics, on uneven data and mixed batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..families import family_dir


ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def launch(script: str, num_processes: int, *arguments: str) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", str(HERE / script), *arguments]
    if num_processes == 1:
        command = [sys.executable, str(HERE / script), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def train(output: Path, num_processes: int, per_device: int, family: str, **options) -> dict:
    launch(
        "train_script.py", num_processes, str(output), str(family_dir(family)), str(per_device), json.dumps(options)
    )
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"])
def test_two_processes_give_what_one_gives(family, tmp_path):
    # The same four pairs make up each step: 2 processes x 2 pairs, or 1 x 4.
    options = {"train_sampling_strategy": "sequential"}
    one = train(tmp_path / "one", 1, 4, family, **options)
    two = train(tmp_path / "two", 2, 2, family, **options)
    assert len(one["log"]) == len(two["log"]) == 4
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        assert ours["num_tokens"] == theirs["num_tokens"]
    for moment in ("before", "after"):
        for name, value in one[moment].items():
            if not name.endswith(("_runtime", "_per_second", "_time")):
                assert two[moment][name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    assert [len(rows) for rows in two["seen"]] == [5, 5]
    (first, second), (alone,) = two["statistics"], one["statistics"]
    assert first == second == pytest.approx(alone, rel=2e-3, abs=2e-4)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for name, value in load_file(tmp_path / "two" / "model.safetensors").items():
        # Adam divides by the size of the gradient, so where that is round-off the sign of a step is, too.
        assert (value - expected[name]).abs().max() <= 4 * 2e-3, name
        assert (value - expected[name]).abs().mean() <= 1e-4, name


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


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"])
def test_fully_sharded_model_has_the_same_gradients(family):
    output = launch("fsdp_script.py", 2, str(family_dir(family)))
    assert "rank 0 agrees" in output and "rank 1 agrees" in output
    assert output.count("in one row") == (0 if family == "gemma3" else 2)
