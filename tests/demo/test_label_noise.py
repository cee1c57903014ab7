"""Planted label noise: its rate, and where the wrong labels are, by the texts and pixels of the rows."""

import hashlib
from collections import defaultdict

import numpy as np
import pytest

from trl_dt2it.demo.digits import CAPTIONS, QUESTIONS, make_digits, make_digits_t2i
from trl_dt2it.demo.label_noise import ANNOTATORS, COPIES, NOISE_KINDS, flip_chances

from .test_digits import nearest_digits, raw, read


MAKERS = [
    *((make_digits, kind) for kind in NOISE_KINDS),
    *((make_digits_t2i, kind) for kind in NOISE_KINDS if kind != "length"),
]


def lengths(rows):
    """Characters of the answers: of the truly better, and of the truly worse."""
    texts = np.array([[len(row[side][0]["content"][0]["text"]) for side in ("chosen", "rejected")] for row in rows])
    return np.where(np.array(rows["is_flipped"])[:, None], texts[:, ::-1], texts).T


@pytest.mark.parametrize(("make", "kind"), MAKERS)
def test_the_rate_is_the_one_asked_for_and_noise_changes_labels_alone(make, kind):
    count, noise = 1000, 0.35
    clean, noisy = (make("train", count, num_digits=(1, 2), noise=r, noise_kind=kind, seed=3) for r in (0.0, noise))
    flips = np.array(noisy["is_flipped"])
    labels = count / COPIES if kind == "near_duplicates" else count
    # The variance is at most that of a coin with the mean rate.
    assert abs(flips.mean() - noise) < 4 * np.sqrt(noise * (1 - noise) / labels)
    assert not any(clean["is_flipped"])
    swap = {"chosen": "rejected", "rejected": "chosen"}
    for before, after in zip(raw(clean), raw(noisy), strict=True):
        assert after["true_strength"] == after["rejected_wrong"] - after["chosen_wrong"]
        for name in before:
            side = name.split("_")[0]
            name_before = name.replace(side, swap.get(side, side)) if after["is_flipped"] else name
            if name.startswith("style_") and after["is_flipped"]:
                name_before = f"style_{swap[name.removeprefix('style_')]}"
            if name not in ("is_flipped", "true_strength", "source"):
                assert after[name] == before[name_before]


def test_hard_pairs_are_wrong_more_often_by_the_number_of_wrong_digits_and_by_looks():
    rows = make_digits("train", 4000, num_digits=(1, 2, 3), noise=0.3, noise_kind="hard")
    flips, gap = np.array(rows["is_flipped"]), np.array(rows["strength"])
    rates = [flips[gap == size].mean() for size in (1.0, 2.0, 3.0)]
    assert rates[0] > 0.3 > rates[1] + 0.05 and rates[1] > rates[2]
    # A nine looks like a three and not like a six.
    of = defaultdict(list)
    for row in make_digits("train", 3000, noise=0.2, noise_kind="hard").remove_columns("images"):
        of[frozenset((read(row["chosen"]), read(row["rejected"])))].append(row["is_flipped"])
    alike, unlike = (
        np.concatenate([of[frozenset(pair)] for pair in pairs])
        for pairs in (("18", "39", "09", "89"), ("67", "24", "34", "69"))
    )
    assert len(alike) > 200 and alike.mean() > 0.25 and unlike.mean() < 0.15


def test_chances_have_the_mean_rate_and_are_those_of_bradley_and_terry():
    differences = np.random.default_rng(0).exponential(size=500)
    for noise in (0.01, 0.2, 0.35, 0.499):
        chances = flip_chances(noise, "hard", differences)
        assert chances.mean() == pytest.approx(noise, abs=1e-9) and chances.max() <= 0.5
        # One slope for all: log-odds are proportional to the difference, but for the least that is seen.
        large = differences > 0.05
        slopes = np.log((1 - chances) / chances)[large] / differences[large]
        assert slopes == pytest.approx(np.full(large.sum(), slopes[0]), rel=1e-6)
        lengths = flip_chances(noise * 0.4, "length", differences, [1, -1, 0, 2, -3] * 100)
        assert lengths.mean() == pytest.approx(noise * 0.4) and set(lengths[[1, 2, 4]]) == {0.0}
        assert flip_chances(noise, "annotator", differences).mean() == pytest.approx(noise)
    assert not flip_chances(0.0, "hard", differences).any()


