"""The stage that balances the style of the constructed data, and what is trained on its weights."""

import json

import numpy as np
import pytest
from datasets import Dataset

from trl_dt2it import MultimodalRewardConfig
from trl_dt2it.curation.rounds.config import BaseModel, CurationRun, SourceSets, read_balance, read_rounds
from trl_dt2it.curation.rounds.run import plan_rounds
from trl_dt2it.curation.rounds.sets import BALANCE, balance_base, balanced_base, training_set
from trl_dt2it.curation.rounds.stages import stage_digests
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.debias.style import read_pair_style
from trl_dt2it.demo.digits import DEMO_LOADERS
from trl_dt2it.demo.tiny import build_tiny_vlm


BASE = {
    "styled": {"digits": {"num_pairs": 300, "style_bias": 0.8}},
    "images": {"digits_t2i": {"num_pairs": 40}},
}
POOL = {"noisy": {"digits": {"num_pairs": 6, "noise": 0.5}}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return build_tiny_vlm(tmp_path_factory.mktemp("tiny"))


def run_of(tmp_path, tiny, balance) -> CurationRun:
    args = MultimodalRewardConfig(
        str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", image_check="none"
    )
    sets = SourceSets({"base": BASE, "pool": POOL}, args, lambda: tiny, DEMO_LOADERS)
    models = [BaseModel(tiny, 0)]
    return CurationRun(
        tmp_path, RewardTraining(args), models, sets, read_rounds("mixture"), ["curated"], balance=balance
    )


@pytest.fixture(scope="module")
def balanced(tmp_path_factory, tiny):
    """A run whose stage is done, with what the stage said."""
    run = run_of(tmp_path_factory.mktemp("run"), tiny, read_balance(True))
    (run.output_dir / BALANCE).mkdir()
    return run, balance_base(run, run.output_dir / BALANCE)


def mean_styles(rows: Dataset) -> np.ndarray:
    """Weighted mean of chosen minus rejected of each feature, in root mean squares of the feature."""
    style = read_pair_style(rows)
    size = np.sqrt((style.difference**2).mean(0))
    return (style.weight @ style.difference / style.weight.sum())[size > 0] / size[size > 0]


def test_style_tells_nothing_under_the_weights(balanced):
    run, counts = balanced
    rows = training_set(run, "base")
    assert len(rows) == counts["pairs"] == 340
    assert np.abs(mean_styles(training_set(run, "unbalanced"))).max() > 0.3
    assert np.abs(mean_styles(rows)).max() < 1e-6
    # Each source keeps its weight; the verdicts on two images differ by a word, so that little is to be balanced.
    weight, source = np.array(rows["weight"]), np.array(rows["source"])
    assert weight[source == "styled"].sum() == pytest.approx(300)
    assert weight[source == "images"].sum() == pytest.approx(40) and weight[source == "images"].max() < 1.5
    assert counts["effective_pairs"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), abs=0.06)
    assert counts["small_weights"] == (weight < 1e-3 * weight.mean()).sum() and counts["one_sided_pairs"] >= 0
    assert counts["auc_before"] > 0.7 and counts["auc_after"] < 0.55
    for when in ("before", "after"):
        audit = json.loads((run.output_dir / BALANCE / f"style_{when}.json").read_text())
        assert audit["overall"]["auc"] == counts[f"auc_{when}"] and set(audit["sources"]) == {"styled", "images"}


def test_all_trainings_but_one_have_the_weights(balanced):
    run, _ = balanced
    base = balanced_base(run)
    assert training_set(run, "base")["pair_id"] == base["pair_id"]
    rows = training_set(run, "uncurated")
    # A pair of the pool has none, which counts as 1.
    assert rows["weight"] == [*base["weight"], *[None] * 6]
    as_it_came = training_set(run, "unbalanced")
    assert "weight" not in as_it_came.column_names and as_it_came["pair_id"] == base["pair_id"]


def test_what_is_trained_anew_when_the_balance_changes(tmp_path, tiny):
    digests = []
    for balance in (read_balance({"max_weight": 10.0}), read_balance({"max_weight": 5.0})):
        run = run_of(tmp_path, tiny, balance)
        run.final = ["unbalanced", "base", "uncurated"]
        digests.append(stage_digests(plan_rounds(run)))
    changed = {name for name in digests[0] if digests[0][name] != digests[1][name]}
    assert {BALANCE, "round-1/train/model-0-fold-0", "round-1/decide", "final/uncurated"} <= changed
    assert set(digests[0]) - changed == {"final/unbalanced"}
    unbalanced = run_of(tmp_path, tiny, None)
    assert BALANCE not in stage_digests(plan_rounds(unbalanced))
    assert balanced_base(unbalanced) is unbalanced.sets.usable("base")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 3}, "`balance_style` has the unknown key `weight`; known are by, max_weight, features"),
        ({"max_weight": 1}, "`max_weight` of `balance_style` is 1; give a number above 1"),
        ({"one_sided": "keep"}, "`one_sided` of `balance_style` is 'keep'; give one of leave, drop, refuse"),
        ({"features": ["size"]}, "`balance_style` names the feature 'size'; known are "),
        ("source", "`balance_style` is 'source'; give true, or by, max_weight and features"),
    ],
)
def test_misuse_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        read_balance(given)


def test_nothing_is_balanced_unless_asked_for():
    assert read_balance({"one_sided": "drop"})["one_sided"] == "drop"
    assert read_balance(None) is None and read_balance(False) is None
    assert read_balance(True) == read_balance({}) == {"by": "source", "max_weight": 10.0, "features": None}
