"""Runs of the rounds' recipe on few pairs, which tests and benchmarks start, kill and compare."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..processes import ROOT, Run, start_script


RULES = [{"flip": "flip_negative"}]
SETTINGS = {
    "base": {"clean": {"digits": {"num_pairs": 24}}},
    "pool": {"a": {"digits": {"num_pairs": 32, "noise": 0.35}}, "b": {"digits": {"num_pairs": 16, "noise": 0.2}}},
    "test": {"clean": {"digits": {"split": "test", "num_pairs": 8}}},
    "rounds": [
        {"rules": RULES},
        {"rules": [*RULES, {"keep": "keep_confident", "share": 0.8}], "orientation": "current"},
    ],
    "final": ["curated"],
    "balance_style": "false",  # of so few pairs it cannot be
    "max_steps": 4,
    "lr_scheduler_type": "constant",  # with rates that fall to 0, a step too many would not show
    "rows_per_shard": 16,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "per_device_train_batch_size": 4,
}


def arguments(output_dir: Path, **settings) -> list[str]:
    """The command line of a run of few pairs and few steps."""
    flags = ["--config", str(ROOT / "recipes/configs/dt2it_digits.yaml"), "--output_dir", str(output_dir)]
    for name, value in {**SETTINGS, **settings}.items():
        flags += [f"--{name}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return flags


def outcome(output_dir: Path) -> dict[str, Any]:
    """What has to be the same, however often a run was killed: weights, scores, ledger, figures."""
    files = [*output_dir.rglob("*.safetensors"), *output_dir.rglob("*.parquet"), output_dir / "ledger/ledger.json"]
    digests = {str(file.relative_to(output_dir)): sha256(file.read_bytes()).hexdigest() for file in sorted(files)}
    summary = json.loads((output_dir / "summary.json").read_text())
    timeless = json.dumps({name: value for name, value in summary.items() if name != "seconds"})
    left = [str(one) for one in output_dir.rglob("checkpoint-*")]
    return {**digests, "summary": json.loads(timeless.replace(str(output_dir), "OUT")), "left": left}


def start(flags: list[str], num_processes: int = 1, **environment: str) -> Run:
    """Starts a run of the recipe."""
    environment["ACCELERATE_USE_CPU"] = "true"
    return start_script(ROOT / "recipes/dt2it.py", *flags, num_processes=num_processes, **environment)
