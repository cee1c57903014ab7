"""Balanced style: entropy balancing, the weights nearest to uniform under which style tells nothing, and matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from datasets import Dataset
from scipy.optimize import linprog, minimize, root
from scipy.spatial import cKDTree
from transformers.utils import logging

from ..data.mixing import with_columns
from .reports import SMALL, BalanceReport, OneSidedStyle
from .style import PairStyle, parts_by, read_pair_style


logger = logging.get_logger(__name__)

OneSided = Literal["leave", "drop", "refuse"]
ONE_SIDED: tuple[str, ...] = get_args(OneSided)

# Largest weighted mean of a whitened direction that counts as 0, and as not worth a warning.
TOLERANCE, _NOTICEABLE = 1e-10, 1e-6
RIDGE = 1e-4  # price of coefficients where a bound leaves no exact balance; the imbalance is then about the least
_LOST = 1e-4  # a pair whose weight is multiplied by less may be one that no balance leaves any weight
_NUM_EXAMPLES, _NUM_NEIGHBORS = 5, 16


class NotBalanced(Exception):
    """The solver did not reach a balance."""


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
    Balance style: more weight for pairs whose style speaks for the rejected answer, less for the others.

    These are the weights nearest to uniform, or to an existing column `weight`, in relative entropy, under which the
    mean difference of every style feature is 0: \(\sum_i w_i f_i = 0\), with \(f_i\) the chosen minus the rejected
    style. Then a linear probe of style has coefficient 0, and a linear reward gains nothing from style. The cost is
    logged in a line, and in the report of [`style_weights`], which computes the weights without making a data set.

    Args:
        dataset (`Dataset`):
            Preference rows; images are not read.
        max_weight (`float`, *optional*):
            Largest weight, in units of the mean weight, above 1. Where the others cannot make up for it, about the
            least possible imbalance is left, and a warning says how much. Lower means more effective pairs and less
            balance.
        by (`str`, *optional*):
            Column, such as `"source"`, each of whose values is balanced on its own and keeps its total weight.
        method (`str`, *optional*, defaults to `"weights"`):
            `"weights"` writes the column `weight`, which the trainer reads. `"resample"` draws as many rows with these
            probabilities, by systematic resampling, and leaves no column `weight`: a row of weight 2.3 occurs 2 or 3
            times, with `#2` and `#3` appended to its `pair_id`. Balance then holds up to the draw.
        features (`Sequence[str]`, *optional*):
            Some of `STYLE_FEATURES`; all by default.
        one_sided (`str`, *optional*, defaults to `"leave"`):
            Action on style, or a combination of features, that leans one way only, such as links that occur in chosen
            answers alone: no weights but 0 balance such pairs. `"leave"` keeps that style out of the balance, `"drop"`
            sets the weight of the pairs to 0, and `"refuse"` raises an error. The report names style and pairs.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw.

    Returns:
        `Dataset`: the rows in their order. Weights are finite and >= 0, and keep their sum.

    Raises:
        `ValueError`: if no weights balance the pairs, because some style, which the message names, is on the same side
            of all of them; with `one_sided="refuse"` also if it is of some. Also if an argument is out of range or a
            row has no answer.
    """
    if method not in ("weights", "resample"):
        raise ValueError(f'`method` is {method!r}; pass "weights" or "resample".')
    weight, report = style_weights(dataset, max_weight=max_weight, by=by, features=features, one_sided=one_sided)
    (logger.warning if report.one_sided else logger.info)(report.summary())
    if method == "weights":
        return with_columns(dataset, {"weight": weight})
    rows, copies = _systematic(weight, np.random.default_rng(seed))
    drawn = dataset.select(rows)
    if "weight" in drawn.column_names:
        drawn = drawn.remove_columns("weight")
    if "pair_id" in drawn.column_names:
        named = zip(drawn.select_columns("pair_id")["pair_id"], copies, strict=True)
        names = [name if copy == 1 or name is None else f"{name}#{copy}" for name, copy in named]
        drawn = with_columns(drawn, {"pair_id": names})
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
    Compute the weights of [`balance_style`], and their cost.

    Args:
        dataset, max_weight, by, features, one_sided:
            As in [`balance_style`], as are the errors.

    Returns:
        `tuple[np.ndarray, BalanceReport]`: weights of shape `(N,)` and dtype `float64`, of mean 1 where there was no
        column `weight`, and the report.
    """
    if max_weight is not None and not max_weight > 1:
        raise ValueError(f"`max_weight` is {max_weight}; it is in units of the mean weight, so pass a number above 1.")
    if one_sided not in ONE_SIDED:
        raise ValueError(f"`one_sided` is {one_sided!r}; pass {', '.join(ONE_SIDED)}.")
    parts = parts_by(dataset, by)
    style = read_pair_style(dataset, features)
    weight, leaning = np.zeros(len(style)), {}
    for name, rows in (parts or {"": np.arange(len(style))}).items():
        where = f" of {by} {name!r}" if parts else ""
        weight[rows], leans = _weights(style.take(rows), max_weight, one_sided, where)
        leaning[name] = [_one_sided_style(dataset, lean, rows[lean.rows]) for lean in leans]
        if leaning[name] and one_sided == "refuse":
            raise ValueError(
                f"The style of some pairs{where} leans one way only: {'; '.join(map(str, leaning[name]))}. Add pairs "
                'where it leans the other way, take fewer `features`, or pass `one_sided="leave"` or "drop".'
            )
    return weight, _report(style, weight, parts, leaning, one_sided)


def _report(
    style: PairStyle, weight: np.ndarray, parts: dict[str, np.ndarray], leaning: dict[str, list], action: str
) -> BalanceReport:
    total, tiny = float(weight.sum()), np.finfo(float).tiny
    share = weight / total if total > 0 else weight
    before, after = style.weight @ style.difference / max(float(style.weight.sum()), tiny), share @ style.difference
    mean, weighted = max(total / max(len(weight), 1), tiny), weight[style.weight > 0]
    spread = np.where(style.spread > 0, style.spread, 1.0)
    return BalanceReport(
        num_pairs=len(style),
        effective_size=float(1 / (share**2).sum()) if total > 0 else 0.0,
        max_weight=float(weight.max() / weight.mean()) if total > 0 else 0.0,
        residual=float(np.abs(after).max()),
        before=dict(zip(style.features, (before / spread).tolist(), strict=True)),
        after=dict(zip(style.features, (after / spread).tolist(), strict=True)),
        min_weight=float(weighted.min() / mean) if len(weighted) else 0.0,
        num_small=int((weighted < SMALL * mean).sum()),
        total_weight=total,
        one_sided=[style for styles in leaning.values() for style in styles],
        one_sided_action=action,
        parts={
            name: _report(style.take(rows), weight[rows], {}, {name: leaning.get(name, [])}, action)
            for name, rows in parts.items()
        },
    )


class _Lean(NamedTuple):
    """Style that leans one way in some rows."""

    features: tuple[str, ...]
    side: str
    combination: np.ndarray  # (K,), or (0,) for a single feature
    rows: np.ndarray


def _one_sided_style(dataset: Dataset, lean: _Lean, rows: np.ndarray) -> OneSidedStyle:
    first = rows[:_NUM_EXAMPLES].tolist()
    names = dataset.select(first)["pair_id"] if "pair_id" in dataset.column_names else [None] * len(first)
    examples = [f"row {row}" if name is None else str(name) for row, name in zip(first, names, strict=True)]
    return OneSidedStyle(lean.features, lean.side, len(rows), examples)


def _weights(style: PairStyle, max_weight: float | None, one_sided: str, where: str) -> tuple[np.ndarray, list[_Lean]]:
    """Balanced weights of pairs that are balanced together, and the style that leans one way in some of them."""
    used, weight = np.flatnonzero(style.weight), np.zeros(len(style))
    if len(used) == 0:
        return weight, []
    leaning: list[_Lean] = []
    columns, kept, is_impossible = style.difference[used], np.ones(len(used), dtype=bool), False
    while True:
        base = style.weight[used][kept]
        base, directions = base / base.mean(), whiten(columns[kept])
        candidates, free = np.ones(len(base), dtype=bool), None
        try:
            free, _ = balance(directions, base)
            candidates = free < _LOST * base
        except NotBalanced:
            if not leaning:
                is_impossible = bool(separating_features(columns, style.features))
            if is_impossible and max_weight is None:
                raise ValueError(_impossible(columns, style.features, where)) from None
        more = _leaning(columns[kept], candidates, style.features, combinations=not is_impossible)
        if not more:
            break
        for lean, rows in [(lean, np.flatnonzero(kept)[lean.rows]) for lean in more]:
            leaning.append(lean._replace(rows=used[rows]))
            if one_sided == "drop":
                kept[rows] = False
            elif len(lean.features) == 1:
                columns = columns * (np.array(style.features) != lean.features[0])
            else:  # the rest of the features without this combination of them
                columns = _without(columns, lean.combination)
        if not kept.any():
            raise ValueError(_impossible(style.difference[used], style.features, where))
    if max_weight is not None:
        try:
            free, _ = balance(directions, base, max_weight)
        except NotBalanced:
            free, left = balance(directions, base, max_weight, ridge=RIDGE)
            if left > _NOTICEABLE:
                logger.warning(
                    f"Weights up to {max_weight} do not balance the style of the pairs{where}: in one direction, "
                    f"{left:.3f} root mean squares are left. Raise `max_weight`, or leave it out."
                )
    if free is None:
        raise ValueError(_impossible(columns[kept], style.features, where))
    weight[used[kept]] = free
    return weight * (style.weight.sum() / weight.sum()), leaning


def _leaning(columns: np.ndarray, candidates: np.ndarray, names: tuple[str, ...], combinations: bool) -> list[_Lean]:
    """Features that lean one way in some pairs; a combination of features like that where no single one does."""
    if not candidates.any():
        return []
    single = []
    for name, column in zip(names, columns.T, strict=True):
        rows = np.flatnonzero(column)
        if 0 < len(rows) < len(column) and (side := _one_side(column[rows])):
            single.append(_Lean((name,), side, np.empty(0), rows))
    if single or not combinations:
        return single
    combination = one_sided_combination(columns, candidates)
    if combination is None:
        return []
    score, part = columns @ combination, np.abs(combination) * _sizes(columns)
    order = np.argsort(-part, kind="stable").tolist()
    features = tuple(names[index] for index in order if part[index] > 1e-3 * part.max())
    return [_Lean(features, "one", combination, np.flatnonzero(score > 1e-7 * score.max()))]


def _one_side(column: np.ndarray) -> str | None:
    """The side that has more of a feature in every pair, if any."""
    return "chosen" if (column > 0).all() else "rejected" if (column < 0).all() else None


def _sizes(columns: np.ndarray) -> np.ndarray:
    return np.sqrt((columns**2).mean(0))


def _without(columns: np.ndarray, combination: np.ndarray) -> np.ndarray:
    """Columns that span what the given ones do, but for a combination of them, each in its own scale."""
    size = _sizes(columns)
    scale = np.where(size > 0, size, 1.0)
    unit, scaled = combination * scale, columns / scale
    unit = unit / np.linalg.norm(unit)
    return (scaled - np.outer(scaled @ unit, unit)) * scale


def _impossible(difference: np.ndarray, features: tuple[str, ...], where: str) -> str:
    """The message for style that no weights balance."""
    names = separating_features(difference, features)
    if not names:  # 0 is on the border of the hull, or so near that numbers do not tell
        return (
            f"The style of the pairs{where} can be balanced with nearly all weight on a few of them only. Set "
            "`max_weight` for the least imbalance, or take fewer `features`."
        )
    columns = {name: difference[:, features.index(name)] for name in names}
    sides = {name: side for name, column in columns.items() if (side := _one_side(column))}
    listed, it = ", ".join(f"`{name}`" for name in names), "one"
    reason = f"a combination of {listed} is higher on the same side of all"
    if sides and (len(names) == 1 or all(column.all() for column in columns.values())):
        reason, it = ", ".join(f"every {side} answer has more `{name}`" for name, side in sides.items()), "it"
    return (
        f"No weights balance the style of the {len(difference)} pairs{where}: {reason}. Add pairs where the rejected "
        f"answer has it, leave {it} out by `features`, or set `max_weight` for the least imbalance."
    )


def _systematic(weight: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows drawn, in their order, and the 1-based number of each copy."""
    count = len(weight)
    # In random order, so that a pattern in the order of the rows cannot fall in with the equal steps.
    order = rng.permutation(count)
    edges = np.cumsum(weight[order])
    marks = (rng.random() + np.arange(count)) * edges[-1] / count
    # Rounding may put the last mark on the last edge, which belongs to no row.
    drawn = np.minimum(np.searchsorted(edges, marks, side="right"), np.flatnonzero(weight[order])[-1])
    rows = np.sort(order[drawn])
    return rows, np.arange(count) - np.searchsorted(rows, rows) + 1


