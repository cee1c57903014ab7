"""VL-RewardBench: 1,247 pairs about images in three groups (arXiv 2411.17451)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ...data.messages import preference
from ...data.rows import RowError
from ...data.sources.fields import Source, image_field, literal, name_field, text_field, without_markers
from .benchmark import Benchmark, by_category, pair_identity


GROUPS = ("general", "hallucination", "reasoning")

# Groups by the set that a row is from. The authors moved POVID from general to hallucination in May 2025; numbers
# from before then cannot be compared.
_GROUP_OF_SOURCE = {
    **dict.fromkeys(("vlfeedback", "wildvision-battle"), "general"),
    **dict.fromkeys(("povid", "rlaif-v", "rlhf-v"), "hallucination"),
    "reasoning_tasks": "reasoning",
}

# Groups by the prefix of a row's id, up to the first `_` or `-`; any other prefix is VLFeedback's or WildVision's.
_GROUP_OF_PREFIX = {
    **dict.fromkeys(("RLAIF", "RLHF", "hallucination"), "hallucination"),
    **dict.fromkeys(("mathverse", "mmmu"), "reasoning"),
}


def group_of(row: Mapping[str, Any]) -> str:
    """The group of a row."""
    known = str(row.get("category") or "").lower()
    if (name := row.get("id")) is None:
        if known in GROUPS:
            return known
        if known in _GROUP_OF_SOURCE:
            return _GROUP_OF_SOURCE[known]
        name = row.get("index")
    if not isinstance(name, str) or name.isdecimal():
        raise RowError("missing_column", "the row has neither an `id` nor a known `category`; pass one of the two.")
    prefix = re.split("[_-]", name, maxsplit=1)[0]
    return _GROUP_OF_PREFIX.get(prefix, "general")


def vl_rewardbench(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """The pair of a row."""
    name = name_field(row, "id") or name_field(row, "index")
    asked = next((field for field in ("query", "question", "prompt") if row.get(field) is not None), "query")
    question = without_markers(text_field(row, asked))
    if row.get("response") is None and row.get("chosen") is not None:
        chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    else:
        chosen, rejected = _ranked(row)
    pair = preference(question, chosen, rejected, image_field(row, "image", "image_path"), source_id=name)
    yield {**pair, "pair_id": pair_identity(name, question, chosen, rejected), "category": group_of(row)}


def _ranked(row: Mapping[str, Any]) -> tuple[str, str]:
    """The answers of a row, the better first."""
    answers = _list(row.get("response"))
    ranking = _list(row.get("human_ranking") if row.get("human_ranking") is not None else row.get("answer"))
    if answers is None or len(answers) != 2 or not all(isinstance(answer, str) for answer in answers):
        raise RowError("missing_column", "`response` does not hold two texts; pass both answers.")
    if ranking is not None and len(ranking) == 2 and ranking[0] == ranking[1]:
        raise RowError("tie", f"`human_ranking` is {ranking}, which prefers neither answer.")
    if ranking not in ([0, 1], [1, 0]):
        raise RowError("unparsed_verdict", f"`human_ranking` is {ranking!r:.40}; it must be [0, 1] or [1, 0].")
    first, second = answers
    return (first, second) if ranking == [0, 1] else (second, first)


def _list(value: Any) -> list[Any] | None:
    """A list, also one written as text, in JSON or as Python prints it."""
    value = literal(value) if isinstance(value, str) else value
    return list(value) if isinstance(value, (list, tuple)) else None


VL_REWARDBENCH = Benchmark(
    name="vl-rewardbench",
    title="VL-RewardBench",
    source=Source(vl_rewardbench, licence="MIT", hub_id="MMInstruction/VL-RewardBench"),
    category_of=group_of,
    count=partial(by_category, names=GROUPS),
    averages={"macro": GROUPS},
    sizes={1247: "the current release", 1250: "an earlier release, with three more rows"},
    key_columns=("id", "index", "category"),
)
