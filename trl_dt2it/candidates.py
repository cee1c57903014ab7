"""A prompt and its candidate answers, as anybody may write them, in one form; and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .data.rows import RowError, check_row
from .models.rendering import ProcessingClass, get_tokenizer


@dataclass
class Candidates:
    """
    A prompt and the answers to score.

    Parameters:
        prompt (`str` or `list[dict]`):
            Text, or messages with `{"type": "image"}` in place of each image.
        responses (`list`):
            N answers, all strings if the prompt is one, and otherwise all lists of messages.
        images (`list`):
            The images of the prompt, as [`~trl_dt2it.data.images.load_image`] takes them.
        name (`str`, *optional*, defaults to `""`):
            What errors call it, such as `"prompt 3"`.
    """

    prompt: Any
    responses: list[Any]
    images: list[Any] = field(default_factory=list)
    name: str = ""


def as_candidates(
    prompt: Any, responses: Sequence[Any], images: Any, processing_class: ProcessingClass, name: str = ""
) -> Candidates:
    """
    Brings a prompt and its answers to one form.

    Args:
        prompt (`str` or `Sequence[dict]`):
            Text, which is a user's message if there is a chat template, or messages. Their image blocks may hold the
            image, under `image`.
        responses (`Sequence`):
            Answers: texts, lists of messages, or single messages.
        images (`list` or a single image, *optional*):
            The images of the prompt. If given, those in its blocks do not count: TRL's trainers give both.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor or tokenizer.
        name (`str`, *optional*, defaults to `""`):
            What errors call it.

    Returns:
        [`Candidates`]

    Raises:
        `ValueError`: if the answers are one string, or messages where there is no chat template.
    """
    if isinstance(responses, (str, Mapping)):
        raise ValueError("`responses` is a single answer; give a list of answers.")
    answers = [[one] if isinstance(one, Mapping) else one for one in responses]
    if isinstance(prompt, str):
        template = getattr(processing_class, "chat_template", None) or get_tokenizer(processing_class).chat_template
        if template is None and all(isinstance(answer, str) for answer in answers):
            return Candidates(prompt, answers, _as_list(images), name)
        prompt = [{"role": "user", "content": prompt}]
    messages, found = take_out_images(prompt)
    conversations = [
        [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer) for answer in answers
    ]
    return Candidates(messages, conversations, found if images is None else _as_list(images), name)


def take_out_images(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages whose image blocks are `{"type": "image"}` alone, and the images that were in them under `image`."""
    images, cleaned = [], []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            images += [b["image"] for b in content if b.get("type") == "image" and b.get("image") is not None]
            content = [
                {key: value for key, value in b.items() if key != "image"} if b.get("type") == "image" else b
                for b in content
            ]
        cleaned.append({**message, "content": content})
    return cleaned, images


def check_prompt(candidates: Candidates, special_tokens: re.Pattern | None) -> None:
    """
    Checks everything about a prompt but the images themselves.

    Raises:
        [`~trl_dt2it.data.rows.RowError`]: for the first problem.
    """
    try:
        _check(candidates, "" if isinstance(candidates.prompt, str) else [{"role": "assistant"}], special_tokens)
    except RowError as error:
        raise named_error(error, candidates.name) from error


def check_response(candidates: Candidates, index: int, special_tokens: re.Pattern | None) -> None:
    """
    Checks an answer. An empty one is fine, since a policy may well give one.

    Raises:
        [`~trl_dt2it.data.rows.RowError`]: for the first problem.
    """
    try:
        _check(candidates, candidates.responses[index], special_tokens)
    except RowError as error:
        raise named_error(error, ", ".join(filter(None, [candidates.name, f"response {index}"]))) from error


def _check(candidates: Candidates, response: Any, special_tokens: re.Pattern | None) -> None:
    """[`check_row`] on a pair of two answers that are not empty and not equal, whatever the response is."""
    row = {"prompt": candidates.prompt, "images": candidates.images}
    if not isinstance(response, str) and not (response and all(isinstance(one, Mapping) for one in response)):
        raise RowError("not_conversational", "`chosen` is neither a string nor a list of messages; give one of them.")
    sides = {side: _marked(response, mark) for side, mark in (("chosen", "."), ("rejected", ","))}
    check_row({**row, **sides}, special_tokens=special_tokens)


def _marked(response: Any, mark: str) -> Any:
    if isinstance(response, str):
        return response + mark
    content = response[-1].get("content")
    if content is None or isinstance(content, str):
        content = (content or "") + mark
    elif isinstance(content, (list, tuple)):
        content = [*content, {"type": "text", "text": mark}]
    return [*response[:-1], {**response[-1], "content": content}]


def named_error(error: RowError, name: str) -> RowError:
    """The same error, with the name of what it is about in front."""
    text = str(error).replace("`chosen`", "the response")
    return RowError(error.reason, f"{name}: {text}" if name else text)


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]
