"""Attention of branches behind a shared prefix, and which implementation can run here.

An implementation comes in a form that also reads rows with a [`~trl_dt2it.shared_prefix.SharedPrefix`] layout; given a
row without one, it does what it always does. So the language model keeps one implementation, and a layer that is
computed again for gradient checkpointing finds the same one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, logging


if TYPE_CHECKING:
    from .shared_prefix import SharedPrefix

logger = logging.get_logger(__name__)

# Goes before the name of the implementation that it is made of.
SHARED_PREFIX = "shared_prefix_"


def usable_attention(implementation: str | None) -> str | None:
    """
    The wished attention implementation where it can run, and `"sdpa"`, with a warning, where it cannot.

    Args:
        implementation (`str`, *optional*):
            Such as `"flash_attention_2"`; `None` leaves the choice to transformers.

    Returns:
        `str` or `None`
    """
    is_available = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if implementation not in is_available:
        return implementation
    if not torch.cuda.is_available():
        reason = "there is no CUDA device"
    elif not is_available[implementation]():
        reason = "it is not installed (`pip install trl-dt2it[flash]` installs FlashAttention 2)"
    else:
        return implementation
    logger.warning(f'`attn_implementation="{implementation}"` cannot run because {reason}; "sdpa" is used instead.')
    return "sdpa"


def register_shared_prefix_attention(implementation: str) -> str:
    """
    Makes the form of an attention implementation that also reads shared prefixes known to transformers.

    Args:
        implementation (`str`):
            `"sdpa"`, or a FlashAttention implementation: `"flash_attention_2"`, `"flash_attention_3"` or a kernel of
            the Hub.

    Returns:
        `str`: its name, for `set_attn_implementation`.
    """
    name = SHARED_PREFIX + implementation.replace("/", "--")  # a slash would be taken for a kernel of the Hub
    if implementation == "sdpa":
        AttentionInterface.register(name, sdpa_attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    else:
        AttentionInterface.register(name, partial(flash_attention, implementation=implementation))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    return name


def sdpa_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_prefix: SharedPrefix | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    torch's scaled dot-product attention, one call a segment; on CUDA in half precision, where torch has a kernel for
    segments of different lengths, one call a row.

    Args:
        module (`nn.Module`):
            The attention layer.
        query (`torch.Tensor` of shape `(1, heads, T, D)`):
            Queries of a packed row.
        key, value (`torch.Tensor` of shape `(1, key-value heads, T, D)`):
            Keys and values.
        attention_mask (`torch.Tensor`, *optional*):
            Read without `shared_prefix` only.
        shared_prefix ([`~trl_dt2it.shared_prefix.SharedPrefix`], *optional*):
            Layout of the row.
        kwargs:
            Passed on.

    Returns:
        `tuple`: the result, of shape `(1, T, heads, D)`, and `None`.
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if shared_prefix is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    if torch.is_autocast_enabled(query.device.type):
        # A mask with a name goes past autocast, and norms leave queries and keys in another dtype than values.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    if _has_varlen_kernel(query, kwargs):
        return _varlen_attention(query, key, value, shared_prefix, kwargs.get("scaling")), None
    # Cut all at once: the gradient of a slice is as large as what it was cut from, that of a split is not.
    queries = query.split(shared_prefix.query_lengths, dim=2)
    keys, values = (shared_prefix.gather(states.split(shared_prefix.part_lengths, dim=2)) for states in (key, value))
    results = []
    for (start, stop, prefix, prefix_stop), q, k, v in zip(shared_prefix.segments, queries, keys, values, strict=True):
        mask = None
        if prefix != prefix_stop and stop - start > 1:
            mask = _lower_right_mask(shared_prefix, stop - start, prefix_stop - prefix)
        results.append(attend(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(results, dim=1), None


def _has_varlen_kernel(query: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's own build of FlashAttention's kernel for rows of unequal lengths takes these queries. The calls
    for each segment are small, and a CPU may not launch them as fast as a GPU computes them."""
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and not options.get("dropout")
    )


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shared_prefix: SharedPrefix, scale: float | None
) -> torch.Tensor:
    """All segments of a row in one call, the causal mask aligned to the bottom right; gives `(1, T, heads, D)`."""
    index = shared_prefix.key_index.to(key.device)
    queries = query[0].transpose(0, 1)
    keys, values = (states[0].transpose(0, 1)[index] for states in (key, value))
    lengths = shared_prefix.varlen
    result = varlen_attn(
        queries,
        keys,
        values,
        lengths["cu_seq_lens_q"].to(query.device),
        lengths["cu_seq_lens_k"].to(query.device),
        lengths["max_length_q"],
        lengths["max_length_k"],
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return cast(torch.Tensor, result)[None]


def _lower_right_mask(shared_prefix: SharedPrefix, num_queries: int, num_prefix: int) -> torch.Tensor:
    """On CUDA the fused kernels know this mask by name; elsewhere torch would write it out in every layer."""
    if shared_prefix.device.type == "cuda":
        return causal_lower_right(num_queries, num_prefix + num_queries)
    return shared_prefix.mask(num_queries, num_prefix)


def flash_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_prefix: SharedPrefix | None = None,
    *,
    implementation: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    FlashAttention, one call a row: queries and keys of all segments with their own lengths, where the causal mask is
    aligned to the bottom right.

    Args:
        module, query, key, value, attention_mask, shared_prefix:
            As in [`sdpa_attention`].
        implementation (`str`):
            The FlashAttention implementation.
        scaling (`float`, *optional*):
            Factor of the scores.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the attention weights.
        is_causal (`bool`, *optional*):
            Read without `shared_prefix` only.
        kwargs:
            Passed on.

    Returns:
        `tuple`: the result, of shape `(1, T, heads, D)`, and `None`.
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    if shared_prefix is not None:
        # A layer may lie on another device than the first (`device_map`).
        index = shared_prefix.key_index.to(key.device)
        key, value = (states[:, index] for states in (key, value))
        attention_mask, is_causal = None, True
        for name, lengths in shared_prefix.varlen.items():
            kwargs[name] = lengths.to(query.device) if isinstance(lengths, torch.Tensor) else lengths
    result = _flash_attention_forward(
        query,
        key,
        value,
        attention_mask,
        query_length=query.shape[1],
        is_causal=module.is_causal if is_causal is None else is_causal,
        dropout=dropout,
        softmax_scale=scaling,
        target_dtype=get_target_dtype(query, module),
        attn_implementation=implementation,
        **kwargs,
    )
    return result, None
