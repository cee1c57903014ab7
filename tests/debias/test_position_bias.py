"""Position bias: what is planted is found, with honest errors, and scores come back without it."""

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.sparse import coo_array

from trl_dt2it.debias.distillation.position_bias import balanced_orders, fit_positions


BIAS = np.array([0.6, 0.1, -0.2, -0.5])


def judged(num_prompts, num_shuffles, *, bias=BIAS, noise=0.15, spread=0.0, whole=False, seed=0):
    """Scores of lists, as arrays, and the true qualities of the candidates."""
    rng, num = np.random.default_rng(seed), len(bias)
    qualities = rng.uniform(3, 8, (num_prompts, num))
    rows = []
    for prompt in range(num_prompts):
        for order in balanced_orders(num, num_shuffles, f"{seed} {prompt}"):
            scores = qualities[prompt, order] + bias + rng.normal(0, spread, num)
            scores = np.where(rng.random(num) < noise, rng.uniform(1, 10, num), scores)
            scores = np.clip(np.round(scores) if whole else scores, 1, 10)
            rows += [(scores[p], prompt * num + order[p], p, prompt) for p in range(num)]
    return tuple(map(np.array, zip(*rows, strict=True))), qualities.ravel()


def fit(columns, num=4):
    return fit_positions(*columns, num_positions=num, low=1, high=10)


@pytest.mark.parametrize("num", [2, 3, 4, 5, 6])
def test_a_square_of_orders_has_every_candidate_in_every_place_once(num):
    square = np.array(balanced_orders(num, num, "a"))
    assert all(sorted(column) == list(range(num)) for column in [*square, *square.T])
    assert balanced_orders(num, num, "a") == square.tolist() != balanced_orders(num, num, "b") or num == 2


@pytest.mark.parametrize(("num", "shuffles"), [(4, 2), (4, 3), (6, 4), (4, 6), (5, 12)])
def test_fewer_and_more_orders_stay_balanced(num, shuffles):
    orders = balanced_orders(num, shuffles, "x")
    assert len(orders) == shuffles == len({tuple(order) for order in orders})
    seen = np.zeros((num, num), dtype=int)
    for order in orders:
        seen[order, range(num)] += 1
    assert seen.max() - seen.min() <= 1


