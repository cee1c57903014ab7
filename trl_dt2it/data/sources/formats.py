"""Adapters of the formats of LLaMA-Factory and ms-swift, and of sets of two conversations."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..images import as_image
from ..messages import IMAGE_MARKER, preference
from ..rows import RowError
from .fields import (
    TAGS,
    Pairs,
    Row,
    Source,
    Tags,
    Turns,
    answer_field,
    answered_field,
    check_absent,
    check_is_text,
    check_placeholders,
    has_tools,
    image_field,
    images_field,
    is_given,
    literal,
    name_field,
    prompt_field,
    strength_field,
    text_field,
    with_system,
)


_AS_FRAMES = "drop the row, or pass videos as lists of frames in TRL's layout"
_AS_T2I = "make a question about two images of each such pair with `reformulate_t2i`."

# Names of columns that `dataset_info.json` may override.
_COLUMNS = {"messages": "conversations", "prompt": "instruction", "query": "input", "response": "output"} | {
    name: name
    for name in ("history", "system", "chosen", "rejected", "images", "videos", "audios", "tools", "kto_tag")
}

# Tags that `dataset_info.json` may override. Calls and results of tools are refused.
_TAGS: dict[str, str | None] = {
    "role_tag": None,
    "content_tag": None,
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
_WHOLE = ("chosen_messages", "rejected_messages")


def llamafactory(
    row: Row, *, columns: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
) -> Pairs:
    """Read a ranking row of LLaMA-Factory, in any of its layouts. All images belong to the prompt."""
    for option, given, known in (("columns", columns, _COLUMNS), ("tags", tags, _TAGS)):
        if unknown := (given or {}).keys() - known.keys():
            raise ValueError(f"`{option}` has the keys {sorted(unknown)}; it may have {', '.join(known)}.")
    names, read_tags = {**_COLUMNS, **(columns or {})}, _read_tags(tags)
    check_absent(row, "video_type", names["videos"], names["audios"], "video", "audio", advice=_AS_FRAMES)
    check_absent(row, "not_conversational", names["tools"], is_there=has_tools)
    if row.get(names["kto_tag"]) is not None:
        problem = f"the row has `{names['kto_tag']}`, which judges one answer (KTO), and is no pair; drop the row."
        raise RowError("not_conversational", problem)
    fields, inside = (names["chosen"], names["rejected"]), list[Any]()
    both = row.get(names["response"])
    if isinstance(both, (list, tuple)) and len(both) == 2 and not any(is_given(row.get(field)) for field in fields):
        row = {**row, **dict(zip(fields, both, strict=True))}  # an old file: the better answer and the worse one
    elif is_given(both) and not any(row.get(field) is not None for field in (*fields, *_WHOLE)):
        pair = f"`{fields[0]}` and `{fields[1]}`"
        raise RowError("missing_column", f"`{names['response']}` holds no pair of answers; give {pair}.")
    whole = _WHOLE if any(is_given(row.get(field)) for field in _WHOLE) else None
    messages = names["messages"]
    if row.get(messages) is None and row.get(names["prompt"]) is None and row.get("messages") is not None:
        messages = "messages"  # OpenAI's layout
    if whole is None and row.get(messages) is None and row.get(names["prompt"]) is None:
        whole = fields if all(isinstance(row.get(field), (list, tuple)) for field in fields) else None
    if whole is not None:  # LLaMA-Factory's two whole conversations
        turns, chosen, rejected = _two_conversations(row, whole, read_tags, inside)
    else:
        check_is_text(row, fields, _AS_T2I)
        chosen, rejected = (answer_field(row, field, read_tags) for field in fields)
        if row.get(messages) is None and row.get(names["prompt"]) is not None:  # Alpaca's layout
            asked = _joined(row, names["prompt"], *([names["query"]] if row.get(names["query"]) else []))
            turns = [*_history(row, names["history"]), ("user", asked)]
        else:
            turns = prompt_field(row, messages, read_tags, inside)
    if IMAGE_MARKER in (chosen.strip(), rejected.strip()):
        problem = f"an answer is `{IMAGE_MARKER}`: the images are the answers; load the set as `omnireward_t2i`."
        raise RowError("image_in_answer", problem)
    turns = with_system(turns, row, names["system"])
    check_placeholders(turns, dict(zip(whole or fields, (chosen, rejected), strict=True)))
    images = _only_images(row, (names["images"], "image"), inside, messages if whole is None else whole[0])
    yield preference(turns, chosen, rejected, images, source_id=name_field(row, "id"))


def _llamafactory_fields(present: Collection[str], options: Mapping[str, Any]) -> set[str]:
    """List the fields that [`llamafactory`] reads or refuses."""
    names = {**_COLUMNS, **(options.get("columns") or {})}
    layouts = [set(_WHOLE), {names["messages"]}, {names["prompt"], names["query"]}, {"messages"}]
    layout = next((fields for fields in layouts if fields & set(present)), set[str]())
    if names["prompt"] in layout:
        layout = layout | {names["history"]}
    answers = set[str]() if layout & set(_WHOLE) else {names["chosen"], names["rejected"]}
    if not answers & set(present):
        answers |= {names["response"]}
    others = {names[key] for key in ("system", "images", "videos", "audios", "tools", "kto_tag")}
    return layout | answers | others | {"image", "video", "audio"}


def or_llamafactory(fields: Collection[str], present: Collection[str], options: Mapping[str, Any]) -> set[str]:
    """List some fields and, of a set in LLaMA-Factory's layout, those of [`llamafactory`]."""
    return {*fields, *(_llamafactory_fields(present, {}) if "conversations" in present else ())}


