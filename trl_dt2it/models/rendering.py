"""Rendering of rows with the chat template, and their encoding by the processor, each image once per row."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jinja2 import TemplateError
from PIL import Image
from torch.nn.functional import pad
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.video_utils import VideoMetadata
from trl import is_conversational, prepare_multimodal_messages

from ..data.rows import RowError, Video, differ_for_any_tokenizer, row_images


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
# The vectors `(L,)` of each token input, as `[completion][row]`, and the image tensors of all rows.
Encoded = tuple[list[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]


@dataclass
class Rendered:
    """One row as text: a prompt with its completions."""

    texts: list[str]  # prompt and completion, per completion
    images: list[Image.Image]  # of the texts' placeholders, in reading order
    add_special_tokens: bool = False  # the tokenizer still has to add its own
    videos: list[Video] = field(default_factory=list)  # of the texts' placeholders, with decoded frames


def get_tokenizer(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def image_token_ids(processing_class: ProcessingClass) -> set[int]:
    """Return the ids of image and video placeholders; none for a tokenizer."""
    kinds = ("image", "video") if isinstance(processing_class, ProcessorMixin) else ()
    found = (getattr(processing_class, f"{kind}_token_id", None) for kind in kinds)
    return {token for token in found if token is not None}


def render_pair(
    row: Mapping[str, Any], images: list[Image.Image], processing_class: ProcessingClass, videos: Sequence[Video] = ()
) -> Rendered:
    """Render both conversations of a preference row."""
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
    conversations = [[*(prompt or []), *row[side]] for side in ("chosen", "rejected")]
    try:
        texts = [render_conversation(turns, images, processing_class, **kwargs) for turns in conversations]
    except TemplateError as error:
        message = f"the chat template refuses the conversation ({error}); fix its roles."
        raise RowError("not_conversational", message) from error
    return Rendered(texts, images, lacks_special_tokens(texts[0], processing_class), list(videos))


def check_difference(row: Mapping[str, Any], processing_class: ProcessingClass) -> None:
    """Refuse a row whose two answers are the same to the model, whatever its images."""
    # A chat template may drop the difference (thoughts, unknown fields of a message), a tokenizer normalize it away.
    rendered = render_pair(row, cast(Any, row_images(row)), processing_class)  # only their number counts
    if differ_for_any_tokenizer(*rendered.texts):
        return
    chosen, rejected = get_tokenizer(processing_class)(rendered.texts, add_special_tokens=False)["input_ids"]
    if chosen == rejected:
        raise equal_when_rendered()


def equal_when_rendered() -> RowError:
    """Return the error for a row whose two answers are the same tokens."""
    return RowError(
        "equal_answers",
        "`chosen` and `rejected` are equal as the model reads them, because the chat template or the tokenizer drops "
        "what they differ in; drop the row, there is nothing to learn.",
    )


def lacks_special_tokens(text: str, processing_class: ProcessingClass) -> bool:
    """Tell whether the tokenizer has to add its special tokens to a text of the chat template."""
    # The rule of `apply_chat_template(tokenize=True)`: a tokenizer's template writes them all, a processor's may omit
    # the first.
    if not isinstance(processing_class, ProcessorMixin):
        return False
    bos_token = get_tokenizer(processing_class).bos_token
    return bos_token is None or not text.startswith(bos_token)


def render_conversation(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any], processing_class: ProcessingClass, **kwargs: Any
) -> str:
    """Render one conversation, answer included, with one placeholder per image."""
    # `content` stays, also where it is missing.
    clean = [{"content": None, **_without_none(message)} for message in messages]
    if not isinstance(processing_class, ProcessorMixin):
        flat = [{**message, "content": _text_of(message["content"])} for message in clean]
        return cast(str, processing_class.apply_chat_template(flat, tokenize=False, **kwargs))
    prepared = prepare_multimodal_messages(clean, list(images))
    return processing_class.apply_chat_template(prepared, tokenize=False, **kwargs)


def _without_none(value: Any) -> Any:
    """Drop the `None` that Arrow writes for the keys of other dicts; templates test for the key alone."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _text_of(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")


