"""One process and two, over gloo: the same losses, weights and metrics."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trl_dt2it.models.posterior import read_posterior

from .launching import train


BLIND = {
    "qwen3_vl": {"blind/weight", "blind/effective_pairs", "blind/accuracy"},  # weighting
    "gemma3": {"blind/accuracy"},  # offset
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"])
def test_two_processes_give_what_one_gives(family, tmp_path):
    # The same four pairs make up each step: 2 processes x 2 pairs, or 1 x 4.
    options = {"train_sampling_strategy": "sequential", "reward_posterior": True}
    options |= {"blind_weighting": family == "qwen3_vl", "blind_offset": family == "gemma3"}
    options |= {"makes_margins": family == "qwen3_vl"}
    one = train(tmp_path / "one", 1, 4, family, **options)
    two = train(tmp_path / "two", 2, 2, family, **options)
    assert len(one["log"]) == len(two["log"]) == 4
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        assert ours["num_tokens"] == theirs["num_tokens"]
        logged = {name for name in theirs if name.startswith("blind/")}
        assert logged == BLIND.get(family, set())
        for name in logged:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
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
    if options["makes_margins"]:
        alone, both = (json.loads((tmp_path / name / "margins.json").read_text()) for name in ("one", "two"))
        assert len(both) == 2 and both[0] == both[1] and len(set(both[0])) > 3
        np.testing.assert_allclose(both[0], alone[0], rtol=0.02, atol=1e-3)
    one, two = (read_posterior(tmp_path / name) for name in ("one", "two"))
    covariance = one.factor @ one.factor.T
    torch.testing.assert_close(two.factor @ two.factor.T, covariance, rtol=0, atol=1e-2 * covariance.max().item())
    assert one.about["num_pairs"] == two.about["num_pairs"] == 7  # one pair has no weight
