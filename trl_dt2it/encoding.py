"""From rendered rows to tokens and pixels.

The images and videos of a row are the same in all its branches, so they are preprocessed for the first branch and
replayed for the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.video_utils import VideoMetadata

from .data.rows import Video
from .rendering import ProcessingClass, Rendered, get_tokenizer


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
    do in a batch of their own."""
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
    if getattr(processor, "video_processor", None) is not None:
        replaying.video_processor = _Replay(processor.video_processor)
    return replaying
