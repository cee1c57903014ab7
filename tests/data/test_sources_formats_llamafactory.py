"""Rows of LLaMA-Factory: both layouts, every option, every reason why a pair is left out."""

import pytest
from datasets import Dataset

from tests.data.fixtures_as_rows import fixture
from tests.data.source_rows import IMAGE, TABLE, changed, expected, message, results, say, user
from trl_dt2it.data.rows import check_row
from trl_dt2it.data.sources.formats import llamafactory


# LLaMA-Factory.


def test_llamafactory_in_the_layout_of_sharegpt():
    english, chinese, several_turns = fixture("llamafactory_sharegpt")
    system, images = say("system", "SYSTEM PROMPT"), ["images/1.jpg"]
    assert results(llamafactory, english) == [expected([system, TABLE], "A red cup.", "Two dogs.", images)]
    prompt = [say("system", chinese["system"]), user(IMAGE, "桌子上有什么？")]
    assert results(llamafactory, chinese) == [expected(prompt, "一个红色杯子。", "两只狗。", images)]
    prompt = [system, user(IMAGE, "What room?"), say("assistant", "A kitchen."), user("Any people?")]
    assert results(llamafactory, several_turns) == [expected(prompt, "No.", "Three.", ["images/2.jpg"])]


@pytest.mark.parametrize(
    "change, first",
    [
        ({"system": None}, TABLE),
        ({"system": ""}, TABLE),
        ({"system": ...}, TABLE),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "<image>What is on the table?"},
                ]
            },
            say("system", "Be brief."),
        ),
    ],
)
def test_llamafactory_system_prompts_are_optional_and_may_begin_the_conversation(change, first):
    (row,) = results(llamafactory, changed(fixture("llamafactory_sharegpt")[0], change))
    assert row["prompt"][0] == first and row["prompt"][-1] == TABLE


def test_llamafactory_takes_names_of_openai_strings_and_columns_of_the_entry():
    row = {
        "dialogue": [{"role": "user", "content": "<image>What is on the table?"}],
        "good": "A red cup.",
        "bad": {"role": "assistant", "content": "Two dogs."},
        "pictures": "a.png",
        "id": 3,
    }
    names = {"messages": "dialogue", "chosen": "good", "rejected": "bad", "images": "pictures"}
    wanted = expected(TABLE, "A red cup.", "Two dogs.", ["a.png"], source_id="3")
    assert results(llamafactory, row, columns=names) == [wanted]
    assert results(llamafactory, row) == ["missing_column"]
    with pytest.raises(ValueError, match=r"`columns` has the keys \['picture'\]; it may have messages, "):
        list(llamafactory(row, columns={"picture": "pictures"}))


def test_llamafactory_takes_the_tags_of_the_entry():
    row = {
        "conversations": [
            {"who": "rules", "says": "Be brief."},
            {"who": "customer", "says": "<image>What is on the table?"},
        ],
        "chosen": {"who": "agent", "says": "A red cup."},
        "rejected": {"who": "agent", "says": "Two dogs."},
        "images": ["a.png"],
    }
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "agent"}
    wanted = expected([say("system", "Be brief."), TABLE], "A red cup.", "Two dogs.", ["a.png"])
    assert results(llamafactory, row, tags={**tags, "system_tag": "rules"}) == [wanted]
    assert results(llamafactory, row, tags=tags) == ["not_conversational"]
    called = {**row, "chosen": {"who": "lookup", "says": "{}"}}
    assert results(llamafactory, called, tags={**tags, "system_tag": "rules", "function_tag": "lookup"}) == [
        "not_conversational"
    ]
    with pytest.raises(ValueError, match=r"`tags` has the keys \['role'\]; it may have role_tag, "):
        list(llamafactory(row, tags={"role": "who"}))


