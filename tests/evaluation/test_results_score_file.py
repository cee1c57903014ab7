"""Score files: matched by ids in any order, by places only where nothing can have shifted, at full precision."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.fixtures_as_rows import fixture
from trl_dt2it.evaluation import ScoreFile, evaluate, read_benchmark, split_predictions, write_scores
from trl_dt2it.evaluation.results import rounded

from .benchmark_rows import vl_rows


@pytest.fixture
def dataset():
    return read_benchmark("vl-rewardbench", vl_rows(random.Random(0), 12))


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(size=(12, 2))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_scores_come_back_to_the_last_bit_for_rows_in_any_order(tmp_path, dataset, scores, suffix):
    path = tmp_path / f"scores{suffix}"
    write_scores(path, dataset, scores)
    assert np.array_equal(ScoreFile(path)(dataset), scores)
    order = np.random.default_rng(1).permutation(12)[:9]  # the file may hold more than is asked for
    assert np.array_equal(ScoreFile(path)(dataset.select(order)), scores[order])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_names_of_the_scorer_s_columns_are_known(tmp_path, dataset, scores):
    columns = {"pair_id": dataset["pair_id"][:], "chosen_reward": scores[:, 0], "rejected_reward": scores[:, 1]}
    pq.write_table(pa.table(columns), tmp_path / "scored.parquet")
    assert np.array_equal(ScoreFile(tmp_path / "scored.parquet")(dataset), scores)


def test_a_file_that_does_not_fit_is_refused(tmp_path, dataset, scores):
    ids = dataset["pair_id"][:]
    rows = [{"pair_id": one, "chosen": c, "rejected": r} for one, (c, r) in zip(ids, scores.tolist(), strict=True)]

    def refused(lines, match, **kwargs):
        with pytest.raises(ValueError, match=match):
            ScoreFile(write_lines(tmp_path / "scores.jsonl", lines), **kwargs)(dataset)

    refused(rows[:-2], f"no score for 2 of 12 rows, the first is `{ids[10]}`; score them, or pass the release")
    refused([*rows, {**rows[3], "chosen": 9.0}], f"two scores for `{ids[3]}`")
    refused([{"chosen": 1.0, "rejected": 0.0}] * 12, "has no `pair_id`, only chosen, rejected")
    refused([{"pair_id": one, "score": 1.0} for one in ids], "needs the scores as `chosen` and `rejected`")
    refused([{**rows[0], "chosen": None}, *rows[1:]], "missing or not a number")
    refused([{**row, "chosen": "high"} for row in rows], "missing or not a number")
    refused(rows, "`by` is 'order'", by="order")
    lines = write_lines(tmp_path / "scores.jsonl", [{**rows[0], "chosen": float("nan")}, *rows[1:]])
    with pytest.raises(ValueError, match="1 of 12 pairs have a score that is not a number, the first is row 0"):
        evaluate(ScoreFile(lines), "vl-rewardbench", dataset)
    (tmp_path / "scores.jsonl").write_text('{"pair_id": "a"}\nnot JSON\n')
    with pytest.raises(ValueError, match="Line 2 of .* is not JSON"):
        ScoreFile(tmp_path / "scores.jsonl")(dataset)
    assert np.array_equal(ScoreFile(write_lines(tmp_path / "twice.jsonl", rows + rows))(dataset), scores)
    for path, given, match in (("a.csv", scores, "must end with"), ("a.jsonl", scores[:3], r"shape \(3, 2\)")):
        with pytest.raises(ValueError, match=match):
            write_scores(tmp_path / path, dataset, given)


def test_lines_without_ids_are_matched_by_their_places_only_if_none_is_missing(tmp_path, dataset):
    predictions = fixture("dt2it_predictions") * 6
    path = write_lines(tmp_path / "generated_predictions.jsonl", predictions)
    found = ScoreFile(path, by="position")(dataset)
    assert found.tolist() == [[3.25, -1.5], [0.12, 0.12]] * 6
    write_lines(path, predictions[:-1])
    message = "11 lines, and there are 12 rows.*left rows out.*; write the scores with `pair_id`"
    with pytest.raises(ValueError, match=message):
        ScoreFile(path, by="position")(dataset)


def test_a_file_of_several_benchmarks_is_split_by_their_real_sizes(tmp_path, dataset):
    other = read_benchmark("mm-rlhf-rewardbench", fixture("mm_rlhf_rewardbench")[:5])
    lines = [{"chosen": float(index), "rejected": -index / 7} for index in range(17)]
    path = write_lines(tmp_path / "generated_predictions.jsonl", lines)
    parts = split_predictions(path, {"mm-rlhf-rewardbench": other, "vl-rewardbench": dataset})
    assert list(parts) == ["mm-rlhf-rewardbench", "vl-rewardbench"]
    assert parts["mm-rlhf-rewardbench"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert parts["vl-rewardbench"].tolist() == [[float(index), -index / 7] for index in range(5, 17)]
    short = split_predictions(path, {"mm-rlhf-rewardbench": other, "vl-rewardbench": dataset}, round=2)
    assert short["vl-rewardbench"][0].tolist() == [5.0, -0.71]
    with pytest.raises(ValueError, match="17 lines, and there are 12 rows .12 of vl-rewardbench."):
        split_predictions(path, {"vl-rewardbench": dataset})


def test_rounding_is_python_s():
    given = [2.675, 0.285, 1.005, -0.125, 1e300, 0.145]
    found = rounded(np.array([given, given[::-1]]).T, 2)
    assert found[:, 0].tolist() == [round(one, 2) for one in given]
    assert not np.array_equal(np.round(given, 2), [round(one, 2) for one in given])  # so that the test can fail
