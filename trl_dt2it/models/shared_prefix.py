"""One row per pair: its layout, its attention and its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, logging

from .families import FAMILIES, ROPE_INPUTS


class Segment(NamedTuple):
    """Tokens `[start, stop)` of a row, which attend causally to themselves and to all of `[prefix, prefix_stop)`."""

    start: int
    stop: int
    prefix: int
    prefix_stop: int


class SharedPrefix:
    """Where the parts of a packed row lie, in the forms that the attention implementations need.

    A plain class, because it travels among the arguments of sharded layers: to cast them, torch rebuilds every
    dataclass it finds there, and finds no tensors in anything else.
    """

    def __init__(self, lengths: list[list[int]], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device
        self.segments: list[Segment] = []
        last_tokens: list[list[int]] = [[] for _ in self.lengths[0][1:]]
        start = 0
        for prefix_length, *branches in self.lengths:
            prefix = start
            prefix_stop = position = start + prefix_length
            for index, length in enumerate(branches):
                if length == 0:
                    continue
                if position == prefix_stop:  # the first branch goes with its prefix
                    self.segments.append(Segment(prefix, position + length, prefix, prefix))
                else:
                    self.segments.append(Segment(position, position + length, prefix, prefix_stop))
                position += length
                last_tokens[index].append(position - 1)
            start = position
        # Branch after branch, each in the order of the groups: first all chosen, then all rejected.
        self.read_at = [position for branch in last_tokens for position in branch]

    @cached_property
    def query_lengths(self) -> list[int]:
        """Number of tokens of each segment, which come one after the other."""
        return [segment.stop - segment.start for segment in self.segments]

    @cached_property
    def part_lengths(self) -> list[int]:
        """Number of tokens of each prefix and each branch, in the order of the row."""
        return [length for lengths in self.lengths for length in (lengths[0], *filter(None, lengths[1:]))]

    def gather(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The keys or values that each segment sees.

        Shapes: returns `(1, heads, prefix + length, D)`.
        """
        seen, remaining = [], iter(parts)
        for lengths in self.lengths:
            prefix = next(remaining)
            seen += [torch.cat([prefix, next(remaining)], dim=2) for length in lengths[1:] if length]
        return seen

    @cached_property
    def varlen(self) -> dict[str, Any]:
        """`cu_seq_lens_q` and `cu_seq_lens_k`, of shape `(S + 1,)` and dtype `int32`, and the two largest lengths."""
        query = torch.tensor(self.query_lengths)
        key = query + torch.tensor([segment.prefix_stop - segment.prefix for segment in self.segments])

        def cumulative(lengths: torch.Tensor) -> torch.Tensor:
            return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(self.device, torch.int32)

        return {
            "cu_seq_lens_q": cumulative(query),
            "cu_seq_lens_k": cumulative(key),
            "max_length_q": int(query.max()),
            "max_length_k": int(key.max()),
        }

    @cached_property
    def key_index(self) -> torch.Tensor:
        """Positions of the keys of all segments, one after the other; shape `(K,)`, dtype `int64`."""
        parts = [torch.arange(a, b) for s in self.segments for a, b in ((s.prefix, s.prefix_stop), (s.start, s.stop))]
        return torch.cat(parts).to(self.device)

    @cached_property
    def _masks(self) -> dict[tuple[int, int], torch.Tensor]:
        return {}

    def mask(self, num_queries: int, num_prefix: int) -> torch.Tensor:
        """Which keys a branch sees, its prefix first; bool of shape `(num_queries, num_prefix + num_queries)`, built
        once for all layers.
        """
        shape = (num_queries, num_prefix + num_queries)
        if shape not in self._masks:
            self._masks[shape] = torch.ones(shape, dtype=torch.bool, device=self.device).tril(num_prefix)
        return self._masks[shape]

    def position_ids(self, prefix_positions: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Positions of all tokens: those of a branch start where its prefix ends.

        Shapes: returns `(1, T)`.
        """
        parts = []
        longest = max(max(lengths) for lengths in self.lengths)
        steps = torch.arange(longest + 1, device=self.device)[None]
        for index, (prefix_length, *branches) in enumerate(self.lengths):
            known = steps[:, : prefix_length + 1] if prefix_positions is None else prefix_positions[index]
            parts.append(known[:, :prefix_length])
            parts += [known[:, prefix_length:] + steps[:, :length] for length in branches if length]
        positions = torch.cat(parts, dim=1)
        return positions if prefix_positions is None else positions[:, None]


def common_prefix_length(branches: Sequence[torch.Tensor]) -> int:
    """Length of the longest common prefix of token rows that leaves each at least one token of its own."""
    limit = min(len(branch) for branch in branches) - 1
    same = torch.ones(limit, dtype=torch.bool)
    for branch in branches[1:]:
        same &= branch[:limit] == branches[0][:limit]
    return limit if bool(same.all()) else int(same.to(torch.int8).argmin())


def pack_branches(groups: Sequence[Sequence[dict[str, torch.Tensor]]], unshared_ids: set[int]) -> dict | None:
    """Lays groups of conversations that begin alike into one row.

    Shapes: returns `(G, 1 + N)` `int64`.
    """
    keys = sorted({key for group in groups for branch in group for key in branch})
    layout: list[list[int]] = []
    parts: list[dict[str, torch.Tensor]] = []
    special = torch.tensor(sorted(unshared_ids), dtype=torch.int64)
    num_branches = max(map(len, groups))
    for group in groups:
        prefix = common_prefix_length([branch["input_ids"] for branch in group])
        if any(bool(torch.isin(branch["input_ids"][prefix:], special).any()) for branch in group):
            return None
        lengths = [len(branch["input_ids"]) - prefix for branch in group]
        layout.append([prefix, *[0] * (num_branches - len(group)), *lengths])
        parts.append({key: value[:prefix] for key, value in group[0].items()})
        parts += [{key: value[prefix:] for key, value in branch.items()} for branch in group]
    packed = {
        key: torch.cat([part.get(key, torch.zeros_like(part["input_ids"])) for part in parts])[None] for key in keys
    }
    return {"pair_layout": torch.tensor(layout), **packed}


logger = logging.get_logger(__name__)

# Goes before the name of the implementation that it is made of.
SHARED_PREFIX = "shared_prefix_"


def usable_attention(implementation: str | None) -> str | None:
    """The wished attention implementation where it can run, and `"sdpa"`, with a warning, where it cannot."""
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
    """Makes the form of an attention implementation that also reads shared prefixes known to transformers."""
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
    """torch's scaled dot-product attention, one call a segment; on CUDA in half precision, where torch has a kernel
    for segments of different lengths, one call a row.

    Shapes: `query` `(1, heads, T, D)`, `key, value` `(1, key-value heads, T, D)`, returns `(1, T, heads, D)`.
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
    for each segment are small, and a CPU may not launch them as fast as a GPU computes them.
    """
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
    """FlashAttention, one call a row: queries and keys of all segments with their own lengths, where the causal mask
    is aligned to the bottom right.

    Shapes: returns `(1, T, heads, D)`.
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


def why_not_shared(model: Any) -> str | None:
    """Why a model cannot read one row per pair."""
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
    """Whether a model shall read one row per pair."""
    if wish == "false":
        return False
    reason = why_not_shared(model)
    if wish == "true" and reason is not None:
        raise ValueError(
            f'`share_prefix=True`, but the model {reason}. Set `share_prefix="auto"` to give it two rows per pair.'
        )
    return reason is None


def use_shared_prefix(model: Any) -> None:
    """Let a language model read several completions behind one prefix; rows without a layout are read as before."""
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
    """Lets the feed-forward part of the last layer run on the tokens alone at which a reward is read.

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
    """What the language model makes of the last token of each branch.

    Shapes: `input_ids` `(1, T)`, `pair_layout` `(G, 1 + N)`, returns `(R, H)`.
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
