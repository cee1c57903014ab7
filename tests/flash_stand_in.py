"""FlashAttention where there is no GPU: an exact and slow `flash_attn_varlen_func` in plain torch."""

from __future__ import annotations

import torch
from transformers import modeling_flash_attention_utils


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> torch.Tensor:
    """
    As in flash-attn 2.1 and later: sequence i has the queries `cu_seqlens_q[i:i + 2]` and the keys
    `cu_seqlens_k[i:i + 2]`, heads of keys and values are shared, and the causal mask is aligned to the bottom right.

    Args:
        q (`torch.Tensor` of shape `(queries, heads, D)`):
            Queries of all sequences.
        k, v (`torch.Tensor` of shape `(keys, key-value heads, D)`):
            Keys and values.

    Returns:
        `torch.Tensor` of shape `(queries, heads, D)`.
    """
    assert dropout_p == 0.0 and window_size == (-1, -1)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q[-1]) == len(q) and int(cu_seqlens_k[-1]) == len(k) == len(v)
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_k.diff().max()) == max_seqlen_k
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    results = []
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        keys, values = (states[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for states in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if causal:
            row = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
            scores = scores.masked_fill(torch.arange(len(keys)) > row, float("-inf"))
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(results)


def install(monkeypatch) -> list[dict]:
    """Puts the stand-in in the place of flash-attn; the list that it gives gets the arguments of every call."""
    calls: list[dict] = []

    def varlen(q, k, v, **kwargs):
        calls.append({"queries": len(q), "keys": len(k), **kwargs})
        return flash_attn_varlen_func(q, k, v, **kwargs)

    def no_flash(*args, **kwargs):
        raise AssertionError("a row with a layout has to take the varlen call")

    functions = (no_flash, varlen, None, None, None)
    process = modeling_flash_attention_utils._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda *args, **kwargs: (functions, (process, None)),
    )
    return calls