def test_llamafactory_in_the_layout_of_alpaca():
    row = {
        "instruction": "Describe.",
        "input": "Be brief.",
        "chosen": "Red.",
        "rejected": "Blue.",
        "images": ["a.png"],
    }
    wanted = expected(user(IMAGE, "Describe.\nBe brief."), "Red.", "Blue.", ["a.png"])
    assert results(llamafactory, row) == [wanted]
    for nothing in ("", None, ...):
        (short,) = results(llamafactory, changed(row, {"input": nothing}))
        assert short["prompt"] == [user(IMAGE, "Describe.")]
    (long,) = results(
        llamafactory, {**row, "system": "s", "history": [["<image>\nWhat?", "A cup."], ["Sure?", "Yes."]]}
    )
    assert long["prompt"] == [
        say("system", "s"),
        user(IMAGE, "What?"),
        say("assistant", "A cup."),
        user("Sure?"),
        say("assistant", "Yes."),
        user("Describe.\nBe brief."),
    ]
    (row, _) = fixture("rlaif_v")
    names = {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "images": "image"}
    answers = (row["chosen"], row["rejected"])
    assert results(llamafactory, row, columns=names) == [expected(TABLE, *answers, [row["image"]])]


ALPACA = {"conversations": ..., "instruction": "q"}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"conversations": ...}, "missing_column"),
        ({"conversations": []}, "not_conversational"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "not_conversational"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "not_conversational"),
        ({"conversations": [{"from": "system", "value": "s"}]}, "not_conversational"),
        ({"chosen": None}, "missing_column"),
        ({"chosen": {"from": "gpt"}}, "missing_column"),
        ({"rejected": {"from": "gpt", "value": 3}}, "not_conversational"),
        ({"rejected": ["a"]}, "not_conversational"),
        ({"images": None}, "placeholder_count"),
        ({"images": ["a", "b"]}, "placeholder_count"),
        ({"images": [None]}, "image_missing"),
        ({"images": [3]}, "image_type"),
        ({"system": ["s"]}, "not_conversational"),
        ({"videos": ["a.mp4"]}, "video_type"),
        ({"audios": ["a.wav"]}, "video_type"),
        ({"audios": "[]"}, "video_type"),
        ({"tools": "[{}]"}, "not_conversational"),
        ({"chosen": {"value": "<image>"}}, "image_in_answer"),
        ({"rejected": {"value": " <image>\n"}}, "image_in_answer"),
        ({**ALPACA, "images": [], "instruction": 3}, "not_conversational"),
        ({**ALPACA, "images": [], "input": 3}, "not_conversational"),
        *(
            ({**ALPACA, "images": [], "history": history}, "not_conversational")
            for history in ("text", [["q"]], [["q", None]], ["ab"], {"a": "b"})
        ),
    ],
)
def test_llamafactory_leaves_out(change, reason):
    assert results(llamafactory, changed(fixture("llamafactory_sharegpt")[0], change)) == [reason]


def test_images_of_answers_are_not_taken_for_images_of_the_prompt():
    (row,) = fixture("omnireward_t2i")
    assert results(llamafactory, row) == ["image_in_answer"]
    assert "load the set as `omnireward_t2i`" in message(llamafactory, row)
    first, _ = fixture("dt2it_t2i_input")
    assert results(llamafactory, first) == ["missing_column"]


# Any table.


def test_rows_of_a_data_set_are_read_like_those_of_a_file():
    """Arrow gives every row every key, and turns tuples into lists."""
    rows = [*fixture("llamafactory_sharegpt"), {**fixture("llamafactory_sharegpt")[0], "system": None, "images": []}]
    rows[-1]["conversations"] = [{"from": "human", "value": "What is on the table?"}]
    from_file = [next(llamafactory(changed(row, {"system": ...} if row["system"] is None else {}))) for row in rows]
    from_arrow = [next(llamafactory(row)) for row in Dataset.from_list(rows)]
    assert from_file == from_arrow
    for row in from_arrow:
        check_row(row)
    assert from_arrow[-1] == expected(user("What is on the table?"), "A red cup.", "Two dogs.")
