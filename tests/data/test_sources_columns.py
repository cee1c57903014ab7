"""Any table: columns by their names, every option, every reason why a pair is left out."""

import pytest

from tests.data.source_rows import IMAGE, TABLE, expected, message, results, say, says, user
from trl_dt2it.data.canonical import content_group
from trl_dt2it.data.sources.columns import columns


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
