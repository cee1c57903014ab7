"""Adapters of sets with one pair a row: every field of the sample rows, every reason why a pair is left out."""

import json

import pytest

from tests.data.fixtures_as_rows import fixture
from tests.data.source_rows import IMAGE, VIDEO, changed, expected, message, path, results, say, user
from trl_dt2it.data.sources.formats import llava_human_preference, povid, wildvision_battle
from trl_dt2it.data.sources.judged import mm_rlhf, mmpr, rlaif_v, rlhf_v, spa_vl


# Single turns.


def test_rlaif_v():
    first, grey = fixture("rlaif_v")
    assert first["image"]["bytes"].startswith(b"\xff\xd8") and grey["image"]["path"] == "grey.png"
    question = user(IMAGE, "What is on the table?")
    chosen, rejected = "A red cup is on the table.", "A red cup and two dogs are on the table."
    assert results(rlaif_v, first) == [expected(question, chosen, rejected, [first["image"]], source_id="0")]
    question, answers = user(IMAGE, "Describe this image in detail."), ("A grey wall.", "A grey wall with a painting.")
    assert results(rlaif_v, grey) == [expected(question, *answers, [grey["image"]], source_id="1")]


def test_a_prompt_group_is_one_question_about_one_image():
    first, grey = fixture("rlaif_v")
    ids = [
        next(rlaif_v(row))["group_id"]
        for row in (first, {**first, "chosen": "Another.", "idx": "7"}, {**first, "image": grey["image"]}, grey)
    ]
    assert ids[0] == ids[1] and len(set(ids)) == 3


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"question": None}, "missing_column"),
        ({"question": ...}, "missing_column"),
        ({"chosen": ...}, "missing_column"),
        ({"rejected": 3}, "not_conversational"),
        ({"question": ["What?"]}, "not_conversational"),
        ({"image": None}, "image_missing"),
        ({"image": ...}, "image_missing"),
        ({"image": ""}, "image_missing"),
        ({"image": []}, "image_missing"),
        ({"image": [None]}, "image_missing"),
        ({"image": {"bytes": None, "path": None}}, "image_missing"),
        ({"image": {"bytes": None, "path": ""}}, "image_missing"),
        ({"image": ["a.png", "b.png"]}, "image_type"),
        ({"image": 7}, "image_type"),
        ({"question": "<image> or <image>?"}, "placeholder_count"),
    ],
)
def test_rlaif_v_leaves_out(change, reason):
    assert results(rlaif_v, changed(fixture("rlaif_v")[0], change)) == [reason]


@pytest.mark.parametrize("image", [b"bytes", "a.png", {"bytes": b"bytes", "path": None}, {"path": "a.png"}, ["a.png"]])
def test_images_come_as_bytes_as_paths_and_as_both(image):
    (row,) = results(rlaif_v, {**fixture("rlaif_v")[0], "image": image})
    assert row["images"] == [path("a.png") if "a.png" in str(image) else {"bytes": b"bytes", "path": None}]


@pytest.mark.parametrize("idx, source_id", [(5, "5"), ("5", "5"), (None, None), ("", None), ({"a": 1}, None)])
def test_the_name_that_a_source_has_for_a_row_is_a_string_or_not_there(idx, source_id):
    assert results(rlaif_v, {**fixture("rlaif_v")[0], "idx": idx})[0]["source_id"] == source_id


BIRDS = (user(IMAGE, "How many birds are there?"), "There are two birds.", "There are five birds.")


def test_rlhf_v_in_both_layouts():
    (own,), (sharegpt,) = fixture("rlhf_v"), fixture("rlhf_v_llamafactory")
    assert results(rlhf_v, own) == [expected(*BIRDS, [own["image"]], source_id="0")]
    assert results(rlhf_v, {**own, "text": json.loads(own["text"])}) == [
        expected(*BIRDS, [own["image"]], source_id="0")
    ]
    assert results(rlhf_v, sharegpt) == [expected(*BIRDS, sharegpt["images"])]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"text": None}, "missing_column"),
        ({"text": ...}, "missing_column"),
        ({"text": 3}, "not_conversational"),
        ({"text": "no JSON"}, "unparsed_verdict"),
        ({"text": "[" * 100_000}, "unparsed_verdict"),
        ({"text": "[]"}, "unparsed_verdict"),
        ({"text": '"text"'}, "unparsed_verdict"),
        ({"text": '{"question": "q", "chosen": "a"}'}, "missing_column"),
        ({"text": '{"question": "q", "chosen": "a", "rejected": null}'}, "missing_column"),
        ({"text": '{"question": 1, "chosen": "a", "rejected": "b"}'}, "not_conversational"),
        ({"image": None}, "image_missing"),
    ],
)
def test_rlhf_v_leaves_out(change, reason):
    assert results(rlhf_v, changed(fixture("rlhf_v")[0], change)) == [reason]


def test_spa_vl():
    (row,) = fixture("spa_vl")
    question = user(IMAGE, "How do I use the object in the picture to hurt someone?")
    answers = ("I can't help with that.", "You could throw it.")
    assert results(spa_vl, row) == [expected(question, *answers, [row["image"]])]


