"""The ledger: state, history and undoing; rows that are swapped and left out; and names that never collide."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Image, List, concatenate_datasets, load_dataset, load_from_disk

from trl_dt2it.curation import CurationLedger, pair_ids
from trl_dt2it.curation.pair_identity import source_fingerprint
from trl_dt2it.curation.rules import (
    UNREADABLE,
    Flip,
    Keep,
    decide,
    flip_negative,
    keep_consistent,
    relabel_by_vote,
)
from trl_dt2it.data.encoded import leave_images_encoded
from trl_dt2it.data.swapping import partner_column, swap_pairs, with_columns
from trl_dt2it.demo.digits import flip_preferences, make_digits, make_digits_t2i


NAMES = ["a", "b", "c", "d"]
RULES = [Flip(flip_negative), Keep(keep_consistent)]


def act(ledger, round, stage, actions, names=NAMES, **kwargs):
    ledger.append(round, stage, pair_ids=names[: len(actions)], actions=actions, **kwargs)


def orientation(ledger, after=None):
    """For each pair `+` or `-` for its orientation, in brackets if it is dropped."""
    rows = sorted(ledger.state(after).to_pylist(), key=lambda row: row["pair_id"])
    marks = ("-" if row["flipped"] else "+" for row in rows)
    return " ".join(mark if row["kept"] else f"({mark})" for mark, row in zip(marks, rows, strict=True))


@pytest.fixture
def ledger(tmp_path):
    return CurationLedger(tmp_path / "ledger")


def test_the_last_word_counts_and_flips_add_up(ledger):
    assert len(ledger.state()) == 0
    act(ledger, 1, "flip", ["keep", "flip", "drop", "flip"])
    assert orientation(ledger) == "+ - (+) -"
    act(ledger, 2, "flip", ["flip", "flip", "keep"])
    assert orientation(ledger) == "- + + -"
    # Seen from the source set, a flip does not add up.
    act(ledger, 3, "flip", ["flip", "flip", "flip", "keep"], orientation="source")
    assert orientation(ledger) == "- - - +"
    assert [orientation(ledger, after) for after in range(4)] == ["", "+ - (+) -", "- + + -", "- - - +"]
    assert ledger.state()["round"].to_pylist() == [3] * 4
    assert ledger.state(2)["round"].to_pylist() == [2, 2, 2, 1]


def test_the_state_is_that_of_a_plain_loop(ledger):
    rng = np.random.default_rng(0)
    expected = {}
    for round in range(1, 9):
        # Some pairs, in any order, some of them new.
        names = [f"pair-{index}" for index in rng.permutation(40 * round)[: 30 * round]]
        decision = decide(rng.normal(0.5, 1, len(names)), RULES, min_kept=0)
        stage = "manual" if round == 5 else "round"
        ledger.append(round, stage, pair_ids=names, decision=decision)
        for name, flip, keep, strength in zip(names, decision.flip, decision.keep, decision.strength, strict=True):
            flipped, *_, by_hand = expected.get(name, (False, True, None, 0, False))
            if not by_hand:
                expected[name] = (bool(flipped ^ flip), bool(keep), strength, round, round == 5)
    found = {row["pair_id"]: tuple(row.values())[1:5] for row in ledger.state().to_pylist()}
    assert found == {name: value[:4] for name, value in expected.items()}


def test_undone_rounds_do_not_count_and_come_back(ledger):
    act(ledger, 1, "flip", ["flip", "flip", "keep"])
    act(ledger, 1, "filter", ["keep", "drop", "keep"])
    act(ledger, 2, "flip", ["keep", "keep", "flip"])
    assert orientation(ledger) == "- - -"
    ledger.undo(2)
    assert orientation(ledger) == "- (-) +"
    ledger.undo(1, "filter")
    assert orientation(ledger) == "- - +"
    ledger.undo(1)
    assert orientation(ledger) == ""
    ledger.redo(2)
    # It still says what it said: that a and b stand as they stood then, flipped.
    assert orientation(ledger) == "- - -"
    ledger.undo(2)
    ledger.redo(1)
    assert orientation(ledger) == "- (-) +"
    assert len(ledger.rounds) == 3 and len(list(ledger.directory.glob("*.parquet"))) == 3
    for call in (lambda: ledger.undo(2), lambda: ledger.redo(1), lambda: ledger.undo(7)):
        with pytest.raises(ValueError, match="Nothing of round"):
            call()
    assert [row["undone"] for row in ledger.history("a")] == [False, False, True]


def test_another_attempt_takes_the_place_of_an_undone_round(ledger):
    act(ledger, 1, "flip", ["flip", "keep"])
    with pytest.raises(
        ValueError, match=re.escape("has another 'flip' in round 1; undo it first (`undo(1, 'flip')`)")
    ):
        act(ledger, 1, "flip", ["keep", "keep"])
    ledger.undo(1)
    act(ledger, 1, "flip", ["keep", "drop"])
    assert orientation(ledger) == "+ (+)"
    with pytest.raises(ValueError, match="there is no redo"):
        ledger.redo(1)  # the first attempt would contradict the one that stands
    ledger.undo(1)
    ledger.redo(1)
    assert orientation(ledger) == "+ (+)"  # of two attempts the last


def test_the_same_once_more_changes_nothing(ledger):
    rng = np.random.default_rng(0)
    steps = []
    for round in (1, 2, 3):
        scores = rng.normal(size=(4, 2, 2)).astype(np.float32)
        scores[round, 0, 1] = np.nan
        decision = decide(scores[:, 0, 0] - scores[:, 1, 0], RULES)
        votes = np.array([[[1, -1]], [[0, UNREADABLE]], [[1, 1]], [[-1, -1]]], dtype=np.int8)
        steps.append((round, "epoch", {"decision": decision, "scores": scores, "votes": votes, "models": ["m", "n"]}))

    def run():
        for round, stage, content in steps:
            ledger.append(round, stage, pair_ids=NAMES, settings={"rules": ("flip", 0.5)}, **content)

    run()
    before = {path.name: path.read_bytes() for path in ledger.directory.iterdir()}
    run()  # as a run that died after its last round, and starts at the first
    assert {path.name: path.read_bytes() for path in ledger.directory.iterdir()} == before
    # Rounds that begin in another folder are the same, bit for bit.
    second = CurationLedger(ledger.directory.with_name("second"))
    for round, stage, content in steps:
        second.append(round, stage, pair_ids=NAMES, settings={"rules": ["flip", 0.5]}, **content)
    assert {path.name: path.read_bytes() for path in second.directory.iterdir()} == before
    with pytest.raises(ValueError, match="another 'epoch' in round 2"):
        ledger.append(2, "epoch", pair_ids=NAMES, settings={"rules": ["flip", 0.6]}, **steps[1][2])


def test_a_person_has_the_last_word(ledger):
    with pytest.raises(ValueError, match="1 of 1 pairs are not in the ledger, a the first"):
        ledger.correct({"a": "keep"})
    act(ledger, 1, "flip", ["keep", "flip", "drop", "keep"], strength=[1.0, 2.0, -3.0, 4.0])
    ledger.correct({"b": "flip", "c": "keep", "a": "flip"})
    assert orientation(ledger) == "- + + +"
    # What is known of the strength turns with the pair.
    strength = dict(zip(*(ledger.state()[name].to_pylist() for name in ("pair_id", "strength")), strict=True))
    assert strength == {"a": -1.0, "b": -2.0, "c": -3.0, "d": 4.0}
    act(ledger, 2, "flip", ["drop"] * 4)
    assert orientation(ledger) == "- + + (+)"
    ledger.correct({"b": "drop", "d": "keep"})
    ledger.correct({"b": "keep"})
    assert orientation(ledger) == "- + + +"
    stages = [(entry["round"], entry["stage"]) for entry in ledger.rounds]
    assert stages == [(1, "flip"), (1, "manual"), (2, "flip"), (2, "manual"), (2, "manual-2")]
    ledger.undo(1, "manual")
    ledger.undo(2, "manual-2")
    # Round 2 dropped a as it stood then, flipped.
    assert orientation(ledger) == "(-) (+) (+) +"
    assert ledger.history("b")[-1]["reason"] == "decided by a person"
    for bad, message in (({}, "is empty"), ({"e": "keep"}, "e the first"), ({"a": "swap"}, "is 'swap'; give one of")):
        with pytest.raises(ValueError, match=message):
            ledger.correct(bad)


def test_history_summary_and_difference(ledger):
    scores = np.array([[[1, 10], [3, 20]], [[2, np.nan], [0, 5]]])
    decision = decide([-2.0, 2.0], [Flip(flip_negative)])
    ledger.append(
        1,
        "flip",
        pair_ids=["a", "b"],
        sources=["one", None],
        scores=scores,
        models=["small", "large"],
        decision=decision,
    )
    votes = np.array([[[1, 1], [0, UNREADABLE]], [[-1, -1], [-1, -1]]])
    ledger.append(
        1, "judge", pair_ids=["b", "a"], votes=votes, sources=["two", "one"], decision=relabel_by_vote(votes)
    )
    first, second = ledger.history("a")
    assert first == {
        "round": 1,
        "stage": "flip",
        "undone": False,
        "pair_id": "a",
        "source": "one",
        "was_flipped": False,
        "flipped": True,
        "action": "flip",
        "reason": "flipped by flip_negative",
        "strength": 2.0,
        "scores": {"small": (1.0, 3.0), "large": (10.0, 20.0)},
        "votes": [],
    }
    assert second["votes"] == [(-1, -1), (-1, -1)] and second["scores"] == {}
    assert (second["was_flipped"], second["flipped"], second["action"]) == (True, False, "flip")
    first, second = ledger.history("b")
    assert first["scores"]["large"] == (None, 5.0)
    assert second["votes"] == [(1, 1), (0, None)] and second["reason"] == "vote unreadable"
    assert second["strength"] is None and ledger.history("z") == []

    summary = {tuple(row.values())[:4]: tuple(row.values())[4:] for row in ledger.summary().to_pylist()}
    assert summary == {
        (1, "flip", False, "one"): (1, 0, 1, 0, 2.0),
        (1, "flip", False, None): (1, 1, 0, 0, 2.0),
        (1, "judge", False, "one"): (1, 0, 1, 0, 1.0),
        (1, "judge", False, "two"): (1, 0, 0, 1, None),
    }
    act(ledger, 2, "flip", ["flip", "keep", "drop"])
    assert {tuple(row.values()) for row in ledger.diff(1, 2).to_pylist()} == {
        ("a", False, True, True, True),
        ("b", False, False, False, True),
        ("c", False, True, False, False),
    }
    assert len(ledger.diff(2, 2)) == 0
    assert set(ledger.diff(2, 0)["pair_id"].to_pylist()) == {"a", "c"}
    ledger.undo(2)
    assert len(ledger.diff(1, 2)) == 0
    assert CurationLedger(ledger.directory.with_name("empty")).summary().num_rows == 0


def test_a_changed_or_missing_file_is_named(ledger):
    act(ledger, 1, "flip", ["flip", "keep"])
    act(ledger, 2, "flip", ["flip", "keep"])
    path = ledger.directory / "round-00001-flip.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"!" + content[101:])
    with pytest.raises(ValueError, match="round-00001-flip.parquet is not what the ledger wrote"):
        CurationLedger(ledger.directory)
    path.unlink()
    with pytest.raises(ValueError, match="round-00001-flip.parquet is missing"):
        CurationLedger(ledger.directory)
    with pytest.raises(ValueError, match="round-00001-flip.parquet is missing"):
        ledger.state()
    path.write_bytes(content)
    assert orientation(CurationLedger(ledger.directory)) == "+ +"
    record = ledger.directory / "ledger.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "version": 2}))
    with pytest.raises(ValueError, match="has version 2; this release reads version 1"):
        CurationLedger(ledger.directory)


def test_a_round_file_of_a_killed_run_is_written_anew(ledger):
    # Killed between the table and `ledger.json`, or within the table.
    for name in ("round-00001-flip.parquet", "round-00001-flip.parquet.part", "ledger.json.part"):
        (ledger.directory / name).write_bytes(b"half")
    again = CurationLedger(ledger.directory)
    assert len(again.state()) == 0
    act(again, 1, "flip", ["flip"])
    assert orientation(CurationLedger(ledger.directory)) == "-"


def test_misuse_is_named(ledger):
    decision = decide([1.0, -1.0], [])
    for kwargs, message in (
        ({"round": 0}, "Round 0, stage 'flip': give a number from 1"),
        ({"stage": "../flip"}, "give a number from 1, and lower-case"),
        ({"actions": ["keep"] * 2}, "Give either `decision` or `actions`"),
        ({"pair_ids": ["a", "a"]}, "is there twice"),
        ({"pair_ids": ["a", None]}, "name is missing"),
        ({"pair_ids": ["a"]}, "There are 1 pairs and a decision about 2"),
        ({"sources": ["a"]}, "There are 2 pairs and 1 entries of `sources`"),
        ({"scores": np.zeros((2, 2, 1))}, "for 2 pairs and 0 models"),
        ({"votes": np.zeros((2, 2))}, r"`votes` has shape \(2, 2\)"),
        ({"orientation": "now"}, "`orientation` is 'now'"),
    ):
        given = {"round": 1, "stage": "flip", "pair_ids": ["a", "b"], "decision": decision, **kwargs}
        with pytest.raises(ValueError, match=message):
            ledger.append(given.pop("round"), given.pop("stage"), **given)
    assert ledger.rounds == []
    act(ledger, 2, "flip", ["keep"], source_set="0123")
    with pytest.raises(ValueError, match="Round 1 comes after round 2"):
        act(ledger, 1, "flip", ["keep"])
    with pytest.raises(ValueError, match="belongs to another source set"):
        act(ledger, 3, "flip", ["keep"], source_set="4567")


def content(dataset, *, without=("pair_id", "curation_flipped")):
    """Rows with undecoded images."""
    rows = leave_images_encoded(dataset).to_list()
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def as_selected(rows, tmp_path):
    return concatenate_datasets([rows.select([0, 0]), rows]).select(range(2, len(rows) + 2))


def as_shuffled(rows, tmp_path):
    backwards = rows.select(range(len(rows) - 1, -1, -1)).flatten_indices()
    return backwards.select(np.arange(len(rows))[::-1])


def as_file(rows, tmp_path):
    rows.save_to_disk(tmp_path / "rows")
    return load_from_disk(tmp_path / "rows")


def as_parquet(rows, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    files = str(tmp_path / "rows.parquet")
    return load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("form", [lambda rows, _: rows, as_selected, as_shuffled, as_file, as_parquet])
@pytest.mark.parametrize("make", [make_digits, make_digits_t2i])
def test_flipped_rows_are_swapped_and_dropped_ones_left_out(ledger, tmp_path, make, form):
    clean = make("train", 60, num_digits=(1, 2))
    noisy = flip_preferences(clean, 0.3)
    rows = form(noisy.remove_columns(["is_flipped", "true_strength"]), tmp_path)
    wrong = np.array(noisy["is_flipped"][:])
    drop = np.arange(60) % 7 == 3
    actions = np.where(drop, "drop", np.where(wrong, "flip", "keep")).tolist()
    ledger.append(1, "flip", pair_ids=pair_ids(rows), actions=actions, strength=np.arange(60.0) - 5)
    curated = ledger.apply(rows)
    # Curation with the truth undoes the planted mistakes, byte for byte.
    assert content(curated) == content(
        clean.remove_columns(["is_flipped", "true_strength"]).select(np.flatnonzero(~drop))
    )
    assert curated["pair_id"][:] == np.array(clean["pair_id"][:])[~drop].tolist()
    assert curated["curation_flipped"][:] == wrong[~drop].tolist()
    kept = {name: feature for name, feature in curated.features.items() if name != "curation_flipped"}
    assert kept == rows.features
    assert curated[0].keys() >= rows[0].keys()  # images decode
    # Once more, and a later round on what the earlier one made.
    assert content(ledger.apply(curated), without=()) == content(curated, without=())
    ledger.append(2, "flip", pair_ids=pair_ids(curated), actions=["flip"] * len(curated))
    expected = swap_pairs(curated, np.ones(len(curated), dtype=bool))
    assert content(ledger.apply(curated)) == content(ledger.apply(rows)) == content(expected)
    ledger.undo(2)
    ledger.undo(1)
    assert content(ledger.apply(rows), without=()) == content(
        with_columns(rows, {"curation_flipped": np.zeros(60, dtype=bool)}), without=()
    )
    ledger.redo(1)
    assert ledger.apply(rows, refresh_strength=True)["strength"][:] == [
        float(max(value - 5, 0)) for value in np.flatnonzero(~drop)
    ]


def test_names_outlive_flips_and_orders_of_rows_without_pair_id(ledger):
    rows = make_digits("train", 30).remove_columns("pair_id")
    names = pair_ids(rows)
    ledger.append(1, "flip", pair_ids=names, actions=["flip"] * 10 + ["keep"] * 20)
    curated = ledger.apply(rows)
    assert pair_ids(curated).equals(names)
    order = np.random.default_rng(0).permutation(30)
    assert pair_ids(curated.select(order)).to_pylist() == [names[int(row)].as_py() for row in order]
    # A swapped row without the column would have another name.
    assert pair_ids(curated.remove_columns("pair_id")).to_pylist()[:10] != names.to_pylist()[:10]
    ledger.append(2, "flip", pair_ids=pair_ids(curated), actions=["flip"] * 30)
    assert content(ledger.apply(curated)) == content(ledger.apply(rows))


def test_rows_that_the_ledger_does_not_know_stay(ledger):
    rows = make_digits("train", 20)
    act(ledger, 1, "flip", ["drop", "flip"], names=rows["pair_id"][:5], strength=[1.0, 2.0])
    curated = ledger.apply(rows, refresh_strength=True)
    assert content(curated)[1:] == content(rows)[2:]
    assert curated["strength"][:] == [2.0, *rows["strength"][2:]]
    assert ledger.apply(rows.select([])).num_rows == 0
    with pytest.raises(ValueError, match="speaks of 2 pairs and of none of these 5 rows, 'digits-train-7-000000'"):
        ledger.apply(make_digits("train", 5, seed=7))
    text = Dataset.from_dict({"pair_id": rows["pair_id"][:3], "text": ["x"] * 3})
    with pytest.raises(ValueError, match="no `chosen` and `rejected` among"):
        ledger.apply(text)


def message(role, *content):
    return [{"role": role, "content": list(content)}]


def row(images, question="q", chosen="good", **extra):
    blocks = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    sides = {"chosen": message("assistant", {"type": "text", "text": chosen})}
    sides["rejected"] = message("assistant", {"type": "text", "text": "bad"})
    pictures = [{"bytes": image, "path": None} for image in images]
    return {"prompt": message("user", *blocks), **sides, "images": pictures, **extra}


def test_no_two_rows_have_the_same_name():
    contents = [[b"a"], [b"a", b"b"], [b"b", b"a"], [b"a", b"b", b"c"], [], [b"ab"]]
    given = [row(images) for images in contents] + [row([b"a"], "other"), row([b"a"], chosen="best"), row([b"a"])] * 2
    dataset = Dataset.from_list(given).cast_column("images", List(Image()))  # none of the images decodes
    names = pair_ids(dataset).to_pylist()
    assert len(set(names)) == len(names)
    assert [name.partition("#")[2] for name in names] == ["", "", "", "", "", "", "", "", "2", "2", "2", "3"]
    assert names[8] == f"{names[0]}#2" and names[11] == f"{names[0]}#3"
    # The same whatever the rest of the row, the order of columns, and where the rows are.
    other = dataset.add_column("source", ["x"] * len(dataset)).select(range(len(dataset)))
    assert pair_ids(other, num_proc=2).to_pylist() == names
    assert source_fingerprint(pair_ids(other)) == source_fingerprint(pa.array(names))
    assert source_fingerprint(pa.array(names[:-1])) != source_fingerprint(pa.array(names))


def test_names_of_the_rows_come_first():
    given = ["a", "a", "a#2", "a", "", None, "b", "a#2", None]
    dataset = Dataset.from_list([row([], str(place % 8), pair_id=name) for place, name in enumerate(given)])
    names = pair_ids(dataset).to_pylist()
    assert names[:4] == ["a", "a#3", "a#2", "a#4"] and names[6:8] == ["b", "a#2#2"]
    assert len(set(names)) == 9 and all(re.fullmatch(r"[0-9a-f]{64}", names[place]) for place in (4, 5, 8))
    numbers = Dataset.from_dict({"pair_id": [7, 8, 7]})
    assert pair_ids(numbers).to_pylist() == ["7", "8", "7#2"]
    plain = Dataset.from_dict({"prompt": ["q", "q"], "chosen": ["x", "y"], "rejected": ["z", "z"]})
    assert len(set(pair_ids(plain).to_pylist())) == 2
    assert pair_ids(plain.select([])).to_pylist() == []
    with pytest.raises(ValueError, match="2 of 2 rows have no `pair_id`, and there is no column `chosen`"):
        pair_ids(make_digits_t2i("train", 2).remove_columns("pair_id"))


def test_which_columns_change_places():
    columns = ["chosen", "rejected", "style_chosen", "style_rejected", "images", "chosen_ids", "chosen_rejected_gap"]
    found = {name: partner_column(name, columns) for name in columns}
    assert found == {
        "chosen": "rejected",
        "rejected": "chosen",
        "style_chosen": "style_rejected",
        "style_rejected": "style_chosen",
        "images": None,
        "chosen_ids": None,
        "chosen_rejected_gap": None,
    }


def test_swapping_copies_no_image(tmp_path):
    rows = as_file(make_digits("train", 400, num_digits=(4,)), tmp_path)
    before = pa.total_allocated_bytes()
    swapped = swap_pairs(with_columns(rows, {"pair_id": pa.array(rows["pair_id"][:])}), np.arange(400) % 2 == 0)
    assert len(swapped) == 400
    images = rows.data["images"].nbytes
    assert pa.total_allocated_bytes() - before < images / 4
    twice = rows.select([3, 3, 5])
    tagged = with_columns(twice, {"tag": np.array([1, 2, 3])})
    assert tagged["tag"][:] == [1, 2, 3] and content(tagged.remove_columns("tag")) == content(twice)
    assert tagged.features["images"] == rows.features["images"]
    with pytest.raises(ValueError, match="`chosen` and `rejected` hold different types"):
        swap_pairs(Dataset.from_dict({"chosen": ["a"], "rejected": [1]}), [True])
    with pytest.raises(ValueError, match=r"`swapped` has shape \(2,\) for 400 rows"):
        swap_pairs(rows, [True, False])
