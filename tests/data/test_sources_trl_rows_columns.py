"""Any table: columns by their names, every option, every reason why a pair is left out."""

import pytest

from tests.data.source_rows import IMAGE, TABLE, expected, message, results, say, says, user
from trl_dt2it.data import load_preferences
from trl_dt2it.data.rows import content_group
from trl_dt2it.data.sources.trl_rows import columns


def test_columns_with_all_options():
    row = {
        "task": {"text": "What is on the table?", "from": {"id": 7}},
        "good": "A red cup.",
        "bad": {"content": "Two dogs."},
        "img": {"bytes": b"1", "path": "a.png"},
        "gap": "1.5",
        "topic": 12,
        "sys": "Be brief.",
        "other": None,
    }
    options = {
        "question": "task.text",
        "chosen": "good",
        "rejected": "bad",
        "image": "img",
        "strength": "gap",
        "source_id": "task.from.id",
        "group": "topic",
        "system": "sys",
    }
    prompt = [say("system", "Be brief."), TABLE]
    wanted = expected(prompt, "A red cup.", "Two dogs.", [row["img"]], strength=1.5, source_id="7")
    assert results(columns, row, **options) == [{**wanted, "group_id": "12"}]
    unknown = {"gap": None, "topic": None, "sys": None}
    wanted = expected(TABLE, "A red cup.", "Two dogs.", [row["img"]], source_id="7")
    assert results(columns, {**row, **unknown}, **options) == [wanted]
    assert wanted["group_id"] == content_group([TABLE], [row["img"]], [])
    nested = {**options, "image": "img.bytes"}
    assert results(columns, row, **nested)[0]["images"] == [{"bytes": b"1", "path": None}]


BASIC = {"question": "q", "chosen": "a", "rejected": "b"}


def test_columns_with_the_least():
    row = {"q": "2+2?", "a": "4", "b": "5"}
    assert results(columns, row, **BASIC) == [expected(user("2+2?"), "4", "5")]
    dotted = {"q.text": "2+2?", "q": {"text": "no"}, "a": "4", "b": "5"}
    assert results(columns, dotted, **{**BASIC, "question": "q.text"}) == [expected(user("2+2?"), "4", "5")]
    turns = {**row, "q": says("q", "r", "<image>t"), "i": ["a.png"]}
    prompt = [user("q"), say("assistant", "r"), user(IMAGE, "t")]
    assert results(columns, turns, **BASIC, images="i") == [expected(prompt, "4", "5", ["a.png"])]
    for none in (None, [], ""):
        assert results(columns, {**row, "i": none}, **BASIC, images="i") == [expected(user("2+2?"), "4", "5")]


def test_columns_that_are_not_there_are_named():
    row = {"q": "2+2?", "a": {"text": "4"}, "b": None}
    text = message(columns, row, question="q", chosen="answer", rejected="b")
    assert text == "there is no column `answer`; the row has q, a, b."
    text = message(columns, row, question="q", chosen="a.txt", rejected="b")
    assert text == "there is no column `a.txt`; the row has q, a, b."
    text = message(columns, row, question="q", chosen="a.text", rejected="b")
    assert text == "`b` is missing or None; give it, or drop the row."
    with pytest.raises(ValueError, match="`image` and `images` are both given"):
        list(columns(row, **BASIC, image="i", images="j"))


@pytest.mark.parametrize(
    "row, options, reason",
    [
        ({}, {}, "missing_column"),
        ({"q": None}, {}, "missing_column"),
        ({"q": 3}, {}, "not_conversational"),
        ({"q": []}, {}, "not_conversational"),
        ({"q": says("q", "a")}, {}, "not_conversational"),
        ({"a": ["a"]}, {}, "not_conversational"),
        ({"b": {"text": "b"}}, {}, "missing_column"),
        *(
            ({}, {option: "x"}, "missing_column")
            for option in ("image", "images", "strength", "source_id", "group", "system")
        ),
        ({"x": None}, {"image": "x"}, "image_missing"),
        ({"x": []}, {"image": "x"}, "image_missing"),
        ({"x": ["a.png", "b.png"]}, {"image": "x"}, "image_type"),
        ({"x": [None]}, {"images": "x"}, "image_missing"),
        ({"x": 1}, {"images": "x"}, "image_type"),
        ({"x": ["a.png"], "q": "<image><image>"}, {"images": "x"}, "placeholder_count"),
        ({"x": -1}, {"strength": "x"}, "bad_strength"),
        ({"x": "much"}, {"strength": "x"}, "bad_strength"),
        ({"x": 1}, {"system": "x"}, "not_conversational"),
        ({"x": {}}, {"strength": "x.y"}, "missing_column"),
        ({"x": None}, {"strength": "x.y"}, "missing_column"),
    ],
)
def test_columns_leaves_out(row, options, reason):
    given = {"q": "2+2?", "a": "4", "b": "5", **row} if row or options else {"a": "4"}
    assert results(columns, given, **BASIC, **options) == [reason]


CHOICE = {"question": "q", "first": "a", "second": "b", "label": "x"}
A_FIRST = [expected(user("2+2?"), "4", "5")]
B_FIRST = [expected(user("2+2?"), "5", "4")]


