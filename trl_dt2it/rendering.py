"""From a preference row to the text and the tokens that the model reads, exactly as a server would render them.

A row has one prompt (with its images) and several answers, called branches here: chosen and rejected. The images are
the same in all branches, so they are preprocessed for the first branch and replayed for the others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from trl import is_conversational, prepare_multimodal_messages


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
    """

    texts: list[str]
    images: list[Image.Image]
    add_special_tokens: bool = False


def get_tokenizer(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def image_token_ids(processing_class: ProcessingClass) -> set[int]:
    """Ids of the tokens that stand for pieces of an image or a video; none for a tokenizer."""
    if not isinstance(processing_class, ProcessorMixin):
        return set()
    ids = (getattr(processing_class, f"{kind}_token_id", None) for kind in ("image", "video"))
    return {token_id for token_id in ids if token_id is not None}


def render_branches(row: Mapping[str, Any], images: list[Image.Image], processing_class: ProcessingClass) -> Rendered:
    """
    Renders both conversations of a preference row with the chat template.

    Args:
        row (`Mapping[str, Any]`):
            Preference row, conversational or plain, with explicit or implicit prompt; checked before by
            [`~trl_dt2it.data.schema.check_row`].
        images (`list[PIL.Image.Image]`):
            The row's decoded images.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of a vision-language model, or tokenizer of a text model.

    Returns:
        [`Rendered`]: with the chosen branch first.
    """
    prompt = row.get("prompt")
    if not is_conversational(cast("dict[str, Any]", row)):
        eos = get_tokenizer(processing_class).eos_token or ""
        answers = [row[side] if row[side].endswith(eos) else row[side] + eos for side in ("chosen", "rejected")]
        return Rendered([(prompt or "") + answer for answer in answers], images, add_special_tokens=True)
    tools = row.get("tools")
    kwargs = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    texts = [
        render_conversation([*(prompt or []), *row[side]], images, processing_class, **kwargs)
        for side in ("chosen", "rejected")
    ]
    return Rendered(texts, images, add_special_tokens=lacks_special_tokens(texts[0], processing_class))


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
    if not isinstance(processing_class, ProcessorMixin):
        flat = [{**message, "content": _flatten(message.get("content"))} for message in messages]
        return cast(str, processing_class.apply_chat_template(flat, tokenize=False, **kwargs))
    # Arrow gives every block every key, with None where there was none, and templates test for the key alone.
    clean = [{**message, "content": _without_none(message.get("content"))} for message in messages]
    prepared = prepare_multimodal_messages(clean, list(images))
    return processing_class.apply_chat_template(prepared, tokenize=False, **kwargs)


def encode_branches(
    rows: Sequence[Rendered], processing_class: ProcessingClass
) -> tuple[list[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """
    Tokenises all branches of several rows and preprocesses each image once.

    Args:
        rows (`Sequence[Rendered]` of length B):
            Rows with K branches each.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor or tokenizer.

    Returns:
        `tuple`:
            - a list of K lists of B dicts: the unpadded token vectors of a branch, `input_ids` and what else the
              processor gives per token (`mm_token_type_ids`, ...), each of shape `(L,)` and dtype `int64`;
            - a dict of the image tensors (`pixel_values`, `image_grid_thw`, ...) of the rows with images, in the order
              of the rows, once for all branches.
    """
    num_branches = len(rows[0].texts)
    tokens: list[list[dict[str, torch.Tensor]]] = [[{} for _ in rows] for _ in range(num_branches)]
    image_tensors: dict[str, torch.Tensor] = {}
    with_images = [index for index, row in enumerate(rows) if row.images]
    tokenizer = get_tokenizer(processing_class)

    for index, row in enumerate(rows):
        if not row.images:
            for branch, text in enumerate(row.texts):
                ids = tokenizer(text, add_special_tokens=row.add_special_tokens)["input_ids"]
                tokens[branch][index] = {"input_ids": torch.tensor(ids)}

    if with_images:
        processor = _replaying(cast(ProcessorMixin, processing_class))  # a tokenizer's rows have no images
        for branch in range(num_branches):
            batch = processor(
                text=[rows[index].texts[branch] for index in with_images],
                images=[rows[index].images for index in with_images],
                padding=True,
                padding_side="right",
                add_special_tokens=rows[with_images[0]].add_special_tokens,
                return_tensors="pt",
            )
            shape = batch["input_ids"].shape
            is_real = batch.pop("attention_mask").bool()
            per_token = [key for key, value in batch.items() if value.shape == shape]
            for position, index in enumerate(with_images):
                tokens[branch][index] = {key: batch[key][position][is_real[position]] for key in per_token}
            if branch == 0:
                image_tensors = {key: value for key, value in batch.items() if key not in per_token}
    return tokens, image_tensors


class _Replay:
    """An image processor that works once and then gives the same answer again.

    All branches of a batch have the same images in the same order, so that what the processor computes from them (the
    pixels, and the number of placeholder tokens) is the same in every call."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._result: BatchFeature | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        if self._result is None:
            self._result = self._image_processor(*args, **kwargs)
        return copy.copy(self._result)  # processors pop keys from it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)


def _replaying(processor: ProcessorMixin) -> ProcessorMixin:
    """A shallow copy of the processor that preprocesses its images once, however often it is called."""
    replaying = copy.copy(processor)
    replaying.image_processor = _Replay(processor.image_processor)
    return replaying


def _without_none(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [{key: value for key, value in block.items() if value is not None} for block in content]


def _flatten(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")
