"""Adapters of TRL's preference rows, canonical rows among them, and of tables by the names of their columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

from ..images import as_image
from ..messages import IMAGE_MARKER, PROVENANCE, as_ranked, preference, with_image_blocks
from ..rows import (
    ANSWERS,
    DEFAULT_FPS,
    RANKS,
    SCORES,
    SIDES,
    RowError,
    answer_scores,
    blocks,
    check_answer,
    check_answers,
    check_messages,
    check_numbers,
    check_row,
    content_group,
    message_text,
    row_images,
    row_videos,
    text_message,
    without_empty,
)
from .fields import (
    Pairs,
    Row,
    Source,
    answer_field,
    check_absent,
    check_is_text,
    check_placeholders,
    has_tools,
    image_field,
    images_field,
    is_given,
    name_field,
    prompt_field,
    strength_field,
    text_field,
    with_system,
)


# Labels that name the better answer in words; numbers mean something else in every table.
_WORDS = {
    "first": ("a", "first", "left", "[[a]]", "a>b", "a>>b", "[[a>b]]", "[[a>>b]]"),
    "second": ("b", "second", "right", "[[b]]", "b>a", "b>>a", "[[b>a]]", "[[b>>a]]"),
    "tie": (
        *("c", "tie", "ties", "tied", "tie (bothbad)", "tie (both bad)", "both", "both bad", "bothbad", "both_bad"),
        *("both good", "bothgood", "both_good", "equal", "equally good", "equally bad", "same", "draw", "neither"),
        *("none", "no preference", "[[c]]", "a=b", "[[a=b]]"),
    ),
}
_NOUNS = ("answer", "assistant", "completion", "model", "option", "output", "response")
_VERDICTS = {word: kind for kind, words in _WORDS.items() for word in words} | {
    f"{noun}{joint}{letter}": kind
    for noun in _NOUNS
    for joint in ("", " ", "_", "-")
    for kind, letter in (("first", "a"), ("second", "b"))
}

_TRL_FIELDS = (
    *("prompt", "chosen", "rejected", "images", "image", "videos", "strength", "margin", "weight", "pair_id"),
    *("group_id", "source", "source_id", "tools", "chat_template_kwargs", "video", "audio", "audios"),
)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns that a question may be about


def trl(row: Row) -> Pairs:
    """Read a preference row of TRL."""
    if row.get("chosen") is None and is_given(row.get(ANSWERS)):
        problem = f"`chosen` is missing, and the row has `{ANSWERS}`; load the set with `ranked=True`."
        raise RowError("missing_column", problem)
    yield as_canonical(row)


def trl_ranked(row: Row) -> Pairs:
    """Read a ranked prompt; ranks become scores, negated."""
    check_absent(row, "bad_strength", "strength", "margin", advice=f"a ranked prompt has `{SCORES}` alone")
    check_absent(row, "missing_column", *SIDES, advice=f"keep either them or `{ANSWERS}`")
    if (prompt := row.get("prompt")) is None:
        raise RowError("missing_column", "`prompt` is missing or None; a ranked prompt needs it.")
    scores = answer_scores(row)
    if not isinstance(prompt, str):  # as the pairs of [`to_pairs`] have it
        answers = [[text_message("assistant", one)] if isinstance(one, str) else one for one in row[ANSWERS]]
        row = {**row, ANSWERS: answers}
    pairs = check_answers(row, as_canonical)
    yield as_ranked(pairs[0], [pair["chosen"] for pair in pairs], scores)


def as_canonical(row: Row, is_checked: bool = False) -> dict[str, Any]:
    """Check and convert a preference row of TRL, canonical rows included."""
    strength = strength_field(row, "strength" if row.get("strength") is not None else "margin")
    weight = strength_field(row, "weight", "bad_weight")
    check_absent(row, "video_type", "video", "audio", "audios", advice="pass frames in `videos`")
    for field, is_there in (("tools", has_tools), ("chat_template_kwargs", without_empty)):
        check_absent(row, "not_conversational", field, advice="drop the field", is_there=is_there)
    prompt, chosen, rejected = (row.get(field) for field in ("prompt", *SIDES))
    videos = _videos(row)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        converted = preference(prompt, chosen, rejected, _images(row), videos=videos)
        if not is_checked:
            check_row(converted)
    else:
        converted = _converted(_with_messages(row, videos) if isinstance(prompt, str) else row, videos, is_checked)
    named = {name: value for name in PROVENANCE if (value := name_field(row, name)) is not None}
    made = {**converted, "strength": strength, **named, **({} if weight is None else {"weight": weight})}
    check_numbers(made)  # which the row that [`check_row`] saw did not have
    return made


def _with_messages(row: Row, videos: list[list[Any]]) -> Row:
    """Turn a prompt that is a string into messages, or drop it where the answers are conversations that hold it."""
    for side in SIDES:
        if row.get(side) is None:
            raise RowError("missing_column", f"`{side}` is missing or None; a preference row needs both answers.")
        check_messages(side, row[side])
    for side in SIDES:
        check_answer(side, row[side], prompt_is_explicit=True)
    if any(row[side][0]["role"] != "assistant" for side in SIDES):
        asked, *_ = _split(row["chosen"], row["rejected"])
        texts = [message_text(message).strip() for message in asked]
        if row["prompt"].strip() not in texts:
            problem = "`prompt` is not among the messages that both answers begin with; keep one of the two."
            raise RowError("not_conversational", problem)
        return {**row, "prompt": None}
    return {**row, "prompt": preference(row["prompt"], "", "", _images(row), videos=videos)["prompt"]}


def _converted(row: Row, videos: list[list[Any]], is_checked: bool) -> dict[str, Any]:
    """Convert a row whose answers are messages."""
    if not is_checked:
        check_row({field: row.get(field) for field in ("prompt", *SIDES, "images", "image", "videos")})
    if isinstance(row["chosen"], str):
        raise RowError("missing_column", "the row has two strings and no `prompt`; give the question as `prompt`.")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None:
        prompt, chosen, rejected = _split(chosen, rejected)
        for side, answer in zip(SIDES, (chosen, rejected), strict=True):
            check_answer(side, answer, prompt_is_explicit=True)  # the answers show no images of later questions
    images, contents = _images(row), [message.get("content") for message in prompt]
    has_blocks = any(isinstance(content, (list, tuple)) for content in contents)
    if images and not has_blocks and any(IMAGE_MARKER in (content or "") for content in contents):
        problem = f"`prompt` has `{IMAGE_MARKER}` as text; give blocks, or load the set as `ms_swift`."
        raise RowError("placeholder_count", problem)
    messages = with_image_blocks([_blocked(message) for message in prompt], 0 if has_blocks else len(images))
    converted = {
        "prompt": messages,
        "chosen": [_blocked(message) for message in chosen],
        "rejected": [_blocked(message) for message in rejected],
        "images": images,
        "strength": None,
        "group_id": content_group(messages, images, videos),
        "source_id": None,
    }
    return {**converted, "videos": videos} if videos else converted


def _split(chosen: Sequence[Any], rejected: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Split the messages that two conversations have in common from the rest of each, which is never empty."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: _blocked(pair[0]) == _blocked(pair[1]), pairs))
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise RowError("missing_column", "`chosen` and `rejected` do not begin with the same question; add `prompt`.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _blocked(message: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a message to its role and its content as blocks of type and text."""
    if extra := [key for key, value in message.items() if value and key not in ("role", "content")]:
        shown = ", ".join(f"`{key}`" for key in sorted(map(str, extra)))
        raise RowError("not_conversational", f"a message has {shown}, which canonical rows do not hold; drop the row.")
    content = [{"type": block["type"], "text": block.get("text")} for block in blocks(message)]
    return {"role": message["role"], "content": content}


