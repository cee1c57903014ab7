"""Machines that share no file system: a folder that all must see is refused at start, and what each needs is made on
each, once."""

import json

from ..families import family_dir
from ..processes import start_script
from .launching import HERE


def said(tmp_path, num_processes):
    given = (tmp_path, family_dir("qwen3_vl"))
    start_script(HERE / "folders_script.py", *given, num_processes=num_processes).finish()
    return [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(num_processes)]


def test_a_folder_that_not_all_processes_see_is_refused_by_all(tmp_path):
    first, second = said(tmp_path, 2)
    assert not list(tmp_path.rglob(".shared-*"))
    for name in ("rounds", "scores", "records", "training"):
        assert first[name] == second[name]
        start = f"1 of 2 processes do not see what the first writes in {tmp_path / name / '0'}, such as process 1 on "
        assert first[name].startswith(start)
        end = f", which looks in {tmp_path / name / '1'}; pass a folder on a file system that all machines share."
        assert first[name].endswith(end)
    assert first["decided"] == second["decided"] == "The folder holds something else."


def test_what_each_machine_needs_is_made_once_on_each(tmp_path):
    assert said(tmp_path, 4) == [["made-by-0"], ["made-by-0"], ["made-by-2"], ["made-by-2"]]