def whiten(columns: np.ndarray) -> np.ndarray:
    """Orthogonal directions of mean square 1 that span columns. Shapes: `columns` `(N, K)`, returns `(N, R)`."""
    size = _sizes(columns)
    columns = columns[:, size > 0] / size[size > 0]
    if columns.shape[1] == 0:
        return columns
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, singular > 1e-10 * singular[0]] * np.sqrt(len(columns))


# scipy minimizes and solves here; no kept package has this dual with base weights, a bound and exactness to 1e-10, nor
# names the features in the way of a balance.
def balance(
    directions: np.ndarray, base: np.ndarray, bound: float | None = None, *, ridge: float = 0.0
) -> tuple[np.ndarray, float]:
    """Balanced weights of mean 1, at most `bound`, and the imbalance left. Shapes: `(N, R)`, `(N,)`, to `(N,)`."""
    # The dual has one more unknown, mu, which keeps the sum: it minimizes the mean of phi_i(lambda f_i + mu) less mu,
    # where phi_i goes on as a straight line from where its slope, the weight, reaches the bound.
    count = len(base)
    columns = np.column_stack([directions, np.ones(count)])
    bound = count + 1.0 if bound is None else bound  # which no weights of mean 1 reach
    log_base, log_bound = np.log(base), np.log(bound)
    target = np.r_[np.zeros(directions.shape[1]), 1.0]
    price = ridge * (1.0 - target)

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

    # scipy's trust-region Newton method stops where rounding hides that the objective still falls, at gradients of
    # about 1e-8; from there MINPACK's `hybrj`, which looks at the gradient alone, reaches 1e-12.
    start, options = np.zeros(columns.shape[1]), {"gtol": 1e-8, "maxiter": 500}
    point = minimize(objective, start, jac=gradient, hess=hessian, method="trust-exact", options=options).x
    with np.errstate(all="ignore"):
        polished = root(gradient, point, jac=hessian, method="hybr", options={"xtol": 1e-14}).x
        if np.abs(gradient(polished)).max() < np.abs(gradient(point)).max():
            point = polished
    if np.abs(gradient(point)).max() > TOLERANCE:
        raise NotBalanced
    weight = weights(point)
    return weight / weight.mean(), float(np.abs(weight @ directions).max(initial=0.0) / count)


