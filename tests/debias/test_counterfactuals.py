"""Counterfactual pairs: right about their image, a coin toss without it, in groups that folds keep together."""

import io
import random
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features, Value, concatenate_datasets
from PIL import Image

from trl_dt2it.data import check_row, mix, reformulate_t2i, split_by_group
from trl_dt2it.data.messages import FEATURES, preference
from trl_dt2it.debias import audit_style, counterfactual_pairs
from trl_dt2it.debias.counterfactuals import claims_differ, read_claims
from trl_dt2it.demo.digits import WORDS, make_digits, make_digits_t2i

from ..logs import messages_of


@pytest.fixture
def log(caplog):
    with messages_of("trl_dt2it.debias.counterfactuals", caplog):
        yield caplog


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """Pairs whose chosen answer is right."""
    rows = make_digits("train", 1200, num_digits=(1, 2), style_bias=0.9)
    return rows.select(np.flatnonzero(np.array(rows["chosen_wrong"]) == 0))


def encoded(dataset: Dataset) -> list[dict]:
    return dataset.with_format("arrow")[:].to_pylist()


def text(messages: list[dict]) -> str:
    return "".join(block["text"] or "" for message in messages for block in message["content"])


def digits_in(messages: list[dict]) -> str:
    words = text(messages).replace(".", "").split()
    return "".join(str(WORDS.index(word)) for word in words if word in WORDS)


