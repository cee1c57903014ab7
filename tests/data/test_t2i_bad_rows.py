"""Bad rows of text-to-image sets: each with its reason, none lost, all can be mended."""

import re
from collections import Counter

import numpy as np
import pytest
from datasets import concatenate_datasets
from PIL import Image as PILImage

from tests.data.t2i_pairs import first_is_chosen, mixed, pairs, png, raw, stream_of
from trl_dt2it.data import REASONS, RowError
from trl_dt2it.data.messages import REFORMULATED_FEATURES
from trl_dt2it.data.t2i import reformulate_t2i, split_t2i


IMAGE = PILImage.new("RGB", (2, 2))
ONE, TWO = {"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}
BAD = {
    "caption None": ({"caption": None}, "empty_caption"),
    "caption empty": ({"caption": ""}, "empty_caption"),
    "caption white": ({"caption": " \n\u3000"}, "empty_caption"),
    "caption number": ({"caption": 3}, "not_conversational"),
    "caption list": ({"caption": ["x"]}, "not_conversational"),
    "caption surrogate": ({"caption": "x\ud800"}, "not_conversational"),
    "image None": ({"chosen_image": None}, "image_missing"),
    "image absent": ({"rejected_image": ...}, "image_missing"),
    "image empty dict": ({"chosen_image": {}}, "image_missing"),
    "image of Nones": ({"rejected_image": {"bytes": None, "path": None}}, "image_missing"),
    "image no bytes": ({"rejected_image": b""}, "image_missing"),
    "image no path": ({"rejected_image": ""}, "image_missing"),
    "image number": ({"chosen_image": 7}, "image_type"),
    "image zero": ({"chosen_image": 0}, "image_type"),
    "image list": ({"chosen_image": [1, 2]}, "image_type"),
    "image array": ({"chosen_image": np.zeros((2, 2))}, "image_type"),
    "image dict of array": ({"chosen_image": {"bytes": np.zeros(2), "path": None}}, "image_type"),
    "image dict of path": ({"chosen_image": {"bytes": None, "path": 3}}, "image_type"),
    "equal bytes": ({"rejected_image": ONE}, "equal_images"),
    "equal bytes, other path": ({"rejected_image": {"bytes": png(0), "path": "b.png"}}, "equal_images"),
    "equal paths": ({"chosen_image": "a.png", "rejected_image": {"bytes": None, "path": "a.png"}}, "equal_images"),
    "equal pixels": ({"chosen_image": IMAGE, "rejected_image": IMAGE.copy()}, "equal_images"),
    "strength negative": ({"strength": -0.5}, "bad_strength"),
    "strength nan": ({"strength": float("nan")}, "bad_strength"),
    "strength infinite": ({"strength": float("inf")}, "bad_strength"),
    "strength huge": ({"strength": 10**400}, "bad_strength"),
    "strength text": ({"strength": "0.5"}, "bad_strength"),
    "strength bool": ({"strength": True}, "bad_strength"),
}


def bad_rows():
    good = {"caption": "x", "chosen_image": ONE, "rejected_image": TWO, "strength": 1.0}
    for index, (name, (change, _)) in enumerate(BAD.items()):
        yield {**good, "pair_id": f"good {index}"}
        yield {key: value for key, value in {**good, **change, "pair_id": name}.items() if value is not ...}


def test_each_bad_row_has_its_reason_and_none_is_lost(caplog):
    rows = list(bad_rows())
    good, bad = split_t2i(stream_of(rows))
    found = list(bad)
    assert {row["pair_id"]: row["reason"] for row in found} == {name: reason for name, (_, reason) in BAD.items()}
    for row in found:
        assert row["reason"] in REASONS and row["message"].endswith(".") and len(row["message"]) < 300
    assert len(list(good)) == len(BAD)
    made = raw(reformulate_t2i(stream_of(rows)))
    assert [row["pair_id"] for row in made] == [f"good {index}" for index in range(len(BAD))]
    assert f"Dropped {len(BAD)} of {len(rows)} pairs (" in caplog.text
    counts = Counter(reason for _, reason in BAD.values())
    assert all(f"{count} {reason}" in caplog.text for reason, count in counts.items())


def test_rows_in_are_rows_out_and_rows_counted(caplog):
    dataset = mixed()
    made = reformulate_t2i(dataset)
    message = next(record.getMessage() for record in caplog.records if "Dropped" in record.getMessage())
    counts = {reason: int(count) for count, reason in re.findall(r"(\d+) ([a-z_]+)", message.split("(")[1])}
    good, bad = split_t2i(dataset)
    assert counts == Counter(bad["reason"])
    assert len(made) == len(good) == len(dataset) - sum(counts.values()) and len(good) + len(bad) == len(dataset)
    assert good.features == dataset.features and set(bad.features) == {*dataset.features, "reason", "message"}
    assert sorted([*good["pair_id"], *bad["pair_id"]]) == sorted(dataset["pair_id"])
    # Balance counts good rows only.
    for source in ("a", "b"):
        shown = [first_is_chosen(row) for row in raw(made) if row["source"] == source]
        assert sum(shown) in (len(shown) // 2, len(shown) - len(shown) // 2)
    for half, streamed in zip((good, bad), split_t2i(dataset.to_iterable_dataset()), strict=True):
        assert streamed.features == half.features and raw(streamed) == raw(half)
        shown = [
            next(row[name] for row in rows if row[name] is not None)
            for rows in (half, streamed, streamed.take(99))
            for name in ("chosen_image", "rejected_image")
        ]
        assert len({type(image) for image in shown}) == 1 and isinstance(shown[0], PILImage.Image)


def test_bad_rows_are_repaired_and_put_back():
    dataset = mixed(40)
    good, bad = split_t2i(dataset)
    mended = bad.filter(lambda row: row["reason"] == "bad_strength").map(lambda row: {"strength": None})
    again_good, again_bad = split_t2i(mended)
    assert len(mended) > 0 and len(again_bad) == 0 and len(again_good) == len(mended)
    whole = concatenate_datasets([good, mended.remove_columns(["reason", "message"])])
    assert len(reformulate_t2i(whole)) == len(good) + len(mended)
    assert split_t2i(bad)[1]["reason"] == bad["reason"]  # the old verdict makes way for the new one


def test_a_bad_row_is_an_error_if_wished():
    dataset = mixed(20)
    with pytest.raises(RowError, match="^p0: `caption` is empty") as caught:
        reformulate_t2i(dataset, on_bad_row="raise")
    assert caught.value.reason == "empty_caption"
    stream = reformulate_t2i(dataset.select(range(1, 20)).to_iterable_dataset(), on_bad_row="raise")
    iterator = iter(stream)
    assert [next(iterator)["pair_id"] for _ in range(2)] == ["p1", "p2"]
    with pytest.raises(RowError, match="^p3: `chosen_image` and `rejected_image` are one image"):
        next(iterator)
    nameless = dataset.remove_columns("pair_id").select([1, 2, 7])
    with pytest.raises(RowError, match="^row 2: "):
        reformulate_t2i(nameless, on_bad_row="raise")
    with pytest.raises(ValueError, match="`on_bad_row` is 'drop'"):
        reformulate_t2i(dataset, on_bad_row="drop")


def test_sets_without_a_good_row():
    dataset = pairs(3, captions=["", " ", "\n"])
    for made in (reformulate_t2i(dataset), reformulate_t2i(dataset.select([]))):
        assert len(made) == 0 and made.features == REFORMULATED_FEATURES
    assert raw(reformulate_t2i(dataset.to_iterable_dataset())) == []
    good, bad = split_t2i(dataset)
    assert (len(good), len(bad)) == (0, 3)
    assert [len(half) for half in split_t2i(dataset.select([]))] == [0, 0]
