r"""Entropy balancing: the weights nearest to given ones under which every column of a matrix has mean 0.

Minimise \(\sum_i w_i \log (w_i / q_i)\) with \(\sum_i w_i f_i = 0\) and \(\sum_i w_i = \sum_i q_i\). The solution is
\(w_i \propto q_i e^{\lambda f_i}\), where \(\lambda\) minimises the convex \(\log \sum_i q_i e^{\lambda f_i}\): as
many unknowns as features, however many pairs. With an upper bound c it is
\(w_i = \min(c, q_i e^{\lambda f_i + \mu})\).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog, minimize, root
from scipy.special import logsumexp


# scipy minimizes and solves here; no kept package has this dual with base weights, a bound and exactness to 1e-10, nor
# names the features in the way of a balance.
# Largest weighted mean of a whitened direction that counts as 0.
TOLERANCE = 1e-10
# Where a bound leaves no exact balance, coefficients cost this much; the imbalance is then about the least possible.
RIDGE = 1e-4


class NotBalanced(Exception):
    """The solver did not reach a balance."""


def whiten(columns: np.ndarray) -> np.ndarray:
    """
    Orthogonal directions that span the columns, each of mean square 1: without what is constant 0 or collinear.

    Args:
        columns (`np.ndarray` of shape `(N, K)`):
            Differences of style.

    Returns:
        `np.ndarray` of shape `(N, R)`: R at most K, and at most N.
    """
    size = np.sqrt((columns**2).mean(0))
    columns = columns[:, size > 0] / size[size > 0]
    if columns.shape[1] == 0:
        return columns
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, singular > 1e-10 * singular[0]] * np.sqrt(len(columns))


def balance(directions: np.ndarray, base: np.ndarray) -> np.ndarray:
    """
    Balanced weights without a bound.

    scipy's trust-region Newton method goes to where rounding hides that the objective still falls, at gradients of
    about 1e-8; from there MINPACK's `hybrj`, which looks at the gradient alone, goes to 1e-12.

    Args:
        directions (`np.ndarray` of shape `(N, R)`):
            From [`whiten`].
        base (`np.ndarray` of shape `(N,)`):
            Weights to stay near to, all above 0.

    Returns:
        `np.ndarray` of shape `(N,)`: weights with the sum of `base`.

    Raises:
        [`NotBalanced`]: if a weighted mean stays above the tolerance.
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
    r"""
    Balanced weights that are at most `bound`.

    The dual has one unknown more, \(\mu\), which keeps the sum: it minimises the mean of \(\phi_i(\lambda f_i + \mu)\)
    less \(\mu\), where \(\phi_i\) goes on as a straight line from where its slope, the weight, reaches the bound.

    Args:
        directions (`np.ndarray` of shape `(N, R)`):
            From [`whiten`].
        base (`np.ndarray` of shape `(N,)`):
            Weights to stay near to, all above 0, of mean 1.
        bound (`float`):
            Largest weight, above 1.
        ridge (`float`, *optional*, defaults to `0.0`):
            Price of coefficients. Above 0 there is always a solution; it leaves an imbalance of `ridge` times them.

    Returns:
        `tuple[np.ndarray, float]`: weights of mean 1 of shape `(N,)`, and the largest weighted mean of a direction.

    Raises:
        [`NotBalanced`]: if the solver stops elsewhere.
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
    """
    Finds a combination that is at least 0 in every pair and above 0 in some: these lose all weight in a balance.

    Args:
        columns (`np.ndarray` of shape `(N, K)`):
            Differences of style.
        candidates (`np.ndarray` of shape `(N,)` and dtype `bool`):
            Pairs that may lose all weight. In the others, which a balance gives weight, the combination is 0.

    Returns:
        `np.ndarray` of shape `(K,)`, *optional*: its coefficients; `None` if there is none.
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
    """
    Names the features that keep 0 out of the convex hull: a combination of them is above 0 in every pair.

    Args:
        columns (`np.ndarray` of shape `(N, K)`):
            Differences of style.
        names (`Sequence[str]` of length K):
            Features.

    Returns:
        `list[str]`: a single feature if one does it alone, otherwise the parts of a sparse combination, the weightiest
        first; empty if there is none, and 0 is in the hull.
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
