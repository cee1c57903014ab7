"""Matching: couples of mirrored styles, each pair in one, the nearest first, and nothing beyond the caliper."""

import numpy as np
import pytest
from datasets import Dataset

from trl_dt2it.debias import audit_style, match_style
from trl_dt2it.debias.balance import find_couples, whiten
from trl_dt2it.debias.style import read_pair_style
from trl_dt2it.demo.digits import make_digits


def test_matched_pairs_are_balanced_without_weights():
    rows = make_digits("train", 1500, style_bias=0.9)
    matched = match_style(rows)
    is_longer = [row != "plain" for row in matched["style_chosen"]]
    # At most both sides of every reversed pair; and each couple has one pair of each kind.
    reversed_pairs = sum(style == "plain" for style in rows["style_chosen"])
    assert 1.5 * reversed_pairs < len(matched) <= 2 * reversed_pairs
    assert np.mean(is_longer) == pytest.approx(0.5, abs=0.01)
    style = read_pair_style(matched)
    assert np.abs(style.difference.mean(0) / style.spread.clip(1e-9)).max() < 0.1
    assert 0.48 <= audit_style(matched).overall.auc <= 0.52
    ids = matched["pair_id"][:]
    assert ids == sorted(set(ids)) and set(ids) < set(rows["pair_id"])
    assert "weight" not in matched.column_names


def test_couples_are_mirrored_one_to_one_and_within_the_caliper():
    rng = np.random.default_rng(0)
    points = whiten(rng.normal(0.5, 1.0, size=(400, 3)))
    couples = find_couples(points, caliper=0.3, seed=0)
    assert len(set(couples.ravel().tolist())) == couples.size > 100
    distance = np.sqrt(((points[couples[:, 0]] + points[couples[:, 1]]) ** 2).mean(1))
    assert distance.max() <= 0.3 + 1e-6
    # Whoever is left alone has no partner that is left alone too.
    alone = np.setdiff1d(np.arange(400), couples)
    far = np.sqrt(((points[alone, None] + points[None, alone]) ** 2).mean(2))
    np.fill_diagonal(far, np.inf)
    assert far.min() > 0.3 - 1e-6
    # A wider caliper joins more.
    assert len(find_couples(points, caliper=0.6, seed=0)) > len(couples)


def test_the_nearest_are_joined_first():
    points = np.array([[1.0], [-1.01], [-1.2], [1.19], [3.0]])
    couples = {tuple(sorted(couple)) for couple in find_couples(points, caliper=0.5, seed=0).tolist()}
    assert couples == {(0, 1), (2, 3)}


def test_a_pair_is_not_its_own_partner():
    assert find_couples(np.array([[0.0], [5.0], [9.0]]), caliper=1.0, seed=0).size == 0
    assert sorted(find_couples(np.array([[0.0], [0.01], [9.0]]), caliper=1.0, seed=0).ravel()) == [0, 1]


def test_many_pairs_of_one_style_find_as_many_partners_as_there_are():
    points = np.repeat([[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]], [900, 300, 51], axis=0)
    couples = find_couples(points, caliper=0.1, seed=0)
    assert len(couples) == 300 + 25
    sides = np.sort(couples[(couples < 1200).all(1)], axis=1)
    assert (sides[:, 0] < 900).all() and (sides[:, 1] >= 900).all()


def test_the_same_seed_gives_the_same_rows():
    rows = make_digits("train", 400, style_bias=0.8)
    one, again, other = (match_style(rows, seed=seed)["pair_id"][:] for seed in (1, 1, 2))
    assert one == again != other


def test_misuse_is_named():
    rows = Dataset.from_dict({"chosen": ["a longer answer"] * 4, "rejected": ["a"] * 4})
    with pytest.raises(ValueError, match="Matched 0 of 4 pairs .* Raise `caliper`"):
        match_style(rows)
    with pytest.raises(ValueError, match="`caliper` is 0"):
        match_style(rows, caliper=0)
