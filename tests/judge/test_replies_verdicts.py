"""From replies to verdicts: what can be read is read exactly, and what cannot is never guessed."""

import json

import pytest
from pydantic import BaseModel

from trl_dt2it.judge import DEFAULT_RUBRIC, Criterion, ListwiseVerdict, PairwiseVerdict, PointwiseVerdict, Rubric
from trl_dt2it.judge.replies import Unreadable, parse_verdict, verdict_schema


NAMES = [criterion.name for criterion in DEFAULT_RUBRIC.criteria]


@pytest.mark.parametrize(
    "text",
    [
        '{"scores": [7, 3.5]}',
        '{"analysis": "x", "scores": [7, 3.5], "more": 1}',
        '{"scores": ["7", " 3.5 "]}',
        '```json\n{"scores": [7, 3.5]}\n```',
        'Here are my scores: {"scores": [7, 3.5]} I hope this helps.',
        "Sure!\n\n{'scores': [7, 3.5]}",
        '{"scores": [7, 3.5],}',
        "{scores: [7, 3.5]}",
        '{"scores": [7 3.5]}',
        '{"analysis": "全部正确，“猫”是对的", scores: [7, 3.5]}',
        '{"analysis": "he said "hi" to me", "scores": [7, 3.5]}',
        '{"scores": [7, 3.5]',
        '<think>{"scores": [1, 1]} or {"scores": [2, 2]}?</think>{"scores": [7, 3.5]}',
        '{"note": 1} {"scores": [7, 3.5]}',
        '{"analysis": null, "scores": [7, 3.5]}',
        '\ufeff{"scores": [7, 3.5]}',
    ],
)
def test_a_listwise_verdict_is_read(text):
    if text.endswith("[7, 3.5]"):  # without the last brace it is cut, and nothing says where
        with pytest.raises(Unreadable, match="is cut"):
            parse_verdict(text, ListwiseVerdict, num_scores=2)
    else:
        assert parse_verdict(text, ListwiseVerdict, num_scores=2).scores == [7.0, 3.5]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7 and 3",
        "[7, 3]",
        "null",
        '{"scores": [7]}',
        '{"scores": [7, 3, 5]}',
        '{"scores": []}',
        '{"scores": [11, 3]}',
        '{"scores": [0, 3]}',
        '{"scores": [-7, 3]}',
        '{"scores": [NaN, 3]}',
        '{"scores": [Infinity, 3]}',
        '{"scores": [1e999, 3]}',
        '{"scores": [true, 3]}',
        '{"scores": [null, 3]}',
        '{"scores": ["high", 3]}',
        '{"scores": ["7/10", 3]}',
        '{"scores": ["7-8", 3]}',
        '{"scores": ["", 3]}',
        '{"scores": ["٧", 3]}',
        '{"scores": [[7], 3]}',
        '{"scores": {"a": 7, "b": 3}}',
        '{"scores": "7, 3"}',
        '{"score": [7, 3]}',
        '{"scores": [7, ?, 3]}',
        '{"scores": [７, 7, 3]}',
        '{"scores": [7, 3, ...]}',
        '{"scores": [1_0, 3]}',
        '{"scores": [7 or 8, 3]}',
        '{"scores": [7%, 3]}',
        '{"scores": [1 0, 3]}',
        '{"scores": [7, 1',
        '{"scores": [7, 3], "scores": [1, 2]}',
        '{"scores": [7, 3]} {"scores": [1, 2]}',
        '{"scores": [7, 3]}\n{"scores": [7, 3]}',
        '{"scores": [7, 3]} or rather {"scores": [11, 3]}',
        '{"scores": [10, 10} {"scores": [7, 3]}',
        '{"scores": [7, 3]} or "scores": [1, 2]',
        '{"scores": [7, 3]} or scores: [1, 2]',
        '[{"scores": [7, 3]}, {"scores": [1, 2]}]',
        '{"scores": [' + "9" * 5000 + ", 3]}",
        "{" * 100_000,
        '{"a":' * 5_000,
    ],
    ids=lambda text: text[:40],
)
def test_no_listwise_verdict_is_made_up(text):
    with pytest.raises(Unreadable) as caught:
        parse_verdict(text, ListwiseVerdict, num_scores=2)
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 300


def test_a_pointwise_verdict_has_every_criterion_and_no_other():
    scores = {name: number for number, name in enumerate(NAMES, 1)}
    verdict = parse_verdict(json.dumps({"scores": dict(reversed(scores.items()))}), PointwiseVerdict)
    assert verdict.scores == scores and list(verdict.scores) == NAMES
    for wrong in (
        {**scores, "style": 5},
        dict.fromkeys(NAMES[1:], 5),
        {**scores, NAMES[0]: 10.5},
        {**scores, NAMES[0]: None},
        list(scores.values()),
    ):
        with pytest.raises(Unreadable):
            parse_verdict(json.dumps({"scores": wrong}), PointwiseVerdict)


def test_the_scale_and_the_names_are_those_of_the_rubric():
    rubric = Rubric((Criterion("truth", 1.0, {"en": "It is true."}),), low=0, high=100)
    assert parse_verdict('{"scores": {"truth": 99.5}}', PointwiseVerdict, rubric=rubric).scores == {"truth": 99.5}
    assert parse_verdict('{"scores": [0]}', ListwiseVerdict, num_scores=1, rubric=rubric).scores == [0]
    with pytest.raises(Unreadable, match="101 is not in"):
        parse_verdict('{"scores": {"truth": 101}}', PointwiseVerdict, rubric=rubric)


@pytest.mark.parametrize("better", ["first", "second", "tie"])
def test_a_pairwise_verdict_is_read(better):
    assert parse_verdict(f'{{"better": "{better}"}}', PairwiseVerdict).better == better


@pytest.mark.parametrize("better", ['"First"', '"A"', "1", "true", "null", '"first or second"', '["first"]'])
def test_another_pairwise_verdict_is_none(better):
    with pytest.raises(Unreadable):
        parse_verdict(f'{{"better": {better}}}', PairwiseVerdict)


def test_a_model_of_the_users_is_read_too():
    class Checked(BaseModel):
        is_true: bool
        reason: str = ""

    assert parse_verdict('So: {"is_true": false}', Checked) == Checked(is_true=False)
    with pytest.raises(Unreadable):
        parse_verdict('{"is_true": "yes"}', Checked)


def test_the_schema_says_all_that_is_checked():
    listwise = verdict_schema(ListwiseVerdict, 3)["properties"]["scores"]
    assert (listwise["minItems"], listwise["maxItems"]) == (3, 3)
    assert listwise["items"] == {"type": "number", "minimum": 1, "maximum": 10}
    pointwise = verdict_schema(PointwiseVerdict)["properties"]["scores"]
    assert pointwise["required"] == NAMES and pointwise["additionalProperties"] is False
    assert verdict_schema(PairwiseVerdict)["properties"]["better"]["enum"] == ["first", "second", "tie"]
    for schema in (ListwiseVerdict, PointwiseVerdict, PairwiseVerdict):
        assert list(verdict_schema(schema, 2)["properties"])[0] == "analysis"  # thought before the verdict
