"""Omni-RewardBench: pairs that are compared by a criterion in words; answers to images, and images of captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...data.messages import preference
from ...data.rows import RowError
from ...data.sources.fields import Source, image_field, name_field, text_field, without_markers
from ...data.t2i import t2i_pair
from .benchmark import Benchmark, pair_identity


def ti2t(row: Mapping[str, Any], *, criteria: bool = True) -> Iterator[dict[str, Any] | RowError]:
    """The pair of a row about an image."""
    name, first_is_better = name_field(row, "id"), _first_is_better(row)
    question = _with_criteria(without_markers(text_field(row, "prompt")), row, criteria)
    answers = [text_field(row, "response1"), text_field(row, "response2")]
    chosen, rejected = answers if first_is_better else answers[::-1]
    pair = preference(question, chosen, rejected, image_field(row, "image", "image_path"), source_id=name)
    yield {**pair, "pair_id": pair_identity(name, question, chosen, rejected)}


def t2i(row: Mapping[str, Any], *, criteria: bool = True) -> Iterator[dict[str, Any] | RowError]:
    """The text-to-image pair of a row."""
    name, first_is_better = name_field(row, "id"), _first_is_better(row)
    caption = _with_criteria(text_field(row, "prompt"), row, criteria)
    images = [image_field(row, f"response{n}", f"response{n}_path")[0] for n in (1, 2)]
    chosen, rejected = images if first_is_better else images[::-1]
    identity = pair_identity(name, caption, row.get("criteria_preference"))
    yield {**t2i_pair(caption, chosen, rejected, source_id=name), "pair_id": identity}


def _with_criteria(prompt: str, row: Mapping[str, Any], criteria: bool) -> str:
    return f"{prompt}\n\n{text_field(row, 'criteria')}" if criteria and row.get("criteria") else prompt


def _first_is_better(row: Mapping[str, Any]) -> bool:
    preference = row.get("criteria_preference")
    if preference == "tie":
        raise RowError("tie", "`criteria_preference` is tie, so that neither answer is preferred.")
    if preference not in ("response1", "response2"):
        problem = f"`criteria_preference` is {preference!r:.40}; it must be response1, response2 or tie."
        raise RowError("unparsed_verdict", problem)
    return preference == "response1"


# The names of the configurations on the Hub (HongbangYuan/OmniRewardBench) are not known here: pass a file or rows.
OMNI_REWARDBENCH_TI2T = Benchmark("omni-rewardbench-ti2t", "Omni-RewardBench, answers about images", Source(ti2t))
OMNI_REWARDBENCH_T2I = Benchmark(
    "omni-rewardbench-t2i", "Omni-RewardBench, images of captions", Source(t2i, is_t2i=True), both_orders=True
)
