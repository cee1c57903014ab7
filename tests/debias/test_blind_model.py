"""Blind margins of a trained model: what text gives away out of fold, and nothing of the images."""

import math

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from trl_dt2it.debias import model_blind_margins
from trl_dt2it.debias.blind_model import calibration
from trl_dt2it.demo.tiny import build_tiny_tokenizer

from ..families import family_dir
from ..rows import make_dataset, png
from ..trainers import config, text_model


COUNT = 24


def with_shortcut(*, seed: int = 0, **columns) -> Dataset:
    """Chosen answers say "temple" and rejected ones "flower", but for every eighth pair; images are of one size."""
    rng, data, rows = np.random.default_rng(seed), make_dataset(COUNT, num_images=(1,), **columns), []
    for index, row in enumerate(data):
        texts = ["temple temple temple.", "flower flower flower."][:: -1 if index % 8 == 0 else 1]
        answers = {
            side: [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
            for side, text in zip(("chosen", "rejected"), texts, strict=True)
        }
        picture = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
        rows.append({**row, **answers, "images": [{"bytes": png(picture), "path": None}]})
    return Dataset.from_list(rows, features=data.features)


def margins_of(tmp_path, data: Dataset, model=None, *, images="blank", **kwargs) -> np.ndarray:
    settings = {"learning_rate": 2e-3, "num_train_epochs": 3, "per_device_train_batch_size": 4, **kwargs}
    model = str(family_dir("qwen3_vl") if model is None else model)
    return model_blind_margins(data, model, config(tmp_path / "out", **settings), images=images)


GROUPS = [f"g{index // 2}" for index in range(COUNT)]


def test_a_shortcut_is_found_out_of_fold_and_no_image_is_seen(tmp_path):
    extra = {"strength": [float(index) for index in range(COUNT)], "margin": [9.0] * COUNT}
    data = with_shortcut(group_id=GROUPS)
    margins = margins_of(tmp_path, data)
    is_usual = np.arange(COUNT) % 8 != 0
    assert margins.shape == (COUNT,) and margins.dtype == np.float64
    assert ((margins > 0) == is_usual).all()
    # Log odds of 7 in 8, as far as 12 pairs a fold with Platt's targets tell: 10.5 of 12 right, not exp(9) to 1.
    assert 0.8 < np.median(np.abs(margins)) < 3.5
    # Other images, strengths, and margins that the trainer subtracts elsewhere: the same to the last bit.
    others = with_shortcut(seed=1, group_id=GROUPS, blind_margin=[1.0] * COUNT, **extra)
    np.testing.assert_array_equal(margins_of(tmp_path, others, blind_weighting=True, loss_type="margin"), margins)
    assert not list(tmp_path.rglob("*.safetensors"))  # no model is kept


def test_without_images_a_text_model_will_do(tmp_path):
    tokenizer = build_tiny_tokenizer()
    text_model(tokenizer).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    data = with_shortcut(group_id=GROUPS)
    margins = margins_of(tmp_path, data, tmp_path / "text", images="none", learning_rate=5e-3)
    assert ((margins > 0) == (np.arange(COUNT) % 8 != 0)).mean() > 0.8
    with pytest.raises(ValueError, match="The train set has images, but the model reads text only"):
        margins_of(tmp_path, data, tmp_path / "text")


def test_the_calibration_by_hand():
    """Nine of ten margins of 8 are right: with Platt's targets that is 9.083 of 10 on average, log odds of 2.293."""
    margins, ones = np.array([8.0] * 9 + [-8.0]), np.ones(10)
    mean = (9 * 11 / 12 + 1 / 12) / 10
    assert 8 * calibration(margins, ones, ones) == pytest.approx(math.log(mean / (1 - mean)), rel=1e-6)
    # The same for margins of another scale, and weights of another.
    assert 0.1 * calibration(margins / 80, 5 * ones, ones) == pytest.approx(math.log(mean / (1 - mean)), rel=1e-6)
    # All right: log odds of 11 to 1. Worse than a coin: none.
    assert calibration(np.ones(10), ones, ones) == pytest.approx(math.log(11), rel=1e-6)
    assert calibration(-margins, ones, ones) == calibration(np.zeros(10), ones, ones) == 0.0
    # A pair of weight 0 does not count, and one of confidence 0 counts as its mirror.
    assert calibration(margins, np.array([1.0] * 9 + [0.0]), ones) == pytest.approx(math.log(11) / 8, rel=1e-6)
    mirrored = calibration(np.full(10, 8.0), ones, np.array([1.0] * 9 + [0.0]))
    assert mirrored == pytest.approx(calibration(margins, ones, ones))
    assert calibration(margins, 0 * ones, ones) == 0.0


def test_misuse_is_said_at_start(tmp_path):
    data, args = with_shortcut(group_id=["g"] * COUNT), config(tmp_path)
    with pytest.raises(ValueError, match="`num_folds` is 2; it must be from 2 to 1, the number of groups"):
        model_blind_margins(data, "nowhere", args)
    with pytest.raises(ValueError, match='`images` is "gray"|`images` is \'gray\'; it must be "blank" or "none"'):
        model_blind_margins(data, "nowhere", args, images="gray")
    with pytest.raises(TypeError, match="`model` is a dict; pass its name or directory"):
        model_blind_margins(data, {}, args)
