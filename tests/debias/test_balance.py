"""Balancing weights: exact balance, the nearest weights there are, bounds, base weights, errors, resampling."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from scipy.optimize import minimize

from trl_dt2it.data import check_row
from trl_dt2it.data.mixing import with_columns
from trl_dt2it.debias import audit_style, balance_style, style_weights
from trl_dt2it.debias.audit import fit_probe, leakage
from trl_dt2it.debias.balance import (
    NotBalanced,
    balance,
    one_sided_combination,
    separating_features,
    whiten,
)
from trl_dt2it.debias.style import PairStyle, read_pair_style
from trl_dt2it.demo.digits import make_digits

from ..logs import messages_of


@pytest.fixture(scope="module")
def biased() -> Dataset:
    return make_digits("train", 1200, style_bias=0.9)


@pytest.fixture
def warnings(caplog):
    with messages_of("trl_dt2it.debias.balance", caplog):
        yield caplog


def texts(pairs: list[tuple[str, str]], **columns) -> Dataset:
    return Dataset.from_dict({"chosen": [a for a, _ in pairs], "rejected": [b for _, b in pairs], **columns})


def test_style_is_balanced_exactly_and_the_probe_learns_nothing(biased):
    balanced = balance_style(biased)
    weight = np.array(balanced["weight"])
    assert np.isfinite(weight).all() and (weight > 0).all() and weight.mean() == pytest.approx(1.0, abs=1e-12)
    before, style = read_pair_style(biased), read_pair_style(balanced)
    assert (style.weight == weight).all()
    assert np.abs(before.difference.mean(0)).max() > 0.5
    assert np.abs(weight @ style.difference / len(style)).max() < 1e-8
    assert np.abs(fit_probe(before)).max() > 0.5
    assert np.abs(fit_probe(style)).max() < 1e-6
    assert audit_style(biased).overall.auc >= 0.85
    assert 0.48 <= audit_style(balanced).overall.auc <= 0.52


def test_the_weights_hold_on_groups_that_they_were_not_made_for():
    """Weights are a function of style. Made on some groups, they take the style shortcut away on others."""
    style = read_pair_style(make_digits("train", 4000, style_bias=0.9))
    train = style.group % 2 == 0
    made_on, held_out = style.take(np.flatnonzero(train)), style.take(np.flatnonzero(~train))
    directions = whiten(style.difference)
    weight = balance(directions[train], np.ones(len(made_on)))[0]
    # log w = c + lambda . f, read off where the weights were made
    columns = np.column_stack([directions, np.ones(len(style))])
    point, residual, *_ = np.linalg.lstsq(columns[train], np.log(weight), rcond=None)
    assert float(residual[0]) < 1e-12
    others = np.exp(columns[~train] @ point)
    score = held_out.difference @ fit_probe(made_on)
    assert (score > 0).mean() > 0.85
    assert others @ (score > 0) / others.sum() == pytest.approx(0.5, abs=0.04)


def test_no_other_weights_are_nearer():
    rng = np.random.default_rng(0)
    difference = rng.normal(0.4, 1.0, size=(40, 2))
    base = rng.uniform(0.5, 2.0, 40)
    base *= 40 / base.sum()
    found = balance(whiten(difference), base)[0]
    constraints = [
        {"type": "eq", "fun": lambda w: w @ difference / 40},
        {"type": "eq", "fun": lambda w: w.sum() - 40},
    ]

    def by_hand(bound):
        return minimize(
            lambda w: (w * np.log(w / base)).sum(),
            base,
            bounds=[(1e-9, bound)] * 40,
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 1000},
        ).x

    assert found == pytest.approx(by_hand(None), abs=1e-4)
    bound = 0.8 * found.max()
    bounded, left = balance(whiten(difference), base, bound)
    assert bounded == pytest.approx(by_hand(bound), abs=1e-4)
    assert left < 1e-10 and bounded.max() == pytest.approx(bound, abs=1e-9)
    assert (bounded > bound - 1e-9).sum() >= 2 and np.abs(bounded @ difference).max() < 1e-8


def test_a_single_feature_has_the_weights_of_arithmetic():
    # Bold on the chosen side in 6 pairs and on the rejected side in 2.
    pairs = [("**a**", "a")] * 6 + [("a", "**a**")] * 2 + [("a", "b")] * 2
    weight = np.array(balance_style(texts(pairs), features=["bold"])["weight"])
    assert 6 * weight[0] == pytest.approx(2 * weight[6])
    assert weight[0] * weight[6] == pytest.approx(weight[8] ** 2)  # exp(lambda f) at f = -1, 0, 1
    assert weight.sum() == pytest.approx(10)


def test_weights_that_are_there_count(biased):
    base = np.random.default_rng(0).uniform(0, 4, len(biased))
    base[:100] = 0.0
    rows = with_columns(biased, {"weight": [None if index == 200 else w for index, w in enumerate(base)]})
    base[200] = 1.0
    balanced = balance_style(rows)
    weight, style = np.array(balanced["weight"]), read_pair_style(rows)
    assert balanced.column_names == rows.column_names
    assert (weight[:100] == 0).all() and (weight[100:] > 0).all()
    assert weight.sum() == pytest.approx(base.sum())
    assert np.abs(weight @ style.difference / weight.sum()).max() < 1e-8
    # What the weights add is a function of style alone.
    used = base > 0
    factor = np.log(weight[used] / base[used])
    columns = np.column_stack([whiten(style.difference), np.ones(len(style))])[used]
    assert np.linalg.lstsq(columns, factor, rcond=None)[1][0] < 1e-12
    # Balancing what is balanced changes nothing.
    assert np.array(balance_style(balanced)["weight"]) == pytest.approx(weight, abs=1e-8)


def test_each_source_is_balanced_by_itself(biased):
    reverse = make_digits("train", 600, style_bias=0.2, source="reverse")
    both = concatenate_datasets([biased, reverse])
    weight, report = style_weights(both, by="source")
    style, is_first = read_pair_style(both), np.arange(1800) < 1200
    for part in (is_first, ~is_first):
        assert np.abs(weight[part] @ style.difference[part] / part.sum()).max() < 1e-8
        assert weight[part].sum() == pytest.approx(part.sum())
    assert list(report.parts) == ["digits", "reverse"]
    assert report.parts["digits"].before["characters"] > 0.5 > 0 > report.parts["reverse"].before["characters"]
    together, _ = style_weights(both)
    assert np.abs(together[is_first] @ style.difference[is_first] / 1200).max() > 0.1


def test_a_bound_trades_balance_for_effective_pairs(biased, warnings):
    results = {bound: style_weights(biased, max_weight=bound) for bound in (1.5, 3.0, 100.0)}
    free, free_report = style_weights(biased)
    assert results[100.0][0] == pytest.approx(free, abs=1e-6) and results[100.0][1].residual < 1e-8
    for bound, (weight, report) in results.items():
        assert weight.max() <= bound * (1 + 1e-9) and weight.mean() == pytest.approx(1.0)
        assert report.max_weight == pytest.approx(weight.max())
    reports = [results[bound][1] for bound in (1.5, 3.0, 100.0)]
    assert [r.residual for r in reports] == sorted((r.residual for r in reports), reverse=True)
    assert [r.effective_size for r in reports] == sorted((r.effective_size for r in reports), reverse=True)
    assert "Weights up to 1.5 do not balance the style of the pairs: " in warnings.text
    # A bound that leaves room is met with exact balance, by the other weights.
    bound = 0.97 * free_report.max_weight
    weight, report = style_weights(biased, max_weight=bound)
    assert report.residual < 1e-8 and report.max_weight == pytest.approx(bound, abs=1e-6)


def test_a_bound_that_leaves_imbalance_leaves_about_the_least():
    rng = np.random.default_rng(0)
    difference = np.where(rng.random(500) < 0.9, 1.0, -1.0)[:, None] + rng.normal(scale=0.1, size=(500, 1))
    directions = whiten(difference)
    with pytest.raises(NotBalanced):
        balance(directions, np.ones(500), 2.0)
    weight, left = balance(directions, np.ones(500), 2.0, ridge=1e-4)
    # The least: the largest weight where it helps most, and as little as possible elsewhere.
    order, least = np.argsort(directions[:, 0]), np.zeros(500)
    least[order[:250]] = 2.0
    assert weight.max() <= 2.0 + 1e-9
    assert left < 1.02 * least @ directions[:, 0] / 500


def test_the_report_counts_effective_pairs(biased, tmp_path):
    weight, report = style_weights(biased)
    assert report.effective_size == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert 0.3 < report.effective_size / 1200 < 0.4  # 0.36 is 1 / (0.9 (5 / 9)^2 + 0.1 5^2)
    assert max(map(abs, report.after.values())) < 1e-8 < 0.5 < report.before["characters"]
    console = Console(width=120, record=True, file=open(tmp_path / "out.txt", "w"))
    report.show(console)
    assert f"{report.effective_size:,.0f}" in console.export_text()
    assert json.loads(report.to_json())["effective_size"] == report.effective_size
    assert f"{report.effective_size:,.0f} effective pairs" in report.summary()


def test_what_cannot_be_balanced_is_named():
    longer = [(f"{'very ' * (index % 5 + 1)}long", f"not {'so ' * (index % 2)}") for index in range(40)]
    with pytest.raises(ValueError, match="pairs: every chosen answer has more `characters`. Add pairs"):
        balance_style(texts(longer), features=["characters", "bold"])
    bold = [("a b", "**a** b c")] * 10 + [("a b c", "**a** b")] * 10
    with pytest.raises(ValueError, match="pairs of source 's': every rejected answer has more `bold`"):
        balance_style(texts(bold, source=["s"] * 20), features=["bold", "words"], by="source")
    # Neither bold nor code alone, but their sum is on the chosen side of all.
    either = [("**a** **b** c", "a `b` c")] * 10 + [("`a` `b` c", "a **b** c")] * 10
    with pytest.raises(ValueError, match="a combination of `bold`, `code` is higher on the same side of all"):
        balance_style(texts(either), features=["bold", "code", "table_rows"])
    weight, report = style_weights(texts(longer), features=["characters"], max_weight=5.0)
    assert np.isfinite(weight).all() and report.residual > 0.1 and weight.max() <= 5.0 + 1e-9


def test_collinear_and_constant_features_do_no_harm(biased):
    rng = np.random.default_rng(0)
    columns = rng.normal(0.2, 1.0, size=(300, 4))
    columns = np.column_stack([columns, columns @ [1, 2, 0, 0], columns[:, 3] * 1e6, np.zeros(300)])
    directions = whiten(columns)
    assert directions.shape == (300, 4)
    assert directions.T @ directions / 300 == pytest.approx(np.eye(4), abs=1e-12)
    weight = balance(directions, np.ones(300))[0]
    assert np.abs(weight @ columns / 300).max() < 1e-8
    assert separating_features(columns, list("abcdefg")) == []
    columns[:, 6] = 1 + columns[:, 0] ** 2
    assert separating_features(columns, list("abcdefg")) == ["g"]
    columns[:, 6] += 3 * columns[:, 1]
    assert "g" in separating_features(columns, list("abcdefg"))[:2]
    with pytest.raises(NotBalanced):
        balance(whiten(columns), np.ones(300))


def test_pairs_without_any_style_keep_their_weights():
    weight, report = style_weights(texts([("cat", "dog")] * 5))
    assert weight.tolist() == [1.0] * 5 and report.residual == 0.0


EMOJI = [("good 😀", "good")] * 2 + [("a b", "c")] * 20 + [("c", "a b")] * 10  # emoji on chosen sides only


def test_style_on_one_side_of_few_pairs_is_left_out_and_named(warnings):
    rows = texts(EMOJI, pair_id=[f"p{index}" for index in range(32)])
    weight, report = style_weights(rows, features=["emoji", "words"])
    assert weight[0] == weight[1] > 0.9  # as the pairs whose words do not differ
    assert weight[0] ** 2 == pytest.approx(weight[2] * weight[22])
    assert weight[2] * 20 == pytest.approx(weight[22] * 10) and weight.sum() == pytest.approx(32)
    (one,) = report.one_sided
    assert (one.features, one.side, one.num_pairs, one.examples) == (("emoji",), "chosen", 2, ["p0", "p1"])
    assert report.min_weight == pytest.approx(weight.min()) and report.num_small == 0
    balance_style(rows, features=["emoji", "words"])
    assert "left out of the balance: `emoji` on the chosen side of 2 pairs (p0, p1)." in warnings.text


def test_pairs_of_one_sided_style_are_dropped_or_refused_on_request():
    weight, report = style_weights(texts(EMOJI), features=["emoji", "words"], one_sided="drop")
    assert (weight[:2] == 0).all() and weight.sum() == pytest.approx(32) and report.num_small == 2
    assert weight[2] * 20 == pytest.approx(weight[22] * 10) and report.residual < 1e-8
    assert "and its pairs have weight 0: `emoji` on the chosen side of 2 pairs (row 0, row 1)" in report.summary()
    assert "2 pairs have less than 0.001 of the mean weight" in report.summary()
    with pytest.raises(ValueError, match="of source 's' leans one way only: `emoji` on the chosen side of 2 pairs"):
        style_weights(texts(EMOJI, source=["s"] * 32), features=["emoji", "words"], one_sided="refuse", by="source")


@pytest.mark.parametrize("max_weight", [None, 5.0])
def test_a_combination_on_one_side_of_few_pairs_is_found(max_weight):
    """In three pairs, bold and code are on both sides, but their sum is on the chosen side."""
    lost = [("**a** **b**", "a `b`"), ("`a` `b`", "**a** b"), ("`a` `b`", "**a** b")]
    rows = texts(lost + [("a b", "c")] * 20 + [("c", "a b")] * 10)
    options = {"features": ["bold", "code", "words"], "max_weight": max_weight}
    weight, report = style_weights(rows, **options)
    (one,) = report.one_sided
    assert set(one.features) >= {"bold", "code"} and one.num_pairs == 3 and (weight[:3] > 0.05).all()
    assert weight[3] * 20 > weight[23] * 10 * 0.9
    dropped, report = style_weights(rows, one_sided="drop", **options)
    assert (dropped[:3] == 0).all() and report.one_sided[0].num_pairs == 3 and report.residual < 1e-8


def test_no_pair_loses_its_weight_where_answers_have_rare_marks():
    """Links in some chosen answers, refusals in some rejected ones: single features, and their combinations."""
    rng = np.random.default_rng(0)
    words = "cup red table blue plate green chair near large small wooden round".split()
    pairs = [[" ".join(rng.choice(words, rng.integers(6, 30))).capitalize() + "." for _ in "ab"] for _ in range(200)]
    for pair in pairs[:6]:
        pair[0] += " See https://example.org for more."
    for pair in pairs[6:10]:
        pair[1] = "I'm sorry, I cannot tell."
    rows = texts([tuple(pair) for pair in pairs])
    weight, report = style_weights(rows)
    assert weight.min() > 5e-4 and weight.sum() == pytest.approx(200)
    assert {"links", "refusals"} <= {name for one in report.one_sided for name in one.features}
    dropped, report = style_weights(rows, one_sided="drop")
    assert (dropped[:10] == 0).all() and (dropped[10:] > 1e-3).all() and report.residual < 1e-8


def test_a_one_sided_combination_is_told_by_linear_programming():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(60, 4))
    assert one_sided_combination(columns, np.ones(60, dtype=bool)) is None
    columns[5:, 2] = columns[5:, 0] - 2 * columns[5:, 1]  # column 2 - column 0 + 2 * column 1 is 0 in all but five
    columns[:5, 2] = columns[:5, 0] - 2 * columns[:5, 1] + [1, 2, 3, 4, 5]
    for candidates in (np.ones(60, dtype=bool), np.arange(60) < 5):
        score = columns @ one_sided_combination(columns, candidates)
        assert np.abs(score[5:]).max() < 1e-8 * score.max() and (score[:5] > 0).all()
    columns[0, 2] -= 2  # now it leans both ways
    assert one_sided_combination(columns, np.ones(60, dtype=bool)) is None


def test_resampling_draws_each_row_about_as_often_as_it_weighs(biased):
    weight, _ = style_weights(biased)
    drawn, again = (balance_style(biased, method="resample", seed=3) for _ in range(2))
    assert len(drawn) == len(biased) and drawn["pair_id"][:] == again["pair_id"][:]
    assert drawn["pair_id"][:] != balance_style(biased, method="resample", seed=4)["pair_id"][:]
    assert len(set(drawn["pair_id"])) == len(drawn) and "weight" not in drawn.column_names
    assert drawn.column_names == biased.column_names and drawn.features == biased.features
    counts = Counter(name.split("#")[0] for name in drawn["pair_id"])
    for name, one in zip(biased["pair_id"], weight, strict=True):
        assert np.floor(one) <= counts[name] <= np.ceil(one), name
    copies = [name for name in drawn["pair_id"] if name.startswith(max(counts, key=counts.get))]
    assert copies == [copies[0], *(f"{copies[0]}#{copy}" for copy in range(2, len(copies) + 1))]
    assert drawn[5]["images"][0].size == (32, 32)
    style = read_pair_style(drawn)
    assert np.abs(style.difference.mean(0) / style.spread.clip(1e-9)).max() < 0.1
    found = audit_style(drawn).overall
    assert 0.46 <= found.auc <= 0.54 and found.interval.low < 0.5 < found.interval.high


def test_rows_that_were_selected_keep_their_images_and_order(biased):
    rows = biased.select(list(range(300, 0, -1)))
    balanced = balance_style(rows, max_weight=3.0)
    assert balanced["pair_id"][:] == rows["pair_id"][:]
    assert balanced.features["images"] == rows.features["images"]
    assert balanced[7]["images"][0].tobytes() == rows[7]["images"][0].tobytes()
    for row in balanced.select(range(5)):
        check_row(row)


def test_the_summary_is_logged(biased, warnings):
    balance_style(biased)
    assert "Style balanced over 1,200 pairs" in warnings.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_weight": 1.0}, "`max_weight` is 1.0; it is in units of the mean weight"),
        ({"method": "drop"}, "`method` is 'drop'"),
        ({"one_sided": "keep"}, "`one_sided` is 'keep'; pass leave, drop, refuse"),
        ({"by": "model"}, "`by` is 'model'"),
        ({"features": []}, "`features` is empty"),
    ],
)
def test_misuse_is_named(biased, arguments, message):
    with pytest.raises(ValueError, match=message):
        balance_style(biased, **arguments)


def test_heavy_tails_are_balanced_too():
    rng = np.random.default_rng(0)
    difference = np.column_stack([rng.standard_t(2, 5000) + 0.3, rng.exponential(5, 5000) - 3, rng.normal(size=5000)])
    weight = balance(whiten(difference), np.ones(5000))[0]
    style = PairStyle(("a", "b", "c"), difference, np.ones(3), weight, np.arange(5000))
    assert np.abs(weight @ difference / 5000).max() < 1e-8
    assert np.abs(fit_probe(style)).max() < 1e-6
    assert 0.48 <= leakage(style).auc <= 0.52
