"""The work of one row per pair: attention calls, pixels, tokens behind the last layer."""

from inspect import signature

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from trl_dt2it.models import shared_prefix

from ..flash_stand_in import flash_attn_varlen_func, install
from ..pairs import (
    SHARING_FAMILIES,
    collate,
    gradient_difference,
    model_of,
    rewards_and_gradients,
)
from ..rows import make_rows


@pytest.mark.parametrize("family", SHARING_FAMILIES)
def test_flash_attention_varlen_call(family, monkeypatch):
    """The FlashAttention path on the CPU: one call a layer, through an exact stand-in for the kernel."""
    calls = install(monkeypatch)
    rows = make_rows(3, num_images=(1, 0))
    model = model_of(family)
    batch = collate(family, rows, share_prefix=True)
    expected, expected_gradients = rewards_and_gradients(model, batch)
    assert not calls
    decoder = model.model.get_decoder()
    decoder.config._attn_implementation_internal = "flash_attention_2"  # setting it asks for a GPU
    rewards, gradients = rewards_and_gradients(model, batch)
    assert decoder.config._attn_implementation == "shared_prefix_flash_attention_2"
    assert (rewards - expected).abs().max() <= 1e-5
    assert gradient_difference(gradients, expected_gradients) <= 1e-4
    prefix, chosen, rejected = batch["pair_layout"].sum(0).tolist()
    assert [(call["queries"], call["keys"]) for call in calls] == [
        (prefix + chosen + rejected, 2 * prefix + chosen + rejected)
    ] * decoder.config.num_hidden_layers
    assert all(call["causal"] for call in calls)


@pytest.mark.parametrize("family", SHARING_FAMILIES)
def test_torch_varlen_call(family, monkeypatch):
    """The path of `sdpa` on CUDA in half precision, on the CPU: one call a layer, through an exact stand-in."""
    calls = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
        calls.append((len(q), len(k)))
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True)

    model, batch = model_of(family), collate(family, make_rows(3, num_images=(1, 0)), share_prefix=True)
    expected, expected_gradients = rewards_and_gradients(model, batch)
    monkeypatch.setattr(shared_prefix, "varlen_attn", varlen_attn)
    monkeypatch.setattr(shared_prefix, "_has_varlen_kernel", lambda query, options: True)
    rewards, gradients = rewards_and_gradients(model, batch)
    assert (rewards - expected).abs().max() <= 1e-5
    assert gradient_difference(gradients, expected_gradients) <= 1e-4
    prefix, chosen, rejected = batch["pair_layout"].sum(0).tolist()
    layers = model.model.get_decoder().config.num_hidden_layers
    assert calls == [(prefix + chosen + rejected, 2 * prefix + chosen + rejected)] * layers


def test_torchs_varlen_kernel_takes_what_we_give_it():
    given = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", "enable_gqa")
    assert set(given) <= set(signature(varlen_attn).parameters)
    assert "(-1, 0) for causal attention" in varlen_attn.__doc__
    assert not shared_prefix._has_varlen_kernel(
        torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16), {}
    )  # there is none here


def test_the_mask_that_cuda_kernels_know_by_name():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = torch.ones(3, 8, dtype=torch.bool).tril(5)
    named = attend(query, key, value, attn_mask=causal_lower_right(3, 8))
    torch.testing.assert_close(named, attend(query, key, value, attn_mask=mask))


def test_the_named_mask_under_autocast(monkeypatch):
    """As on a GPU with `bf16=True` and weights in float32. Qwen3's norms leave queries and keys in float32, the linear
    layer values in bfloat16, and the named mask takes no mixture."""
    model, batch = model_of("qwen3_vl"), collate("qwen3_vl", make_rows(3, num_images=(1, 0)), share_prefix=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = rewards_and_gradients(model, batch)
        monkeypatch.setattr(
            shared_prefix.SharedPrefix,
            "mask",
            lambda _, queries, prefix: causal_lower_right(queries, prefix + queries),
        )
        rewards, gradients = rewards_and_gradients(model, batch)
    assert expected.std() > 1e-3
    assert torch.equal(rewards, expected)
    assert gradient_difference(gradients, expected_gradients) <= 1e-4


def test_vision_tower_and_head_run_on_no_more_than_is_read(monkeypatch):
    """Pixels of each image once, in one row and in two; the head on the tokens that are read; no language head."""
    model, rows = model_of("qwen3_vl"), make_rows(3, num_images=(1, 2))
    seen, scored = [], []
    model.model.visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.score.register_forward_pre_hook(lambda _, args: scored.append(tuple(args[0].shape)))
    for share_prefix in (True, False):
        batch = collate("qwen3_vl", rows, share_prefix=share_prefix)
        model(**batch)
        assert seen.pop() == len(batch["pixel_values"]) == batch["image_grid_thw"].prod(1).sum()
        assert len(batch["image_grid_thw"]) == 4
        assert scored.pop() == (6, model.config.get_text_config().hidden_size)
    assert not seen and not scored
    assert not any("lm_head" in name for name, _ in model.named_modules())


def test_the_last_feed_forward_part_runs_on_the_tokens_that_are_read():
    model, rows = model_of("qwen3_vl"), make_rows(3, num_images=(1, 2))
    one, two = collate("qwen3_vl", rows, share_prefix=True), collate("qwen3_vl", rows)
    model(**one)  # installs what leaves the others out
    seen = []
    for layer in model.model.language_model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    model(**one)
    assert seen == [one["input_ids"].shape, (1, 6)]
    seen.clear()
    model(**two)
    assert seen == [two["input_ids"].shape] * 2


def test_rope_index_is_computed_once(monkeypatch):
    model, batch = model_of("qwen3_vl"), collate("qwen3_vl", make_rows(2, num_images=(1,)), share_prefix=True)
    calls = []
    original = type(model.model).get_rope_index

    def count(self, *args, **kwargs):
        calls.append(kwargs["input_ids"].shape)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "get_rope_index", count)
    model(**batch)
    assert calls == [(2, int(batch["pair_layout"][:, 0].max()) + 1)]