LLAMAFACTORY = Source(llamafactory, reads=_llamafactory_fields)

# Columns of a conversation, or of question and answer, in ms-swift's order of preference.
_CONVERSATIONS = ("messages", "conversation", "conversations")
_SYSTEMS = ("system", "system_prompt")
_QUERIES = ("query", "prompt", "input", "instruction", "question", "problem")
_RESPONSES = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)
_SWIFT_TAGS = Tags(("role", "from"), ("content", "value"), TAGS.roles)
_PARTS = ("messages", "images", "videos", "audios", "tools", "objects")
_LISTS_OF_SAMPLES = tuple(f"{side}_{part}" for side in ("positive", "negative") for part in _PARTS)
_SWIFT_FIELDS = {
    *(f"{side}{part}" for side in ("", "rejected_") for part in _PARTS if side or part != "messages"),
    *("image", "video", "audio", "ref_audios", "audio_codes", "rejected_response", "margin", "chat_template_kwargs"),
    *(*_SYSTEMS, *_LISTS_OF_SAMPLES),
}
_OBJECT = re.compile("<ref-object>|<bbox>")


def ms_swift(row: Row) -> Pairs:
    """Read a preference row of ms-swift: a conversation that ends with the better answer, and the worse answer."""
    media = ("videos", "video", "audios", "audio", "rejected_videos", "rejected_audios", "ref_audios", "audio_codes")
    check_absent(row, "video_type", *media, advice=_AS_FRAMES)
    check_absent(row, "not_conversational", "tools", "rejected_tools", is_there=has_tools)
    check_absent(row, "not_conversational", "chat_template_kwargs", *_LISTS_OF_SAMPLES)
    inside = list[Any]()
    prompt, chosen, field = _swift_conversation(row, inside)
    images = _only_images(row, ("images", "image"), inside, field)
    other_images = images_field(row, "rejected_images")
    if other_images and not _are_same(other_images, images):
        raise RowError("image_in_answer", f"`rejected_images` and `images` differ: the answers are images; {_AS_T2I}")
    rejected = _swift_rejected(row, prompt, field, images)
    if is_given(row.get("objects")) or is_given(row.get("rejected_objects")):
        prompt, chosen, rejected = _with_objects(row, prompt, chosen, rejected)
    answers = {field: chosen, "rejected_response": rejected}
    check_is_text(answers, tuple(answers), _AS_T2I)
    systems = [name for name in _SYSTEMS if is_given(row.get(name))]
    if len({row[name] for name in systems if isinstance(row[name], str)}) > 1:
        raise RowError("not_conversational", "`system` and `system_prompt` differ; keep one of them.")
    prompt = with_system(prompt, row, systems[0]) if systems else prompt
    check_placeholders(prompt, answers)
    strength = strength_field(row, "margin")
    yield preference(prompt, chosen, rejected, images, strength=strength, source_id=name_field(row, "id"))


def _ms_swift_fields(present: Collection[str], options: Mapping[str, Any]) -> set[str]:
    """List the fields that [`ms_swift`] reads or refuses."""
    if (messages := next((name for name in _CONVERSATIONS if name in present), None)) is not None:
        return _SWIFT_FIELDS | {messages}
    fields = _SWIFT_FIELDS | {"history"}
    for names in (_QUERIES, _RESPONSES):
        fields |= {names[0]} if names[0] in present else set(names) & set(present)
    return fields | ({"instruction", "input", "output"} if {"instruction", "input"} <= set(present) else set())


