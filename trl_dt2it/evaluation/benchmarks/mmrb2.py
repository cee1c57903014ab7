"""Multimodal RewardBench 2, the text-to-image part: 1,000 pairs of images, each asked about in both orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...data.rows import RowError
from ...data.sources.fields import Source, images_field, name_field, text_field
from ...data.t2i import t2i_pair
from .benchmark import Benchmark, pair_identity


# The answers of the other parts are images and texts in one, which a reward model of a prompt and a text cannot read.
_ONLY = "only pairs of the text-to-image part, a caption and one image for each answer, can be asked about"


def mmrb2(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """The pair of a row."""
    name = name_field(row, "pair_id") or name_field(row, "id")
    if row.get("prompt_content") is not None or any(isinstance(row.get(f"response_{x}"), Mapping) for x in "ab"):
        if row.get("prompt_content") is None:
            problem = "`prompt_content` is missing; pass the `t2i.json` that the authors' build script makes."
            raise RowError("missing_column", problem)
        if lacking := [side for side in "ab" if not isinstance(row.get(f"response_{side}"), Mapping)]:
            raise RowError("missing_column", f"`response_{lacking[0]}` is missing or no object; pass it.")
        caption, prompt_images = _parts(row["prompt_content"], "prompt_content")
        answers = [_parts(row[f"response_{x}"].get("response_content"), f"response_{x}") for x in "ab"]
    else:
        caption, prompt_images = text_field(row, "prompt_text"), images_field(row, "prompt_images")
        answers = [(row.get(f"response_{x}_text") or "", images_field(row, f"response_{x}_images")) for x in "ab"]
    if prompt_images or any(text.strip() or len(images) != 1 for text, images in answers):
        raise RowError("image_in_answer", f"{_ONLY}; leave this row out.")
    choice = str(row.get("chosen")).upper()
    if choice not in ("A", "B"):
        raise RowError("unparsed_verdict", f'`chosen` is {row.get("chosen")!r:.40}; it must be "A" or "B".')
    first, second = (images[0] for _, images in answers)
    chosen, rejected = (first, second) if choice == "A" else (second, first)
    yield {**t2i_pair(caption, chosen, rejected, source_id=name), "pair_id": pair_identity(name, caption, choice)}


def _parts(content: Any, field: str) -> tuple[str, list[Any]]:
    """Text and images of a list of kinds and values."""
    is_list = isinstance(content, (list, tuple))
    if not is_list or not all(isinstance(part, (list, tuple)) and len(part) == 2 for part in content):
        raise RowError("not_conversational", f"`{field}` is no list of a kind and a value each; fix the file.")
    text = "".join(str(value) for kind, value in content if kind == "text")
    return text, [value for kind, value in content if kind == "image"]


MMRB2 = Benchmark(
    name="mmrb2-t2i",
    title="Multimodal RewardBench 2, text to image",
    source=Source(
        mmrb2,
        licence="CC-BY-NC-4.0",
        hub_id="rl-research/multimodal-rewardbench-2",
        is_non_commercial=True,
        is_t2i=True,
        config="t2i",
    ),
    sizes={2000: "1,000 pairs in both orders", 1000: "1,000 pairs in one order"},
    both_orders=True,
)
