"""Does a `score_dataset` that is killed again and again give what one gives that nobody kills, and at what price?

Scores pairs into a folder in a process of its own, kills it (SIGKILL) at a random moment, starts it again, and so on,
until KILLS kills have struck, and lets the last run end. The files of rewards and the table are compared byte by byte
with those of a run that was not killed, and what the model saw in each run with what was in files before and after.
Prints a table and writes `benchmarks/results/score_dataset_kills.{json,md}`. Fails if a file differs, or if more was
scored again than the two pairs in flight.

usage: python benchmarks/score_dataset_kills.py [KILLS]
"""

import random
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import pyarrow.parquet as pq
import torch
from lib.report import markdown, write
from transformers import AutoProcessor

from tests.families import family_dir
from tests.scoring_runs import ROWS_PER_SHARD, scored_pairs, start
from trl_dt2it import load_reward_model


PAIRS = 120
SEED = 0
PATIENCE = 3600  # seconds, for a machine with other work


def finished(output: Path) -> set[str]:
    """The pairs that stand in a file."""
    return {name for file in output.glob("scores-*.parquet") for name in pq.read_table(file)["pair_id"].to_pylist()}


def outcome(output: Path) -> dict[str, str]:
    """A digest of everything that a run leaves: the files of rewards, their settings, and the table."""
    files = [*output.glob("*.parquet"), *output.glob("*.json")]
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def run_and_kill(model: Path, output: Path, target: int, after: float) -> dict:
    """
    One run, killed some seconds after it has scored a pair, and all runs together as many as `target`.

    Returns how many pairs stood in files before, how many the model saw, how many of them it need not have seen, and
    how many were lost, because they are in no file now.
    """
    before, seen = finished(output), scored_pairs(output)
    run = start(model, output, 1, PAIRS)
    now = seen
    while (now == seen or len(now) < target) and run.exit_codes == [None]:
        time.sleep(0.002)
        now = scored_pairs(output)
    time.sleep(after)
    if not run.kill():
        sys.exit(f"A run ended before it was killed. {run.errors[-3000:]}")
    scored = set(scored_pairs(output) - seen)
    again, lost = len(scored & before), len(scored - finished(output))
    return {"before": len(before), "scored": len(scored), "again": again, "lost": lost}


def main(num_kills: int) -> None:
    rng = random.Random(SEED)
    with tempfile.TemporaryDirectory() as folder:
        model, calm, killed = (Path(folder) / name for name in ("model", "calm", "killed"))
        torch.manual_seed(SEED)
        load_reward_model(family_dir("qwen3_vl"), dtype="float32").save_pretrained(model)
        AutoProcessor.from_pretrained(family_dir("qwen3_vl")).save_pretrained(model)
        start(model, calm, 1, PAIRS).finish(PATIENCE)
        files = sorted(calm.glob("*.parquet"), key=lambda file: file.stat().st_mtime)
        seconds = files[-1].stat().st_mtime - files[0].stat().st_mtime
        # All over the set, and anywhere between a pair and the next.
        kills = []
        for target in sorted(rng.sample(range(1, PAIRS - 10), num_kills)):
            kills.append(run_and_kill(model, killed, target, rng.uniform(0, 2 * seconds / PAIRS)))
            print(kills[-1], flush=True)
        last = len(finished(killed))
        start(model, killed, 1, PAIRS).finish(PATIENCE)
        counts = scored_pairs(killed)
        same = outcome(killed) == outcome(calm)
        num_files = len(outcome(calm))
        unfinished = len(list(killed.glob("*.part")))
    lost = sum(kill["lost"] for kill in kills)
    header = ["kill", "pairs in files before", "scored in this run", "of them needlessly", "lost by the kill"]
    cells = [[str(number), *map(str, kill.values())] for number, kill in enumerate(kills, 1)]
    text = [
        f"{PAIRS} pairs, {ROWS_PER_SHARD} to a file, one process, killed {num_kills} times at random moments of "
        f"scoring and then left to its end, with {last} pairs in files. A tiny Qwen3-VL in fp32 on the CPU.",
        "",
        markdown(header, cells),
        "",
        f"The model saw {counts.total()} pairs for {PAIRS}: {lost} were lost by kills, at most "
        f"{max(kill['lost'] for kill in kills)} by one. The {num_files} files, table included, are "
        f"{'equal byte for byte to' if same else 'DIFFERENT from'} those of a run that was not killed.",
    ]
    record = {"pairs": PAIRS, "rows_per_shard": ROWS_PER_SHARD, "kills": kills, "scored": counts.total()}
    write("score_dataset_kills", "\n".join(text), {**record, "same": same, "seed": SEED, "seconds": seconds})
    if not same or unfinished:
        sys.exit("A killed run ended unlike the one that was not killed.")
    needless = any(kill["again"] or kill["lost"] > ROWS_PER_SHARD for kill in kills)
    if needless or counts.total() != PAIRS + lost or len(counts) != PAIRS:
        sys.exit("Pairs were scored again that were in a file.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