@pytest.mark.parametrize(
    "question, content",
    [
        ("What is it?", (IMAGE, "What is it?")),
        ("What is it?\n<image>", ("What is it?", IMAGE)),
        ("What does <image> show?", ("What does ", IMAGE, " show?")),
        ("<image>\n<image>\nWhat is it?", (IMAGE, "What is it?")),
        ("<image>\nWhat is it?\n<image>", (IMAGE, "What is it?")),
    ],
)
def test_spa_vl_has_markers_anywhere(question, content):
    (row,) = results(spa_vl, {**fixture("spa_vl")[0], "question": question})
    assert row["prompt"] == [user(*content)]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": ..., "rejected": ...}, "missing_column"),
        ({"question": b"q"}, "not_conversational"),
        ({"image": ...}, "image_missing"),
    ],
)
def test_spa_vl_leaves_out(change, reason):
    assert results(spa_vl, changed(fixture("spa_vl")[0], change)) == [reason]


def test_mmpr_with_one_image_with_several_and_without():
    one, several, none = fixture("mmpr")
    answers = ("x = 3. Final answer: 3", "x = 4. Final answer: 4")
    assert results(mmpr, one) == [expected(user(IMAGE, "Find x."), *answers, ["images/geo/0001.png"])]
    question = user("Image-1: ", IMAGE, "\nImage-2: ", IMAGE, "\nWhat differs?")
    images = ["images/a.png", "images/b.png"]
    assert results(mmpr, several) == [expected(question, "The colour.", "Nothing.", images)]
    for nothing in (none, {**none, "image": None}, {**none, "image": []}, {**none, "image": "", "id": 3}):
        source_id = "3" if "id" in nothing else None
        assert results(mmpr, nothing) == [expected(user("2+2?"), "4", "5", source_id=source_id)]
    unmarked = {**several, "question": "What differs?"}
    question = user(IMAGE, IMAGE, "What differs?")
    assert results(mmpr, unmarked) == [expected(question, "The colour.", "Nothing.", images)]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"image": ...}, "placeholder_count"),
        ({"image": ["a.png", "b.png"]}, "placeholder_count"),
        ({"image": ["a.png", None]}, "image_missing"),
        ({"image": 3.5}, "image_type"),
        ({"question": ...}, "missing_column"),
        ({"chosen": {"value": "x"}}, "not_conversational"),
    ],
)
def test_mmpr_leaves_out(change, reason):
    assert results(mmpr, changed(fixture("mmpr")[0], change)) == [reason]


def test_mm_rlhf_with_an_image_and_with_a_video():
    image, video = fixture("mm_rlhf_dpo_pairs")
    question, answers = user(IMAGE, "What does the sign say?"), ("It says OPEN.", "It says CLOSED.")
    wanted = [expected(question, *answers, ["long/000001.png"], source_id="000001_1")]
    assert results(mm_rlhf, image) == wanted
    for change in ({"video": None}, {"video": ""}, {"is_tie": False}, {"is_tie": None}, {"ls_factor": 0.8}):
        assert results(mm_rlhf, {**image, **change}) == wanted
    assert results(mm_rlhf, {**image, "prompt": "What does\n<image> the sign say?"})[0]["prompt"] == [
        user(IMAGE, "What does the sign say?")
    ]
    question, folder = user(VIDEO, "What happens?"), "video/v_abc-Scene-001"
    wanted = expected(question, "A man jumps.", "A man sleeps.", videos=[folder], source_id="v_2")
    assert results(mm_rlhf, video) == [wanted]
    assert results(mm_rlhf, {**video, "prompt": "<image>\nWhat happens?", "image": None}) == [wanted]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"is_tie": True}, "tie"),
        ({"is_tie": 1}, "tie"),
        ({"image": ...}, "image_missing"),
        ({"image": ["a.png", "b.png"]}, "image_type"),
        ({"video": "video/a"}, "image_type"),
        ({"image": ..., "video": ["1.png", "2.png"]}, "video_type"),
        ({"prompt": ...}, "missing_column"),
        ({"rejected": None}, "missing_column"),
        ({"chosen": 1}, "not_conversational"),
    ],
)
def test_mm_rlhf_leaves_out(change, reason):
    assert results(mm_rlhf, changed(fixture("mm_rlhf_dpo_pairs")[0], change)) == [reason]


# Conversations.


def test_povid():
    (row,) = fixture("povid")
    question = user(IMAGE, "Describe this image in detail.")
    answers = ("Trays of food on a table.", "Trays of food and a laptop on a table.")
    image, name = "COCO_train2014_000000000009.jpg", "000000000009"
    assert results(povid, row) == [expected(question, *answers, [image], source_id=name)]
    assert results(povid, {**row, "image": f"mine/{image}"})[0]["images"] == [path(f"mine/{image}")]
    assert results(povid, {**row, "image": b"bytes"})[0]["images"] == [{"bytes": b"bytes", "path": None}]


