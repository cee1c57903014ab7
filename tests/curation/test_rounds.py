"""Rounds: scores out of sample, decisions by hand, and runs that are killed."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from rich.console import Console

from trl_dt2it.curation import CurationLedger, Decision, Flip, decide, pair_ids
from trl_dt2it.curation.rounds.config import (
    BaseModel,
    CurationRun,
    SourceSets,
    Step,
    folds_of,
    merged_groups,
    prompt_groups,
    read_rounds,
    read_sets,
    set_digest,
)
from trl_dt2it.curation.rounds.results import audit_pool, harm, label_noise, show_summary
from trl_dt2it.curation.rounds.run import decide_step, plan_rounds
from trl_dt2it.curation.rounds.sets import fold_rows, ledger_at, reference_parts, reference_rows, training_set
from trl_dt2it.curation.rounds.training import RewardTraining, newest_checkpoint
from trl_dt2it.curation.rules import flip_negative
from trl_dt2it.data import check_row
from trl_dt2it.data.columns import column_of
from trl_dt2it.demo.digits import DEMO_LOADERS
from trl_dt2it.demo.tiny import build_tiny_vlm
from trl_dt2it.scoring.shards import gather_scores, read_scores, score_in_shards
from trl_dt2it.training.config import MultimodalRewardConfig

from ..rows import make_rows
from .runs import RULES, arguments, outcome, start


# ----------------------------------------------------------------------------------------------------- sets and folds


def test_folds_share_no_group_and_copies_stay_together():
    groups = ["g0", "g0", "g1", "g2", "g2", "g2", None, None, "g3", "g4"]
    names = pa.array(["a", "b", "c", "d", "e", "f", "h", "h#2", "i", "a#2"])
    folds = folds_of(prompt_groups(Dataset.from_dict({"group_id": groups}), names), 2)
    of = dict(zip(names.to_pylist(), folds.tolist(), strict=True))
    assert of["a"] == of["b"] == of["a#2"] and of["d"] == of["e"] == of["f"] and of["h"] == of["h#2"]
    assert set(folds.tolist()) == {0, 1}
    many = folds_of(np.arange(3000) // 3, 3)
    assert np.bincount(many).tolist() == pytest.approx([1000, 1000, 1000], abs=3)
    assert all(len(set(many[i : i + 3])) == 1 for i in range(0, 3000, 3))


def test_groups_that_share_a_row_are_merged_but_for_what_many_rows_have():
    groups, others = np.array([0, 0, 1, 2, 3, 4]), np.array([7, 8, 8, 9, 9, 5])
    assert merged_groups(groups, others).tolist() == [0, 0, 0, 1, 1, 2]
    placeholder = np.r_[np.zeros(60), np.arange(1, 41)].astype(np.int64)
    assert merged_groups(np.arange(100), placeholder).tolist() == list(range(100))
    assert merged_groups(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []
    # Prompts by images, each of few rows: all would be one group.
    prompts, images = np.arange(900) % 100, np.arange(900) // 3
    assert merged_groups(prompts, images).tolist() == prompts.tolist()
    assert np.bincount(folds_of(merged_groups(prompts, images), 4)).min() > 200


def test_pairs_whose_images_look_alike_are_in_one_fold(run, tmp_path, tiny):
    """Copies with other words and a darker image are wrong together, and a model that has seen one repeats it."""
    pool = {"noisy": {"digits": {"num_pairs": 80, "num_digits": [2], "noise": 0.3, "noise_kind": "near_duplicates"}}}
    sets = SourceSets({"pool": pool}, run.sets.args, lambda: tiny, DEMO_LOADERS)
    names = [name.split("-copy")[0] for name in sets.usable("pool")["group_id"][:]]
    assert len(set(sets.usable("pool")["group_id"][:])) == 80 and len(set(names)) == 20
    folds = folds_of(sets.groups("pool"), 2)
    assert all(len(set(folds[np.array(names) == name])) == 1 for name in names) and np.bincount(folds).min() >= 36


def test_a_set_keeps_its_sources_and_its_digest_tells_changes(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "pair_id": "1"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    digits = {"digits": {"num_pairs": 3}, "max_rows": 2}
    dataset = read_sets("pool", {"mine": digits, "theirs": digits}, DEMO_LOADERS)
    assert dataset["source"][:] == ["mine", "mine", "theirs", "theirs"]
    assert isinstance(dataset[0]["images"][0], dict)  # still encoded
    read = {}
    for name in ("a", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row, "chosen": name}) + "\n")
        one = read_sets("pool", {"own": {"dataset_name": str(tmp_path / f"{name}.jsonl")}})
        assert one["source"][:] == ["own"]
        read.setdefault(name, set()).add(set_digest(one, pa.table({"pair_id": ["1"], "content": ["c"]})))
    assert len(read["a"]) == 1 and len(read["a"] | read["c"]) == 2


def test_sets_of_different_shape_stand_in_one_pool_and_test_sets_keep_their_names(tmp_path):
    """README's rows, captions with two pictures, and what was prepared before, each with paths of its own."""
    rows = make_rows(2, num_images=(1,))
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.png").write_bytes(row["images"][0]["bytes"])
    readme = {"prompt": [{"role": "user", "content": "What?"}], "images": ["0.png"], "source": "elsewhere"}
    readme |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (tmp_path / "readme.jsonl").write_text(json.dumps(readme) + "\n")
    captioned = {"caption": "a cat", "chosen_image": "0.png", "rejected_image": "1.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(captioned) + "\n")
    root = {"image_root": str(tmp_path)}
    specs = {
        "answers": {"dataset_name": str(tmp_path / "readme.jsonl"), **root},
        "pictures": {"preferences": "t2i", "path_or_id": str(tmp_path / "pairs.jsonl"), **root},
        "digits": {"digits_t2i": {"num_pairs": 1}},
    }
    pool = read_sets("pool", specs, DEMO_LOADERS)
    assert pool["source"][:] == ["elsewhere", "pictures", "digits"]
    assert pool[0]["images"] == [{"bytes": None, "path": str(tmp_path / "0.png")}]
    assert [check_row(row) for row in pool] == [None] * 3 and pool["t2i_caption"][:2] == [None, "a cat"]
    test = read_sets(
        "test", {"easy": specs["answers"], "hard": specs["answers"], "drawn": specs["pictures"]}, DEMO_LOADERS
    )
    assert test["source"][:] == ["easy", "hard", "drawn"]


def test_ranked_prompts_stand_in_a_pool_as_their_pairs(tmp_path):
    row = {"prompt": "2+2?", "completions": ["5", "4", "3"], "scores": [1, 3, 2]}
    (tmp_path / "ranked.jsonl").write_text(json.dumps(row) + "\n")
    file = {"path_or_id": str(tmp_path / "ranked.jsonl"), "ranked": True}
    specs = {"ranked": {"preferences": "trl", **file}, "digits": {"digits": {"num_pairs": 1}}}
    pool = read_sets("pool", specs, DEMO_LOADERS)
    assert pool["source"][:] == ["ranked"] * 3 + ["digits"] and pool["strength"][:3] == [1.0, 2.0, 1.0]
    assert pool["pair_id"][:3] == ["ranked-0:1>2", "ranked-0:1>0", "ranked-0:2>0"]
    assert len(set(pool["group_id"][:])) == 2


def test_scores_are_written_in_parts_that_are_made_once_and_shared_by_machines(tmp_path):
    dataset = Dataset.from_dict({"value": list(range(10))})
    names = pa.array([f"p{i}" for i in range(10)])
    asked = []

    def score(rows, desc):
        asked.append(rows["value"][:])
        return np.stack([np.array(rows["value"]), -np.array(rows["value"])], axis=1).astype(np.float32)

    options = {"pair_ids": names, "rows_per_shard": 3, "rows": np.array([0, 1, 2, 4, 5, 6, 8])}
    assert score_in_shards(tmp_path, dataset, lambda: score, **options, shard=(1, 2)) is None
    assert asked == [[4, 5, 6]]
    assert score_in_shards(tmp_path, dataset, lambda: score, **options) == {"pairs": 7, "files": 3}
    assert asked == [[4, 5, 6], [0, 1, 2], [8]]
    table = read_scores(tmp_path)
    assert table["row"].to_pylist() == [0, 1, 2, 4, 5, 6, 8]
    assert table["pair_id"].to_pylist() == ["p0", "p1", "p2", "p4", "p5", "p6", "p8"]
    scores = gather_scores([[tmp_path]], 10)
    assert scores.shape == (10, 2, 1) and np.isnan(scores[[3, 7, 9]]).all()
    assert scores[8, :, 0].tolist() == [8.0, -8.0]


def test_a_checkpoint_that_is_not_whole_goes(tmp_path):
    for step, is_whole in ((5, True), (10, True), (15, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if is_whole:
            (tmp_path / f"checkpoint-{step}/complete").touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert newest_checkpoint(tmp_path / "nothing") is None


# ---------------------------------------------------------------------------------------------- decisions by hand


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return build_tiny_vlm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(tmp_path, tiny) -> CurationRun:
    """A run over eight noisy pairs, whose models are never trained here."""
    specs = {
        "base": {"clean": {"digits": {"num_pairs": 4}}},
        "pool": {"noisy": {"digits": {"num_pairs": 8, "noise": 0.5}}},
    }
    args = MultimodalRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    sets = SourceSets(specs, args, lambda: tiny, DEMO_LOADERS)
    return CurationRun(tmp_path, RewardTraining(args), [BaseModel(tiny, 0)], sets, read_rounds("mixture"), ["curated"])


def write_scores(run: CurationRun, name: str, strength) -> list[list[str]]:
    rewards = np.stack([np.array(strength), np.zeros(8)], axis=1)
    names, load = run.sets.names("pool"), lambda: lambda rows, desc: rewards
    score_in_shards(run.output_dir / name, run.sets.usable("pool"), load, pair_ids=names)
    return [[name]]


def begin(run: CurationRun, name: str, digest: str = "d") -> Path:
    folder = run.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "begun.json").write_text(json.dumps({"digest": digest}))
    return folder


FIRST, SECOND = [-3.0, -1.0, 1.0, 2.0, 3.0, 4.0, -2.0, 5.0], [-1.0, -2.0, 1.0, -4.0, 3.0, 4.0, 2.0, 5.0]


def decide_twice(run: CurationRun, orientation: str) -> tuple[dict, dict]:
    """Two rounds that flip what is negative; the second then drops what is below a margin."""
    rules = ({"flip": "flip_negative"}, {"keep": "keep_confident", "share": 0.75})
    found = []
    for number, strength in ((1, FIRST), (2, SECOND)):
        step = Step(train_on="base", folds=1, rules=rules, orientation=orientation)
        before = [(one, "decide") for one in range(1, number)]
        scored = write_scores(run, f"s{number}", strength)
        folder = begin(run, f"round-{number}", f"d{number}")
        found.append(decide_step(run, folder, number=number, step=step, scored=scored, before=before))
    return tuple(found)


def labels(run: CurationRun) -> tuple[list[int], list[int]]:
    state = CurationLedger(run.output_dir / "ledger").state()
    return tuple(np.flatnonzero(state[name].to_numpy()).tolist() for name in ("flipped", "kept"))


def test_labels_are_judged_as_the_source_has_them_or_as_they_are(run, tiny, tmp_path):
    # |first|: 3 1 1 2 3 4 2 5, so that 1 and 2 are dropped; flipped are 0, 1, 6.
    first, _ = decide_twice(run, "source")
    assert (first["flipped"], first["kept"]) == (2, 6)
    # By the source, the second round flips 0, 1, 3 and drops the weakest of 1 2 1 4 3 4 2 5: 0 and 2.
    assert labels(run) == ([0, 1, 3], [1, 3, 4, 5, 6, 7])
    # Seen from the first round, 6 was flipped and is positive in the source: it is flipped back. 0 and 1 are flipped
    # and their mirrored strength is positive, so that they stay. The result is the same, by another way.
    other = CurationRun(tmp_path / "current", run.training, run.models, run.sets, run.rounds, run.final)
    decide_twice(other, "current")
    assert labels(other) == ([0, 1, 3], [1, 3, 4, 5, 6, 7])
    name = run.sets.names("pool")[6].as_py()
    for one, actions in ((run, ["flip", "keep"]), (other, ["flip", "flip"])):
        history = CurationLedger(one.output_dir / "ledger").history(name)
        assert [entry["action"] for entry in history] == actions and history[-1]["flipped"] is False
    wrong = column_of(run.sets.usable("pool"), "is_flipped").to_numpy(zero_copy_only=False)
    flipped = np.isin(np.arange(8), [0, 1, 3])
    kept = np.isin(np.arange(8), [1, 3, 4, 5, 6, 7])
    noise = label_noise(run.sets.usable("pool"), flipped, kept)
    assert noise["noise_before"] == wrong.mean()
    assert noise["noise_after"] == pytest.approx((wrong != flipped)[kept].mean(), abs=1e-6)


def test_scores_of_earlier_steps_count_too(run):
    first, second = np.array([3.0, -1, -1, 2, 3, 4, -2, 5]), np.array([-2.0, 6, 1, -8, 6, 8, -4, 10])
    scored = [*write_scores(run, "s1", first), *write_scores(run, "s2", second)]
    rules = ({"flip": "flip_negative"},)
    step = Step(train_on="base", folds=1, rules=rules, combine="zscore", with_earlier=True)
    decide_step(run, begin(run, "round-2"), number=2, step=step, scored=scored, before=[])
    # Each in its own unit, root mean squares of sqrt(69 / 8) and sqrt(321 / 8): 2 and -8 are negative together.
    expected = (first / np.sqrt(69 / 8) + second / np.sqrt(321 / 8)) / 2
    assert labels(run)[0] == [2, 3, 6] == np.flatnonzero(expected < 0).tolist()
    ledger, names = CurationLedger(run.output_dir / "ledger"), run.sets.names("pool")
    strength = ledger.labels(names, contents=run.sets.contents("pool"))["strength"]
    np.testing.assert_allclose(strength, np.abs(expected), rtol=1e-5)
    (entry,) = ledger.history(names[0].as_py())
    assert list(entry["scores"].values()) == [(-2.0, 0.0)]  # of the step alone


def test_which_scores_of_earlier_steps_count(run, tmp_path, tiny):
    specs = {"base": {"clean": {"digits": {"num_pairs": 120}}}, "pool": {"noisy": {"digits": {"num_pairs": 60}}}}
    sets = SourceSets(specs, run.sets.args, lambda: tiny, DEMO_LOADERS)
    mixture = CurationRun(tmp_path, run.training, run.models, sets, read_rounds("mixture"), ["curated"])
    plan = {stage.name: stage for stage in plan_rounds(mixture)}
    inputs = [plan[f"round-{number}/decide"].inputs for number in (1, 2, 3)]
    kinds = [{name.rsplit("/", 1)[0] for name in one} - {"round-1", "round-2"} for one in inputs]
    assert kinds == [
        {f"round-{n}/{kind}" for n in range(1, last + 1) for kind in ("score", "reference")} for last in (1, 2, 3)
    ]
    # Where a step before it has no reference, only the step's own scores are known of one.
    rounds = [{"rules": [{"flip": "flip_negative"}]}, {"rules": [{"flip": "flip_mixture"}], "with_earlier": True}]
    mixed = CurationRun(tmp_path, run.training, run.models, sets, read_rounds("mixture", rounds), ["curated"])
    inputs = {stage.name: stage for stage in plan_rounds(mixed)}["round-2/decide"].inputs
    assert not any(name.startswith("round-1/score") for name in inputs)


def test_a_decision_that_was_written_before_a_kill_is_not_made_again(run):
    first, second = decide_twice(run, "current")
    before = (run.output_dir / "ledger/ledger.json").read_bytes()
    shutil.rmtree(run.output_dir / "s2")  # it could not be made again
    step = Step(train_on="base", folds=1, rules=RULES, orientation="current")
    again = decide_step(run, begin(run, "round-2", "d2"), number=2, step=step, scored=[["s2"]], before=[(1, "decide")])
    assert again == second and (run.output_dir / "ledger/ledger.json").read_bytes() == before


def test_with_other_settings_later_rounds_are_undone(run):
    decide_twice(run, "source")
    name = run.sets.names("pool")[0].as_py()
    assert [entry["undone"] for entry in ledger_at(run, [(1, "decide")]).history(name)] == [False, True]
    CurationLedger(run.output_dir / "ledger").correct({name: "keep"})
    step = Step(train_on="base", folds=1, rules=RULES)
    counts = decide_step(run, begin(run, "round-1", "other"), number=1, step=step, scored=[["s1"]], before=[])
    # The correction of a person stands: it says of the first pair that it is kept, flipped as it then was.
    assert counts["kept"] == 8 and labels(run)[0] == [0, 1, 6]
    stages = [(entry["stage"], entry["undone"]) for entry in CurationLedger(run.output_dir / "ledger").history(name)]
    assert stages == [("decide", True), ("decide", True), ("manual", False), ("decide", False)]


def test_a_ledger_of_another_pool_is_moved_aside(run):
    decide_twice(run, "source")
    sets = SourceSets(
        {**run.sets.specs, "pool": {"noisy": {"digits": {"num_pairs": 7}}}},
        run.sets.args,
        run.sets.model_dir,
        DEMO_LOADERS,
    )
    other = CurationRun(run.output_dir, run.training, run.models, sets, run.rounds, run.final)
    assert len(ledger_at(other, []).state()) == 0
    (moved,) = run.output_dir.glob("ledger-*")
    assert len(CurationLedger(moved).state()) == 8


def test_a_model_is_trained_on_the_base_and_the_other_folds(run):
    pool, names = run.sets.usable("pool"), run.sets.names("pool")
    keep, flip = np.arange(8) != 2, np.isin(np.arange(8), [1, 5])
    decision = Decision(flip, keep, np.ones(8), np.zeros(8, dtype=np.int16), ("by hand",))
    ledger_at(run, []).append(1, "decide", pair_ids=names, decision=decision)
    seen = []
    for fold in ((0, 2), (1, 2)):
        inside = fold_rows(run, fold, inside=True)
        rows = training_set(run, "curated", fold=fold, entries=[(1, "decide")])
        wanted = [row for row in range(8) if row not in inside and row != 2]
        assert rows["pair_id"][:] == run.sets.usable("base")["pair_id"][:] + names.take(pa.array(wanted)).to_pylist()
        for place, row in enumerate(wanted, 4):
            sides = ("rejected", "chosen") if flip[row] else ("chosen", "rejected")
            assert [rows[place][side] for side in ("chosen", "rejected")] == [pool[row][side] for side in sides]
        seen += inside.tolist()
    assert sorted(seen) == list(range(8))
    oracle = training_set(run, "oracle")
    assert all(row["chosen_wrong"] < row["rejected_wrong"] for row in oracle) and len(oracle) == 12
    assert len(training_set(run, "uncurated")) == 12 and len(training_set(run, "base")) == 4


def test_part_of_the_base_is_held_out_and_tells_how_far_the_models_can_be_believed(run, tmp_path, tiny, capsys):
    specs = {"base": {"clean": {"digits": {"num_pairs": 120}}}, "pool": {"noisy": {"digits": {"num_pairs": 60}}}}
    sets = SourceSets(specs, run.sets.args, lambda: tiny, DEMO_LOADERS)
    run = CurationRun(tmp_path, run.training, run.models, sets, read_rounds("mixture"), ["base", "curated"])
    base = sets.usable("base")
    groups, names = np.array(base["group_id"][:]), np.array(base["pair_id"][:])
    # A quarter of so few, in whole groups, and another from each model, which has not seen it: together all of them.
    parts = reference_parts(run)
    assert sorted(np.concatenate(parts)) == list(range(120)) and run.num_reference_parts == len(parts) == 4
    for index, rows in enumerate(parts):
        assert len(rows) == pytest.approx(30, abs=4) and not set(groups[rows]) & set(np.delete(groups, rows))
        seen = training_set(run, "base", without_part=index)["pair_id"][:]
        assert len(seen) == 120 - len(rows) and not set(seen) & set(names[rows])
        assert reference_rows(run, (index, 4)).tolist() == rows.tolist()
    assert [reference_rows(run, (index, 2)).tolist() for index in range(2)] == [rows.tolist() for rows in parts[:2]]
    # Models that leave the same part out share it.
    assert sorted([*reference_rows(run, (0, 5)), *reference_rows(run, (4, 5))]) == parts[0].tolist()
    assert len(training_set(run, "base")) == 120
    plan = {stage.name: stage for stage in plan_rounds(run)}
    trained = [f"round-1/train/model-0-fold-{index}" for index in range(4)]
    assert [plan[name].settings["without_part"] for name in trained] == [f"{index} of 4" for index in range(4)]
    assert [name for name in plan if name.startswith("round-1/train")] == trained
    assert {f"round-1/reference/model-0-fold-{index}" for index in range(4)} < set(plan["round-1/decide"].inputs)
    assert plan["round-2/train/model-0-fold-1"].settings["without_part"] == "1 of 4"
    assert [plan[f"round-{number}/reference/model-0-fold-1"].expected for number in (1, 2)] == 2 * [{"pairs": 30}]
    # The final model learns from all of the base.
    assert "without_part" not in plan["final/base"].settings | plan["final/curated"].settings
    paper = CurationRun(tmp_path, run.training, run.models, sets, read_rounds("paper"), ["base"])
    assert not paper.num_reference_parts and paper.final_stage("base") == "round-1/flip/train/model-0"
    rows = parts[0]

    def score(name, set_name, margins, rows=None):
        both = np.stack([margins / 2, -margins / 2], axis=1)
        names, at = sets.names(set_name), iter(both)
        score_in_shards(
            tmp_path / name,
            sets.usable(set_name),
            lambda: lambda part, desc: np.array([next(at) for _ in range(len(part))]),
            pair_ids=names,
            rows=rows,
        )

    # A model that is always right, against 20 of 60 labels: all of them are wrong.
    score("s", "pool", np.where(np.arange(60) < 20, -2.0, 2.0))
    score("r", "base", np.full(len(rows), 2.0), rows)
    step = Step(train_on="base", folds=1, rules=({"flip": "flip_mixture", "by": "source"},))
    folder = begin(run, "round-1")
    counts = decide_step(run, folder, number=1, step=step, scored=[["s"]], referenced=[["r"]], before=[])
    assert counts["flipped"] == 20 and labels(run)[0] == list(range(20))
    (entry,) = CurationLedger(tmp_path / "ledger").rounds
    assert entry["health"]["reference"]["accuracy"] == 1.0 and entry["health"]["reference"]["pairs"] == len(rows)
    assert entry["health"]["sources"]["noisy"]["reading"] == "read"
    assert "The model reads 1 of 1 source." in capsys.readouterr().out


def test_one_part_of_a_large_base_is_held_out_from_all_models(run, tmp_path, tiny):
    specs = {"base": {"clean": {"digits": {"num_pairs": 800}}}, "pool": {"noisy": {"digits": {"num_pairs": 60}}}}
    sets = SourceSets(specs, run.sets.args, lambda: tiny, DEMO_LOADERS)
    run = CurationRun(tmp_path, run.training, run.models, sets, read_rounds("mixture"), ["base"])
    (rows,) = reference_parts(run)
    assert len(rows) == pytest.approx(200, abs=4)
    assert sorted([*reference_rows(run, (0, 2)), *reference_rows(run, (1, 2))]) == rows.tolist()
    plan = {stage.name: stage for stage in plan_rounds(run)}
    assert [name for name in plan if "/train/" in name and "round-1" in name] == ["round-1/train/model-0"]
    assert plan["round-1/train/model-0"].settings["without_part"] == "0 of 1"
    assert plan["round-2/reference/model-0-fold-1"].expected == {"pairs": 100}


def test_parts_that_are_empty_tell_nothing(run):
    """One prompt with all of the base: no part of it can be left out."""
    scored, empty = write_scores(run, "s", FIRST), run.output_dir / "r"
    empty.mkdir()
    step = Step(train_on="base", folds=1, rules=({"flip": "flip_mixture"},))
    counts = decide_step(run, begin(run, "round-1"), number=1, step=step, scored=scored, referenced=[["r"]], before=[])
    assert counts["pairs"] == 8 and CurationLedger(run.output_dir / "ledger").rounds[0]["health"]["reference"] is None


def test_groups_are_those_of_the_first_start(run):
    groups = run.sets.groups("pool")
    (file,) = (run.output_dir / "groups").glob("pool-*.parquet")
    pq.write_table(pa.table({"group": groups[::-1]}), file)  # as if an image were read in another way now
    again = SourceSets(run.sets.specs, run.sets.args, run.sets.model_dir, DEMO_LOADERS)
    assert again.groups("pool").tolist() == groups[::-1].tolist()


@pytest.mark.parametrize("labels", ["soft", "weight"])
def test_doubt_about_labels_reaches_the_final_training(run, labels):
    names = run.sets.names("pool")
    posterior = np.array([0.9, 0.2, 0.6, np.nan, 0.0, 0.5, 0.1, 0.7])
    flip = np.array([True, False, False, False, False, False, False, True])
    decision = Decision(flip, np.ones(8, bool), np.ones(8), np.zeros(8, dtype=np.int16), ("by hand",), posterior)
    ledger_at(run, []).append(1, "decide", pair_ids=names, decision=decision)
    rows = training_set(run, "curated", entries=[(1, "decide")], labels=labels)
    # Of flipped pairs, the probability that the new label is right; at worst one half, null where nothing is known.
    confidence = [0.9, 0.8, 0.5, None, 1.0, 0.5, 0.9, 0.7]
    if labels == "soft":
        assert rows["label_confidence"][:4] == [None] * 4  # of the base, which is trusted
        found, wanted = rows["label_confidence"][4:], confidence
    else:
        found, wanted = rows["weight"][4:], [None if one is None else 2 * one - 1 for one in confidence]
    assert [None if one is None else pytest.approx(one, abs=1e-6) for one in found] == wanted
    # Numbers that are there already stay where nothing is known, and doubt counts once.
    pool, ledger = run.sets.usable("pool"), CurationLedger(run.output_dir / "ledger")
    name, contents = {"soft": "label_confidence", "weight": "weight"}[labels], run.sets.contents("pool")
    own = ledger.apply(pool.add_column(name, [0.5] * 8), contents=contents, labels=labels)[name]
    factor = 1 if labels == "soft" else 0.5
    assert own == [pytest.approx(0.5 if new is None else factor * new, abs=1e-6) for new in found]
    if labels == "weight":
        with pytest.raises(ValueError, match='apply `labels="weight"` to the source set, and once'):
            ledger.apply(ledger.apply(pool, contents=contents), contents=contents, labels=labels)


# ----------------------------------------------------------------------------------------------------- runs and kills


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_run_ends_like_one_that_is_not(tmp_path, num_processes):
    options = {"per_device_train_batch_size": 8 // num_processes}
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    start(arguments(calm, **options), num_processes).finish()
    expected = outcome(calm)
    assert len([name for name in expected if name.endswith(".safetensors")]) == 4 and not expected["left"]
    # Within a training, and within the last one; between the files of a scoring, and right after a decision.
    moments = ["round-2/train/model-0-fold-1/checkpoint-2/complete", "final/curated/checkpoint-3/complete"]
    if num_processes == 1:
        moments.insert(0, "round-1/score/model-0/scores-00001-of-00003.parquet")
        moments.insert(2, "ledger/round-00002-decide.parquet")
        moments.append("final/curated/model.safetensors")
    for moment in moments:
        run = start(arguments(killed, **options), num_processes)
        assert run.kill_when((killed / moment).is_file), run.errors[-2000:]
        assert not (killed / "summary.json").exists()
    start(arguments(killed, **options), num_processes).finish()
    assert outcome(killed) == expected


def test_two_processes_decide_by_references_that_another_start_has_scored(tmp_path):
    """The first process decides alone, and must not wait for the other to check rows with it."""
    options = {"base": {"clean": {"digits": {"num_pairs": 80}}}, "max_steps": 1}
    options["rounds"] = [{"rules": [{"flip": "flip_mixture", "by": "source"}]}]
    start(arguments(tmp_path, stop_before="round-1/decide", **options)).finish()
    assert len(list(tmp_path.glob("round-1/reference/*/stage.json"))) == 4
    start(arguments(tmp_path, stop_before="final", **options), 2).finish()
    assert CurationLedger(tmp_path / "ledger").rounds[0]["health"]["reference"]["pairs"] == 80


def test_a_plan_says_what_is_done_and_what_the_judge_may_cost(tmp_path):
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "output_price": 1e6, "max_tokens": 10}
    rounds = [{"rules": [{"keep": "keep_consistent"}], "judge": True}]
    lines = start(arguments(tmp_path / "out", judge=judge, rounds=rounds, dry_run=True)).finish().splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    # 48 pairs in both orders, each reply at most 10 tokens of 1 USD.
    assert ["round-1/judge", "to do", "48", "", "", "96", "960"] in rows
    assert any("USD: estimated" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_harm_by_curation_is_said_in_red():
    audit = {"num_pairs": 500, "note": None}
    leaks = {
        "before": {
            "sources": {
                "same": {**audit, "auc": 0.55, "interval": (0.5, 0.6)},
                "rises": {**audit, "auc": 0.55, "interval": (0.5, 0.6)},
            }
        },
        "after": {
            "sources": {
                "same": {**audit, "auc": 0.56, "interval": (0.52, 0.6)},
                "rises": {**audit, "auc": 0.64, "interval": (0.6, 0.68)},
            }
        },
    }
    accuracies = {"base": (0.81, 0.9, 0.7), "curated": (0.8025, 0.88, 0.695)}
    final = {
        name: {"pairs": 10, "accuracy": right, "accuracy/seen": seen, "accuracy/other": other}
        for name, (right, seen, other) in accuracies.items()
    }
    found = harm(final, leaks)
    assert len(found) == 3
    assert "0.8025 of the test pairs, that of the base alone in 0.8100" in found[0]
    assert "0.8800 of the test pairs of 'seen', that of the base alone in 0.9000" in found[1]
    assert "labels of 'rises' after curation than before (leakage 0.550 to 0.640)" in found[2]
    assert harm({**final, "curated": final["base"]}, {"before": leaks["before"]}) == []
    assert harm({"curated": final["curated"]}, {}) == []
    decided = {"round-1/decide": {"flipped": 1, "kept": 2}}
    console = Console(record=True, force_terminal=True, width=200, file=io.StringIO())
    show_summary({"rounds": decided, "pool_pairs": 3, "final": final, "harm": found}, console)
    text = console.export_text(styles=True)
    assert all(f"\x1b[1;31m{sentence[:60]}" in text for sentence in found)
    assert all(f"\x1b[1;31m{cell}" in text for cell in ("0.8025", "0.8800", "0.6950"))
    assert "\x1b[1;31m0.8100" not in text


def test_the_style_of_a_pool_is_audited_before_and_after(tmp_path):
    """Labels that follow length after curation, and were coin flips before."""
    rng = np.random.default_rng(0)
    long = [f"A{' long' * int(rng.integers(3, 9))} answer about {i}." for i in range(300)]
    is_chosen = rng.random(300) < 0.5
    rows = [
        {"prompt": "q", "chosen": a if first else f"No {i}.", "rejected": f"No {i}." if first else a, "source": "s"}
        for i, (a, first) in enumerate(zip(long, is_chosen, strict=True))
    ]
    pool = Dataset.from_list(rows)
    ledger, names = CurationLedger(tmp_path), pair_ids(pool)
    decision = decide(np.where(is_chosen, 1.0, -1.0), [Flip(flip_negative)])
    ledger.append(1, "flip", pair_ids=names, decision=decision)
    audits = audit_pool(pool, ledger)
    before, after = (audits[when]["sources"]["s"] for when in ("before", "after"))
    assert before["interval"][0] < 0.5 < before["interval"][1] and after["auc"] > 0.95
    assert "labels of 's' after curation" in harm({}, audits)[0]
    assert set(audit_pool(pool, None)) == {"before"}
