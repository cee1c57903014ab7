"""Functions of rows on the workers of a Ray cluster: the results of one process, errors and losses included."""

import os
import signal
import time
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value

from tests.rows import make_dataset, make_rows
from trl_dt2it.data import columns, decontaminate, validate
from trl_dt2it.data.contents import pair_contents, pair_ids
from trl_dt2it.scale import on_ray
from trl_dt2it.scale.cluster import run_on_workers
from trl_dt2it.utils import ENGINE


ray = pytest.importorskip("ray")
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


def count_setups(folder):
    (folder / f"{time.time_ns()}").touch()
    return 100


def add(made, part):
    return made + part


def test_actors_make_what_they_need_once(cluster, tmp_path):
    parts = run_on_workers(add, range(8), "Sums", setup=partial(count_setups, tmp_path), num_workers=2)
    assert dict(parts) == {number: 100 + number for number in range(8)}
    assert 1 <= len(list(tmp_path.iterdir())) <= 2


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


def process(table):
    return pa.table({"process": [os.getpid()] * len(table)})


def test_workers_do_the_work(cluster, rows):
    features = Features({"process": Value("int64")})
    assert os.getpid() not in columns.map_tables(rows, process, features)["process"].to_pylist()
    with alone():
        assert set(columns.map_tables(rows, process, features)["process"].to_pylist()) == {os.getpid()}
