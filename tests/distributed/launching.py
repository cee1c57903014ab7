"""Trainings on one process or on several, and what came out."""

import json
from pathlib import Path

from ..families import family_dir
from ..processes import start_script


HERE = Path(__file__).parent


def train(output: Path, num_processes: int, per_device: int, family: str, **options) -> dict:
    given = (output, family_dir(family), per_device, json.dumps(options))
    start_script(HERE / "train_script.py", *given, num_processes=num_processes).finish()
    return json.loads((output / "result.json").read_text())
