"""Pairs by the gap of rewards, worked out by hand, and records that a killed run goes on from."""

import json

import pytest
from datasets import Dataset

from trl_dt2it.data import ImageOptions, check_row, row_images
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.messages import read_prompt
from trl_dt2it.scoring import answers as answers_module
from trl_dt2it.scoring.answers import Answering, Sampling, ScoredAnswers, answer_and_score, build_gap_pairs, gap_pairs
from trl_dt2it.scoring.shards import make_records

from ..rows import make_dataset


@pytest.mark.parametrize(
    ("rewards", "min_gap", "max_pairs", "expected"),
    [
        ([0.0, 3.0, 1.0, 2.0], 0.0, None, [(1, 0), (3, 2)]),
        ([0.0, 3.0, 1.0, 2.0], 1.5, None, [(1, 0)]),
        ([0.0, 3.0, 1.0, 2.0], 0.0, 1, [(1, 0)]),
        ([0.0, 3.0, 1.0, 2.0], 3.5, None, []),
        ([5.0, 5.0, 4.0], 0.0, None, [(0, 2)]),  # the one in the middle has no partner
        ([1.0, 1.0], 0.0, None, []),
        ([2.0], 0.0, None, []),
        ([], 0.0, None, []),
    ],
)
def test_which_answers_make_pairs(rewards, min_gap, max_pairs, expected):
    assert gap_pairs(rewards, min_gap=min_gap, max_pairs=max_pairs) == expected


def scored(rows: Dataset, answers: list[list[str]], rewards: list[list[float | None]]) -> list[ScoredAnswers]:
    prompts = [read_prompt(row, index, source="s") for index, row in enumerate(leave_images_encoded(rows))]
    finished = [[text != "cut" for text in texts] for texts in answers]
    return [ScoredAnswers(*one) for one in zip(prompts, answers, finished, rewards, strict=True)]


def test_pairs_have_the_images_of_their_prompts_and_what_is_left_out_is_counted():
    rows = make_dataset(3, num_images=(1, 2, 0)).select_columns(["prompt", "images"])
    answers = [["good", "bad", " bad\n", "", "cut"], ["a", "b", "<|x|>"], ["only", "only"]]
    found = scored(rows, answers, [[2.0, -1.0, -1.0, 9.0, 5.0], [0.5, 0.25, None], [1.0, 1.0]])
    options = {"pairs_per_prompt": 1, "source": "s", "image_options": ImageOptions()}
    pairs, report = build_gap_pairs(rows, found, min_gap=0.5, **options)
    (pair,) = leave_images_encoded(pairs)
    check_row(pair)
    assert pair["chosen"][0]["content"][0]["text"] == "good" and pair["rejected"][0]["content"][0]["text"] == "bad"
    assert (pair["chosen_reward"], pair["rejected_reward"], pair["strength"]) == (2.0, -1.0, 3.0)
    assert pair["pair_id"] == "s-000000-0-1" and pair["group_id"] == found[0].prompt.group_id
    assert row_images(pair) == leave_images_encoded(rows)[0]["images"]
    assert (report.prompts, report.answers, report.pairs, report.prompts_without_pair) == (3, 10, 1, 2)
    assert report.left_out == {"equal": 2, "empty": 1, "unfinished": 1, "unscored": 1} and report.gaps == [3.0]
    pairs, report = build_gap_pairs(rows, found, min_gap=0.0, drop_unfinished=False, **options)
    assert [row["chosen"][0]["content"][0]["text"] for row in pairs] == ["cut", "a"]
    assert [len(row["images"]) for row in pairs] == [1, 2] and report.left_out == {
        "equal": 2,
        "empty": 1,
        "unscored": 1,
    }
    nothing, _ = build_gap_pairs(rows, found, min_gap=99.0, **options)
    assert len(nothing) == 0 and nothing.column_names == pairs.column_names


def test_a_killed_run_makes_only_what_is_missing(tmp_path):
    path, keys, calls = tmp_path / "out" / "records.jsonl", [f"key{i}" for i in range(7)], []

    def make(batch: list[int], until: int = 7) -> list[dict]:
        if batch[0] >= until:
            raise KeyboardInterrupt
        calls.append(batch)
        return [{"value": row**2} for row in batch]

    def run(until: int = 7, keys=keys):
        return make_records(path, keys, lambda batch: make(batch, until), batch_size=2, desc="")

    with pytest.raises(KeyboardInterrupt):
        run(until=4)
    part = tmp_path / "out" / "records.jsonl.0"
    assert not path.exists() and len(part.read_text().splitlines()) == 4
    part.write_bytes(part.read_bytes()[:-7])  # the last line is torn
    expected = [{"row": row, "key": f"key{row}", "value": row**2} for row in range(7)]
    assert run() == expected
    assert calls == [[0, 1], [2, 3], [2, 3], [4, 5], [6]]  # whole batches, as without a kill
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected and not part.exists()
    assert run() == expected and len(calls) == 5
    for others in (keys[:-1], ["other", *keys[1:]]):
        with pytest.raises(ValueError, match="holds a record of row . with other content or settings"):
            run(keys=others)


@pytest.mark.parametrize("columns", [{}, {"answers": [["Yes."]]}])
def test_memory_is_released_after_either_model_even_if_it_fails(columns, tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr(answers_module, "release_memory", lambda: released.append(True))
    missing = str(tmp_path / "missing")
    how = Answering(missing, missing, Sampling(), 4, ImageOptions(), {}, {})
    with pytest.raises((OSError, ValueError), match="missing"):
        answer_and_score(how, Dataset.from_dict({"prompt": ["Is it?"], **columns}), tmp_path, source="a")
    assert released == [True]
