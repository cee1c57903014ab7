"""Benchmarks as evaluation sets: a real trainer logs what `evaluate` finds for the same model."""

import pickle
import random

import numpy as np
import pytest
from datasets import Image, List, concatenate_datasets, load_from_disk

from tests.families import family_dir
from tests.rows import make_dataset
from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.evaluation import compute_metrics, eval_datasets, evaluate, read_benchmark, training_metrics
from trl_dt2it.training.losses import PairRecord
from trl_dt2it.training.pair_scoring import score_pairs

from .benchmark_rows import mm_rlhf_rows, png, vl_rows


def records_of(dataset, scores) -> list[PairRecord]:
    return [
        PairRecord(index, float(chosen), float(rejected), 0.0, 1.0, None)
        for index, (chosen, rejected) in enumerate(scores)
    ]


@pytest.mark.parametrize("name", ["vl-rewardbench", "mm-rlhf-rewardbench"])
def test_records_in_any_order_give_the_metrics(name):
    rows = vl_rows(random.Random(0), 40) if name == "vl-rewardbench" else mm_rlhf_rows(random.Random(0), 12)
    rows = [row for row in rows if "video" not in row]
    dataset = read_benchmark(name, rows)
    scores = np.random.default_rng(0).normal(size=(len(rows), 2))
    records = records_of(dataset, scores)
    expected = compute_metrics(name, rows, scores[:, 0], scores[:, 1])
    assert training_metrics(dataset, records) == expected
    assert training_metrics(dataset, random.Random(1).sample(records, len(records))) == expected
    # Rows that the trainer leaves out, such as too long ones, do not shift the others.
    kept = sorted(random.Random(2).sample(range(len(rows)), len(rows) // 2))
    part = dataset.select(kept)
    found = training_metrics(part, records_of(part, scores[kept]))
    assert found == compute_metrics(name, [rows[i] for i in kept], scores[kept, 0], scores[kept, 1])
    assert found != expected


def test_a_benchmark_brings_its_metrics_along(tmp_path):
    """What becomes of the rows on their way to the trainer, and a set that was saved and is read again."""
    dataset = read_benchmark("vl-rewardbench", vl_rows(random.Random(0), 12))
    records = records_of(dataset, np.random.default_rng(0).normal(size=(12, 2)))
    expected = training_metrics(dataset, records)
    ways = [
        dataset.select(range(12)),
        dataset.filter(lambda row: True),
        dataset.map(lambda row: {"weight": 1.0}),
        dataset.map(lambda row: {"weight": 1.0}, num_proc=2),
        dataset.remove_columns("source").with_format("numpy"),
        dataset.cast_column("images", List(Image(decode=False))),
        pickle.loads(pickle.dumps(dataset)),
    ]
    dataset.save_to_disk(tmp_path)
    ways.append(read_benchmark("vl-rewardbench", load_from_disk(tmp_path)))
    assert len(expected) == 5
    for one in ways:
        assert one.info.measure(one, records) == expected and one.info.title == "VL-RewardBench"
    first, second = dataset.select(range(6)).shuffle(seed=0), dataset.select(range(6, 12))
    assert first.info.measure(first, records[:6])["overall"] == training_metrics(dataset, records[:6])["overall"]
    both = concatenate_datasets([second, make_dataset(2)])
    assert training_metrics(both, records) == {}


def test_rows_read_as_another_benchmark_bring_its_metrics():
    dataset = read_benchmark("vl-rewardbench", vl_rows(random.Random(0), 12))
    other = read_benchmark("multimodal-rewardbench", dataset)
    assert (dataset.info.title, other.info.title) == ("VL-RewardBench", "Multimodal RewardBench")
    assert read_benchmark("vl-rewardbench", dataset) is dataset


def test_other_sets_have_no_metrics_of_a_benchmark():
    plain = make_dataset(2)
    assert training_metrics(plain, []) == {}
    named = plain.add_column("category", ["a", "b"]).add_column("group_id", ["a", "b"])
    named = named.add_column("source", ["mine", "mine"])
    assert training_metrics(named, []) == {}
    assert training_metrics(named.to_iterable_dataset(), []) == {}


def test_the_trainer_logs_what_evaluate_finds(tmp_path):
    rows = vl_rows(random.Random(0), 11)
    data = read_benchmark("vl-rewardbench", [{**row, "image": png((20 * i, 40, 90))} for i, row in enumerate(rows)])
    trainer = MultimodalRewardTrainer(
        str(family_dir("qwen3_vl")),
        args=MultimodalRewardConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=1e-3,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=make_dataset(4),
        eval_dataset={"vl-rewardbench": data, "held_out": make_dataset(3, seed=2)},
    )
    trainer.train()
    logged: dict[str, float] = {}
    for entry in trainer.state.log_history:
        logged |= entry
    result = evaluate(
        lambda dataset: score_pairs(trainer.model, dataset, trainer.data_collator, show_progress=False),
        "vl-rewardbench",
        data,
        num_resamples=10,
    )
    assert 0 < result.metrics["overall"] < 1 and len(result.metrics) == 5
    for name, value in result.metrics.items():
        assert logged[f"eval_vl-rewardbench_{name}"] == value
    assert logged["eval_vl-rewardbench_accuracy"] == result.metrics["overall"]
    assert "eval_held_out_accuracy" in logged and "eval_held_out_overall" not in logged


def test_the_entries_of_eval_dataset():
    rows = {"vl-rewardbench": vl_rows(random.Random(0), 3), "mm-rlhf-rewardbench": mm_rlhf_rows(random.Random(0), 9)}
    entries = eval_datasets(rows, videos="skip")
    assert list(entries) == list(rows)
    for name, given in rows.items():
        assert entries[name]["source_id"][:] == [row["id"] for row in given if "video" not in row]
