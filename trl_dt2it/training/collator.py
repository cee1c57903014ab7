"""The collator: preference rows to a batch, each image preprocessed once, tokens in one row per pair or in two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..data.contents import prompt_key
from ..data.controls import MEDIA
from ..data.images import ImageOptions, load_image
from ..data.rows import Video, check_numbers, check_row, named_errors, row_images, row_videos, special_token_pattern
from ..models import rendering
from ..models.families import FAMILIES, PIXELS
from ..models.shared_prefix import pack_completions, reward_order
from .losses import StrengthNormalizer


# Tokens of chosen and rejected, and their image tensors.
EncodedPair: TypeAlias = tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

_ONE_KIND_A_BATCH = {family.processor for family in FAMILIES.values() if not family.mixes_media}


@dataclass
class MultimodalPreferenceCollator:
    """
    Data collator for B preference rows.

    Without `share_prefix` the batch holds 2B padded token rows: first all chosen, then all rejected, as in TRL. With
    it, the batch is one row without padding that holds each prompt once. Either way an image is read once per pair.

    Args:
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the model, or the tokenizer of a text model.
        image_options ([`~trl_dt2it.data.images.ImageOptions`], *optional*):
            Allowed origins and sizes of images.
        normalizer ([`~trl_dt2it.training.losses.StrengthNormalizer`], *optional*):
            Map of `strength` to [0, 1]. Without it, the batch holds no strength.
        pad_to_multiple_of (`int`, *optional*):
            Padded rows are a multiple of this length.
        add_dummy_image (`bool`, *optional*, defaults to `False`):
            Whether to add a pair with a blank image (or video) to a batch without images (or videos); its rewards do
            not count. All processes of a sharded model have to run the vision tower equally often.
        share_prefix (`bool`, *optional*, defaults to `False`):
            Whether to lay a batch out as one row, which the model's family has to support. A batch in which the two
            sides of a pair differ before their last image has two rows per pair all the same.
        media (`tuple[str, ...]`, *optional*, defaults to `("image", "video")`):
            Kinds of media that a batch of any process may hold; no dummy of another kind is added.
        group_pairs (`bool`, *optional*, defaults to `False`):
            Whether each answer is there once of the pairs of a batch that have prompt and images in common (and
            `group_id`, if they have one). With `share_prefix` they share the prompt too.
        max_answers_per_group (`int`, *optional*, defaults to `16`):
            Most answers of a prompt that share it.

    A row is as described in [`~trl_dt2it.data.rows.check_row`], or has the columns `chosen_ids` and `rejected_ids`.

    Returns a dict with
        - `pairs`: `weight` `(B,)` fp32; `label_confidence` `(B,)` fp32 in [0, 1], where one is below 1;
          `blind_margin` `(B,)` fp32, where one is known, NaN for the others; `strength` `(B,)` fp32 and `is_tie`
          `(B,)` bool, with a normalizer; `margin` `(B,)` fp32, with that column; `row_index` `(B,)` int64, with that
          column of integers; `num_tokens` `(B,)` int64, of both conversations; `has_media` `(B,)` bool; `source`, a
          list of B strings or `None`; where pairs share a prompt, `answers` `(B + D, 2)` int64, the rewards of chosen
          and rejected of each among all rewards of the batch, and `num_answers` `(G + D,)` int64, of each prompt;
        - with one row per pair: `pair_layout` `(B + D, 3)` int64, the numbers of tokens shared, only in chosen and
          only in rejected; `input_ids` `(1, T)` int64, and the processor's other tensors per token; of prompts with
          more answers, `(G + D, 1 + N)` for G prompts of up to N answers, 0 first where one has fewer;
        - with two: `input_ids` and `attention_mask` `(2 * (B + D), L)` int64, the processor's other tensors per token,
          and, if there are images, `image_repeats`, 2; where pairs share a prompt, `(R, L)` with a row for each answer
          and `image_repeats` `(G + D, 3)` int64, the numbers of answers, images and videos of each prompt;
        - the image tensors of the processor, each image once.
        The D dummies, 0 to 2, come last; both sides of a dummy are equal.

    Raises:
        [`~trl_dt2it.data.rows.RowError`]: if a row or one of its images cannot be used; the message names the row.
        `ValueError`: if the batch holds images and videos, of which the family reads one kind per batch.
    """

    processing_class: rendering.ProcessingClass
    image_options: ImageOptions = field(default_factory=ImageOptions)
    normalizer: StrengthNormalizer | None = None
    pad_to_multiple_of: int | None = None
    add_dummy_image: bool = False
    share_prefix: bool = False
    media: tuple[str, ...] = ("image", "video")
    group_pairs: bool = False
    max_answers_per_group: int = 16

    def __post_init__(self) -> None:
        self._dummies: dict[str, EncodedPair] = {}
        self.special_tokens = special_token_pattern(rendering.get_tokenizer(self.processing_class))
        self.image_token_ids = rendering.image_token_ids(self.processing_class)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows: list[list[dict[str, torch.Tensor]]]  # the answers of each prompt
        images: dict[str, torch.Tensor] = {}
        shown: list[tuple[int, ...]] = []  # images and videos of each prompt
        has_media = [False] * len(examples)
        answers = [((index, 0), (index, 1)) for index in range(len(examples))]  # prompt and answer of each side
        if "chosen_ids" in examples[0]:
            names = ("chosen_ids", "rejected_ids")
            rows = [[{"input_ids": torch.tensor(e[name])} for name in names] for e in examples]
            for index, example in enumerate(examples):
                with named_errors(example, index):
                    check_numbers(example)
        else:
            rendered, answers = self._render_all(examples)
            rows, images = _encode(rendered, self.processing_class)
            shown = [(len(row.images), len(row.videos)) for row in rendered]
            has_media = [bool(rendered[group].images or rendered[group].videos) for (group, _), _ in answers]
        num_tokens = []
        for index, sides in enumerate(answers):
            chosen, rejected = (rows[group][answer]["input_ids"] for group, answer in sides)
            num_tokens.append(len(chosen) + len(rejected))
            if torch.equal(chosen, rejected):  # rounding would decide their order
                with named_errors(examples[index], index):
                    raise rendering.equal_when_rendered()
        dummies = self._missing_media(images)
        images = rendering.join_images([images, *(tensors for _, tensors in dummies)])
        name = type(self.processing_class).__name__
        if len(PIXELS.values() & images.keys()) > 1 and name in _ONE_KIND_A_BATCH:
            raise ValueError(
                f"The batch holds images and videos, of which {name} reads one kind in a batch; train on a set that "
                "has images or videos alone."
            )

        # First `pairs`, and in it a vector of length B: Trainer takes the batch size from the first tensor.
        batch: dict[str, Any] = {"pairs": self._pairs(examples)}
        batch["pairs"]["num_tokens"] = torch.tensor(num_tokens)
        batch["pairs"]["has_media"] = torch.tensor(has_media)
        is_grouped = len(rows) < len(examples)
        answers += [((len(rows) + index, 0), (len(rows) + index, 1)) for index in range(len(dummies))]
        rows += [pair for pair, _ in dummies]
        ids = self.image_token_ids if self.share_prefix else None
        tokens = lay_out(rows, self.processing_class, ids, self.pad_to_multiple_of)
        counts = list(map(len, rows))
        if is_grouped:
            position = {answer: index for index, answer in enumerate(reward_order(counts))}
            batch["pairs"]["answers"] = torch.tensor([[position[answer] for answer in sides] for sides in answers])
            batch["pairs"]["num_answers"] = torch.tensor(counts)
        if images and "pair_layout" not in tokens:
            shown += [tuple(int(pixels in tensors) for pixels in PIXELS.values()) for _, tensors in dummies]
            repeats = torch.tensor([[number, *of] for number, of in zip(counts, shown, strict=True)])
            batch["image_repeats"] = repeats if is_grouped else 2
        return {**batch, **tokens, **images}

    def _render_all(
        self, examples: Sequence[Mapping[str, Any]]
    ) -> tuple[list[rendering.Rendered], list[tuple[tuple[int, int], tuple[int, int]]]]:
        """Render all rows, those of one prompt together if `group_pairs`, and return the prompt and the answer of both
        sides of each. Prompts come in the order of their number of answers, as they are encoded."""
        groups: list[rendering.Rendered] = []
        sides: list[list[tuple[int, str]]] = []
        current: dict[str, int] = {}  # number of the group of a prompt that still has room
        for index, (example, key) in enumerate(zip(examples, self._prompt_keys(examples), strict=True)):
            number = current.get(key) if key is not None else None
            like = None if number is None else groups[number]
            row = self.render(example, index, is_checked=self.group_pairs, like=like)
            if number is not None:
                texts = groups[number].texts
                more = [text for text in dict.fromkeys(row.texts) if text not in texts]
                if len(texts) + len(more) <= self.max_answers_per_group:
                    texts += more
                else:
                    number = None
            if number is None:
                number = len(groups)
                groups.append(replace(row, texts=list(row.texts)))  # more may come
                current |= {} if key is None else {key: number}
            sides.append([(number, text) for text in row.texts])
        order = sorted(range(len(groups)), key=lambda number: len(groups[number].texts))
        place = {number: index for index, number in enumerate(order)}
        return [groups[number] for number in order], [
            cast(Any, tuple((place[number], groups[number].texts.index(text)) for number, text in pair))
            for pair in sides
        ]

    def _prompt_keys(self, examples: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Check the rows and hash their prompts, if `group_pairs`; `None` for a prompt that no other row can have."""
        texts: list[str | None] = [None] * len(examples)
        for index, example in enumerate(examples if self.group_pairs else ()):
            with named_errors(example, index):
                check_row(example, special_tokens=self.special_tokens)  # or hashing may stumble first
                texts[index] = prompt_key({name: value for name, value in example.items() if name not in MEDIA})
        counts, keys = Counter(texts), list[str | None]()
        for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
            with named_errors(example, index):
                keys.append(prompt_key(example) if text is not None and counts[text] > 1 else None)
        return keys

    def render(
        self,
        example: Mapping[str, Any],
        index: int | None = None,
        *,
        is_checked: bool = False,
        like: rendering.Rendered | None = None,
    ) -> rendering.Rendered:
        """Check a row, unless it `is_checked`, decode its images, unless it is `like` a rendered row with the same
        images, and render its conversations; errors name the row."""
        with named_errors(example, index):
            if not is_checked:
                check_row(example, special_tokens=self.special_tokens)
            if like is not None:
                return rendering.render_pair(example, like.images, self.processing_class, like.videos)
            load = partial(load_image, options=self.image_options)
            images = list(map(load, row_images(example)))
            videos = [Video(list(map(load, video.frames)), video.fps) for video in row_videos(example)]
            if (images or videos) and not isinstance(self.processing_class, ProcessorMixin):
                raise ValueError("The row has images, but the model reads text only; use a vision-language model.")
            return rendering.render_pair(example, images, self.processing_class, videos)

    def lengths(self, example: Mapping[str, Any]) -> tuple[int, int]:
        """Return the numbers of tokens of both conversations, image tokens included, nothing truncated."""
        if "chosen_ids" in example:
            return len(example["chosen_ids"]), len(example["rejected_ids"])
        ((chosen,), (rejected,)), _ = rendering.encode_completions([self.render(example)], self.processing_class)
        return len(chosen["input_ids"]), len(rejected["input_ids"])

    def _pairs(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        weights = [1.0 if e.get("weight") is None else e["weight"] for e in examples]
        sources = [e.get("source") for e in examples]
        pairs: dict[str, Any] = {"weight": torch.tensor(weights, dtype=torch.float32)}
        confidences = [1.0 if e.get("label_confidence") is None else e["label_confidence"] for e in examples]
        if any(confidence != 1 for confidence in confidences):  # otherwise the loss needs no second term
            pairs["label_confidence"] = torch.tensor(confidences, dtype=torch.float32)
        blind = [math.nan if e.get("blind_margin") is None else e["blind_margin"] for e in examples]
        if not all(map(math.isnan, blind)):
            pairs["blind_margin"] = torch.tensor(blind, dtype=torch.float32)
        if self.normalizer is not None:
            raw = [e.get("strength") for e in examples]
            pairs["strength"] = torch.from_numpy(self.normalizer(raw, sources).astype(np.float32))
            pairs["is_tie"] = torch.tensor([s == 0 for s in raw])
        if any("margin" in e for e in examples):
            pairs["margin"] = torch.tensor([e["margin"] for e in examples], dtype=torch.float32)
        # To follow a row into its batch; nothing here reads it, so that it may hold anything.
        if all(type(e.get("row_index")) is int and -(2**63) <= e["row_index"] < 2**63 for e in examples):
            pairs["row_index"] = torch.tensor([e["row_index"] for e in examples])
        pairs["source"] = sources
        return pairs

    def _missing_media(self, images: Mapping[str, torch.Tensor]) -> list[EncodedPair]:
        """Return dummies of the kinds that a batch lacks, encoded once per collator."""
        if not self.add_dummy_image or not isinstance(self.processing_class, ProcessorMixin):
            return []
        missing = [kind for kind in self.media if PIXELS[kind] not in images]
        self._dummies |= {kind: self._encode_dummy(kind) for kind in missing if kind not in self._dummies}
        # A dummy has no pixels if its family reads no videos, or reads frames as images.
        return [self._dummies[kind] for kind in missing if PIXELS[kind] in self._dummies[kind][1]]

    def _encode_dummy(self, kind: str) -> EncodedPair:
        processor = cast(ProcessorMixin, self.processing_class)
        if kind == "video" and getattr(processor, "video_processor", None) is None:
            return [], {}
        blank = Image.new("RGB", (64, 64))
        images = [blank] if kind == "image" else []
        videos = [Video([blank, blank], 2.0)] if kind == "video" else []
        messages = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "."}]}]
        text = rendering.render_conversation(messages, images, processor)
        row = rendering.Rendered([text, text], images, rendering.lacks_special_tokens(text, processor), videos)
        sides, tensors = rendering.encode_completions([row], processor)
        return [side for (side,) in sides], tensors


