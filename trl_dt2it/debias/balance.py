"""Weights under which style tells a linear reward nothing about which answer was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from .balance_report import BalanceReport, OneSidedStyle, summarize
from .entropy import RIDGE, NotBalanced, balance, balance_bounded, one_sided_combination, separating_features, whiten
from .pair_style import PairStyle, parts_by, read_pair_style, with_column


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
