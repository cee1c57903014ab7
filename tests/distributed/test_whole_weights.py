"""Scorers and reloaded models are whole on each process that loads them, whatever shards the model in training."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, is_fsdp_enabled

from trl_dt2it.processes import whole_weights
from trl_dt2it.scoring.scorer import RewardScorer

from ..pairs import model_of, processor_of
from ..processes import Run
from ..rows import make_dataset


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model_of("qwen3_vl").save_pretrained(folder)
    processor_of("qwen3_vl").save_pretrained(folder)
    return folder


def scores_of(folder: Path) -> list:
    return (
        RewardScorer.from_pretrained(folder, device="cpu").score_pairs(make_dataset(5), show_progress=False).tolist()
    )


def load_under_zero3(saved: Path, folder: Path) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank = PartialState(cpu=True).process_index
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    config = HfDeepSpeedConfig(config)  # alive, as that of a trainer's arguments is
    partitioned = AutoModelForSequenceClassification.from_pretrained(saved)
    found = {"shape": list(partitioned.score.weight.shape)}
    try:
        RewardScorer(partitioned, processor_of("qwen3_vl"))
    except ValueError as error:
        found["refused"] = str(error)
    found["scores"] = scores_of(saved)
    if rank == 0:  # alone: the other process does not come
        with whole_weights():
            alone = AutoModelForSequenceClassification.from_pretrained(saved)
        found["alone"] = list(alone.score.weight.shape)
        found["scored_alone"] = RewardScorer.from_pretrained(saved, device="cpu").score("What?", ["a", "b"])
    found["is_on"] = is_deepspeed_zero3_enabled() and config.is_zero3()
    dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def load_under_fsdp(saved: Path, folder: Path) -> None:
    rank = PartialState(cpu=True).process_index
    efficient = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ |= efficient
    found = {"scores": scores_of(saved), "is_on": efficient.items() <= os.environ.items()}
    with whole_weights():
        found["is_off"] = not is_fsdp_enabled()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def on_two(function, saved: Path, folder: Path, **environment: str) -> list[dict]:
    Run(function, saved, folder, num_processes=2, **environment).finish(480)  # the first run compiles
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_scorer_is_whole_on_each_process_of_a_zero3_training(saved, tmp_path):
    pytest.importorskip("deepspeed")
    results, expected = on_two(load_under_zero3, saved, tmp_path, DS_ACCELERATOR="cpu"), scores_of(saved)
    assert len(np.unique(expected)) == 10
    for found in results:
        assert found["shape"] == [0] and found["is_on"]
        assert found["refused"].startswith("DeepSpeed ZeRO-3 has partitioned the weights of this ")
        np.testing.assert_allclose(found["scores"], expected, atol=1e-6)
    hidden = model_of("qwen3_vl").config.get_text_config().hidden_size
    assert results[0]["alone"] == [1, hidden] and len(set(results[0]["scored_alone"])) == 2


def test_a_scorer_is_whole_on_each_process_of_an_fsdp_training(saved, tmp_path):
    results, expected = on_two(load_under_fsdp, saved, tmp_path), scores_of(saved)
    for found in results:
        np.testing.assert_allclose(found["scores"], expected, atol=1e-6)
        assert found["is_on"] and found["is_off"]
