"""Ranked prompts: the pairs that scores and ranks make, without a copy of an image."""

import re

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List

from tests.logs import messages_of
from tests.rows import make_rows
from tests.trainers import losses, trainer_for
from trl_dt2it.data import RowError, to_pairs
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
