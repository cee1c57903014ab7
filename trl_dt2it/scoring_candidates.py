"""Rewards of several candidate answers to a prompt: the prompt and its images are read once for all of them.

The candidates of a prompt are the branches of one row where the family can read that, and rows of a padded batch with
the images encoded once where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from .candidates import Candidates, named_error
from .data.images import load_image
from .data.rows import RowError
from .models.rendering import (
    Rendered,
    encode_branches,
    get_tokenizer,
    join_images,
    lacks_special_tokens,
    render_conversation,
)
from .models.shared_prefix import common_prefix_length, pack_branches
from .training.collator import MultimodalPreferenceCollator
from .training.pair_scoring import evaluating


@dataclass
class _Piece:
    """Some candidates of a prompt, encoded: which they are (several where answers are equal), their tokens, and the
    images once."""

    group: int
    branches: list[list[int]]
    tokens: list[dict[str, torch.Tensor]]
    images: dict[str, torch.Tensor]
    size: int  # tokens of one row that shares the prompt


def score_candidates(
    model: nn.Module,
    groups: Iterable[Candidates],
    collator: MultimodalPreferenceCollator,
    *,
    batch_tokens: int,
) -> list[list[float]]:
    """
    Rewards of the candidates of several prompts.

    Args:
        model (`nn.Module`):
            Reward model, on its device.
        groups (`Iterable[Candidates]`):
            The prompts with their candidates, checked before.
        collator ([`~trl_dt2it.training.collator.MultimodalPreferenceCollator`]):
            Has the processor, what images may be, and whether prompts are shared.
        batch_tokens (`int`):
            Most tokens of a batch, padding included. A candidate that is longer has a batch of its own.

    Returns:
        `list[list[float]]`: for each prompt the rewards of its candidates.

    Raises:
        [`~trl_dt2it.data.rows.RowError`]: if an image cannot be used.
        `ValueError`: if a reward is not finite.
    """
    groups = list(groups)
    rewards = [[0.0] * len(group.responses) for group in groups]
    pieces = (
        piece
        for index, group in enumerate(groups)
        if group.responses
        for piece in _encode(index, group, collator, batch_tokens)
    )
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        for batch in _batches(pieces, batch_tokens, collator.share_prefix):
            for inputs, places in _layouts(batch, collator):
                logits = model(**send_to_device(inputs, device), use_cache=False).logits
                if logits.shape != (len(places), 1):
                    raise ValueError(
                        f"The model gave logits of shape {tuple(logits.shape)} for {len(places)} answers."
                    )
                for (group, branches), reward in zip(places, logits[:, 0].float().tolist(), strict=True):
                    if not abs(reward) < float("inf"):
                        where = ", ".join(filter(None, [groups[group].name, f"response {branches[0]}"]))
                        raise ValueError(f"{where} has the reward {reward}; load the model in another `dtype`.")
                    for branch in branches:
                        rewards[group][branch] = reward
    return rewards


def _render(candidates: Candidates, collator: MultimodalPreferenceCollator) -> Rendered:
    processing_class = collator.processing_class
    try:
        images = [load_image(image, collator.image_options) for image in candidates.images]
    except RowError as error:
        raise named_error(error, candidates.name) from error
    if images and not isinstance(processing_class, ProcessorMixin):
        raise ValueError("The prompt has images, but the model reads text only; use a vision-language model.")
    if isinstance(candidates.prompt, str):  # as plain rows are in training
        eos = get_tokenizer(processing_class).eos_token or ""
        texts = [candidates.prompt + answer.removesuffix(eos) + eos for answer in candidates.responses]
        return Rendered(texts, images, add_special_tokens=True)
    texts = [
        render_conversation([*candidates.prompt, *answer], images, processing_class) for answer in candidates.responses
    ]
    return Rendered(texts, images, lacks_special_tokens(texts[0], processing_class))


def _encode(
    index: int, candidates: Candidates, collator: MultimodalPreferenceCollator, batch_tokens: int
) -> Iterator[_Piece]:
    """The candidates of a prompt in as few pieces as fit a batch each."""
    rendered = _render(candidates, collator)
    # Equal answers are scored once: samples repeat, and a rounding error must not decide between two of them.
    places: dict[str, list[int]] = {}
    for number, text in enumerate(rendered.texts):
        places.setdefault(text, []).append(number)
    rendered.texts = list(places)
    encoded, images = encode_branches([rendered], collator.processing_class)
    tokens, branches = [branch[0] for branch in encoded], list(places.values())
    lengths = [len(branch["input_ids"]) for branch in tokens]
    prefix = common_prefix_length([branch["input_ids"] for branch in tokens]) if collator.share_prefix else 0
    first, size = 0, prefix
    for number, length in enumerate(lengths):
        # Without sharing every candidate takes as much room as the longest.
        room = length - prefix if collator.share_prefix else max(lengths)
        if number > first and size + room > batch_tokens:
            yield _Piece(index, branches[first:number], tokens[first:number], images, size)
            first, size = number, prefix
        size += room
    yield _Piece(index, branches[first:], tokens[first:], images, size)


def _batches(pieces: Iterable[_Piece], batch_tokens: int, share_prefix: bool) -> Iterator[list[_Piece]]:
    """Neighbours, as many as fit. Rows that repeat images have to come in blocks of equal length."""
    batch: list[_Piece] = []
    for piece in pieces:
        several = [*batch, piece]
        if share_prefix:
            fits = sum(one.size for one in several) <= batch_tokens
        else:
            longest = max(len(tokens["input_ids"]) for one in several for tokens in one.tokens)
            fits = sum(len(one.tokens) for one in several) * longest <= batch_tokens
            fits = fits and len(piece.tokens) == len(several[0].tokens)
        if batch and not fits:
            yield batch
            several = [piece]
        batch = several
    if batch:
        yield batch


def _layouts(
    batch: list[_Piece], collator: MultimodalPreferenceCollator
) -> Iterator[tuple[dict[str, Any], list[tuple[int, list[int]]]]]:
    """What the model takes, and for each of its rewards the prompt and the candidates."""
    if collator.share_prefix:
        packed = pack_branches([piece.tokens for piece in batch], collator.image_token_ids)
        if packed is not None:
            most = packed["pair_layout"].shape[1] - 1
            # A prompt with fewer candidates than others has the last places.
            places = [
                (piece.group, piece.branches[branch - most + len(piece.branches)])
                for branch in range(most)
                for piece in batch
                if branch >= most - len(piece.branches)
            ]
            yield {**packed, **_images(batch)}, places
            return
        if len(batch) > 1:
            for piece in batch:
                yield from _layouts([piece], collator)
            return
    count = len(batch[0].tokens)
    places = [(piece.group, piece.branches[branch]) for branch in range(count) for piece in batch]
    inputs = _pad([piece.tokens[branch] for branch in range(count) for piece in batch], collator)
    images = _images(batch)
    yield {**inputs, **images, **({"image_repeats": count} if images and count > 1 else {})}, places


def _images(batch: list[_Piece]) -> dict[str, torch.Tensor]:
    parts = [piece.images for piece in batch if piece.images]
    return join_images(parts) if parts else {}


def _pad(rows: list[dict[str, torch.Tensor]], collator: MultimodalPreferenceCollator) -> dict[str, torch.Tensor]:
    pad_id = get_tokenizer(collator.processing_class).pad_token_id
    padded = {"attention_mask": pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)}
    for key in sorted({key for row in rows for key in row}):
        vectors = [row.get(key, torch.zeros_like(row["input_ids"])) for row in rows]
        value = (pad_id or 0) if key == "input_ids" else 0
        padded[key] = pad_sequence(vectors, batch_first=True, padding_value=value)
    return padded
