"""Entropy balancing: weights nearest to uniform under which style tells nothing, and matched subsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasets import Dataset
from scipy.optimize import linprog, minimize, root
from scipy.spatial import cKDTree
from scipy.special import logsumexp
from transformers.utils import logging

from .style import PairStyle, parts_by, read_pair_style, with_column
from .tables import BalanceReport, OneSidedStyle, summarize


# scipy minimizes and solves here; no kept package has this dual with base weights, a bound and exactness to 1e-10, nor
# names the features in the way of a balance.
# Largest weighted mean of a whitened direction that counts as 0.
TOLERANCE = 1e-10

# Where a bound leaves no exact balance, coefficients cost this much; the imbalance is then about the least possible.
RIDGE = 1e-4


class NotBalanced(Exception):
    """The solver did not reach a balance."""


def whiten(columns: np.ndarray) -> np.ndarray:
    """Orthogonal directions that span the columns, each of mean square 1: without what is constant 0 or collinear.

    Shapes: `columns` `(N, K)`, returns `(N, R)`.
    """
    size = np.sqrt((columns**2).mean(0))
    columns = columns[:, size > 0] / size[size > 0]
    if columns.shape[1] == 0:
        return columns
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, singular > 1e-10 * singular[0]] * np.sqrt(len(columns))


def balance(directions: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Balanced weights without a bound.

    scipy's trust-region Newton method goes to where rounding hides that the objective still falls, at gradients of
    about 1e-8; from there MINPACK's `hybrj`, which looks at the gradient alone, goes to 1e-12.

    Shapes: `directions` `(N, R)`, `base` `(N,)`, returns `(N,)`.
    """
    log_base = np.log(base)

    def weights(point: np.ndarray) -> np.ndarray:
        scores = log_base + directions @ point
        return np.exp(scores - logsumexp(scores))

    def objective(point: np.ndarray) -> float:
        return float(logsumexp(log_base + directions @ point))

    def gradient(point: np.ndarray) -> np.ndarray:
        return weights(point) @ directions

    def hessian(point: np.ndarray) -> np.ndarray:
        weight = weights(point)
        mean = weight @ directions
        return (directions * weight[:, None]).T @ directions - np.outer(mean, mean)

    point = np.zeros(directions.shape[1])
    if len(point):
        found = minimize(
            objective, point, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-8, "maxiter": 300}
        )
        point = _polish(gradient, hessian, found.x)
        if np.abs(gradient(point)).max() > TOLERANCE:
            raise NotBalanced
    return weights(point) * base.sum()


def balance_bounded(
    directions: np.ndarray, base: np.ndarray, bound: float, *, ridge: float = 0.0
) -> tuple[np.ndarray, float]:
    r"""Balanced weights that are at most `bound`.

    The dual has one unknown more, \(\mu\), which keeps the sum: it minimises the mean of \(\phi_i(\lambda f_i + \mu)\)
    less \(\mu\), where \(\phi_i\) goes on as a straight line from where its slope, the weight, reaches the bound.

    Shapes: `directions` `(N, R)`, `base` `(N,)`, returns `(N,)`.
    """
    count = len(base)
    columns = np.column_stack([directions, np.ones(count)])
    log_base, log_bound = np.log(base), np.log(bound)
    target = np.zeros(columns.shape[1])
    target[-1] = 1.0
    price = np.full(columns.shape[1], ridge)
    price[-1] = 0.0

    def weights(point: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(log_base + columns @ point, log_bound))

    def objective(point: np.ndarray) -> float:
        excess = np.maximum(log_base + columns @ point - log_bound, 0.0)
        return float((weights(point) + bound * excess).mean() - point[-1] + (price * point**2).sum() / 2)

    def gradient(point: np.ndarray) -> np.ndarray:
        return weights(point) @ columns / count - target + price * point

    def hessian(point: np.ndarray) -> np.ndarray:
        scores = log_base + columns @ point
        weight = np.where(scores < log_bound, np.exp(np.minimum(scores, log_bound)), 0.0)
        return (columns * weight[:, None]).T @ columns / count + np.diag(price)

    start = np.zeros(columns.shape[1])
    found = minimize(
        objective, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-8, "maxiter": 500}
    )
    point = _polish(gradient, hessian, found.x)
    if np.abs(gradient(point)).max() > TOLERANCE:
        raise NotBalanced
    weight = weights(point)
    return weight / weight.mean(), float(np.abs(weight @ directions).max() / count) if len(point) > 1 else 0.0


