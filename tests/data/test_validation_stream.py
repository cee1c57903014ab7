"""Validation of a stream: the same rows on the same sides, in every epoch and for every reader."""

from collections import Counter

import numpy as np
import pytest
from datasets import IterableDataset
from torch.utils.data import DataLoader

from tests.data.validation_rows import EXPECTED, MIXED, dataset_of, notes, row, stream_of, swapped
from trl_dt2it.data.validation import validate


def test_a_stream_is_divided_alike():
    good, bad = validate(stream_of(MIXED), show=False)
    clean, quarantine = validate(dataset_of(MIXED), show=False)
    assert isinstance(good, IterableDataset) and isinstance(bad, IterableDataset)
    assert good.features == clean.features and bad.features == quarantine.features
    for _ in range(2):  # a second reading is the first again
        assert list(bad) == quarantine.to_list()
        decoded = list(good)
        assert [one["source_id"] for one in decoded] == clean["source_id"][:]
        assert [np.asarray(one["images"][0]).tolist() for one in decoded] == [
            np.asarray(one["images"][0]).tolist() for one in clean
        ]


def test_a_stream_without_features():
    good, bad = validate(IterableDataset.from_generator(lambda: iter(MIXED)), show=False)
    assert [one["prompt"] for one in good] == [MIXED[place]["prompt"] for place in (0, 2, 5)]
    assert notes(bad) == EXPECTED


def test_of_a_contradiction_in_a_stream_the_later_row_is_set_aside():
    rows = [row(0, pair_id="a"), row(1), swapped(row(0)), row(0), swapped(row(0))]
    good, bad = validate(stream_of(rows), show=False)
    assert len(list(good)) == 2
    assert notes(bad) == [
        (2, "contradictory_pair", "a prefers the other answer; keep the one that is right."),
        (3, "duplicate_pair", "it is the same pair as a; keep one of them."),
        (4, "contradictory_pair", "a prefers the other answer; keep the one that is right."),
    ]


def test_two_readers_of_a_stream_do_not_take_each_other_s_rows_for_duplicates():
    good, _ = validate(stream_of([row(number) for number in range(6)]), show=False)
    first, second = iter(good), iter(good)
    ahead = [next(first) for _ in range(4)]
    assert len(list(second)) == 6
    assert len(ahead) + len(list(first)) == 6


def test_a_shuffled_stream_begins_anew_in_each_epoch():
    stream = stream_of([row(number) for number in range(8)]).shuffle(seed=0, buffer_size=8)
    good, _ = validate(stream, show=False)
    orders = []
    for epoch in range(3):
        good.set_epoch(epoch)
        orders.append([one["prompt"][0]["content"][1]["text"] for one in good])
    assert [len(order) for order in orders] == [8, 8, 8] and orders[0] != orders[1]


def test_workers_of_a_loader_share_a_stream():
    rows = [row(number) for number in range(8)] + [row(0, strength=-1.0)]
    good, _ = validate(stream_of(rows, num_shards=4), show=False)
    names = [
        one["prompt"][0]["content"][1]["text"]
        for one in DataLoader(good.remove_columns("images"), batch_size=None, num_workers=2)
    ]
    assert Counter(names) == Counter(one["prompt"][0]["content"][1]["text"] for one in rows[:8])


def test_a_stream_says_what_it_leaves_out(caplog, monkeypatch):
    import logging

    from transformers.utils import logging as transformers_logging

    monkeypatch.setattr(transformers_logging.get_logger("trl_dt2it.data.validation"), "level", logging.WARNING)
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    good, bad = validate(stream_of([row(0, strength=-1.0, pair_id=f"p-{n}") for n in range(11)]))
    assert list(good) == [] and len(list(bad)) == 11
    said = [record.getMessage() for record in caplog.records if "Quarantined" in record.getMessage()]
    assert [line.split(",")[1].split()[0] for line in said] == ["1", "10"]
    assert "p-0, bad_strength" in said[0] and "p-9, bad_strength" in said[1]


def test_a_stream_has_no_files(tmp_path):
    for option in ("report_file", "quarantine_file"):
        with pytest.raises(ValueError, match="streamed set"):
            validate(stream_of([row(0)]), **{option: tmp_path / "a"})
