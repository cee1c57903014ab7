"""Any other table: which column is what, said by the user."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..canonical import IMAGE_MARKER, preference
from ..errors import RowError
from .fields import (
    answer_field,
    check_is_text,
    check_placeholders,
    image_field,
    images_field,
    is_given,
    name_field,
    prompt_field,
    strength_field,
    text_field,
    with_system,
)
from .source import Source


# What says in so many words which of two answers is better; numbers say it differently everywhere.
_WORDS = {
    "first": ("a", "first", "left", "[[a]]", "a>b", "a>>b", "[[a>b]]", "[[a>>b]]"),
    "second": ("b", "second", "right", "[[b]]", "b>a", "b>>a", "[[b>a]]", "[[b>>a]]"),
    "tie": (
        *("c", "tie", "ties", "tied", "tie (bothbad)", "tie (both bad)", "both", "both bad", "bothbad", "both_bad"),
        *("both good", "bothgood", "both_good", "equal", "equally good", "equally bad", "same", "draw", "neither"),
        *("none", "no preference", "[[c]]", "a=b", "[[a=b]]"),
    ),
}
_VERDICTS = {word: kind for kind, words in _WORDS.items() for word in words}
_NOUNS = ("answer", "assistant", "completion", "model", "option", "output", "response")
_VERDICTS |= {
    f"{noun}{joint}{letter}": kind
    for noun in _NOUNS
    for joint in ("", " ", "_", "-")
    for kind, letter in (("first", "a"), ("second", "b"))
}
# Where a table keeps what a question may be about, under names that leave no doubt.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def columns(
    row: Mapping[str, Any],
    *,
    question: str,
    chosen: str | None = None,
    rejected: str | None = None,
    first: str | None = None,
    second: str | None = None,
    label: str | None = None,
    labels: Mapping[Any, str] | None = None,
    image: str | None = None,
    images: str | None = None,
    strength: str | None = None,
    source_id: str | None = None,
    group: str | None = None,
    system: str | None = None,
) -> Iterator[dict[str, Any] | RowError]:
    """
    A row of any table with a question and two answers, of which two columns, or a label, say which is better.

    All options but `labels` are names of columns. `"a.b"` is the field `b` in the column `a`, unless a column has that
    very name.

    Args:
        row (`Mapping`):
            The row.
        question (`str`):
            The question, or a list of messages that ends with the user's. `<image>` is where an image goes.
        chosen (`str`, *optional*):
            The better answer, or the message that holds it.
        rejected (`str`, *optional*):
            The worse answer, or the message that holds it.
        first (`str`, *optional*):
            In place of `chosen` and `rejected`, with `second` and `label`: one of two answers.
        second (`str`, *optional*):
            The other answer.
        label (`str`, *optional*):
            Which of them is better: A, B, `model_a`, "second", the name of its column; tie, "both bad" and the like.
        labels (`Mapping`, *optional*):
            What other labels say, numbers above all: `{0: "first", 1: "second", 2: "tie"}`.
        image (`str`, *optional*):
            The image; a row without is an error.
        images (`str`, *optional*):
            A list of images, which may be empty or `None`.
        strength (`str`, *optional*):
            How much better the chosen answer is: a number that is not negative, or `None`.
        source_id (`str`, *optional*):
            The table's own name of the row.
        group (`str`, *optional*):
            What all pairs about one prompt have in common; by default a hash of prompt and images.
        system (`str`, *optional*):
            A system prompt, which may be empty or `None`.

    Yields:
        `dict`: the pair.

    Raises:
        [`RowError`]: `missing_column` if a column is not there; `tie` if the label prefers neither answer, and
            `unparsed_verdict` if it is none that is known; `image_in_answer` if the answers are images, or names of
            image files; `image_missing`, or `video_type` if the row has images, videos or sounds that no option names;
            `bad_strength`; or if a text is of another type.
        `ValueError`: if options are missing or exclude each other, or if `labels` has another value.
    """
    known = {_word(first): "first", _word(second): "second", **_verdicts(labels)}
    sides = (first, second) if label else (chosen, rejected)
    if image and images:
        raise ValueError("`image` and `images` are both given; name one column.")
    if None in sides or any(side is not None for side in ((chosen, rejected) if label else (first, second))):
        raise ValueError("`columns` needs the options chosen, rejected; or else first, second and label.")
    named = (question, *sides, label, image, images, strength, source_id, group, system)
    # Every field under the name that the user knows, so that errors name it, too.
    found = {path: _value(row, path) for path in named if path}
    for field in _MEDIA:
        is_named = any(path and path.split(".")[0] == field for path in named)
        is_image = field.startswith("image")
        if is_given(row.get(field)) and not is_named and not (is_image and (image or images)):
            raise RowError(
                "image_missing" if is_image else "video_type",
                f"the row has `{field}`, which no option names; name it (images alone are read), or remove the column "
                "if the question is not about it.",
            )
    better, worse = (str(side) for side in sides)
    if label and _verdict(found[label], label, known) == "second":
        better, worse = worse, better
    check_is_text(
        found,
        (better, worse),
        f'use `reformulate_t2i(dataset, caption="{question}", chosen_image="{better}", rejected_image="{worse}")`.',
    )
    prompt = prompt_field(found, question) if isinstance(found[question], (list, tuple)) else None
    turns = prompt or [("user", text_field(found, question))]
    turns = with_system(turns, found, system) if system else turns
    answers = {field: answer_field(found, field) for field in (better, worse)}
    check_placeholders(turns, answers, (IMAGE_MARKER,))
    yield preference(
        turns,
        answers[better],
        answers[worse],
        image_field(found, image) if image else images_field(found, images) if images else (),
        strength=strength_field(found, strength) if strength else None,
        group=name_field(found, group) if group else None,
        source_id=name_field(found, source_id) if source_id else None,
    )


def _columns_fields(present: Collection[str], options: Mapping[str, Any]) -> set[str]:
    media = {field for field in _MEDIA if not (field.startswith("image") and {"image", "images"} & set(options))}
    return {name for option, name in options.items() if option != "labels" and name} | media


def _verdicts(labels: Mapping[Any, str] | None) -> dict[str, str]:
    if wrong := sorted({str(kind) for kind in (labels or {}).values()} - set(_WORDS)):
        raise ValueError(f"`labels` has the value {wrong[0]!r}; each must be {', '.join(_WORDS)}.")
    return {**_VERDICTS, **{_word(word): kind for word, kind in (labels or {}).items()}}


def _verdict(value: Any, field: str, known: Mapping[str, str]) -> str:
    """Which answer a label prefers: `first` or `second`."""
    kind = known.get(_word(value)) if isinstance(value, (str, int, float)) else None
    if kind is None:
        shown = f"`{field}` is {value!r:.40}"
        raise RowError("unparsed_verdict", f'{shown}; say what it means, as in `labels={{{value!r:.40}: "first"}}`.')
    if kind == "tie":
        raise RowError("tie", f"`{field}` is {value!r:.40}, which prefers neither answer.")
    return kind


def _word(label: Any) -> str:
    """A label as it is compared: a column with gaps has 1.0 for 1."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip().casefold()


def _value(row: Mapping[str, Any], path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(map(str, row))
            raise RowError("missing_column", f"there is no column `{path}`; the row has {there:.200}.")
        value = value[part]
    return value


COLUMNS = Source(columns, licence="unknown", reads=_columns_fields, note="The licence is that of your data set.")