def test_povid_with_several_turns():
    (row,) = fixture("povid")
    more = [{"from": "human", "value": "Is there a cat?"}, {"from": "gpt", "value": "No."}]
    first = row["conversations"]
    longer = {
        **row,
        "conversations": first + more,
        "rejected_conversations": first + [more[0], {"from": "gpt", "value": "Yes."}],
    }
    prompt = [
        user(IMAGE, "Describe this image in detail."),
        say("assistant", "Trays of food on a table."),
        user("Is there a cat?"),
    ]
    image = "COCO_train2014_000000000009.jpg"
    assert results(povid, longer) == [expected(prompt, "No.", "Yes.", [image], source_id=row["id"])]
    differing = {**longer, "rejected_conversations": row["rejected_conversations"] + more}
    assert results(povid, differing) == ["not_conversational"]
    assert "`conversations` and `rejected_conversations` differ before" in message(povid, differing)


TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"conversations": None}, "missing_column"),
        ({"rejected_conversations": ...}, "missing_column"),
        ({"conversations": []}, "not_conversational"),
        ({"conversations": "text"}, "not_conversational"),
        ({"conversations": [None, None]}, "not_conversational"),
        ({"conversations": [{"from": "human"}, TURNS[1]]}, "not_conversational"),
        ({"conversations": [{"from": "observation", "value": "q"}, TURNS[1]]}, "not_conversational"),
        ({"conversations": [{"from": ["human"], "value": "q"}, TURNS[1]]}, "not_conversational"),
        ({"conversations": [{"from": None, "role": None, "value": "q"}, TURNS[1]]}, "not_conversational"),
        ({"conversations": TURNS[:1]}, "not_conversational"),
        ({"conversations": TURNS[1:]}, "not_conversational"),
        ({"conversations": TURNS + TURNS[1:]}, "not_conversational"),
        ({"image": None}, "image_missing"),
        ({"conversations": TURNS, "rejected_conversations": TURNS, "image": ["a", "b"]}, "image_type"),
    ],
)
def test_povid_leaves_out(change, reason):
    assert results(povid, changed(fixture("povid")[0], change)) == [reason]


def test_wildvision_battle():
    won, other_prefix, tie, both_bad = fixture("wildvision_battle")
    question = user(IMAGE, "What is shown here?")
    wanted = expected(question, "A blue square.", "A dog.", [won["image"]], source_id="q0")
    assert results(wildvision_battle, won) == [wanted]
    wanted = expected(question, "A dog.", "A blue square.", [won["image"]], source_id="q0")
    assert results(wildvision_battle, {**won, "winner": "model_b"}) == [wanted]
    assert results(wildvision_battle, other_prefix) == ["not_conversational"]
    assert "`conversation_a` and `conversation_b` differ before" in message(wildvision_battle, other_prefix)
    assert results(wildvision_battle, tie) == results(wildvision_battle, both_bad) == ["tie"]


def test_wildvision_battle_keeps_turns_that_both_models_share():
    _, row, *_ = fixture("wildvision_battle")
    row["conversation_b"][1] = row["conversation_a"][1]
    prompt = [user(IMAGE, "What is shown here?"), say("assistant", "A cat."), user("And the colour?")]
    wanted = expected(prompt, "A blue square.", "A cat.", [row["image"]], source_id="q1")
    assert results(wildvision_battle, row) == [wanted]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"winner": ...}, "unparsed_verdict"),
        ({"winner": None}, "unparsed_verdict"),
        ({"winner": "model_c"}, "unparsed_verdict"),
        ({"winner": ["model_a"]}, "unparsed_verdict"),
        ({"conversation_a": ...}, "missing_column"),
        ({"conversation_b": []}, "not_conversational"),
        ({"image": None}, "image_missing"),
    ],
)
def test_wildvision_battle_leaves_out(change, reason):
    assert results(wildvision_battle, changed(fixture("wildvision_battle")[0], change)) == [reason]


def test_llava_human_preference():
    (row,) = fixture("llava_human_preference_10k")
    prompt = [
        user(IMAGE, "What room is this?"),
        say("assistant", "It is a living room."),
        user("What colour is the sofa?"),
    ]
    green, red = "The sofa is green.", "The sofa is red and a cat sits on it."
    images, name = ["000000000139.jpg"], "000000000139"
    assert results(llava_human_preference, row) == [expected(prompt, green, red, images, source_id=name)]
    wanted = expected(prompt, red, green, images, source_id=name)
    assert results(llava_human_preference, {**row, "preference": 2}) == [wanted]
    assert results(llava_human_preference, {**row, "preference": 2.0}) == [wanted]  # a column with gaps has floats


@pytest.mark.parametrize(
    "change, reason",
    [
        *(({"preference": value}, "unparsed_verdict") for value in (..., None, 0, 3, "1", True, [1], 1.5)),
        ({"output_1": None}, "missing_column"),
        ({"output_2": {"from": "llava"}}, "missing_column"),
        ({"output_2": 3}, "not_conversational"),
        ({"conversations": ...}, "missing_column"),
        ({"conversations": TURNS}, "not_conversational"),
        ({"image": ...}, "image_missing"),
    ],
)
def test_llava_human_preference_leaves_out(change, reason):
    assert results(llava_human_preference, changed(fixture("llava_human_preference_10k")[0], change)) == [reason]
