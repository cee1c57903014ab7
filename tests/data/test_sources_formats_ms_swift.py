"""Rows of ms-swift: every field, several turns, every reason why a pair is left out."""

import pytest

from tests.data.fixtures_as_rows import fixture
from tests.data.source_rows import IMAGE, TABLE, changed, expected, results, say, says, user
from trl_dt2it.data.sources.formats import ms_swift


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
        ({"messages": [{"role": "user", "content": [{"type": "doc"}]}, *says("q", "a")[1:]]}, "block_type"),
        ({"messages": [{"role": "user", "content": 3}, *says("q", "a")[1:]]}, "not_conversational"),
        ({"rejected_response": ...}, "missing_column"),
        ({"rejected_response": ["Two dogs."]}, "not_conversational"),
        ({"rejected_messages": says("<image>q", "b")}, "not_conversational"),
        ({"rejected_messages": []}, "not_conversational"),
        ({"rejected_images": ["images/2.jpg"]}, "image_in_answer"),
        ({"rejected_images": ["images/1.jpg"] * 2}, "image_in_answer"),
        ({"images": []}, "placeholder_count"),
        ({"videos": ["a.mp4"]}, "video_type"),
        ({"rejected_videos": ["a.mp4"]}, "video_type"),
        ({"videos": "null"}, "video_type"),
        *(({"margin": margin}, "bad_strength") for margin in (-0.5, "much", float("nan"), float("inf"), True, [1])),
    ],
)
def test_ms_swift_leaves_out(change, reason):
    assert results(ms_swift, changed(fixture("ms_swift_rlhf")[0], change)) == [reason]
