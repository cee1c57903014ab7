"""Two-image questions of a stream, of several processes and of chosen rows: those of memory."""

import json
from itertools import islice

import pytest
from torch.utils.data import DataLoader

from tests.data.t2i_pairs import mixed, pairs, raw, stream_of
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.t2i import reformulate_t2i, split_t2i


@pytest.mark.parametrize("both_orders", [False, True])
def test_a_stream_gives_the_rows_of_memory_in_every_epoch(both_orders):
    dataset = mixed()
    rows = raw(reformulate_t2i(dataset, both_orders=both_orders))
    stream = reformulate_t2i(dataset.to_iterable_dataset(num_shards=4), both_orders=both_orders)
    assert raw(stream) == rows
    stream.set_epoch(1)
    assert raw(stream) == rows
    for row, pair in zip(rows, mixed_good(dataset, 2 if both_orders else 1), strict=True):
        assert row["weight"] == pair["weight"]


def mixed_good(dataset, times):
    return [
        row for row in split_t2i(dataset)[0].remove_columns(["chosen_image", "rejected_image"]) for _ in range(times)
    ]


def test_a_stream_without_features_gives_the_same_rows_less_the_further_columns():
    dataset = mixed(60)
    rows = [{name: value for name, value in row.items() if name != "weight"} for row in raw(reformulate_t2i(dataset))]
    assert raw(reformulate_t2i(stream_of(raw(dataset)))) == rows


@pytest.mark.parametrize("seen", [0, 1, 60, 117])
def test_a_stream_resumes(seen):
    dataset = mixed()
    rows = raw(reformulate_t2i(dataset))
    stream = leave_images_encoded(reformulate_t2i(dataset.to_iterable_dataset()))
    iterator = iter(stream)
    assert list(islice(iterator, seen)) == rows[:seen]
    state = json.loads(json.dumps(stream.state_dict()))
    again = leave_images_encoded(reformulate_t2i(dataset.to_iterable_dataset()))
    again.load_state_dict(state)
    assert list(again) == rows[seen:]


def test_workers_of_a_loader_lose_no_row():
    dataset = mixed(60)
    stream = leave_images_encoded(reformulate_t2i(dataset.to_iterable_dataset(num_shards=4)))
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert list(loader) == raw(reformulate_t2i(dataset))


def test_processes_give_the_same_rows():
    dataset = mixed()
    assert (
        raw(reformulate_t2i(dataset, num_proc=2))
        == raw(reformulate_t2i(dataset, num_proc=1))
        == raw(reformulate_t2i(dataset))
    )


def test_a_set_with_chosen_rows_and_a_format_is_read_as_it_stands():
    dataset = mixed().select([5, 9, 2, 8, 100, 1]).with_format("numpy")
    assert [row["pair_id"] for row in raw(reformulate_t2i(dataset))] == ["p9", "p2", "p8", "p100", "p1"]


def test_no_image_is_decoded():
    dataset = pairs(3, chosen_image=[{"bytes": bytes([i]), "path": None} for i in range(3)])
    for made in (reformulate_t2i(dataset), reformulate_t2i(dataset.to_iterable_dataset())):
        assert [len(row["images"]) for row in raw(made)] == [2, 2, 2]
    good, bad = split_t2i(dataset)
    assert (len(good), len(bad)) == (3, 0)
