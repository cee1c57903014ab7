"""Two-image questions: what a row looks like, which image stands first, and what a collator makes of it."""

import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoProcessor

from tests.data.t2i_pairs import first_is_chosen, pairs, png, raw, stream_of, text
from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.data import content_id
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.messages import REFORMULATED_FEATURES
from trl_dt2it.data.t2i import ENGLISH, T2ITemplate, reformulate_t2i
from trl_dt2it.demo.digits import make_digits_t2i
from trl_dt2it.demo.tiny import build_tiny_vlm


# What a row looks like.


def test_a_row_by_hand():
    template = T2ITemplate("{images}\nWhich? {caption}!", "One.", "Two.")
    row, mirrored = raw(reformulate_t2i(pairs(1), template=template, both_orders=True))
    image, words = {"type": "image", "text": None}, "\nWhich? caption 0!"
    question = [{"type": "text", "text": "Image 1: "}, image, {"type": "text", "text": "\nImage 2: "}, image]
    question.append({"type": "text", "text": words})
    assert row == {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "One."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Two."}]}],
        "images": [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}],
        "strength": 0.0,
        "pair_id": "p0-ab",
        "group_id": "g0",
        "source": "s",
        "source_id": None,
        "t2i_caption": "caption 0",
        "t2i_first": "One.",
        "t2i_order": "ab",
    }
    assert mirrored == {
        **row,
        "t2i_order": "ba",
        "chosen": row["rejected"],
        "rejected": row["chosen"],
        "images": row["images"][::-1],
        "pair_id": "p0-ba",
    }


def test_columns_of_the_result():
    plain = pairs(2)
    assert reformulate_t2i(plain).features == REFORMULATED_FEATURES
    more = (
        plain.add_column("weight", [0.5, 2.0])
        .add_column("label_confidence", [0.9, None])
        .add_column("blind_margin", [-0.5, None])
        .add_column("is_flipped", [True, False])
    )
    more = more.add_column("image", ["a", "b"]).add_column("scores", [[1], [2]]).add_column("prompt", ["x", "y"])
    for made in (reformulate_t2i(more), reformulate_t2i(more.to_iterable_dataset())):
        assert set(made.features) == {
            *REFORMULATED_FEATURES,
            "weight",
            "label_confidence",
            "blind_margin",
            "is_flipped",
            "scores",
        }
        assert [(row["weight"], row["is_flipped"]) for row in raw(made)] == [(0.5, True), (2.0, False)]
        assert [row["label_confidence"] for row in raw(made)] == [0.9, None]  # whichever image comes first
        assert [row["blind_margin"] for row in raw(made)] == [-0.5, None]
        assert [row["strength"] for row in raw(made)] == [0.0, 1.0]
    assert [row["strength"] for row in raw(reformulate_t2i(more, strength="weight"))] == [0.5, 2.0]
    assert [row["strength"] for row in raw(reformulate_t2i(more, strength=None))] == [None, None]


def test_lists_and_objects_stay_and_what_cannot_stay_is_named(caplog):
    rows = pairs(2)
    own = {"tags": ["a", "b"], "facts": {"by": [1, 2]}, "prompt": "mine", "depth": b"map"}
    made = reformulate_t2i(Dataset.from_list([{**row, **own} for row in rows])).remove_columns("images").to_list()
    assert [(row["tags"], row["facts"]) for row in made] == [(own["tags"], own["facts"])] * 2
    assert "are dropped: `prompt`, `depth`; to keep one" in caplog.text
    assert "depth" not in made[0]


def test_other_names_of_columns_and_kinds_of_images():
    table = [{"prompt": "x", "good": "a.png", "bad": b"1"}, {"prompt": "y", "good": "c.png", "bad": b"2"}]
    dataset = Dataset.from_list(table)
    names = {"caption": "prompt", "chosen_image": "good", "rejected_image": "bad"}
    made = raw(reformulate_t2i(dataset, **names))
    assert made == raw(reformulate_t2i(stream_of(table), **names))
    for row, path, content in zip(made, ("a.png", "c.png"), (b"1", b"2"), strict=True):
        images = [{"bytes": None, "path": path}, {"bytes": content, "path": None}]
        assert row["images"] in (images, images[::-1])
        assert row["strength"] is row["source"] is None
        assert re.fullmatch("[0-9a-f]{16}", row["pair_id"]) and re.fullmatch("[0-9a-f]{16}", row["group_id"])
    assert made[0]["pair_id"] != made[1]["pair_id"] and made[0]["group_id"] != made[1]["group_id"]
    with pytest.raises(
        ValueError, match="no column `caption`, `chosen_image`, `rejected_image`, only prompt, good, bad"
    ):
        reformulate_t2i(dataset)
    with pytest.raises(ValueError, match="no column `gap`"):
        reformulate_t2i(dataset, **names, strength="gap")


def test_bytes_win_over_a_file_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png(99))
    rows = [{"caption": "x", "chosen_image": {"bytes": png(0), "path": "a.png"}, "rejected_image": png(1)}]
    for dataset in (
        stream_of(rows),
        Dataset.from_list([{**rows[0], "rejected_image": {"bytes": png(1), "path": "a.png"}}]),
    ):
        (row,) = raw(reformulate_t2i(dataset))
        assert sorted(image["bytes"] for image in row["images"]) == sorted([png(0), png(1)])


