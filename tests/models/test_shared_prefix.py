"""The layout of one row per pair, worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dt2it.models.shared_prefix import SharedPrefix, common_prefix_length, pack_completions


CPU = torch.device("cpu")


def ids(*values: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(values)}


def test_layout_of_two_pairs():
    """Tokens 0-2 prefix, 3-4 chosen, 5-8 rejected; then 9 prefix, 10 chosen, 11-13 rejected."""
    layout = SharedPrefix([[3, 2, 4], [1, 1, 3]], CPU)
    assert [tuple(segment) for segment in layout.segments] == [
        (0, 5, 0, 0),
        (5, 9, 0, 3),
        (9, 11, 9, 9),
        (11, 14, 9, 10),
    ]
    assert layout.read_at == [4, 10, 8, 13]  # both chosen, then both rejected
    assert layout.position_ids().tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 1, 2, 3]]
    assert layout.varlen["cu_seq_lens_q"].tolist() == [0, 5, 9, 11, 14]
    assert layout.varlen["cu_seq_lens_k"].tolist() == [0, 5, 12, 14, 18]
    assert (layout.varlen["max_length_q"], layout.varlen["max_length_k"]) == (5, 7)
    assert layout.varlen["cu_seq_lens_k"].dtype == torch.int32
    assert layout.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 9, 11, 12, 13]
    assert layout.mask(2, 3).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert layout.mask(2, 3) is layout.mask(2, 3)


def test_absent_completions_and_an_empty_prefix():
    """The second group has its second completion alone, as a dummy image has; the third shares nothing."""
    layout = SharedPrefix([[2, 1, 1], [2, 0, 1], [0, 2, 1]], CPU)
    assert [tuple(segment) for segment in layout.segments] == [
        (0, 3, 0, 0),
        (3, 4, 0, 2),
        (4, 7, 4, 4),
        (7, 9, 7, 7),
        (9, 10, 7, 7),
    ]
    assert layout.read_at == [2, 8, 3, 6, 9]
    assert layout.position_ids().tolist() == [[0, 1, 2, 2, 0, 1, 2, 0, 1, 0]]


def test_positions_with_axes_go_on_where_the_prefix_ends():
    """A prefix of a text token and a 2 x 2 image: the next token is at 1 + 2 on every axis."""
    prefix = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    layout = SharedPrefix([[5, 2, 1]], CPU)
    positions = layout.position_ids([prefix])
    assert positions.shape == (3, 1, 8)
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 3, 4, 3],
        [0, 1, 1, 2, 2, 3, 4, 3],
        [0, 1, 2, 1, 2, 3, 4, 3],
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (((1, 2, 3), (1, 2, 4)), 2),
        (((1, 2, 3), (1, 2, 3, 4)), 2),  # each keeps a token of its own
        (((5,), (5,)), 0),
        (((1, 2), (3, 4)), 0),
        (((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6)), 2),
        (((1, 2, 3),), 2),
    ],
)
def test_common_prefix_length(rows, expected):
    assert common_prefix_length([torch.tensor(row) for row in rows]) == expected


def test_packed_row():
    chosen = {**ids(7, 9, 1, 2), "mm_token_type_ids": torch.tensor([0, 1, 0, 0])}
    rejected = {**ids(7, 9, 3), "mm_token_type_ids": torch.tensor([0, 1, 0])}
    packed = pack_completions([[chosen, rejected], [ids(4, 5), ids(4, 6, 6)]], {9})
    assert packed["pair_layout"].tolist() == [[2, 2, 1], [1, 1, 2]]
    assert packed["input_ids"].tolist() == [[7, 9, 1, 2, 3, 4, 5, 6, 6]]
    # A row of text alone comes without types, and text is type 0.
    assert packed["mm_token_type_ids"].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 0]]


def test_an_image_behind_the_shared_part_cannot_be_packed():
    assert pack_completions([[ids(1, 9, 2), ids(3, 9, 2)]], {9}) is None
    assert pack_completions([[ids(1, 9, 2), ids(1, 9, 3)]], {9}) is not None


def test_a_group_of_one_takes_the_last_place():
    packed = pack_completions([[ids(1, 2), ids(1, 3)], [ids(4, 5, 6)]], set())
    assert packed["pair_layout"].tolist() == [[1, 1, 1], [2, 0, 1]]
    assert packed["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(TOKENS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_every_completion_reads_its_whole_conversation(groups):
    """Following the segments gives back each conversation, token by token, with positions 0, 1, 2, ..."""
    packed = pack_completions([[ids(*tokens) for tokens in group] for group in groups], set())
    layout = SharedPrefix(packed["pair_layout"].tolist(), CPU)
    row, positions = packed["input_ids"][0], layout.position_ids()[0]
    assert len(layout.segments) == 3 * len(groups)
    read, position_rows = [], []
    for start, stop, prefix, prefix_stop in layout.segments:
        index = [*range(prefix, prefix_stop), *range(start, stop)]
        read.append(row[index].tolist())
        position_rows.append(positions[index].tolist())
    assert read == [tokens for group in groups for tokens in group]
    assert all(line == list(range(len(line))) for line in position_rows)
    by_completion = [group[index][-1] for index in range(3) for group in groups]
    assert row[layout.read_at].tolist() == by_completion
    lengths = layout.varlen["cu_seq_lens_k"].diff().tolist()
    assert [part.tolist() for part in row[layout.key_index].split(lengths)] == read
