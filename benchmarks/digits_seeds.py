"""Does the digits recipe reach 0.95 held-out pair accuracy with every seed, and how long does it train?

Runs `recipes/configs/digits.yaml` once a seed, as `make train-digits` does, prints a table and writes
`benchmarks/results/digits_seeds.{json,md}`. Fails if a seed falls short.

usage: python benchmarks/digits_seeds.py [SEED ...]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lib.report import markdown, write


ROOT = Path(__file__).parents[1]


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
    cells = [[str(r["seed"]), f"{r['eval_accuracy']:.3f}", f"{r['train_seconds']:.0f}", str(r["steps"])] for r in rows]
    write("digits_seeds", markdown(["seed", "held-out pair accuracy", "training, s", "steps"], cells), {"rows": rows})
    if min(row["eval_accuracy"] for row in rows) < 0.95:
        sys.exit("A seed fell short of 0.95.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