def _polish(gradient, hessian, point: np.ndarray) -> np.ndarray:
    """A root of the gradient near a point; the point itself where that is no better."""
    with np.errstate(all="ignore"):
        polished = root(gradient, point, jac=hessian, method="hybr", options={"xtol": 1e-14}).x
        is_better = np.abs(gradient(polished)).max() < np.abs(gradient(point)).max()
    return polished if is_better else point


def one_sided_combination(columns: np.ndarray, candidates: np.ndarray) -> np.ndarray | None:
    """Finds a combination that is at least 0 in every pair and above 0 in some: these lose all weight in a balance.

    Shapes: `columns` `(N, K)`, `candidates` `(N,)` `bool`, returns `(K,)`.
    """
    size = np.sqrt((columns**2).mean(0))
    scaled = columns / np.where(size > 0, size, 1.0)
    basis = np.eye(columns.shape[1])[:, size > 0]
    if not candidates.all():
        _, singular, right = np.linalg.svd(scaled[~candidates], full_matrices=True)
        rank = int((singular > 1e-9 * max(float(singular[0]), 1e-300)).sum())
        basis = right[rank:].T * (size > 0)[:, None]
    rows = np.unique(scaled[candidates] @ basis, axis=0)
    if rows.size == 0 or not np.abs(rows).max() > 1e-9:
        return None
    found = linprog(-rows.mean(0), A_ub=-rows, b_ub=np.zeros(len(rows)), bounds=(-1, 1), method="highs")
    if not found.success or -found.fun < 1e-9:
        return None
    combination = basis @ found.x
    combination[np.abs(combination) < 1e-9 * np.abs(combination).max()] = 0.0
    return combination / np.where(size > 0, size, 1.0)


def separating_features(columns: np.ndarray, names: Sequence[str]) -> list[str]:
    """Names the features that keep 0 out of the convex hull: a combination of them is above 0 in every pair.

    Shapes: `columns` `(N, K)`.
    """
    size = np.sqrt((columns**2).mean(0))
    used = np.flatnonzero(size > 0)
    columns, names = columns[:, used] / size[used], [names[index] for index in used.tolist()]
    alone = [name for name, column in zip(names, columns.T, strict=True) if (column > 0).all() or (column < 0).all()]
    if alone:
        return alone
    # Unknowns are the positive and the negative parts of the combination, which sum up to 1 at most, and the least
    # value that it has in any pair, which is maximised.
    num = len(used)
    unique = np.unique(columns, axis=0)
    found = linprog(
        np.r_[np.zeros(2 * num), -1.0],
        A_ub=np.vstack([np.column_stack([-unique, unique, np.ones(len(unique))]), [[1.0] * (2 * num) + [0.0]]]),
        b_ub=np.r_[np.zeros(len(unique)), 1.0],
        bounds=[(0, None)] * (2 * num) + [(None, None)],
        method="highs",
    )
    if not found.success or -found.fun < 1e-9:
        return []
    combination = found.x[:num] - found.x[num : 2 * num]
    order = np.argsort(-np.abs(combination))
    # The largest margin takes a little of every feature; what matters little is not named.
    return [names[index] for index in order[:5].tolist() if abs(combination[index]) > 0.1 * abs(combination[order[0]])]


logger = logging.get_logger(__name__)

_NOTICEABLE = 1e-6

# A pair whose weight is multiplied by less may be one that no balance leaves any weight.
_LOST = 1e-4

# Pairs that are named as examples.
_EXAMPLES = 5

