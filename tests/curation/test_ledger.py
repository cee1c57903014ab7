"""The ledger: its state, its history, undoing, and what a person, a kill or a changed file does to it."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import trl_dt2it
from trl_dt2it.curation import CurationLedger
from trl_dt2it.curation.rules import (
    UNREADABLE,
    Decision,
    Flip,
    Keep,
    decide,
    flip_negative,
    keep_consistent,
    relabel_by_vote,
)

from .ledgers import NAMES, act, orientation


RULES = [Flip(flip_negative), Keep(keep_consistent)]


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


def test_what_others_ask_of_a_ledger(ledger):
    assert ledger.source_set is None and ledger.standing == []
    act(ledger, 1, "flip", ["flip", "drop", "keep"], source_set="abc")
    ledger.correct({"b": "keep"})
    act(ledger, 2, "flip", ["keep", "keep", "flip"])
    ledger.undo(2)
    act(ledger, 2, "filter", ["keep", "keep", "drop"])
    assert ledger.source_set == "abc" and len(ledger.rounds) == 4
    # A person has the last word, whenever it was said.
    assert [(one["stage"], ledger.is_manual(one)) for one in ledger.standing] == [
        ("flip", False),
        ("filter", False),
        ("manual", True),
    ]
    labels = ledger.labels(pa.array(["c", "b", "unknown", "a"]))
    assert labels["flipped"].tolist() == [False, False, False, True]
    assert labels["kept"].tolist() == [False, True, True, True] and labels["kept"].dtype == bool
    assert labels["is_known"].tolist() == [True, True, False, True] and not labels["has_changed"].any()
    assert ledger.labels(pa.array(["a", "c"]), 0)["kept"].tolist() == [True, True]
    assert ledger.table(ledger.standing[1], ["pair_id", "action"]).to_pydict() == {
        "pair_id": ["a", "b", "c"],
        "action": ["keep", "keep", "drop"],
    }
    assert dict(ledger.files()) == {file.name: file.read_bytes() for file in ledger.directory.iterdir()}


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
    columns = ("flipped", "kept", "strength", "round")
    found = {row["pair_id"]: tuple(row[name] for name in columns) for row in ledger.state().to_pylist()}
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
        ({"actions": ["keep"] * 2}, "Pass either `decision` or `actions`"),
        ({"pair_ids": ["a", "a"]}, "is there twice"),
        ({"pair_ids": ["a", None]}, "name is missing"),
        ({"pair_ids": ["a"]}, "There are 1 pairs and a decision about 2"),
        ({"sources": ["a"]}, "There are 2 pairs and 1 entries of `sources`"),
        ({"scores": np.zeros((2, 2, 1))}, r"0 models; it must be \(pairs, 2, models\), and `models` must name each"),
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


def test_the_inside_of_the_ledger_is_imported_by_the_ledger_alone():
    package = Path(trl_dt2it.__file__).parent
    files = [file for pattern in ("*.py", "*.pyi") for file in package.rglob(pattern)]
    texts = [file.read_text("utf-8") for file in files if file.name != "ledger.py"]
    imported = [name for text in texts for name in re.findall(r"ledger import (\([^)]*\)|.*)", text)]
    assert imported and not [names for names in imported if re.search(r"\b_\w", names)]
    # Nor does anything else touch its private methods.
    inside = {name for name in vars(CurationLedger) if name.startswith("_") and not name.startswith("__")}
    assert "_read" in inside and not [text for text in texts if re.search(rf"ledger\.({'|'.join(inside)})\b", text)]


def test_the_posterior_of_a_decision_is_kept_and_older_rounds_have_none(ledger):
    def decision(posterior):
        flip, code = np.array([True, False, False]), np.zeros(3, dtype=np.int16)
        return Decision(flip, ~flip, np.ones(3), code, ("kept",), posterior)

    ledger.append(1, "flip", pair_ids=NAMES[:3], decision=decision(None))
    assert "posterior" not in ledger.table(ledger.rounds[0]).column_names
    # A round of a release without posteriors is the same round; another posterior is another round.
    ledger.append(1, "flip", pair_ids=NAMES[:3], decision=decision(np.array([0.9, np.nan, 0.25])))
    ledger.append(2, "flip", pair_ids=NAMES[:3], decision=decision(np.array([0.9, np.nan, 0.25])))
    ledger.append(2, "flip", pair_ids=NAMES[:3], decision=decision(np.array([0.9, np.nan, 0.25])))
    with pytest.raises(ValueError, match="undo it first"):
        ledger.append(2, "flip", pair_ids=NAMES[:3], decision=decision(np.array([0.9, np.nan, 0.5])))
    assert len(ledger.rounds) == 2 and len(ledger.state()) == 3
    column = ledger.table(ledger.rounds[1])["posterior"]
    assert column.type == pa.float32() and column.to_pylist() == [np.float32(0.9), None, 0.25]
    assert ledger.history("b")[1]["posterior"] is None