MS_SWIFT = Source(ms_swift, reads=_ms_swift_fields)


def _swift_conversation(row: Row, inside: list[Any]) -> tuple[Turns, str, str]:
    """Read the prompt without the system field, the better answer, and the name of the field that holds it."""
    for name in _CONVERSATIONS:
        if row.get(name) is not None:
            return *_swift_answered(row, name, inside), name
    if row.get("query") is None and row.get("instruction") is not None and row.get("input") is not None:
        query = _joined(row, "instruction", "input")
        answer = "output" if row.get("output") is not None else _only_field(row, _RESPONSES)
    else:
        query, answer = text_field(row, _only_field(row, _QUERIES)), _only_field(row, _RESPONSES)
    return [*_history(row, "history"), ("user", query)], answer_field(row, answer), answer


def _only_field(row: Row, names: Sequence[str]) -> str:
    """Pick the one of several names for the same thing that a row has."""
    given = [name for name in names if row.get(name) is not None]
    if names[0] in given:
        return names[0]
    if len(given) > 1:
        raise RowError("not_conversational", f"`{given[0]}` and `{given[1]}` may both be the `{names[0]}`; keep one.")
    if not given:
        hint = "`messages`, or `query` and `response`" if names is _QUERIES else "`response`"
        raise RowError("missing_column", f"the row has no {names[0]}; give {hint}, or drop the row.")
    return given[0]


def _swift_answered(row: Row, field: str, inside: list[Any]) -> tuple[Turns, str]:
    """Read a conversation, also as a string or as ShareGPT's exchanges."""
    messages = row[field]
    if isinstance(messages, str) and (messages := literal(row[field])) is None:
        raise RowError("not_conversational", f"`{field}` is a string that holds no list of messages; give the list.")
    if isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], Mapping):
        if not any(messages[0].get(key) is not None for key in ("role", "from", "content", "value")):
            messages = [message for exchange in messages for message in _exchange(exchange, field)]
    return answered_field({field: messages}, field, _SWIFT_TAGS, inside)


def _exchange(exchange: Any, field: str) -> list[dict[str, Any]]:
    """Convert a question with its answer, in ShareGPT's first layout, to two messages."""
    exchange = exchange if isinstance(exchange, Mapping) else {}
    given = {key: value for key, value in exchange.items() if value is not None}
    keys = [[key for key in names if key in given] for names in (("user", "human"), ("assistant", "gpt", "bot"))]
    if [len(names) for names in keys] != [1, 1] or len(given) > 2:
        shown = ", ".join(map(str, given))
        raise RowError("not_conversational", f"`{field}` has a message with {shown:.80}; give `role` and `content`.")
    return [{"role": role, "content": given[key]} for role, (key,) in zip(("user", "assistant"), keys, strict=True)]


def _swift_rejected(row: Row, prompt: Turns, field: str, images: Sequence[Any]) -> str:
    """Read the worse answer, which has to be to the same prompt."""
    given, conversation = row.get("rejected_response"), row.get("rejected_messages")
    if conversation is not None and not is_given(given):
        given = None
    if isinstance(given, (list, tuple)) and len(given) > 1:
        problem = f"`rejected_response` has {len(given)} messages, and one is read; drop the row."
        raise RowError("not_conversational", problem)
    if conversation is None:
        if given is None and is_given(row.get("rejected_images")):
            problem = "the row has `rejected_images` and no `rejected_response`, so that it compares two images"
            raise RowError("image_in_answer", f"{problem}; {_AS_T2I}")
        if given is None and row.get("label") is not None:
            problem = "the row has `label` and no `rejected_response`: it judges one answer (KTO); drop the row."
            raise RowError("missing_column", problem)
        return answer_field(row, "rejected_response", _SWIFT_TAGS)
    inside = list[Any]()
    other, rejected = _swift_answered(row, "rejected_messages", inside)
    _check_same_prompt(prompt, other, (field, "rejected_messages"))
    if inside and not _are_same(inside, images):
        raise RowError("image_in_answer", f"`rejected_messages` shows other images than `{field}`; drop the row.")
    if given is not None and answer_field(row, "rejected_response", _SWIFT_TAGS) != rejected:
        raise RowError("not_conversational", "`rejected_response` and `rejected_messages` differ; keep one of them.")
    return rejected


