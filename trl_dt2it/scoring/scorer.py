"""Rewards of any answers by a trained model: `RewardScorer`, and reward functions for GRPO and RLOO."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from ..data.images import ImageOptions, load_image, with_image_root
from ..data.rows import RowError, check_row
from ..models.modeling import load_processing_class, load_reward_model, read_last_real_token, set_pixel_limits
from ..models.rendering import (
    ProcessingClass,
    Rendered,
    encode_branches,
    get_tokenizer,
    join_images,
    lacks_special_tokens,
    render_conversation,
)
from ..models.shared_prefix import common_prefix_length, decide_share_prefix, pack_branches
from ..training import pair_scoring
from ..training.collator import MultimodalPreferenceCollator
from ..training.pair_scoring import evaluating
from ..training.setup import rename_old_columns
from ..utils import whole_weights
from .shards import add_rewards, model_fingerprint, processor_settings


@dataclass
class Candidates:
    """A prompt and the answers to score."""

    prompt: Any  # Text, or messages with `{"type": "image"}` in place of each image
    responses: list[Any]  # N answers, all strings if the prompt is one, and otherwise all lists of messages
    images: list[Any] = field(default_factory=list)  # The images of the prompt, as `load_image` takes them
    name: str = ""  # What errors call it, such as `"prompt 3"`


def as_candidates(
    prompt: Any, responses: Sequence[Any], images: Any, processing_class: ProcessingClass, name: str = ""
) -> Candidates:
    """Brings a prompt and its answers to one form."""
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
    """Checks everything about a prompt but the images themselves."""
    try:
        _check(candidates, "" if isinstance(candidates.prompt, str) else [{"role": "assistant"}], special_tokens)
    except RowError as error:
        raise named_error(error, candidates.name) from error


def check_response(candidates: Candidates, index: int, special_tokens: re.Pattern | None) -> None:
    """Checks an answer. An empty one is fine, since a policy may well give one."""
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


@dataclass
class _Piece:
    """Some candidates of a prompt, encoded: which they are (several where answers are equal), their tokens, and the
    images once.
    """

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
    """Rewards of the candidates of several prompts."""
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


@dataclass(frozen=True)
class RankedResponse:
    """An answer, its place among those given, from 0, and its reward."""

    index: int
    reward: float
    response: Any


class RewardScorer:
    """
    A reward model that is trained, with its processor.

    Answers to one prompt share it and its images, in one row where the family can read that.

    Example:

    ```python
    >>> from trl_dt2it.scoring import RewardScorer

    >>> scorer = RewardScorer.from_pretrained("outputs/my-reward-model")
    >>> rewards = scorer.score("What is in the picture?", ["A cat.", "A dog."], images=["cat.png"])
    ```

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Reward model, on its device.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Its processor, or the tokenizer of a text model.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens of a batch, images and padding included. What alone is longer has a batch of its own.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in
            [`~trl_dt2it.data.ImageOptions`].
        image_options ([`~trl_dt2it.data.ImageOptions`], *optional*):
            Where else images may come from, and how large they may be.
        share_prefix (`str`, *optional*, defaults to `"auto"`):
            Whether answers share their prompt in one row: `"auto"` where the family can, `"true"` or `"false"`.
        normalize (`bool`, *optional*, defaults to `False`):
            Whether rewards have the mean of the training set taken off and are divided by its standard deviation,
            `reward_mean` and `reward_std` of the model's configuration.
        num_workers (`int`, *optional*, defaults to `0`):
            Worker processes that count tokens and decode images of whole data sets, in [`~RewardScorer.score_pairs`]
            and what is built on it, while the model computes; under `accelerate launch` for each process.

    Raises:
        `ValueError`: if the model has more than one label or weights that DeepSpeed ZeRO-3 has partitioned, if
            `num_workers` is negative, or with `normalize` if there is no mean and standard deviation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: ProcessingClass,
        *,
        batch_tokens: int = 16384,
        image_root: str | os.PathLike | None = None,
        image_options: ImageOptions | None = None,
        share_prefix: str = "auto",
        normalize: bool = False,
        num_workers: int = 0,
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"{type(model).__name__} has {model.config.num_labels} labels; a reward model has one.")
        read_last_real_token(model)
        # DeepSpeed gives a parameter that it partitions the attribute `ds_id`, and leaves it empty.
        if any(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters()):
            raise ValueError(
                f"DeepSpeed ZeRO-3 has partitioned the weights of this {type(model).__name__}, so that no process has "
                "all of them; use `RewardScorer.from_pretrained`, which loads the saved model whole on each process."
            )
        if num_workers < 0:
            raise ValueError(f"`num_workers` is {num_workers}; it must be at least 0.")
        self.model = model
        self.batch_tokens = batch_tokens
        self.num_workers = num_workers
        self.collator = MultimodalPreferenceCollator(
            processing_class,
            image_options=with_image_root(image_options, image_root),
            share_prefix=decide_share_prefix(share_prefix, model),
        )
        mean: Any = getattr(model.config, "reward_mean", None)
        std: Any = getattr(model.config, "reward_std", None)
        if normalize and (mean is None or not std or std < 0):
            raise ValueError(
                "`normalize=True` needs `reward_mean` and a positive `reward_std` in the model's configuration, and "
                f"they are {mean} and {std}; write them there, or take the rewards as they are."
            )
        self._mean = float(mean) if normalize else 0.0
        self._std = float(std) if normalize else 1.0

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_tokens: int = 16384,
        image_root: str | os.PathLike | None = None,
        image_options: ImageOptions | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        share_prefix: str = "auto",
        normalize: bool = False,
        num_workers: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **model_kwargs: Any,
    ) -> RewardScorer:
        """
        Loads a reward model and its processor.

        Each process loads the whole model, also in a training with DeepSpeed ZeRO-3 or FSDP, as of a policy that the
        scorer rewards: none waits for another to load or to score.

        Args:
            path (`str` or `os.PathLike`):
                Hub id or directory of a reward model, or of an adapter that was trained as one.
            device (`str` or `torch.device`, *optional*):
                By default the process's own accelerator if there is one, otherwise the CPU.
            dtype (`str` or `torch.dtype`, *optional*):
                Dtype of the weights; by default the checkpoint's.
            min_pixels, max_pixels (`int`, *optional*):
                Smallest and largest number of pixels of an image; by default those that were saved in training.
            batch_tokens, image_root, image_options, share_prefix, normalize, num_workers:
                As in [`RewardScorer`].
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether code that ships with the checkpoint may run.
            model_kwargs:
                Passed on to [`load_reward_model`], such as `attn_implementation`, `device_map` or
                `quantization_config`.

        Returns:
            [`RewardScorer`]

        Raises:
            `ValueError`: if the checkpoint has no trained head, or as [`load_reward_model`] says.
        """
        image_options = with_image_root(image_options, image_root)
        hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        with whole_weights():
            model = load_reward_model(path, dtype=dtype or "auto", allow_new_head=False, **hub, **model_kwargs)
        processing_class = load_processing_class(path, **hub)
        set_pixel_limits(processing_class, min_pixels=min_pixels, max_pixels=max_pixels)
        if not {"device_map", "quantization_config"} & set(model_kwargs):
            model = model.to(device or PartialState().device)  # type: ignore[arg-type]  # a string will do
        model.config.get_text_config().pad_token_id = get_tokenizer(processing_class).pad_token_id
        model.config.pad_token_id = get_tokenizer(processing_class).pad_token_id
        return cls(
            model,
            processing_class,
            batch_tokens=batch_tokens,
            image_options=image_options,
            share_prefix=share_prefix,
            normalize=normalize,
            num_workers=num_workers,
        )

    @property
    def normalization(self) -> list[float]:
        """What is taken off every reward, and what it is then divided by; 0 and 1 without `normalize`."""
        return [self._mean, self._std]

    def score(self, prompt: Any, responses: Sequence[Any], images: Any = None) -> Any:
        """
        Rewards of answers to a prompt, or to several.

        Args:
            prompt (`str`, `list[dict]`, or a list of either):
                Text of a user's message, or messages; a list of B of them for B prompts. Image blocks may hold their
                image under `image`. Without a chat template, texts are joined with the answers as they are.
            responses (`list`):
                Answers: texts, or lists of messages. For B prompts, B such lists.
            images (`list`, *optional*):
                Images of the prompt: PIL images, bytes, paths, URLs on allowed hosts. For B prompts, B such lists, or
                `None` in the place of one. Where the prompt is text they go before it.

        Returns:
            `list[float]`: one for each answer; for B prompts, a list of B such lists.

        Raises:
            [`~trl_dt2it.data.rows.RowError`]: if a prompt, an answer or an image cannot be used; the message says
                which.
            `ValueError`: if a reward is not finite, or if the lists do not match.
        """
        if _is_one(prompt):
            return self._score([self._candidates(prompt, responses, images)])[0]
        images = [None] * len(prompt) if images is None else images
        if not len(prompt) == len(responses) == len(images):
            raise ValueError(
                f"There are {len(prompt)} prompts, {len(responses)} lists of responses and {len(images)} of images; "
                "give as many of each."
            )
        given = zip(prompt, responses, images, strict=True)
        return self._score([self._candidates(*one, name=f"prompt {index}") for index, one in enumerate(given)])

    def rank(self, prompt: Any, responses: Sequence[Any], images: Any = None) -> Any:
        """
        Answers in the order of their rewards, best first; equal ones stay in their order. Arguments as in [`score`].

        Returns:
            `list[RankedResponse]`: with `index`, `reward` and `response`; for B prompts, a list of B such lists.
        """
        rewards = self.score(prompt, responses, images)
        return _ranked(rewards, responses) if _is_one(prompt) else list(map(_ranked, rewards, responses))

    def best_of_n(self, prompt: Any, responses: Sequence[Any], images: Any = None) -> Any:
        """
        The answer with the highest reward; of equal ones, the first. Arguments as in [`score`].

        Returns:
            [`RankedResponse`]: with `index`, `reward` and `response`; for B prompts, a list of B of them.

        Raises:
            `ValueError`: if there is no answer.
        """
        ranked = self.rank(prompt, responses, images)
        if not all(ranked if not _is_one(prompt) else [ranked]):
            raise ValueError("There is no answer to take the best of.")
        return ranked[0] if _is_one(prompt) else [one[0] for one in ranked]

    def score_pairs(
        self, dataset: Dataset, *, num_workers: int | None = None, desc: str = "Scoring", show_progress: bool = True
    ) -> np.ndarray:
        """
        Rewards of chosen and rejected. Under `accelerate launch` the processes share the pairs out among them, and
        every one has to call it.

        Args:
            dataset (`Dataset`):
                Preference rows, as [`MultimodalRewardTrainer`] takes them, images and videos included.
            num_workers (`int`, *optional*):
                Worker processes, as in [`RewardScorer`], in place of the scorer's own number.
            desc (`str`, *optional*, defaults to `"Scoring"`):
                What the progress bar says.
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether there is one.

        Returns:
            `np.ndarray` of shape `(n, 2)` and dtype `float32`: in the order of the rows, the same on every process.

        Raises:
            [`~trl_dt2it.data.rows.RowError`]: if a row cannot be used, on every process; the message names it.
        """
        rewards = pair_scoring.score_pairs(
            self.model,
            rename_old_columns(dataset),
            self.collator,
            max_tokens_per_batch=self.batch_tokens,
            num_workers=self.num_workers if num_workers is None else num_workers,
            desc=desc,
            show_progress=show_progress,
        )
        return (rewards - np.float32(self._mean)) / np.float32(self._std)

    def score_dataset(
        self, dataset: Dataset, output_dir: str | os.PathLike | None = None, *, rows_per_shard: int = 512
    ) -> Dataset:
        """
        A data set with the rewards of its pairs. Under `accelerate launch` the processes share the pairs out among
        them, and every one has to call it.

        Args:
            dataset (`Dataset`):
                Preference rows.
            output_dir (`str` or `os.PathLike`, *optional*):
                Folder for the rewards, a Parquet file for every few hundred pairs, from which a killed run goes on.
            rows_per_shard (`int`, *optional*, defaults to `512`):
                Pairs of a file: what a kill may cost at most.

        Returns:
            `Dataset`: with the columns `chosen_reward` and `rejected_reward`, of type float32.

        Raises:
            `ValueError`: if the columns are there already, or if the folder holds rewards of other rows or of another
                model.
        """
        settings: dict[str, Any] = {}
        if output_dir is not None:
            settings = {
                "model": model_fingerprint(self.model),
                "processor": processor_settings(self.collator.processing_class),
                "normalize": self.normalization,
            }
        return add_rewards(
            dataset,
            lambda rows, desc: self.score_pairs(rows, desc=desc),
            output_dir=None if output_dir is None else Path(output_dir),
            settings=settings,
            rows_per_shard=rows_per_shard,
        )

    def as_reward_func(
        self, name: str | None = None, *, invalid_reward: float | None = None
    ) -> Callable[..., list[float | None]]:
        """
        A reward function for TRL's GRPO and RLOO trainers, which give images to functions and not to models.

        Args:
            name (`str`, *optional*):
                Its name in the logs; by default that of the model.
            invalid_reward (`float`, *optional*):
                Reward of a completion that cannot be scored because it spells a special token of the reward model.
                `None` leaves it out of GRPO's group; RLOO counts it as 0.

        Returns:
            `Callable`: takes `prompts`, `completions` and, among the columns of the data set, `images` or `image`, and
            gives a list of rewards. Completions of equal prompts that follow each other share the prompt.
        """

        name = name or Path(self.model.config._name_or_path).name or "reward_model"
        return make_reward_func(self._score, self.collator, name=name, invalid_reward=invalid_reward)

    def _candidates(self, prompt: Any, responses: Sequence[Any], images: Any, name: str = "") -> Candidates:
        candidates = as_candidates(prompt, responses, images, self.collator.processing_class, name)
        check_prompt(candidates, self.collator.special_tokens)
        for index in range(len(candidates.responses)):
            check_response(candidates, index, self.collator.special_tokens)
        return candidates

    def _score(self, groups: list[Candidates]) -> list[list[float]]:
        rewards = score_candidates(self.model, groups, self.collator, batch_tokens=self.batch_tokens)
        return [[(reward - self._mean) / self._std for reward in some] for some in rewards]


