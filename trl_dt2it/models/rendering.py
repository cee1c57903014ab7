"""Rows rendered by a chat template and encoded by a processor, one prompt with its completions."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.video_utils import VideoMetadata
from trl import is_conversational, prepare_multimodal_messages

from ..data.rows import RowError, Video, row_images


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


@dataclass
class Rendered:
    """One row, rendered."""

    texts: list[str]  # Full text of each branch: prompt and answer
    images: list[Image.Image]  # The images that the texts' placeholders stand for, in reading order
    add_special_tokens: bool = False  # Whether the tokenizer still has to add its own special tokens
    videos: list[Video] = field(default_factory=list)  # The videos, likewise, with decoded frames


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
    """Renders both conversations of a preference row with the chat template."""
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
    """Refuse a row whose two answers are one to the model, because its chat template drops what they differ in
    (thoughts, fields of a message that it does not know) or its tokenizer normalizes it away. Images are not looked
    at.
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
    """Whether the tokenizer has to add its special tokens to a text that a chat template wrote, by the rule of
    `apply_chat_template(tokenize=True)`: a tokenizer's template writes them all, a processor's may leave the first
    out.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return False
    bos_token = get_tokenizer(processing_class).bos_token
    return bos_token is None or not text.startswith(bos_token)


def render_conversation(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any], processing_class: ProcessingClass, **kwargs: Any
) -> str:
    """Renders one conversation, answer included, as text with one placeholder an image."""
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


def encode_branches(
    rows: Sequence[Rendered], processing_class: ProcessingClass
) -> tuple[list[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """Tokenises all branches of several rows and preprocesses each image once.

    Shapes: returns `(L,)` `int64`.
    """
    num_branches = len(rows[0].texts)
    tokens: list[list[dict[str, torch.Tensor]]] = [[{} for _ in rows] for _ in range(num_branches)]
    tokenizer = get_tokenizer(processing_class)
    visual = []
    for index, row in enumerate(rows):
        if row.images or row.videos:
            visual.append(index)
            continue
        for branch, text in enumerate(row.texts):
            ids = tokenizer(text, add_special_tokens=row.add_special_tokens)["input_ids"]
            tokens[branch][index] = {"input_ids": torch.tensor(ids)}

    # Processors sort images and videos of a batch apart, though in some families frames are images; one row at a time
    # keeps the order.
    together = [visual] if not any(row.videos for row in rows) else [[index] for index in visual]
    parts = []
    for indices in filter(None, together):
        # A tokenizer's rows have no images.
        encoded, tensors = _encode_visual([rows[index] for index in indices], cast(ProcessorMixin, processing_class))
        parts.append(tensors)
        for branch in range(num_branches):
            for index, vectors in zip(indices, encoded[branch], strict=True):
                tokens[branch][index] = vectors
    return tokens, join_images(parts)


def _encode_visual(
    rows: Sequence[Rendered], processor: ProcessorMixin
) -> tuple[list[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """[`encode_branches`] for rows that all have images, or for one row with videos."""
    inputs: dict[str, Any] = {}
    if any(row.images for row in rows):
        inputs["images"] = [row.images for row in rows]
    videos = [video for row in rows for video in row.videos]
    if videos:
        if getattr(processor, "video_processor", None) is None:
            raise ValueError(f"The row has a video, but {type(processor).__name__} reads none; use another model.")
        inputs["videos"] = [video.frames for video in videos]
        inputs["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": [_metadata(video) for video in videos]}
    replaying = _replaying(processor)
    tokens: list[list[dict[str, torch.Tensor]]] = []
    tensors: dict[str, torch.Tensor] = {}
    for branch in range(len(rows[0].texts)):
        batch = replaying(
            text=[row.texts[branch] for row in rows],
            padding=True,
            padding_side="right",
            add_special_tokens=rows[0].add_special_tokens,
            return_tensors="pt",
            **inputs,
        )
        shape = batch["input_ids"].shape
        is_real = batch.pop("attention_mask").bool()
        per_token = [key for key, value in batch.items() if value.shape == shape]
        tokens.append([{key: batch[key][index][is_real[index]] for key in per_token} for index in range(len(rows))])
        tensors = tensors or {key: value for key, value in batch.items() if key not in per_token}
    return tokens, tensors


def _metadata(video: Video) -> VideoMetadata:
    count = len(video.frames)
    return VideoMetadata(
        total_num_frames=count, fps=video.fps, frames_indices=list(range(count)), duration=count / video.fps
    )


def join_images(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of the image tensors of several rows. Rows with fewer tiles are filled up with zeros, as processors
    do in a batch of their own.
    """
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
            most = max(tensor.shape[1] for tensor in tensors)
            tensors = [torch.cat([t, t.new_zeros(len(t), most - t.shape[1], *t.shape[2:])], dim=1) for t in tensors]
        joined[key] = torch.cat(tensors)
    return joined


class _Replay:
    """An image or video processor that works once and then gives the same answer again.

    All branches of a batch have the same images in the same order, so that what the processor computes from them (the
    pixels, and the number of placeholder tokens) is the same in every call.
    """

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
    if getattr(processor, "video_processor", None) is not None:
        replaying.video_processor = _Replay(processor.video_processor)
    return replaying