def _with_objects(row: Row, prompt: Turns, chosen: str, rejected: str) -> tuple[Turns, str, str]:
    """Fill `<ref-object>` and `<bbox>` from `objects`, as ms-swift does."""
    texts, has_own = [text for _, text in prompt], is_given(row.get("rejected_objects"))
    *turns, better = _filled([*texts, chosen], row.get("objects"), "objects", is_exact=True)
    name = "rejected_objects" if has_own else "objects"
    *other, worse = _filled([*texts, rejected], row.get(name), name, is_exact=has_own)
    if other != turns:
        raise RowError("not_conversational", "`objects` and `rejected_objects` make two prompts; drop the row.")
    return [(role, text) for (role, _), text in zip(prompt, turns, strict=True)], better, worse


def _filled(texts: Sequence[str], objects: Any, field: str, *, is_exact: bool) -> list[str]:
    """Fill placeholders in order; with `is_exact`, none of `objects` may be left over."""
    objects = literal(objects) if isinstance(objects, str) else objects or {}
    if not isinstance(objects, Mapping):
        raise RowError("not_conversational", f"`{field}` is no object with `ref` and `bbox`; fix it.")
    boxes, kind = objects.get("bbox") or [], objects.get("bbox_type") or "real"
    if is_given(boxes) and kind != "norm1":
        problem = f"`{field}` has boxes in pixels, which models write in different ways; write them into the texts"
        raise RowError("not_conversational", f'{problem}, or give shares of the image and `bbox_type` "norm1".')
    fillings = {"<ref-object>": list(objects.get("ref") or []), "<bbox>": [_box(box, field) for box in boxes]}
    for placeholder, values in fillings.items():
        count, given = sum(text.count(placeholder) for text in texts), len(values)
        if count > given or (is_exact and count < given) or not all(isinstance(value, str) for value in values):
            problem = f"the texts have {count} `{placeholder}`, but `{field}` has {given} values for them; fix it."
            raise RowError("placeholder_count", problem)
    left = {placeholder: iter(values) for placeholder, values in fillings.items()}
    return [_OBJECT.sub(lambda match: next(left[match[0]]), text) for text in texts]


def _box(box: Any, field: str) -> str:
    """Write a point or a box in thousandths of the image, as ms-swift does for most models."""
    numbers = list(box) if isinstance(box, (list, tuple)) else []
    if len(numbers) not in (2, 4) or not all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in numbers):
        raise RowError("not_conversational", f"`{field}` has the box {box!r:.60}; give 2 or 4 numbers from 0 to 1.")
    points = list(zip(numbers[::2], numbers[1::2], strict=True))
    corners = [[pick(axis) for axis in zip(*points, strict=True)] for pick in (min, max)][: len(points)]
    return f"[{','.join(f'({round(x * 1000)},{round(y * 1000)})' for x, y in corners)}]"


def _are_same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return list(map(as_image, first)) == list(map(as_image, second))


def _only_images(row: Row, fields: Sequence[str], inside: list[Any], messages: str) -> list[Any]:
    """Read the images of a row, from one of some fields or from the blocks of its messages."""
    found = {field: images for field in dict.fromkeys(fields) if (images := images_field(row, field))}
    found |= {messages: inside} if inside else {}
    (name, images), *others = found.items() or [("", [])]
    for other, other_images in others:
        if not _are_same(images, other_images):
            raise RowError("image_type", f"`{name}` and `{other}` hold different images; keep one of the two.")
    return images


def _joined(row: Row, *fields: str) -> str:
    return "\n".join(filter(None, (text_field(row, field) for field in fields)))


def _history(row: Row, field: str) -> Turns:
    """Read earlier turns, as a list of pairs of strings or a string that holds it."""
    turns: Turns = []
    history = row.get(field) or []
    history = literal(history) if isinstance(history, str) else history
    for exchange in history if isinstance(history, (list, tuple)) else [history]:
        is_pair = isinstance(exchange, (list, tuple)) and len(exchange) == 2
        if not (is_pair and all(isinstance(text, str) for text in exchange)):
            raise RowError("not_conversational", f"`{field}` is no list of pairs of strings; fix it.")
        turns += [("user", exchange[0]), ("assistant", exchange[1])]
    return turns


