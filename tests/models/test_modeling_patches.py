"""Patches as a matrix product: the convolution's values and gradients, under the convolution's names."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from trl_dt2it import load_reward_model
from trl_dt2it.models.modeling import PatchProjection, project_patches_by_matrix_product

from ..families import family_dir


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_convolutions(bias):
    torch.manual_seed(0)
    plain = nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=bias)
    model = nn.Sequential(copy.deepcopy(plain))
    project_patches_by_matrix_product(model)
    assert type(model[0]) is PatchProjection
    for shape in [(7, 3, 2, 4, 4), (2, 3, 4, 8, 4)]:  # patches; and a video that is yet to be cut
        patches = torch.randn(shape)
        outputs = [module(patches) for module in (plain, model[0])]
        torch.testing.assert_close(outputs[1], outputs[0])
        assert outputs[0].shape == outputs[1].shape
        for module, output in zip((plain, model[0]), outputs, strict=True):
            module.zero_grad()
            output.square().sum().backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(dict(model[0].named_parameters())[name].grad, parameter.grad)


def test_other_convolutions_are_left_alone():
    class Own(nn.Conv3d):
        pass

    kinds = [nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 2, groups=2), Own(4, 4, 2), nn.Conv2d(4, 4, 2)]
    model = nn.Sequential(*kinds)
    project_patches_by_matrix_product(model)
    assert [type(module) for module in model] == [nn.Conv3d, nn.Conv3d, Own, nn.Conv2d]


@pytest.mark.parametrize("family", ["glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_new_and_reloaded_models_have_it_and_keep_the_names(family, tmp_path):
    native = AutoModelForImageTextToText.from_pretrained(family_dir(family))
    names = {name for name, _ in native.model.named_parameters()}
    new = load_reward_model(family_dir(family))
    new.save_pretrained(tmp_path)
    for model in (new, load_reward_model(tmp_path)):
        assert [type(m) for m in model.modules() if isinstance(m, nn.Conv3d)].count(PatchProjection) == 1
        assert {name for name, _ in model.model.named_parameters()} == names
