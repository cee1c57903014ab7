"""Rounds as they are configured: stages that are done once, rules by name, and misuse that fails at start."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from trl_dt2it.curation.rounds import config
from trl_dt2it.curation.rounds.config import read_rounds, read_rule, read_run
from trl_dt2it.curation.rounds.run import plan_rounds
from trl_dt2it.curation.rounds.stages import Stage, run_stages, stage_digests
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.demo.digits import DEMO_LOADERS
from trl_dt2it.scoring.shards import record_of
from trl_dt2it.training.config import MultimodalRewardConfig

from .runs import RULES


def write_stages(log: list, *, threshold=0.5, fails: str = "", shared=()) -> list[Stage]:
    """Four stages: two that start, one that reads both, one that reads the third."""

    def stage(name: str, settings: dict, *inputs: str) -> Stage:
        def run(folder: Path):
            log.append(name)
            if name == fails:
                (folder / "half").touch()
                raise RuntimeError("killed")
            return {"half": (folder / "half").is_file()}

        return Stage(name, run, settings, inputs, is_shared=name in shared)

    return [
        stage("a", {"x": 1}),
        stage("b", {"threshold": threshold}),
        stage("c/d", {}, "a", "b"),
        stage("e", {}, "c/d"),
    ]


def test_a_stage_is_done_once_and_goes_on_in_its_folder_after_a_failure(tmp_path):
    log = []
    with pytest.raises(RuntimeError):
        run_stages(write_stages(log, fails="c/d"), tmp_path)
    assert log == ["a", "b", "c/d"] and not (tmp_path / "c/d/stage.json").exists()
    records = run_stages(write_stages(log), tmp_path)
    assert log == ["a", "b", "c/d", "c/d", "e"]
    assert records["c/d"]["counts"] == {"half": True} and list(records) == ["a", "b", "c/d", "e"]
    assert run_stages(write_stages(log), tmp_path) == records and len(log) == 5


def test_a_changed_setting_does_again_what_depends_on_it_and_nothing_else(tmp_path):
    log = []
    run_stages(write_stages(log), tmp_path)
    (tmp_path / "c/d/half").touch()
    del log[:]
    records = run_stages(write_stages(log, threshold=0.6), tmp_path)
    assert log == ["b", "c/d", "e"]
    assert records["c/d"]["counts"] == {"half": False}  # what was made with the old setting is gone
    one, other = (stage_digests(write_stages([], threshold=threshold)) for threshold in (0.5, 0.6))
    assert [name for name in one if one[name] != other[name]] == ["b", "c/d", "e"]
    assert record_of(tmp_path / "b/stage.json", one["b"]) is None and record_of(tmp_path / "b/stage.json", other["b"])


def test_a_machine_of_several_stops_where_all_are_needed(tmp_path):
    log = []
    assert run_stages(write_stages(log, shared=("a",)), tmp_path, only_shared=True).keys() == {"a"}
    assert log == ["a"]
    assert run_stages(write_stages(log), tmp_path, stop_before="c/").keys() == {"a", "b"}
    assert log == ["a", "b"]


def test_files_of_somebody_else_stay(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.txt").touch()
    with pytest.raises(ValueError, match="files that are not of this run"):
        run_stages(write_stages([]), tmp_path)
    assert (tmp_path / "a/thesis.txt").is_file()


def test_inputs_have_to_come_before():
    stages = write_stages([])
    with pytest.raises(ValueError, match="e reads c/d, which is not among the stages before it"):
        stage_digests([stages[0], stages[3]])


def test_the_papers_rounds():
    rounds = read_rounds("paper", judge=True)
    steps = [(step.name, step.train_on, step.folds, step.judge) for steps in rounds for step in steps]
    assert steps == [
        ("flip", "base", 2, False),
        ("filter", "current", 2, True),
        ("flip", "current", 2, False),
        ("filter", "current", 2, True),
    ]
    strength = np.array([-3.0, -2.0, -1.0, 0.5, 2.0])
    flip, keep = rounds[0][0].read_rules()[0], rounds[0][1].read_rules()[0]
    assert flip.rule(strength).tolist() == [True, False, False, False, False]  # floor(3 / 2) of the negative ones
    assert keep.rule(strength).tolist() == [False, False, False, True, True]
    assert {step.orientation for steps in rounds for step in steps} == {"current"}


def test_rules_of_a_configuration_get_their_options():
    rule = read_rule({"flip": "flip_negative", "by": "source", "margin": 1.5, "min_pairs": 7})
    assert rule.rule(np.array([-1.0, -2.0])).tolist() == [False, True]
    assert rule.by == "source" and rule.min_pairs == 7
    rule = read_rule({"keep": "keep_confident", "share": 0.5})
    assert rule.rule(np.array([1.0, 4.0, 2.0, 3.0])).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": []}, "`rounds` is empty"),
        ({"rounds": [{"rules": RULES, "fold": 3}]}, "Round 1 has the unknown key `fold`; known are name"),
        ({"rounds": [{"rules": [{"flip": "flip_mixtur"}]}]}, "`flip: flip_mixtur` is no rule; choose one of flip_w"),
        ({"rounds": [{"rules": [{"keep": "flip_negative"}]}]}, "`keep: flip_negative` is no rule"),
        ({"rounds": [{"rules": [{"flip": "flip_negative", "share": 1}]}]}, "flip_negative has no option `share`"),
        ({"rounds": [{"rules": [{"flip": "flip_mixture", "reference": 1}]}]}, "no option `reference`"),
        ({"rounds": [{"rules": [{"by": "source"}]}]}, "has to have one of the keys `flip` and `keep`"),
        ({"rounds": [{"steps": [{"rules": RULES}], "folds": 2}]}, "`steps` and other keys"),
        ({"rounds": [{"steps": [{"rules": RULES}, {"rules": RULES}]}]}, "need a `name` each"),
        ({"rounds": [{"rules": RULES, "judge": True}]}, "there is no `judge`"),
        ({"rounds": [{"rules": RULES, "train_on": "pool"}]}, "`train_on` of a round is 'pool'"),
        ({"rounds": [{"rules": []}]}, "has no `rules`"),
        ({"method": "papers"}, "`method` is 'papers'; choose one of paper, mixture"),
        ({"pool": {"a": {"digits": {"num_pairs": 2}}}, "final": ["oracle"], "base": {}}, "`base` is empty"),
        (
            {"train": {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}},
            "give `test`",
        ),
        ({"final": ["best"]}, "`final` names 'best'"),
        ({"labels": "firm"}, "`labels` is 'firm'; give one of hard, soft, weight"),
        ({"labels": "soft", "method": "paper"}, "no rule says how probable a wrong label is"),
        ({"final": ["unbalanced"]}, "`final` names 'unbalanced', but no style is balanced"),
        ({"balance_style": {"by": "source", "weights": 1}}, "`balance_style` has the unknown key `weights`"),
        ({"models": [{"sed": 1}]}, "A model has the unknown key `sed`"),
        ({"models": [{}, {}]}, "none twice"),
        ({"rows_per_shard": 0}, "`rows_per_shard` is 0"),
        ({"pool": {}}, "`pool` is empty"),
        (
            {"pool": {"a": {"digit": {}}}},
            "`pool.a` has to have one of the keys dataset_name, preferences, digits",
        ),
        ({"pool": {"a": {"digits": {}, "seed": 1}}}, "`pool.a` has the unknown key `seed`"),
        ({"pool": {"a": {"dataset_name": "/nowhere/x.parquet"}}}, "but there is no such file"),
        ({"pool": {"a": {"dataset_name": "/nowhere"}}}, "but there is no such folder"),
        ({"judge": {"base_url": "http://x/v1"}}, "`judge` has no `model`"),
        ({"judge": {"base_url": "http://x/v1", "model": "m", "vote": "majority"}}, "the unknown key `vote`"),
        ({"judge": {"base_url": "http://x/v1", "model": "m", "votes": "most"}}, "`votes` of the judge is 'most'"),
        (
            {"judge": {"base_url": "http://x/v1", "model": "m", "order": "best"}},
            "`order` of the judge is 'best'; choose one of gain, uncertainty, margin, random",
        ),
        ({"judge": {"base_url": "http://x/v1", "model": "m", "pairs": "kept"}}, "choose one of dropped, all"),
        ({"judge": {"base_url": "http://x/v1", "model": "m", "accuracy": 0.5}}, "`accuracy` of the judge is 0.5"),
    ],
)
def test_misuse_fails_at_start_with_one_sentence(tmp_path, given, message):
    train = given.pop("train", {})
    args = MultimodalRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **train)
    sets = {"base": {"a": {"digits": {"num_pairs": 2}}}, "pool": {"a": {"digits": {"num_pairs": 2}}}}
    with pytest.raises(ValueError, match=message):
        plan_rounds(read_run(RewardTraining(args), **{"default_model": "m", "loaders": DEMO_LOADERS, **sets, **given}))


def test_zero3_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "is_deepspeed_zero3_enabled", lambda: True)
    way_out = "launch them with ZeRO-2, as in recipes/accelerate/deepspeed_zero2.yaml"
    test_misuse_fails_at_start_with_one_sentence(tmp_path, {}, way_out)


def test_a_split_that_a_saved_set_lacks_is_named(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})}).save_to_disk(
        tmp_path
    )
    with pytest.raises(ValueError, match="has the splits train, and not 'test'"):
        config._load("pool.a", str(tmp_path), None, "test")
    assert config._load("pool.a", str(tmp_path), None, "train")["chosen"][:] == ["b"]
