"""Golden files of curation: a ledger, a checkpoint of the callback, scores, and the stages of rounds."""

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.curation.ledgers import act
from tests.curation.trainings import N, data
from trl_dt2it import MultimodalRewardConfig, __version__
from trl_dt2it.curation import (
    CurationLedger,
    Flip,
    Keep,
    combine_scores,
    decide,
    flip_negative,
    keep_confident,
    pair_contents,
    relabel_by_vote,
)
from trl_dt2it.curation.rounds.config import METHODS, Step, read_rounds, read_run
from trl_dt2it.curation.rounds.run import plan_rounds
from trl_dt2it.curation.rounds.stages import Stage, stage_digests
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.data import write_parquet
from trl_dt2it.scoring.shards import add_rewards, score_in_shards
from trl_dt2it.utils import digest_of

from .golden import check
from .pairs_of_each_kind import datasets, t2i_pairs
from .tables import files, parquet


TEXT_ONLY = {"num_images": (0,)}  # images of the tests are as Pillow compresses them


def test_a_ledger(tmp_path):
    rows = data(**TEXT_ONLY)
    contents, source = pair_contents(rows), ["a", "b", None, *["a"] * (N - 3)]
    rewards = np.linspace(-1, 1, N * 4).reshape(N, 2, 2) * np.array([1, -1, 2, -0.5] * N)[: N * 4].reshape(N, 2, 2)
    rewards[4] = np.nan
    ledger = CurationLedger(tmp_path)
    rules = [Flip(flip_negative, by="source"), Keep(partial(keep_confident, share=0.5))]
    ledger.append(
        1,
        "flip",
        pair_ids=contents["pair_id"],
        sources=source,
        scores=rewards,
        models=["one", "two"],
        decision=decide(combine_scores(rewards), rules, source=np.array(source)),
        settings={"rules": [{"flip": "flip_negative"}]},
        source_set="0123456789abcdef",
        contents=contents,
    )
    votes = np.array([[[1, 1]], [[-1, -1]], [[1, -1]]], dtype=np.int8)
    names = contents["pair_id"].combine_chunks()[:3]
    ledger.append(1, "judge", pair_ids=names, votes=votes, decision=relabel_by_vote(votes), orientation="source")
    act(ledger, 2, "filter", ["drop", "keep"], names=["pair-5", "pair-6"])
    ledger.undo(2)
    act(ledger, 2, "filter", ["keep", "drop"], names=["pair-5", "pair-6"])
    ledger.undo(1, "judge")
    ledger.redo(1, "judge")
    ledger.correct({"pair-7": "flip", "pair-8": "drop"}, settings={"by": "me"})
    record = json.loads((tmp_path / "ledger.json").read_text())
    for entry in record["rounds"]:
        assert len(entry.pop("sha256")) == 64  # of a file whose bytes depend on the release of PyArrow
    check("ledger", {"ledger.json": record, **{path.name: parquet(path) for path in tmp_path.glob("*.parquet")}})
    views = {"state": ledger.state(), "summary": ledger.summary(), "diff": ledger.diff(0, 2)}
    tables = {name: {"columns": table.column_names, "rows": table.to_pylist()} for name, table in views.items()}
    curated = ledger.apply(rows)
    applied = {"columns": curated.column_names, "pair_id": curated["pair_id"][:]}
    applied["curation_flipped"] = curated["curation_flipped"][:]
    check("ledger_views", {**tables, "history": ledger.history("pair-1"), "applied": applied})


def test_scores(tmp_path):
    rows = datasets()["named, some twice"]
    rewards = np.array([[0.5, -0.5], [1.0, 2.0], [0.25, 0.0]], dtype=np.float32)

    def score(some, desc):
        return rewards[: len(some)]

    (tmp_path / "shards").mkdir()
    names = pair_contents(rows)["pair_id"].combine_chunks()
    counts = score_in_shards(tmp_path / "shards", rows, lambda: score, pair_ids=names, rows_per_shard=2)
    scored = add_rewards(rows, lambda: score, output_dir=tmp_path / "set", settings={"model": "m"}, rows_per_shard=2)
    write_parquet(scored, tmp_path / "written.parquet")
    write_parquet(t2i_pairs().remove_columns(["chosen_image", "rejected_image"]), tmp_path / "captions.parquet")
    check(
        "scores",
        {
            "counts": counts,
            "files": files(tmp_path),
            "scoring.json": json.loads((tmp_path / "set" / "scoring.json").read_text()),
            **{name: parquet(tmp_path / name) for name in files(tmp_path) if name.endswith(".parquet")},
        },
    )


