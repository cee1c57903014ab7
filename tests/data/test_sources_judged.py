"""Adapters of sets that rate or judge answers: every field of the sample rows, every reason why a pair is left out."""

import json

import pytest

from tests.data.fixtures_as_rows import fixture
from tests.data.source_rows import IMAGE, answer, changed, expected, path, results, user
from trl_dt2it.data.sources.judged import llava_critic, r1_reward_rl, vlfeedback


TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]

# VLFeedback.

BEST, DOG, BIKE, SHORT = (
    "A man in a blue coat rides a bicycle.",
    "A man rides a bicycle next to a dog.",
    "A man on a bike.",
    "bike",
)
FEEDBACK = {"images": ["merged_images/svit-detail-000001.jpg"], "source_id": "svit-detail-000001"}


def rated(*answers):
    """A raw row; an answer is its text and its three ratings."""
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    (row,) = fixture("vlfeedback_raw")
    row["completions"] = [
        {"response": response, "annotations": {a: {"Rating": r} for a, r in zip(aspects, ratings, strict=True)}}
        for response, *ratings in answers
    ]
    return row


@pytest.mark.parametrize("name", ["vlfeedback_hf", "vlfeedback_raw"])
def test_vlfeedback_in_both_layouts(name):
    (row,) = fixture(name)
    question = user(IMAGE, "Describe the picture.")
    # Ratings 5 5 5, 3 5 2, 3 5 2 and N/A 5 4.
    assert results(vlfeedback, row) == [
        "bad_rating",
        expected(question, BEST, DOG, **FEEDBACK, strength=5 / 3),
        expected(question, BEST, BIKE, **FEEDBACK, strength=5 / 3),
        "tie",
    ]


@pytest.mark.parametrize("name", ["vlfeedback_hf", "vlfeedback_raw"])
def test_vlfeedback_by_other_ratings(name):
    (row,) = fixture(name)
    found = results(vlfeedback, row, aspects=["Visual Faithfulness"])  # 5, 2, 2, 4
    pairs = [
        pair if isinstance(pair, str) else (answer(pair, "chosen"), answer(pair, "rejected"), pair["strength"])
        for pair in found
    ]
    assert pairs == [
        (BEST, DOG, 3.0),
        (BEST, BIKE, 3.0),
        (BEST, SHORT, 1.0),
        "tie",
        (SHORT, DOG, 2.0),
        (SHORT, BIKE, 2.0),
    ]
    assert len({pair["group_id"] for pair in found if isinstance(pair, dict)}) == 1
    assert results(vlfeedback, row, aspects=["Helpfulnes"]) == ["bad_rating"] * 4
    with pytest.raises(ValueError, match="`aspects` is empty"):
        list(vlfeedback(row, aspects=[]))


def test_vlfeedback_of_four_usable_answers_has_six_pairs_in_their_order():
    row = rated(("a", 1, 1, 1), ("b", "2", "2", "1"), ("c", 5.0, 4.5, 4), ("d", 5, 5, 5))
    found = [(answer(pair, "chosen"), answer(pair, "rejected"), pair["strength"]) for pair in vlfeedback(row)]
    third = 1 / 3
    assert found == [
        ("b", "a", 2 * third),
        ("c", "a", 10.5 / 3),
        ("d", "a", 4.0),
        ("c", "b", 8.5 / 3),
        ("d", "b", 10 / 3),
        ("d", "c", 0.5),
    ]


@pytest.mark.parametrize(
    "rating", [None, "", "N/A", "five", "nan", "inf", "-inf", float("nan"), True, [5], {"Rating": 5}, 10**400]
)
def test_vlfeedback_names_each_answer_without_ratings_once(rating):
    row = rated(("a", 5, 5, 5), ("b", 5, rating, 5), ("c", 1, 1, 1), ("d", rating, rating, 5))
    found = results(vlfeedback, row)
    assert found[:2] == ["bad_rating"] * 2
    assert [answer(pair, "chosen") + answer(pair, "rejected") for pair in found[2:]] == ["ac"]