def _images(row: Row) -> list[Any]:
    return [as_image(image) for image in images_field({"images": row_images(row)}, "images")]


def _videos(row: Row) -> list[list[Any]]:
    videos = row_videos(row)
    if any(video.fps != DEFAULT_FPS for video in videos):
        raise RowError("video_type", f"a video has its own `fps`; give {DEFAULT_FPS:g} frames a second.")
    return [[as_image(frame) for frame in video.frames] for video in videos]


def _trl_fields(present: Collection[str], options: Mapping[str, Any]) -> set[str]:
    """List the fields that [`trl`] or [`trl_ranked`] reads or refuses."""
    of_ranked = () if "chosen" in present else (ANSWERS, SCORES, RANKS)
    return {*_TRL_FIELDS, *of_ranked}


TRL = Source(
    trl,
    ranked=trl_ranked,
    has_videos=True,
    has_weights=True,
    is_checked=True,
    reads=_trl_fields,
)


def columns(
    row: Row,
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
) -> Pairs:
    """Read a row of any table with a question and two answers, ordered by their columns or by a label. All options but
    `labels` name columns; `"a.b"` is the field `b` in the column `a`, unless a column has that name."""
    known = {_word(first): "first", _word(second): "second", **_verdicts(labels)}
    sides = (first, second) if label else (chosen, rejected)
    if image and images:
        raise ValueError("`image` and `images` are both given; name one column.")
    if None in sides or any(side is not None for side in ((chosen, rejected) if label else (first, second))):
        raise ValueError("`columns` needs the options chosen, rejected; or else first, second and label.")
    named = (question, *sides, label, image, images, strength, source_id, group, system)
    # By the names that the user knows, which errors show.
    found = {path: _value(row, path) for path in named if path}
    for field in _MEDIA:
        is_named = any(path and path.split(".")[0] == field for path in named)
        is_image = field.startswith("image")
        if is_given(row.get(field)) and not is_named and not (is_image and (image or images)):
            problem = f"the row has `{field}`, which no option names; name it if it holds images, or drop the column."
            raise RowError("image_missing" if is_image else "video_type", problem)
    better, worse = (str(side) for side in sides)
    if label and _verdict(found[label], label, known) == "second":
        better, worse = worse, better
    names = f'caption="{question}", chosen_image="{better}", rejected_image="{worse}"'
    check_is_text(found, (better, worse), f"use `reformulate_t2i(dataset, {names})`.")
    is_conversation = isinstance(found[question], (list, tuple))
    turns = prompt_field(found, question) if is_conversation else [("user", text_field(found, question))]
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
    """List the fields that [`columns`] reads or refuses."""
    media = {field for field in _MEDIA if not (field.startswith("image") and {"image", "images"} & set(options))}
    return {name for option, name in options.items() if option != "labels" and name} | media


