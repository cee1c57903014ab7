"""What a person decides in the report comes back into the ledger; and what a run says of itself holds no secret."""

import json

import pytest

from trl_dt2it.curation import CurationLedger
from trl_dt2it.curation.corrections import read_corrections
from trl_dt2it.curation.rounds.config import BaseModel, CurationRun, SourceSets, read_rounds
from trl_dt2it.curation.rounds.run import plan_rounds
from trl_dt2it.curation.rounds.stages import stage_digests
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.demo.digits import DEMO_LOADERS
from trl_dt2it.demo.tiny import build_tiny_vlm
from trl_dt2it.training.config import MultimodalRewardConfig
from trl_dt2it.utils import without_secrets


NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def ledger(tmp_path):
    ledger = CurationLedger(tmp_path / "ledger")
    ledger.append(1, "flip", pair_ids=NAMES, actions=["keep", "flip", "drop", "flip", "keep"], source_set="0123")
    return ledger


def write(path, entries, **changes):
    content = {"format": "trl-dt2it corrections", "version": 1, "source_set": "0123", "corrections": entries}
    path.write_text(json.dumps({**content, **changes}))
    return path


def entry(name, verdict, flipped, kept):
    return {"pair_id": name, "verdict": verdict, "flipped": flipped, "kept": kept}


def standing(ledger):
    rows = ledger.state().to_pylist()
    return {row["pair_id"]: (row["flipped"], row["kept"]) for row in rows}


ENTRIES = [
    entry("a", "wrong", True, True),
    entry("b", "accept", True, True),
    entry("c", "wrong", False, True),
    entry("d", "wrong", False, True),
    {"pair_id": "e", "verdict": "unsure"},
]
WANTED = {"a": (True, True), "b": (True, True), "c": (False, True), "d": (False, True), "e": (False, True)}


def test_pairs_stand_as_the_person_wants_them_whatever_happened_meanwhile(ledger, tmp_path):
    path = write(tmp_path / "corrections.json", ENTRIES)
    assert ledger.correct_from(path) == {"keep": 2, "flip": 2, "drop": 0, "before": 0, "unsure": 1}
    assert standing(ledger) == WANTED
    assert ledger.rounds[-1]["settings"] == {"file": "corrections.json"}
    # A second time it changes nothing, and adds nothing.
    assert ledger.correct_from(path) == {"keep": 0, "flip": 0, "drop": 0, "before": 4, "unsure": 1}
    assert standing(ledger) == WANTED and len(ledger.rounds) == 2
    # Against a later round it stands, as does a file that is read after such a round.
    ledger.append(2, "flip", pair_ids=NAMES, actions=["flip"] * 5)
    assert standing(ledger) == {**WANTED, "e": (True, True)}
    other = [entry("e", "wrong", False, True), entry("a", "wrong", True, False)]
    assert ledger.correct_from(write(path, other)) == {"keep": 0, "flip": 1, "drop": 1, "before": 0, "unsure": 0}
    assert standing(ledger) == {**WANTED, "a": (True, False)}
    # A dropped pair has no better side.
    assert ledger.correct_from(write(path, [entry("a", "accept", False, False)]))["before"] == 1


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([entry("a", "wrong", True, True)], {"source_set": "9"}, "is of another source set than the ledger"),
        ([entry("z", "wrong", True, True)], {}, "1 of 1 pairs are not in the ledger, z the first"),
        ([entry("a", "wrong", 1, True)], {}, "Correction 0 of .* has 1 as `flipped`; give true or false"),
        ([{"pair_id": "a", "verdict": "accept", "flipped": True}], {}, "has None as `kept`"),
        ([entry("a", "right", True, True)], {}, "has the verdict 'right'; give one of accept, wrong, unsure"),
        ([{"verdict": "wrong"}], {}, "Correction 0 of .* has no `pair_id`"),
        ([ENTRIES[0], {"pair_id": "a", "verdict": "unsure"}], {}, "Correction 1 of .* speaks of 'a' a second time"),
        ([], {"version": 2}, "has version 2; this release reads version 1"),
        ([], {"format": "other"}, "is no file of corrections"),
    ],
)
def test_a_wrong_file_changes_nothing(ledger, tmp_path, entries, changes, message):
    with pytest.raises(ValueError, match=message):
        ledger.correct_from(write(tmp_path / "corrections.json", entries, **changes))
    assert len(ledger.rounds) == 1


def test_what_is_no_json(tmp_path):
    (tmp_path / "corrections.json").write_text("a: keep")
    with pytest.raises(ValueError, match="is not JSON"):
        read_corrections(tmp_path / "corrections.json")


def test_a_command_line_keeps_no_secret():
    words = ["recipes/dt2it.py", "--hub_token", "hf_1", "--hub_model_id", "me/it", "--api-key=k", "--max_steps=3"]
    assert without_secrets(words) == [words[0], "--hub_token", "***", *words[3:5], "--api-key=***", "--max_steps=3"]


def test_the_final_model_is_trained_anew_after_corrections_and_the_rounds_are_not(tmp_path):
    build_tiny_vlm(tmp_path / "tiny")
    specs = {
        "base": {"clean": {"digits": {"num_pairs": 4}}},
        "pool": {"noisy": {"digits": {"num_pairs": 8, "noise": 0.5}}},
        "test": {"clean": {"digits": {"num_pairs": 4, "split": "test"}}},
    }
    args = MultimodalRewardConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none")
    tiny = str(tmp_path / "tiny")
    sets, models = SourceSets(specs, args, lambda: tiny, DEMO_LOADERS), [BaseModel(tiny, 0)]
    rounds = read_rounds("mixture")
    run = CurationRun(tmp_path / "run", RewardTraining(args), models, sets, rounds, ["uncurated", "curated"])

    def digests():
        return stage_digests(plan_rounds(run))

    before = digests()
    assert not (tmp_path / "run").exists()  # a plan makes nothing
    ledger = CurationLedger(tmp_path / "run/ledger")
    names = sets.names("pool")
    ledger.append(1, "decide", pair_ids=names, actions=["keep"] * 8)
    assert digests() == before
    ledger.correct({names[0].as_py(): "flip"})
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {"final/curated", "test/curated"}
    ledger.undo(1, "manual")
    assert digests() == before
