"""File formats and tables: every field of the sample rows, every reason why a pair is left out, every option."""

import pytest
from datasets import Dataset

from tests.data.fixtures_as_rows import fixture
from tests.data.source_rows import IMAGE, VIDEO, changed, expected, message, path, results, say, user
from trl_dt2it.data.canonical import content_group
from trl_dt2it.data.schema import check_row
from trl_dt2it.data.sources.columns import columns
from trl_dt2it.data.sources.formats import llamafactory, ms_swift
from trl_dt2it.data.sources.trl_rows import trl


def says(*turns):
    """Messages of strings; the first is by the user."""
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


# LLaMA-Factory.

TABLE = user(IMAGE, "What is on the table?")


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


# ms-swift.


def test_ms_swift():
    (row,) = fixture("ms_swift_rlhf")
    wanted = expected(TABLE, "A red cup.", "Two dogs.", ["images/1.jpg"], strength=0.5)
    assert results(ms_swift, row) == [wanted]
    rejected = {"rejected_response": ..., "rejected_messages": [row["messages"][0], *says("q", "Two dogs.")[1:]]}
    assert results(ms_swift, changed(row, rejected)) == [wanted]
    for same in (None, [], ["images/1.jpg"], "images/1.jpg"):
        assert results(ms_swift, {**row, "rejected_images": same}) == [wanted]
    named = {**wanted, "source_id": "7", "strength": None}
    assert results(ms_swift, {**row, "margin": None, "id": 7}) == results(
        ms_swift, changed(row, {"margin": ..., "id": 7})
    )
    assert results(ms_swift, {**row, "margin": None, "id": 7}) == [named]
    assert results(ms_swift, {**row, "margin": "0.5", "images": "images/1.jpg"}) == [wanted]


def test_ms_swift_with_several_turns_and_a_system_prompt():
    messages = says("<image>What room?", "A kitchen.", "Any people?", "No.")
    row = {"messages": messages, "rejected_response": "Three.", "images": ["a.png"]}
    prompt = [user(IMAGE, "What room?"), say("assistant", "A kitchen."), user("Any people?")]
    assert results(ms_swift, row) == [expected(prompt, "No.", "Three.", ["a.png"])]
    system = say("system", "Be brief.")
    for given in (
        {**row, "system": "Be brief."},
        {**row, "messages": [{"role": "system", "content": "Be brief."}, *messages]},
        {**row, "messages": [{"role": "system", "content": "Be brief."}, *messages], "system": "Be long."},
    ):
        assert results(ms_swift, given) == [expected([system, *prompt], "No.", "Three.", ["a.png"])]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"messages": ...}, "missing_column"),
        ({"messages": says("<image>q")}, "not_conversational"),
        ({"messages": says("q", "a")[1:]}, "not_conversational"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "not_conversational"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *says("q", "a")[1:]]}, "not_conversational"),
        ({"rejected_response": ...}, "missing_column"),
        ({"rejected_response": ["Two dogs."]}, "not_conversational"),
        ({"rejected_messages": says("<image>q", "b")}, "not_conversational"),
        ({"rejected_messages": []}, "not_conversational"),
        ({"rejected_images": ["images/2.jpg"]}, "image_in_answer"),
        ({"rejected_images": ["images/1.jpg"] * 2}, "image_in_answer"),
        ({"images": []}, "placeholder_count"),
        ({"videos": ["a.mp4"]}, "video_type"),
        ({"rejected_videos": ["a.mp4"]}, "video_type"),
        *(({"margin": margin}, "bad_strength") for margin in (-0.5, "much", float("nan"), float("inf"), True, [1])),
    ],
)
def test_ms_swift_leaves_out(change, reason):
    assert results(ms_swift, changed(fixture("ms_swift_rlhf")[0], change)) == [reason]


# TRL.