OneSided = Literal["leave", "drop", "refuse"]

ONE_SIDED: tuple[str, ...] = ("leave", "drop", "refuse")


def balance_style(
    dataset: Dataset,
    *,
    max_weight: float | None = None,
    by: str | None = None,
    method: Literal["weights", "resample"] = "weights",
    features: Sequence[str] | None = None,
    one_sided: OneSided = "leave",
    seed: int = 42,
) -> Dataset:
    r"""
    Balances style: gives pairs whose style speaks for the rejected answer more weight, and the others less.

    These are the weights nearest to uniform, or to a column `weight` that is there, in relative entropy, under which
    the mean difference of every style feature is 0: \(\sum_i w_i f_i = 0\), with \(f_i\) the chosen minus the rejected
    style. Then a linear probe of style has coefficient 0, and a linear reward gains nothing from style. What it costs
    is in the report of [`style_weights`], which computes the weights without making a data set; a line is logged.

    Args:
        dataset (`Dataset`):
            Preference rows; images are not read.
        max_weight (`float`, *optional*):
            Largest weight, in units of the mean weight, above 1. The other weights make up for it as far as they can;
            where they cannot, some imbalance is left, about the least possible, and a warning says how much. A lower
            bound means more effective pairs and less balance.
        by (`str`, *optional*):
            A column, such as `"source"`: each of its values is balanced by itself and keeps its total weight.
        method (`str`, *optional*, defaults to `"weights"`):
            `"weights"` writes the column `weight`, which the trainer reads. `"resample"` draws as many rows as there
            are, with these probabilities, by systematic resampling: a row of weight 2.3 is there 2 or 3 times, its
            `pair_id` with `#2` and `#3` behind it. Balance is then met up to the draw, and no column `weight` is
            left.
        features (`Sequence[str]`, *optional*):
            Which of `STYLE_FEATURES` to balance; all by default.
        one_sided (`str`, *optional*, defaults to `"leave"`):
            What to do about style that leans one way only, such as links that are in some chosen answers and in no
            rejected one, or a combination of features like that: no weights but 0 balance such pairs. `"leave"`
            leaves that style out of the balance, so that the pairs keep their weight and that style its lean;
            `"drop"` gives the pairs weight 0; `"refuse"` is an error. The report names style and pairs in any case.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw.

    Returns:
        `Dataset`: the rows in their order. Weights are finite and >= 0, and sum up to what they did before.

    Raises:
        `ValueError`: if no weights balance the pairs, because some style, or a combination, is on the chosen side of
            all of them: the message names it; with `one_sided="refuse"` also if it is of some. Also if an argument is
            out of range or a row has no answer.
    """
    if method not in ("weights", "resample"):
        raise ValueError(f'`method` is {method!r}; give "weights" or "resample".')
    weight, report = style_weights(dataset, max_weight=max_weight, by=by, features=features, one_sided=one_sided)
    (logger.warning if report.one_sided else logger.info)(report.summary())
    if method == "weights":
        return with_column(dataset, "weight", weight)
    rows, copies = _systematic(weight, np.random.default_rng(seed))
    drawn = dataset.select(rows)
    if "weight" in drawn.column_names:
        drawn = drawn.remove_columns("weight")
    if "pair_id" in drawn.column_names:
        names = [
            name if copy == 1 or name is None else f"{name}#{copy}"
            for name, copy in zip(drawn.select_columns("pair_id")["pair_id"], copies, strict=True)
        ]
        drawn = with_column(drawn, "pair_id", names)
    return drawn


