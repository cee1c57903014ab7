"""Every launch file that ships trains, evaluates, saves and resumes as plain training does, on two CPU ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoProcessor

from trl_dt2it import MultimodalPreferenceCollator, RewardScorer, load_reward_model
from trl_dt2it.models.freezing import part_of
from trl_dt2it.models.posterior import read_posterior

from ..families import family_dir
from ..processes import Run
from ..rows import make_dataset
from ..trainers import trainer_for, weights
from . import launches
from .launches import LAUNCHES, largest_difference, make_rows_of, saved_weights, without_fps


# All trainings count as the set-up of the first test.
pytestmark = pytest.mark.timeout(1500)

# A case of each tuning, layout, kind of data and of checkpointing; `benchmarks/launches.py` trains all of them.
CASES = [
    {"tuning": "full", "data": "mixed"},
    {"tuning": "reward_model", "data": "mixed", "one_row": False},
    {"tuning": "lora", "data": "images", "gradient_checkpointing": True},
    {"tuning": "full", "data": "ranked", "checkpointing": "reentrant"},
    {"tuning": "reward_model", "data": "text"},
    {"tuning": "full", "data": "images", "one_row": False, "family": "gemma3"},
]
RESUMED = {"tuning": "full", "data": "mixed", "resume_at": 2, "blind_weighting": True, "blind_model": "reward_model"}
BEST = {
    "tuning": "reward_model",
    "data": "mixed",
    "learning_rate": 0.1,  # so that a later step is a worse one
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}
IN_BF16 = {"tuning": "reward_model", "data": "mixed", "bf16": True}
RECIPES = [{"recipe": name, "bf16": True} for name in launches.RECIPES]
IN_FP32 = [{"recipe": name, "bf16": False} for name in launches.RECIPES]  # which plain training shows
ALL = [*CASES, RESUMED, BEST, IN_BF16, *RECIPES, *IN_FP32]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases") / "reward_model"
    torch.manual_seed(5)
    load_reward_model(family_dir("qwen3_vl"), dtype="float32").save_pretrained(folder)
    AutoProcessor.from_pretrained(family_dir("qwen3_vl")).save_pretrained(folder)
    return {**{name: str(family_dir(name)) for name in ("qwen3_vl", "gemma3")}, "reward_model": str(folder)}


@pytest.fixture(scope="module")
def outputs(bases, tmp_path_factory) -> dict[str, Path]:
    """All cases under all launch files; a run of two processes trains the cases of one file, one after the other."""
    folder = tmp_path_factory.mktemp("launches")
    for launch in LAUNCHES:
        cases = ALL if launch == "multi_gpu" else ALL[: -len(IN_FP32)]
        Run(launches.run_cases, launch, cases, bases, str(folder), num_processes=2).finish(timeout=500)
    return dict.fromkeys(LAUNCHES, folder)


def result_of(outputs, launch: str, settings: dict) -> tuple[dict, Path]:
    folder = outputs[launch] / f"{launch}-{ALL.index(settings)}"
    return json.loads((folder / "result.json").read_text()), folder


@pytest.mark.parametrize("launch", LAUNCHES[1:])
@pytest.mark.parametrize("settings", CASES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_sharded_training_equals_plain_training(outputs, launch, settings):
    expected, plain = result_of(outputs, "multi_gpu", settings)
    found, folder = result_of(outputs, launch, settings)
    assert found["wrapped"] == ("FSDP" if launch == "fsdp2" else "DeepSpeedEngine")
    assert expected["wrapped"] == "DistributedDataParallel"
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-5)
    for moment in ("before", "after"):
        for metric in ("eval_loss", "eval_accuracy", "eval_mean_reward"):
            assert found[moment][metric] == pytest.approx(expected[moment][metric], abs=1e-5)
    np.testing.assert_allclose(found["rewards"], expected["rewards"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["statistics"], expected["statistics"], rtol=0, atol=1e-4)
    assert largest_difference(saved_weights(folder), saved_weights(plain)) <= 1e-4
    (posterior, covariance), (same, close) = (with_covariance(one) for one in (folder, plain))
    np.testing.assert_allclose(covariance, close, rtol=0, atol=2e-3 * close.abs().max().item())
    np.testing.assert_allclose(posterior.head, same.head, rtol=0, atol=1e-4)
    assert posterior.about["num_pairs"] == same.about["num_pairs"] == 12


def with_covariance(folder):
    posterior = read_posterior(folder)
    return posterior, posterior.factor @ posterior.factor.T


def test_losses_differ_between_steps_and_weights_move(outputs, bases):
    """Or the comparisons above would say nothing."""
    result, folder = result_of(outputs, "multi_gpu", CASES[1])
    assert np.ptp(result["losses"]) > 1e-3
    assert largest_difference(saved_weights(folder), saved_weights(Path(bases["reward_model"]))) > 1e-3


@pytest.mark.parametrize("launch", LAUNCHES)
def test_saved_models_load_with_the_auto_class_and_give_the_trainers_rewards(outputs, launch):
    result, folder = result_of(outputs, launch, CASES[0])
    rows = without_fps(make_rows_of("mixed"))[:5]
    weights = saved_weights(folder)
    assert weights["score.weight"].shape == (1, 64) and weights["score.weight"].dtype == torch.float32
    scored = RewardScorer.from_pretrained(folder, device="cpu").score_pairs(
        Dataset.from_list(rows), show_progress=False
    )
    np.testing.assert_allclose(scored, result["rewards"], rtol=0, atol=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(folder))(rows)
    del batch["pairs"]
    with torch.no_grad():
        found = model(**batch).logits[:, 0].reshape(2, -1).T
    np.testing.assert_allclose(found, result["rewards"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_adapters_load_again(outputs, launch):
    result, folder = result_of(outputs, launch, CASES[2])
    rows = Dataset.from_list(without_fps(make_rows_of("images"))[:5])
    scored = RewardScorer.from_pretrained(folder, device="cpu").score_pairs(rows, show_progress=False)
    np.testing.assert_allclose(scored, result["rewards"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_resumed_training_ends_as_one_that_went_through(outputs, launch):
    result, folder = result_of(outputs, launch, RESUMED)
    assert len(result["losses"]) == launches.STEPS
    assert largest_difference(saved_weights(folder), saved_weights(folder / "whole")) <= 1e-6
    # The twin is whole on each process, whatever shards the main model.
    plain, _ = result_of(outputs, "multi_gpu", RESUMED)
    np.testing.assert_allclose(result["losses"], plain["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result["blind"], plain["blind"], rtol=0, atol=1e-5)
    assert len(set(result["blind"])) == launches.STEPS - 1  # of the steps that see an image


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_best_model_comes_back_at_the_end(outputs, launch):
    result, _ = result_of(outputs, launch, BEST)
    during = result["evaluations"][: launches.STEPS]  # and then the one after training
    assert max(during) - min(during) > 1e-3 and during[-1] > min(during)
    assert result["after"]["eval_loss"] == pytest.approx(min(during), abs=1e-5)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_half_precision_saves_the_head_in_fp32_beside_a_half_precision_body(outputs, launch):
    result, folder = result_of(outputs, launch, IN_BF16)
    weights = load_file(folder / "model.safetensors")
    assert weights["score.weight"].dtype == torch.float32 and weights["score.weight"].shape == (1, 64)
    assert {w.dtype for name, w in weights.items() if name != "score.weight"} == {torch.bfloat16}
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.score.weight.dtype == torch.float32
    assert torch.equal(model.score.weight, weights["score.weight"])
    # fp32 weights would not all be bf16 numbers: the head has kept more than the body
    assert not torch.equal(weights["score.weight"], weights["score.weight"].bfloat16().float())
    plain, _ = result_of(outputs, "multi_gpu", IN_BF16)
    np.testing.assert_allclose(result["losses"], plain["losses"], rtol=0, atol=2e-2)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("name", launches.RECIPES)
def test_recipes_move_their_weights_in_bf16_as_in_fp32(outputs, launch, name):
    half, _ = result_of(outputs, launch, {"recipe": name, "bf16": True})
    full, _ = result_of(outputs, "multi_gpu", {"recipe": name, "bf16": False})
    assert full["moved"] > 0.5
    assert half["moved"] == pytest.approx(full["moved"], abs=0.02)
    assert half["change"] == pytest.approx(full["change"], rel=0.25)


def train_on_text(folder: Path) -> None:
    """Runs in a process of its own."""
    launches.let_deepspeed_run_on_cpu()
    import deepspeed

    deepspeed.init_distributed("gloo")
    found = {}
    for stage in (2, 3):
        launches.reset_state()
        settings = {
            "zero_optimization": {"stage": stage},
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
        }
        args = {"deepspeed": settings, "weight_decay": 0.1, "max_steps": 2}
        trainer = trainer_for("qwen3_vl", folder, make_dataset(4, num_images=(0, 0)), args)
        start = launches.exact_weights(trainer)
        trainer.train()
        moved = {name: not torch.equal(w, start[name]) for name, w in launches.exact_weights(trainer).items()}
        found[stage] = {
            "vision": any(is_moved for name, is_moved in moved.items() if part_of(name) != "language_model"),
            "language": any(is_moved for name, is_moved in moved.items() if part_of(name) == "language_model"),
        }
    (folder / "found.json").write_text(json.dumps(found))


def test_deepspeed_on_one_process_leaves_the_vision_tower_alone_in_steps_of_text(tmp_path):
    pytest.importorskip("deepspeed")
    environment = {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    Run(train_on_text, tmp_path, RANK="0", LOCAL_RANK="0", DS_ACCELERATOR="cpu", **environment).finish()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {stage: {"vision": False, "language": True} for stage in ("2", "3")}


def train_on_text_with_reentrant_checkpoints(folder: Path) -> None:
    """Runs in each of two processes."""
    args = {"max_steps": 3, "weight_decay": 0.1, "gradient_checkpointing": True}
    args["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    trainer = trainer_for("qwen3_vl", folder, make_dataset(8, num_images=(0, 0)).remove_columns("images"), args)
    start = weights(trainer)
    trainer.train()
    parts = {part_of(name) for name, weight in weights(trainer).items() if not torch.equal(weight, start[name])}
    if trainer.is_world_process_zero():
        (folder / "found.json").write_text(json.dumps(sorted(parts)))


def test_ddp_trains_on_text_alone_with_reentrant_checkpoints(tmp_path):
    """DDP does not look for unused parameters then, and no set has a column of images."""
    Run(train_on_text_with_reentrant_checkpoints, tmp_path, num_processes=2).finish()
    assert json.loads((tmp_path / "found.json").read_text()) == ["language_model"]
