"""Trainings with the callback that are resumed, and the ledger that they write: as if undisturbed, bit for bit."""

import json
from collections import UserDict
from copy import deepcopy
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from trl_dt2it.curation import CurationLedger, Flip, Keep, decide, flip_negative, keep_consistent
from trl_dt2it.curation.callback import add_round, describe

from .trainings import (
    BY_TOKENS,
    RULES,
    Known,
    N,
    assert_same_weights,
    callback_of,
    data,
    keep_all,
    log_of,
    rounds_of,
    trained,
    without_tokens,
)


# ----------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("args", "curation"),
    [
        ({}, {"refresh_strength": True}),
        (BY_TOKENS, {}),
        ({"gradient_accumulation_steps": 2}, {"folds": 3, "momentum": 0.3}),
    ],
    ids=["random", "tokens", "folds"],
)
def test_resumed_runs_equal_the_undisturbed_one_bitwise(args, curation, tmp_path):
    """From a checkpoint within an epoch, from one of an epoch's last step, and from one before the first round."""
    args = {**args, "save_strategy": "steps", "save_steps": 1}
    curation = {"rules": RULES, "ledger": tmp_path / "ledger", **curation}
    whole = trained(tmp_path / "run", args=args, lora=True, **curation)
    per_epoch = whole.state.max_steps // 3
    ledger = contents(tmp_path / "ledger")
    assert len(rounds_of(whole)) == 2 and per_epoch >= 2
    for step in (1, per_epoch, per_epoch + 1, 2 * per_epoch):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        resumed = trained(tmp_path / "run", args=args, lora=True, resume=checkpoint, **curation)
        assert without_tokens(log_of(resumed)) == without_tokens(log_of(whole)), step
        assert rounds_of(resumed) == rounds_of(whole), step
        assert_same_weights(resumed, whole)
        assert contents(tmp_path / "ledger") == ledger, step


def contents(folder) -> dict:
    """What a ledger says, in its state and in each of its rounds."""
    ledger = CurationLedger(folder)
    history = {pair: ledger.history(pair) for pair in data()["pair_id"]}
    return {"state": ledger.state().to_pylist(), "history": history}


def test_a_checkpoint_is_not_whole_without_its_curation(tmp_path):
    """The state is there before the file that is written last, and a round is not done again that it holds."""
    scorer = Known([1.0] * N)
    args = {"save_strategy": "epoch", "save_total_limit": 1}
    trained(tmp_path, args=args, scorer=scorer, rules=[Keep(keep_all)])
    checkpoint = tmp_path / "checkpoint-18"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [checkpoint.name]
    for name in ("curation_state.json", "curation_state.safetensors"):
        assert (checkpoint / name).stat().st_mtime_ns <= (checkpoint / "trainer_state.json").stat().st_mtime_ns
    record = json.loads((checkpoint / "curation_state.json").read_text())
    assert (record["round"], record["last_epoch"], record["seed"]) == (2, 2, 42)
    resumed = Known([1.0] * N)
    trained(tmp_path, args=args, scorer=resumed, rules=[Keep(keep_all)], resume=checkpoint)
    assert resumed.asked == []


def run_and_resume(tmp_path, dataset=None, before=None, after=None):
    args = {"save_strategy": "steps", "save_steps": 8}
    before = {"scorer": Known([1.0] * N), "rules": [Flip(flip_negative)], **(before or {})}
    trained(tmp_path, args=args, **before)
    after = {**before, **after} if after is not None else {}
    trained(tmp_path, dataset, args=args, resume=tmp_path / "checkpoint-8", **after)


def test_rules_are_written_by_names_that_no_move_of_a_module_changes(tmp_path):
    """Rules of the package have plain names, and a rule of the user's has its module; a run resumes by them."""
    rules = [Flip(partial(flip_negative, margin=0.5)), Keep(keep_consistent), Keep(keep_all)]
    options = {"args": {"save_strategy": "steps", "save_steps": 8}, "rules": rules, "ledger": tmp_path / "ledger"}
    scorer = Known([1.0] * N)
    whole = trained(tmp_path, scorer=scorer, **options)
    for file in (tmp_path / "checkpoint-8" / "curation_state.json", tmp_path / "ledger" / "ledger.json"):
        text = file.read_text()
        assert "trl_dt2it." not in text
        names = ["flip_negative", "keep_consistent", f"{keep_all.__module__}.keep_all", "Flip", "Keep"]
        assert all(json.dumps(name) in text for name in names)
    resumed = trained(tmp_path, scorer=Known([1.0] * N), resume=tmp_path / "checkpoint-8", **options)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 2}, "made with `every` 1, which now is 2; set it back, or start anew"),
        ({"rules": [Flip(partial(flip_negative, margin=0.5))]}, "made with `rules` .*0.5"),
        ({"momentum": 0.0}, "made with `momentum` 0.5, which now is 0.0"),
        ({"scorer": None}, 'made with `scorer` "Known", which now is null'),
    ],
)
def test_other_settings_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_and_resume(tmp_path, after=change)


