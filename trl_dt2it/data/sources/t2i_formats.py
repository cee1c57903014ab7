"""Layouts of text-to-image pairs, where each image is an answer: any table with a caption and two images, ShareGPT's
and LLaVA-Reward's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..canonical import IMAGE_MARKER
from ..errors import RowError
from .fields import answer_field, name_field, strength_field, to_number, turns_field
from .source import Source
from .t2i_pairs import is_list, pair


def t2i(
    row: Mapping[str, Any],
    *,
    caption: str = "caption",
    chosen_image: str = "chosen_image",
    rejected_image: str = "rejected_image",
    strength: str | None = "strength",
    source_id: str | None = None,
    group: str | None = None,
) -> Iterator[dict[str, Any] | RowError]:
    """
    The pair of a row of any table with a caption, a better and a worse image.

    All options are names of columns, as in [`~trl_dt2it.data.reformulate_t2i`].

    Args:
        row (`Mapping`):
            The row. `pair_id`, `group_id` and `source` are kept where it has them.
        caption (`str`, *optional*, defaults to `"caption"`):
            What both images were to show.
        chosen_image (`str`, *optional*, defaults to `"chosen_image"`):
            The better image: a path, bytes, or a dict of both.
        rejected_image (`str`, *optional*, defaults to `"rejected_image"`):
            The worse image.
        strength (`str`, *optional*, defaults to `"strength"`):
            How much better the chosen image is: a number that is not negative, or `None`. It may be absent.
        source_id (`str`, *optional*):
            The table's own name of the row; by default `source_id` where it is there.
        group (`str`, *optional*):
            What all pairs about one caption have in common; by default `group_id`, or a hash of the caption.

    Yields:
        `dict` or [`RowError`]: the pair, or why there is none.

    Raises:
        [`RowError`]: `missing_column` if a column is not there; `bad_strength`.
    """
    for name in filter(None, (caption, chosen_image, rejected_image, source_id, group)):
        if name not in row:
            there = ", ".join(map(str, row))
            raise RowError("missing_column", f"there is no column `{name}`; the row has {there:.200}.")
    made = pair(
        row[caption],
        row[chosen_image],
        row[rejected_image],
        strength=strength_field(row, strength) if strength else None,
        source_id=name_field(row, source_id or "source_id"),
    )
    if isinstance(made, RowError):
        yield made
        return
    names = {"group_id": group or "group_id", "pair_id": "pair_id", "source": "source"}
    given = {name: name_field(row, field) for name, field in names.items()}
    yield made | {name: value for name, value in given.items() if value is not None}


def _t2i_fields(present: Collection[str], options: Mapping[str, Any]) -> set[str]:
    given = {"caption": "caption", "chosen_image": "chosen_image", "rejected_image": "rejected_image", **options}
    return {name for name in ({"strength": "strength"} | given).values() if name}


T2I = Source(
    t2i,
    licence="unknown",
    is_t2i=True,
    reads=_t2i_fields,
    note="The licence is that of your data set. Its columns are `caption`, `chosen_image`, `rejected_image` and, if "
    "known, `strength`, unless options say otherwise.",
)


def per_answer_images(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    The pair of a ShareGPT row whose first image belongs to `chosen` and whose second to `rejected`: the input of
    DT2IT-MRM's reformulation, and the text-to-image part of OmniRewardData.

    The caption is what both answers say, or, where they say nothing, the last human turn.

    Args:
        row (`Mapping`):
            `chosen` and `rejected` with a `value`, `images`, and `conversations` if the caption is there.

    Yields:
        `dict` or [`RowError`]: the pair, or why there is none.

    Raises:
        [`RowError`]: if an answer is missing, or if a text is no string.
    """
    images = row.get("images")
    values = [answer_field(row, side) for side in ("chosen", "rejected")]
    texts = [value.replace(IMAGE_MARKER, "").strip() if IMAGE_MARKER in value else value for value in values]
    turns = [] if row.get("conversations") is None else turns_field(row, "conversations")
    human = [text for role, text in turns if role == "user"]
    if not is_list(images, 2):
        shown = len(images) if isinstance(images, (list, tuple)) else 0
        yield RowError(
            "placeholder_count", f"`images` holds {shown} images; it must be two, of `chosen` and of `rejected`."
        )
    elif any(IMAGE_MARKER in text for text in human):
        yield RowError(
            "placeholder_count",
            f"a human turn has an `{IMAGE_MARKER}` marker, so that the images belong to the question and not to the "
            "answers; load the row as LLaMA-Factory's ShareGPT.",
        )
    elif texts[0] != texts[1]:
        yield RowError(
            "not_conversational", "`chosen` and `rejected` have different texts, so the caption is unclear."
        )
    else:
        yield pair(texts[0] if texts[0].strip() or not human else human[-1], *images)


PER_ANSWER_IMAGES = Source(
    per_answer_images,
    licence="unknown",
    is_t2i=True,
    reads=("chosen", "rejected", "images", "conversations"),
    note="A format: images[0] is the image of `chosen`, images[1] that of `rejected`.",
)


def llava_reward(row: Mapping[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    """
    The pair of a row of LLaVA-Reward. Its strength is the difference of the two ratings.

    Args:
        row (`Mapping`):
            `prompt`, a caption or two equal ones, `chosen_path`, `c_rate`, `reject_path`, `r_rate`, `prompt_id`.

    Yields:
        `dict` or [`RowError`]: the pair, or why there is none.
    """
    captions = row.get("prompt")
    captions = list(captions) if isinstance(captions, (list, tuple)) else [captions]
    ratings = [to_number(row.get(name)) for name in ("c_rate", "r_rate")]
    if not captions or any(caption != captions[0] for caption in captions):
        yield RowError("not_conversational", "`prompt` holds different captions; the images of a pair share one.")
    elif ratings[0] is None or ratings[1] is None:
        shown = f"{row.get('c_rate')!r:.20} and {row.get('r_rate')!r:.20}"
        yield RowError("bad_rating", f"`c_rate` and `r_rate` are {shown}; both must be numbers.")
    elif ratings[0] == ratings[1]:
        yield RowError("tie", f"`c_rate` and `r_rate` are both {ratings[0]}.")
    elif ratings[0] < ratings[1]:
        yield RowError("bad_rating", f"`c_rate` is {ratings[0]}, less than `r_rate`, {ratings[1]}; swap the images.")
    else:
        paths = row.get("chosen_path"), row.get("reject_path")
        yield pair(captions[0], *paths, strength=ratings[0] - ratings[1], source_id=row.get("prompt_id"))


LLAVA_REWARD = Source(
    llava_reward,
    licence="unknown",
    is_t2i=True,
    reads=("prompt", "chosen_path", "c_rate", "reject_path", "r_rate", "prompt_id"),
    note="A format; the images are the authors' local files.",
)