def _two_conversations(
    row: Row, fields: tuple[str, str], tags: Tags = TAGS, inside: list[Any] | None = None
) -> tuple[Turns, str, str]:
    """Read the common prompt of two conversations and their last answers; `inside` collects images of blocks."""
    other_inside = None if inside is None else list[Any]()
    prompt, chosen = answered_field(row, fields[0], tags, inside)
    other, rejected = answered_field(row, fields[1], tags, other_inside)
    _check_same_prompt(prompt, other, fields)
    if not _are_same(inside or (), other_inside or ()):
        raise RowError("image_in_answer", f"`{fields[0]}` and `{fields[1]}` show different images; drop the row.")
    return prompt, chosen, rejected


def _check_same_prompt(first: Turns, second: Turns, fields: Sequence[str]) -> None:
    if first != second:
        problem = f"`{fields[0]}` and `{fields[1]}` differ before their last answer; drop the row."
        raise RowError("not_conversational", problem)


def _read_tags(tags: Mapping[str, str] | None) -> Tags:
    """Read the `tags` of `dataset_info.json`."""
    if not tags:
        return TAGS
    given = {**_TAGS, **tags}
    role_keys, content_keys = (
        default if (name := given[tag]) is None else (name,)
        for tag, default in (("role_tag", TAGS.role_keys), ("content_tag", TAGS.content_keys))
    )
    roles = {str(given[f"{role}_tag"]): role for role in ("user", "assistant", "system")}
    calls = (*TAGS.calls, str(given["observation_tag"]), str(given["function_tag"]))
    return Tags(role_keys, content_keys, roles, calls)


def povid(row: Row) -> Pairs:
    """Read a row of YiyangAiLab/POVID_preference_data_for_VLLMs; no strength. Image paths lose COCO's folder."""
    prompt, chosen, rejected = _two_conversations(row, ("conversations", "rejected_conversations"))
    (image,) = image_field(row, "image")
    image = image.removeprefix("./data/coco/") if isinstance(image, str) else image
    yield preference(prompt, chosen, rejected, [image], source_id=name_field(row, "id"))


POVID = Source(
    povid,
    licence="CC-BY-4.0",
    hub_id="YiyangAiLab/POVID_preference_data_for_VLLMs",
    reads=("conversations", "rejected_conversations", "image", "id"),
    note="Images are not shipped: give the folder of COCO's train2014 as `image_root`.",
)


def wildvision_battle(row: Row) -> Pairs:
    """Read a row of WildVision/wildvision-battle, a user's vote on the answers of two models; no strength."""
    winner = row.get("winner")
    if winner in ("tie", "tie (bothbad)"):
        raise RowError("tie", f"`winner` is {winner!r}; drop the row, neither answer is better.")
    if winner not in ("model_a", "model_b"):
        raise RowError("unparsed_verdict", f"`winner` is {winner!r:.40}; it has to be model_a, model_b or a tie.")
    prompt, *answers = _two_conversations(row, ("conversation_a", "conversation_b"))
    chosen, rejected = answers if winner == "model_a" else answers[::-1]
    yield preference(prompt, chosen, rejected, image_field(row, "image"), source_id=name_field(row, "question_id"))


WILDVISION_BATTLE = Source(
    wildvision_battle,
    licence="ODC-BY",
    hub_id="WildVision/wildvision-battle",
    reads=("conversation_a", "conversation_b", "winner", "image", "question_id"),
)


def llava_human_preference(row: Row) -> Pairs:
    """Read a row of zhiqings/LLaVA-Human-Preference-10K, two answers to a conversation; no strength."""
    verdict = row.get("preference")
    if isinstance(verdict, bool) or verdict not in (1, 2):
        raise RowError("unparsed_verdict", f"`preference` is {verdict!r:.40}; it has to be 1 or 2.")
    prompt, sides = prompt_field(row, "conversations"), ("output_1", "output_2")
    chosen, rejected = (answer_field(row, side) for side in (sides if verdict == 1 else sides[::-1]))
    yield preference(prompt, chosen, rejected, image_field(row, "image"), source_id=name_field(row, "id"))


LLAVA_HUMAN_PREFERENCE = Source(
    llava_human_preference,
    hub_id="zhiqings/LLaVA-Human-Preference-10K",
    files=("llava_7b_v1_preference.json",),
    reads=("conversations", "output_1", "output_2", "preference", "image", "id"),
    note="The terms are not clear. Images are not shipped: give the folder of COCO's train2017 as `image_root`.",
)