def flip_below(strength, options):
    return strength < options["at"]


def test_a_changed_option_inside_a_dict_is_refused(tmp_path):
    before, after = (
        {"rules": [Flip(partial(flip_below, options={"at": np.float32(at), "of": {"a"}, "file": Path("a.txt")}))]}
        for at in (0.5, 0.25)
    )
    with pytest.raises(ValueError, match='made with `rules` .*"at": 0.5.*, which now is .*"at": 0.25'):
        run_and_resume(tmp_path, before=before, after=after)


class Side(Enum):
    LEFT, RIGHT = 1, 2


@pytest.mark.parametrize(
    "values",
    [
        ({"a": 1}, {"a": 2}, {"b": 1}, {"a": {"b": 1}}, {1: 1}, {"1": 1}, {}, UserDict(c=1)),
        ({1, 2}, {1, 3}, frozenset([1]), set()),
        (np.int64(1), np.float32(2.5), np.str_("a"), np.bool_(True), np.datetime64("2020-01-01"), np.longdouble(3)),
        (Path("a"), Path("b"), b"a", b"b", Side.LEFT, Side.RIGHT),
        (np.array([1, 2]), np.array([2, 1]), np.array([{"a": 1}, None]), np.array([{"a": 2}, None])),
        (float("nan"), float("inf"), -float("inf"), 0.0),
    ],
    ids=["mappings", "sets", "scalars", "values", "arrays", "floats"],
)
def test_options_are_described_by_their_values(values):
    """Options that differ are told apart; the same options are described the same, as JSON gives them back."""
    described = [json.loads(json.dumps(describe(value))) for value in values]
    assert len({json.dumps(one, sort_keys=True) for one in described}) == len(values)
    assert described == [describe(deepcopy(value)) for value in values]


def test_options_are_described_whatever_their_order():
    assert describe({"a": 1, "b": 2}) == describe(UserDict(b=2, a=1))
    assert describe({1: "a", 2: "b"}) == describe({2: "b", 1: "a"})
    names = [f"name {i}" for i in range(50)]
    assert describe(set(names)) == describe(frozenset(reversed(names))) == sorted(names)
    assert describe(np.int64(3)) == 3 and describe(np.float64(0.1)) == 0.1 and describe(np.str_("a")) == "a"


def test_another_train_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="another train set: its pairs, their content, sources, strengths or order"):
        run_and_resume(tmp_path, data(strength=[1.0] * N), after={})


def test_curation_is_not_forgotten_in_silence(tmp_path):
    with pytest.raises(ValueError, match="whose flips would be forgotten; add the callback before you resume"):
        run_and_resume(tmp_path)
    args = {"save_strategy": "steps", "save_steps": 8}
    trained(tmp_path / "plain", args=args)
    with pytest.raises(ValueError, match="was written without the curation callback"):
        trained(tmp_path / "plain", args=args, resume=tmp_path / "plain" / "checkpoint-8", rules=RULES)


# ------------------------------------------------------------------------------------------------------------- ledger


