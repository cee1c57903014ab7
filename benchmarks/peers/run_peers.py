"""How fast are the reward trainers of ms-swift and LLaMA-Factory, and this one, on the same model and image pairs?

Trains a random Qwen3-VL with each trainer in a process of its own, times the optimisation steps after the first,
prints a table and writes `benchmarks/results/peers.{json,md}`, or files of another name. On first use it makes an
environment for each peer in the working directory, which needs 15 GB there.

usage: python benchmarks/peers/run_peers.py WORKDIR [--scenario 300/135] [--steps 7] [--only ours,swift] [--name peers]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from model_and_pairs import SCENARIOS, build, folder_name
from settings import PEERS, THREADS, TRAINERS, Run, batch_size, command, environment, peer_python


RESULTS = Path(__file__).parents[1] / "results"
# Long for all, and most of an hour for the peers; by `--scenario` they run it too.
WITHOUT_PEERS = ("1100/400",)
LABELS = {
    "ours": "trl_dt2it",
    "one_row": "trl_dt2it, one row a pair",
    "two_rows": "transformers, two rows a pair",
    "swift": "ms-swift",
    "llamafactory": "LLaMA-Factory",
}


def install(workdir: Path, peer: str) -> None:
    """Makes a peer's environment, unless it is there."""
    stamp = workdir / peer / "installed"
    if stamp.exists():
        return
    print(f"Installing {peer} into {workdir / peer}.", flush=True)
    venv.create(workdir / peer, with_pip=True)
    subprocess.run([peer_python(workdir, peer), "-m", "pip", "install", "--quiet", *PEERS[peer]], check=True)
    stamp.touch()


def train(workdir: Path, scenario: str, trainer: str, steps: int) -> dict:
    """Runs a trainer and returns what the step timer wrote."""
    model, pairs = build(workdir, scenario)
    folder = workdir / "runs" / folder_name(scenario) / trainer
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(model, pairs, folder, batch_size(scenario, trainer), max_steps=steps + 1)
    run.output.unlink(missing_ok=True)
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(
            command(trainer, run, workdir),
            cwd=folder,
            env={**os.environ, **environment(workdir)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode or not run.output.exists():
        end = log.read_text()[-3000:]
        sys.exit(f"{trainer} failed on {scenario} with status {done.returncode}; the end of {log}:\n{end}")
    return json.loads(run.output.read_text())


def check_same_pairs(scenario: str, records: dict[str, dict]) -> None:
    """Stops if the trainers that have two rows a pair do not see the same tokens in each step."""
    tokens = {
        trainer: [batch["tokens"] for batch in record["batches"]]
        for trainer, record in records.items()
        if trainer not in ("ours", "one_row") and record["batch_size"] == batch_size(scenario, "two_rows")
    }
    if any(counts != next(iter(tokens.values())) for counts in tokens.values()):
        sys.exit(f"The trainers were given different tokens on {scenario}: {tokens}")


def as_row(scenario: str, trainer: str, record: dict, ours: dict | None) -> dict:
    """What a line of the table says of a run, and the seconds of its steps."""
    num_pairs = len(record["batches"]) * record["batch_size"]
    speed = record["pairs_per_second_median"]
    return {
        "scenario": scenario,
        "trainer": trainer,
        "batch_size": record["batch_size"],
        "pairs_per_second": speed,
        "step_seconds_median": statistics.median(record["step_seconds"]),
        "peak_rss_bytes": record["peak_rss_bytes"],
        "tokens_per_pair": sum(batch["tokens"] for batch in record["batches"]) / num_pairs,
        "padded_tokens_per_pair": sum(batch["shape"][0] * batch["shape"][1] for batch in record["batches"])
        / num_pairs,
        "image_patches_per_pair": sum(batch["image_patches"] for batch in record["batches"]) / num_pairs,
        "ours_is_faster_by": ours["pairs_per_second_median"] / speed if ours else None,
        **{name: record[name] for name in ("step_seconds", "step_cpu_seconds")},
    }


def print_progress(scenario: str, trainer: str, record: dict) -> None:
    """One line a run, with a warning if the machine had other work."""
    line = f"{scenario} {trainer}: {record['pairs_per_second_median']:.3f} pairs/s"
    share = sum(record["step_cpu_seconds"]) / sum(record["step_seconds"]) / record["threads"]
    line += f", threads busy {share:.0%}"
    print(line + (" (is something else running?)" if share < 0.8 else ""), flush=True)


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    names = [
        "prompt/answer tokens",
        "pairs a step",
        "trainer",
        "pairs/s",
        "s a step",
        "ours is faster by",
        "peak memory, GB",
    ]
    names += ["tokens a pair", "with padding", "image patches a pair"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        ratio = row["ours_is_faster_by"]
        cells = [
            row["scenario"],
            str(row["batch_size"]),
            LABELS[row["trainer"]],
            f"{row['pairs_per_second']:.3f}",
            f"{row['step_seconds_median']:.2f}",
            f"{ratio:.2f}x" if ratio else "",
            f"{row['peak_rss_bytes'] / 1e9:.1f}",
            *(f"{row[name]:.0f}" for name in ("tokens_per_pair", "padded_tokens_per_pair", "image_patches_per_pair")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="all by default; may be repeated")
    parser.add_argument("--steps", type=int, default=7, help="optimisation steps that count, besides the first")
    parser.add_argument("--only", default=",".join(TRAINERS), help="trainers, separated by commas")
    parser.add_argument("--name", default="peers", help="name of the files in `results`")
    args = parser.parse_args()
    trainers = [trainer for trainer in TRAINERS if trainer in args.only.split(",")]
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    for peer in PEERS:
        if peer in trainers:
            install(workdir, peer)

    rows: list[dict] = []
    environments: dict[str, dict] = {}
    for scenario in args.scenario or SCENARIOS:
        records: dict[str, dict] = {}
        for trainer in trainers:
            if trainer in PEERS and scenario in WITHOUT_PEERS and not args.scenario:
                continue
            if trainer == "one_row" and "answers" not in scenario:  # which is what `ours` does
                continue
            records[trainer] = record = train(workdir, scenario, trainer, args.steps)
            rows.append(as_row(scenario, trainer, record, records.get("ours")))
            kept = ("versions", "python", "dtypes", "attention", "optimizer", "threads", "trained_parameters")
            environments[trainer] = {name: record[name] for name in kept}
            print_progress(scenario, trainer, record)
        check_same_pairs(scenario, records)
        report(rows, environments, args.steps, args.name)  # what is there so far
    print((RESULTS / f"{args.name}.md").read_text())


def report(rows: list[dict], environments: dict[str, dict], steps: int, name: str) -> None:
    """Writes the table and the figures behind it."""
    result = {
        "rows": rows,
        "trainers": environments,
        "threads": THREADS,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    versions = {
        trainer: ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
        for trainer, environment in environments.items()
    }
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    notes = [f"{machine}, fp32, median of {steps} steps.", ""]
    notes += [f"- {LABELS[trainer]}: {versions[trainer]}" for trainer in environments]
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(table(rows) + "\n\n" + "\n".join(notes) + "\n")


if __name__ == "__main__":
    main()
