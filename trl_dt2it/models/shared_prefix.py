"""Prompts and images encoded once per pair: the layout, attention and forward pass of one row, and image features."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, logging

from .families import FAMILIES, PIXELS, ROPE_INPUTS


logger = logging.get_logger(__name__)

# Prefix to the name of the attention implementation that a shared prefix is read with.
SHARED_PREFIX = "shared_prefix_"


class Segment(NamedTuple):
    """Tokens `[start, stop)` of a row, which see themselves causally and all of `[prefix, prefix_stop)`."""

    start: int
    stop: int
    prefix: int
    prefix_stop: int


class SharedPrefix:
    """The layout of a packed row, in the forms that the attention implementations need."""

    # No dataclass: it is an argument of sharded layers, and to cast these torch rebuilds every dataclass among them.

    def __init__(self, lengths: list[list[int]], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device
        self.segments: list[Segment] = []
        last_tokens: list[list[int]] = [[] for _ in lengths[0][1:]]
        position = 0
        for prefix_length, *completions in lengths:
            prefix = position
            position = prefix_stop = prefix + prefix_length
            for index, length in enumerate(completions):
                if length == 0:
                    continue
                # The first completion goes with its prefix.
                start, seen_stop = (prefix, prefix) if position == prefix_stop else (position, prefix_stop)
                self.segments.append(Segment(start, position + length, prefix, seen_stop))
                position += length
                last_tokens[index].append(position - 1)
        # Ordered by completion, then by group: first all chosen, then all rejected.
        self.read_at = [position for of_groups in last_tokens for position in of_groups]
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    @cached_property
    def query_lengths(self) -> list[int]:
        """Numbers of tokens of the segments, which tile the row."""
        return [segment.stop - segment.start for segment in self.segments]

    @cached_property
    def part_lengths(self) -> list[int]:
        """Numbers of tokens of the prefixes and completions, in the order of the row."""
        return [length for lengths in self.lengths for length in (lengths[0], *filter(None, lengths[1:]))]

    def gather(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the keys or values `(1, heads, prefix + length, D)` that each segment sees."""
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
        ends = (pad(lengths.cumsum(0), (1, 0)).to(self.device, torch.int32) for lengths in (query, key))
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, (*ends, int(query.max()), int(key.max())), strict=True))

    def varlen_on(self, device: torch.device) -> dict[str, Any]:
        """Move [`varlen`] to the device of a layer, which `device_map` may have put on another than the first."""
        return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in self.varlen.items()}

    @cached_property
    def key_index(self) -> torch.Tensor:
        """Positions `(K,)` int64 of the keys of all segments, one after the other."""
        parts = [torch.arange(a, b) for s in self.segments for a, b in ((s.prefix, s.prefix_stop), (s.start, s.stop))]
        return torch.cat(parts).to(self.device)

    def mask(self, num_queries: int, num_prefix: int) -> torch.Tensor:
        """Return the keys, prefix first, that a completion sees: bool `(num_queries, num_prefix + num_queries)`."""
        shape = (num_queries, num_prefix + num_queries)
        if self.device.type == "cuda":  # the fused kernels know this mask by name
            return causal_lower_right(*shape)
        if shape not in self._masks:  # by its name, torch would write it out anew in every layer
            self._masks[shape] = torch.ones(shape, dtype=torch.bool, device=self.device).tril(num_prefix)
        return self._masks[shape]

    def position_ids(self, prefix_positions: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Return the positions `(1, T)` of all tokens; each completion's follow its prefix."""
        parts = []
        longest = max(max(lengths) for lengths in self.lengths)
        steps = torch.arange(longest + 1, device=self.device)[None]
        for index, (prefix_length, *completions) in enumerate(self.lengths):
            known = steps[:, : prefix_length + 1] if prefix_positions is None else prefix_positions[index]
            parts.append(known[:, :prefix_length])
            parts += [known[:, prefix_length:] + steps[:, :length] for length in completions if length]
        positions = torch.cat(parts, dim=1)
        return positions if prefix_positions is None else positions[:, None]


def common_prefix_length(rows: Sequence[torch.Tensor]) -> int:
    """Return the length of the longest prefix that token rows share, short of the last token of each."""
    limit = min(map(len, rows)) - 1
    first = rows[0][:limit]
    same = torch.stack([row[:limit] == first for row in rows]).all(dim=0)
    return limit if bool(same.all()) else int(same.to(torch.int8).argmin())


def pack_completions(groups: Sequence[Sequence[dict[str, torch.Tensor]]], unshared_ids: set[int]) -> dict | None:
    """Lay groups of conversations that begin alike into one row, with its `pair_layout` `(G, 1 + N)` int64, or return
    `None` if a completion holds one of `unshared_ids`."""
    layout: list[list[int]] = []
    parts: list[dict[str, torch.Tensor]] = []
    special = torch.tensor(sorted(unshared_ids), dtype=torch.int64)
    most = max(map(len, groups))
    for group in groups:
        prefix = common_prefix_length([row["input_ids"] for row in group])
        if any(bool(torch.isin(row["input_ids"][prefix:], special).any()) for row in group):
            return None
        layout.append([prefix, *[0] * (most - len(group)), *(len(row["input_ids"]) - prefix for row in group)])
        parts.append({key: value[:prefix] for key, value in group[0].items()})
        parts += [{key: value[prefix:] for key, value in row.items()} for row in group]
    packed = {"pair_layout": torch.tensor(layout)}
    for key in sorted({key for part in parts for key in part}):
        packed[key] = torch.cat([part.get(key, torch.zeros_like(part["input_ids"])) for part in parts])[None]
    return packed


def reward_order(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the group and the completion of each reward of a packed row, given the numbers of completions of its
    groups. A group with fewer than others has the last columns of the layout."""
    most = max(counts)
    columns = ((column, group) for column in range(most) for group in range(len(counts)))
    return [(group, column - most + counts[group]) for column, group in columns if column >= most - counts[group]]


def usable_attention(implementation: str | None) -> str | None:
    """Return the attention implementation if it can run, otherwise `"sdpa"`, with a warning."""
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


def sdpa_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_prefix: SharedPrefix | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by torch's scaled dot products: `query` `(1, heads, T, D)`, `key` and `value` `(1, key-value heads, T,
    D)`, returns `(1, T, heads, D)`. One call per segment, or per row where torch has a kernel for it."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if shared_prefix is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    if torch.is_autocast_enabled(query.device.type):
        # A named mask bypasses autocast, and norms leave queries and keys in another dtype than values.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    if _has_varlen_kernel(query, kwargs):
        # All segments of the row in one call, the causal mask aligned to the bottom right.
        index = shared_prefix.key_index.to(key.device)
        k, v = (states[0].transpose(0, 1)[index] for states in (key, value))
        options: dict[str, Any] = {"scale": kwargs.get("scaling"), "window_size": (-1, 0)}
        options |= {"enable_gqa": query.shape[1] != key.shape[1]}
        lengths = shared_prefix.varlen_on(query.device).values()
        return cast(torch.Tensor, varlen_attn(query[0].transpose(0, 1), k, v, *lengths, **options))[None], None
    # Split all at once: the gradient of a slice is as large as the whole tensor, that of a split is not.
    queries = query.split(shared_prefix.query_lengths, dim=2)
    keys, values = (shared_prefix.gather(states.split(shared_prefix.part_lengths, dim=2)) for states in (key, value))
    results = []
    for (start, stop, prefix, prefix_stop), q, k, v in zip(shared_prefix.segments, queries, keys, values, strict=True):
        mask: Any = None
        if prefix != prefix_stop and stop - start > 1:
            mask = shared_prefix.mask(stop - start, prefix_stop - prefix)
        results.append(attend(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(results, dim=1), None


def _has_varlen_kernel(query: torch.Tensor, options: dict[str, Any]) -> bool:
    """Tell whether torch's FlashAttention for rows of unequal lengths takes these queries."""
    # A CPU may not launch the small calls for each segment as fast as a GPU computes them.
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and not options.get("dropout")
    )


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
    """Attend by FlashAttention, all segments of a row in one call; returns `(1, T, heads, D)`."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    if shared_prefix is not None:
        index = shared_prefix.key_index.to(key.device)
        key, value = (states[:, index] for states in (key, value))
        attention_mask, is_causal = None, True  # aligned to the bottom right where the lengths differ
        kwargs |= shared_prefix.varlen_on(query.device)
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
    """Return the reason why a model cannot read one row per pair, or `None`."""
    model = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    model_type = model.config.model_type
    proven = [name for name, family in FAMILIES.items() if family.shares_prefix]
    if model_type not in proven:
        return f"is of the family `{model_type}`, for which it is not proven exact; proven are {', '.join(proven)}"
    text = model.config.get_text_config()
    has_window = getattr(text, "sliding_window", None) is not None
    if has_window or set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        return "has a language model with sliding or chunked attention"
    attention = model.model.get_decoder().config._attn_implementation.removeprefix(SHARED_PREFIX)
    if attention != "sdpa" and "flash" not in attention:
        return f'has `attn_implementation="{attention}"`, which it does not work with; use "sdpa" or FlashAttention'
    return None


def decide_share_prefix(setting: str, model: Any) -> bool:
    """Decide whether a model reads one row per pair, by `share_prefix` of the configuration."""
    if setting == "false":
        return False
    reason = why_not_shared(model)
    if setting == "true" and reason is not None:
        raise ValueError(
            f'`share_prefix=True`, but the model {reason}. Set `share_prefix="auto"` to give it two rows per pair.'
        )
    return reason is None


def use_shared_prefix(model: Any) -> None:
    """Enable a language model to read several completions behind one prefix; other rows are read as before."""
    decoder = model.model.get_decoder()
    attention = decoder.config._attn_implementation
    if attention.startswith(SHARED_PREFIX):
        return
    if (reason := why_not_shared(model)) is not None:
        raise ValueError(f"{type(model).__name__} cannot read one row per pair: it {reason}.")
    name = SHARED_PREFIX + attention.replace("/", "--")  # a slash would be taken for a kernel of the Hub
    is_sdpa = attention == "sdpa"
    attend: Any = sdpa_attention if is_sdpa else partial(flash_attention, implementation=attention)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if is_sdpa else "flash_attention_2"])
    decoder.config._attn_implementation = name  # `set_attn_implementation` would look for a kernel of this name
    _skip_unread_tokens(decoder.layers[-1])


def _skip_unread_tokens(layer: Any) -> None:
    """Run the feed-forward part of the last layer on the tokens alone at which a reward is read."""
    # Behind the last attention no token sees another, so the other results are never used; they stay what attention
    # made of them. The hooks find the layout among the arguments of the layer's attention, so that a layer computed
    # again for gradient checkpointing does the same again.
    if "skips_unread_tokens" in vars(layer):  # the attention was set anew since
        return
    layer.skips_unread_tokens = True
    layouts: list[SharedPrefix | None] = [None]

    def see_layout(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        layouts[0] = kwargs.get("shared_prefix")

    def select(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        layout = layouts[0]
        return None if layout is None else (args[0][:, layout.read_at],)

    def put_back(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        if (layout := layouts[0]) is None:
            return None
        shape = (1, sum(layout.part_lengths), output.shape[-1])
        index = torch.tensor(layout.read_at, device=output.device)
        return output.new_zeros(shape).index_copy(1, index, output)

    layer.self_attn.register_forward_pre_hook(see_layout, with_kwargs=True)
    layer.mlp.register_forward_pre_hook(select)
    layer.mlp.register_forward_hook(put_back)


def last_hidden_states(base: Any, input_ids: torch.Tensor, pair_layout: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return the hidden states `(R, H)` of the last token of each completion, from `input_ids` `(1, T)` and the
    `pair_layout` `(G, 1 + N)`."""
    layout = SharedPrefix(pair_layout.tolist(), input_ids.device)
    shape, total = tuple(input_ids.shape), sum(map(sum, layout.lengths))
    if shape != (1, total):
        raise ValueError(f"`pair_layout` describes one row of {total} tokens, but `input_ids` has shape {shape}.")
    outputs = base(
        input_ids=input_ids,
        # Never read; in four dimensions transformers takes it for a finished mask and makes none.
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
    """Return the M-RoPE positions of each prefix and its next token, or `None` where positions simply count up."""
    grids = {name: kwargs[name] for name in ROPE_INPUTS if name in kwargs}
    if not grids or "get_rope_index" not in dir(type(base)):
        return None
    totals = list(map(sum, layout.lengths))
    known = [lengths[0] + 1 for lengths in layout.lengths]

    def beginnings(row: torch.Tensor) -> torch.Tensor:
        parts = [part[:length] for part, length in zip(row.split(totals), known, strict=True)]
        return pad_sequence(parts, batch_first=True)

    positions, _ = base.get_rope_index(
        input_ids=beginnings(input_ids[0]),
        attention_mask=beginnings(torch.ones_like(input_ids[0])),
        mm_token_type_ids=beginnings(kwargs["mm_token_type_ids"][0]),
        **grids,
    )  # (3, G, 1 + longest prefix)
    return [positions[:, index, :length] for index, length in enumerate(known)]


def encode_once(
    base: PreTrainedModel, inputs: dict[str, Any], repeats: int | torch.Tensor, input_ids: torch.Tensor | None = None
) -> dict[str, Any]:
    """Encode the images and videos of a batch and return the inputs of a batch that shows them `repeats` times. Or
    these are `(G, 3)` int64, the numbers of answers, images and videos of G prompts, whose answers have a row each of
    `input_ids` `(R, L)`, in the order of [`reward_order`]."""
    inputs = dict(inputs)
    prompts: list[int] = []  # of each row
    if isinstance(repeats, torch.Tensor):
        prompts = [prompt for prompt, _ in reward_order(repeats[:, 0].tolist())]
    outputs = {}
    for number, (kind, pixels) in enumerate(PIXELS.items()):
        if inputs.get(pixels) is None:
            continue
        encode = getattr(base, f"get_{kind}_features")
        accepted = {name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs}
        features = encode(**accepted, return_dict=True)
        if isinstance(repeats, torch.Tensor):
            sizes = _placeholders(base, kind, cast(torch.Tensor, input_ids)[-len(repeats) :])
            show: Any = partial(_by_prompt, sizes=sizes, prompts=prompts)
            media = repeats[:, 1 + number].tolist()
            grids = [name for name in ROPE_INPUTS if name in inputs and (kind == "image") == name.startswith("image")]
            inputs |= {name: _by_prompt(inputs[name], sizes=media, prompts=prompts) for name in grids}
        else:
            show = partial(_repeat, repeats=repeats)
        features.pooler_output = show(features.pooler_output)
        if features.get("deepstack_features") is not None:  # one tensor per layer
            features.deepstack_features = [show(layer) for layer in features.deepstack_features]
        outputs[kind] = features
        del inputs[pixels]
    if not isinstance(repeats, torch.Tensor):
        inputs |= {name: torch.cat([inputs[name]] * repeats) for name in ROPE_INPUTS if name in inputs}
    return {**inputs, "mm_encoder_outputs": outputs} if outputs else inputs


def _repeat(features: torch.Tensor | list | tuple, repeats: int) -> torch.Tensor | list:
    """Repeat the features of all images: one tensor, or a list of one per image."""
    return torch.cat([features] * repeats) if isinstance(features, torch.Tensor) else list(features) * repeats


def _placeholders(base: PreTrainedModel, kind: str, rows: torch.Tensor) -> list[int]:
    """Count the tokens of each row, `(G, L)`, that stand for features of images, or of videos."""
    family = FAMILIES.get(base.config.model_type)
    # Where both have the same token, a batch holds one kind, and its tokens may be those of the other.
    kinds = [kind] if family is None or family.mixes_media else list(PIXELS)
    ids = rows.new_tensor([getattr(base.config, f"{one}_token_id") for one in kinds])
    return torch.isin(rows, ids).sum(dim=1).tolist()


def _by_prompt(features: torch.Tensor | list, *, sizes: list[int], prompts: list[int]) -> torch.Tensor | list:
    """Return the features of these prompts, one after the other, from those of all prompts: one tensor of them all, or
    a list of one per image. Of each prompt there are as many as `sizes` says."""
    is_list = not isinstance(features, torch.Tensor)
    every = torch.cat(list(features)) if is_list else cast(torch.Tensor, features)
    if len(every) != sum(sizes):
        every = every.flatten(0, -2)  # of each image so many
    parts = every.split(sizes)
    shown = torch.cat([parts[prompt] for prompt in prompts])
    return [shown] if is_list else shown
