"""One row per pair: the prompt and its images once, followed by every answer.

A batch of pairs is one row without padding, `[prompt | chosen | rejected][prompt | chosen | rejected]...`. The shared
part is the longest common token prefix of the full conversations, so that each answer is read with exactly the tokens
that a server would see. Every answer attends to its prefix and to itself, and its positions go on where the prefix
ends. The same holds for any number of answers, called branches here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch


class Segment(NamedTuple):
    """Tokens `[start, stop)` of a row, which attend causally to themselves and to all of `[prefix, prefix_stop)`."""

    start: int
    stop: int
    prefix: int
    prefix_stop: int


class SharedPrefix:
    """
    Where the parts of a packed row lie, in the forms that the attention implementations need.

    A plain class, because it travels among the arguments of sharded layers: to cast them, torch rebuilds every
    dataclass it finds there, and finds no tensors in anything else.

    Args:
        lengths (`list[list[int]]` of G lists of length 1 + N):
            For each group the number of tokens of its prefix and of its N branches; 0 for a branch that is not there.
        device (`torch.device`):
            Where the row is.
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
        """
        The keys or values that each segment sees.

        Args:
            parts (`Sequence[torch.Tensor]`):
                Those of each prefix and each branch, as [`part_lengths`] cuts them, of shape `(1, heads, length, D)`.

        Returns:
            `list[torch.Tensor]`: one a segment, of shape `(1, heads, prefix + length, D)`.
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
        once for all layers."""
        shape = (num_queries, num_prefix + num_queries)
        if shape not in self._masks:
            self._masks[shape] = torch.ones(shape, dtype=torch.bool, device=self.device).tril(num_prefix)
        return self._masks[shape]

    def position_ids(self, prefix_positions: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """
        Positions of all tokens: those of a branch start where its prefix ends.

        Args:
            prefix_positions (`Sequence[torch.Tensor]`, *optional*):
                For each group the positions of its prefix and of one token after it, of shape `(A, 1 + prefix)` for A
                axes (3 for M-RoPE). By default 0, 1, 2, ...

        Returns:
            `torch.Tensor` of shape `(1, T)`, or `(A, 1, T)` with `prefix_positions`.
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
    """
    Length of the longest common prefix of token rows that leaves each at least one token of its own.

    Args:
        branches (`Sequence[torch.Tensor]` of vectors):
            Token ids of the full conversations.

    Returns:
        `int`
    """
    limit = min(len(branch) for branch in branches) - 1
    same = torch.ones(limit, dtype=torch.bool)
    for branch in branches[1:]:
        same &= branch[:limit] == branches[0][:limit]
    return limit if bool(same.all()) else int(same.to(torch.int8).argmin())


def pack_branches(groups: Sequence[Sequence[dict[str, torch.Tensor]]], unshared_ids: set[int]) -> dict | None:
    """
    Lays groups of conversations that begin alike into one row.

    Args:
        groups (`Sequence[Sequence[dict[str, torch.Tensor]]]`):
            For each of G groups its conversations, each a dict of vectors of shape `(L,)` with `input_ids` and what
            else there is per token. A group with less than N of them, the most that a group has, holds the last ones.
        unshared_ids (`set[int]`):
            Tokens that only a prefix may hold: those that stand for pieces of an image or a video.

    Returns:
        `dict` or `None`: `pair_layout` of shape `(G, 1 + N)` and dtype `int64`, and the vectors of all parts, joined,
        of shape `(1, T)`; `None` if a conversation has such a token behind what it shares.
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