def encode_completions(rows: Sequence[Rendered], processing_class: ProcessingClass) -> Encoded:
    """Tokenize all completions of R rows and preprocess each image once."""
    tokens: list[list[dict[str, torch.Tensor]]] = [[{} for _ in rows] for _ in rows[0].texts]
    tokenizer = get_tokenizer(processing_class)
    visual = [index for index, row in enumerate(rows) if row.images or row.videos]
    for index in sorted({*range(len(rows))} - {*visual}):
        encoded = tokenizer(rows[index].texts, add_special_tokens=rows[index].add_special_tokens)["input_ids"]
        for by_row, ids in zip(tokens, encoded, strict=True):
            by_row[index] = {"input_ids": torch.tensor(ids)}

    # Processors separate the images and videos of a batch, though frames are images in some families; one row at a
    # time keeps the order.
    batches = [visual] if not any(row.videos for row in rows) else [[index] for index in visual]
    parts = []
    for indices in filter(None, batches):
        # A tokenizer's rows have no images.
        encoded, tensors = _encode_visual([rows[index] for index in indices], cast(ProcessorMixin, processing_class))
        parts.append(tensors)
        for by_row, vectors in zip(tokens, encoded, strict=True):
            for index, of_row in zip(indices, vectors, strict=True):
                by_row[index] = of_row
    return tokens, join_images(parts)


def _encode_visual(rows: Sequence[Rendered], processor: ProcessorMixin) -> Encoded:
    """Encode rows that all have images, or one row with videos."""
    inputs: dict[str, Any] = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    inputs["add_special_tokens"] = rows[0].add_special_tokens
    if any(row.images for row in rows):
        inputs["images"] = [row.images for row in rows]
    videos = [video for row in rows for video in row.videos]
    if videos:
        if getattr(processor, "video_processor", None) is None:
            raise ValueError(f"The row has a video, but {type(processor).__name__} reads none; use another model.")
        inputs["videos"] = [video.frames for video in videos]
        sizes = [(len(video.frames), video.fps) for video in videos]
        metadata = [VideoMetadata(n, fps, frames_indices=list(range(n)), duration=n / fps) for n, fps in sizes]
        inputs["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
    replaying = copy.copy(processor)
    for name in ("image_processor", "video_processor"):
        if getattr(processor, name, None) is not None:
            setattr(replaying, name, _Replay(getattr(processor, name)))
    tokens: list[list[dict[str, torch.Tensor]]] = []
    tensors: dict[str, torch.Tensor] = {}
    for texts in zip(*(row.texts for row in rows), strict=True):
        batch = replaying(text=list(texts), **inputs)
        shape = batch["input_ids"].shape
        is_real = batch.pop("attention_mask").bool()
        per_token = [key for key, value in batch.items() if value.shape == shape]
        tokens.append([{key: batch[key][row][is_real[row]] for key in per_token} for row in range(len(rows))])
        tensors = tensors or {key: value for key, value in batch.items() if key not in per_token}
    return tokens, tensors


def join_images(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join the image tensors of several rows; zeros fill rows with fewer tiles, or smaller images on the right and at
    the bottom, as processors do within a batch."""
    parts = [part for part in parts if part]
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        tensors = [part[key] for part in parts if key in part]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            if key == "pixel_values_videos":  # frames of zeros would be read as frames
                raise ValueError(
                    "The videos of a batch differ in their number of frames, which this family cannot read."
                )
            most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
            missing = [[size - own for size, own in zip(most, t.shape[1:], strict=True)] for t in tensors]
            tensors = [
                pad(t, [n for m in reversed(of) for n in (0, m)]) for t, of in zip(tensors, missing, strict=True)
            ]
        joined[key] = torch.cat(tensors)
    return joined


class _Replay:
    """An image or video processor that works once and then repeats its result."""

    # All completions of a batch have the same images in the same order, so that the pixels and the numbers of
    # placeholder tokens are the same in every call.

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._result: BatchFeature | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        if self._result is None:
            self._result = self._image_processor(*args, **kwargs)
        return copy.copy(self._result)  # processors pop keys from it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)