def style_weights(
    dataset: Dataset,
    *,
    max_weight: float | None = None,
    by: str | None = None,
    features: Sequence[str] | None = None,
    one_sided: OneSided = "leave",
) -> tuple[np.ndarray, BalanceReport]:
    """
    The weights of [`balance_style`], and what they cost.

    Args:
        dataset (`Dataset`):
            Preference rows; images are not read.
        max_weight (`float`, *optional*):
            Largest weight, in units of the mean weight.
        by (`str`, *optional*):
            A column whose values are balanced each by itself.
        features (`Sequence[str]`, *optional*):
            Which of `STYLE_FEATURES`; all by default.
        one_sided (`str`, *optional*, defaults to `"leave"`):
            What to do about style that leans one way only: `"leave"`, `"drop"` or `"refuse"`.

    Returns:
        `tuple[np.ndarray, BalanceReport]`: weights of shape `(N,)` and dtype `float64`, of mean 1 where there was no
        column `weight`, and the report.

    Raises:
        `ValueError`: as in [`balance_style`].
    """
    if max_weight is not None and not max_weight > 1:
        raise ValueError(f"`max_weight` is {max_weight}; it is in units of the mean weight, so give a number above 1.")
    if one_sided not in ONE_SIDED:
        raise ValueError(f"`one_sided` is {one_sided!r}; give {', '.join(ONE_SIDED)}.")
    parts = parts_by(dataset, by)
    style = read_pair_style(dataset, features)
    weight, found = np.zeros(len(style)), {}
    for name, rows in (parts or {"": np.arange(len(style))}).items():
        where = f" of {by} {name!r}" if parts else ""
        weight[rows], leaning = _weights(style.take(rows), max_weight, one_sided, where)
        found[name] = [_named(dataset, features_of, side, rows[places]) for features_of, side, places in leaning]
        if found[name] and one_sided == "refuse":
            raise ValueError(
                f"The style of some pairs{where} leans one way only: {'; '.join(map(str, found[name]))}. Add pairs "
                'where it leans the other way, leave features out by `features`, or pass `one_sided="leave"` or '
                '"drop".'
            )
    return weight, summarize(style, weight, parts, found, one_sided)


def _named(dataset: Dataset, features: tuple[str, ...], side: str, rows: np.ndarray) -> OneSidedStyle:
    first = rows[:_EXAMPLES].tolist()
    names = dataset.select(first)["pair_id"] if "pair_id" in dataset.column_names else [None] * len(first)
    examples = [f"row {row}" if name is None else str(name) for row, name in zip(first, names, strict=True)]
    return OneSidedStyle(features, side, len(rows), examples)


# Features, the side that has more of them, and the pairs where it does.
_Leaning = tuple[tuple[str, ...], str, np.ndarray]


def _weights(
    style: PairStyle, max_weight: float | None, one_sided: str, where: str
) -> tuple[np.ndarray, list[_Leaning]]:
    """Balanced weights of pairs that are balanced together, and the style that leans one way in some of them."""
    used = np.flatnonzero(style.weight)
    weight = np.zeros(len(style))
    if len(used) == 0:
        return weight, []
    total = style.weight.sum()
    leaning: list[_Leaning] = []
    columns, kept, is_impossible = style.difference[used], np.ones(len(used), dtype=bool), False
    while True:
        base = style.weight[used][kept]
        base = base / base.mean()
        directions = whiten(columns[kept])
        candidates = np.ones(int(kept.sum()), dtype=bool)
        free = None
        try:
            free = balance(directions, base)
            candidates = free < _LOST * base
        except NotBalanced:
            if not leaning:
                is_impossible = bool(separating_features(columns, style.features))
            if is_impossible and max_weight is None:
                raise ValueError(_impossible(columns, style.features, where)) from None
        more = _leaning(columns[kept], candidates, style.features, combinations=not is_impossible)
        if not more:
            break
        rows = np.flatnonzero(kept)
        for features, side, combination, found in more:
            places = rows[found]
            leaning.append((features, side, used[places]))
            if one_sided == "drop":
                kept[places] = False
            elif len(features) == 1:
                columns = columns * (np.array(style.features) != features[0])
            else:  # what is left of the features when this combination of them is taken out
                columns = _without(columns, combination)
        if not kept.any():
            raise ValueError(_impossible(style.difference[used], style.features, where))
    weight[used[kept]] = _within(directions, base, free, max_weight, columns[kept], style.features, where)
    return weight * (total / weight.sum()), leaning


