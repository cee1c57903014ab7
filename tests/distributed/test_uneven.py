"""Two processes on uneven and mixed data: each row counts once, no rank waits, a resumed run goes on as it was."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from trl_dt2it import MultimodalRewardTrainer

from ..families import family_dir
from ..processes import Run
from ..rows import text_rows
from ..trainers import config
from .launching import train


def test_accuracy_on_uneven_data_is_exact(tmp_path):
    """Five pairs, batches of two, two processes: one row is repeated to fill the last batch, and must not count."""
    result = train(tmp_path, 2, 2, "qwen3_vl")
    predictions = torch.tensor(result["seen"][0])
    assert predictions.shape == (5, 2)
    wins = (predictions[:, 0] > predictions[:, 1]).double()
    assert 0 < wins.sum() < 5
    assert result["before"]["eval_accuracy"] == wins.mean().item()
    assert result["before"]["eval_accuracy/a"] == wins[[0, 2, 3]].mean().item()
    assert result["before"]["eval_accuracy/b"] == wins[[1, 4]].mean().item()
    margin = (predictions[:, 0] - predictions[:, 1]).mean().item()
    assert result["before"]["eval_margin"] == pytest.approx(margin, rel=1e-5)


def test_a_streamed_evaluation_set_counts_each_row_once(tmp_path):
    memory = train(tmp_path / "memory", 1, 2, "qwen3_vl")
    stream = train(tmp_path / "stream", 2, 2, "qwen3_vl", stream=True)
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_accuracy/a", "eval_accuracy/b"):
        assert stream["before"][name] == pytest.approx(memory["before"][name], rel=1e-5), name


def test_resumed_on_two_processes_equals_the_undisturbed_run_bitwise(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, 2, 2, "qwen3_vl", **options)
    expected = load_file(tmp_path / "model.safetensors")
    resumed = train(tmp_path, 2, 2, "qwen3_vl", resume=str(tmp_path / "checkpoint-1"), **options)
    assert [entry["loss"] for entry in resumed["log"]] == [entry["loss"] for entry in whole["log"]]
    actual = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_rank_without_images_does_not_hang(tmp_path):
    """Alternating rows with and without an image: in each step one rank has text alone."""
    result = train(tmp_path, 2, 1, "qwen3_vl", num_images=[1, 0], train_sampling_strategy="sequential")
    assert len(result["log"]) == 8


def train_on(dataset: datasets.Dataset | datasets.IterableDataset, base: str, output_dir: Path, **options) -> None:
    args = config(output_dir, max_steps=6, weight_decay=0.1, reward_statistics_pairs=0, **options)
    trainer = MultimodalRewardTrainer(base, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        (output_dir / "log.json").write_text(json.dumps(log))


def evaluate_shuffled(base: str, output_dir: str) -> None:
    """Prints what an evaluation says of a stream that is shuffled without a seed, and with one."""
    rows = text_rows(12)
    trainer = MultimodalRewardTrainer(base, args=config(output_dir), train_dataset=datasets.Dataset.from_list(rows))
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)
    found = trainer.predict(stream.shuffle(seed=3, buffer_size=12)).predictions
    sys.stdout.write(f"{len(set(map(tuple, found.tolist())))}\n")
    try:
        trainer.predict(stream.shuffle(buffer_size=12))
    except ValueError as error:
        sys.stdout.write(f"{error}\n")


def test_a_stream_that_each_process_shuffles_its_own_way_is_refused(tmp_path):
    run = Run(evaluate_shuffled, str(family_dir("qwen3_vl")), str(tmp_path), num_processes=2)
    lines = run.finish().splitlines()
    assert lines.count("12") == 2 and sum("pass a `seed` to its `shuffle`" in line for line in lines) == 2


def train_on_files(files: list[str], base: str, output_dir: str) -> None:
    stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    train_on(stream, base, Path(output_dir), **options)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_streams_of_uneven_files_train_on_each_row_once_an_epoch(tmp_path, num_processes):
    """Files of 3, 2 and 2 rows, in steps of two batches of one row a process: on two processes the first has five rows
    and the second two. One process with the same rows in each step, and rows without weight for those that a process
    lacks, ends with the same weights after two epochs."""
    rows = [{**row, "weight": 1.0} for row in text_rows(7)]
    files = []
    for index, part in enumerate((rows[:3], rows[3:5], rows[5:])):
        files.append(str(tmp_path / f"part{index}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(row) + "\n" for row in part))
    base = str(family_dir("qwen3_vl"))
    run = Run(train_on_files, files, base, str(tmp_path / "stream"), num_processes=num_processes)
    nothing = {**rows[0], "weight": 0.0}
    if num_processes == 2:
        steps = [[rows[0], rows[1], rows[5], rows[6]], [rows[2], rows[3], nothing, nothing], [rows[4], *[nothing] * 3]]
    else:
        steps = [rows[:2], rows[2:4], rows[4:6], [rows[6], nothing]]
    run.finish()
    whole = datasets.Dataset.from_list([row for step in steps for row in step])
    train_on(
        whole,
        base,
        tmp_path / "whole",
        per_device_train_batch_size=len(steps[0]),
        train_sampling_strategy="sequential",
    )
    actual, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("stream", "whole"))
    assert max(float((actual[name] - value).abs().max()) for name, value in expected.items()) <= 1e-5
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("stream", "whole")]
    assert [len(log) for log in logs] == [6, 6]
    if num_processes == 2:  # two epochs: rows that only fill a step are not counted
        assert logs[0][5]["num_tokens"] == 2 * logs[0][2]["num_tokens"] < logs[1][5]["num_tokens"]
