"""Agreed pairs as canonical rows, with every score beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Value

from ..data.messages import FEATURES
from ..judge.rubric import Rubric
from .judged_pairs import JudgedPair
from .judging import ListScores


# Canonical columns, and what a pair was made of; `provenance` is JSON with every score of both sides.
DISTILLED_FEATURES = FEATURES.copy()
DISTILLED_FEATURES.update(
    {
        "generator": Value("string"),
        "chosen_origin": Value("string"),
        "rejected_origin": Value("string"),
        "listwise_gap": Value("float64"),
        "pointwise_gap": Value("float64"),
        "strength_bin": Value("int64"),
        "provenance": Value("string"),
    }
)


def pair_row(
    pair: JudgedPair,
    strength_bin: int,
    source: str,
    about: Mapping[str, str],
    rubric: Rubric,
    effects: Mapping[int, Sequence[float]],
) -> dict[str, Any]:
    """
    All columns of a pair but its images.

    Args:
        pair ([`JudgedPair`]):
            The pair.
        strength_bin (`int`):
            Its bin.
        source (`str`):
            What the column `source` says, and the beginning of `pair_id`.
        about (`Mapping[str, str]`):
            What the provenance says of the judge.
        rubric ([`Rubric`]):
            Weights of the criteria.
        effects (`Mapping[int, Sequence[float]]`):
            What positions are worth, by the length of lists.

    Returns:
        `dict`: the columns of [`DISTILLED_FEATURES`] without `images`.
    """
    one, question = pair.one, pair.one.pool.question
    sides = {"chosen": pair.agreed.better, "rejected": pair.agreed.worse}
    counts = {name: getattr(pair.counts, name) for name in ("agreed", "opposed", "close")}
    last = next(given for given in reversed(one.rounds) if given)
    provenance: dict[str, Any] = {**about, "list_length": len(last[0].order), "pairs_of_prompt": counts}
    row: dict[str, Any] = {"prompt": question.prompt}
    for side, candidate in sides.items():
        given = one.pool.candidates[candidate]
        row[side] = [{"role": "assistant", "content": [{"type": "text", "text": given.text}]}]
        row[f"{side}_origin"] = given.origin
        provenance[side] = {
            "listwise": pair.listwise[candidate],
            "lists": list(_list_scores(last, candidate, effects)),
            "pointwise": rubric.total(one.criteria[candidate]),
            "criteria": one.criteria[candidate],
        }
    return {
        **row,
        "strength": pair.agreed.strength,
        "pair_id": f"{source}-{pair.key}",
        "group_id": question.group_id,
        "source": source,
        "source_id": question.source_id,
        "generator": one.pool.generator,
        "listwise_gap": pair.agreed.listwise_gap,
        "pointwise_gap": pair.agreed.pointwise_gap,
        "strength_bin": strength_bin,
        "provenance": json.dumps(provenance, ensure_ascii=False),
    }


def _list_scores(
    lists: Sequence[ListScores], candidate: int, effects: Mapping[int, Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """A candidate's score in each list, with the place it had, and without what that was worth."""
    for given in lists:
        position = given.order.index(candidate)
        score = given.scores[position]
        worth = effects.get(len(given.order), (0.0,) * len(given.order))[position]
        yield {"position": position, "score": score, "corrected": score - worth}