def _leaning(
    columns: np.ndarray, candidates: np.ndarray, names: tuple[str, ...], combinations: bool
) -> list[tuple[tuple[str, ...], str, np.ndarray, np.ndarray]]:
    """Features that lean one way in some pairs; a combination of features like that where no single one does."""
    if not candidates.any():
        return []
    found: list[tuple[tuple[str, ...], str, np.ndarray, np.ndarray]] = []
    for index, name in enumerate(names):
        column = columns[:, index]
        places = np.flatnonzero(column)
        if 0 < len(places) < len(column) and ((column[places] > 0).all() or (column[places] < 0).all()):
            found.append(((name,), "chosen" if column[places[0]] > 0 else "rejected", np.empty(0), places))
    if found or not combinations:
        return found
    combination = one_sided_combination(columns, candidates)
    if combination is None:
        return []
    score = columns @ combination
    places = np.flatnonzero(score > 1e-7 * score.max())
    part = np.abs(combination) * np.sqrt((columns**2).mean(0))
    order = [index for index in np.argsort(-part, kind="stable").tolist() if part[index] > 1e-3 * part.max()]
    return [(tuple(names[index] for index in order), "one", combination, places)]


def _without(columns: np.ndarray, combination: np.ndarray) -> np.ndarray:
    """Columns that span what the given ones do, but for a combination of them, each in its own scale."""
    size = np.sqrt((columns**2).mean(0))
    scale = np.where(size > 0, size, 1.0)
    unit = combination * scale
    unit = unit / np.linalg.norm(unit)
    scaled = columns / scale
    return (scaled - np.outer(scaled @ unit, unit)) * scale


def _within(
    directions: np.ndarray,
    base: np.ndarray,
    free: np.ndarray | None,
    max_weight: float | None,
    columns: np.ndarray,
    features: tuple[str, ...],
    where: str,
) -> np.ndarray:
    """Weights within the bound, of mean 1; `free` are those without a bound, if there are any."""
    if max_weight is None:
        if free is None:
            raise ValueError(_impossible(columns, features, where))
        return free
    try:
        return balance_bounded(directions, base, max_weight)[0]
    except NotBalanced:
        bounded, left = balance_bounded(directions, base, max_weight, ridge=RIDGE)
    if left > _NOTICEABLE:
        logger.warning(
            f"Weights up to {max_weight} do not balance the style of the pairs{where}: in one direction, "
            f"{left:.3f} root mean squares are left. Raise `max_weight`, or leave it out."
        )
    return bounded


def _impossible(difference: np.ndarray, features: tuple[str, ...], where: str) -> str:
    advice = (
        "Add pairs where the rejected answer has it, leave it out by `features`, or set `max_weight` for the least "
        "imbalance."
    )
    names = separating_features(difference, features)
    if not names:  # 0 is on the border of the hull, or so near that numbers do not tell
        return (
            f"The style of the pairs{where} can be balanced with nearly all weight on a few of them only. Set "
            "`max_weight` for the least imbalance, or take fewer `features`."
        )
    if len(names) == 1 or all((difference[:, features.index(name)] != 0).all() for name in names):
        sides = []
        for name in names:
            column = difference[:, features.index(name)]
            if (column > 0).all() or (column < 0).all():
                sides.append(f"every {'chosen' if column[0] > 0 else 'rejected'} answer has more `{name}`")
        if sides:
            return f"No weights balance the style of the {len(difference)} pairs{where}: {', '.join(sides)}. {advice}"
    listed = ", ".join(f"`{name}`" for name in names)
    return (
        f"No weights balance the style of the {len(difference)} pairs{where}: a combination of {listed} is higher on "
        f"the same side of all. {advice.replace('it out', 'one out')}"
    )


