"""Does the digits recipe reach 0.95 held-out pair accuracy with every seed, and how long does it train?

Runs `recipes/configs/digits.yaml` once a seed, as `make train-digits` does, prints a table and writes
`benchmarks/results/digits_seeds.{json,md}`. Fails if a seed falls short.

usage: python benchmarks/digits_seeds.py [SEED ...]
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def train(seed: int, output_dir: str) -> dict:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    command += ["recipes/train_reward_model.py", "--config", "recipes/configs/digits.yaml"]
    subprocess.run([*command, "--seed", str(seed), "--output_dir", output_dir], cwd=ROOT, check=True)
    return json.loads((Path(output_dir) / "summary.json").read_text())


def main(seeds: list[int]) -> None:
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as output_dir:
            summary = train(seed, output_dir)
        rows.append({name: summary[name] for name in ("seed", "eval_accuracy", "train_seconds", "steps")})
    lines = ["| seed | held-out pair accuracy | training, s | steps |", "|---|---|---|---|"]
    lines += [f"| {r['seed']} | {r['eval_accuracy']:.3f} | {r['train_seconds']:.0f} | {r['steps']} |" for r in rows]
    table = "\n".join(lines)
    versions = {name: version(name) for name in ("trl-dt2it", "trl", "transformers", "torch")}
    environment = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    record = {"rows": rows, "versions": versions, **environment}
    (RESULTS / "digits_seeds.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "digits_seeds.md").write_text(table + "\n")
    print(table)
    if min(row["eval_accuracy"] for row in rows) < 0.95:
        sys.exit("A seed fell short of 0.95.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
