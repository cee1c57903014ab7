"""What reaches the trackers of `report_to`: read back from trackio's store and from TensorBoard's files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from trl_dt2it.curation import CurationLedger, IterativeCurationCallback
from trl_dt2it.curation.rounds.config import read_sets
from trl_dt2it.debias import StyleAuditCallback, audit_style
from trl_dt2it.demo.digits import DEMO_LOADERS

from ..rows import make_dataset
from ..training.test_trainer import trainer_for
from .runs import arguments, start


pytest.importorskip("trackio", reason="`trackio` is not installed; `make install-dev` does it")

READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage

project = sys.argv[1]
print(json.dumps({run: SQLiteStorage.get_logs(project, run) for run in SQLiteStorage.get_runs(project)}))
"""
SETS = {
    "pool": {
        "a": {"digits": {"num_pairs": 300, "noise": 0.35, "style_bias": 0.9}},
        "b": {"digits": {"num_pairs": 20, "noise": 0.2}},
    },
    "rounds": [{"rules": [{"flip": "flip_negative"}, {"keep": "keep_confident", "share": 0.8}]}],
    "max_steps": 2,
    "rows_per_shard": 320,
    "save_strategy": "no",
}


def trackio_logs(store, project: str) -> dict[str, list[dict]]:
    """What trackio holds of each run of a project, read by a process of its own: the store is chosen on import."""
    run = subprocess.run(
        [sys.executable, "-c", READ, project],
        env={**os.environ, "TRACKIO_DIR": str(store)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def tensorboard_scalars(folder) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_rounds_report_each_decision(tmp_path):
    output, store = tmp_path / "my-run", tmp_path / "store"
    _, config, *flags = arguments(output, **SETS)
    settings = {
        **yaml.safe_load(Path(config).read_text()),
        "report_to": ["trackio", "tensorboard"],
        "project": "rounds",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    start(["--config", str(tmp_path / "config.yaml"), *flags], TRACKIO_DIR=str(store)).finish()

    pool = read_sets("pool", SETS["pool"], DEMO_LOADERS)
    ledger = CurationLedger(output / "ledger")
    state, counts = ledger.state().to_pydict(), json.loads((output / "summary.json").read_text())
    (decided,) = counts["rounds"].values()
    kept, flipped = np.array(state["kept"]), np.array(state["flipped"])
    expected = {
        "curation/kept": kept.sum(),
        "curation/flipped": (kept & flipped).sum(),
        "curation/dropped": 320 - kept.sum(),
        "curation/noise_rate": flipped.mean(),
        "curation/mean_strength": np.array(state["strength"])[kept].mean(),
        "curation/noise_after": decided["noise_after"],
        **audit_style(ledger.apply(pool)).metrics(),
    }
    assert decided["kept"] == kept.sum() and decided["flipped"] == (kept & flipped).sum()
    assert {"style/leakage", "style/leakage/a"} <= set(expected)
    before = {"curation/kept": 320, "curation/flipped": 0, "curation/kept/b": 20, **audit_style(pool).metrics()}

    logs = trackio_logs(store, "rounds")
    assert set(logs) == {"my-run-curation", "model-0", "curated"}
    steps = {entry["train/global_step"]: entry for entry in logs["my-run-curation"]}
    assert sorted(steps) == [0, 1]
    board = tensorboard_scalars(output / "runs/curation")
    for step, values in ((0, before), (1, expected)):
        for name, value in values.items():
            assert steps[step][f"train/{name}"] == pytest.approx(float(value)), name
            assert board[f"train/{name}"][step] == pytest.approx(float(value), rel=1e-6), name
    assert "train/curation/mean_strength" not in steps[0]
    # The final training audits what it is trained on, and its own figures stay in its own run.
    final = {name for entry in logs["curated"] for name in entry}
    assert "train/style/leakage" in final and not [one for one in final if "curation" in one]
    assert "Style alone" in (output / "final/curated/README.md").read_text()


def test_a_training_reports_curation_and_style(tmp_path, monkeypatch):
    rows = make_dataset(8, source=["a", "b"] * 4, pair_id=[f"pair-{i}" for i in range(8)])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    settings = {"num_train_epochs": 2, "report_to": ["tensorboard"]}
    trainer = trainer_for("qwen3_vl", tmp_path, rows, settings)
    trainer.add_callback(StyleAuditCallback(trainer, min_pairs=4, num_folds=2))
    trainer.add_callback(IterativeCurationCallback(trainer, ledger=tmp_path / "ledger"))
    trainer.train()
    board = tensorboard_scalars(tmp_path / "board")
    style = audit_style(trainer.train_dataset, min_pairs=4, num_folds=2).metrics()
    for name, value in style.items():
        assert board[f"train/{name}"] == {0: pytest.approx(value)}, name
    (entry,) = [entry for entry in trainer.state.log_history if "curation/kept" in entry]
    for name, value in entry.items():
        if name.startswith("curation/"):
            assert board[f"train/{name}"] == {entry["step"]: pytest.approx(value)}, name
    with pytest.raises(ValueError, match="a whole train set, not on a streamed one"):
        trainer.train_dataset = rows.to_iterable_dataset()
        StyleAuditCallback(trainer)


def test_a_run_that_resumes_is_not_audited_again(tmp_path):
    rows = make_dataset(8, source=["a", "b"] * 4)
    settings = {"num_train_epochs": 2, "save_strategy": "epoch"}
    logs = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        trainer = trainer_for("qwen3_vl", tmp_path, rows, settings)
        trainer.add_callback(StyleAuditCallback(trainer, min_pairs=4, num_folds=2))
        trainer.train(resume_from_checkpoint=resume)
        logs.append([entry for entry in trainer.state.log_history if "style/leakage" in entry])
    assert logs[0] == logs[1] and len(logs[0]) == 1


def test_figures_of_an_audit_by_hand():
    from trl_dt2it.debias.reports import FeatureLeakage, RewardStyle, StyleLeakage, StyleReport

    feature = FeatureLeakage(auc=0.6, difference=0.1, coefficient=0.2)
    reward = RewardStyle(0.9, None, 0.25, None, 0.5, 0.95, 0.4, None, None, None)
    whole = StyleLeakage(10, 5, 0.7, (0.6, 0.8), {"words": feature}, reward)
    few = StyleLeakage(2, 2, note="too few pairs")
    assert StyleReport(whole, {"a": whole, "b": few}).metrics() == {
        "style/leakage": 0.7,
        "style/leakage/a": 0.7,
        "style/feature/words": 0.6,
        "style/reward_accuracy": 0.9,
        "style/reward_follows": 0.25,
    }
    assert StyleReport(few, {"b": few}).metrics() == {}
