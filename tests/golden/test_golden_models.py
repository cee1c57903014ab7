"""Golden models: the configuration, the names and the weights of a saved reward model of each family."""

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.families import FAMILIES, build_tokenizer, family_dir
from tests.families_chat import CHATS
from tests.trainers import text_model
from trl_dt2it import load_reward_model

from .golden import check
from .tables import files


def with_known_weights(source: Path, folder: Path) -> Path:
    """A checkpoint whose weights are the same on all machines, as no random ones are."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    weights = load_file(source / "model.safetensors")
    for name, tensor in weights.items():
        numbers = (torch.arange(tensor.numel()) + zlib.crc32(name.encode())) % 251 - 125
        weights[name] = (numbers / 1024).to(tensor.dtype).reshape(tensor.shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def saved(folder: Path, before: Path) -> dict:
    """The saved model as JSON: changes of its configuration from the one before, and its weights by name."""
    config, native = (json.loads((one / "config.json").read_text()) for one in (folder, before))
    weights = load_file(folder / "model.safetensors")
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if name != "score.weight":
            digest.update(tensor.numpy().tobytes())
    return {
        "files": files(folder),
        "config": _changed(native, config),
        "weights": {name: list(tensor.shape) for name, tensor in sorted(weights.items())},
        "dtypes": sorted({str(tensor.dtype) for tensor in weights.values()}),
        "sha256": digest.hexdigest(),
    }


def _changed(before: dict, after: dict) -> dict:
    """Keys that are new or have another value; `None` for those that are gone."""
    changes = {name: None for name in before if name not in after}
    for name, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(name), dict):
            value = _changed(before[name], value)
            changes |= {name: value} if value else {}
        elif name not in before or before[name] != value:
            changes[name] = value
    return changes


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models(family, tmp_path):
    native = with_known_weights(family_dir(family), tmp_path / "native")
    torch.manual_seed(0)
    model = load_reward_model(native, dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    found = saved(tmp_path / "saved", native)
    # The new head is as wide as transformers draws it, and from the global generator.
    width = model.config.get_text_config().initializer_range
    assert model.score.weight.std().item() == pytest.approx(width, rel=0.3)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype="float32")
    found["class"] = [type(model).__name__, type(again).__name__, type(AutoConfig.from_pretrained(native)).__name__]
    check(f"model_{family}", found)


def test_a_saved_text_model(tmp_path):
    text_model(build_tokenizer(CHATS["qwen3_vl"])).save_pretrained(tmp_path / "stock")
    native = with_known_weights(tmp_path / "stock", tmp_path / "native")
    model = load_reward_model(native, dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    check("model_text", {**saved(tmp_path / "saved", native), "class": [type(model).__name__]})
