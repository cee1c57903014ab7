"""Functions of rows on the workers of a Ray cluster: the results of one process, errors and losses included."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value

from tests.pairs import model_of, processor_of
from tests.processes import ROOT
from tests.rows import make_dataset, make_rows
from trl_dt2it import RewardScorer
from trl_dt2it.data import build_mixture, columns, decontaminate, read_settings, validate, write_parquet
from trl_dt2it.data.contents import pair_contents, pair_ids
from trl_dt2it.data.prepare import prepare_part
from trl_dt2it.scale import on_ray, score_dataset
from trl_dt2it.scale.cluster import run_on_workers
from trl_dt2it.utils import ENGINE, run_parts


ray = pytest.importorskip("ray")
COUNT = 12
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes.add_node(**NODE)
    with on_ray(nodes.address):
        yield nodes
    nodes.shutdown()


@contextmanager
def alone():
    """Work in this process."""
    token = ENGINE.set(None)
    yield
    ENGINE.reset(token)


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Dataset:
    """Rows with one image and two, as bytes and as paths; some are bad, doubled or contradict others."""
    monkeypatch.setattr(columns, "_STRETCH", 7)
    made = make_rows(30, num_images=(1, 2))
    for number, row in enumerate(made[10:20]):
        for place, image in enumerate(row["images"]):
            path = tmp_path / f"{number}-{place}.png"
            path.write_bytes(image["bytes"])
            image |= {"path": str(path), "bytes": None}
    made[3]["rejected"] = made[3]["chosen"]
    made[12]["images"][0] = {"path": str(tmp_path / "missing.png"), "bytes": None}
    made += [made[4], {**made[5], "chosen": made[5]["rejected"], "rejected": made[5]["chosen"]}, made[15]]
    features = make_dataset(2).features
    return Dataset.from_list(made, features=Features({**features, "images": List(Image())}))


def test_rows_are_divided_as_in_one_process(cluster, rows, tmp_path):
    found = validate(rows, image_root=tmp_path, show=False)
    with alone():
        expected = validate(rows, image_root=tmp_path, show=False)
    for one, other in zip(found, expected, strict=True):
        assert one.features == other.features and one.with_format("arrow")[:] == other.with_format("arrow")[:]
    assert sorted(expected[1]["reason"]) == ["contradictory_pair"] * 2 + ["duplicate_pair"] * 2 + ["equal_answers"] + [
        "image_missing"
    ]
    assert found[1]["row"][:] == sorted(found[1]["row"][:])


def test_names_and_contents_are_those_of_one_process(cluster, rows, tmp_path):
    found = pair_ids(rows.select(range(10))), pair_contents(rows, image_root=tmp_path)
    with alone():
        assert found == (pair_ids(rows.select(range(10))), pair_contents(rows, image_root=tmp_path))


def test_decontamination_is_that_of_one_process(cluster, rows):
    benchmark = [
        {"question": row["prompt"][0]["content"][-1]["text"], "images": row["images"]} for row in make_rows(3)
    ]
    found = decontaminate(rows.select(range(10)), {"mine": benchmark})
    with alone():
        expected = decontaminate(rows.select(range(10)), {"mine": benchmark})
    assert [len(one) for one in found] == [len(one) for one in expected] and len(found[1])
    assert found[1].remove_columns("images")[:] == expected[1].remove_columns("images")[:]


def killed_once(folder, part):
    """Kills its worker the first time that it is given part 3."""
    mark = folder / "killed"
    if part == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return part * part


def test_the_work_of_a_killed_worker_is_done_by_another(cluster, tmp_path):
    found = dict(run_on_workers(partial(killed_once, tmp_path), range(6), "Squares"))
    assert found == {number: number * number for number in range(6)} and (tmp_path / "killed").exists()


def fail_at_two(part):
    if part == 2:
        raise ValueError("part 2 is bad; drop it.")
    return part


def test_an_error_is_the_functions_own(cluster):
    with pytest.raises(ValueError, match=r"^part 2 is bad; drop it\.$"):
        list(run_on_workers(fail_at_two, range(4), "Numbers"))
    assert list(run_on_workers(fail_at_two, [], "Nothing")) == []
    with pytest.raises(ValueError, match=r"^part 2 is bad; drop it\.$"):
        list(run_on_workers(add, range(2), "Numbers", setup=partial(fail_at_two, 2)))


def count_setups(folder):
    (folder / f"{time.time_ns()}").touch()
    return 100


def add(made, part):
    return made + part


def test_actors_make_what_they_need_once(cluster, tmp_path):
    parts = run_on_workers(add, range(8), "Sums", setup=partial(count_setups, tmp_path))
    assert dict(parts) == {number: 100 + number for number in range(8)}
    assert 1 <= len(list(tmp_path.iterdir())) <= 2


def process(table):
    return pa.table({"process": [os.getpid()] * len(table)})


def test_workers_do_the_work(cluster, rows):
    features = Features({"process": Value("int64")})
    assert os.getpid() not in columns.map_tables(rows, process, features)["process"].to_pylist()
    with alone():
        assert set(columns.map_tables(rows, process, features)["process"].to_pylist()) == {os.getpid()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model_of("qwen3_vl").save_pretrained(directory)
    processor_of("qwen3_vl").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def rewards(model) -> np.ndarray:
    return RewardScorer.from_pretrained(model).score_pairs(make_dataset(COUNT))


def rewards_of(scored: Dataset) -> np.ndarray:
    return np.stack([scored["chosen_reward"][:], scored["rejected_reward"][:]], axis=1)


def test_rewards_are_those_of_one_process(cluster, model, rewards, tmp_path):
    rows = make_dataset(COUNT)
    scored = score_dataset(model, rows, tmp_path / "pairs", rows_per_shard=5)
    np.testing.assert_allclose(rewards_of(scored), rewards, atol=1e-5)


def test_a_killed_driver_goes_on_where_it_was(cluster, model, rewards, tmp_path):
    write_parquet(make_dataset(COUNT), tmp_path / "rows.parquet")
    output = tmp_path / "scores"
    script = [sys.executable, "-m", "tests.scale.scoring_script"]
    driver = subprocess.Popen([*script, model, tmp_path / "rows.parquet", output], cwd=ROOT, start_new_session=True)
    while not list(output.glob("scores-*.parquet")):
        assert driver.poll() is None
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    made = {file: file.stat().st_mtime_ns for file in output.glob("scores-*.parquet")}
    assert 0 < len(made) < COUNT // 2
    scored = score_dataset(model, make_dataset(COUNT), output, rows_per_shard=2)
    np.testing.assert_allclose(rewards_of(scored), rewards, atol=1e-5)
    assert {file: file.stat().st_mtime_ns for file in made} == made


def slow(folder, part):
    time.sleep(0.5)
    (folder / f"{part}-{time.time_ns()}").touch()
    return part


def test_the_work_of_a_lost_machine_is_done_by_others(cluster, tmp_path):
    other = cluster.add_node(**NODE)
    parts = run_on_workers(partial(slow, tmp_path), range(12), "Numbers")
    found = dict([next(parts)])
    cluster.remove_node(other)
    assert found | dict(parts) == {number: number for number in range(12)}


def prepared(folder, output) -> tuple[dict[str, bytes], dict]:
    """Prepare a mixture as the recipe does, and return its files and its report."""
    load = {"name": "trl", "path_or_id": str(folder / "rows.parquet"), "num_shards": 3}
    settings = read_settings({"own": load, "other": {**load, "max_rows": 5}})
    todo = [(key, shard) for key in settings for shard in range(3)]
    for _ in run_parts(partial(prepare_part, output, settings), todo, "Preparing"):
        pass
    benchmark = [{"question": row["prompt"][0]["content"][-1]["text"], "images": row["images"]} for row in made_rows()]
    report = build_mixture(output, settings, benchmarks={"mine": benchmark[:1]}, test_size=0.2, rows_per_file=5)
    return {file.name: file.read_bytes() for file in sorted((output / "mixture").iterdir())}, report


def made_rows() -> list[dict]:
    rows = make_rows(21, num_images=(1, 2))
    return [*rows, rows[2], {**rows[3], "chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]}]


def test_a_mixture_is_that_of_one_process(cluster, tmp_path):
    features = make_dataset(2).features
    write_parquet(Dataset.from_list(made_rows(), features=features), tmp_path / "rows.parquet")
    files, report = prepared(tmp_path, tmp_path / "ray")
    with alone():
        expected = prepared(tmp_path, tmp_path / "one")
    assert report["sources"]["own"]["duplicates"] == 3 and report["sources"]["own"]["contaminated"] == 1
    assert report["sources"] == expected[1]["sources"]
    assert files == expected[0] and len(files) >= 4
