"""From a preference row to the text that the model reads, exactly as a server would render it.

A row has one prompt (with its images and videos) and several answers, called branches here: chosen and rejected.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import is_conversational, prepare_multimodal_messages

from .data.rows import RowError, Video, row_images


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


@dataclass
class Rendered:
    """
    One row, rendered.

    Parameters:
        texts (`list[str]`):
            Full text of each branch: prompt and answer.
        images (`list[PIL.Image.Image]`):
            The images that the texts' placeholders stand for, in reading order.
        add_special_tokens (`bool`):
            Whether the tokenizer still has to add its own special tokens.
        videos (`list[Video]`):
            The videos, likewise, with decoded frames.
    """

    texts: list[str]
    images: list[Image.Image]
    add_special_tokens: bool = False
    videos: list[Video] = field(default_factory=list)


def get_tokenizer(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def image_token_ids(processing_class: ProcessingClass) -> set[int]:
    """Ids of the tokens that stand for pieces of an image or a video; none for a tokenizer."""
    if not isinstance(processing_class, ProcessorMixin):
        return set()
    ids = (getattr(processing_class, f"{kind}_token_id", None) for kind in ("image", "video"))
    return {token_id for token_id in ids if token_id is not None}


def render_branches(
    row: Mapping[str, Any],
    images: list[Image.Image],
    processing_class: ProcessingClass,
    videos: Sequence[Video] = (),
) -> Rendered:
    """
    Renders both conversations of a preference row with the chat template.

    Args:
        row (`Mapping[str, Any]`):
            Preference row, conversational or plain, with explicit or implicit prompt; checked before by
            [`~trl_dt2it.data.rows.check_row`].
        images (`list[PIL.Image.Image]`):
            The row's decoded images.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of a vision-language model, or tokenizer of a text model.
        videos (`Sequence[Video]`, *optional*, defaults to `()`):
            The row's videos, with decoded frames.

    Returns:
        [`Rendered`]: with the chosen branch first.

    Raises:
        [`~trl_dt2it.data.rows.RowError`]: `not_conversational`, if the chat template refuses the conversation.
    """
    prompt = row.get("prompt")
    if not is_conversational(cast("dict[str, Any]", row)):
        eos = get_tokenizer(processing_class).eos_token or ""
        answers = [row[side] if row[side].endswith(eos) else row[side] + eos for side in ("chosen", "rejected")]
        return Rendered([(prompt or "") + answer for answer in answers], images, add_special_tokens=True)
    tools = row.get("tools")
    kwargs = {
        "tools": json.loads(tools) if isinstance(tools, str) else _without_none(tools),
        **_without_none(row.get("chat_template_kwargs") or {}),
    }
    try:
        texts = [
            render_conversation([*(prompt or []), *row[side]], images, processing_class, **kwargs)
            for side in ("chosen", "rejected")
        ]
    except TemplateError as error:
        raise RowError(
            "not_conversational", f"the chat template refuses the conversation ({error}); fix its roles."
        ) from error
    return Rendered(texts, images, lacks_special_tokens(texts[0], processing_class), list(videos))


def check_difference(row: Mapping[str, Any], processing_class: ProcessingClass) -> None:
    """
    Refuse a row whose two answers are one to the model, because its chat template drops what they differ in (thoughts,
    fields of a message that it does not know) or its tokenizer normalizes it away. Images are not looked at.

    Args:
        row (`Mapping[str, Any]`):
            Preference row, as in [`render_branches`].
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor or tokenizer.

    Raises:
        [`~trl_dt2it.data.rows.RowError`]: `equal_answers`, or `not_conversational` if the template refuses the
            conversation.
    """
    rendered = render_branches(row, cast(Any, row_images(row)), processing_class)  # only their number counts
    if len(set(map(_folded, rendered.texts))) > 1:  # no tokenizer makes these equal, so it need not be asked
        return
    chosen, rejected = (
        get_tokenizer(processing_class)(text, add_special_tokens=False)["input_ids"] for text in rendered.texts
    )
    if chosen == rejected:
        raise equal_when_rendered()


def equal_when_rendered() -> RowError:
    """The error about a row whose two answers are the same tokens."""
    return RowError(
        "equal_answers",
        "`chosen` and `rejected` are equal as the model reads them, because the chat template or the tokenizer drops "
        "what they differ in; drop the row, there is nothing to learn.",
    )


def _folded(text: str) -> str:
    """A text without what tokenizers normalize: compatible characters, case, white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def lacks_special_tokens(text: str, processing_class: ProcessingClass) -> bool:
    """
    Whether the tokenizer has to add its special tokens to a text that a chat template wrote, by the rule of
    `apply_chat_template(tokenize=True)`: a tokenizer's template writes them all, a processor's may leave the first
    out.

    Args:
        text (`str`):
            Rendered conversation.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor or tokenizer.

    Returns:
        `bool`
    """
    if not isinstance(processing_class, ProcessorMixin):
        return False
    bos_token = get_tokenizer(processing_class).bos_token
    return bos_token is None or not text.startswith(bos_token)


def render_conversation(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any], processing_class: ProcessingClass, **kwargs: Any
) -> str:
    """
    Renders one conversation, answer included, as text with one placeholder an image.

    Args:
        messages (`Sequence[Mapping[str, Any]]`):
            Messages with `role` and `content`, a string or blocks.
        images (`Sequence`):
            Only their number counts: where all contents are strings, the placeholders go before the text of the first
            user turn.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Its chat template is used.
        kwargs:
            Passed on to the template.

    Returns:
        `str`: the text.
    """
    clean = [_clean(message) for message in messages]
    if not isinstance(processing_class, ProcessorMixin):
        flat = [{**message, "content": _flatten(message["content"])} for message in clean]
        return cast(str, processing_class.apply_chat_template(flat, tokenize=False, **kwargs))
    prepared = prepare_multimodal_messages(clean, list(images))
    return processing_class.apply_chat_template(prepared, tokenize=False, **kwargs)


def _clean(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that other messages brought; `content` stays, also where there is none."""
    return {"content": None, **_without_none(message)}


def _without_none(value: Any) -> Any:
    """Arrow gives every dict the keys of all, with None where there was none, and templates test for the key alone."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _flatten(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")
