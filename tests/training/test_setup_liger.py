"""Liger's kernels: in the language model alone, or refused at start in one sentence."""

import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor

from trl_dt2it import MultimodalRewardTrainer, load_reward_model
from trl_dt2it.training.setup import patch_backbone

from ..families import FAMILIES, family_dir
from ..rows import make_dataset, text_rows
from ..trainers import config, text_model, trainer_for


def test_it_is_refused_where_it_cannot_run(tmp_path):
    with pytest.raises(ValueError, match="`use_liger_kernel=True` needs a GPU .* runs on `cpu`; leave it out"):
        trainer_for("qwen3_vl", tmp_path, make_dataset(2), {"use_liger_kernel": True})


def patched(model: torch.nn.Module) -> set[str]:
    """Modules whose forward pass was replaced."""
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_alone_is_patched(family):
    pytest.importorskip("liger_kernel")
    model, other = load_reward_model(family_dir(family)), load_reward_model(family_dir(family))
    try:
        patch_backbone(model, {})
    except ValueError as error:  # which families there are depends on the release of Liger
        assert re.fullmatch("`use_liger_kernel=True`, but Liger .* (has no kernels for|does not fit) .*", str(error))
        pytest.skip(str(error))
    again = load_reward_model(family_dir(family))
    assert [type(m) for m in again.modules()] == [type(m) for m in other.modules()]
    assert not patched(other) and not patched(again)
    (language_model,) = (n for n, m in model.named_modules() if m is model.base_model.get_decoder())
    assert patched(model)
    assert all(name.startswith(f"{language_model}.") for name in patched(model))


def test_a_whole_family_is_not_silently_left_out():
    pytest.importorskip("liger_kernel")
    model = load_reward_model(family_dir("aya_vision"))
    model.base_model.get_decoder().config.model_type = model.config.model_type = "unknown"
    with pytest.raises(ValueError, match="Liger .* has no kernels for `unknown`; leave it out"):
        patch_backbone(model, {})


def test_text_models_and_settings(tmp_path):
    pytest.importorskip("liger_kernel")
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    model = text_model(tokenizer)
    MultimodalRewardTrainer(  # which changes the class
        model, args=config(tmp_path), train_dataset=Dataset.from_list(text_rows(2)), processing_class=tokenizer
    )
    wrong = "`cross_entropy`, which is for the language head.*has rms_norm, rope, swiglu"
    with pytest.raises(ValueError, match=wrong):
        patch_backbone(model, {"cross_entropy": True})
    with pytest.raises(ValueError, match="`geglu`, which does not exist"):
        patch_backbone(model, {"geglu": True})
    patch_backbone(model, {"swiglu": False, "rope": False, "fused_linear_cross_entropy": False})
    assert patched(model) and all(name.startswith("model.") and "norm" in name for name in patched(model))