def test_the_ledger_gives_what_training_read(tmp_path):
    """Applied to the train set, it makes the set that the last epoch drew from."""
    record, strength = [], [1.0, -1.0, -2.0, 3.0] * 2 + [-4.0, 5.0, float("nan")]
    rules = [Flip(lambda s: s < -1.5), Keep(keep_consistent)]
    curated = trained(tmp_path, record=record, rules=rules, scorer=Known(strength), ledger=tmp_path / "ledger")
    ledger = CurationLedger(tmp_path / "ledger")
    applied = ledger.apply(data())
    drawn = {row for batch, _ in record[-curated.state.max_steps // 3 :] for row in batch}
    assert set(applied["row_index"]) == drawn == {0, 2, 3, 4, 6, 7, 8, 9, 10}
    selection = callback_of(curated).state.selection
    flipped = dict(zip(applied["row_index"], applied["curation_flipped"], strict=True))
    assert {row for row, is_flipped in flipped.items() if is_flipped} == {2, 6, 8}
    assert np.flatnonzero(selection.flipped).tolist() == [2, 6, 8]
    assert [entry["stage"] for entry in ledger.rounds] == ["epoch", "epoch"]
    (first, second) = ledger.history("pair-2")
    assert first["scores"] == second["scores"] == {"Known": (-2.0, 0.0)} and second["strength"] == 2.0
    assert ledger.history("pair-10") == []


@pytest.mark.parametrize("every", [1, 5], ids=["in a round", "without a further round"])
def test_a_person_s_corrections_count_from_the_next_epoch_on(every, tmp_path):
    """They do not change the epoch that a checkpoint interrupts, and override what the rules decide later."""
    strength = [-1.0, -2.0, 1.0, 3.0] * 2 + [2.0] * 3
    options = {"rules": [Flip(flip_negative)], "ledger": tmp_path / "ledger", "every": every}
    args = {"save_strategy": "steps", "save_steps": 8}
    before, after = [], []
    whole = trained(tmp_path / "run", args=args, record=before, scorer=Known(strength), **options)
    assert np.flatnonzero(callback_of(whole).selection.flipped).tolist() == [0, 1, 4, 5]
    ledger = CurationLedger(tmp_path / "ledger")
    rounds = ledger.rounds
    ledger.correct({"pair-0": "flip", "pair-1": "keep", "pair-3": "drop", "pair-6": "flip"})  # from the present state
    resume = tmp_path / "run" / "checkpoint-8"
    resumed = trained(tmp_path / "run", args=args, record=after, scorer=Known(strength), resume=resume, **options)
    assert after[:4] == before[8:12]  # the rest of the epoch
    selection = callback_of(resumed).selection
    assert np.flatnonzero(selection.flipped).tolist() == [1, 4, 5, 6]
    assert np.flatnonzero(~selection.kept).tolist() == [3]
    assert {row for batch, _ in after[4:] for row in batch} == set(range(N)) - {3}
    assert [*rounds, *ledger.rounds[len(rounds) :]] == ledger.rounds and ledger.rounds[-1]["stage"] == "manual"
    assert ledger.standing == ledger.rounds  # nothing was undone
    applied = ledger.apply(data())
    flipped = dict(zip(applied["row_index"], applied["curation_flipped"], strict=True))
    assert flipped == {row: bool(selection.flipped[row]) for row in range(N) if row != 3}
    if every == 1:  # the same margins, of which that of pair 0 is now against it
        assert rounds_of(resumed)[-1]["curation/mean_strength"] == pytest.approx(
            (np.abs(strength).sum() - 3 - 2 * (1 + 1)) / (N - 1)
        )


def test_a_ledger_of_something_else_is_refused(tmp_path):
    options = {"scorer": Known([1.0] * N), "ledger": tmp_path / "ledger", "args": {"num_train_epochs": 2}}
    trained(tmp_path, **options)
    trained(tmp_path, **options)  # once more from the start, as after a kill
    assert len(CurationLedger(tmp_path / "ledger").rounds) == 1
    with pytest.raises(ValueError, match=r"holds rounds of something else, or of other settings \(round 1, stage"):
        trained(tmp_path, **options, momentum=0.0)


def test_rounds_that_come_out_otherwise_are_undone(tmp_path):
    ledger, names = CurationLedger(tmp_path), ["p", "q"]

    def add(round, strength):
        decision = decide(np.array(strength), [Flip(flip_negative)])
        add_round(ledger, round, pair_ids=names, decision=decision, settings={})

    add(1, [1.0, -1.0])
    add(2, [-1.0, -1.0])
    add(2, [-1.0, -1.0])
    assert len(ledger.rounds) == 2
    add(1, [-1.0, 1.0])
    assert ledger.state().select(["flipped", "round"]).to_pylist() == [
        {"flipped": True, "round": 1},
        {"flipped": False, "round": 1},
    ]
    add(2, [2.0, -2.0])
    assert ledger.state()["flipped"].to_pylist() == [False, True]
    assert ledger.summary()["undone"].to_pylist() == [True, True, False, False]
    with pytest.raises(ValueError, match="one per pair"):
        add(3, [1.0])
