"""Ranked prompts: the pairs that scores and ranks make, without a copy of an image."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List

from tests.data.fixtures_as_rows import fixture
from tests.logs import messages_of
from tests.rows import make_rows
from tests.trainers import losses, trainer_for
from trl_dt2it.data import RowError, load_preferences, to_pairs
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.mixing import with_columns
from trl_dt2it.data.ranked import rank_pairs


def prompts(scores: list[list], *, column: str = "scores", plain: bool = True, **columns) -> Dataset:
    """Rows of one image each, whose answers name their place."""
    rows = make_rows(len(scores), num_images=(1,))
    made = []
    for number, (row, of_row) in enumerate(zip(rows, scores, strict=True)):
        texts = [f"answer {place} of {number}" for place in range(len(of_row))]
        answers = texts if plain else [[{"role": "assistant", "content": text}] for text in texts]
        row = {"prompt": row["prompt"], "images": row["images"], "completions": answers, column: of_row}
        made.append({**row, **{name: values[number] for name, values in columns.items()}})
    features = Dataset.from_list([{k: v for k, v in row.items() if k != "images"} for row in made]).features
    return Dataset.from_list(made, features=Features({**features, "images": List(Image())}))


def texts(pairs) -> list[tuple[str, str, float]]:
    return [
        (row["chosen"][0]["content"][0]["text"], row["rejected"][0]["content"][0]["text"], row["strength"])
        for row in pairs
    ]


def test_pairs_by_hand():
    order = [2.0, None, 5.0, 2.0, 1.0]
    every = [(2, 0, 3.0), (2, 3, 3.0), (2, 4, 4.0), (0, 4, 1.0), (3, 4, 1.0)]
    assert rank_pairs(order, "all", 0.0, False) == every
    assert sorted(rank_pairs(order, "all", 0.0, True)) == sorted([*every, (0, 3, 0.0)])
    assert rank_pairs(order, "all", 2.0, False) == every[:3]
    assert rank_pairs(order, "adjacent", 0.0, False) == [every[0], every[1], every[3], every[4]]
    assert rank_pairs(order, "best_vs_rest", 0.0, False) == every[:3]
    assert rank_pairs([1.0, 1.0, 0.0], "best_vs_rest", 0.0, True) == [(0, 1, 0.0), (0, 2, 1.0), (1, 2, 1.0)]
    assert rank_pairs([1.0, 1.0], "all", 0.0, False) == rank_pairs([None, 1.0], "all", 0.0, True) == []


@pytest.mark.parametrize("plain", [True, False])
def test_rows_become_pairs_next_to_each_other(plain, caplog):
    ranked = prompts([[1.0, 3.0, 2.0], [0.5, 0.5], [4.0, 1.0]], plain=plain, source=["a", "b", "c"])
    with messages_of("trl_dt2it.data.ranked", caplog):
        pairs = to_pairs(ranked)
    assert "4 pairs of 3 ranked prompts; left out: 1 prompts without a pair" in caplog.text
    assert pairs["pair_id"][:] == ["row 0:1>2", "row 0:1>0", "row 0:2>0", "row 2:0>1"]
    assert pairs["strength"][:] == [1.0, 2.0, 1.0, 3.0] and pairs["source"][:] == ["a", "a", "a", "c"]
    assert pairs["group_id"][:] == ["row 0"] * 3 + ["row 2"]
    assert not {"completions", "scores"} & set(pairs.column_names)
    message = pairs[0]["chosen"][0]
    assert message["role"] == "assistant"
    text = message["content"][0]["text"] if plain else message["content"]
    assert text == "answer 1 of 0"
    assert pairs[3]["images"][0].tobytes() == ranked[2]["images"][0].tobytes()
    assert pairs[3]["prompt"] == ranked[2]["prompt"]


def test_ranks_are_better_the_lower():
    by_rank = to_pairs(prompts([[3, 1, 2, 2]], column="ranks"))
    by_score = to_pairs(prompts([[1.0, 3.0, 2.0, 2.0]]))
    assert texts(by_rank) == texts(by_score) and len(by_rank) == 5


def test_names_of_rows_are_kept():
    pairs = to_pairs(prompts([[1.0, 0.0]] * 2, pair_id=["x", "y"], group_id=["g", None]))
    assert pairs["pair_id"][:] == ["x:0>1", "y:0>1"] and pairs["group_id"][:] == ["g", "y"]


def test_images_are_not_copied():
    large = [[{"bytes": bytes(100_000), "path": None}]] * 40  # nothing is decoded
    ranked = with_columns(prompts([list(map(float, range(8)))] * 40), {"images": large})
    before = pa.total_allocated_bytes()
    pairs = to_pairs(ranked)
    used = pa.total_allocated_bytes() - before
    assert len(pairs) == 40 * 28 and used < 10 * 100_000  # where 28 copies would take 112 MB


def test_a_stream_makes_the_same_pairs():
    ranked = prompts([[1.0, 3.0, 2.0], [0.5, 0.5], [4.0, 1.0]])
    whole = to_pairs(ranked, "adjacent", ties=True)
    stream = list(to_pairs(ranked.to_iterable_dataset(), "adjacent", ties=True))
    assert [row["pair_id"] for row in stream] == whole["pair_id"][:]
    assert texts(stream) == texts(whole)


def test_equal_answers_make_no_pair():
    ranked = prompts([[1.0, 0.0, 2.0]])
    same = ranked.map(lambda row: {"completions": ["one", "one", "two"]})
    assert len(to_pairs(same)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [[1.0]]}, "row 0: it has 2 `completions` and 1 `scores` or `ranks`; give one for each"),
        ({"scores": [[1.0, float("nan")]]}, "row 0: its scores are [1.0, nan]; give finite numbers"),
        ({"ranks": [[1, 2]]}, "row 0: it has both `scores` and `ranks`, or neither"),
    ],
)
def test_rows_that_are_not_ranked_are_named(change, message):
    ranked = prompts([[1.0, 0.0]])
    for name, values in change.items():
        ranked = ranked.remove_columns([name] if name in ranked.column_names else []).add_column(name, values)
    with pytest.raises(RowError, match=re.escape(message)):
        to_pairs(ranked)


def test_misuse_is_refused():
    ranked = prompts([[1.0, 1.0]])
    with pytest.raises(ValueError, match="No pair can be made of 1 ranked prompts \\(1 prompts without a pair\\)"):
        to_pairs(ranked)
    with pytest.raises(ValueError, match="has no column `scores` or `ranks`"):
        to_pairs(ranked.remove_columns("scores"))
    with pytest.raises(ValueError, match="`how` is 'some'"):
        to_pairs(ranked, "some")
    with pytest.raises(ValueError, match="`min_gap` is -1"):
        to_pairs(ranked, min_gap=-1)


def test_the_trainer_takes_ranked_prompts_as_their_pairs(tmp_path):
    rng = np.random.default_rng(0)
    ranked = prompts([rng.permutation(4).astype(float).tolist() for _ in range(3)])
    args = {"train_sampling_strategy": "sequential", "max_steps": 2, "reward_statistics_pairs": 0}
    own = trainer_for("qwen3_vl", tmp_path / "own", ranked, args, eval_dataset=ranked)
    assert len(own.train_dataset) == 18 and own.loss_type == "strength_margin"
    own.train()
    made = trainer_for("qwen3_vl", tmp_path / "made", to_pairs(ranked), args)
    made.train()
    assert losses(own) == losses(made)
    assert own.evaluate()["eval_loss"] > 0


def saved(rows, path):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("name", ["vlfeedback_hf", "vlfeedback_raw"])
@pytest.mark.parametrize("streaming", [False, True])
def test_vlfeedback_is_read_as_ranked_prompts(name, streaming, tmp_path):
    path = saved(fixture(name), tmp_path / "rows.jsonl")
    (row,) = leave_images_encoded(load_preferences("vlfeedback", path, ranked=True, streaming=streaming))
    assert row["images"] == [{"bytes": None, "path": "merged_images/svit-detail-000001.jpg"}]
    # Ratings 5 5 5, 3 5 2, 3 5 2 and N/A 5 4.
    assert row["scores"] == [5.0, 10 / 3, 10 / 3, None]
    texts = [
        "A man in a blue coat rides a bicycle.",
        "A man rides a bicycle next to a dog.",
        "A man on a bike.",
        "bike",
    ]
    assert [answer[0]["content"][0]["text"] for answer in row["completions"]] == texts
    assert row["pair_id"] == "vlfeedback-0" and row["source_id"] == "svit-detail-000001"


def test_pairs_of_ranked_prompts_are_the_pairs_of_the_set(tmp_path):
    (row,) = fixture("vlfeedback_raw")
    row["completions"][3]["annotations"]["Helpfulness"]["Rating"] = "5"  # and all four are rated
    path = saved([row, {**row, "id": "other", "prompt": "And what is behind?"}], tmp_path / "rows.jsonl")

    def told(rows):
        names = zip(rows["source_id"][:], rows["group_id"][:], strict=True)
        return sorted((*side, *name) for side, name in zip(texts(rows.remove_columns("images")), names, strict=True))

    pairs = load_preferences("vlfeedback", path)
    ranked = to_pairs(load_preferences("vlfeedback", path, ranked=True))
    assert len(pairs) == 10  # and two ties
    for one, other in zip(told(pairs), told(ranked), strict=True):
        assert one[:2] + one[3:] == other[:2] + other[3:] and one[2] == pytest.approx(other[2])


@pytest.mark.parametrize("plain", [True, False])
def test_files_of_ranked_prompts(plain, tmp_path):
    ranked = prompts([[1.0, 3.0, None], [2.0, 2.0]], plain=plain, pair_id=["a", "b"], own=[1, 2])
    ranked.to_parquet(tmp_path / "rows.parquet")
    loaded = load_preferences("trl", tmp_path / "rows.parquet", ranked=True)
    assert loaded["scores"][:] == [[1.0, 3.0, None], [2.0, 2.0]]
    assert loaded["pair_id"][:] == ["a", "b"] and loaded["own"][:] == [1, 2]
    pairs = [("answer 1 of 0", "answer 0 of 0", 2.0), ("answer 0 of 1", "answer 1 of 1", 0.0)]
    assert texts(to_pairs(loaded, ties=True)) == pairs
    assert np.array_equal(np.asarray(loaded[0]["images"][0]), np.asarray(ranked[0]["images"][0]))
    again = tmp_path / "again.parquet"
    loaded.to_parquet(again)
    assert load_preferences("trl", again, ranked=True)[:] == loaded[:]  # what was read is read as it is
    with pytest.raises(ValueError, match="the row has `completions`; load the set with `ranked=True`"):
        load_preferences("trl", tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="`rlaif_v` has no ranked prompts; .* These have: trl, vlfeedback"):
        load_preferences("rlaif_v", tmp_path / "rows.parquet", ranked=True)


def test_prompts_in_plain_text_and_ranks(tmp_path):
    rows = [{"prompt": "2+2?", "completions": ["5", "4", "4.0"], "ranks": [2, 1, 1]}]
    (row,) = load_preferences("trl", saved(rows, tmp_path / "rows.jsonl"), ranked=True)
    assert row["scores"] == [-2.0, -1.0, -1.0]
    assert row["completions"][0] == [{"role": "assistant", "content": [{"type": "text", "text": "5"}]}]
    pairs = to_pairs(load_preferences("trl", tmp_path / "rows.jsonl", ranked=True))
    assert texts(pairs) == [("4", "5", 1.0), ("4.0", "5", 1.0)]


@pytest.mark.parametrize(
    "change, reason, problem",
    [
        ({"completions": ["a"]}, "bad_rating", r"1 `completions` and 2 `scores` or `ranks`"),
        ({"completions": None}, "bad_rating", r"0 `completions` and 2"),
        ({"completions": ["a", ""]}, "empty_answer", r"`completions\[1\]` is empty"),
        ({"completions": ["a", 3]}, "not_conversational", r"`completions\[1\]` is of type int"),
        ({"completions": ["a", [{"role": "user", "content": "b"}]]}, "not_conversational", r"\[1\]` ends with a user"),
        ({"scores": [1.0, "five"]}, "bad_rating", r"its scores are \[1.0, 'five'\]; give finite numbers"),
        ({"scores": None}, "bad_rating", "both `scores` and `ranks`, or neither"),
        ({"ranks": [1, 2]}, "bad_rating", "both `scores` and `ranks`, or neither"),
        ({"strength": 1.0}, "bad_strength", "a ranked prompt has `scores` alone"),
        ({"chosen": "a"}, "missing_column", "keep either them or `completions`"),
        ({"prompt": None}, "missing_column", "`prompt` is missing"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "placeholder_count", "image"),
    ],
)
def test_ranked_prompts_that_cannot_be_used(change, reason, problem, tmp_path):
    good = {"prompt": "2+2?", "completions": ["5", "4"], "scores": [1.0, 2.0]}
    path = saved([good, {**good, **change}], tmp_path / "rows.jsonl")
    load_preferences("trl", path, ranked=True, quarantine_file=tmp_path / "bad.jsonl")
    (bad,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert bad["reason"] == reason and re.search(problem, bad["message"]), bad