def test_trl_canonical_rows():
    one, two, several_turns, text_only = fixture("trl_canonical")
    wanted = [
        expected(TABLE, "A red cup.", "Two dogs.", one["images"], strength=1.5),
        expected(
            [
                say("system", "SYSTEM PROMPT"),
                user(
                    "Image 1: ",
                    IMAGE,
                    "\nImage 2: ",
                    IMAGE,
                    "\nWhich of the two images shows the caption better?\nCaption: a red square",
                ),
            ],
            "Image 1 is better than Image 2.",
            "Image 2 is better than Image 1.",
            two["images"],
            strength=0.66,
        ),
        expected(
            [user(IMAGE, "What room?"), say("assistant", "A kitchen."), user("Any people?")],
            "No.",
            "Three.",
            several_turns["images"],
        ),
        expected(user("2+2?"), "4", "5"),
    ]
    names = [("rlaif_v", "rlaif_v-0"), ("hpdv3", "hpdv3-0"), ("llava_human", "llava_human-0"), ("mmpr", "mmpr-2")]
    for given, row, (source, pair_id) in zip(fixture("trl_canonical"), wanted, names, strict=True):
        assert results(trl, given) == [{**row, "source": source, "pair_id": pair_id}]


def test_trl_rows_of_the_hub():
    (row,) = fixture("rlaif_v_formatted")
    assert results(trl, row) == [expected(TABLE, "A red cup.", "Two dogs.", row["images"])]


def test_trl_rows_come_out_as_they_went_in():
    """What the package writes, its own format reads, whatever keys Arrow has added."""
    for given in (*fixture("trl_canonical"), *fixture("rlaif_v_formatted")):
        (row,) = results(trl, given)
        assert results(trl, row) == [row]
        padded = {**row, "image": None, "videos": None, "tools": None, "margin": None, "weight": None}
        padded["prompt"] = [
            {
                **turn,
                "tool_calls": None,
                "name": None,
                "content": [{**block, "image": None} for block in turn["content"]],
            }
            for turn in row["prompt"]
        ]
        assert results(trl, padded) == [row]


ROW = {"prompt": says("q"), "chosen": says("q", "a")[1:], "rejected": says("q", "b")[1:]}


def test_trl_keeps_what_is_known_about_a_row():
    known = {"pair_id": "p", "group_id": "g", "source": "s", "source_id": "i", "strength": 2.0, "weight": 0.5}
    assert results(trl, {**ROW, **known, "margin": 7.0, "other": 1}) == [{**expected(user("q"), "a", "b"), **known}]
    assert results(trl, {**ROW, "pair_id": 3, "source": "", "group_id": None, "weight": 0}) == [
        {**expected(user("q"), "a", "b"), "pair_id": "3", "weight": 0.0}
    ]
    for margin, strength in ((1, 1.0), (0.0, 0.0), ("2.5", 2.5), (None, None)):
        assert results(trl, {**ROW, "margin": margin})[0]["strength"] == strength
        assert results(trl, {**ROW, "margin": margin, "strength": None})[0]["strength"] == strength
        assert results(trl, {**ROW, "margin": -1, "strength": margin or 0})[0]["strength"] == (strength or 0)


def test_trl_rows_of_strings_have_their_images_first():
    images = ["a.png", "b.png"]
    (row,) = results(trl, {**ROW, "images": images})
    assert row == expected(user(IMAGE, IMAGE, "q"), "a", "b", images)
    (row,) = results(
        trl, {**ROW, "prompt": [{"role": "system", "content": "s"}, *says("q", "r", "t")], "image": "a.png"}
    )
    prompt = [say("system", "s"), user(IMAGE, "q"), say("assistant", "r"), user("t")]
    assert row == expected(prompt, "a", "b", ["a.png"])
    mixed = {**ROW, "prompt": [{"role": "system", "content": "s"}, user(IMAGE, "q")], "image": {"path": "a.png"}}
    assert results(trl, mixed) == [expected([say("system", "s"), user(IMAGE, "q")], "a", "b", ["a.png"])]
    # A literal marker is text in TRL, and a place for an image elsewhere.
    marked = {**ROW, "prompt": says("<image>\nq")}
    assert results(trl, {**marked, "images": images[:1]}) == ["placeholder_count"]
    assert results(trl, marked) == [expected(user("<image>\nq"), "a", "b")]


def test_trl_plain_strings_become_messages():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert results(trl, row) == [expected(user("q"), "a", "b")]
    assert results(trl, {**row, "images": ["a.png"]}) == [expected(user(IMAGE, "q"), "a", "b", ["a.png"])]
    assert results(trl, {**row, "prompt": "Is <image> a cat?", "image": "a.png", "margin": 1}) == [
        expected(user("Is ", IMAGE, " a cat?"), "a", "b", ["a.png"], strength=1.0)
    ]
    assert results(trl, {"chosen": "q a", "rejected": "q b"}) == ["missing_column"]