@pytest.mark.parametrize(
    "label, wanted",
    [
        *((label, A_FIRST) for label in ("A", "a ", "model_a", "Assistant A", "response-a", "first", "[[A]]", "A>>B")),
        *((label, B_FIRST) for label in ("B", "model_b", "answer B", "second", "[[B]]", "B>A", "b")),
        *(
            (label, ["tie"])
            for label in ("C", "tie", "Tie", "tie (bothbad)", "both bad", "both_good", "[[A=B]]", "same")
        ),
        *((label, ["unparsed_verdict"]) for label in (0, 1, 2, "1", None, "", "D", True, ["A"], 0.5)),
    ],
)
def test_a_label_says_in_words_which_of_two_answers_is_better(label, wanted):
    assert results(columns, {"q": "2+2?", "a": "4", "b": "5", "x": label}, **CHOICE) == wanted


@pytest.mark.parametrize(
    "label, wanted",
    [(0, A_FIRST), (1, B_FIRST), (1.0, B_FIRST), ("1", B_FIRST), (2, ["tie"]), (3, ["unparsed_verdict"])],
)
def test_what_numbers_say_is_said_by_the_user(label, wanted):
    row, labels = {"q": "2+2?", "a": "4", "b": "5", "x": label}, {0: "first", 1: "second", 2: "tie"}
    assert results(columns, row, **CHOICE, labels=labels) == wanted
    assert results(columns, row, **CHOICE, labels={str(key): kind for key, kind in labels.items()}) == wanted
    if wanted == ["unparsed_verdict"]:
        assert message(columns, row, **CHOICE) == '`x` is 3; say what it means, as in `labels={3: "first"}`.'


def test_a_label_may_be_the_name_of_a_column_and_the_user_s_words_go_first():
    row = {"q": "2+2?", "response_1": "4", "response_2": "5", "x": "response_2"}
    options = {"question": "q", "first": "response_1", "second": "response_2", "label": "x"}
    assert results(columns, row, **options) == B_FIRST
    assert results(columns, {**row, "x": "C"}, **options, labels={"c": "second"}) == B_FIRST


@pytest.mark.parametrize(
    "options, problem",
    [
        (
            {"question": "q", "chosen": "a"},
            "`columns` needs the options chosen, rejected; or else first, second and label",
        ),
        ({"question": "q", "first": "a", "second": "b"}, "or else first, second and label"),
        ({**CHOICE, "chosen": "a"}, "or else first, second and label"),
        ({**CHOICE, "labels": {0: "A"}}, "`labels` has the value 'A'; each must be first, second, tie"),
        ({**BASIC, "image": "i", "images": "j"}, "`image` and `images` are both given"),
    ],
)
def test_options_that_do_not_fit_are_named_before_anything_is_read(options, problem):
    with pytest.raises(ValueError, match=problem):
        load_preferences("columns", "nowhere.jsonl", **options)


@pytest.mark.parametrize(
    "good, bad",
    [
        ("a.png", "b.png"),
        ("images/1.jpg", "images/2.JPEG"),
        ("C:\\my pictures\\1.webp", "/data/my pictures/2.webp"),
        ("https://host/1.png?size=2", "https://host/2.png"),
        ("data:image/png;base64,iVBO", "data:image/png;base64,iVBP"),
        ({"bytes": b"\x89PNG", "path": None}, "A cat."),
        ({"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}),
        (["a.png", {"bytes": b"1"}], "A cat."),
        (["a.png"], ["b.png"]),
        (b"\x89PNG", b"\x89PNG"),
    ],
)
def test_images_and_their_file_names_are_no_answers(good, bad):
    row = {"q": "a cat", "a": good, "b": bad}
    assert results(columns, row, **BASIC) == ["image_in_answer"]
    wanted = 'use `reformulate_t2i(dataset, caption="q", chosen_image="a", rejected_image="b")`.'
    assert message(columns, row, **BASIC).endswith(f"this is a text-to-image pair; {wanted}")
    assert results(columns, {**row, "x": "B"}, **CHOICE) == ["image_in_answer"]


@pytest.mark.parametrize(
    "good, bad",
    [
        ("kitten.png", "I do not know."),
        ("It is saved as a.png", "It is saved as b.png"),
        ("See images/a.png and images/b.png", "See out/b.png"),
        ("./run.sh", "./stop.sh"),
    ],
)
def test_answers_that_speak_of_files_are_answers(good, bad):
    assert results(columns, {"q": "2+2?", "a": good, "b": bad}, **BASIC) == [expected(user("2+2?"), good, bad)]


@pytest.mark.parametrize(
    "field, reason",
    [
        *((field, "image_missing") for field in ("image", "images")),
        *((field, "video_type") for field in ("video", "videos", "audio", "audios")),
    ],
)
def test_what_a_question_may_be_about_is_not_left_out(field, reason):
    row = {"q": "2+2?", "a": "4", "b": "5", field: ["x.png"]}
    assert results(columns, row, **BASIC) == [reason]
    assert f"the row has `{field}`, which no option names" in message(columns, row, **BASIC)
    assert results(columns, {**row, field: None}, **BASIC) == [expected(user("2+2?"), "4", "5")]
    if reason == "image_missing":
        named = {"images": "pictures"}
        assert results(columns, {**row, "pictures": ["y.png"]}, **BASIC, **named)[0]["images"][0]["path"] == "y.png"


def test_placeholders_of_images_belong_to_the_question():
    row = {"q": "2+2?", "a": "<image>4", "b": "5"}
    assert results(columns, row, **BASIC) == ["image_in_answer"]
    assert results(columns, {**row, "a": "a <video> tag"}, **BASIC) == [expected(user("2+2?"), "a <video> tag", "5")]
