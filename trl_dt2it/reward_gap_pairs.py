"""Preference pairs out of scored answers: the better of two answers is the one with the higher reward.

The best answer of a prompt is paired with its worst, the second best with the second worst, and so on, so that no
answer stands in two pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from datasets import Dataset, Value

from .data.images import ImageOptions
from .data.messages import FEATURES, with_images
from .data.rows import RowError, check_row
from .dataset_scoring import REWARD_COLUMNS
from .scored_answers import ScoredAnswers


# Canonical columns, and the rewards; `strength` is their difference.
GAP_FEATURES = FEATURES.copy()
GAP_FEATURES.update({name: Value("float64") for name in REWARD_COLUMNS})


@dataclass
class GapReport:
    """
    What became of the answers.

    Parameters:
        prompts, answers, pairs (`int`):
            How many there were, and how many pairs came of them.
        prompts_without_pair (`int`):
            Prompts whose answers lie too close together, or are too few.
        left_out (`dict[str, int]`):
            Answers that were dropped before pairing, by reason: `empty`, `unfinished`, `unscored` or `equal`; and
            `unusable`, pairs that [`~trl_dt2it.data.check_row`] refuses.
        gaps (`list[float]`):
            Difference of the rewards of each pair.
    """

    prompts: int = 0
    answers: int = 0
    pairs: int = 0
    prompts_without_pair: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)


def gap_pairs(rewards: Sequence[float], *, min_gap: float, max_pairs: int | None) -> list[tuple[int, int]]:
    """
    Which answers to a prompt make pairs.

    Args:
        rewards (`Sequence[float]` of length N):
            Reward of each answer.
        min_gap (`float`):
            Smallest difference of the rewards of a pair; pairs without any difference are never made.
        max_pairs (`int`, *optional*):
            Most pairs; `None` for no limit.

    Returns:
        `list[tuple[int, int]]`: the places of the better and the worse answer, the largest gap first. Of equal rewards
        the earlier answer counts as better.
    """
    order = sorted(range(len(rewards)), key=lambda place: -rewards[place])
    pairs = list(zip(order, reversed(order), strict=True))[: len(order) // 2]
    wide = [(a, b) for a, b in pairs if rewards[a] - rewards[b] >= min_gap and rewards[a] > rewards[b]]
    return wide[:max_pairs]


def build_gap_pairs(
    rows: Dataset,
    scored: Sequence[ScoredAnswers],
    *,
    min_gap: float,
    pairs_per_prompt: int | None,
    source: str,
    image_options: ImageOptions,
    drop_unfinished: bool = True,
) -> tuple[Dataset, GapReport]:
    """
    Preference rows out of the scored answers of a data set of prompts.

    Args:
        rows (`Dataset`):
            The rows of the prompts, which have the images.
        scored (`Sequence[ScoredAnswers]`):
            Their answers and rewards.
        min_gap, pairs_per_prompt:
            As `min_gap` and `max_pairs` of [`gap_pairs`].
        source (`str`):
            What the column `source` says, and the beginning of `pair_id`.
        image_options ([`ImageOptions`]):
            Says where relative paths start from; the pairs have them whole.
        drop_unfinished (`bool`, *optional*, defaults to `True`):
            Whether to drop answers that were cut: a policy would learn to stop in the middle.

    Returns:
        `tuple[Dataset, GapReport]`: pairs with the columns of [`GAP_FEATURES`], and what became of the answers.
    """
    report, left_out = GapReport(prompts=len(scored)), Counter[str]()
    places: list[int] = []
    columns: list[dict[str, Any]] = []
    for one in scored:
        report.answers += len(one.answers)
        kept = _usable(one, drop_unfinished, left_out)
        rewards = [cast(float, one.rewards[place]) for place in kept]
        count = len(columns)
        for better, worse in gap_pairs(rewards, min_gap=min_gap, max_pairs=pairs_per_prompt):
            row = _row(one, kept[better], kept[worse], source)
            try:
                check_row({**row, "images": one.prompt.images and ["-"] * len(one.prompt.images)})
            except RowError:
                left_out["unusable"] += 1
                continue
            places.append(one.prompt.row)
            columns.append(row)
            report.gaps.append(row["strength"])
        report.prompts_without_pair += len(columns) == count
    report.pairs, report.left_out = len(columns), dict(left_out)
    return with_images(rows, places, columns, image_options, GAP_FEATURES), report


def _usable(one: ScoredAnswers, drop_unfinished: bool, left_out: Counter[str]) -> list[int]:
    """Places of the answers that may stand in a pair, each text once but for white space."""
    kept, seen = [], set()
    for place, (text, is_finished, reward) in enumerate(zip(one.answers, one.is_finished, one.rewards, strict=True)):
        words = tuple(text.split())
        if not words:
            left_out["empty"] += 1
        elif not is_finished and drop_unfinished:
            left_out["unfinished"] += 1
        elif reward is None:
            left_out["unscored"] += 1
        elif words in seen:
            left_out["equal"] += 1
        else:
            seen.add(words)
            kept.append(place)
    return kept


def _row(one: ScoredAnswers, better: int, worse: int, source: str) -> dict[str, Any]:
    prompt = one.prompt
    row: dict[str, Any] = {}
    for side, name, place in zip(("chosen", "rejected"), REWARD_COLUMNS, (better, worse), strict=True):
        row[side] = [{"role": "assistant", "content": [{"type": "text", "text": one.answers[place]}]}]
        row[name] = one.rewards[place]
    return {
        "prompt": prompt.messages,
        **row,
        "strength": row["chosen_reward"] - row["rejected_reward"],
        "pair_id": f"{source}-{prompt.row:06d}-{better}-{worse}",
        "group_id": prompt.group_id,
        "source": source,
        "source_id": prompt.source_id,
    }