def _encode(
    rendered: Sequence[rendering.Rendered], processing_class: rendering.ProcessingClass
) -> tuple[list[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """Encode prompts that are sorted by their number of answers: the tokens of each, and the image tensors of all."""
    rows: list[list[dict[str, torch.Tensor]]] = []
    parts = []
    for _, some in groupby(rendered, key=lambda row: len(row.texts)):
        answers, images = rendering.encode_completions(list(some), processing_class)
        rows += map(list, zip(*answers, strict=True))
        parts.append(images)
    return rows, rendering.join_images(parts)


def lay_out(
    rows: Sequence[Sequence[dict[str, torch.Tensor]]],
    processing_class: rendering.ProcessingClass,
    image_token_ids: set[int] | None,
    multiple: int | None,
) -> dict[str, torch.Tensor]:
    """Lay out the tokens of the answers of each prompt, as one row where `image_token_ids` are passed and the answers
    differ only after its last image, and as a padded row for each answer otherwise, in the order of
    [`reward_order`]."""
    packed = None if image_token_ids is None else pack_completions(rows, image_token_ids)
    if packed is not None:
        return packed
    order = reward_order(list(map(len, rows)))
    return pad_rows([rows[prompt][answer] for prompt, answer in order], processing_class, multiple)


def pad_rows(
    rows: Sequence[Mapping[str, torch.Tensor]], processing_class: rendering.ProcessingClass, multiple: int | None
) -> dict[str, torch.Tensor]:
    """Pad the token vectors of R rows on the right to `(R, L)`, with L a multiple."""
    length = max(len(row["input_ids"]) for row in rows)
    length += -length % (multiple or 1)
    keys = ["attention_mask", *sorted({key for row in rows for key in row})]
    padded = {key: torch.zeros(len(rows), length, dtype=torch.int64) for key in keys}
    padded["input_ids"].fill_(rendering.get_tokenizer(processing_class).pad_token_id or 0)
    for index, row in enumerate(rows):
        padded["attention_mask"][index, : len(row["input_ids"])] = 1
        for key, vector in row.items():
            padded[key][index, : len(vector)] = vector
    return padded
