"""Position bias of a judge that scores several answers in one call: its estimate, and scores without it.

With answers shown in balanced orders, position can be told from quality: a score is the quality of the candidate, plus
the effect of its position, plus spread, and now and then noise that has nothing to do with the answer.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...utils import digest
from ..reports import PositionBias


_MAX_ROUNDS, _TOLERANCE = 500, 1e-5
_SMALLEST_WEIGHT = 1e-6  # keeps a mean where all scores of a candidate look like noise
_FIRST_SPREAD, _SMALLEST_SPREAD = 0.1, 0.01  # shares of the scale
_MOST_NOISE = 0.5
_NUM_GROUPS = 20  # of the jackknife


def balanced_orders(num_candidates: int, num_shuffles: int, seed: str) -> list[list[int]]:
    """Orders to show candidates in, balanced over positions."""
    # Every `num_candidates` orders are a cyclic Latin square over a drawn permutation: each candidate is in each
    # position once, and with a step that has no divisor in common with their number, every position is linked with
    # every other within a prompt. Fewer orders are a part of a square.
    rng = np.random.default_rng(list(bytes.fromhex(digest(seed))))
    steps = [step for step in range(1, num_candidates + 1) if math.gcd(step, num_candidates) == 1]
    orders: list[list[int]] = []
    while len(orders) < min(num_shuffles, math.factorial(num_candidates)):
        base, step = rng.permutation(num_candidates), int(rng.choice(steps))
        square = [np.roll(base, shift * step).tolist() for shift in range(num_candidates)]
        if not any(order in orders for order in square):
            orders += square[: num_shuffles - len(orders)]
    return orders


def fit_positions(
    scores: np.ndarray,
    candidates: np.ndarray,
    positions: np.ndarray,
    prompts: np.ndarray,
    *,
    num_positions: int,
    low: float,
    high: float,
) -> tuple[np.ndarray, PositionBias | None]:
    """Qualities of candidates and the position bias, from the scores of lists of one length. Shapes: all `(n,)`."""
    linked = _links_all(candidates, positions, num_positions)
    fit = _Fit(scores, candidates, positions, num_positions if linked else 1, high - low).run()
    if not linked or num_positions < 2:
        return fit.qualities, None
    errors = _jackknife(fit, prompts)
    effects, standard_errors = tuple(fit.effects.tolist()), None if errors is None else tuple(errors.tolist())
    num_lists, state = len(scores) // num_positions, (float(fit.noise_rate), float(fit.spread))
    return fit.qualities, PositionBias(num_positions, num_lists, effects, standard_errors, *state)


# `scipy.optimize.least_squares(loss="soft_l1")` tells neither noise nor spread, which the report shows, and errs more
# about planted effects seen in three or four orders, up to tenfold; `test_a_robust_loss_errs_more` measures it.
class _Fit:
    """A two-way additive model mixed with noise, and the state of its estimation by expectation maximization.

    Noise is taken as drawn evenly from the whole scale, and a score counts by its probability to be none. Plain least
    squares would shrink the effects by the share of noise.
    """

    def __init__(self, scores: np.ndarray, candidates: np.ndarray, positions: np.ndarray, num: int, width: float):
        self.scores, self.num_positions, self.width = scores.astype(np.float64), num, width
        self.candidates, self.positions = candidates, positions if num > 1 else np.zeros_like(positions)
        self.effects: np.ndarray = np.zeros(num)
        self.qualities = ndimage.median(self.scores, candidates, np.arange(candidates.max() + 1))
        # From wide to narrow: from a narrow start, a step up or down on a scale of whole numbers looks like noise.
        self.spread, self.noise_rate = _FIRST_SPREAD * width, 0.1
        steps = np.diff(np.unique(self.scores))
        rounding = float(steps.min()) / math.sqrt(12) if len(steps) else 0.0
        self.smallest_spread = max(rounding, _SMALLEST_SPREAD * width)

    def run(self) -> _Fit:
        for _ in range(_MAX_ROUNDS):
            before = np.array([*self.effects, self.spread, self.noise_rate])
            self._step()
            if np.abs(np.array([*self.effects, self.spread, self.noise_rate]) - before).max() < _TOLERANCE:
                break
        return self

    def without(self, rows: np.ndarray) -> _Fit:
        """The model of the other scores, starting where this one ended."""
        kept, candidates = np.unique(self.candidates[~rows], return_inverse=True)
        part = _Fit(self.scores[~rows], candidates, self.positions[~rows], self.num_positions, self.width)
        part.effects, part.spread, part.noise_rate = self.effects, self.spread, self.noise_rate
        part.qualities = self.qualities[kept]
        return part

    def _residuals(self) -> np.ndarray:
        return self.scores - self.qualities[self.candidates] - self.effects[self.positions]

    def _step(self) -> None:
        residuals = self._residuals()
        density = np.exp(-0.5 * (residuals / self.spread) ** 2) / (self.spread * math.sqrt(2 * math.pi))
        weights = (1 - self.noise_rate) * density
        weights = np.maximum(weights / (weights + self.noise_rate / self.width), _SMALLEST_WEIGHT)

        # Weighted least squares with the candidates projected out, which leaves one equation for each position.
        count, num = len(self.qualities), self.num_positions
        total = np.bincount(self.candidates, weights, count)
        means = np.bincount(self.candidates, weights * self.scores, count) / total
        counts: np.ndarray = np.bincount(self.candidates * num + self.positions, weights, count * num)
        shares = counts.reshape(count, num) / total[:, None]
        matrix = np.diag(np.bincount(self.positions, weights, num)) - shares.T @ (total[:, None] * shares)
        target = np.bincount(self.positions, weights * self.scores, num) - shares.T @ (total * means)
        # A constant could move from positions to candidates; the added term makes the effects sum to zero.
        scale = float(np.trace(matrix)) or 1.0
        self.effects = np.linalg.solve(matrix + scale * np.ones((num, num)) / num, target)
        self.effects -= self.effects.mean()
        self.qualities = means - shares @ self.effects

        squares = float((weights * self._residuals() ** 2).sum())
        freedom = max(float(weights.sum()) - count - num + 1, 1.0)
        self.spread = max(math.sqrt(squares / freedom), self.smallest_spread)
        self.noise_rate = min(max(1.0 - float(weights.mean()), 1e-4), _MOST_NOISE)


def _links_all(candidates: np.ndarray, positions: np.ndarray, num_positions: int) -> bool:
    """`True` if every position is linked with every other through candidates that were seen in both."""
    first = int(candidates.max()) + 1
    edges = np.ones(len(candidates)), (candidates, first + positions)
    graph = coo_array(edges, shape=(first + num_positions, first + num_positions))
    return len(np.unique(connected_components(graph, directed=False)[1][first:])) == 1


def _jackknife(fit: _Fit, prompts: np.ndarray) -> np.ndarray | None:
    """Standard errors of the effects from leaving out groups of prompts in turn."""
    numbers = np.unique(prompts, return_inverse=True)[1]
    num_groups = min(_NUM_GROUPS, int(numbers.max()) + 1)
    if num_groups < 2:
        return None
    groups = numbers % num_groups
    estimates = []
    for group in range(num_groups):
        part = fit.without(groups == group)
        if not _links_all(part.candidates, part.positions, fit.num_positions):
            return None
        estimates.append(part.run().effects)
    deviations = np.array(estimates) - np.mean(estimates, axis=0)
    return np.sqrt((num_groups - 1) / num_groups * (deviations**2).sum(axis=0))
