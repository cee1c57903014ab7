"""Evaluation counts every pair once, whatever the set, on one process and on two, with and without workers."""

import json

import pytest

from ..families import family_dir
from ..processes import start_script
from .evaluation_script import SETTINGS, write_files
from .launching import HERE


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_pair_counts_once_and_in_order(num_processes, tmp_path):
    write_files(tmp_path)
    settings = [name for name in SETTINGS if num_processes > 1 or name != "splitting"]
    given = (tmp_path, family_dir("qwen3_vl"), json.dumps(settings))
    start_script(HERE / "evaluation_script.py", *given, num_processes=num_processes).finish()
    results = json.loads((tmp_path / f"result-{num_processes}.json").read_text())
    assert len(results) >= 12 * len(settings)
    for name, differences in results.items():
        for value, difference in differences.items():
            assert difference < 1e-5, (name, value, difference)
