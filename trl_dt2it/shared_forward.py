"""Reading one row per pair with a model: which models can, and their forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .attention import SHARED_PREFIX, register_shared_prefix_attention
from .families import FAMILIES
from .image_features import ROPE_INPUTS
from .shared_prefix import SharedPrefix


def why_not_shared(model: Any) -> str | None:
    """
    Why a model cannot read one row per pair.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward model.

    Returns:
        `str` or `None`: the end of a sentence that begins with the model, or `None` if it can.
    """
    model = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    model_type = model.config.model_type
    proven = [name for name, family in FAMILIES.items() if family.shares_prefix]
    if model_type not in proven:
        return (
            f"is of the family `{model_type}`, for which it is not proven to be exact; proven are {', '.join(proven)}"
        )
    text = model.config.get_text_config()
    windowed = {kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"}
    if windowed or getattr(text, "sliding_window", None) is not None:
        return "has a language model with sliding or chunked attention"
    attention = model.model.get_decoder().config._attn_implementation.removeprefix(SHARED_PREFIX)
    if attention != "sdpa" and "flash" not in attention:
        return f'has `attn_implementation="{attention}"`, which it does not work with; use "sdpa" or FlashAttention'
    return None


def decide_share_prefix(wish: str, model: Any) -> bool:
    """
    Whether a model shall read one row per pair.

    Args:
        wish (`str`):
            `"auto"`, `"true"` or `"false"`.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward model.

    Returns:
        `bool`

    Raises:
        `ValueError`: if it shall and cannot; the message says why.
    """
    if wish == "false":
        return False
    reason = why_not_shared(model)
    if wish == "true" and reason is not None:
        raise ValueError(
            f'`share_prefix=True`, but the model {reason}. Set `share_prefix="auto"` to give it two rows per pair.'
        )
    return reason is None


def use_shared_prefix(model: Any) -> None:
    """
    Lets a model's language model read several branches behind one prefix. Rows without a layout are read as before.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Changed in place; doing it twice is the same as doing it once.

    Raises:
        `ValueError`: if the model cannot; the message says why.
    """
    decoder = model.model.get_decoder()
    attention = decoder.config._attn_implementation
    if attention.startswith(SHARED_PREFIX):
        return
    if (reason := why_not_shared(model)) is not None:
        raise ValueError(f"{type(model).__name__} cannot read one row per pair: it {reason}.")
    # Not by `set_attn_implementation`, which would look for a kernel of this name.
    decoder.config._attn_implementation = register_shared_prefix_attention(attention)
    _leave_out_unread_tokens(decoder.layers[-1])


def _leave_out_unread_tokens(layer: Any) -> None:
    """
    Lets the feed-forward part of the last layer run on the tokens alone at which a reward is read.

    Behind the attention of the last layer no token looks at another, so what it makes of the others is never used.
    Their result is left at what attention made of them. The hooks find the layout among the arguments of the layer's
    attention, so that a layer that is computed again for gradient checkpointing does the same again.
    """
    if "leaves_out_unread_tokens" in vars(layer):  # the attention was set anew since
        return
    layer.leaves_out_unread_tokens = True
    layouts: list[SharedPrefix | None] = [None]

    def see_layout(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        layouts[0] = kwargs.get("shared_prefix")

    def select(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        layout = layouts[0]
        return None if layout is None else (args[0][:, layout.read_at],)

    def put_back(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        layout = layouts[0]
        if layout is None:
            return None
        shape = (1, sum(layout.part_lengths), output.shape[-1])
        index = torch.tensor(layout.read_at, device=output.device)
        return output.new_zeros(shape).index_copy(1, index, output)

    layer.self_attn.register_forward_pre_hook(see_layout, with_kwargs=True)
    layer.mlp.register_forward_pre_hook(select)
    layer.mlp.register_forward_hook(put_back)


def last_hidden_states(base: Any, input_ids: torch.Tensor, pair_layout: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """
    What the language model makes of the last token of each branch.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            Base model of a reward model that went through [`use_shared_prefix`].
        input_ids (`torch.Tensor` of shape `(1, T)`):
            The packed row.
        pair_layout (`torch.Tensor` of shape `(G, 1 + N)`):
            Number of tokens of the prefix and of the branches of each group.
        kwargs:
            What else the base model takes, images among it.

    Returns:
        `torch.Tensor` of shape `(R, H)` for R branches: first branch of every group, second of every group, ...

    Raises:
        `ValueError`: if the layout is not that of the row.
    """
    layout = SharedPrefix(pair_layout.tolist(), input_ids.device)
    num_tokens = sum(map(sum, layout.lengths))
    if input_ids.shape != (1, num_tokens):
        raise ValueError(
            f"`pair_layout` describes one row of {num_tokens} tokens, but `input_ids` has shape "
            f"{tuple(input_ids.shape)}."
        )
    outputs = base(
        input_ids=input_ids,
        # Of four dimensions, so that transformers takes it for finished and makes none of its own; it is not read.
        attention_mask=input_ids.new_ones(1, 1, 1, 1),
        position_ids=layout.position_ids(_rope_positions(base, input_ids, layout, kwargs)),
        shared_prefix=layout,
        use_cache=False,
        **kwargs,
    )
    return outputs.last_hidden_state[0, layout.read_at]


def _rope_positions(
    base: Any, input_ids: torch.Tensor, layout: SharedPrefix, kwargs: dict[str, Any]
) -> list[torch.Tensor] | None:
    """M-RoPE positions of each prefix and the token behind it, or `None` where positions simply count up."""
    grids = {name: kwargs[name] for name in ROPE_INPUTS if name in kwargs}
    if not grids or "get_rope_index" not in dir(type(base)):
        return None
    totals = [sum(lengths) for lengths in layout.lengths]
    wanted = [lengths[0] + 1 for lengths in layout.lengths]

    def beginnings(row: torch.Tensor) -> torch.Tensor:
        parts = [part[:length] for part, length in zip(row.split(totals), wanted, strict=True)]
        return pad_sequence(parts, batch_first=True)

    positions, _ = base.get_rope_index(
        input_ids=beginnings(input_ids[0]),
        attention_mask=beginnings(torch.ones_like(input_ids[0])),
        mm_token_type_ids=beginnings(kwargs["mm_token_type_ids"][0]),
        **grids,
    )  # (3, G, 1 + longest prefix)
    return [positions[:, index, :length] for index, length in enumerate(wanted)]
