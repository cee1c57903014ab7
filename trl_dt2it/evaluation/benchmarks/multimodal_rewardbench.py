"""Multimodal RewardBench: 4,711 public pairs in six categories, one of them in two parts (arXiv 2502.14191)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...data.messages import preference
from ...data.rows import RowError
from ...data.sources.fields import Source, image_field, name_field, text_field, without_markers
from .benchmark import Benchmark, Ratio, by_category, pair_identity, pair_ratio, path_field


GROUPS = ("correctness", "preference", "knowledge", "math", "coding", "safety", "vqa")

_CODING_FOLDERS = {"emma-coding", "image2struct"}


def group_of(row: Mapping[str, Any]) -> str:
    """The group of a row: its category, with `reasoning` divided into mathematics and coding."""
    # Mathematics are the rows whose `ID` begins with "math" (so the benchmark's own script) or whose image is in the
    # folder `mathvista` (so the paper's). Any other row of `reasoning` is coding, so that none is lost.
    row = row.get("Meta") if isinstance(row.get("Meta"), Mapping) else row  # type: ignore[assignment]
    category = str(row.get("Category") or row.get("category") or "").lower()
    category = category.rpartition("/")[2].removesuffix("_task")
    if category in GROUPS:
        return category
    if category != "reasoning":
        raise RowError("missing_column", f"the row has the category {category!r:.60}, which is not known.")
    name = str(row.get("ID") or row.get("id") or "").lower()
    folders = set(re.split(r"[/\\]", path_field(row, "Image", "image", "image_path").lower()))
    if name.startswith("math") or "mathvista" in folders:
        return "math"
    if not name and not folders & _CODING_FOLDERS:
        problem = "the category is reasoning, and neither an `ID` nor the folder of the image tells math from coding"
        raise RowError("missing_column", f"{problem}; pass one of them.")
    return "coding"


def multimodal_rewardbench(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """The pair of a row."""
    row = row["Meta"] if isinstance(row.get("Meta"), Mapping) else row
    name = name_field(row, "ID")
    question = without_markers(text_field(row, "Text"))
    better = row.get("Better")
    if better not in ("Output1", "Output2"):
        raise RowError("unparsed_verdict", f'`Better` is {better!r:.40}; it must be "Output1" or "Output2".')
    chosen, rejected = (text_field(row, side) for side in (better, "Output2" if better == "Output1" else "Output1"))
    pair = preference(question, chosen, rejected, image_field(row, "Image", "image"), source_id=name)
    yield {**pair, "pair_id": pair_identity(name, question, chosen, rejected), "category": group_of(row)}


def count(correct: np.ndarray, category: np.ndarray, unit: np.ndarray) -> dict[str, Ratio]:
    """Accuracy over all pairs, over all but those of safety, and in each group."""
    ratios = by_category(correct, category, unit, GROUPS)
    without_safety = pair_ratio(correct, unit, category != "safety")
    return {"overall": ratios.pop("overall"), "overall_without_safety": without_safety, **ratios}


MULTIMODAL_REWARDBENCH = Benchmark(
    name="multimodal-rewardbench",
    title="Multimodal RewardBench",
    source=Source(
        multimodal_rewardbench,
        licence="CC-BY-NC-4.0",
        hub_id="syhuggingface/multimodal_rewardbench",
        is_non_commercial=True,
        note="A copy on the Hub. The authors publish data/all_data_release.json on GitHub, and a script that fills in "
        "texts and images.",
    ),
    category_of=group_of,
    count=count,
    sizes={4711: "all that is public", 5211: "the paper's, with 500 pairs that were not published"},
    key_columns=("ID", "id", "Category", "category", "Image", "image", "image_path", "Meta"),
)
