"""Both layouts of a batch, and how far their rewards and gradients lie apart."""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from trl_dt2it import MultimodalPreferenceCollator, load_reward_model
from trl_dt2it.models import families

from .families import FAMILIES, family_dir


SHARING_FAMILIES = [family for family in FAMILIES if families.FAMILIES[family].shares_prefix]


@functools.cache
def processor_of(family: str) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(family_dir(family))


def model_of(family: str, **kwargs) -> PreTrainedModel:
    torch.manual_seed(0)
    return load_reward_model(family_dir(family), dtype="float32", **kwargs).train()


def collate(family: str, rows: list[dict], **kwargs) -> dict:
    batch = MultimodalPreferenceCollator(processor_of(family), **kwargs)(rows)
    del batch["pairs"]
    return batch


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def plain_two_rows(batch: dict) -> dict:
    """Two rows as everybody makes them: the images of every pair twice, and nothing of ours in the forward pass."""
    repeats = batch.get("image_repeats", 1)
    images = {
        name
        for name in batch
        if name.startswith(("pixel_", "image_", "video_", "batch_num_", "num_frames_", "second_per_"))
    }
    return {
        name: torch.cat([value] * repeats) if name in images else value
        for name, value in batch.items()
        if name != "image_repeats"
    }


def rewards_and_gradients(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    rewards = model(**batch).logits[:, 0]
    (-logsigmoid(torch.sub(*rewards.chunk(2)))).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return rewards.detach(), gradients


def gradient_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """
    Largest relative difference over all parameters, as norms.

    A parameter whose true gradient is zero, such as the bias of the keys in a softmax, has round-off alone; so the
    norm that a difference is divided by is at least a thousandth of the largest norm of all.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(gradient.norm().item() for gradient in expected.values())
    return max(
        (actual[name] - gradient).norm().item() / max(gradient.norm().item(), floor)
        for name, gradient in expected.items()
    )


def compare(family: str, rows: list[dict], model=None) -> None:
    """Rewards to 1e-5 and gradients to 1e-4, in one row and in two."""
    model = model or model_of(family)
    one, two = collate(family, rows, share_prefix=True), collate(family, rows)
    assert "pair_layout" in one and "pair_layout" not in two
    expected, expected_gradients = rewards_and_gradients(model, plain_two_rows(two))
    assert expected.shape == (2 * len(rows),) and expected.std() > 1e-3
    rewards, gradients = rewards_and_gradients(model, one)
    assert (rewards - expected).abs().max() <= 1e-5
    assert gradient_difference(gradients, expected_gradients) <= 1e-4
