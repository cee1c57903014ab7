"""Runs of `score_dataset` in processes of their own, which tests and benchmarks count and kill.

Run as a script, it is such a run, and writes down which pairs the model saw.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.scoring import RewardScorer

from .rows import make_dataset


ROOT = Path(__file__).parents[1]
ROWS_PER_SHARD = 2


def start(model: Path, output: Path, num_processes: int, num_pairs: int = 12) -> subprocess.Popen:
    """Starts to score pairs into a folder, two in a file; slowly, as long as there is a file `slow` in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.scoring_runs", str(model), str(output), str(num_pairs)]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", f"--master_port={port}"]
        command[1:1] = launcher
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen, timeout: float = 200) -> None:
    """Waits for the end of a run that nobody kills."""
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors[-4000:]


def scored_pairs(output: Path) -> Counter:
    """How often the model saw each pair, in all runs into the folder."""
    return Counter(line for log in output.glob("log-*") for line in log.read_text().split())


def main(model: str, output: str, num_pairs: str) -> None:
    torch.set_num_threads(1)
    state, folder = PartialState(cpu=True), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    scorer = RewardScorer.from_pretrained(model, device="cpu")
    data = make_dataset(int(num_pairs), pair_id=[f"pair{i}" for i in range(int(num_pairs))])
    collate = scorer.collator

    class Logging(MultimodalPreferenceCollator):
        def __call__(self, examples):
            with open(folder / f"log-{state.process_index}", "a") as log:
                log.writelines(f"{example['pair_id']}\n" for example in examples)
            if (folder / "slow").exists():
                time.sleep(0.3)
            return super().__call__(examples)

    scorer.collator = Logging(collate.processing_class, share_prefix=collate.share_prefix)
    table = scorer.score_dataset(data, folder, rows_per_shard=ROWS_PER_SHARD)
    if state.is_main_process:
        pairs = list(zip(table["chosen_reward"], table["rejected_reward"], strict=True))
        (folder / "table.json").write_text(json.dumps(pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])
