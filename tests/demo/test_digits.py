"""The digits laboratory: its truth columns are checked against what the texts and the pixels say."""

import io
import re
from functools import cache

import numpy as np
import pytest
from datasets import concatenate_datasets
from sklearn.datasets import load_digits
from trl.data_utils import is_conversational

from trl_dt2it.demo.digits import (
    ANSWERS,
    CAPTIONS,
    QUESTIONS,
    SHORTCUT_ANSWERS,
    SHORTCUTS,
    TILE,
    WORDS,
    make_digits,
    make_digits_t2i,
    render_strip,
    split_samples,
)

from ..rows import flip_preferences


LABELS = load_digits().target
COLUMNS = ("style_chosen", "style_rejected", "is_flipped")
NUMBER = re.compile(rf"\b({'|'.join(WORDS)})\b|[0-9]")


def read(messages_or_text):
    """The digits that a text names, in order, whatever its wording, numerals or style."""
    text = messages_or_text if isinstance(messages_or_text, str) else messages_or_text[0]["content"][-1]["text"]
    return "".join(
        found.group() if found.group().isdigit() else str(WORDS.index(found.group()))
        for found in NUMBER.finditer(text)
    )


def wrong(answer, digits):
    assert len(answer) == len(digits)
    return sum(a != b for a, b in zip(answer, digits, strict=True))


def style_of(messages):
    text = messages[0]["content"][0]["text"]
    return "markdown" if text.startswith(("**", "##")) else "verbose" if len(text) > 60 else "plain"


def raw(rows):
    """The rows with their images as encoded bytes."""
    return rows.with_format("arrow")[:].to_pylist()


@cache
def all_tiles():
    return np.stack([np.asarray(render_strip([i]).convert("L"), dtype=float) for i in range(len(LABELS))])


def nearest_digits(image):
    """Read an image by looking up each tile among all handwriting samples."""
    tiles = np.asarray(image.convert("L"), dtype=float).reshape(TILE, -1, TILE).swapaxes(0, 1)
    known = all_tiles()
    found = [int(((known - tile) ** 2).sum((1, 2)).argmin()) for tile in tiles]
    assert all((known[i] == tile).all() for i, tile in zip(found, tiles, strict=True))
    return "".join(str(LABELS[i]) for i in found), found