def test_vlfeedback_of_answers_that_are_none():
    (row,) = fixture("vlfeedback_raw")
    row["completions"][0]["response"] = None
    row["completions"][1] = "text"
    row["completions"][2] = {**row["completions"][2], "response": 3}
    assert results(vlfeedback, row) == ["missing_column", "bad_rating", "not_conversational", "bad_rating"]
    (row,) = fixture("vlfeedback_raw")
    row["completions"][0]["annotations"] = None
    row["completions"][1]["annotations"]["Helpfulness"] = "5"
    assert results(vlfeedback, row) == ["bad_rating"] * 3


@pytest.mark.parametrize(
    "change, image",
    [
        ({"image": b"bytes", "img_path": "merged_images/x.jpg"}, {"bytes": b"bytes", "path": None}),
        ({"image": None, "img_path": "merged_images/x.jpg"}, path("merged_images/x.jpg")),
        ({"image": None, "img_path": None}, path("merged_images/svit-detail-000001.jpg")),
        ({"id": 17}, path("merged_images/17.jpg")),
    ],
)
def test_vlfeedback_has_its_image_in_one_of_three_places(change, image):
    (row,) = fixture("vlfeedback_raw")
    pairs = [pair for pair in results(vlfeedback, row | change) if isinstance(pair, dict)]
    assert [pair["images"] for pair in pairs] == [[image]] * 2


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt": None}, "missing_column"),
        ({"prompt": 3}, "not_conversational"),
        ({"id": ...}, "image_missing"),
        ({"id": {"bytes": b"bytes"}}, "image_missing"),
        ({"completions": ...}, "missing_column"),
        ({"completions": []}, "missing_column"),
        ({"completions": "text"}, "missing_column"),
        ({"completions": [{"response": "a", "annotations": {}}]}, "missing_column"),
        ({"completions": {}}, "missing_column"),
        ({"completions": {"annotations": [{}, {}], "response": ["a"]}}, "missing_column"),
        ({"completions": {"annotations": [{}], "response": ["a"]}}, "missing_column"),
        ({"completions": {"annotations": "ab", "response": "ab"}}, "missing_column"),
    ],
)
def test_vlfeedback_leaves_out(change, reason):
    assert results(vlfeedback, changed(fixture("vlfeedback_raw")[0], change)) == [reason]


def test_vlfeedback_in_the_layout_of_sharegpt():
    (row,) = fixture("rlhf_v_llamafactory")
    answers = ("There are two birds.", "There are five birds.")
    assert results(vlfeedback, row) == [expected(user(IMAGE, "How many birds are there?"), *answers, row["images"])]


# Judged.


def test_llava_critic():
    first, tie = fixture("llava_critic_pairwise")
    question = user(IMAGE, "What is in the picture?")
    wanted = expected(question, "A red square.", "A green square.", [first["image"]], source_id="critic_pair_0")
    assert results(llava_critic, first) == [wanted]
    assert results(llava_critic, tie) == ["tie"]


@pytest.mark.parametrize(
    "reply, answers, strength",
    [
        ("The better response: [1]. It is red.", ("A red square.", "A green square."), None),
        ("The better response: [second]", ("A green square.", "A red square."), None),
        ("7 9\nThe second is better.", ("A green square.", "A red square."), 2.0),
        ("8.5 8\nThe first is better.", ("A red square.", "A green square."), 0.5),
        ("My final verdict is: [[A>>B]]", ("A red square.", "A green square."), 2.0),
        ("My final verdict is: [[B>A]]", ("A green square.", "A red square."), 1.0),
    ],
)
def test_llava_critic_has_strength_where_the_judge_tells_it(reply, answers, strength):
    first, _ = fixture("llava_critic_pairwise")
    first["conversations"][1]["value"] = reply
    (row,) = results(llava_critic, first)
    assert (answer(row, "chosen"), answer(row, "rejected")) == answers
    assert row["strength"] == strength


def judged(prompt, reply):
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": reply}]
    return {"id": "x", "conversations": turns, "image": "a.png"}


PAIRED = "Question: [q?]\nResponse 1: [one]\nResponse 2: [two]"


