"""Mixtures: exact shares, caps, order, sets of different shape, and splits that keep groups together."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Image, IterableDataset, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from tests.data.t2i_pairs import pairs, raw
from tests.rows import png
from trl_dt2it.data import RowError, mix, reformulate_t2i, split_by_group, validate
from trl_dt2it.data.columns import leave_images_encoded, retype_images
from trl_dt2it.data.messages import MESSAGES
from trl_dt2it.data.mixing import with_canonical_columns


def rows(name: str, count: int, per_group: int = 1, **columns) -> Dataset:
    return Dataset.from_dict(
        {
            "pair_id": [f"{name}-{index}" for index in range(count)],
            "group_id": [f"{name}-g{index // per_group}" for index in range(count)],
            "source": [name] * count,
            **columns,
        }
    )


def test_without_weights_all_rows_are_there_once_in_another_order():
    a, b = rows("a", 30), rows("b", 12)
    mixed = mix({"a": a, "b": b})
    assert sorted(mixed["pair_id"]) == sorted([*a["pair_id"], *b["pair_id"]])
    assert mixed["pair_id"][:] != [*a["pair_id"], *b["pair_id"]]
    assert len(set(mixed["source"][:12])) == 2  # not one source behind the other


def test_weights_are_met_exactly_and_the_scarcest_source_decides():
    sets = {"a": rows("a", 100), "b": rows("b", 90), "c": rows("c", 10)}
    assert Counter(mix(sets, weights={"a": 5, "b": 3, "c": 2})["source"]) == {"a": 25, "b": 15, "c": 10}
    # 3 rows each go to a and c, and the last one of 7 to the largest remainder: 7 * (0.5, 0.3, 0.2) = 3.5, 2.1, 1.4
    assert Counter(mix(sets, weights={"a": 5, "b": 3, "c": 2}, size=7)["source"]) == {"a": 4, "b": 2, "c": 1}


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
)
def test_shares_are_never_off_by_a_row(counts, weights):
    sets = {f"s{index}": rows(f"s{index}", count) for index, count in enumerate(counts)}
    given_weights = dict(zip(sets, weights, strict=False))
    mixed = mix(sets, weights=given_weights)
    found = Counter(mixed["source"])
    total = sum(given_weights.values())
    for name, weight in given_weights.items():
        assert abs(found[name] - len(mixed) * weight / total) < 1
        assert found[name] <= len(sets[name])
    assert len(set(mixed["pair_id"])) == len(mixed)


def test_caps_hold_per_group_and_per_source():
    sets = {"a": rows("a", 60, per_group=6), "b": rows("b", 8)}
    mixed = mix(sets, max_per_group=2)
    assert Counter(mixed["source"]) == {"a": 20, "b": 8}
    assert set(Counter(g for g in mixed["group_id"] if g.startswith("a")).values()) == {2}
    assert Counter(mix(sets, max_per_group=2, max_per_source={"a": 7})["source"]) == {"a": 7, "b": 8}
    assert Counter(mix(sets, max_per_source=5)["source"]) == {"a": 5, "b": 5}
    # The caps do not always keep a group's first rows.
    assert {int(pair.split("-")[1]) % 6 for pair in mixed["pair_id"] if pair.startswith("a")} == set(range(6))


def test_rows_without_a_group_are_not_limited():
    data = Dataset.from_dict({"group_id": ["x", None, None, "x", None], "pair_id": list("abcde")})
    assert len(mix({"a": data}, max_per_group=1)) == 4


def test_the_same_seed_gives_the_same_rows_and_another_source_changes_none_of_them():
    a, b = rows("a", 50), rows("b", 50)
    one, again, other = (mix({"a": a, "b": b}, size=40, seed=seed)["pair_id"][:] for seed in (1, 1, 2))
    assert one == again != other
    wider = mix({"a": a, "b": b, "c": rows("c", 50)}, weights={"a": 2, "b": 2, "c": 1}, size=50, seed=1)
    assert {pair for pair in wider["pair_id"] if pair.startswith("a")} == {p for p in one if p.startswith("a")}


def test_columns_that_one_set_lacks_are_none():
    for name in ("weight", "label_confidence", "blind_margin"):
        mixed = mix({"a": rows("a", 2, **{name: [0.5, 1.0]}), "b": rows("b", 1)})
        assert dict(zip(mixed["pair_id"], mixed[name], strict=True)) == {"a-0": 0.5, "a-1": 1.0, "b-0": None}


def test_a_set_without_margins_has_margins_of_zero_beside_one_that_has_them():
    texts = {"prompt": ["q?", "p?"], "chosen": ["a", "b"], "rejected": ["c", "d"]}
    with_margins = Dataset.from_dict(texts | {"margin": [1, 2]})
    without = Dataset.from_dict({name: [text + "." for text in values] for name, values in texts.items()})
    mixed = mix({"a": with_margins, "b": without.select([1]), "c": reformulate_t2i(Dataset.from_list(pairs(3)))})
    assert sorted(mixed["margin"]) == [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]
    clean, quarantine = validate(mixed, image_check="none", show=False)
    assert (len(clean), len(quarantine)) == (6, 0)
    assert "margin" not in mix({"b": without, "c": without}).column_names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"a": 1.0}}, "`weights` has None for 'b'"),
        ({"weights": {"a": 1.0, "b": 0.0}}, "`weights` has 0.0 for 'b'"),
        ({"weights": {"a": 1, "b": 1, "x": 1}}, "`weights` names 'x'; the sets are a, b"),
        ({"weights": {"a": 1, "b": 1}, "size": 30}, "takes 15 of 'b', which has 10"),
        ({"size": 0}, "`size` is 0; it must be at least 1"),
        ({"max_per_source": {"a": 0}}, "`max_per_source` is 0"),
        ({"max_per_source": {"y": 3}}, "`max_per_source` names 'y'"),
    ],
)
def test_misuse_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mix({"a": rows("a", 20), "b": rows("b", 10)}, **arguments)


def test_streams_are_refused():
    stream = IterableDataset.from_generator(lambda: iter([{"x": 1}]))
    with pytest.raises(ValueError, match="`a` is a IterableDataset"):
        mix({"a": stream})


@pytest.mark.parametrize("test_size", [0.2, 37])
def test_a_split_parts_no_group_and_has_its_size(test_size):
    data = rows("a", 300, per_group=3)
    split = split_by_group(data, test_size)
    groups = {name: set(part["group_id"]) for name, part in split.items()}
    assert not groups["train"] & groups["test"]
    wanted = 60 if test_size == 0.2 else 37
    assert wanted <= len(split["test"]) < wanted + 3
    assert sorted([*split["train"]["pair_id"], *split["test"]["pair_id"]]) == sorted(data["pair_id"])


def test_the_split_does_not_depend_on_the_order_and_hardly_on_further_rows():
    data = rows("a", 400, per_group=2)
    order = np.random.default_rng(0).permutation(400)
    test = set(split_by_group(data, 0.25)["test"]["group_id"])
    assert set(split_by_group(data.select(order), 0.25)["test"]["group_id"]) == test
    grown = set(split_by_group(rows("a", 440, per_group=2), 0.25)["test"]["group_id"])
    assert len(test - grown) <= 10  # of 50 groups, with 10 % more of them
    assert set(split_by_group(data, 0.25, seed=1)["test"]["group_id"]) != test


def test_rows_without_a_group_are_split_one_by_one():
    data = Dataset.from_dict({"pair_id": [str(index) for index in range(50)]})
    assert len(split_by_group(data, 10)["test"]) == 10


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (rows("a", 10), 0, "must leave rows for both parts of 10 rows"),
        (rows("a", 10), 1.0, "must leave rows for both parts"),
        (rows("a", 10, per_group=10), 2, "the 1 groups are too few for 2 test rows"),
    ],
)
def test_a_split_that_leaves_a_part_empty_is_an_error(data, size, message):
    with pytest.raises(ValueError, match=message):
        split_by_group(data, size)


# Sets of different shape.

README_ROW = {
    "images": ["cup.png"],
    "prompt": [{"role": "user", "content": "What is on the table?"}],
    "chosen": [{"role": "assistant", "content": "A red cup."}],
    "rejected": [{"role": "assistant", "content": "A blue plate."}],
    "strength": 2,
    "pair_id": 7,
}


PNG = {"bytes": png(PILImage.new("RGB", (4, 4), "red")), "path": None}


def from_lines(folder, *lines) -> Dataset:
    """What `load_dataset` makes of a file."""
    file = folder / f"{len(list(folder.iterdir()))}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Dataset.from_json(str(file), cache_dir=str(folder / "cache"))


def contents(messages):
    return [(block["type"], block["text"]) for message in messages for block in message["content"]]


def test_rows_of_every_shape_stand_in_one_mixture(tmp_path):
    two_images = reformulate_t2i(pairs(3))
    conversation = {side: README_ROW["prompt"] + README_ROW[side] for side in ("chosen", "rejected")}
    blocks = [{"type": "text", "text": "Which "}, {"type": "image"}, {"type": "text", "text": "?"}]
    sets = {
        "images": two_images,
        "undecoded": leave_images_encoded(reformulate_t2i(pairs(2), both_orders=True)),
        "readme": from_lines(tmp_path, README_ROW),
        "single": from_lines(tmp_path, {"image": "cup.png", **{k: README_ROW[k] for k in ("prompt", *conversation)}}),
        "implicit": from_lines(tmp_path, {"images": ["cup.png"], **conversation}),
        "blocks": from_lines(tmp_path, {**README_ROW, "prompt": [{"role": "user", "content": blocks}]}),
        "plain": from_lines(tmp_path, {"prompt": "Who?", "chosen": "He.", "rejected": "She.", "note": "mine"}),
    }
    mixed = leave_images_encoded(mix(sets)).sort("source")
    assert len(mixed) == 3 + 4 + 5 and all(mixed.features[name] == MESSAGES for name in ("prompt", *conversation))
    assert mixed.features["images"] == List(Image(decode=False)) and mixed.features["strength"] == Value("float64")
    found = [row for row in mixed if row["t2i_caption"] is None]
    asked = sorted((contents(row["prompt"]), contents(row["chosen"])) for row in found)
    cup = ([("image", None), ("text", "What is on the table?")], [("text", "A red cup.")])
    assert asked == [
        *[cup] * 3,
        ([("text", "Which "), ("image", None), ("text", "?")], cup[1]),
        ([("text", "Who?")], [("text", "He.")]),
    ]
    assert sorted(row["pair_id"] or "" for row in found) == ["", "", "", "7", "7"]
    assert [row["images"] for row in found if row["images"]] == [[{"bytes": None, "path": "cup.png"}]] * 4
    assert [row["note"] for row in found if row["note"]] == ["mine"]
    # The rows that were canonical are the same.
    known = {row["pair_id"]: row for name in ("images", "undecoded") for row in raw(sets[name])}
    for row in mixed:
        if row["t2i_caption"] is not None:
            assert known.pop(row["pair_id"]) == {name: value for name, value in row.items() if name != "note"}
    assert not known


def test_sets_of_one_shape_stay_as_they_are(tmp_path):
    sets = {name: from_lines(tmp_path, {**README_ROW, "pair_id": name}) for name in "ab"}
    assert mix(sets).features == sets["a"].features
    assert with_canonical_columns(two := reformulate_t2i(pairs(2))).features == two.features
    assert mix({"a": two, "b": two}).features == two.features


def test_images_keep_their_mode():
    """A set of decoded or encoded images, joined with its like, or made canonical; sets of two modes are joined
    undecoded, where a mode means nothing."""
    features = {"image": Image(mode="L"), "images": List(Image(mode="L")), "more": {"a": List(List(Image(mode="L")))}}
    row = {
        "images": [PNG, PNG],
        "more": {"a": [[PNG]]},
        **{k: README_ROW[k] for k in ("prompt", "chosen", "rejected")},
    }
    gray = Dataset.from_list([row]).cast_column("images", features["images"]).cast_column("more", features["more"])
    encoded = leave_images_encoded(gray)
    assert encoded.features["images"] == List(Image(mode="L", decode=False))
    assert {name: retype_images(encoded.features[name], decode=True) for name in ("images", "more")} == {
        name: features[name] for name in ("images", "more")
    }
    assert mix({"a": gray, "b": encoded}).features["images"] == List(Image(mode="L", decode=False))
    single = gray.remove_columns(["images", "more"]).add_column("image", [PNG]).cast_column("image", features["image"])
    made = with_canonical_columns(single)
    assert made.features["images"] == List(Image(mode="L")) and made[0]["images"][0].mode == "L"
    both = mix({"a": single, "b": with_canonical_columns(reformulate_t2i(pairs(1)))})
    assert both.features["images"] == List(Image(decode=False)) and len(both) == 2


def test_paths_start_from_the_image_root(tmp_path):
    (tmp_path / "photos").mkdir()
    rows = from_lines(tmp_path, README_ROW)
    (row,) = raw(with_canonical_columns(rows, image_root=tmp_path / "photos"))
    assert row["images"] == [{"bytes": None, "path": str(tmp_path / "photos" / "cup.png")}]
    two = reformulate_t2i(pairs(1))
    assert with_canonical_columns(two, image_root=tmp_path).features == two.features
    outside = from_lines(tmp_path, {**README_ROW, "images": ["../cup.png"]})
    with pytest.raises(RowError, match="7: the image '../cup.png' is not inside `image_root`"):
        with_canonical_columns(outside, image_root=tmp_path / "photos")


def test_what_canonical_rows_cannot_hold_is_named(tmp_path):
    call = [{"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}]
    tools = from_lines(tmp_path, {**README_ROW, "chosen": call})
    with pytest.raises(ValueError, match="tools, 7: a message has `tool_calls`, which canonical rows do not hold"):
        mix({"tools": tools, "images": reformulate_t2i(pairs(1))})
    two = [reformulate_t2i(pairs(1)).add_column("digits", [value]) for value in (1, "one")]
    assert sorted(mix({"a": two[0], "b": two[1]})["digits"]) == ["1", "one"]


def test_strings_without_a_prompt_are_named(tmp_path):
    strings = from_lines(tmp_path, {"chosen": "Who? He.", "rejected": "Who? She."})
    with pytest.raises(ValueError, match="strings, row 0: the row has two strings and no `prompt`"):
        mix({"strings": strings, "images": reformulate_t2i(pairs(1))})


def test_bad_rows_are_left_for_the_checks(tmp_path):
    bad = from_lines(tmp_path, {**README_ROW, "rejected": README_ROW["chosen"]}, {**README_ROW, "chosen": []})
    mixed = mix({"bad": bad, "images": reformulate_t2i(pairs(1))})
    clean, quarantine = validate(mixed, image_check="none", show=False)
    assert len(clean) == 1 and sorted(quarantine["reason"]) == ["empty_answer", "equal_answers"]


def test_columns_of_different_types_are_joined_as_floats_or_strings():
    a = rows("a", 2, score=[1, 2], note=["x", None], by=[{"id": 1}, None], same=[True, False])
    b = rows("b", 2, score=[0.5, None], note=[3, 4], by=["you", "me"], none=[None, None])
    mixed = {row["pair_id"]: row for row in mix({"a": a, "b": b})}
    columns = ("score", "note", "by", "same", "none")
    assert [mixed["a-0"][name] for name in columns] == [1.0, "x", '{"id": 1}', True, None]
    assert [mixed["a-1"][name] for name in columns] == [2.0, None, None, False, None]
    assert [mixed["b-0"][name] for name in columns] == [0.5, "3", "you", None, None]
    assert b.features["note"].dtype == "int64"  # the sets themselves stay as they were
