"""From preference rows to one batch: images decoded and preprocessed once per pair, tokens in one row or in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from .data.images import ImageOptions, load_image
from .data.rows import Video, row_images, row_name, row_videos
from .data.schema import RowError, check_row, special_token_pattern
from .encoding import encode_branches
from .rendering import (
    ProcessingClass,
    Rendered,
    get_tokenizer,
    image_token_ids,
    lacks_special_tokens,
    render_branches,
    render_conversation,
)
from .shared_prefix import pack_branches
from .strength import StrengthNormalizer


@dataclass
class MultimodalPreferenceCollator:
    """
    Makes a batch of B preference rows.

    Without `share_prefix` the batch holds 2B padded token rows: first all chosen, then all rejected, as in TRL. With
    it, the batch is one row without padding in which each prompt stands once. Either way an image is decoded and
    preprocessed, and then encoded, once per pair.

    Args:
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor of the model, or the tokenizer of a text model.
        image_options ([`~trl_dt2it.data.images.ImageOptions`], *optional*):
            Where images may come from and how large they may be.
        normalizer ([`~trl_dt2it.strength.StrengthNormalizer`], *optional*):
            Brings `strength` to [0, 1]. Without it, the batch holds no strength.
        pad_to_multiple_of (`int`, *optional*):
            Pads rows to a multiple of this length; one row per pair needs no padding.
        add_dummy_image (`bool`, *optional*, defaults to `False`):
            Whether a batch without any image gets one more conversation with a blank image, whose reward counts for
            nothing. Where the vision tower is sharded over processes (FSDP, DeepSpeed ZeRO-3), all have to run it.
        share_prefix (`bool`, *optional*, defaults to `False`):
            Whether to lay a batch out as one row. The model has to be of a family that can read it
            ([`~trl_dt2it.shared_forward.why_not_shared`]). A batch in which the two sides of a pair differ before
            their last image has two rows per pair all the same.

    A row is as described in [`~trl_dt2it.data.schema.check_row`], or has the columns `chosen_ids` and `rejected_ids`.

    Returns a dict with
        - `pairs`: `weight` `(B,)` fp32; `strength` `(B,)` fp32 and `is_tie` `(B,)` bool, with a normalizer; `margin`
          `(B,)` fp32, with that column; `row_index` `(B,)` int64, with that column; `num_tokens` `(B,)` int64, of both
          conversations; `source`, a list of B strings or `None`;
        - with one row per pair: `pair_layout` `(B, 3)` int64, the number of tokens that a pair shares, of chosen's and
          of rejected's own; `input_ids` `(1, T)` int64, and what else the processor gives per token;
        - with two: `input_ids` and `attention_mask` `(2B, L)` int64, what else the processor gives per token, and, if
          there are images, `image_repeats`, 2;
        - the image tensors of the processor, each image once.
        A dummy image adds a last conversation: a row `(length - 1, 0, 1)` of the layout, or a row of tokens.

    Raises:
        [`~trl_dt2it.data.schema.RowError`]: if a row or one of its images cannot be used; the message names the row.
    """

    processing_class: ProcessingClass
    image_options: ImageOptions = field(default_factory=ImageOptions)
    normalizer: StrengthNormalizer | None = None
    pad_to_multiple_of: int | None = None
    add_dummy_image: bool = False
    share_prefix: bool = False

    def __post_init__(self) -> None:
        self.special_tokens = special_token_pattern(get_tokenizer(self.processing_class))
        self.image_token_ids = image_token_ids(self.processing_class)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows: list[list[dict[str, torch.Tensor]]]  # chosen and rejected of each pair
        images: dict[str, torch.Tensor] = {}
        if "chosen_ids" in examples[0]:
            rows = [
                [{"input_ids": torch.tensor(e[side])} for side in ("chosen_ids", "rejected_ids")] for e in examples
            ]
        else:
            rendered = [self.render(example, index) for index, example in enumerate(examples)]
            branches, images = encode_branches(rendered, self.processing_class)
            rows = [list(pair) for pair in zip(*branches, strict=True)]
        dummy: list[list[dict[str, torch.Tensor]]] = []
        if not images and self.add_dummy_image and isinstance(self.processing_class, ProcessorMixin):
            dummy, images = encode_branches([self._dummy_row()], self.processing_class)

        # `pairs` comes first, and in it a vector of length B: Trainer takes the batch size from the first tensor.
        batch: dict[str, Any] = {"pairs": self._pairs(examples)}
        batch["pairs"]["num_tokens"] = torch.tensor([sum(len(side["input_ids"]) for side in row) for row in rows])
        packed = pack_branches([*rows, *dummy], self.image_token_ids) if self.share_prefix else None
        if packed is not None:
            return {**batch, **packed, **images}
        token_rows = [row[side] for side in range(2) for row in rows]
        if dummy:
            token_rows += dummy[0]
        elif images:
            batch["image_repeats"] = 2
        return {**batch, **self._pad(token_rows), **images}

    def render(self, example: Mapping[str, Any], index: int | None = None) -> Rendered:
        """
        Checks a row, decodes its images and renders its two conversations.

        Raises:
            [`~trl_dt2it.data.schema.RowError`]: with the row's name in front of the reason.
        """
        try:
            check_row(example, special_tokens=self.special_tokens)
            images = [load_image(image, self.image_options) for image in row_images(example)]
            videos = [
                Video([load_image(frame, self.image_options) for frame in video.frames], video.fps)
                for video in row_videos(example)
            ]
        except RowError as error:
            raise RowError(error.reason, f"{row_name(example, index)}: {error}") from error
        if (images or videos) and not isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("The row has images, but the model reads text only; use a vision-language model.")
        return render_branches(example, images, self.processing_class, videos)

    def lengths(self, example: Mapping[str, Any]) -> tuple[int, int]:
        """Number of tokens of the chosen and of the rejected row, image tokens included and nothing truncated."""
        if "chosen_ids" in example:
            return len(example["chosen_ids"]), len(example["rejected_ids"])
        tokens, _ = encode_branches([self.render(example)], self.processing_class)
        return len(tokens[0][0]["input_ids"]), len(tokens[1][0]["input_ids"])

    def _pairs(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        weights = [1.0 if e.get("weight") is None else e["weight"] for e in examples]
        sources = [e.get("source") for e in examples]
        pairs: dict[str, Any] = {"weight": torch.tensor(weights, dtype=torch.float32)}
        if self.normalizer is not None:
            raw = [e.get("strength") for e in examples]
            pairs["strength"] = torch.from_numpy(self.normalizer(raw, sources).astype(np.float32))
            pairs["is_tie"] = torch.tensor([s == 0 for s in raw])
        for name, dtype in (("margin", torch.float32), ("row_index", torch.int64)):
            if any(name in e for e in examples):
                pairs[name] = torch.tensor([e[name] for e in examples], dtype=dtype)
        pairs["source"] = sources
        return pairs

    def _pad(self, token_rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pads the token vectors of R rows on the right to `(R, L)`."""
        length = max(len(row["input_ids"]) for row in token_rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        pad_id = get_tokenizer(self.processing_class).pad_token_id
        keys = sorted({key for row in token_rows for key in row})
        shape = (len(token_rows), length)
        padded = {key: torch.zeros(shape, dtype=torch.int64) for key in ["attention_mask", *keys]}
        padded["input_ids"].fill_(0 if pad_id is None else pad_id)
        for index, row in enumerate(token_rows):
            padded["attention_mask"][index, : len(row["input_ids"])] = 1
            for key, vector in row.items():
                padded[key][index, : len(vector)] = vector
        return padded

    def _dummy_row(self) -> Rendered:
        blank = Image.new("RGB", (64, 64))
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}]
        text = render_conversation(messages, [blank], self.processing_class)
        return Rendered([text], [blank], lacks_special_tokens(text, self.processing_class))