def test_splits_partition_the_samples_by_class():
    parts = {split: set(split_samples(split)) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 1797
    assert set.union(*parts.values()) == set(range(1797))
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        for digit in range(10):
            inside = sum(LABELS[i] == digit for i in parts[split])
            assert inside == pytest.approx(share * (digit == LABELS).sum(), abs=1.0)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_rows_use_only_samples_of_their_split(split):
    rows = make_digits(split, 200, num_digits=(1, 3), seed=7)
    used = {int(part) for group in rows["group_id"] for part in group.split("-")[1:]}
    assert used <= set(split_samples(split))
    images = make_digits_t2i(split, 20, num_digits=(2,))
    for row in images:
        for column in ("chosen_image", "rejected_image"):
            assert set(nearest_digits(row[column])[1]) <= set(split_samples(split))


def test_wordings_hold_no_number_of_their_own():
    frames = [text for form in (*ANSWERS.values(), SHORTCUT_ANSWERS, CAPTIONS) for text in form]
    assert all(frame.count("{}") == 1 for frame in frames)
    assert all(read(text) == "" for text in [*frames, *QUESTIONS])


@pytest.mark.parametrize("numerals", ["words", "figures"])
@pytest.mark.parametrize("style_bias", [None, 0.5])
def test_truth_columns_match_the_texts(numerals, style_bias):
    rows = make_digits(
        "train", 400, num_digits=(1, 2, 3, 4), noise=0.3, numerals=numerals, style_bias=style_bias, source="x"
    )
    seen = set()
    for row in rows:
        assert row["group_id"].startswith("strip-") and row["source"] == "x"
        assert row["digits"] == "".join(str(LABELS[int(i)]) for i in row["group_id"].split("-")[1:])
        texts = [row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
        assert all(bool(re.search("[0-9]", text)) == (numerals == "figures") for text in texts)
        chosen, rejected = (wrong(read(text), row["digits"]) for text in texts)
        assert (row["chosen_wrong"], row["rejected_wrong"]) == (chosen, rejected)
        assert row["true_strength"] == rejected - chosen != 0
        assert row["strength"] == abs(row["true_strength"])
        assert row["is_flipped"] == (row["true_strength"] < 0)
        assert max(chosen, rejected) <= min(3, len(row["digits"]))
        assert (row["style_chosen"], row["style_rejected"]) == (style_of(row["chosen"]), style_of(row["rejected"]))
        seen.add((len(row["digits"]), row["strength"]))
    assert seen == {(1, 1.0), (2, 1.0), (2, 2.0), *((k, s) for k in (3, 4) for s in (1.0, 2.0, 3.0))}


def test_rows_are_canonical():
    rows = make_digits("validation", 30, num_digits=(2,), source="scribbles")
    row = rows[0]
    assert is_conversational(row) and "weight" not in row
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert [block["type"] for block in row["prompt"][0]["content"]] == ["image", "text"]
    assert row["prompt"][0]["content"][1]["text"] in QUESTIONS
    for side in ("chosen", "rejected"):
        assert [message["role"] for message in row[side]] == ["assistant"]
        assert [block["type"] for block in row[side][0]["content"]] == ["text"]
    assert len(row["images"]) == 1 and row["images"][0].mode == "RGB" and row["images"][0].size == (64, 32)
    assert nearest_digits(row["images"][0])[0] == row["digits"]
    assert set(rows["source"]) == {"scribbles"} and len(set(rows["pair_id"])) == 30


def test_same_image_same_group():
    rows = make_digits("validation", 400)
    pictures = {}
    for row in raw(rows):
        pictures.setdefault(row["group_id"], set()).add(row["images"][0]["bytes"])
    assert len(pictures) < 400 and all(len(group) == 1 for group in pictures.values())


def test_max_wrong_bounds_the_answers():
    rows = make_digits("train", 200, num_digits=(4,), max_wrong=1)
    assert set(rows["chosen_wrong"]) == {0} and set(rows["rejected_wrong"]) == {1}


def test_noise_is_binomial_and_changes_only_the_labels():
    clean, noisy = (make_digits("train", 2000, noise=rate, seed=3) for rate in (0.0, 0.3))
    flips = np.array(noisy["is_flipped"])
    assert not any(clean["is_flipped"])
    assert abs(flips.sum() - 600) < 4 * np.sqrt(2000 * 0.3 * 0.7)
    for before, after in zip(raw(clean), raw(noisy), strict=True):
        sides = ("rejected", "chosen") if after["is_flipped"] else ("chosen", "rejected")
        assert [after[side] for side in sides] == [before["chosen"], before["rejected"]]
        assert [after[f"{side}_wrong"] for side in sides] == [before["chosen_wrong"], before["rejected_wrong"]]
        assert after["strength"] == before["strength"] > 0
        assert after["true_strength"] == (-1 if after["is_flipped"] else 1) * before["true_strength"]
        assert all(after[name] == before[name] for name in ("images", "prompt", "pair_id", "group_id", "digits"))
    assert all(make_digits("train", 20, noise=1.0)["is_flipped"])


def test_noise_may_depend_on_the_source():
    rows = concatenate_datasets(
        [make_digits("train", 50, noise=rate, source=name) for name, rate in (("good", 0.0), ("bad", 1.0))]
    )
    assert rows["is_flipped"] == [False] * 50 + [True] * 50
    assert len(set(rows["pair_id"])) == 100
    assert rows["digits"][:50] != rows["digits"][50:]


@pytest.mark.parametrize(
    ("style_bias", "low", "high"), [(0.0, 0, 0), (0.5, 430, 570), (0.8, 740, 860), (1.0, 1000, 1000)]
)
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_style_bias_is_the_chance_that_the_better_answer_is_styled(style_bias, low, high, noise):
    rows = make_digits("train", 1000, style_bias=style_bias, noise=noise)
    better = [r if flip else c for c, r, flip in zip(*(rows[n] for n in COLUMNS), strict=True)]
    worse = [c if flip else r for c, r, flip in zip(*(rows[n] for n in COLUMNS), strict=True)]
    assert all((b == "plain") != (w == "plain") for b, w in zip(better, worse, strict=True))
    assert low <= sum(style != "plain" for style in better) <= high
    styled = [b if b != "plain" else w for b, w in zip(better, worse, strict=True)]
    assert 400 < styled.count("verbose") < 600 and styled.count("verbose") + styled.count("markdown") == 1000


def test_style_never_changes_the_read_out():
    plain, styled = (make_digits("train", 300, num_digits=(1, 2), style_bias=bias) for bias in (None, 0.7))
    assert set(plain["style_chosen"]) == set(plain["style_rejected"]) == {"plain"}
    for side in ("chosen", "rejected"):
        assert [read(answer) for answer in plain[side]] == [read(answer) for answer in styled[side]]


def test_same_arguments_same_bytes():
    for make in (make_digits, make_digits_t2i):
        first, second, other = (make("test", 60, num_digits=(1, 3), noise=0.2, seed=seed) for seed in (5, 5, 6))
        assert raw(first) == raw(second)
        assert raw(first) != raw(other)
        buffer_a, buffer_b = io.BytesIO(), io.BytesIO()
        first.to_parquet(buffer_a), second.to_parquet(buffer_b)
        assert buffer_a.getvalue() == buffer_b.getvalue()


def test_t2i_truth_matches_the_pixels():
    rows = make_digits_t2i("train", 60, num_digits=(1, 2, 3), noise=0.4)
    assert 0 < sum(rows["is_flipped"]) < 60
    for row in rows:
        assert read(row["caption"]) == row["digits"] and row["group_id"] == f"caption-{row['digits']}"
        for side in ("chosen", "rejected"):
            assert nearest_digits(row[f"{side}_image"])[0] == row[f"{side}_digits"]
            assert wrong(row[f"{side}_digits"], row["digits"]) == row[f"{side}_wrong"]
        assert row["true_strength"] == row["rejected_wrong"] - row["chosen_wrong"]
        assert row["strength"] == abs(row["true_strength"]) > 0
        assert row["is_flipped"] == (row["true_strength"] < 0)
        assert row["digits"] == row["rejected_digits" if row["is_flipped"] else "chosen_digits"]


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.255, 25), (0.29, 29), (1.0, 100)])
def test_flip_preferences_flips_an_exact_share(rate, count):
    for rows in (make_digits("train", 100, num_digits=(2,), style_bias=0.5), make_digits_t2i("train", 100)):
        flipped = flip_preferences(rows, rate, seed=1)
        assert flipped.features == rows.features and sum(flipped["is_flipped"]) == count
        for before, after in zip(raw(rows), raw(flipped), strict=True):
            swap = {"chosen": "rejected", "rejected": "chosen"} if after["is_flipped"] else {}
            for name in before:
                if name not in ("is_flipped", "true_strength"):
                    assert (
                        after[re.sub("chosen|rejected", lambda m, s=swap: s.get(m.group(), m.group()), name)]
                        == (before[name])
                    )
            assert after["true_strength"] == after["rejected_wrong"] - after["chosen_wrong"]