def _is_one(prompt: Any) -> bool:
    return isinstance(prompt, str) or bool(prompt) and isinstance(prompt[0], Mapping)


def _ranked(rewards: list[float], responses: Sequence[Any]) -> list[RankedResponse]:
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    return [RankedResponse(index, rewards[index], responses[index]) for index in order]


def make_reward_func(
    score: Callable[[list[Candidates]], list[list[float]]],
    collator: MultimodalPreferenceCollator,
    *,
    name: str,
    invalid_reward: float | None,
) -> Callable[..., list[float | None]]:
    """Makes the function that [`RewardScorer.as_reward_func`] gives."""

    def reward_func(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        images = kwargs.get("images")
        if images is None and kwargs.get("image") is not None:
            images = [None if image is None else [image] for image in kwargs["image"]]
        groups: list[Candidates] = []
        members: list[list[int]] = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            shown = None if images is None else images[index]
            one = as_candidates(prompt, [completion], shown, collator.processing_class, f"prompt {index}")
            # A trainer gives the completions of a prompt one after the other.
            if not groups or (groups[-1].prompt, groups[-1].images) != (one.prompt, one.images):
                check_prompt(one, collator.special_tokens)
                groups.append(Candidates(one.prompt, [], one.images, one.name))
                members.append([])
            if _is_usable(one, collator):
                groups[-1].responses += one.responses
                members[-1].append(index)
        rewards = [invalid_reward] * len(prompts)
        for indices, found in zip(members, score(groups), strict=True):
            for index, reward in zip(indices, found, strict=True):
                rewards[index] = reward
        return rewards

    reward_func.__name__ = name
    return reward_func


def _is_usable(candidates: Candidates, collator: MultimodalPreferenceCollator) -> bool:
    try:
        check_response(candidates, 0, collator.special_tokens)
    except RowError:
        return False
    return True