def one_sided_combination(columns: np.ndarray, candidates: np.ndarray) -> np.ndarray | None:
    """A combination `(K,)` at least 0 in every pair and above 0 in some, which lose all weight in a balance."""
    size = _sizes(columns)
    scale = np.where(size > 0, size, 1.0)
    scaled = columns / scale
    basis = np.eye(columns.shape[1])[:, size > 0]
    if not candidates.all():
        _, singular, right = np.linalg.svd(scaled[~candidates], full_matrices=True)
        rank = int((singular > 1e-9 * max(float(singular[0]), 1e-300)).sum())
        basis = right[rank:].T * (size > 0)[:, None]
    rows = np.unique(scaled[candidates] @ basis, axis=0)
    if rows.size == 0 or not np.abs(rows).max() > 1e-9:
        return None
    solved = linprog(-rows.mean(0), A_ub=-rows, b_ub=np.zeros(len(rows)), bounds=(-1, 1), method="highs")
    if not solved.success or -solved.fun < 1e-9:
        return None
    combination = basis @ solved.x
    combination[np.abs(combination) < 1e-9 * np.abs(combination).max()] = 0.0
    return combination / scale


def separating_features(columns: np.ndarray, names: Sequence[str]) -> list[str]:
    """Features that keep 0 out of the convex hull of the rows: a combination of them is above 0 in every pair."""
    size = _sizes(columns)
    used = np.flatnonzero(size > 0)
    columns, names = columns[:, used] / size[used], [names[index] for index in used.tolist()]
    if alone := [name for name, column in zip(names, columns.T, strict=True) if _one_side(column)]:
        return alone
    # Unknowns are the positive and the negative parts of the combination, which sum up to 1 at most, and the least
    # value that it has in any pair, which is maximized.
    num, unique = len(used), np.unique(columns, axis=0)
    solved = linprog(
        np.r_[np.zeros(2 * num), -1.0],
        A_ub=np.vstack([np.column_stack([-unique, unique, np.ones(len(unique))]), [[1.0] * (2 * num) + [0.0]]]),
        b_ub=np.r_[np.zeros(len(unique)), 1.0],
        bounds=[(0, None)] * (2 * num) + [(None, None)],
        method="highs",
    )
    if not solved.success or -solved.fun < 1e-9:
        return []
    part = np.abs(solved.x[:num] - solved.x[num : 2 * num])
    # The largest margin takes a little of every feature; what matters little is not named.
    return [names[index] for index in np.argsort(-part)[:5].tolist() if part[index] > 0.1 * part.max()]