def _verdicts(labels: Mapping[Any, str] | None) -> dict[str, str]:
    """Add a user's labels to the known ones."""
    if wrong := sorted({str(kind) for kind in (labels or {}).values()} - set(_WORDS)):
        raise ValueError(f"`labels` has the value {wrong[0]!r}; each must be {', '.join(_WORDS)}.")
    return {**_VERDICTS, **{_word(word): kind for word, kind in (labels or {}).items()}}


def _verdict(value: Any, field: str, known: Mapping[str, str]) -> str:
    """Return the answer that a label prefers, `first` or `second`."""
    kind = known.get(_word(value)) if isinstance(value, (str, int, float)) else None
    if kind is None:
        shown = f"`{field}` is {value!r:.40}"
        raise RowError("unparsed_verdict", f'{shown}; say what it means, as in `labels={{{value!r:.40}: "first"}}`.')
    if kind == "tie":
        raise RowError("tie", f"`{field}` is {value!r:.40}, which prefers neither answer.")
    return kind


def _word(label: Any) -> str:
    """Normalize a label; a column with gaps has 1.0 for 1."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip().casefold()


def _value(row: Row, path: str) -> Any:
    """Look up a column, or a field in one."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(map(str, row))
            raise RowError("missing_column", f"there is no column `{path}`; the row has {there:.200}.")
        value = value[part]
    return value


COLUMNS = Source(columns, reads=_columns_fields)
