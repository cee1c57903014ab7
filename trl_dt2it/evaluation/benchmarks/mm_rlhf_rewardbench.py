"""MM-RLHF-RewardBench: 170 pairs about 46 prompts with an image or a video (arXiv 2502.10391)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...data.messages import preference
from ...data.rows import RowError
from ...data.sources.fields import Source, image_field, images_field, name_field, text_field, without_markers
from .benchmark import Benchmark, Ratio, by_category, pair_identity, path_field, unit_ratio


CATEGORIES = ("mcq", "long", "short", "safety", "video")


def category_of(row: Mapping[str, Any]) -> str:
    """The category of a row: the folder of its image or video."""
    path = path_field(row, "image", "video")
    folders = re.split(r"[/\\]", path)[:-1]
    for place in (folders, path):  # a folder of that name, or else the name anywhere in the path
        if found := [category for category in CATEGORIES if category in place]:
            return found[0]
    if row.get("category") in CATEGORIES:
        return row["category"]
    if row.get("video"):
        return "video"  # frames as they are, without a path
    problem = f"the row has the path {path!r:.60}, which names none of {', '.join(CATEGORIES)}."
    raise RowError("missing_column", problem)


def mm_rlhf_rewardbench(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """The pair of a row."""
    name = name_field(row, "id")
    question = without_markers(text_field(row, "prompt"))
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    video = row.get("video")
    if not video:
        images, videos = image_field(row, "image"), []
    elif images_field(row, "image"):
        raise RowError("image_type", "the row has both `image` and `video`; keep the one that the question is about.")
    elif isinstance(video, (str, list, tuple)):
        images, videos = [], [video if isinstance(video, str) else list(video)]
    else:
        kind = type(video).__name__
        raise RowError("video_type", f"`video` is of type {kind}; pass a folder of frames or a list of them.")
    pair = preference(question, chosen, rejected, images, videos=videos, group=name, source_id=name)
    yield {**pair, "pair_id": pair_identity(name, question, chosen, rejected), "category": category_of(row)}


def count(correct: np.ndarray, category: np.ndarray, unit: np.ndarray) -> dict[str, Ratio]:
    """Accuracy over pairs (`acc`), and over prompts of which every pair has to be right (`acc_plus`)."""
    ratios = by_category(correct, category, unit, CATEGORIES)
    pairs = {"" if name == "overall" else f"/{name}": ratio for name, ratio in ratios.items()}
    return {
        **{f"acc{name}": ratio for name, ratio in pairs.items()},
        **{f"acc_plus{name}": unit_ratio(ratio) for name, ratio in pairs.items()},
    }


MM_RLHF_REWARDBENCH = Benchmark(
    name="mm-rlhf-rewardbench",
    title="MM-RLHF-RewardBench",
    source=Source(
        mm_rlhf_rewardbench,
        hub_id="yifanzhang114/MM-RLHF-RewardBench",
        files=("mm_reward_bench.jsonl",),
        has_videos=True,
    ),
    category_of=category_of,
    unit_of=lambda row: row["group_id"] if row.get("id") is None else row["id"],
    count=count,
    headline="acc",
    sizes={170: "145 pairs with an image and 25 with a video"},
    key_columns=("id", "image", "video", "category"),
    optional_category=("video", "image-only"),
    whole_repository=True,
)
