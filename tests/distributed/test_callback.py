"""Curation between epochs on one process and on two: the same decisions, and runs that survive being killed."""

from collections import Counter

import numpy as np
import pytest

from ..families import family_dir
from .callback_runs import kill_runs


KILLS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came out on one process, and on two."""
    found = []
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"world-{world_size}")
        found.append(kill_runs(folder, str(family_dir("qwen3_vl")), world_size, KILLS, seed=0))
    return found


@pytest.mark.parametrize("place", [0, 1], ids=["one-process", "two-processes"])
def test_killed_and_resumed_runs_equal_the_undisturbed_one_bitwise(results, place):
    kills = results[place]["kills"]
    assert len(kills) == KILLS
    for kill in kills:
        assert kill["same_weights"] and kill["same_ledger"] and kill["same_log"], kill
    # The second one falls into the second half of the run, with a checkpoint to go on from.
    assert kills[1]["resumed_from"] > 0


def test_two_processes_decide_as_one(results):
    """Before the first step the models are the same, and so is all that is decided, to the last bit of each score."""
    one, two = results
    assert one["first_round"] == two["first_round"]
    first = [next(entry for entry in result["log"] if "curation/kept" in entry) for result in results]
    assert first[0] == first[1]
    assert first[0]["curation/flipped"] > 0 and first[0]["curation/dropped"] == 2
    assert [sum("curation/kept" in entry for entry in result["log"]) for result in results] == [4, 4]


def test_processes_share_out_the_pairs_that_are_kept(results):
    """Each step of the first epoch has the same four pairs, two for each process."""
    one, two = results
    whole = np.array(one["drawn"][0]).reshape(-1, 4)
    halves = [np.array(rows).reshape(-1, 2) for rows in two["drawn"]]
    assert len(whole) == len(halves[0]) == len(halves[1]) == one["steps"] == two["steps"] == 24
    together = np.concatenate(halves, axis=1)
    assert np.sort(together[:6], axis=1).tolist() == np.sort(whole[:6], axis=1).tolist()
    counts = Counter(together[:6].ravel().tolist())
    # 22 of 24 are kept; two of them fill the epoch.
    assert len(counts) == 22 and sorted(counts.values()) == [1] * 20 + [2] * 2