def test_who_prefers_the_longer_answer_errs_only_where_the_worse_is_longer():
    rows = make_digits("train", 2000, num_digits=(1, 2), noise=0.35, noise_kind="length").remove_columns("images")
    better, worse = lengths(rows)
    flips = np.array(rows["is_flipped"])
    assert not flips[worse <= better].any() and 0.6 < flips[worse > better].mean() < 0.9
    styled = make_digits("train", 500, style_bias=0.0, noise=0.75, noise_kind="length")  # the worse is often longer
    assert np.mean(styled["is_flipped"]) == pytest.approx(0.75, abs=0.06)
    with pytest.raises(ValueError, match=r"`noise` must be at most 0\.\d+ with `noise_kind` 'length'"):
        make_digits("train", 500, noise=0.7, noise_kind="length")
    with pytest.raises(ValueError, match="`noise_kind` must be one of"):
        make_digits_t2i("train", 5, noise_kind="length")


@pytest.mark.parametrize("make", [make_digits, make_digits_t2i])
def test_a_reversed_source_is_all_wrong_and_the_other_all_right(make):
    rows = make("train", 1000, noise=0.35, noise_kind="reversed", source="x")
    wrong = np.array(rows["is_flipped"])
    assert rows["source"][:] == np.where(wrong, "x-reversed", "x").tolist() and 300 < wrong.sum() < 400
    uniform = make("train", 1000, noise=0.35, source="x")
    assert uniform["is_flipped"][:] == rows["is_flipped"][:] and uniform["pair_id"][:] == rows["pair_id"][:]


def test_each_annotator_is_a_source_with_a_rate_of_its_own():
    rows = make_digits("train", 4000, noise=0.35, noise_kind="annotator", source="x")
    source, flips = np.array(rows["source"]), np.array(rows["is_flipped"])
    for index in range(ANNOTATORS):
        own, rate = flips[source == f"x-{index}"], 0.35 * (2 * index + 1) / ANNOTATORS
        assert len(own) == 1000 and abs(own.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / 1000)


@pytest.mark.parametrize("make", [make_digits, make_digits_t2i])
def test_near_duplicates_share_content_and_label_but_not_words_pixels_or_group(make):
    rows = make("train", 402, num_digits=(1, 2), noise=0.35, noise_kind="near_duplicates")
    plain, words = raw(rows), set()
    assert len({row["pair_id"] for row in plain}) == 402
    images = [name for name in ("images", "chosen_image", "rejected_image") if name in rows.column_names]
    for start in range(0, 402, COPIES):
        copies = plain[start : start + COPIES]
        for name in ("is_flipped", "digits", "chosen_wrong", "rejected_wrong"):
            assert len({row[name] for row in copies}) == 1
        assert len({row["group_id"] for row in copies}) == len({str(row[images[0]]) for row in copies}) == len(copies)
        if make is make_digits:
            assert len({(read(row["chosen"]), read(row["rejected"])) for row in copies}) == 1
        words.add(len({str(row.get("prompt", row.get("caption"))) for row in copies}))
    assert max(words) > 1  # of 4 questions, or 3 captions
    if make is make_digits:
        assert {row["prompt"][0]["content"][1]["text"] for row in rows} == set(QUESTIONS)
        pictures = [np.asarray(row["images"][0], dtype=int) for row in rows.select(range(COPIES))]
        assert nearest_digits(rows[0]["images"][0])[0] == rows[0]["digits"]
        assert 0 < np.abs(pictures[0] - pictures[-1]).max() <= 31  # 12 % of 255
    else:
        assert all(any(row["caption"].startswith(text.split("{}")[0]) for text in CAPTIONS) for row in rows)


def test_uniform_noise_is_what_it_was_before_there_were_others():
    def fingerprint(rows):
        kept = [{name: value for name, value in row.items() if "image" not in name} for row in raw(rows)]
        return hashlib.sha256(repr(kept).encode()).hexdigest()[:16]

    rows = make_digits("train", 300, num_digits=(1, 2, 3), noise=0.3, style_bias=0.7, seed=11)
    assert fingerprint(rows) == "64101be6e642810f"
    assert fingerprint(make_digits("test", 300, noise=0.2, numerals="figures")) == "f031f6a02247657a"
    assert fingerprint(make_digits_t2i("train", 300, num_digits=(1, 2), noise=0.3, seed=11)) == "109af5a29406fff9"