@pytest.mark.parametrize(
    "row, reason",
    [
        (judged(PAIRED, "The better response: [3]"), "unparsed_verdict"),
        (judged(PAIRED, "Hard to say."), "unparsed_verdict"),
        (judged(PAIRED, "[[A=B]]"), "tie"),
        (judged(PAIRED, "5 5"), "tie"),
        (judged(PAIRED.replace("Response 2", "Answer 2"), "The better response: [1]"), "unparsed_verdict"),
        (
            judged("<image>\nQuestion: [q?]\nAnswer: [a]\nRate it.", "It is right.\nFinal Score: 92"),
            "unparsed_verdict",
        ),
        ({**judged(PAIRED, "[[A>B]]"), "image": None}, "image_missing"),
        ({**judged(PAIRED, "[[A>B]]"), "conversations": None}, "missing_column"),
        ({**judged(PAIRED, "[[A>B]]"), "conversations": TURNS[:1]}, "unparsed_verdict"),
        ({**judged(PAIRED, "[[A>B]]"), "conversations": TURNS * 2}, "unparsed_verdict"),
        ({**judged(PAIRED, "[[A>B]]"), "conversations": TURNS[::-1]}, "unparsed_verdict"),
        (judged(PAIRED, 3), "not_conversational"),
        (judged(PAIRED.replace("q?", "<image> or <image>?"), "[[A>B]]"), "placeholder_count"),
    ],
)
def test_llava_critic_leaves_out(row, reason):
    assert results(llava_critic, row) == [reason]


def test_r1_reward_rl():
    (row,) = fixture("r1_reward_rl")
    question = user(IMAGE, "What colour?")
    assert results(r1_reward_rl, row) == [expected(question, "Red.", "Green.", ["1.png"])]
    second = {**row, "answer": [" <answer> 2 </answer>\n"]}
    assert results(r1_reward_rl, second) == [expected(question, "Green.", "Red.", ["1.png"])]
    assert results(r1_reward_rl, {**row, "answer": "<answer>2</answer>"}) == results(r1_reward_rl, second)
    assert results(r1_reward_rl, changed(row, {"question": ...})) == results(r1_reward_rl, row)
    assert results(r1_reward_rl, {**row, "question": "Which colour?"})[0]["prompt"] == [user(IMAGE, "Which colour?")]


def r1(text="#### [Question]:\nq\n#### [Response 1]:\none\n#### [Response 2]:\ntwo", *blocks):
    content = [{"type": "text", "text": text}, *(blocks or [{"type": "image", "image": "/data/set/a.png"}])]
    return json.dumps([{"role": "system", "content": "Judge."}, {"role": "user", "content": content}])


def test_r1_reward_rl_reads_several_blocks():
    images = [{"type": "image", "image": "C:\\data\\a.png"}, {"type": "image", "image": "file:///data/b.png"}]
    row = {"message": r1(r1.__defaults__[0], *images), "answer": ["<answer>1</answer>"], "id": 4}
    question = user(IMAGE, IMAGE, "q")
    assert results(r1_reward_rl, row) == [expected(question, "one", "two", ["a.png", "b.png"], source_id="4")]


@pytest.mark.parametrize(
    "change, reason",
    [
        *(
            ({"answer": value}, "unparsed_verdict")
            for value in (None, ..., [], "1", [1], ["<answer>3</answer>"], ["<answer>1|2</answer>"], {"a": 1})
        ),
        ({"answer": ["<answer>1</answer>"] * 2}, "unparsed_verdict"),
        ({"answer": ["<answer>1</answer><answer>2</answer>"]}, "unparsed_verdict"),
        ({"message": None}, "missing_column"),
        ({"message": "no JSON"}, "unparsed_verdict"),
        ({"message": '"text"'}, "unparsed_verdict"),
        ({"message": "[1, {}]"}, "unparsed_verdict"),
        ({"message": '[{"role": "user", "content": "no headers"}]'}, "unparsed_verdict"),
        ({"message": r1("#### [Question]:\nq\n#### [Response 1]:\none")}, "unparsed_verdict"),
        ({"message": r1(r1.__defaults__[0], {"type": "text", "text": "more"})}, "image_missing"),
        ({"message": r1(r1.__defaults__[0], {"type": "image"})}, "image_missing"),
        ({"message": r1(r1.__defaults__[0], {"type": "image", "image": "data/"})}, "image_missing"),
        ({"message": r1(r1.__defaults__[0], {"type": "video", "video": ["1.png"]})}, "video_type"),
    ],
)
def test_r1_reward_rl_leaves_out(change, reason):
    assert results(r1_reward_rl, changed(fixture("r1_reward_rl")[0], change)) == [reason]