def image(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make(rows: list[tuple], **columns) -> Dataset:
    """Rows of question, chosen, rejected and a color, or several."""
    made = []
    for index, (question, chosen, rejected, *colors) in enumerate(rows):
        row = preference(question, chosen, rejected, list(map(image, colors)), group=f"g{index}")
        made.append({**row, "pair_id": f"p{index}", "source": "set", **{k: v[index] for k, v in columns.items()}})
    return Dataset.from_list(made, features=Features({**FEATURES, **dict.fromkeys(columns, Value("float64"))}))


def test_chosen_is_right_and_rejected_is_wrong_about_the_image_shown(digits):
    made = counterfactual_pairs(digits)
    assert len(made) == len(digits) // 2 // 2 * 2
    rows = {row["pair_id"]: row for row in encoded(digits)}
    for row in encoded(made):
        own, other = rows[row["counterfactual_of"]], rows[row["counterfactual_with"]]
        assert row["pair_id"] == own["pair_id"] + "~counterfactual"
        assert digits_in(row["chosen"]) == row["digits"] == own["digits"]
        assert digits_in(row["rejected"]) == other["digits"] != row["digits"]
        assert row["images"] == own["images"] != other["images"]
        assert row["chosen"] == own["chosen"] and row["rejected"] == other["chosen"]
        assert text(row["prompt"]) == text(own["prompt"]) == text(other["prompt"])
        assert row["source"] == "digits" and row["strength"] is None and row["is_flipped"] is None
        # What is about the rejected answer is not known of the new one.
        assert row["chosen_wrong"] == 0 and row["rejected_wrong"] is None
        check_row(row)
    used = Counter(made["counterfactual_of"])
    assert set(used.values()) == {1} and used == Counter(made["counterfactual_with"])
    assert len(set(made["pair_id"]) | set(digits["pair_id"])) == len(made) + len(digits)


def test_no_function_of_text_is_better_than_chance(digits):
    made = encoded(counterfactual_pairs(digits, share=1.0))
    preferences = [
        lambda question, answer: len(answer),
        lambda question, answer: answer.startswith("I read"),
        lambda question, answer: answer.count("e") - len(question),
        *(
            lambda question, answer, seed=seed: random.Random(f"{seed} {question} {answer}").random()
            for seed in range(5)
        ),
    ]
    assert len(made) > 500
    for reward in preferences:
        sides = [[reward(text(row["prompt"]), text(row[side])) for side in ("chosen", "rejected")] for row in made]
        assert sum((a > b) + (a == b) / 2 for a, b in sides) == len(made) / 2
    answers = [Counter(text(row[side]) for row in made) for side in ("chosen", "rejected")]
    assert answers[0] == answers[1]


def test_a_style_that_tells_the_label_tells_nothing_of_the_new_pairs(digits):
    assert audit_style(digits).overall.auc > 0.85
    assert audit_style(counterfactual_pairs(digits)).overall.auc == pytest.approx(0.5, abs=1e-12)


def test_folds_keep_both_rows_of_a_couple_and_what_they_were_made_of(digits):
    # Groups of about three rows, of which most are in a couple.
    rows = make_digits("train", 1500)
    everything = counterfactual_pairs(rows, share=1.0, with_originals=True)
    made = everything.select(range(len(rows), len(everything)))
    assert len(made) > 500
    assert everything.select(range(len(rows)))["pair_id"] == rows["pair_id"][:]
    group = dict(zip(everything["pair_id"], everything["group_id"], strict=True))
    for row in made.remove_columns("images"):
        names = row["counterfactual_of"], row["counterfactual_with"], row["pair_id"]
        assert len({group[name] for name in names}) == 1
    # Two groups are joined and no third, and rows of one group stay in one.
    before, parts = dict(zip(rows["pair_id"], rows["group_id"], strict=True)), {}
    for name, old in before.items():
        parts.setdefault(group[name], set()).add(old)
    assert max(map(len, parts.values())) == 2 and sum(map(len, parts.values())) == len(set(before.values()))
    assert made["group_id"] == counterfactual_pairs(rows, share=1.0)["group_id"][:]
    splits = split_by_group(everything, 0.2)
    held = set(splits["test"]["pair_id"])
    couples = [{*pair} for pair in zip(made["counterfactual_of"], made["counterfactual_with"], strict=True)]
    assert 0 < sum(couple <= held for couple in couples) and all(len(couple & held) != 1 for couple in couples)


def test_images_are_neither_decoded_nor_copied(digits, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was decoded"))
    made = counterfactual_pairs(digits, with_originals=True)

    def addresses(dataset: Dataset) -> set[int]:
        chunks = dataset.data.column("images").chunks
        return {buffer.address for chunk in chunks for buffer in chunk.flatten().field("bytes").buffers() if buffer}

    assert addresses(made) == addresses(digits)
    assert made.features["images"] == digits.features["images"]


def test_rows_without_a_counterfactual_are_counted_by_reason(log):
    rows = make(
        [
            ("How many?", "There are 3 dogs.", "There are 2 dogs.", 1),  # a couple with the next
            (" how  MANY?", "There are 4 dogs.", "There is 1 dog.", 2),
            ("What color?", "Red.", "Blue.", 3),
            ("Yes or no?", "Yes.", "No.", 4),  # of the next, Yes is what it says itself
            ("Yes or no?", "Yes!", "Maybe.", 5),
            ("No picture?", "None.", "One."),
            ("Which is better?", "Image 1 is better than Image 2.", "Image 2 is better than Image 1.", 6, 7),
            ("Which is better?", "Image 2 is better than Image 1.", "Image 1 is better than Image 2.", 8, 9),
        ]
    )
    made = counterfactual_pairs(rows, share=1.0)
    assert made["pair_id"] == ["p0~counterfactual", "p1~counterfactual"] or made["pair_id"][0] == "p1~counterfactual"
    assert len({str(prompt) for prompt in made["prompt"]}) == 1  # one wording
    assert "2 counterfactual pairs of 8 rows; of the others: " in log.text
    for counted in ("2 two_image_verdict", "2 no_other_answer", "1 question_asked_once", "1 no_image"):
        assert counted in log.text
    with pytest.raises(
        ValueError, match=r"No counterfactual pair .* 6 rows \(.*1 no_image.*\); they need one question"
    ):
        counterfactual_pairs(rows.select(range(2, 8)))
    # What has one already gets no other, nor is it made of one.
    with pytest.raises(ValueError, match=r"2 has_counterfactual.* 2 counterfactual,"):
        counterfactual_pairs(concatenate_datasets([rows, made]))


def test_an_answer_that_another_row_calls_right_or_compares_is_not_made_wrong():
    rows = [("How many?", "3", "2", 1), ("How many?", "4", "2", 2)]
    assert len(counterfactual_pairs(make(rows), share=1.0)) == 2
    for more in (
        ("How many?", "4", "7", 1),  # says 4 of the first image, too
        ("How many?", "3", "4", 1),  # has the new pair already
        ("How many?", "4", "3", 1),  # contradicts it
    ):
        with pytest.raises(ValueError, match="3 no_other_answer"):
            counterfactual_pairs(make([*rows, more]), share=1.0)
    # Its own rejected answer, and one image under two questions.
    for rows in ([("Q?", "1", "2", 1), ("Q?", "2", "1", 2)], [("Q?", "1", "3", 1), ("Q?", "2", "3", 1)]):
        with pytest.raises(ValueError, match="2 no_other_answer"):
            counterfactual_pairs(make(rows))


def test_numbers_of_rows():
    columns = {"weight": [1.0, 3.0], "label_confidence": [0.9, None], "margin": [0.5, 0.25]}
    columns |= {"blind_margin": [1.0, 2.0], "chosen_reward": [1.0, 2.0], "rejected_reward": [0.0, 1.0]}
    rows = make([("How many?", "3", "2", 1), ("How many?", "4", "2", 2)], **columns)
    made = counterfactual_pairs(rows, share=2).sort("pair_id")
    assert made["weight"] == [2.0, 2.0] and made["label_confidence"] == [0.9, 0.9] and made["margin"] == [0.0, 0.0]
    assert made["chosen_reward"] == [1.0, 2.0]
    assert made["blind_margin"] == [0.0, 0.0]  # text is right about one of the two
    for name in ("strength", "rejected_reward"):
        assert made[name] == [None, None]
    assert made.column_names == [*rows.column_names, "counterfactual_of", "counterfactual_with"]
    assert {k: made.features[k] for k in rows.features} == rows.features
    assert concatenate_datasets([rows, made]).num_rows == 4
    assert len(mix({"pairs": rows, "made": made})) == 4


@pytest.mark.parametrize(("own", "made"), [([None, 2.0], 0.0), ([None, None], None)])
def test_pairs_of_rows_that_are_not_weighed_blind_are_not_either(own, made):
    rows = make([("How many?", "3", "2", 1), ("How many?", "4", "2", 2)], blind_margin=own)
    assert counterfactual_pairs(rows, share=2)["blind_margin"] == [made, made]


def test_questions_take_turns_and_sources_stay_apart():
    answers = [("Common?", str(i), "0", i) for i in range(1, 101)] + [
        ("Rare?", str(i), "0", i) for i in range(101, 111)
    ]
    rows = make(answers)
    made = counterfactual_pairs(rows, share=16)
    assert Counter(text(row) for row in made["prompt"]) == {"Common?": 8, "Rare?": 8}
    assert len(counterfactual_pairs(rows, share=0.1)) == 10  # of 110 rows
    again, other = counterfactual_pairs(rows, share=16), counterfactual_pairs(rows, share=16, seed=1)
    assert made["pair_id"] == again["pair_id"][:] != other["pair_id"][:]
    apart = rows.remove_columns("source").add_column("source", ["a"] * 55 + ["b"] * 55)
    found = counterfactual_pairs(apart, share=1.0)
    source = dict(zip(apart["pair_id"], apart["source"], strict=True))
    assert all(
        source[a] == source[b] for a, b in zip(found["counterfactual_of"], found["counterfactual_with"], strict=True)
    )
    assert len(counterfactual_pairs(apart, share=0.1)) == 4 + 4
    whole = counterfactual_pairs(apart, share=1.0, by=None)
    assert any(
        source[a] != source[b] for a, b in zip(whole["counterfactual_of"], whole["counterfactual_with"], strict=True)
    )


def test_a_rare_answer_finds_its_partners():
    rows = [("Is there one?", "Yes." if i % 50 else "No.", "Perhaps.", i % 256, i // 256) for i in range(1000)]
    assert len(counterfactual_pairs(make(rows), share=1.0)) == 2 * 20


def test_rows_without_names_or_groups_and_of_strings(tmp_path):
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(image(index))
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "What?"}],
                **{side: [{"role": "assistant", "content": word}] for side, word in sides.items()},
                "images": [f"{index}.png"],
            }
            for index, sides in enumerate(
                [{"chosen": "a cat", "rejected": "a fox"}, {"chosen": "a dog", "rejected": "-"}]
            )
        ]
    )
    made = counterfactual_pairs(rows, image_root=tmp_path, share=1.0, with_originals=True)
    assert len(made) == 4 and len(set(made["group_id"])) == 1
    assert len(set(made.select([2, 3])["pair_id"])) == 2
    assert all(pair_id.endswith("~counterfactual") for pair_id in made["pair_id"][2:])
    with pytest.raises(ValueError, match="2 unreadable"):
        counterfactual_pairs(rows)


