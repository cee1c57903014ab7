"""The audit: planted leakage is found, no other, groups and weights count, and what a model owes to style is told."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, concatenate_datasets
from rich.console import Console

from trl_dt2it.data.mixing import with_columns
from trl_dt2it.debias import audit_style, balance_style
from trl_dt2it.debias.audit import fit_probe, folds, held_out_scores, leakage
from trl_dt2it.debias.style import PairStyle, read_pair_style
from trl_dt2it.demo.digits import make_digits

from ..rows import flip_preferences


def planted(
    rng: np.random.Generator, count: int, signal: float, num_features: int = 6, per_group: int = 1
) -> PairStyle:
    """Pairs of which feature 0 is on the chosen side with a known chance, and further features that tell nothing."""
    difference = rng.normal(size=(count, num_features))
    difference[:, 0] = np.where(rng.random(count) < signal, 1.0, -1.0)
    names = tuple(f"f{index}" for index in range(num_features))
    return PairStyle(names, difference, np.ones(num_features), np.ones(count), np.arange(count) // per_group)


@pytest.fixture(scope="module")
def biased() -> Dataset:
    return make_digits("train", 1500, style_bias=0.9)


def test_planted_bias_is_found_and_named(biased):
    report = audit_style(biased).overall
    assert report.auc >= 0.85
    assert report.interval[0] < 0.9 < report.interval[1] + 0.015
    assert report.num_pairs == 1500 and report.num_groups == len(set(biased["group_id"]))
    assert "characters" in report.top_features() and report.features["characters"].auc > 0.65
    # Verbose and Markdown answers are longer, and repeat words.
    assert report.features["characters"].difference > 0.5 > 0 > report.features["lexical_variety"].difference
    assert report.features["code"].auc == 0.5 and report.features["code"].coefficient == 0.0


def test_style_that_tells_nothing_has_half():
    report = audit_style(make_digits("train", 1500, style_bias=0.5)).overall
    assert 0.48 <= report.auc <= 0.52
    assert report.interval[0] < 0.5 < report.interval[1]


def test_swapping_all_labels_changes_nothing_but_signs(biased):
    report, swapped = audit_style(biased).overall, audit_style(flip_preferences(biased, 1.0)).overall
    assert swapped.auc == pytest.approx(report.auc, abs=1e-12)
    for name, feature in report.features.items():
        assert swapped.features[name].auc == pytest.approx(1 - feature.auc)
        assert swapped.features[name].coefficient == pytest.approx(-feature.coefficient, abs=1e-6)


def test_swapping_the_sides_of_pairs_swaps_their_scores():
    style = planted(np.random.default_rng(0), 400, 0.8)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], 400)
    mirrored = PairStyle(style.features, style.difference * signs[:, None], style.spread, style.weight, style.group)
    # The probe of labels that are all "chosen" is that of mixed labels: fitted by hand on both.
    import scipy.optimize

    def fitted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        scale = np.sqrt((x**2).mean(0))
        z = x / scale * y[:, None]
        loss = lambda b: np.logaddexp(0, -z @ b).sum() + b @ b / 2  # noqa: E731
        return scipy.optimize.minimize(loss, np.zeros(x.shape[1]), tol=1e-12).x / scale

    assert fit_probe(style) == pytest.approx(fitted(style.difference, np.ones(400)), abs=1e-4)
    assert fit_probe(style) == pytest.approx(fitted(mirrored.difference, signs), abs=1e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        low, high = leakage(planted(rng, 300, 0.7, num_features=1)).interval
        covered += low < 0.7 < high
    assert 52 <= covered <= 60


def test_groups_widen_the_interval_and_are_never_parted():
    style = planted(np.random.default_rng(0), 600, 0.7, num_features=1)
    group = np.arange(600) // 10
    outcome = (np.random.default_rng(1).random(60) < 0.7)[group]  # all pairs of a group alike
    style.difference[:, 0] = np.where(outcome, 1.0, -1.0)
    alone, together = (
        leakage(PairStyle(style.features, style.difference, style.spread, style.weight, groups)).interval
        for groups in (np.arange(600), group)
    )
    assert 2.5 < (together[1] - together[0]) / (alone[1] - alone[0]) < 3.5  # sqrt(10)
    seen = []
    for train, test in folds(group, 5, seed=0):
        assert not set(group[train]) & set(group[test])
        seen += test.tolist()
    assert sorted(seen) == list(range(600))
    assert [test.tolist() for _, test in folds(group, 5, 0)] != [test.tolist() for _, test in folds(group, 5, 1)]


def test_a_balanced_set_is_not_found_to_leak_backwards():
    """The other folds lack an excess of one, so that held-out probes are wrong more often than not."""
    style = planted(np.random.default_rng(0), 400, 0.5, num_features=12)
    style.difference[:] -= style.difference.mean(0)
    assert held_out_scores(style, 5, 0).won.mean() < 0.46
    found = leakage(style)
    assert found.auc == pytest.approx(0.5, abs=1e-6)  # the probe of all pairs is 0
    assert found.interval[0] < 0.46 and found.interval[1] > 0.54  # at least as wide as of 400 tosses of a coin


def test_nothing_but_balance_takes_an_estimate_to_half():
    found = [leakage(planted(np.random.default_rng(seed), 200, 0.5)).auc for seed in range(30)]
    assert sum(auc == 0.5 for auc in found) <= 2 and np.std(found) > 0.02


def test_the_interval_covers_what_the_probe_reaches_where_style_tells_little():
    """In 12 noisy features, held-out outcomes go together: their own variance alone would cover 88 %."""
    covered, signal = 0, np.r_[0.3, np.zeros(11)]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        difference = rng.normal(size=(240, 12))
        # Pairs of a group of 3 have the same differences, and each its own label.
        difference = np.repeat(difference[::3], 3, axis=0)
        chosen = np.where(rng.random(240) < 1 / (1 + np.exp(-difference @ signal)), 1.0, -1.0)
        names = tuple(f"f{index}" for index in range(12))
        pairs = PairStyle(names, difference * chosen[:, None], np.ones(12), np.ones(240), np.arange(240) // 3)
        low, high = leakage(pairs).interval
        new = rng.normal(size=(4000, 12))
        wins = 1 / (1 + np.exp(-new @ signal)) - 0.5
        covered += low <= 0.5 + np.mean(np.sign(new @ fit_probe(pairs)) * wins) <= high
    assert 35 <= covered <= 40


def test_weights_count(biased):
    # Without the pairs of which the chosen answer is longer, style tells the reverse.
    style = read_pair_style(biased)
    longer = style.difference[:, style.features.index("characters")] > 0
    heavy = with_columns(biased, {"weight": np.where(longer, 0.0, 1.0)})
    report = audit_style(heavy).overall
    assert report.features["characters"].auc == pytest.approx(0.0, abs=0.05)
    assert audit_style(balance_style(biased)).overall.auc == pytest.approx(0.5, abs=0.02)


def test_sources_are_measured_each_and_small_ones_get_a_note(biased):
    reverse = make_digits("train", 1500, style_bias=0.1, source="reverse")
    small = make_digits("train", 50, style_bias=0.9, source="tiny")
    report = audit_style(concatenate_datasets([biased, reverse, small]), min_pairs=100)
    assert list(report.sources) == ["digits", "reverse", "tiny"]
    assert report.sources["digits"].auc > 0.85 and report.sources["reverse"].auc > 0.85
    assert report.overall.auc < 0.55  # each undoes the other
    assert report.sources["tiny"].auc is None
    assert report.sources["tiny"].note == "too few pairs: 50 of at least 100"
    few_groups = audit_style(with_columns(biased, {"group_id": ["one"] * 1500}))
    assert few_groups.overall.note == "too few groups: 1 of at least 10 for 5 folds"


def test_the_same_seed_gives_the_same_report(biased):
    assert audit_style(biased, seed=1).to_json() == audit_style(biased, seed=1).to_json()


def test_rows_of_every_kind_are_read_alike_and_images_never():
    def texts(text: str, role: str = "assistant"):
        return [{"role": role, "content": [{"type": "text", "text": text}]}]

    def strings(text: str, role: str = "assistant"):
        return [{"role": role, "content": text}]

    pairs = [("It is **one**.", "two"), ("three", "Sure! Perhaps it is four.")] * 10
    question = "What is it?"
    blocks = {
        "prompt": [texts(question, "user") for _ in pairs],
        "chosen": [texts(a) for a, _ in pairs],
        "rejected": [texts(b) for _, b in pairs],
        "images": [[{"bytes": b"no image", "path": None}, {"bytes": None, "path": "/nowhere.png"}] for _ in pairs],
    }
    with_images = Dataset.from_dict(blocks)
    with_images = with_images.cast(Features({**with_images.features, "images": List(Image())}))
    plain = Dataset.from_dict(
        {"prompt": [question] * 20, "chosen": [a for a, _ in pairs], "rejected": [b for _, b in pairs]}
    )
    whole = Dataset.from_dict(
        {
            side: [strings(question, "user") + strings(pair[index]) for pair in pairs]
            for index, side in enumerate(("chosen", "rejected"))
        }
    )
    expected = read_pair_style(plain).difference
    assert expected[:, read_pair_style(plain).features.index("bold")].tolist() == [np.log(2), 0.0] * 10
    for dataset in (with_images, whole, with_images.select(list(range(19, -1, -1))).select(list(range(19, -1, -1)))):
        assert (read_pair_style(dataset).difference == expected).all()


def rewards_of(dataset: Dataset, style_effect: float, noise: float = 1.0, seed: int = 0) -> tuple:
    """A model that sees how wrong an answer is, and how rich its style."""
    rng = np.random.default_rng(seed)
    return tuple(
        -2.0 * np.array(dataset[f"{side}_wrong"])
        + style_effect * (np.array(dataset[f"style_{side}"]) != "plain")
        + rng.normal(scale=noise, size=len(dataset))
        for side in ("chosen", "rejected")
    )


def test_a_model_that_follows_style_is_told_from_one_that_does_not(biased):
    swayed = audit_style(biased, scorer=lambda rows: rewards_of(rows, 2.0)).overall.reward
    straight = audit_style(biased, scorer=lambda rows: rewards_of(rows, 0.0)).overall.reward
    assert swayed.agree_share == pytest.approx(0.9, abs=0.02)
    assert swayed.disagree_share == pytest.approx(0.1, abs=0.02)
    # Gaps are 2 with noise of sqrt(2), and style adds or takes 2.
    assert swayed.agree_accuracy > 0.98 and swayed.disagree_accuracy == pytest.approx(0.5, abs=0.1)
    assert swayed.accuracy_gap == pytest.approx(swayed.agree_accuracy - swayed.disagree_accuracy)
    assert swayed.accuracy_gap_interval[0] > 0.3
    # Variance of the gap by style: 4 * 4 * 0.9 * 0.1 of that and 2.
    assert swayed.r_squared == pytest.approx(1.44 / 3.44, abs=0.07)
    assert swayed.follows > 0.5 and swayed.follows_interval[0] > 0.45
    assert straight.accuracy == pytest.approx(0.921, abs=0.02)  # the normal distribution at sqrt(2)
    assert straight.accuracy_gap_interval[0] < 0.0 < straight.accuracy_gap_interval[1]
    assert straight.follows_interval[0] < 0.0 < straight.follows_interval[1]
    assert straight.r_squared < 0.01


def test_on_neutral_pairs_the_training_set_says_what_style_votes_for(biased):
    neutral = make_digits("test", 800, style_bias=0.5)
    chosen, rejected = rewards_of(neutral, 2.0)
    scored = with_columns(neutral, {"good": chosen, "bad": rejected})
    alone = audit_style(scored, scorer=("good", "bad")).overall
    assert alone.interval[0] < 0.5 < alone.interval[1]
    # What style votes for is chance here, and the intervals say so, though rewards follow it closely.
    assert alone.reward.accuracy_gap_interval[0] < 0.0 < alone.reward.accuracy_gap_interval[1]
    assert alone.reward.follows_interval[0] < 0.0 < alone.reward.follows_interval[1]
    assert alone.reward.r_squared == pytest.approx(4 / 6, abs=0.06)  # which needs no vote
    report = audit_style(scored, scorer=("good", "bad"), reference=biased).overall.reward
    assert report.agree_share == pytest.approx(0.5, abs=0.05)
    assert report.accuracy_gap > 0.35 and report.follows > 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "model"}, "`by` is 'model', but the columns are"),
        ({"num_folds": 1}, "`num_folds` is 1"),
        ({"features": ["colour"]}, "`features` names 'colour'"),
        ({"scorer": ("a", "b")}, "`scorer` names the column 'a'"),
        ({"scorer": "a"}, "must be a function or the names of two columns"),
        ({"scorer": lambda rows: (np.zeros(len(rows)), np.zeros(3))}, r"shape \(3,\) for the rejected answers"),
        ({"scorer": lambda rows: (np.full(len(rows), np.nan), np.zeros(len(rows)))}, "of row 0 is nan, not finite"),
    ],
)
def test_misuse_is_named(biased, arguments, message):
    with pytest.raises(ValueError, match=message):
        audit_style(biased, **arguments)


def test_rows_that_cannot_be_measured_are_named():
    rows = make_digits("train", 3)
    with pytest.raises(ValueError, match="Row 1 has the `weight` -1.0"):
        audit_style(with_columns(rows, {"weight": [1.0, -1.0, None]}))
    empty = [[{"role": "assistant", "content": "a"}], []]
    with pytest.raises(ValueError, match="row 1: `rejected` is missing; `trl_dt2it.data.validate`"):
        audit_style(Dataset.from_dict({"chosen": [empty[0]] * 2, "rejected": empty}))
    with pytest.raises(ValueError, match="no column `rejected`"):
        audit_style(Dataset.from_dict({"chosen": ["a"]}))


def test_a_report_is_printed_drawn_and_written(biased, tmp_path):
    both = concatenate_datasets([biased, make_digits("train", 60, style_bias=0.9, source="[b]small$\x1b")])
    report = audit_style(both, scorer=lambda rows: rewards_of(rows, 2.0))
    console = Console(width=150, record=True, file=open(tmp_path / "out.txt", "w"))
    report.show(console)
    text = console.export_text()
    assert f"{report.overall.auc:.3f}" in text and "too few pairs: 60" in text and "\x1b" not in text
    assert "[b]small" in text and f"{report.overall.reward.accuracy_gap:.3f}" in text
    loaded = json.loads(report.to_json())
    assert loaded["overall"]["auc"] == report.overall.auc
    assert loaded["sources"]["digits"]["reward"]["accuracy"] == report.sources["digits"].reward.accuracy

    report.plot(tmp_path / "style.png")
    with open(tmp_path / "style.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