def _systematic(weight: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows drawn, in their order, and for each the how-manyth copy it is."""
    count = len(weight)
    # In random order, so that a pattern in the order of the rows cannot fall in with the equal steps.
    order = rng.permutation(count)
    edges = np.cumsum(weight[order])
    marks = (rng.random() + np.arange(count)) * edges[-1] / count
    places = np.searchsorted(edges, marks, side="right")
    counts = np.zeros(count, dtype=np.int64)
    # Rounding may put the last mark on the last edge, which belongs to no row.
    np.add.at(counts, order[np.minimum(places, np.flatnonzero(weight[order])[-1])], 1)
    rows = np.repeat(np.arange(count), counts)
    starts = np.cumsum(counts) - counts
    return rows, np.arange(count) - np.repeat(starts, counts) + 1


_NEIGHBOURS = 16


def match_style(
    dataset: Dataset, *, caliper: float = 0.25, features: Sequence[str] | None = None, seed: int = 42
) -> Dataset:
    """
    Keeps pairs that have a style-mirrored partner: another pair whose difference of style is nearly minus its own.

    For users who want no weights. Over a couple, style speaks for the chosen answer as much as against it. Every pair
    is in one couple at most; the nearest are joined first. Pairs without a partner, as are most where nearly all style
    is on the chosen side, are left out; their number is logged.

    Args:
        dataset (`Dataset`):
            Preference rows; images are not read. A column `weight` stays and is not looked at.
        caliper (`float`, *optional*, defaults to `0.25`):
            Furthest that the style of a partner may be from the mirrored one: root mean square over the directions of
            style, each in units of its own root mean square.
        features (`Sequence[str]`, *optional*):
            Which of `STYLE_FEATURES`; all by default.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the choice among pairs of the same style.

    Returns:
        `Dataset`: an even number of rows, in their order.

    Raises:
        `ValueError`: if no two pairs are partners.
    """
    if not caliper > 0:
        raise ValueError(f"`caliper` is {caliper}; give a number above 0.")
    couples = find_couples(whiten(read_pair_style(dataset, features).difference), caliper, seed)
    rows = np.sort(couples.ravel())
    message = f"Matched {len(rows):,} of {len(dataset):,} pairs with a partner of the mirrored style."
    if len(rows) == 0:
        raise ValueError(f"{message} Raise `caliper`, take fewer `features`, or use `balance_style`.")
    logger.info(message)
    return dataset.select(rows)


def find_couples(directions: np.ndarray, caliper: float, seed: int) -> np.ndarray:
    """Joins rows to couples, greedily: of all candidates the nearest first.

    Shapes: `directions` `(N, R)`, returns `(C, 2)`.
    """
    num_rows, num_directions = directions.shape
    if num_directions == 0:  # no pair has any style, and each is any other's mirror
        return np.arange(num_rows - num_rows % 2).reshape(-1, 2)
    rng = np.random.default_rng(seed)
    # Pairs of one style are spread a little, or all of them would be offered the same few partners.
    points = directions + rng.normal(scale=1e-7, size=directions.shape)
    furthest = caliper * np.sqrt(num_directions)
    free, couples = np.arange(num_rows), [np.empty((0, 2), dtype=np.int64)]
    while len(free) > 1:
        tree = cKDTree(points[free])
        # One neighbour more than asked for, because a row may be its own.
        count = min(_NEIGHBOURS + 1, len(free))
        distance, place = tree.query(-points[free], k=count, distance_upper_bound=furthest, workers=-1)
        first = np.repeat(np.arange(len(free)), count)
        distance, second = distance.ravel(), place.ravel()
        valid = np.isfinite(distance) & (first != second)
        order = np.flatnonzero(valid)[np.argsort(distance[valid], kind="stable")]
        taken = np.zeros(len(free), dtype=bool)
        joined = []
        for one, other in zip(first[order].tolist(), second[order].tolist(), strict=True):
            if not (taken[one] or taken[other]):
                taken[one] = taken[other] = True
                joined.append((one, other))
        if not joined:
            break
        couples.append(free[np.array(joined)])
        free = free[~taken]
    return np.concatenate(couples)
