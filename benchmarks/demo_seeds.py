"""Does each stage of `make demo` gain what it should with every seed, and how long does it take?

Runs `recipes/configs/dt2it_digits.yaml` once a seed, which draws the data, the weights of the model and the order of
the rows anew. Prints a table of accuracies on the three test sets, all held-out handwriting, and writes
`benchmarks/results/demo_seeds.{json,md}`. Fails if curation gains nothing on a test set of a seed, if balancing style
gains nothing where style speaks against the truth, or if a run takes more than 10 minutes.

usage: python benchmarks/demo_seeds.py [SEED ...]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from lib.report import markdown, wall_seconds, write

from trl_dt2it.curation.rounds.results import GAINS, accuracy_table


ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes/configs/dt2it_digits.yaml"
SETS = ("base", "pool", "test")
AGAINST = "accuracy/style_against"
MOST_SECONDS = 600


def reseeded(seed: int) -> dict[str, dict]:
    """The sets of the configuration, drawn with another seed."""
    settings = yaml.safe_load(CONFIG.read_text())
    for name in SETS:
        for spec in settings[name].values():
            next(iter(spec.values()))["seed"] = seed
    return {name: settings[name] for name in SETS}


def run(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
        command += ["recipes/dt2it.py", "--config", str(CONFIG), "--seed", str(seed), "--output_dir", folder]
        for name, specs in reseeded(seed).items():
            command += [f"--{name}", json.dumps(specs)]
        seconds = wall_seconds(lambda: subprocess.run(command, cwd=ROOT, check=True))
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return {"seed": seed, "seconds": round(seconds, 1), "rounds": summary["rounds"], "final": summary["final"]}


def main(seeds: list[int]) -> None:
    runs = [run(seed) for seed in seeds]
    report(runs)
    fallen = [f"seed {one['seed']}: {name}" for one in runs for name in shortfalls(one)]
    if fallen:
        sys.exit("Fell short: " + "; ".join(fallen))


def shortfalls(one: dict) -> list[str]:
    """What a run did not gain, or took too long for."""
    final, found = one["final"], []
    measured = [name for name in final["base"] if name.startswith("accuracy")]
    for title, after, before in GAINS:
        judged = [AGAINST] if after == "base" else measured
        found += [f"{title}, {name}" for name in judged if final[after][name] <= final[before][name]]
    return [*found, f"{one['seconds']} s"] if one["seconds"] > MOST_SECONDS else found


def report(runs: list[dict]) -> None:
    heads, cells = [], []
    for one in runs:
        heads, rows = accuracy_table(one["final"])
        cells += [[str(one["seed"]), *row] for row in rows]
    noise = ["seed", "decision", "flipped", "kept", "wrong labels before", "after"]
    decided = [
        [
            str(one["seed"]),
            name,
            f"{counts['flipped']:,}",
            f"{counts['kept']:,}",
            f"{counts['noise_before']:.1%}",
            f"{counts['noise_after']:.1%}",
        ]
        for one in runs
        for name, counts in one["rounds"].items()
    ]
    times = ", ".join(f"{one['seconds']:.0f} s (seed {one['seed']})" for one in runs)
    parts = ["Share of test pairs whose better answer has the higher reward.", ""]
    parts += [markdown(["seed", *heads], cells), "", "The noisy pool:", "", markdown(noise, decided)]
    write("demo_seeds", "\n".join([*parts, "", f"Whole runs, from launch to report: {times}."]), {"runs": runs})


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
