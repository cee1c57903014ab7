"""Two-image questions: exact balance, captions that arrive unchanged, a stream equal to memory, no row lost."""

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import AutoProcessor
from trl import prepare_multimodal_messages

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.data import REASONS, RowError, check_row, content_id
from trl_dt2it.data.canonical import FEATURES
from trl_dt2it.data.encoded import leave_images_encoded
from trl_dt2it.data.t2i import reformulate_t2i, split_t2i
from trl_dt2it.data.t2i_templates import CHINESE, ENGLISH, T2ITemplate, is_chinese
from trl_dt2it.demo.digits import make_digits_t2i
from trl_dt2it.demo.tiny import build_tiny_vlm


PAIRS = Features(
    {
        "caption": Value("string"),
        "chosen_image": Image(),
        "rejected_image": Image(),
        "strength": Value("float64"),
        "pair_id": Value("string"),
        "group_id": Value("string"),
        "source": Value("string"),
    }
)


def png(value):
    buffer = io.BytesIO()
    PILImage.new("RGB", (2, 1), (value % 256, value // 256, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def pairs(num_rows, captions=None, sources=None, **changes):
    """Row i has the images 2i (better) and 2i + 1."""
    columns = {
        "caption": captions or [f"caption {i}" for i in range(num_rows)],
        "chosen_image": [{"bytes": png(2 * i), "path": None} for i in range(num_rows)],
        "rejected_image": [{"bytes": png(2 * i + 1), "path": None} for i in range(num_rows)],
        "strength": [float(i) for i in range(num_rows)],
        "pair_id": [f"p{i}" for i in range(num_rows)],
        "group_id": [f"g{i % 3}" for i in range(num_rows)],
        "source": sources or ["s"] * num_rows,
        **changes,
    }
    features = Features({name: PAIRS.get(name, Value("string")) for name in columns})
    return Dataset.from_dict(columns, features=features)


def stream_of(rows, features=None):
    """A stream that knows nothing but what it yields."""
    return IterableDataset.from_generator(lambda: iter(rows), features=features)


def raw(dataset):
    """The rows with their images as bytes and paths."""
    return list(leave_images_encoded(dataset))


def text(messages):
    return "".join(block["text"] or "" for message in messages for block in message["content"])


def first_is_chosen(row):
    """Read off the answer, and checked against the images: even ones are the better ones."""
    numbers = []
    for image in row["images"]:
        red, green, _ = PILImage.open(io.BytesIO(image["bytes"])).getpixel((0, 0))
        numbers.append(red + 256 * green)
    assert abs(numbers[0] - numbers[1]) == 1 and min(numbers) % 2 == 0
    is_first = numbers[0] % 2 == 0
    verdicts = {
        answer for t in (*ENGLISH, *CHINESE) for answer in [(t.first_is_better, t.second_is_better)[not is_first]]
    }
    assert text(row["chosen"]) in verdicts and text(row["rejected"]) not in verdicts
    return is_first


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
    }
    assert mirrored == {
        **row,
        "chosen": row["rejected"],
        "rejected": row["chosen"],
        "images": row["images"][::-1],
        "pair_id": "p0-ba",
    }


def test_columns_of_the_result():
    plain = pairs(2)
    assert reformulate_t2i(plain).features == FEATURES
    more = plain.add_column("weight", [0.5, 2.0]).add_column("is_flipped", [True, False])
    more = more.add_column("image", ["a", "b"]).add_column("scores", [[1], [2]]).add_column("prompt", ["x", "y"])
    for made in (reformulate_t2i(more), reformulate_t2i(more.to_iterable_dataset())):
        assert set(made.features) == {*FEATURES, "weight", "is_flipped"}
        assert [(row["weight"], row["is_flipped"]) for row in raw(made)] == [(0.5, True), (2.0, False)]
        assert [row["strength"] for row in raw(made)] == [0.0, 1.0]
    assert [row["strength"] for row in raw(reformulate_t2i(more, strength="weight"))] == [0.5, 2.0]
    assert [row["strength"] for row in raw(reformulate_t2i(more, strength=None))] == [None, None]


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


# Wordings.


def test_the_same_row_has_the_same_wording_wherever_it_stands():
    dataset = pairs(60)
    order = np.random.default_rng(0).permutation(60)
    wordings = {row["pair_id"]: text(row["prompt"]) for row in raw(reformulate_t2i(dataset))}
    assert {row["pair_id"]: text(row["prompt"]) for row in raw(reformulate_t2i(dataset.select(order)))} == wordings
    assert {row["pair_id"]: text(row["prompt"]) for row in raw(reformulate_t2i(dataset, seed=1))} != wordings


def test_the_language_follows_the_caption():
    captions = ["a cat", "一只猫", "猫 and dog", "ねこ", "고양이", "𠀀", "〇", "кот", "，"]
    chinese = [False, True, True, False, False, True, True, False, False]
    assert [is_chinese(caption) for caption in captions] == chinese
    for row, caption, is_han in zip(raw(reformulate_t2i(pairs(9, captions))), captions, chinese, strict=True):
        templates = CHINESE if is_han else ENGLISH
        possible = [(t.question(caption), {t.first_is_better, t.second_is_better}) for t in templates]
        assert (row["prompt"][0]["content"], {text(row["chosen"]), text(row["rejected"])}) in possible


def test_built_in_wordings():
    assert len(ENGLISH) >= 3 and len(CHINESE) >= 3
    for templates in (ENGLISH, CHINESE):
        assert len({template.prompt for template in templates}) == len(templates)
        assert len({template.first_is_better for template in templates}) == len(templates)
    for template in CHINESE:
        assert all(map(is_chinese, (template.prompt, *template.labels, template.first_is_better)))
    for template in ENGLISH:
        assert template.prompt.isascii() and "".join(template.labels).isascii() and template.first_is_better.isascii()


def test_custom_templates():
    dataset = pairs(12, captions=["{images} {caption} {0} {{x}}"] * 12)
    made = raw(reformulate_t2i(dataset, template="{caption} {x} {{y}} %s <image>\n{images}?"))
    for row in made:
        content = row["prompt"][0]["content"]
        assert [block["type"] for block in content] == ["text", "image", "text", "image", "text"]
        before = "{images} {caption} {0} {{x}} {x} {{y}} %s <image>\nImage 1: "
        assert [block["text"] for block in content] == [before, None, "\nImage 2: ", None, "?"]
        answers = ["Image 1 is better than Image 2.", "Image 2 is better than Image 1."]
        assert [text(row["chosen"]), text(row["rejected"])] in (answers, answers[::-1])
    several = raw(
        reformulate_t2i(pairs(40), template=["A {images} {caption}", T2ITemplate("B {images} {caption}", "1", "2")])
    )
    assert Counter((text(row["prompt"])[0], len(text(row["chosen"]))) for row in several).keys() == {
        ("A", 31),
        ("B", 1),
    }
    bare = T2ITemplate("{images}{caption}", labels=("", ""))
    assert [block["type"] for block in bare.question("x")] == ["image", "image", "text"]


@pytest.mark.parametrize(
    "template, message",
    [
        ("Which? {caption}", "holds {images} 0 times and {caption} 1 times"),
        ("{images}", "holds {images} 1 times and {caption} 0 times"),
        ("{images} {caption} {caption}", "{caption} 2 times"),
        ("", "0 times"),
        ("{images } {Caption}", "holds {images} 0 times and {caption} 0 times"),
        ([], "`template` is empty"),
        (["{images} {caption}", "no"], "0 times"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_template_is_one_clear_error_at_start(template, message, streaming):
    dataset = pairs(2).to_iterable_dataset() if streaming else pairs(2)
    with pytest.raises(ValueError, match=re.escape(message)):
        reformulate_t2i(dataset, template=template)


def test_answers_of_a_template_must_differ():
    for answers in (("Yes.", "Yes. "), ("", "No.")):
        with pytest.raises(ValueError, match="must be two different texts"):
            T2ITemplate("{images} {caption}", *answers)


# Captions.

PIECES = [
    "{",
    "}",
    "{images}",
    "{caption}",
    "{0}",
    "<image>",
    "<|image_pad|>",
    "猫",
    "עברית",
    "\u202e",
    "🦊",
    "👩‍👩‍👧",
    '"',
    "\\",
    "\n",
]
CAPTIONS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES), min_size=100, max_size=100).map(lambda pieces: ("".join(pieces) * 100)[:10_000]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CAPTIONS.filter(str.strip), min_size=1, max_size=6))
@example(["<image>", "{images}{caption}", "\x00", "x" * 10_000, "a\u2028b", "\ud7ff"])
def test_captions_arrive_unchanged(captions):
    dataset = pairs(len(captions), captions)
    made = reformulate_t2i(dataset)
    reloaded = Dataset(made.data.table.slice(0), info=made.info)
    rows, streamed = raw(reloaded), raw(reformulate_t2i(dataset.to_iterable_dataset()))
    assert rows == streamed
    for row, caption in zip(rows, captions, strict=True):
        check_row(row)
        content = row["prompt"][0]["content"]
        assert [block["type"] for block in content] == ["text", "image", "text", "image", "text"]
        assert content[-1]["text"].endswith(caption)
        template = [
            t
            for t in (*ENGLISH, *CHINESE)
            if t.prompt.removesuffix("{caption}").removeprefix("{images}") + caption == content[-1]["text"]
        ]
        assert len(template) == 1 and template[0] in (CHINESE if is_chinese(caption) else ENGLISH)
        prepared = prepare_multimodal_messages(row["prompt"], row["images"])
        filled = [block["image"] for block in prepared[0]["content"] if block["type"] == "image"]
        assert filled == row["images"]
        for side in ("chosen", "rejected"):
            assert prepare_multimodal_messages(row[side])[0]["content"] == row[side][0]["content"]


# Streaming and processes.


def mixed(num_rows=250):
    """Rows of three sources, some of them bad."""
    dataset = pairs(num_rows, sources=[("a", "b", "b")[i % 3] for i in range(num_rows)])
    table = dataset.with_format("arrow")[:].to_pylist()
    for i in range(0, num_rows, 7):
        table[i]["caption"] = " "
    for i in range(3, num_rows, 11):
        table[i]["rejected_image"] = table[i]["chosen_image"]
    for i in range(5, num_rows, 13):
        table[i]["strength"] = -1.0
    return Dataset.from_list(table, features=PAIRS).add_column("weight", np.linspace(0, 1, num_rows))


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


# Bad rows.

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
    assert f"Left {len(BAD)} of {len(rows)} pairs out (" in caplog.text
    counts = Counter(reason for _, reason in BAD.values())
    assert all(f"{count} {reason}" in caplog.text for reason, count in counts.items())


def test_rows_in_are_rows_out_and_rows_counted(caplog):
    dataset = mixed()
    made = reformulate_t2i(dataset)
    message = next(record.getMessage() for record in caplog.records if "pairs out" in record.getMessage())
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
        assert len(made) == 0 and made.features == FEATURES
    assert raw(reformulate_t2i(dataset.to_iterable_dataset())) == []
    good, bad = split_t2i(dataset)
    assert (len(good), len(bad)) == (0, 3)
    assert [len(half) for half in split_t2i(dataset.select([]))] == [0, 0]


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
