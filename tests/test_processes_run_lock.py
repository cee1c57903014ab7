"""One run at a time in a folder: processes that hold it, are refused, are killed, and belong together."""

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest

from trl_dt2it import processes as module
from trl_dt2it.processes import RUN_VARIABLE, RunLockedError, run_lock
from trl_dt2it.utils import remove_unfinished, whole_file

from .curation.runs import arguments, start
from .processes import Run


HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(module, "LOCK_WAIT", 0.3)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)


def hold(folder: str, shard: tuple[int, int] = (0, 1)) -> None:
    """Holds a folder until there is a file `stop` in it, with a file under way."""
    with run_lock(folder, shard), whole_file(Path(folder) / "result") as part:
        part.write_text("half")
        (Path(folder) / "ready").write_text(str(os.getpid()))
        while not (Path(folder) / "stop").exists():
            time.sleep(0.01)


def hold_briefly(folder: str) -> None:
    with run_lock(folder):
        pass


def holder(folder: Path, shard: tuple[int, int] = (0, 1)) -> tuple[Run, int]:
    """A process that holds a folder, and its number."""
    run = Run(hold, str(folder), shard, **{RUN_VARIABLE: ""})
    deadline = time.monotonic() + 60
    ready = folder / "ready"
    while not (ready.is_file() and ready.read_text()) and None in run.exit_codes and time.monotonic() < deadline:
        time.sleep(0.01)
    return run, int(ready.read_text())


def refusal(folder: Path, shard: tuple[int, int] = (0, 1)) -> str:
    with pytest.raises(RunLockedError) as error, run_lock(folder, shard):
        pass
    return str(error.value)


def test_a_second_run_is_told_who_is_at_work_and_goes_on_from_one_that_was_killed(tmp_path, caplog):
    run, pid = holder(tmp_path)
    told = refusal(tmp_path)
    date = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
    assert re.fullmatch(
        rf"{tmp_path} is in use by process {pid} on {HOST} since {date} \(.*\); wait for it, stop it, or use another "
        "folder.",
        told,
    )
    assert [one.name for one in tmp_path.glob("*.part")] and not (tmp_path / "result").exists()
    assert run.kill()
    other = tmp_path / "deeper/scores.parquet.elsewhere-1-0123abcd.part"  # of a machine of which nothing is known
    other.parent.mkdir()
    other.touch()
    (tmp_path / "mine.part").touch()
    with run_lock(tmp_path):  # at once, and without what it left
        assert json.loads((tmp_path / "running.json").read_text())["pid"] == os.getpid()
        assert sorted(one.name for one in tmp_path.rglob("*.part")) == ["mine.part", other.name]
        with run_lock(tmp_path):  # the same run
            pass
        own = {RUN_VARIABLE: os.environ[RUN_VARIABLE]}
        stage = Run(hold_briefly, str(tmp_path), **own)  # and one that it has started
        assert stage.wait() == [0], stage.errors
    assert not (tmp_path / "running.json").exists() and RUN_VARIABLE not in os.environ
    # One that ends by itself leaves nothing to say.
    (tmp_path / "ready").unlink()
    run, _ = holder(tmp_path)
    (tmp_path / "stop").touch()
    assert run.wait() == [0] and (tmp_path / "result").read_text() == "half"
    with run_lock(tmp_path):
        pass


def test_of_a_run_of_another_machine_a_person_has_to_decide(tmp_path, monkeypatch):
    about = {
        "pid": 4711,
        "host": "elsewhere",
        "since": "2026-01-02T03:04:05+00:00",
        "command": "dt2it.py",
        "token": "t",
    }
    record = tmp_path / "running.json"
    record.write_text(json.dumps(about))
    told = refusal(tmp_path)
    assert told == (
        f"{tmp_path} is in use by process 4711 on elsewhere since 2026-01-02T03:04:05+00:00 (dt2it.py), and whether "
        f"it still runs cannot be told from {HOST}; if it does not, delete {record}."
    )
    assert refusal(tmp_path, (1, 4)) == told  # nor may a part of a run
    assert refusal(tmp_path) == told  # asking changes nothing
    # A job that Slurm has started anew: the same job cannot run twice.
    for job, count, is_refused in (("7", "0", True), ("8", "1", True), ("7", "1", False)):
        record.write_text(json.dumps({**about, "job": ["7", 0]}))
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        if is_refused:
            refusal(tmp_path)
        else:
            with run_lock(tmp_path):
                pass
    record.write_text(json.dumps(about))
    record.unlink()
    with run_lock(tmp_path):
        pass
    record.write_text("torn")  # by an editor, say; ours are whole
    with run_lock(tmp_path):
        pass


def test_parts_of_a_run_share_a_folder_each_once(tmp_path):
    run, pid = holder(tmp_path, (0, 4))
    with run_lock(tmp_path, (1, 4)):
        pass
    assert f"process {pid} on" in refusal(tmp_path, (0, 4))
    assert f"process {pid} on" in refusal(tmp_path)  # one that does all
    assert run.kill()
    with run_lock(tmp_path):
        assert not list(tmp_path.glob("running-*.json"))  # nobody is told of it again
    (tmp_path / "ready").unlink()
    run, pid = holder(tmp_path)
    assert f"process {pid} on" in refusal(tmp_path, (2, 4))
    assert run.kill()
    with run_lock(tmp_path, (2, 4)):
        pass


def in_two_processes(folder: str) -> None:
    from trl_dt2it.processes import wait_for_everyone
    from trl_dt2it.recipe import share_work

    state = share_work()
    with run_lock(folder):
        about = json.loads((Path(folder) / "running.json").read_text())
        (Path(folder) / f"rank-{state.process_index}").write_text(str(about["processes"]))
        wait_for_everyone()  # nobody goes before the other has looked
    state.destroy_process_group()


def test_all_processes_of_a_launch_are_one_run(tmp_path):
    run = Run(in_two_processes, str(tmp_path), num_processes=2, ACCELERATE_USE_CPU="true", **{RUN_VARIABLE: ""})
    assert run.wait() == [0, 0], run.errors[-2000:]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    with run_lock(tmp_path):
        run = Run(in_two_processes, str(tmp_path), num_processes=2, ACCELERATE_USE_CPU="true", **{RUN_VARIABLE: ""})
        assert run.wait() == [1, 1]  # none waits for the other
        assert f"is in use by process {os.getpid()} on {HOST}" in run.errors


def test_the_recipe_of_rounds_stops_at_start(tmp_path):
    out = tmp_path / "out"
    with run_lock(out):
        second = start(arguments(out), **{RUN_VARIABLE: ""})
        assert second.wait() == [1]
        assert f"RunLockedError: {out} is in use by process {os.getpid()} on {HOST} since" in second.errors
    assert {one.name for one in out.iterdir()} == {"running.lock"}  # it has touched nothing


def test_files_under_way_are_of_one_process_and_the_last_one_wins(tmp_path):
    path = tmp_path / ("long" * 60)  # with any addition too long for a name
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second and first.parent == second.parent == tmp_path
        assert HOST[:8] in first.name and f"-{os.getpid()}-" in first.name
        first.write_text("first")
        second.write_text("second")
        assert remove_unfinished(tmp_path) == 0  # their process is alive
    assert path.read_text() == "first"  # it was written out last
    with pytest.raises(ValueError, match="no"), whole_file(path) as part:
        part.write_text("third")
        raise ValueError("no")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
