"""Recipes that score, on two processes: the work is shared, one of them writes, and it is what one alone writes."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from trl_dt2it.data import write_parquet
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.evaluation.benchmarks import PAPER_BENCHMARKS

from ..evaluation.benchmark_rows import paper_rows
from ..policies import policy_and_reward_model
from ..processes import ROOT, start_script


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict[str, list[object]]:
    """What each recipe is told, but for the folder of its results."""
    folder = tmp_path_factory.mktemp("files")
    policy, model = policy_and_reward_model(folder)
    write_parquet(make_digits("train", 12), folder / "pairs.parquet")
    rows = {}
    for name, some in paper_rows(random.Random(0), 10, folder / "images").items():
        rows[name] = str(folder / f"{name}.parquet")
        Dataset.from_list(some).to_parquet(rows[name])
    sampling = ["--model_name_or_path", policy, "--reward_model", model, "--dataset_name", "digits"]
    sampling += ["--num_prompts", 5, "--num_answers", 2, "--max_new_tokens", 6, "--prompts_per_batch", 2]
    benchmarks = ["--benchmarks", "all", "--rows", json.dumps(rows), "--image_root", folder / "images"]
    return {
        "best_of_n": sampling,
        "build_dpo_pairs": [*sampling, "--min_gap", 0],
        "score_data": ["--model", model, "--dataset_name", folder / "pairs.parquet", "--rows_per_shard", 2],
        "evaluate": ["--model", model, *benchmarks, "--controls", "blank", "swapped"],
    }


# What the process that writes says at the end, and what it has written.
WRITTEN = {
    "best_of_n": ("Best answers:", ["best_of_n.jsonl", "answers.jsonl", "rewards.jsonl"]),
    "build_dpo_pairs": ("Pairs:", ["pairs/train.parquet", "report.json"]),
    "score_data": ("Figures:", ["scored.parquet", "summary.json"]),
    "evaluate": (
        "Results:",
        [
            "evaluation.json",
            *(f"{name}{shown}.parquet" for name in PAPER_BENCHMARKS for shown in ("", ".blank", ".swapped")),
        ],
    ),
}


def content(path: Path) -> object:
    return pq.read_table(path) if path.suffix == ".parquet" else path.read_text()


@pytest.mark.parametrize("name", WRITTEN)
def test_two_processes_write_what_one_writes(name, flags, tmp_path):
    said, files = WRITTEN[name]
    for number in (1, 2):
        given = [*flags[name], "--output_dir", tmp_path / str(number)]
        printed = start_script(ROOT / f"recipes/{name}.py", *given, num_processes=number).finish()
        assert printed.count(said) == 1
    for file in files:
        assert content(tmp_path / "1" / file) == content(tmp_path / "2" / file), file
    assert {path.name for path in (tmp_path / "1").iterdir()} == {path.name for path in (tmp_path / "2").iterdir()}
