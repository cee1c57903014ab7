"""Processes wait for each other as long as it takes, and what fails on one of them fails on all."""

import json
import multiprocessing
import runpy
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from transformers.utils import logging

from trl_dt2it import MultimodalPreferenceCollator, MultimodalRewardTrainer, load_reward_model
from trl_dt2it.data.rows import RowError
from trl_dt2it.models.modeling import load_processing_class
from trl_dt2it.processes import gather, main_process_first, on_main_process, raise_together, wait_for_everyone
from trl_dt2it.scoring.shards import make_records
from trl_dt2it.training import pair_scoring
from trl_dt2it.training.pair_scoring import score_pairs

from ..curation.runs import arguments, start
from ..families import family_dir
from ..judge.server import Fault, JudgeServer
from ..processes import ROOT, Run
from ..rows import make_dataset, make_rows
from ..trainers import config


LIMIT, WORK = timedelta(seconds=5), 6.0


def on_two(folder: Path, function, *arguments: object) -> list:
    """What a function of the rank gives on two processes whose collectives may take five seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    Run(_write, folder, function, arguments, num_processes=2).finish(120)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _write(folder: Path, function, arguments: tuple) -> None:
    # A process that a fork server has made would start the workers of a data loader by another fork server.
    multiprocessing.set_start_method("fork", force=True)
    rank = PartialState(cpu=True, timeout=LIMIT).process_index
    (folder / f"{rank}.json").write_text(json.dumps(function(rank, folder, *arguments)))


def error_of(function, *arguments) -> list[str]:
    try:
        function(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def work_and_fail(rank: int, folder: Path) -> dict:
    found = {}

    def work() -> float:
        time.sleep(WORK)
        return 1.5

    start = time.monotonic()
    found["result"] = on_main_process(work)
    found["long"] = time.monotonic() - start
    if rank == 1:
        time.sleep(WORK)  # now the other one waits
    wait_for_everyone()
    with main_process_first():
        if rank == 0:
            (folder / "cache").touch()
        found["is_made"] = (folder / "cache").exists()
    found["gathered"] = gather(rank + 1)

    def refuse() -> None:
        raise RowError("bad_weight", "row 3: no weight")

    def block() -> None:
        with main_process_first():
            refuse()

    def make(batch: list[int]) -> list[dict]:
        if 2 in batch:  # the second batch, which is the other process's
            refuse()
        return [{} for _ in batch]

    found["errors"] = [
        error_of(on_main_process, refuse),
        error_of(block),
        error_of(raise_together, KeyError("mine") if rank == 1 else None),
        error_of(raise_together, Unpicklable(1, 2) if rank == 1 else None),
        error_of(lambda: make_records(folder / "records.jsonl", list("abcdef"), make, batch_size=2, desc="")),
    ]
    on_main_process(lambda: None)  # nobody is out of step
    if rank == 0:
        time.sleep(WORK)
    found["limit"] = error_of(PartialState().wait_for_everyone)  # as the processes were told, it gives up
    return found


def test_waiting_has_no_limit_and_an_error_is_raised_everywhere(tmp_path):
    results = on_two(tmp_path, work_and_fail)
    row, key = ["RowError", "row 3: no weight"], ["KeyError", "'mine'"]
    for rank, found in enumerate(results):
        assert found["result"] == 1.5 and found["long"] > LIMIT.total_seconds()
        assert found["is_made"] and found["gathered"] == [1, 2]
        sent = ["RuntimeError", "Unpicklable: 1 and 2"] if rank == 0 else ["Unpicklable", "1 and 2"]
        assert found["errors"] == [row, row, key, sent, row]
        assert found["limit"] and found["limit"][0] != "RowError"
    # What the process without the error has made stays.
    lines = (tmp_path / "records.jsonl.0").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 4, 5]


def broken_rows(number: int) -> list[dict]:
    """One-image rows of which the last has a truncated image, whose header is whole."""
    rows = make_rows(number, num_images=(1,))
    (image,) = rows[-1]["images"]
    image["bytes"] = image["bytes"][: len(image["bytes"]) // 2]
    return rows


def train_to_the_end(rank: int, folder: Path, base: str) -> dict:
    warnings: list[str] = []
    logging.get_logger("trl_dt2it.training.pair_scoring").warning = warnings.append
    rows = broken_rows(8)
    args = config(folder, max_steps=1, per_device_train_batch_size=1, train_sampling_strategy="sequential")
    trainer = MultimodalRewardTrainer(base, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
    score = partial(score_pairs, trainer.model, collator=trainer.data_collator, batch_size=1, show_progress=False)
    errors = [
        error_of(partial(score, Dataset.from_list(rows), **options))
        for options in ({}, {"num_workers": 1}, {"max_tokens_per_batch": 1, "num_workers": 1})
    ]

    def forward_that_fails(*inputs: object, **options: object) -> None:
        raise MemoryError("none left")

    if rank == 1:
        trainer.model.forward = forward_that_fails
    errors.append(error_of(partial(score, rows[:7])))
    return {"warnings": warnings, "steps": trainer.state.global_step, "errors": errors}


def test_a_row_that_one_process_cannot_read_does_not_cost_a_finished_training(tmp_path):
    results = on_two(tmp_path, train_to_the_end, str(family_dir("qwen3_vl")))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "reward_mean" not in saved and "reward_std" not in saved
    assert (tmp_path / "model.safetensors").is_file()
    assert results[0] == results[1]
    assert results[0]["steps"] == 1
    (warning,) = results[0]["warnings"]
    assert warning.startswith("`reward_mean` and `reward_std` are left out") and "RowError: row 7: " in warning
    *unreadable, memory = results[0]["errors"]
    assert {kind for kind, _ in unreadable} == {"RowError"} and {text[:7] for _, text in unreadable} == {"row 7: "}
    assert memory == ["MemoryError", "none left"]


def count_and_score(rank: int, folder: Path, base: str) -> dict:
    counted: list[str] = []
    count_tokens = pair_scoring.count_tokens

    def counting(row, collator):
        counted.append(row["pair_id"])
        return count_tokens(row, collator)

    pair_scoring.count_tokens = counting
    model = load_reward_model(base)
    collator = MultimodalPreferenceCollator(load_processing_class(base), share_prefix=True)
    data = make_dataset(21, pair_id=[f"pair-{i}" for i in range(21)])
    scores = [
        score_pairs(model, data, collator, max_tokens_per_batch=400, num_workers=number, show_progress=False).tolist()
        for number in (0, 2)
    ]
    return {"counted": counted, "scores": scores}


def test_each_process_counts_its_share_and_rewards_stay_the_same(tmp_path):
    base = str(family_dir("qwen3_vl"))
    first, second = on_two(tmp_path / "two", count_and_score, base)
    (tmp_path / "one").mkdir()
    Run(_write, tmp_path / "one", count_and_score, (base,)).finish()
    one = json.loads((tmp_path / "one" / "0.json").read_text())
    every = {f"pair-{i}" for i in range(21)}
    # Workers count where nobody sees it, so what is counted here is what the run without them counted.
    assert set(one["counted"]) == every and len(one["counted"]) == 21
    assert set(first["counted"]) | set(second["counted"]) == every
    assert len(first["counted"]) == 13 and len(second["counted"]) == 8  # eight rows at a time, in turn
    assert one["scores"][0] == one["scores"][1] == first["scores"][0] == first["scores"][1]
    assert second["scores"] == first["scores"] and len(np.unique(one["scores"][0])) == 42


def run_with_limit(path: str, flags: list[str]) -> None:
    """Runs a recipe in a process group that was made before, because `ddp_timeout` does not count on a CPU."""
    dist.init_process_group("gloo", timeout=LIMIT)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def test_a_judge_of_twelve_seconds_outlasts_the_limit_of_the_processes(tmp_path):
    """The judges' stage of the recipe, on the first of two processes whose collectives give up after five seconds."""
    replies = iter([Fault(text='{"better": "first"}', hang=12.0), *[Fault(text='{"better": "tie"}')] * 100])
    with JudgeServer(lambda body: next(replies)) as server:
        judge = {"base_url": server.base_url, "model": "judge", "max_calls": 1000}
        rounds = [{"rules": [{"keep": "keep_confident", "share": 0.75}], "judge": True}]
        settings = {"judge": judge, "rounds": rounds, "folds": 1, "max_steps": 1, "save_strategy": "no"}
        until = start(arguments(tmp_path, **settings, stop_before="round-1/judge"))
        until.finish()
        assert not server.requests and not (tmp_path / "round-1/judge/stage.json").exists()
        flags = arguments(tmp_path, **settings, stop_before="final")
        judged = Run(run_with_limit, str(ROOT / "recipes/dt2it.py"), flags, num_processes=2, ACCELERATE_USE_CPU="true")
        printed = judged.finish()
    record = json.loads((tmp_path / "round-1/judge/stage.json").read_text())
    assert record["seconds"] > 12 and record["counts"]["judged"] == 12  # a quarter of 48 pairs
    assert record["counts"]["replies"] == {"ok": 24} and len(server.requests) == 24
    assert "stopped before it" in printed