# Positions.


@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 8, 101])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_positions_are_exactly_balanced(num_rows, seed):
    shown = [first_is_chosen(row) for row in raw(reformulate_t2i(pairs(num_rows), seed=seed))]
    assert len(shown) == num_rows and sum(shown) in (num_rows // 2, num_rows - num_rows // 2)
    assert all(shown[i] != shown[i + 1] for i in range(0, num_rows - 1, 2))


def test_positions_are_balanced_per_source():
    sources = [("a", "b", "b", "c", None)[i * i % 5] for i in range(203)]
    by_source = defaultdict(list)
    for row, source in zip(raw(reformulate_t2i(pairs(203, sources=sources))), sources, strict=True):
        assert row["source"] == source
        by_source[source].append(first_is_chosen(row))
    assert {source: len(shown) for source, shown in by_source.items()} == Counter(sources)
    for shown in by_source.values():
        assert sum(shown) in (len(shown) // 2, len(shown) - len(shown) // 2)
    # The coins of two sources have nothing to do with each other.
    assert by_source["a"][:40] != by_source["b"][:40]


def test_coins_are_fair_and_the_odd_row_falls_both_ways():
    seeds, num_rows = 40, 21
    shown = np.array(
        [[first_is_chosen(row) for row in raw(reformulate_t2i(pairs(num_rows), seed=seed))] for seed in range(seeds)]
    )
    # Each is binomial(40, 1/2); outside of 8..32 with a probability of 1e-4.
    assert all(8 <= count <= 32 for count in shown.sum(axis=0))
    assert {10, 11} == set(shown.sum(axis=1).tolist())
    blocks = shown[:, 0:20:2]  # 400 coins, within 4 standard deviations
    assert 160 <= blocks.sum() <= 240
    agreeing = (blocks[:, 1:] == blocks[:, :-1]).sum()  # 360 neighbours
    assert 142 <= agreeing <= 218


def test_the_position_does_not_depend_on_the_content():
    one, other = pairs(30), pairs(30, captions=["图"] * 30, pair_id=[f"q{i}" for i in range(30)], strength=[9.0] * 30)
    assert [first_is_chosen(r) for r in raw(reformulate_t2i(one))] == [
        first_is_chosen(r) for r in raw(reformulate_t2i(other))
    ]


def test_wording_and_position_are_independent():
    rows = raw(reformulate_t2i(pairs(600)))
    counts = Counter((first_is_chosen(row), text(row["prompt"]).split("caption")[0]) for row in rows)
    assert len(counts) == 6 and all(65 <= count <= 135 for count in counts.values())  # 100, give or take 4 deviations


# Everything downstream.


def test_a_row_goes_through_a_real_collator_and_its_orders_are_two_rows(tmp_path):
    words = [t.prompt for t in ENGLISH] + [
        answer for t in ENGLISH for answer in (t.first_is_better, t.second_is_better)
    ]
    model_dir = build_tiny_vlm(tmp_path, extra_texts=words)
    processor = AutoProcessor.from_pretrained(model_dir)
    digits = make_digits_t2i("test", 3)
    rows = raw(reformulate_t2i(digits, both_orders=True))
    ids = [content_id(row) for row in rows]
    assert len(set(ids)) == 6
    assert [content_id(row) for row in reformulate_t2i(leave_images_encoded(digits), both_orders=True)] != []
    collator = MultimodalPreferenceCollator(processor)
    batch = collator(rows)
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert batch["image_grid_thw"].shape == (12, 3)  # two images a pair, each once
    per_row = (batch["input_ids"] == image_token).sum(dim=1)
    assert per_row.tolist() == [8] * 12  # four tokens a digit
    decoded = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert all(text(row["chosen"]) in decoded[i] for i, row in enumerate(rows))
    assert all(text(row["rejected"]) in decoded[6 + i] for i, row in enumerate(rows))
    # The two images of a pair stand in shown order: the second row of a pair has them swapped.
    patches = batch["pixel_values"].reshape(12, -1)
    for i in range(0, 12, 4):
        assert (patches[i] == patches[i + 3]).all() and (patches[i + 1] == patches[i + 2]).all()
        assert (patches[i] != patches[i + 1]).any()


def test_truths_of_the_digits_are_kept():
    digits = make_digits_t2i("train", 8, noise=0.5)
    made = reformulate_t2i(digits)
    for name in ("true_strength", "is_flipped", "digits", "chosen_wrong", "strength", "pair_id", "group_id"):
        assert made[name][:] == digits[name][:]
    for row, pair in zip(raw(made), raw(digits), strict=True):
        hashes = [hashlib.sha256(image["bytes"]).digest() for image in row["images"]]
        expected = [hashlib.sha256(pair[f"{side}_image"]["bytes"]).digest() for side in ("chosen", "rejected")]
        says_first = any(text(row["chosen"]) == template.first_is_better for template in ENGLISH)
        assert hashes == (expected if says_first else expected[::-1])
