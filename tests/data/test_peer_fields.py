"""Every field that ms-swift and LLaMA-Factory document is read, kept or refused by its name, as the documents say."""

import json
import re
from pathlib import Path

import pytest

from tests.data.peer_fields import ENCODED, KEPT, LLAMAFACTORY, MS_SWIFT, REFUSED
from tests.data.source_rows import message, results
from trl_dt2it.data import load_preferences
from trl_dt2it.data.sources.formats import llamafactory, ms_swift


PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
FORMATS = {"ms_swift": (ms_swift, MS_SWIFT), "llamafactory": (llamafactory, LLAMAFACTORY)}


def cases(kept: bool):
    return [
        pytest.param(name, field, row, wanted, id=f"{name}-{field}-{number}")
        for name, (_, fields) in FORMATS.items()
        for field, rows in fields.items()
        for number, (row, wanted) in enumerate(rows)
        if (wanted == KEPT) == kept
    ]


@pytest.mark.parametrize("name, field, row, wanted", cases(kept=False))
def test_a_field_is_read_or_refused_by_its_name(name, field, row, wanted):
    adapter, _ = FORMATS[name]
    if wanted == REFUSED:
        assert re.search(rf"[`' ]{re.escape(field)}[`'\[a]", message(adapter, row))
    else:
        assert results(adapter, row) == [wanted]


@pytest.mark.parametrize("name", FORMATS)
def test_a_field_without_meaning_for_a_pair_stays_a_column(name, tmp_path):
    rows = [json.loads(json.dumps(case.values[2])) for case in cases(kept=True) if case.values[0] == name]
    names = [case.values[1] for case in cases(kept=True) if case.values[0] == name]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = load_preferences(name, tmp_path / "rows.jsonl").remove_columns("images").to_list()
    for row, field in zip(pairs, names, strict=True):
        assert {other: row[other] for other in names} == {other: "mine" if other == field else None for other in names}


def test_the_tables_of_fields_are_whole_and_their_tests_exist():
    """Each row: the fields, what becomes of them, the test. Refusals are quoted as they are said."""
    here = Path(__file__).read_text(encoding="utf-8")
    for name, (adapter, fields) in FORMATS.items():
        table = re.search(rf"<!-- fields of {name} -->\n(.*?)\n\n", PAGE, re.DOTALL)[1].splitlines()[2:]
        listed = []
        for line in table:
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 3, line
            own = re.findall(r"`([^`]+)`", cells[0])
            listed += own
            test = cells[2].strip("`")
            assert f"def {test}(" in here, line
            assert ("stays_a_column" in test) == any(wanted == KEPT for _, wanted in fields[own[0]]), line
            said = [message(adapter, row) for field in own for row, wanted in fields[field] if wanted == REFUSED]
            for sentence in re.findall(r"“(.*?)”", cells[1]):
                assert sentence in said, (line, said)
            assert ("refused" in cells[1]) == bool(said), line
        assert sorted(listed) == sorted(fields)


def test_base64_is_told_from_paths():
    (row,) = results(ms_swift, MS_SWIFT["images"][0][0] | {"images": ["images/abcd"]})
    assert row["images"] == [{"bytes": None, "path": "images/abcd"}]
    assert len(ENCODED) % 4 == 0


def test_a_block_without_an_image_stands_for_one_of_the_row():
    row, wanted = MS_SWIFT["messages"][0]
    for image in (None, {"bytes": None, "path": None}, {"url": None}):  # as Arrow fills blocks up
        content = [{"type": "image", "image": image, "text": None}, {"type": "text", "text": "What is this?"}]
        assert results(ms_swift, row | {"messages": [{"role": "user", "content": content}, row["messages"][1]]}) == [
            wanted
        ]


@pytest.mark.parametrize(
    "name, field", [("ms_swift", "system"), ("ms_swift", "system_prompt"), ("llamafactory", "system")]
)
def test_an_image_in_a_system_prompt_is_refused_as_in_a_system_message(name, field):
    adapter, fields = FORMATS[name]
    row = fields["images"][0][0] | {field: "As in <image>."}
    assert "message of the prompt that is not the user's has the placeholder `<image>`" in message(adapter, row)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("ms_swift", {"messages": "What is this?"}, "`messages` is a string that holds no list of messages"),
        (
            "ms_swift",
            {"rejected_response": {"text": "A puppy."}},
            "`rejected_response` is a message without content or",
        ),
        ("llamafactory", {"chosen": {"from": "gpt"}}, "`chosen` is a message without value or content; give its text"),
    ],
)
def test_a_message_without_text_is_told_from_none(name, change, said):
    adapter, fields = FORMATS[name]
    assert said in message(adapter, fields["images"][0][0] | change)
