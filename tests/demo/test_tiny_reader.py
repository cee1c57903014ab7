"""The tiny model that ships with the package: it is what its script makes, and it has learned to see."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from tools import tiny_reader
from trl_dt2it import MultimodalPreferenceCollator, MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.demo import READER, READER_DIR
from trl_dt2it.demo.digits import demo_rows
from trl_dt2it.recipe import with_tiny
from trl_dt2it.training.pair_scoring import score_pairs


def settings(file):
    text = file.read_text("utf-8")
    if file.suffix != ".json":
        return text
    of_who_ran_it = {"local_files_only", "transformers_version"}
    return {name: value for name, value in json.loads(text).items() if name not in of_who_ran_it}


def test_what_ships_can_be_made_again(tmp_path, monkeypatch):
    """On few pairs, so that the weights differ; all else is the same, and the weights are those that were trained."""
    monkeypatch.setattr(tiny_reader, "PAIRS", 16)
    backbone = {}
    found = tiny_reader.backbone_of
    monkeypatch.setattr(tiny_reader, "backbone_of", lambda folder: backbone.setdefault("trained", found(folder)))
    tiny_reader.train_tiny_reader(tmp_path, seeing_epochs=1, epochs=1)
    for file in READER_DIR.iterdir():
        if file.suffix != ".safetensors":
            assert settings(tmp_path / file.name) == settings(file), file.name
    made, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path, READER_DIR))
    assert {name: (one.shape, one.dtype) for name, one in made.items()} == {
        name: (one.shape, torch.bfloat16) for name, one in shipped.items()
    }
    for name, weight in backbone["trained"].items():
        assert torch.equal(made[f"model.{name}"], weight.bfloat16()), name


def test_it_is_small_and_loads_by_its_name():
    assert sum(file.stat().st_size for file in READER_DIR.iterdir()) < 3e6
    assert not {file.suffix for file in READER_DIR.iterdir()} - {".json", ".safetensors", ".jinja"}
    assert json.loads((READER_DIR / "config.json").read_text())["dtype"] == "bfloat16"
    assert with_tiny(READER, "nowhere", 0) == str(READER_DIR)
    model = Qwen3VLForConditionalGeneration.from_pretrained(READER_DIR, dtype=torch.float32)
    assert 0.9e6 < model.num_parameters() < 1.3e6
    assert AutoProcessor.from_pretrained(READER_DIR).chat_template


@pytest.mark.parametrize("order", [0, 1])
def test_a_short_training_compares_images_that_nobody_has_seen(order, tmp_path):
    """From random weights it would take 2,000 steps; 60 pairs say how the answer is to be judged."""
    args = MultimodalRewardConfig(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=5e-4,
        loss_type="bt",
        image_check="none",
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        reward_statistics_pairs=0,
    )
    rows = demo_rows("digits_t2i", "images", {"num_pairs": 60, "seed": 5})
    trainer = MultimodalRewardTrainer(model=str(READER_DIR), args=args, train_dataset=rows)
    trainer.train()
    test = demo_rows("digits_t2i", "images", {"split": "test", "num_pairs": 100, "both_orders": True})
    test = test.select(range(order, 200, 2))
    collator = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(READER_DIR))
    rewards = score_pairs(trainer.model, test, collator, batch_size=50, show_progress=False)
    assert np.mean(rewards[:, 0] > rewards[:, 1]) >= 0.9