RULES = [{"flip": "flip_mixture", "by": "source"}, {"keep": "keep_confident", "share": 0.8}]
JUDGE = {"base_url": "http://127.0.0.1:9/v1", "model": "judge", "max_cost": 1.0, "extra_body": {"top_k": 1}}
RUNS = {
    "mixture": {"method": "mixture", "final": ["base", "uncurated", "curated"], "balance_style": True},
    "paper with judges": {"method": "paper", "judge": JUDGE, "models": [{}, {"seed": 7}]},
    "rounds": {
        "rounds": [{"rules": RULES}, {"rules": RULES[:1], "orientation": "current", "combine": "rank"}],
        "folds": 3,
        "rows_per_shard": 16,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_stages_of_rounds(name, tmp_path):
    """A digest covers the settings of a stage, the stages before it, and the release."""
    sets = {}
    for kind in ("base", "pool", "test"):
        rows = [row for number in range(3) for row in _pairs(kind, number)]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets[kind] = {"some": {"dataset_name": str(tmp_path / f"{kind}.jsonl")}}
    args = MultimodalRewardConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=4, report_to="none")
    training = RewardTraining(args, {"dtype": "float32"})
    run = read_run(training, **sets, default_model="some/model", **RUNS[name])
    stages = [replace(stage, settings=_ours(stage.settings)) for stage in plan_rounds(run)]
    digests = stage_digests(stages)
    for stage in stages:
        parts = {"settings": stage.settings, "inputs": [digests[one] for one in stage.inputs], "version": __version__}
        assert digests[stage.name] == digest_of(parts)
    found = [
        {
            **{"name": stage.name, "inputs": list(stage.inputs), "expected": dict(stage.expected)},
            **{"is_shared": stage.is_shared, "is_replayed": stage.is_replayed},
            **{"settings": stage.settings, "digest": digest_of(stage.settings)},
        }
        for stage in stages
    ]
    check(f"stages_{name.replace(' ', '_')}", found)


def _pairs(kind: str, number: int) -> list[dict]:
    text = [{"type": "text", "text": f"{kind} {number}?"}]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    return [{"prompt": [{"role": "user", "content": text}], **answers, "group_id": f"{kind}-{number}"}]


def _ours(settings) -> dict:
    """Without what TRL and transformers add to the arguments of a training."""
    if "training" not in settings:
        return settings
    own = [one.name for one in fields(MultimodalRewardConfig) if one.name in MultimodalRewardConfig.__annotations__]
    given = settings["training"]["args"]
    args = {name: given[name] for name in (*own, "max_steps", "learning_rate", "num_train_epochs") if name in given}
    return {**settings, "training": {**settings["training"], "args": args}}


def test_rounds_of_a_configuration():
    found = {method: [[step.settings() for step in steps] for steps in read_rounds(method)] for method in METHODS}
    digest = stage_digests([Stage("first", Path, {"a": 1}), Stage("second", Path, {"b": [None, 0.5]}, ("first",))])
    first = digest_of({"settings": {"a": 1}, "inputs": [], "version": __version__})
    assert digest["second"] == digest_of({"settings": {"b": [None, 0.5]}, "inputs": [first], "version": __version__})
    check(
        "rounds",
        {
            **{"methods": METHODS, "settings": found},
            "digests": [digest_of({"a": [1, "x", None], "b": 0.1}), digest_of([])],
            "keys of a step": {one.name: [one.type, repr(one.default)] for one in fields(Step)},
        },
    )