def test_trl_rows_without_a_prompt_begin_with_it():
    implicit = {"prompt": None, "chosen": says("q", "r", "t", "a"), "rejected": says("q", "r", "t", "b")}
    prompt = [user(IMAGE, "q"), say("assistant", "r"), user("t")]
    assert results(trl, {**implicit, "images": ["a.png"]}) == [expected(prompt, "a", "b", ["a.png"])]
    blocks = {
        "chosen": [user(IMAGE, "q"), say("assistant", "a")],
        "rejected": [user(IMAGE, "q"), say("assistant", "b")],
    }
    assert results(trl, {**blocks, "images": ["a.png"]}) == [expected(user(IMAGE, "q"), "a", "b", ["a.png"])]
    # The conversations part early: what is left of each is its answer, as in TRL.
    (row,) = results(trl, {"chosen": says("q", "a", "more?", "a2"), "rejected": says("q", "b", "more?", "b2")})
    assert row["prompt"] == [user("q")]
    assert row["chosen"] == [say("assistant", "a"), user("more?"), say("assistant", "a2")]
    assert row["rejected"] == [say("assistant", "b"), user("more?"), say("assistant", "b2")]


def test_trl_frames_of_videos():
    row = {**ROW, "prompt": [user(VIDEO, "q")]}
    frames = [[path("1.png"), {"bytes": b"2", "path": None}]]
    wanted = expected(user(VIDEO, "q"), "a", "b", videos=frames)
    assert results(trl, {**row, "videos": [["1.png", b"2"]]}) == [wanted]
    assert results(trl, {**row, "videos": [{"frames": ["1.png", b"2"], "fps": 2.0}]}) == [wanted]
    assert results(trl, {**row, "videos": [{"frames": ["1.png"], "fps": 1.0}]}) == ["video_type"]


SYSTEM = [{"role": "system", "content": "s"}]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt": []}, "missing_column"),
        ({"chosen": None}, "missing_column"),
        ({"rejected": ...}, "missing_column"),
        ({"prompt": None}, "missing_column"),
        ({"prompt": None, "chosen": says("q", "a"), "rejected": says("p", "b")}, "missing_column"),
        ({"prompt": None, "chosen": SYSTEM + says("q", "a"), "rejected": SYSTEM + says("p", "b")}, "missing_column"),
        ({"prompt": "q"}, "not_conversational"),
        ({"prompt": 3}, "not_conversational"),
        ({"chosen": "a"}, "not_conversational"),
        ({"prompt": [{"role": "human", "content": "q"}]}, "not_conversational"),
        ({"prompt": [{"role": "user", "content": None}]}, "not_conversational"),
        ({"chosen": says("a")}, "not_conversational"),
        (
            {"chosen": [{"role": "assistant", "content": "a", "tool_calls": [{"type": "function"}]}]},
            "not_conversational",
        ),
        ({"tools": [{"type": "function"}]}, "not_conversational"),
        ({"chat_template_kwargs": {"thinking": True}}, "not_conversational"),
        ({"chosen": [say("assistant", " ")]}, "empty_answer"),
        ({"rejected": ROW["chosen"]}, "equal_answers"),
        ({"chosen": [say("assistant", IMAGE)]}, "image_in_answer"),
        ({"prompt": [user({"type": "image", "image": "a.png"}, "q")]}, "block_type"),
        ({"prompt": [user({"type": "audio"}, "q")]}, "block_type"),
        ({"prompt": [user(IMAGE, "q")]}, "placeholder_count"),
        ({"prompt": [user("q")], "images": ["a.png"]}, "placeholder_count"),
        ({"images": [None]}, "image_missing"),
        ({"images": [{"bytes": None, "path": None}]}, "image_missing"),
        ({"images": "a.png"}, "image_type"),
        ({"images": ["a.png"], "image": "b.png"}, "image_type"),
        ({"images": [3]}, "image_type"),
        ({"videos": 5}, "video_type"),
        ({"videos": ["a.mp4"]}, "video_type"),
        ({"strength": -1}, "bad_strength"),
        ({"strength": "strong"}, "bad_strength"),
        ({"margin": -0.5}, "bad_strength"),
        ({"margin": float("nan")}, "bad_strength"),
        ({"weight": -1}, "bad_weight"),
        ({"weight": True}, "bad_weight"),
    ],
)
def test_trl_leaves_out(change, reason):
    assert results(trl, changed(ROW, change)) == [reason]


# Any table.


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