def match_style(
    dataset: Dataset, *, caliper: float = 0.25, features: Sequence[str] | None = None, seed: int = 42
) -> Dataset:
    """
    Keep pairs that have a style-mirrored partner: another pair whose difference of style is nearly minus its own.

    An alternative to weights: over a couple, style speaks for the chosen answer as much as against it. Every pair is
    in at most one couple; the nearest are joined first. Pairs without a partner are dropped; their number is logged.

    Args:
        dataset, features:
            As in [`balance_style`]. A column `weight` is kept and ignored.
        caliper (`float`, *optional*, defaults to `0.25`):
            Largest distance of a partner's style from the mirrored one: root mean square over the directions of style,
            each in units of its own root mean square.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the choice among pairs of the same style.

    Returns:
        `Dataset`: an even number of rows, in their order.

    Raises:
        `ValueError`: if no two pairs are partners.
    """
    if not caliper > 0:
        raise ValueError(f"`caliper` is {caliper}; pass a number above 0.")
    couples = find_couples(whiten(read_pair_style(dataset, features).difference), caliper, seed)
    rows = np.sort(couples.ravel())
    message = f"Matched {len(rows):,} of {len(dataset):,} pairs with a partner of the mirrored style."
    if len(rows) == 0:
        raise ValueError(f"{message} Raise `caliper`, take fewer `features`, or use `balance_style`.")
    logger.info(message)
    return dataset.select(rows)


def find_couples(directions: np.ndarray, caliper: float, seed: int) -> np.ndarray:
    """Join rows to couples `(C, 2)`, greedily: of all candidates the nearest first."""
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
        # One neighbor more, because a row may be its own.
        count = min(_NUM_NEIGHBORS + 1, len(free))
        distance, neighbor = tree.query(-points[free], k=count, distance_upper_bound=furthest, workers=-1)
        first = np.repeat(np.arange(len(free)), count)
        distance, second = distance.ravel(), neighbor.ravel()
        valid = np.isfinite(distance) & (first != second)
        order = np.flatnonzero(valid)[np.argsort(distance[valid], kind="stable")]
        taken, joined = np.zeros(len(free), dtype=bool), []
        for row, partner in zip(first[order].tolist(), second[order].tolist(), strict=True):
            if not (taken[row] or taken[partner]):
                taken[row] = taken[partner] = True
                joined.append((row, partner))
        if not joined:
            break
        couples.append(free[np.array(joined)])
        free = free[~taken]
    return np.concatenate(couples)