def test_two_image_questions_have_theirs_in_the_other_order():
    rows = reformulate_t2i(make_digits_t2i("train", 40))
    with pytest.raises(ValueError, match="two_image_verdict"):
        counterfactual_pairs(rows, share=1.0)


def test_misuse_is_named(digits):
    for share in (0.0, 1.5, 1):
        with pytest.raises(ValueError, match=f"`share` is {share}"):
            counterfactual_pairs(digits, share=share)
    with pytest.raises(ValueError, match="`by` is 'origin'"):
        counterfactual_pairs(digits, by="origin")
    with pytest.raises(ValueError, match="not of IterableDataset"):
        counterfactual_pairs(digits.to_iterable_dataset())
    with pytest.raises(ValueError, match="with a transform"):
        counterfactual_pairs(digits.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="no column `chosen`"):
        counterfactual_pairs(digits.remove_columns("chosen"))
    with pytest.raises(ValueError, match="empty set"):
        counterfactual_pairs(digits.select([]))


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ("It is four two.", "The answer is four three.", True),
        ("It is four two.", "I read two four.", False),  # the same numbers
        ("There are 42 birds.", "There are forty-two birds.", False),
        ("twenty dogs", "twenty-one dogs", True),
        ("It costs 1,000.50.", "It costs 1000.5", False),
        ("Two dogs and 1 cat.", "Two dogs.", False),  # which is right about both
        ("Yes, there is a dog.", "No, there is not.", True),
        ("The answer is yes.", "There is no dog in it.", True),
        ("Yes, a dog.", "Yes, a cat.", False),
        ("是的,有一只狗", "没有狗", True),
        ("B", "C. A dog", True),
        ("**Answer**: B", "The answer is (B).", False),
        ("Option A", "Answer: (D)", True),
        ("A cat.", "A dog.", True),
        ("A cat.", "A black cat on a sofa.", False),
        ("A cat sleeps on the red sofa.", "A dog sleeps on the red sofa.", False),  # too near
        ("A cat.", "a  cat!", False),
        ("A cat.", "I'm sorry, but I can't help with that.", False),
        ("一只黑猫睡在沙发上", "男孩正踢足球", True),
        ("2. The left one.", "2. The left one", False),
        ("The picture shows it.", "The image shows it.", False),  # nothing that could differ
        (f"{'words all along ' * 20} 1900", f"{'words all along ' * 20} 1800", False),  # a long text about the same
        ("A 🐱", "A 🐶", False),
    ],
)
def test_answers_that_exclude_each_other(one, other, differ):
    claims = read_claims(one), read_claims(other)
    assert claims_differ(*claims) is claims_differ(*claims[::-1]) is differ
    assert not claims_differ(claims[0], claims[0])


def test_the_readers_of_arrow_columns_see_what_is_selected(digits):
    shuffled = digits.shuffle(seed=3).select(range(400))
    made, rows = counterfactual_pairs(shuffled), {row["pair_id"]: row for row in encoded(shuffled)}
    for row in encoded(made):
        assert row["images"] == rows[row["counterfactual_of"]]["images"]
        assert row["rejected"] == rows[row["counterfactual_with"]]["chosen"]
    assert set(digits.features) < set(made.features)
