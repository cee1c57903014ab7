"""VLFeedback: four answers to each question, each with three ratings, as up to six pairs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..canonical import preference
from ..errors import RowError
from .fields import image_field, name_field, text_field, to_number
from .formats import llamafactory, or_llamafactory
from .source import Source


ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def vlfeedback(row: Mapping[str, Any], *, aspects: Sequence[str] = ASPECTS) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of MMInstruction/VLFeedback, or of Zhihui/VLFeedback in ShareGPT's layout.

    An answer's score is the mean of its ratings, and the strength of a pair the gap between two scores: from 0 to 4
    in thirds if all three ratings count.

    Args:
        row (`Mapping`):
            `prompt`, `completions` (a list of dicts, or a dict of lists as `datasets` has it), `id`, and the image in
            `image`, `img_path` or, with neither, in the file `merged_images/{id}.jpg`; or as in [`llamafactory`].
        aspects (`Sequence[str]`, *optional*):
            Ratings that count. By default all three.

    Yields:
        `dict` or [`RowError`]: all pairs of answers in their order, with `tie` where two scores are equal; before
            them, once for each answer that cannot be used, `bad_rating` if a rating is not a number, or
            `missing_column` or `not_conversational` if there is no text.

    Raises:
        [`RowError`]: if prompt or image are missing, or fewer than two answers are there.
        `ValueError`: if `aspects` is empty.
    """
    if not aspects:
        raise ValueError("`aspects` is empty; name at least one rating.")
    if row.get("conversations") is not None:
        yield from llamafactory(row)
        return
    prompt, answers = text_field(row, "prompt"), _answers(row.get("completions"))
    name = name_field(row, "id")
    by_name = None if name is None else f"merged_images/{name}.jpg"
    images = image_field({**row, "id": by_name}, "image", "img_path", "id")
    rated = []
    for index, answer in enumerate(answers):
        try:
            rated.append((_total(answer, index, aspects), text_field(answer, "response")))
        except RowError as error:
            yield error
    for (first_total, first), (second_total, second) in itertools.combinations(rated, 2):
        if first_total == second_total:
            yield RowError("tie", f"two answers are rated {first_total / len(aspects):g}; neither is better.")
            continue
        chosen, rejected = (first, second) if first_total > second_total else (second, first)
        strength = abs(first_total - second_total) / len(aspects)
        yield preference(prompt, chosen, rejected, images, strength=strength, source_id=name)


def _answers(completions: Any) -> list[Mapping[str, Any]]:
    if isinstance(completions, Mapping):
        columns = {field: completions.get(field) for field in ("annotations", "response")}
        lengths = {len(column) if isinstance(column, (list, tuple)) else None for column in columns.values()}
        if len(lengths) > 1 or None in lengths:
            raise RowError("missing_column", "`completions` has not as many `annotations` as `response`s; fix it.")
        completions = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(completions, (list, tuple)) or len(completions) < 2:
        raise RowError("missing_column", "`completions` has fewer than two answers, which make no pair; drop the row.")
    return [answer if isinstance(answer, Mapping) else {} for answer in completions]


def _total(answer: Mapping[str, Any], index: int, aspects: Sequence[str]) -> float:
    """The sum of the ratings, which compares exactly where the mean does not."""
    annotations, total = answer.get("annotations"), 0.0
    for aspect in aspects:
        annotation = annotations.get(aspect) if isinstance(annotations, Mapping) else None
        rating = annotation.get("Rating") if isinstance(annotation, Mapping) else None
        number = to_number(rating)
        if number is None:
            raise RowError("bad_rating", f"answer {index} has {rating!r:.40} as its rating of {aspect}; no number.")
        total += number
    return total


VLFEEDBACK = Source(
    vlfeedback,
    licence="unknown",
    hub_id="MMInstruction/VLFeedback",
    files=("vlfeedback_80k.jsonl",),
    reads=or_llamafactory("prompt", "completions", "image", "img_path", "id"),
    note="The publisher states no licence. Unpack `merged_images.zip` and give the folder that holds `merged_images` "
    "as `image_root`.",
)