def test_no_order_comes_twice():
    assert sorted(balanced_orders(2, 9, "x")) == [[0, 1], [1, 0]]
    assert len({tuple(order) for order in balanced_orders(3, 9, "x")}) == 6
    assert balanced_orders(1, 3, "x") == [[0]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_bias_and_noise_are_found(seed):
    columns, qualities = judged(200, 4, seed=seed)
    scores, bias = fit(columns)
    np.testing.assert_allclose(bias.effects, BIAS, atol=0.01)
    assert bias.noise_rate == pytest.approx(0.15, abs=0.03) and bias.num_lists == 800
    # Half of the scores of a candidate may be noise; the median candidate is exact, and few are far off.
    errors = np.abs(scores - qualities)
    assert np.median(errors) < 0.01 and (errors > 1).mean() < 0.1


def test_least_squares_would_shrink_the_effects():
    columns, _ = judged(400, 4)
    means = np.array([columns[0][columns[2] == position].mean() for position in range(4)])
    assert np.abs(means - means.mean() - BIAS).max() > 0.05
    assert np.abs(np.array(fit(columns)[1].effects) - BIAS).max() < 0.005


@pytest.mark.parametrize(("options", "factor"), [({}, 2), ({"whole": True, "spread": 0.5}, 1)])
@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_a_robust_loss_errs_more(options, factor, scale):
    errors = []
    for seed in range(6):
        columns, _ = judged(100, 3, seed=seed, **options)
        scores, candidates, positions, _ = columns
        rows, size = np.arange(len(scores)), int(candidates.max()) + 1
        ones = np.ones(2 * len(scores))
        design = coo_array((ones, (np.tile(rows, 2), np.r_[candidates, size + positions]))).tocsr()
        robust = least_squares(
            lambda point, design=design, scores=scores: design @ point - scores,
            np.full(size + 4, 5.0),
            jac=lambda point, design=design: design,
            loss="soft_l1",
            f_scale=scale,
            tr_solver="lsmr",
        )
        found = robust.x[size:] - robust.x[size:].mean()
        errors.append([np.abs(effects - BIAS).max() for effects in (np.array(fit(columns)[1].effects), found)])
    mixture, robust_loss = np.mean(errors, axis=0)
    assert factor * mixture < robust_loss


def test_estimates_stay_what_they_were():
    qualities, bias = fit(judged(100, 3, spread=0.4, seed=1)[0])
    np.testing.assert_allclose(bias.effects, [0.5948903317, 0.1451409965, -0.2078759482, -0.5321553798], atol=1e-8)
    np.testing.assert_allclose(
        bias.standard_errors, [0.0232230717, 0.0307997470, 0.0295948444, 0.0266084572], atol=1e-8
    )
    assert (bias.noise_rate, bias.spread) == pytest.approx((0.1281059861, 0.4365591317), abs=1e-8)
    np.testing.assert_allclose(qualities[:3], [5.7844970, 7.6945306, 3.7160022], atol=1e-6)


def test_without_noise_it_is_the_two_way_fit():
    """Against least squares on dummies, the textbook way."""
    columns, _ = judged(30, 3, noise=0.0, spread=0.4, seed=5)
    scores, candidates, positions, _ = columns
    design = np.zeros((len(scores), 30 * 4 + 4))
    design[np.arange(len(scores)), candidates] = 1
    design[np.arange(len(scores)), 120 + positions] = 1
    expected = np.linalg.lstsq(design, scores, rcond=None)[0][120:]
    _, bias = fit(columns)
    np.testing.assert_allclose(bias.effects, expected - expected.mean(), atol=0.02)
    assert bias.spread == pytest.approx(0.4, abs=0.06) and bias.noise_rate < 0.02


def test_intervals_cover_the_truth():
    inside = []
    for seed in range(40):
        _, bias = fit(judged(100, 4, spread=0.4, seed=100 + seed)[0])
        inside += [low <= truth <= high for (low, high), truth in zip(bias.intervals, BIAS, strict=True)]
    assert 0.85 <= np.mean(inside) <= 1.0
    assert max(bias.standard_errors) < 0.06


def test_a_step_on_a_scale_of_whole_numbers_is_bias_and_not_noise():
    rng = np.random.default_rng(0)
    (scores, candidates, positions, prompts), _ = judged(200, 4, bias=np.zeros(4), noise=0.0, whole=True)
    up = (positions == 0) & (rng.random(len(scores)) < 0.3)
    _, bias = fit((scores + up, candidates, positions, prompts))
    np.testing.assert_allclose(bias.effects, [0.225, -0.075, -0.075, -0.075], atol=0.02)
    assert bias.noise_rate < 0.01


def test_one_order_tells_nothing_of_positions():
    columns, _ = judged(20, 1)
    scores, bias = fit(columns)
    assert bias is None
    np.testing.assert_allclose(scores[columns[1]], columns[0], atol=1e-9)


def test_places_that_no_candidate_links_are_not_told_apart():
    # Two orders that change places 0 and 1 alone: nothing says what place 2 is worth.
    rows = [(5.0, 0, 0), (6.0, 1, 1), (7.0, 2, 2), (6.0, 1, 0), (5.0, 0, 1), (7.0, 2, 2)]
    scores, candidates, positions = map(np.array, zip(*rows, strict=True))
    assert fit((scores, candidates, positions, np.zeros(6, dtype=int)), 3)[1] is None


def test_a_single_prompt_has_no_standard_error():
    _, bias = fit(judged(1, 4, noise=0.0)[0])
    assert bias.standard_errors is None and bias.intervals is None
    np.testing.assert_allclose(bias.effects, BIAS, atol=1e-6)


def test_lists_with_missing_scores_are_no_problem():
    (scores, candidates, positions, prompts), qualities = judged(200, 4, seed=3)
    kept = np.ones(len(scores), dtype=bool)
    kept[:400:16] = kept[1:400:16] = kept[2:400:16] = kept[3:400:16] = False  # the first list of the first 25 prompts
    values, bias = fit((scores[kept], candidates[kept], positions[kept], prompts[kept]))
    np.testing.assert_allclose(bias.effects, BIAS, atol=0.01)
    assert np.median(np.abs(values - qualities)) < 0.01
