"""A ledger applied to rows: which are swapped and which left out, and names that never collide."""

import re

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Image, List, concatenate_datasets, load_dataset, load_from_disk

from trl_dt2it.curation import pair_ids
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.contents import source_fingerprint
from trl_dt2it.data.mixing import partner_column, swap_pairs, with_columns
from trl_dt2it.demo.digits import make_digits, make_digits_t2i

from ..rows import flip_preferences
from .ledgers import act


def content(dataset, *, without=("pair_id", "curation_flipped")):
    """Rows with undecoded images."""
    rows = leave_images_encoded(dataset).to_list()
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def as_selected(rows, tmp_path):
    return concatenate_datasets([rows.select([0, 0]), rows]).select(range(2, len(rows) + 2))


def as_shuffled(rows, tmp_path):
    backwards = rows.select(range(len(rows) - 1, -1, -1)).flatten_indices()
    return backwards.select(np.arange(len(rows))[::-1])


def as_file(rows, tmp_path):
    rows.save_to_disk(tmp_path / "rows")
    return load_from_disk(tmp_path / "rows")


def as_parquet(rows, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    files = str(tmp_path / "rows.parquet")
    return load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("form", [lambda rows, _: rows, as_selected, as_shuffled, as_file, as_parquet])
@pytest.mark.parametrize("make", [make_digits, make_digits_t2i])
def test_flipped_rows_are_swapped_and_dropped_ones_left_out(ledger, tmp_path, make, form):
    clean = make("train", 60, num_digits=(1, 2))
    noisy = flip_preferences(clean, 0.3)
    rows = form(noisy.remove_columns(["is_flipped", "true_strength"]), tmp_path)
    wrong = np.array(noisy["is_flipped"][:])
    drop = np.arange(60) % 7 == 3
    actions = np.where(drop, "drop", np.where(wrong, "flip", "keep")).tolist()
    ledger.append(1, "flip", pair_ids=pair_ids(rows), actions=actions, strength=np.arange(60.0) - 5)
    curated = ledger.apply(rows)
    # Curation with the truth undoes the planted mistakes, byte for byte.
    assert content(curated) == content(
        clean.remove_columns(["is_flipped", "true_strength"]).select(np.flatnonzero(~drop))
    )
    assert curated["pair_id"][:] == np.array(clean["pair_id"][:])[~drop].tolist()
    assert curated["curation_flipped"][:] == wrong[~drop].tolist()
    kept = {name: feature for name, feature in curated.features.items() if name != "curation_flipped"}
    assert kept == rows.features
    assert curated[0].keys() >= rows[0].keys()  # images decode
    # Once more, and a later round on what the earlier one made.
    assert content(ledger.apply(curated), without=()) == content(curated, without=())
    ledger.append(2, "flip", pair_ids=pair_ids(curated), actions=["flip"] * len(curated))
    expected = swap_pairs(curated, np.ones(len(curated), dtype=bool))
    assert content(ledger.apply(curated)) == content(ledger.apply(rows)) == content(expected)
    ledger.undo(2)
    ledger.undo(1)
    assert content(ledger.apply(rows), without=()) == content(
        with_columns(rows, {"curation_flipped": np.zeros(60, dtype=bool)}), without=()
    )
    ledger.redo(1)
    assert ledger.apply(rows, refresh_strength=True)["strength"][:] == [
        float(max(value - 5, 0)) for value in np.flatnonzero(~drop)
    ]


def test_names_outlive_flips_and_orders_of_rows_without_pair_id(ledger):
    rows = make_digits("train", 30).remove_columns("pair_id")
    names = pair_ids(rows)
    ledger.append(1, "flip", pair_ids=names, actions=["flip"] * 10 + ["keep"] * 20)
    curated = ledger.apply(rows)
    assert pair_ids(curated).equals(names)
    order = np.random.default_rng(0).permutation(30)
    assert pair_ids(curated.select(order)).to_pylist() == [names[int(row)].as_py() for row in order]
    # A swapped row without the column would have another name.
    assert pair_ids(curated.remove_columns("pair_id")).to_pylist()[:10] != names.to_pylist()[:10]
    ledger.append(2, "flip", pair_ids=pair_ids(curated), actions=["flip"] * 30)
    assert content(ledger.apply(curated)) == content(ledger.apply(rows))


def test_rows_that_the_ledger_does_not_know_stay(ledger):
    rows = make_digits("train", 20)
    act(ledger, 1, "flip", ["drop", "flip"], names=rows["pair_id"][:5], strength=[1.0, 2.0])
    curated = ledger.apply(rows, refresh_strength=True)
    assert content(curated)[1:] == content(rows)[2:]
    assert curated["strength"][:] == [2.0, *rows["strength"][2:]]
    assert ledger.apply(rows.select([])).num_rows == 0
    with pytest.raises(ValueError, match="speaks of 2 pairs and of none of these 5 rows, 'digits-train-7-000000'"):
        ledger.apply(make_digits("train", 5, seed=7))
    text = Dataset.from_dict({"pair_id": rows["pair_id"][:3], "text": ["x"] * 3})
    with pytest.raises(ValueError, match="no `chosen` and `rejected` among"):
        ledger.apply(text)


def message(role, *content):
    return [{"role": role, "content": list(content)}]


def row(images, question="q", chosen="good", **extra):
    blocks = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    sides = {"chosen": message("assistant", {"type": "text", "text": chosen})}
    sides["rejected"] = message("assistant", {"type": "text", "text": "bad"})
    pictures = [{"bytes": image, "path": None} for image in images]
    return {"prompt": message("user", *blocks), **sides, "images": pictures, **extra}


def test_no_two_rows_have_the_same_name():
    contents = [[b"a"], [b"a", b"b"], [b"b", b"a"], [b"a", b"b", b"c"], [], [b"ab"]]
    given = [row(images) for images in contents] + [row([b"a"], "other"), row([b"a"], chosen="best"), row([b"a"])] * 2
    dataset = Dataset.from_list(given).cast_column("images", List(Image()))  # none of the images decodes
    names = pair_ids(dataset).to_pylist()
    assert len(set(names)) == len(names)
    assert [name.partition("#")[2] for name in names] == ["", "", "", "", "", "", "", "", "2", "2", "2", "3"]
    assert names[8] == f"{names[0]}#2" and names[11] == f"{names[0]}#3"
    # The same whatever the rest of the row, the order of columns, and where the rows are.
    other = dataset.add_column("source", ["x"] * len(dataset)).select(range(len(dataset)))
    assert pair_ids(other, num_proc=2).to_pylist() == names
    assert source_fingerprint(pair_ids(other)) == source_fingerprint(pa.array(names))
    assert source_fingerprint(pa.array(names[:-1])) != source_fingerprint(pa.array(names))


def test_names_of_the_rows_come_first():
    given = ["a", "a", "a#2", "a", "", None, "b", "a#2", None]
    dataset = Dataset.from_list([row([], str(place % 8), pair_id=name) for place, name in enumerate(given)])
    names = pair_ids(dataset).to_pylist()
    assert names[:4] == ["a", "a#3", "a#2", "a#4"] and names[6:8] == ["b", "a#2#2"]
    assert len(set(names)) == 9 and all(re.fullmatch(r"[0-9a-f]{64}", names[place]) for place in (4, 5, 8))
    numbers = Dataset.from_dict({"pair_id": [7, 8, 7]})
    assert pair_ids(numbers).to_pylist() == ["7", "8", "7#2"]
    plain = Dataset.from_dict({"prompt": ["q", "q"], "chosen": ["x", "y"], "rejected": ["z", "z"]})
    assert len(set(pair_ids(plain).to_pylist())) == 2
    assert pair_ids(plain.select([])).to_pylist() == []
    with pytest.raises(ValueError, match="2 of 2 rows have no `pair_id`, and there is no column `chosen`"):
        pair_ids(make_digits_t2i("train", 2).remove_columns("pair_id"))


def test_which_columns_change_places():
    columns = ["chosen", "rejected", "style_chosen", "style_rejected", "images", "chosen_ids", "chosen_rejected_gap"]
    found = {name: partner_column(name, columns) for name in columns}
    assert found == {
        "chosen": "rejected",
        "rejected": "chosen",
        "style_chosen": "style_rejected",
        "style_rejected": "style_chosen",
        "images": None,
        "chosen_ids": None,
        "chosen_rejected_gap": None,
    }


def test_swapping_copies_no_image(tmp_path):
    rows = as_file(make_digits("train", 400, num_digits=(4,)), tmp_path)
    before = pa.total_allocated_bytes()
    swapped = swap_pairs(with_columns(rows, {"pair_id": pa.array(rows["pair_id"][:])}), np.arange(400) % 2 == 0)
    assert len(swapped) == 400
    images = rows.data["images"].nbytes
    assert pa.total_allocated_bytes() - before < images / 4
    twice = rows.select([3, 3, 5])
    tagged = with_columns(twice, {"tag": np.array([1, 2, 3])})
    assert tagged["tag"][:] == [1, 2, 3] and content(tagged.remove_columns("tag")) == content(twice)
    assert tagged.features["images"] == rows.features["images"]
    with pytest.raises(ValueError, match="`chosen` and `rejected` hold different types"):
        swap_pairs(Dataset.from_dict({"chosen": ["a"], "rejected": [1]}), [True])
    with pytest.raises(ValueError, match=r"`swapped` has shape \(2,\) for 400 rows"):
        swap_pairs(rows, [True, False])
