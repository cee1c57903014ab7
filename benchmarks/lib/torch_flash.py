"""FlashAttention 2 without the package flash-attn: torch's own build of its kernels in the place of flash-attn.

torch carries the CUDA kernels of FlashAttention 2, those for rows of unequal length with key lengths of their own
among them. Here they get flash-attn's signature, and transformers is given them for `flash_attention_2`.
"""

from functools import cache
from typing import Any

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
    """As flash-attn's function of this name; on a CPU, the tests' exact stand-in for it."""
    assert dropout_p == 0.0 and tuple(window_size) == (-1, -1)
    if not q.is_cuda:
        from tests.flash_stand_in import flash_attn_varlen_func as stand_in

        lengths = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
        wide = [states.float() for states in (q, k, v)]
        return stand_in(*wide, *lengths, softmax_scale=softmax_scale, causal=causal).to(q.dtype)
    if q.shape[1] != k.shape[1] and not kernel_shares_heads():
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    return _kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """As flash-attn's function of this name, for rows of one length: `q` has shape `(rows, length, heads, D)`."""
    lengths = []
    for states in (q, k):
        rows, length = states.shape[:2]
        steps = torch.arange(0, (rows + 1) * length, length, device=states.device, dtype=torch.int32)
        lengths.append((steps, length))
    (steps_q, length_q), (steps_k, length_k) = lengths
    flat = [states.flatten(0, 1) for states in (q, k, v)]
    settings: dict[str, Any] = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
    return flash_attn_varlen_func(*flat, steps_q, steps_k, length_q, length_k, **settings, **kwargs).view_as(q)


def _kernel(q, k, v, steps_q, steps_k, length_q, length_k, scale, causal) -> torch.Tensor:
    lengths = (steps_q, steps_k, int(length_q), int(length_k))
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, scale=scale)[0]


@cache
def kernel_shares_heads() -> bool:
    """Whether the kernel reads keys and values of fewer heads than queries, also backwards; else they are repeated."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        states = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return states.requires_grad_()

    q, k, v, direction = draw(96, 4, 64), draw(160, 2, 64), draw(160, 2, 64), draw(96, 4, 64)
    steps = [torch.tensor([0, length // 2, length], device="cuda", dtype=torch.int32) for length in (96, 160)]
    found = []
    try:
        for repeats in (1, 2):
            keys, values = (states.repeat_interleave(repeats, dim=1) for states in (k, v))
            result = _kernel(q, keys, values, *steps, 48, 80, None, True)
            gradients = torch.autograd.grad(result, (q, k, v), direction.detach())
            found.append([result.detach(), *gradients])
    except RuntimeError:
        return False
    return all(((a - b).norm() < 1e-2 * b.norm()).item() for a, b in zip(*found, strict=True))


def install() -> None:
    """Gives transformers these functions for every FlashAttention implementation, for the rest of the process."""
    utils = modeling_flash_attention_utils
    functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    process = utils._lazy_define_process_function(flash_attn_varlen_func)
    utils.lazy_import_flash_attention = lambda *args, **kwargs: (functions, (process, None))


def set_attention(model: Any, implementation: str) -> None:
    """
    Switches a Qwen3-VL, vision tower and language model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Changed in place.
        implementation (`str`):
            `"sdpa"` or `"flash_attention_2"`, for which [`install`] has to have run.
    """
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation_internal = implementation  # setting it by its name asks for the package
