"""Evaluates sets of every kind with every setting of data loaders that repeats or drops rows elsewhere, and writes by
how much each differs from the pairs scored one by one; started by `test_evaluation.py`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node


# 26 pairs of four files, so that no number of processes, workers and batches of three divides them.
SIZES = (5, 6, 7, 8)
SETTINGS = {
    "dropping": {"dataloader_drop_last": True, "accelerator_config": {"even_batches": False}},
    "splitting": {"accelerator_config": {"split_batches": True}, "per_device_eval_batch_size": 6},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_in_order": False},
}


def write_files(folder: Path) -> list[str]:
    from tests.rows import make_rows

    rows = make_rows(sum(SIZES), seed=3, num_images=(1, 0, 2))
    for index, row in enumerate(rows):
        for number, image in enumerate(row["images"]):
            name = f"{index}-{number}.png"
            (folder / name).write_bytes(image["bytes"])
            row["images"][number] = name
        row["source"] = "abc"[index % 3]
    files = []
    for size in SIZES:
        file = folder / f"part{size}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[:size]))
        files.append(str(file))
        del rows[:size]
    return files


def with_a_column(batch: dict[str, list]) -> dict[str, list]:
    return {**batch, "row_index": [0] * len(batch["source"])}


def sets_of(files: list[str], rank: int, world_size: int) -> dict[str, tuple]:
    """Evaluation sets, each with the indices that its pairs have among all."""
    memory = load_dataset("json", data_files=files, split="train", keep_in_memory=True)
    stream = load_dataset("json", data_files=files, split="train", streaming=True)
    every = list(range(len(memory)))
    numbered = memory.add_column("row_index", [index % 3 for index in every])
    named = memory.add_column("row_index", ["same"] * len(every)).add_column("position", [0] * len(every))
    return {
        "memory": (memory, every),
        "stream": (stream, every),
        "taken": (stream.skip(2).take(9), every[2:11]),
        "of_one_file": (load_dataset("json", data_files=files[0], split="train", streaming=True), every[:5]),
        "one": (memory.select([7]), [7]),
        "numbered": (numbered, every),
        "named": (named, every),
        "numbered_stream": (numbered.to_iterable_dataset(3), every),
        "split_by_user": (split_dataset_by_node(stream, rank, world_size), every),
        "transformed": (memory.with_transform(with_a_column), every),
    }


def main(folder: str, base: str, settings: list[str]) -> None:
    from tests.trainers import config
    from trl_dt2it import MultimodalRewardTrainer
    from trl_dt2it.training.pair_scoring import score_pairs

    torch.set_num_threads(1)
    here = Path(folder)
    files = sorted(map(str, here.glob("part*.jsonl")))
    seen: list[np.ndarray] = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"seen": len(prediction.predictions)}

    results = {}
    for setting in settings:
        args = config(
            here / "out",
            **{"per_device_eval_batch_size": 3, "image_root": folder, "max_steps": 2, **SETTINGS[setting]},
            eval_strategy="steps",
            eval_steps=1,
            train_sampling_strategy="sequential",
            reward_statistics_pairs=0,
            # The tests start this process by a fork server, and its children would start likewise: slowly.
            dataloader_multiprocessing_context="fork" if "dataloader_num_workers" in SETTINGS[setting] else None,
        )
        train = load_dataset("json", data_files=files, split="train", keep_in_memory=True)
        trainer = MultimodalRewardTrainer(
            base,
            args=args,
            train_dataset=train.select(range(16)),
            eval_dataset=train.select(range(3)),
            compute_metrics=compute_metrics,
        )
        sets = sets_of(files, args.process_index, args.world_size)

        def scored(trainer=trainer, train=train):
            model = trainer.accelerator.unwrap_model(trainer.model)
            return score_pairs(model, train, trainer.data_collator, batch_size=1, show_progress=False)

        def check(name, metrics, predictions, expected, results=results, setting=setting):
            assert predictions.shape == expected.shape, (setting, name, predictions.shape, expected.shape)
            margins = (expected[:, 0] - expected[:, 1]).astype(np.float64)
            differences = {
                "predictions": np.abs(predictions - expected).max(),
                "accuracy": abs(metrics["accuracy"] - (predictions[:, 0] > predictions[:, 1]).mean()),
                "margin": abs(metrics["margin"] - margins.mean()),
                "loss": abs(metrics["loss"] - np.log1p(np.exp(-margins)).mean()),
            }
            results[f"{setting} {name}"] = {name: float(value) for name, value in differences.items()}

        all_expected = scored()
        assert len(np.unique(all_expected.round(4), axis=0)) == sum(SIZES)
        for name, (dataset, indices) in sets.items():
            seen.clear()
            metrics = trainer.evaluate(dataset)
            assert metrics["eval_seen"] == len(indices), (setting, name, metrics)
            assert len(seen) == 1
            plain = {key.removeprefix("eval_"): value for key, value in metrics.items()}
            check(name, plain, seen[0], all_expected[indices])
        stream, every = sets["stream"]
        for name, dataset in (("predicted", stream), ("predicted_memory", sets["memory"][0])):
            output = trainer.predict(dataset)
            plain = {key.removeprefix("test_"): value for key, value in output.metrics.items()}
            check(name, plain, output.predictions, all_expected)
        if setting == "dropping" and args.world_size > 1:
            trainer.args.dataloader_drop_last, trainer.train_dataset = False, train.select(range(5))
            try:
                trainer.train()
                raise AssertionError("it would hang")
            except ValueError as error:
                assert str(error).startswith("With `even_batches` false in `accelerator_config`, 5 train pairs in "), (
                    error
                )
            trainer.args.dataloader_drop_last, trainer.train_dataset = True, train.select(range(16))
        if setting == "dropping":
            seen.clear()
            trainer.train()
            assert [len(one) for one in seen] == [3, 3], [len(one) for one in seen]
            seen.clear()
            metrics = trainer.evaluate({"a": stream, "b": sets["one"][0]})
            assert [len(one) for one in seen] == [26, 1]
            expected = scored()
            assert np.abs(expected - all_expected).max() > 1e-3
            plain = {key.removeprefix("eval_a_"): value for key, value in metrics.items() if "_a_" in key}
            check("trained", plain, seen[0], expected)
            sources = {key: value for key, value in plain.items() if key.startswith("accuracy/")}
            wins = seen[0][:, 0] > seen[0][:, 1]
            assert sources == {f"accuracy/{'abc'[i]}": wins[i::3].mean() for i in range(3)}
    if trainer.accelerator.is_main_process:
        (here / f"result-{args.world_size}.json").write_text(json.dumps(results))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