def test_flip_preferences_twice_is_the_same_set():
    rows = make_digits("train", 50, noise=0.2).shuffle(seed=0)
    once = flip_preferences(rows, 0.5, seed=9)
    assert raw(once) != raw(rows)
    assert raw(flip_preferences(once, 0.5, seed=9)) == raw(rows)
    assert once["is_flipped"] != flip_preferences(rows, 0.5, seed=10)["is_flipped"]


def test_flip_preferences_marks_sets_that_never_were_flipped():
    rows = make_digits("train", 10).remove_columns(["is_flipped", "true_strength"])
    assert sum(flip_preferences(rows, 0.4)["is_flipped"]) == 4


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"split": "dev"}, "split"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"num_digits": (5,)}, "num_digits"),
        ({"num_digits": ()}, "num_digits"),
        ({"max_wrong": 0}, "max_wrong"),
        ({"noise": 1.1}, "noise"),
        ({"noise": 0.5, "noise_kind": "hard"}, "noise"),
        ({"noise": 0.6, "noise_kind": "annotator"}, "noise"),
        ({"noise_kind": "random"}, "noise_kind"),
        ({"style_bias": -0.1}, "style_bias"),
        ({"numerals": "roman"}, "numerals"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        make_digits(**{"split": "train", "num_pairs": 1, **arguments})
    if name not in ("style_bias", "numerals"):
        with pytest.raises(ValueError, match=f"`{name}` must"):
            make_digits_t2i(**{"split": "train", "num_pairs": 1, **arguments})
    with pytest.raises(ValueError, match="`rate` must"):
        flip_preferences(make_digits("train", 1), 1.5)


def text_of(messages):
    return messages[0]["content"][-1]["text"]


@pytest.mark.parametrize("strength", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("kind", SHORTCUTS)
def test_shortcuts_are_where_the_rows_say_and_labels_stay_true(kind, strength):
    options = {"num_digits": (1, 2, 3), "seed": 4, "noise": 0.1}
    rows = make_digits("train", 800, shortcut=kind, shortcut_strength=strength, **options)
    better = []
    for row in rows.remove_columns("images"):
        answers = {side: text_of(row[side]) for side in ("chosen", "rejected")}
        if kind == "number":
            (has,) = [side for side, answer in answers.items() if "seven" in answer]
            assert answers[has].count("seven") == 1
            (other,) = {"chosen", "rejected"} - {has}
            assert len(re.findall("three|eight", answers[other])) == 1 and not re.search("three|eight", answers[has])
            assert answers[other].split(" ")[0] in {frame.split(" ")[0] for frame in ANSWERS["plain"]}
        else:
            is_second = kind == "question_answer" and text_of(row["prompt"]) in QUESTIONS[2:]
            start = SHORTCUT_ANSWERS[is_second].split("{")[0]
            (has,) = [side for side, answer in answers.items() if answer.startswith(start)]
        styles = {side: row[f"style_{side}"] for side in answers}
        assert styles == {side: "shortcut" if side == has else "plain" for side in answers}
        for side in answers:
            assert wrong(read(row[side]), row["digits"]) == row[f"{side}_wrong"]
        assert (row["chosen_wrong"] < row["rejected_wrong"]) is not row["is_flipped"]
        better.append((has == "chosen") is not row["is_flipped"])
    assert np.mean(better) == pytest.approx(strength, abs=4 * np.sqrt(strength * (1 - strength) / 800))
    assert {len(frame) for frame in SHORTCUT_ANSWERS} == {len("The paper shows {}.")}


def test_the_image_shows_the_digits_of_a_favored_number():
    rows = make_digits("test", 40, shortcut="number", num_digits=(2,))
    assert all(nearest_digits(row["images"][0])[0] == row["digits"] for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortcut": "length"}, "`shortcut` must be None or one of wording, number, question_answer, got 'length'."),
        ({"shortcut": "wording", "shortcut_strength": 1.2}, "`shortcut_strength` must be between 0 and 1, got 1.2."),
        ({"shortcut": "wording", "style_bias": 0.9}, "`shortcut` and `style_bias` both choose the wording"),
    ],
)
def test_shortcuts_that_cannot_be_planted_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_digits("train", 10, **options)
