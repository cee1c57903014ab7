"""Rows of TRL: messages, strings and videos, with and without a prompt, and every reason why a pair is left out."""

import pytest
from datasets import Dataset

from tests.data.fixtures_as_rows import fixture
from tests.data.source_rows import IMAGE, TABLE, VIDEO, changed, expected, message, path, results, say, says, user
from trl_dt2it.data.sources.trl_rows import trl


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

NO_TOOLS = (None, [], [None], [{"type": None, "function": {"name": None}}], "", "[]", "null")


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


def test_trl_fields_of_nothing_but_nulls_are_absent():
    """As Arrow makes them of the keys that only other rows have."""
    absent = ({"thinking": None}, {"a": {"b": None}}, {"a": []}, {}, None)
    for change in (*({"chat_template_kwargs": value} for value in absent), *({"tools": v} for v in NO_TOOLS)):
        assert results(trl, {**ROW, **change}) == [expected(user("q"), "a", "b")], change
    stored = Dataset.from_list([{**ROW, "chat_template_kwargs": {"a": 1}}, {**ROW, "chat_template_kwargs": {}}])
    assert stored[1]["chat_template_kwargs"] == {"a": None}
    assert [results(trl, row) for row in stored] == [["not_conversational"], [expected(user("q"), "a", "b")]]


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


def test_trl_a_string_prompt_beside_answers_of_messages():
    # `prompt` a string and each answer a message, as in oumi's vision-language DPO rows.
    row = {"prompt": "q", "chosen": says("q", "a")[1:], "rejected": says("q", "b")[1:]}
    assert results(trl, row) == [expected(user("q"), "a", "b")]
    assert results(trl, {**row, "images": ["a.png"]}) == [expected(user(IMAGE, "q"), "a", "b", ["a.png"])]
    assert results(trl, {**row, "prompt": "Is <image> a cat?", "images": ["a.png"]}) == [
        expected(user("Is ", IMAGE, " a cat?"), "a", "b", ["a.png"])
    ]
    assert results(trl, {**row, "prompt": "<image> or <image>?", "images": ["a.png"]}) == ["placeholder_count"]
    # Whole conversations beside their own first question, as in UltraFeedback: it is asked once.
    whole = {"prompt": "q", "chosen": says("q", "a"), "rejected": says("q", "b")}
    assert results(trl, whole) == [expected(user("q"), "a", "b")]
    assert results(trl, {**whole, "images": ["a.png"]}) == [expected(user(IMAGE, "q"), "a", "b", ["a.png"])]
    later = {"prompt": " t\n", "chosen": says("q", "r", "t", "a"), "rejected": says("q", "r", "t", "b")}
    assert results(trl, later) == [expected([user("q"), say("assistant", "r"), user("t")], "a", "b")]
    system = {side: [{"role": "system", "content": "s"}, *whole[side]] for side in ("chosen", "rejected")}
    assert results(trl, {**whole, **system}) == [expected([say("system", "s"), user("q")], "a", "b")]
    assert results(trl, {**whole, "prompt": "another"}) == ["not_conversational"]
    assert "`prompt`" in message(trl, {**whole, "prompt": "another"})
    # What is no message is named, and not the prompt that is right.
    lists = {**row, "chosen": ["a", "a, at length"], "rejected": ["b", "b, at length"]}
    assert results(trl, lists) == ["not_conversational"] and "`chosen` message 0" in message(trl, lists)
    assert "`rejected`" in message(trl, {**row, "rejected": "b"})
    assert "`chosen`" in message(trl, {**row, "chosen": "a"})
    assert results(trl, {**row, "rejected": None}) == ["missing_column"]
    assert results(trl, {"prompt": "q"}) == ["missing_column"]


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
        ({"tools": '[{"type": "function"}]'}, "not_conversational"),
        *(({"chat_template_kwargs": {"thinking": value}}, "not_conversational") for value in (True, False, "", 0)),
        *(({field: "null"}, "video_type") for field in ("video", "audio", "audios")),
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
        # Numbers, but beyond those in which the loss is computed.
        ({"strength": 1e300}, "bad_strength"),
        ({"margin": "1e300"}, "bad_strength"),
        ({"weight": 1e200}, "bad_weight"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "strength": 1e300}, "bad_strength"),
    ],
)
def test_trl_leaves_out(change, reason):
    assert results(trl, changed(ROW, change)) == [reason]


@pytest.mark.parametrize(
    "change, advice",
    [
        ({"video": "a.mp4"}, "pass frames in `videos`."),
        ({"tools": [{"type": "function"}]}, "drop the field."),
        ({"chat_template_kwargs": {"thinking": True}}, "drop the field."),
    ],
)
def test_trl_says_what_to_do_about_a_field_that_is_not_read(change, advice):
    assert message(trl, changed(ROW, change)).endswith(advice)
