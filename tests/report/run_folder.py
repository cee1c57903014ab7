"""A run's folder whose every number is known: 40 real rows, of which some try to be more than text."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image, List

from trl_dt2it.curation import CurationLedger, relabel_by_vote
from trl_dt2it.data.contents import source_fingerprint
from trl_dt2it.demo.digits import make_digits


NASTY_SOURCE = '<b>"b"</b> $x$ & co'
NASTY_ID = '"><svg onload=window.hacked=1>'
NASTY = {
    0: "</script><script>window.hacked=1</script><!--",
    1: "<img src=x onerror=window.hacked=1>{{ 7 * 7 }}",
    2: "data:text/html;base64,PHNjcmlwdD53aW5kb3cuaGFja2VkPTE8L3NjcmlwdD4= javascript:window.hacked=1",
    3: "\u202e & &amp; \u2028 ]]> word" + "w" * 400,
}
# Rewards of chosen minus rejected, as the source has the pairs: -4.0, -3.8, ..., 3.8.
STRENGTH = np.round(np.arange(40) * 0.2 - 4, 6)


def nasty_rows(folder: Path) -> Dataset:
    """Digits with nasty texts, two sources, and images inside and outside of the image root."""
    (folder / "photos").mkdir(parents=True)
    rows = (
        make_digits("train", 40, seed=1, num_digits=(3,), style_bias=0.9)
        .cast_column("images", List(Image(decode=False)))
        .to_list()
    )
    (folder / "photos/five.png").write_bytes(rows[5]["images"][0]["bytes"])
    (folder / "secret.png").write_bytes(rows[6]["images"][0]["bytes"])
    for number, row in enumerate(rows):
        row["source"] = "a" if number < 20 else NASTY_SOURCE
        row["pair_id"] = NASTY_ID if number == 0 else f"pair-{number}"
        if number in NASTY:
            row["chosen"][0]["content"][0]["text"] += NASTY[number]
            row["prompt"][0]["content"][1]["text"] += NASTY[number]
    rows[5]["images"] = [{"bytes": None, "path": "five.png"}]
    rows[6]["images"] = [{"bytes": None, "path": str(folder / "secret.png")}]
    return Dataset.from_list(rows)


def write_run(folder: Path) -> Path:
    """
    The folder. After round 1: 0-9 flipped, 10-14 dropped, others kept. Judges bring 10 and 11 back, 12 the other way
    round. In round 2, 0-7 and 10 are flipped and 39 is dropped.
    """
    run = folder / "run"
    rows = nasty_rows(folder)
    rows.to_parquet(folder / "pool.parquet")
    names = pa.array(rows["pair_id"])
    scores = np.stack([STRENGTH / 2, -STRENGTH / 2], axis=1)[:, :, None]
    ledger = CurationLedger(run / "ledger")
    shared = {"models": ["tiny, seed 42"], "sources": rows["source"], "strength": None}
    first = ["flip"] * 10 + ["drop"] * 5 + ["keep"] * 25
    shared["strength"] = np.where(np.array(first) == "flip", -STRENGTH, STRENGTH)
    fingerprint = source_fingerprint(names)
    ledger.append(1, "decide", pair_ids=names, actions=first, scores=scores, **shared, source_set=fingerprint)
    votes = np.array([[[1, 1]], [[1, 1]], [[-1, -1]], [[1, -1]], [[0, 0]]])
    asked = names.slice(10, 5)
    ledger.append(1, "judge", pair_ids=asked, decision=relabel_by_vote(votes), votes=votes, models=["judge"])
    second = ["flip"] * 8 + ["keep"] * 2 + ["flip"] + ["keep"] * 28 + ["drop"]
    shared["strength"] = np.where(np.array(second) == "flip", -STRENGTH, STRENGTH)
    ledger.append(2, "decide", pair_ids=names, actions=second, scores=scores, orientation="source", **shared)

    write_stage(run, "round-1/decide", {"pairs": 40, "reasons": {"decided by decide": 40}})
    write_stage(run, "final/curated", {"pairs": 139, "steps": 30})
    # 8 of 10 right: in two of them, the model is wrong by little.
    rewards = np.array([[2.0, 0.0]] * 8 + [[0.0, 0.5]] * 2, dtype=np.float32)
    (run / "test/curated").mkdir(parents=True)
    columns = {"row": np.arange(10), "pair_id": [f"t{n}" for n in range(10)], "chosen": rewards[:, 0]}
    table = pa.table({**columns, "rejected": rewards[:, 1]})
    pq.write_table(table, run / "test/curated/scores-00000-of-00001.parquet")
    write_stage(run, "test/curated", {"pairs": 10, "accuracy": 0.8})
    final = {"curated": {"model_dir": str(run / "final/curated"), "pairs": 139, "steps": 30, "accuracy": 0.8}}
    summary = {"output_dir": str(run), "final": final, "rounds": {}, "pool_pairs": 40, "seconds": 3.0}
    (run / "summary.json").write_text(json.dumps(summary))
    record = {
        "command": "python recipes/dt2it.py --note '<script>window.hacked=1</script>'",
        "started": "2026-01-02T03:04:05+00:00",
        "machine": "1 process, 2 CPU cores",
        "versions": {"python": "3.12", "trl-dt2it": "0.1.0"},
        "sets": {"pool": {"noisy": {"dataset_name": str(folder / "pool.parquet")}}},
        "pairs": {"pool": {"a": 20, NASTY_SOURCE: 20}},
        "images": {"image_root": str(folder / "photos"), "max_image_pixels": 1_000_000},
        "models": [{"model_name_or_path": "tiny", "seed": 42}],
        "rounds": [[{"name": None, "rules": [{"flip": "flip_mixture", "by": "source"}]}]],
        "training": {"args": {"learning_rate": 1e-3, "max_steps": 30}},
    }
    (run / "run.json").write_text(json.dumps(record))
    return run


def write_stage(run: Path, name: str, counts: dict) -> None:
    """What `run_stages` leaves of a stage that is done."""
    (run / name).mkdir(parents=True, exist_ok=True)
    record = {"stage": name, "digest": "", "counts": counts, "seconds": 1.0}
    (run / name / "stage.json").write_text(json.dumps(record))


def evaluation_file(folder: Path) -> Path:
    """What `recipes/evaluate.py` writes, of a benchmark of ten pairs."""
    from trl_dt2it.evaluation.metrics import wilson

    interval = list(wilson(7 / 10, 10))
    result = {
        **{"name": "vl-rewardbench", "title": "VL-RewardBench", "label": "", "notes": ["Ten pairs <i>only</i>."]},
        **{"metrics": {"overall": 0.7}, "micro": 0.7, "macro": None, "correct": {"overall": 7}, "n": {"overall": 10}},
        **{"ties": {"overall": 1}, "wilson": {"overall": interval}, "bootstrap": {"overall": [0.4, 0.9]}},
    }
    path = folder / "evaluation.json"
    path.write_text(json.dumps({"model": "my-<b>model</b>", "results": [result], "pooled": None}))
    return path
