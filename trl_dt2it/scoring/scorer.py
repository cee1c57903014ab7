"""Rewards of any answers by a trained model: `RewardScorer`, and reward functions for GRPO and RLOO."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..data.columns import is_ranked
from ..data.images import ImageOptions, load_image, with_image_root
from ..data.rows import RowError, check_row, marked
from ..models import rendering
from ..models.modeling import load_processing_class, load_reward_model, read_last_real_token, set_pixel_limits
from ..models.posterior import RewardPosterior, read_posterior, watching_head
from ..models.shared_prefix import common_prefix_length, decide_share_prefix, pack_completions, reward_order
from ..processes import whole_weights
from ..training.collator import MultimodalPreferenceCollator, pad_rows
from ..training.pair_scoring import evaluating, pair_inputs, score_pairs
from ..training.setup import rename_old_columns
from ..utils import digest_of
from .shards import add_ranked_rewards, add_rewards, model_fingerprint, processor_settings


@dataclass(frozen=True)
class RankedResponse:
    """An answer, its index among those given, and its reward, or the lower bound of it that was asked for."""

    index: int
    reward: float
    response: Any


class RewardScorer:
    """
    A trained reward model with its processor. Answers to a prompt share it, in one row where the family supports that.

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
            Most tokens of a batch, images and padding included. A longer row has a batch to itself.
        image_root, image_options (*optional*):
            Folder that no relative path may leave, and where else images may come from, as in
            [`~trl_dt2it.data.ImageOptions`].
        share_prefix (`str`, *optional*, defaults to `"auto"`):
            `"true"`, `"false"`, or `"auto"` to share prompts where the family supports it.
        normalize (`bool`, *optional*, defaults to `False`):
            Whether to standardize rewards by `reward_mean` and `reward_std` of the model's configuration.
        num_workers (`int`, *optional*, defaults to `0`):
            Worker processes, for each process, that read the rows of whole data sets while the model computes.
        posterior (`str`, `os.PathLike` or [`~trl_dt2it.models.posterior.RewardPosterior`], *optional*):
            Directory or Hub id of the model, beside which its posterior is, or the posterior, for standard deviations.

    Raises:
        `ValueError`: if the model has more than one label or weights that DeepSpeed ZeRO-3 has partitioned, or with
            `normalize` if mean and standard deviation are missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: rendering.ProcessingClass,
        *,
        batch_tokens: int = 16384,
        image_root: str | os.PathLike | None = None,
        image_options: ImageOptions | None = None,
        share_prefix: str = "auto",
        normalize: bool = False,
        num_workers: int = 0,
        posterior: str | os.PathLike | RewardPosterior | None = None,
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"{type(model).__name__} has {model.config.num_labels} labels; a reward model has one.")
        read_last_real_token(model)
        # DeepSpeed gives a parameter that it partitions the attribute `ds_id`, and leaves it empty.
        if any(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters()):
            raise ValueError(
                f"DeepSpeed ZeRO-3 has partitioned the weights of this {type(model).__name__}; use "
                "`RewardScorer.from_pretrained`, which loads the saved model whole on each process."
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
            group_pairs=True,
        )
        mean: Any = getattr(model.config, "reward_mean", None)
        std: Any = getattr(model.config, "reward_std", None)
        if normalize and (mean is None or not std or std < 0):
            raise ValueError(
                f"`normalize=True` needs `reward_mean` and a positive `reward_std` in the model's configuration, not "
                f"{mean} and {std}; write them there, or take the rewards as they are."
            )
        # Subtracted from every reward, and what the difference is divided by.
        self.normalization = [float(mean), float(std)] if normalize else [0.0, 1.0]
        self._posterior: Any = posterior  # read when it is first needed
        self._revision: str | None = None  # of the repository that it is read from

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
        Load a reward model and its processor. Each process loads the whole model, without waiting for another, also
        while a policy trains with DeepSpeed ZeRO-3 or FSDP.

        Args:
            path (`str` or `os.PathLike`):
                Hub id or directory of a reward model, or of an adapter that was trained as one.
            device (`str` or `torch.device`, *optional*):
                By default the process's own accelerator, or the CPU without one.
            dtype, revision, trust_remote_code, model_kwargs:
                As in [`load_reward_model`]; by default, the dtype is the checkpoint's.
            min_pixels, max_pixels (`int`, *optional*):
                Smallest and largest number of pixels of an image; by default those saved in training.
            batch_tokens, image_root, image_options, share_prefix, normalize, num_workers:
                As in [`RewardScorer`].

        Raises:
            `ValueError`: if the checkpoint has no trained head, or as in [`load_reward_model`].
        """
        image_options = with_image_root(image_options, image_root)
        hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        with whole_weights():
            model = load_reward_model(path, dtype=dtype or "auto", allow_new_head=False, **hub, **model_kwargs)
        processing_class = load_processing_class(path, **hub)
        set_pixel_limits(processing_class, min_pixels=min_pixels, max_pixels=max_pixels)
        if not {"device_map", "quantization_config"} & set(model_kwargs):
            model = model.to(device or PartialState().device)  # type: ignore[arg-type]  # a string will do
        for config in (model.config.get_text_config(), model.config):
            config.pad_token_id = rendering.get_tokenizer(processing_class).pad_token_id
        scorer = cls(
            model,
            processing_class,
            batch_tokens=batch_tokens,
            image_options=image_options,
            share_prefix=share_prefix,
            normalize=normalize,
            num_workers=num_workers,
            posterior=path,
        )
        scorer._revision = revision
        return scorer

    @property
    def posterior(self) -> RewardPosterior:
        """The posterior of the model's head, on the model's device.

        Raises:
            `ValueError`: if there is none beside the model; the message says how to make it.
        """
        if self._posterior is None:
            raise ValueError("Pass `posterior`, the directory of the model or the posterior, for standard deviations.")
        if not isinstance(self._posterior, RewardPosterior):
            self._posterior = read_posterior(self._posterior, self._revision)
        self._posterior = self._posterior.to(next(self.model.parameters()).device)
        return self._posterior

    def score(self, prompt: Any, responses: Sequence[Any], images: Any = None, *, return_std: bool = False) -> Any:
        """
        Score answers to a prompt, or to several.

        Args:
            prompt (`str`, `list[dict]`, or a list of either):
                Text of a user's message, or messages, whose image blocks may hold their image under `image`; for B
                prompts, a list of B. Without a chat template, a text is joined with its answers as it is.
            responses (`list`):
                Answers: texts, or lists of messages. For B prompts, B such lists.
            images (`list`, *optional*):
                PIL images, bytes, paths, or URLs on allowed hosts; they precede a prompt that is text. For B prompts,
                B such lists or `None`.
            return_std (`bool`, *optional*, defaults to `False`):
                Whether to return standard deviations too, of the posterior that `reward_posterior=True` saves in
                training: of each reward less the mean reward of the prompt's distinct answers, because a training on
                pairs tells differences alone; of a single one, less the reward of the average training answer.

        Returns:
            `list[float]`: a reward for each answer; for B prompts, a list of B such lists. With `return_std`, a tuple
            of rewards and standard deviations, in lists of one form.

        Raises:
            [`~trl_dt2it.data.rows.RowError`]: if a prompt, an answer or an image cannot be used; the message says
                which.
            `ValueError`: if a reward is not finite, if the lists do not match, or with `return_std` if the model has
                no posterior.
        """
        groups = self._groups(prompt, responses, images)
        rewards, stds = self._score_with_std(groups) if return_std else (self._score(groups), [])
        if _is_one(prompt):
            return (rewards[0], stds[0]) if return_std else rewards[0]
        return (rewards, stds) if return_std else rewards

    def _groups(self, prompt: Any, responses: Sequence[Any], images: Any) -> list[Candidates]:
        if _is_one(prompt):
            return [self._candidates(prompt, responses, images)]
        images = [None] * len(prompt) if images is None else images
        if not len(prompt) == len(responses) == len(images):
            counts = f"{len(prompt)} prompts, {len(responses)} lists of responses and {len(images)} of images"
            raise ValueError(f"There are {counts}; pass as many of each.")
        given = zip(prompt, responses, images, strict=True)
        return [self._candidates(*one, name=f"prompt {index}") for index, one in enumerate(given)]

    def rank(self, prompt: Any, responses: Sequence[Any], images: Any = None, *, lower_confidence: float = 0.0) -> Any:
        """
        Sort answers by reward, best first, into `list[RankedResponse]`; ties keep their order. Arguments as in
        [`score`]; for B prompts, a list of B such lists. With `lower_confidence`, >= 0, the reward less so many of
        the standard deviations of [`score`] takes the place of the reward.
        """
        rewards = self._lower(self._groups(prompt, responses, images), lower_confidence)
        return _ranked(rewards[0], responses) if _is_one(prompt) else list(map(_ranked, rewards, responses))

    def best_of_n(
        self, prompt: Any, responses: Sequence[Any], images: Any = None, *, lower_confidence: float = 0.0
    ) -> Any:
        """
        Pick the answer with the highest reward, the first in a tie, as [`RankedResponse`]. Arguments as in [`rank`];
        for B prompts, a list of B.
        """
        ranked = self.rank(prompt, responses, images, lower_confidence=lower_confidence)
        if not all([ranked] if _is_one(prompt) else ranked):
            raise ValueError("There is no answer to take the best of.")
        return ranked[0] if _is_one(prompt) else [one[0] for one in ranked]

    def score_pairs(
        self, dataset: Dataset, *, num_workers: int | None = None, desc: str = "Scoring", show_progress: bool = True
    ) -> np.ndarray:
        """
        Score both answers of every pair. Under `accelerate launch` all processes must call it, and share the work.

        Args:
            dataset (`Dataset`):
                Preference rows, as [`MultimodalRewardTrainer`] takes them, images and videos included.
            num_workers, desc, show_progress (*optional*):
                Overrides the scorer's `num_workers`; title of the progress bar, and whether to show it.

        Returns:
            `np.ndarray` of shape `(n, 2)`, float32: rewards of chosen and rejected, the same on every process.

        Raises:
            [`~trl_dt2it.data.rows.RowError`]: if a row cannot be used, on every process; the message names it.
        """
        rewards = self._read_pairs(dataset, num_workers, desc=desc, show_progress=show_progress)
        mean, std = map(np.float32, self.normalization)
        return (rewards - mean) / std

    def margin_std(
        self, dataset: Dataset, *, num_workers: int | None = None, desc: str = "Scoring", show_progress: bool = True
    ) -> np.ndarray:
        """
        Compute the standard deviation of the reward margin of every pair, chosen less rejected. Arguments, processes
        and errors as in [`score_pairs`].

        Returns:
            `np.ndarray` of shape `(n,)`, float32: >= 0, the same on every process and for swapped answers.

        Raises:
            `ValueError`: if the model has no posterior.
        """
        posterior = self.posterior

        def read(scores: torch.Tensor, pairs: Mapping[str, Any]) -> torch.Tensor:
            chosen, rejected = pair_inputs(head, scores, pairs, posterior).float()
            return posterior.std(chosen - rejected).expand(2, -1)

        with watching_head(self.model) as head:
            stds = self._read_pairs(dataset, num_workers, read=read, desc=desc, show_progress=show_progress)
        return stds[:, 0] / np.float32(self.normalization[1])

    def _read_pairs(self, dataset: Dataset, num_workers: int | None, **options: Any) -> np.ndarray:
        return score_pairs(
            self.model,
            rename_old_columns(dataset),
            self.collator,
            max_tokens_per_batch=self.batch_tokens,
            num_workers=self.num_workers if num_workers is None else num_workers,
            **options,
        )

    def score_dataset(
        self, dataset: Dataset, output_dir: str | os.PathLike | None = None, *, rows_per_shard: int = 512
    ) -> Dataset:
        """
        Add the rewards of its pairs to a data set, or of all answers of ranked prompts; all processes must call it, as
        [`score_pairs`].

        Args:
            dataset (`Dataset`):
                Preference rows, or ranked prompts as in [`~trl_dt2it.data.to_pairs`], without scores or with them.
            output_dir (`str` or `os.PathLike`, *optional*):
                Folder for the rewards, in Parquet files from which a killed run resumes.
            rows_per_shard (`int`, *optional*, defaults to `512`):
                Pairs of a file: the most that a kill can cost.

        Returns:
            `Dataset`: with the columns `chosen_reward` and `rejected_reward`, float32, or for ranked prompts with the
            column `rewards`, of each a list of float32 in the order of its answers.

        Raises:
            `ValueError`: if the columns exist, or if the folder holds rewards of other rows or of another model.
        """
        folder, settings = (None, {}) if output_dir is None else (Path(output_dir), self.settings)

        def score(rows: Dataset, desc: str) -> np.ndarray:
            return self.score_pairs(rows, desc=desc)

        how: Any = {"output_dir": folder, "settings": settings, "rows_per_shard": rows_per_shard}
        return (add_ranked_rewards if is_ranked(dataset) else add_rewards)(dataset, lambda: score, **how)

    @property
    def settings(self) -> dict[str, Any]:
        """All that rewards depend on besides the rows."""
        model, processor = model_fingerprint(self.model), processor_settings(self.collator.processing_class)
        return {"model": model, "processor": processor, "normalize": self.normalization}

    def as_reward_func(
        self, name: str | None = None, *, invalid_reward: float | None = None, lower_confidence: float = 0.0
    ) -> Callable[..., list[float | None]]:
        """
        Make a reward function for TRL's GRPO and RLOO trainers, which pass images to functions and not to models.

        Args:
            name (`str`, *optional*):
                Its name in the logs; by default that of the model.
            invalid_reward (`float`, *optional*):
                Reward of a completion that spells a special token of the reward model. `None` drops it from GRPO's
                group; RLOO counts it as 0.
            lower_confidence (`float`, *optional*, defaults to `0.0`):
                Number of standard deviations by which each reward is lowered, >= 0, so that a policy is not drawn to
                answers of which the training pairs say little. They are relative to the completions of the prompt
                that a call gets, which should be all: those of a process.

        Returns:
            `Callable`: takes `prompts`, `completions` and the column `images` or `image`, and returns a list of
            rewards. Consecutive completions of equal prompts share the prompt.

        Raises:
            `ValueError`: with `lower_confidence` if it is negative or if the model has no posterior.
        """
        self._lower([], lower_confidence)

        def reward_func(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
            images = next((kwargs[key] for key in ("images", "image") if kwargs.get(key) is not None), None)
            rewards = self._complete(prompts, completions, images, lower_confidence=lower_confidence)
            return [invalid_reward if reward is None else reward for reward in rewards]

        reward_func.__name__ = name or Path(self.model.config._name_or_path).name or "reward_model"
        return reward_func

    def _complete(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        images: Sequence[Any] | None,
        *,
        keys: Sequence[int] | None = None,
        lower_confidence: float = 0.0,
    ) -> list[float | None]:
        """Score completions, `None` for one that spells a special token. Those in a row with equal `keys`, by default
        with equal prompts and images, are answers to one prompt."""
        groups: list[Candidates] = []
        scored: list[int] = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            shown = None if images is None else images[index]
            one = as_candidates(prompt, [completion], shown, self.collator.processing_class, f"prompt {index}")
            if keys is None:
                is_new = not groups or (groups[-1].prompt, groups[-1].images) != (one.prompt, one.images)
            else:
                is_new = not groups or keys[index] != keys[index - 1]
            if is_new:
                self._check(one, None)
                groups.append(Candidates(one.prompt, [], one.images, one.name))
            with suppress(RowError):
                self._check(one, 0)
                groups[-1].responses += one.responses
                scored.append(index)
        rewards = dict(zip(scored, chain.from_iterable(self._lower(groups, lower_confidence)), strict=True))
        return [rewards.get(index) for index in range(len(prompts))]

    def _candidates(self, prompt: Any, responses: Sequence[Any], images: Any, name: str = "") -> Candidates:
        candidates = as_candidates(prompt, responses, images, self.collator.processing_class, name)
        for index in (None, *range(len(candidates.responses))):
            self._check(candidates, index)
        return candidates

    def _check(self, candidates: Candidates, index: int | None) -> None:
        """Check everything about a prompt but its images, or with an index one of its answers, which may be empty."""
        empty: Any = "" if isinstance(candidates.prompt, str) else [{"role": "assistant"}]
        response = empty if index is None else candidates.responses[index]
        try:
            if not isinstance(response, str) and not (response and all(isinstance(one, Mapping) for one in response)):
                problem = "`chosen` is neither a string nor a list of messages; pass one of them."
                raise RowError("not_conversational", problem)
            # Two answers that are neither empty nor equal, whatever the response is.
            sides = {"chosen": marked(response, "."), "rejected": marked(response, ",")}
            row = {"prompt": candidates.prompt, "images": candidates.images, **sides}
            check_row(row, special_tokens=self.collator.special_tokens)
        except RowError as error:
            raise _named(error, candidates.name if index is None else candidates.where(index)) from error

    def _lower(self, groups: list[Candidates], lower_confidence: float) -> list[list[float]]:
        """Score candidates, each reward lowered by so many standard deviations."""
        if not 0 <= lower_confidence < float("inf"):
            raise ValueError(f"`lower_confidence` is {lower_confidence}; it must be finite and at least 0.")
        if not lower_confidence:
            return self._score(groups)
        scored = zip(*self._score_with_std(groups), strict=True)
        return [[r - lower_confidence * s for r, s in zip(*one, strict=True)] for one in scored]

    def _score_with_std(self, groups: list[Candidates]) -> tuple[list[list[float]], list[list[float]]]:
        """Score candidates, with the standard deviation of each reward relative to the mean of its prompt."""
        posterior, inputs = self.posterior, [[torch.empty(0)] * len(group.responses) for group in groups]
        rewards = self._score(groups, inputs)
        stds = (
            posterior.relative_std(torch.stack(one), _distinct(group.responses)) if one else torch.empty(0)
            for group, one in zip(groups, inputs, strict=True)
        )
        return rewards, [(one / self.normalization[1]).tolist() for one in stds]

    def _score(self, groups: list[Candidates], read: list[list[torch.Tensor]] | None = None) -> list[list[float]]:
        """Score the candidates of several prompts; `read` is filled with what the head reads of each, `(H,)` fp32."""
        rewards = [[0.0] * len(group.responses) for group in groups]
        given = ((index, group) for index, group in enumerate(groups) if group.responses)
        pieces = chain.from_iterable(_encode(*one, self.collator, self.batch_tokens) for one in given)
        device, (mean, std) = next(self.model.parameters()).device, self.normalization
        watching: Any = nullcontext() if read is None else watching_head(self.model)
        with torch.no_grad(), evaluating(self.model), watching as head:
            for batch in _batches(pieces, self.batch_tokens, self.collator.share_prefix):
                for inputs, scored in _layouts(batch, self.collator):
                    logits = self.model(**send_to_device(inputs, device), use_cache=False).logits
                    if logits.shape != (len(scored), 1):
                        raise ValueError(f"The logits are of shape {tuple(logits.shape)} for {len(scored)} answers.")
                    if read is not None:
                        seen = head.take(len(scored), self.posterior).float()
                        for (group, members), one in zip(scored, seen, strict=True):
                            for member in members:
                                read[group][member] = one
                    for (group, members), reward in zip(scored, logits[:, 0].float().tolist(), strict=True):
                        if not abs(reward) < float("inf"):
                            where = groups[group].where(members[0])
                            raise ValueError(f"{where} has the reward {reward}; load the model in another `dtype`.")
                        for member in members:
                            rewards[group][member] = (reward - mean) / std
        return rewards


def _is_one(prompt: Any) -> bool:
    return isinstance(prompt, str) or bool(prompt) and isinstance(prompt[0], Mapping)


def _ranked(rewards: list[float], responses: Sequence[Any]) -> list[RankedResponse]:
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    return [RankedResponse(index, rewards[index], responses[index]) for index in order]


@dataclass
class Candidates:
    """A prompt and the answers to score."""

    prompt: Any  # text, or messages with `{"type": "image"}` for each image
    responses: list[Any]  # texts if the prompt is one, otherwise lists of messages
    images: list[Any]  # as `load_image` takes them
    name: str  # for errors, such as `"prompt 3"`

    def where(self, index: int) -> str:
        """Name an answer, for an error."""
        return ", ".join(filter(None, [self.name, f"response {index}"]))


def as_candidates(
    prompt: Any, responses: Sequence[Any], images: Any, processing_class: rendering.ProcessingClass, name: str
) -> Candidates:
    """Bring a prompt and its answers to one form."""
    if isinstance(responses, (str, Mapping)):
        raise ValueError("`responses` is a single answer; pass a list of answers.")
    answers = [[one] if isinstance(one, Mapping) else one for one in responses]
    if images is not None:
        images = list(images) if isinstance(images, (list, tuple)) else [images]
    if isinstance(prompt, str):
        tokenizer = rendering.get_tokenizer(processing_class)
        template = getattr(processing_class, "chat_template", None) or tokenizer.chat_template
        if template is None and all(isinstance(answer, str) for answer in answers):
            return Candidates(prompt, answers, images or [], name)
        prompt = [{"role": "user", "content": prompt}]
    messages, inline = _take_out_images(prompt)
    answers = [[{"role": "assistant", "content": one}] if isinstance(one, str) else list(one) for one in answers]
    return Candidates(messages, answers, inline if images is None else images, name)


def _distinct(responses: Sequence[Any]) -> list[int]:
    """Select the answers that equal no earlier one, by index: an answer that is drawn often is one answer."""
    first: dict[str, int] = {}
    for index, response in enumerate(responses):
        first.setdefault(response if isinstance(response, str) else digest_of(response), index)
    return list(first.values())


def _take_out_images(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Split messages into messages whose image blocks are `{"type": "image"}`, and the images of these blocks."""
    images, cleaned = [], []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            images += [b["image"] for b in content if b.get("type") == "image" and b.get("image") is not None]
            content = [{key: b[key] for key in b if (b.get("type"), key) != ("image", "image")} for b in content]
        cleaned.append({**message, "content": content})
    return cleaned, images


def _named(error: RowError, name: str) -> RowError:
    """Put the name of a prompt or an answer in front of an error."""
    text = str(error).replace("`chosen`", "the response")
    return RowError(error.reason, f"{name}: {text}" if name else text)


@dataclass
class _Piece:
    """Encoded candidates of a prompt that share a batch, and its images once."""

    group: int
    members: list[list[int]]  # indices of the candidates; several where answers are equal
    tokens: list[dict[str, torch.Tensor]]
    images: dict[str, torch.Tensor]
    size: int  # tokens of one row that shares the prompt


def open_images(
    images: Sequence[Any], options: ImageOptions, processing_class: rendering.ProcessingClass, name: str
) -> list:
    """Load the images of a prompt, which a text model refuses."""
    if images and not isinstance(processing_class, ProcessorMixin):
        about = f"{name or 'The prompt'} has images, but the model reads text only"
        raise ValueError(f"{about}; use a vision-language model.")
    try:
        return [load_image(image, options) for image in images]
    except RowError as error:
        raise _named(error, name) from error


def _render(candidates: Candidates, collator: MultimodalPreferenceCollator) -> rendering.Rendered:
    processing_class = collator.processing_class
    images = open_images(candidates.images, collator.image_options, processing_class, candidates.name)
    if isinstance(candidates.prompt, str):  # as plain rows are in training
        eos = rendering.get_tokenizer(processing_class).eos_token or ""
        texts = [candidates.prompt + answer.removesuffix(eos) + eos for answer in candidates.responses]
        return rendering.Rendered(texts, images, add_special_tokens=True)
    messages = ([*candidates.prompt, *answer] for answer in candidates.responses)
    texts = [rendering.render_conversation(one, images, processing_class) for one in messages]
    return rendering.Rendered(texts, images, rendering.lacks_special_tokens(texts[0], processing_class))


def _encode(
    group: int, candidates: Candidates, collator: MultimodalPreferenceCollator, batch_tokens: int
) -> Iterator[_Piece]:
    """Encode the candidates of a prompt in as few pieces as fit a batch each."""
    rendered = _render(candidates, collator)
    # Equal answers are scored once: samples repeat, and a rounding error must not decide between two of them.
    equal: dict[str, list[int]] = {}
    for index, text in enumerate(rendered.texts):
        equal.setdefault(text, []).append(index)
    rendered.texts, members = list(equal), list(equal.values())
    encoded, images = rendering.encode_completions([rendered], collator.processing_class)
    tokens = [answer[0] for answer in encoded]
    ids = [answer["input_ids"] for answer in tokens]
    lengths = list(map(len, ids))
    prefix = common_prefix_length(ids) if collator.share_prefix else 0
    first, size = 0, prefix
    for index, length in enumerate(lengths):
        # Without sharing every candidate takes as much room as the longest.
        room = length - prefix if collator.share_prefix else max(lengths)
        if index > first and size + room > batch_tokens:
            yield _Piece(group, members[first:index], tokens[first:index], images, size)
            first, size = index, prefix
        size += room
    yield _Piece(group, members[first:], tokens[first:], images, size)


def _batches(pieces: Iterable[_Piece], batch_tokens: int, share_prefix: bool) -> Iterator[list[_Piece]]:
    """Batch as many neighbors as fit; rows that repeat images come in blocks of equal length."""
    batch: list[_Piece] = []
    for piece in pieces:
        several = [*batch, piece]
        if share_prefix:
            fits = sum(one.size for one in several) <= batch_tokens
        else:
            longest = max(len(tokens["input_ids"]) for one in several for tokens in one.tokens)
            size = sum(len(one.tokens) for one in several) * longest
            fits = size <= batch_tokens and len(piece.tokens) == len(several[0].tokens)
        if batch and not fits:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _layouts(
    batch: list[_Piece], collator: MultimodalPreferenceCollator
) -> Iterator[tuple[dict[str, Any], list[tuple[int, list[int]]]]]:
    """Lay a batch out as inputs of the model, with the group and the members that each of its rewards is of."""
    images = rendering.join_images([piece.images for piece in batch])
    packed: dict[str, Any] | None = None
    if collator.share_prefix:
        packed = pack_completions([piece.tokens for piece in batch], collator.image_token_ids)
        if packed is None and len(batch) > 1:
            for piece in batch:
                yield from _layouts([piece], collator)
            return
    order = [(batch[number], index) for number, index in reward_order([len(piece.members) for piece in batch])]
    if packed is None:
        rows = [piece.tokens[index] for piece, index in order]
        packed = dict[str, Any](pad_rows(rows, collator.processing_class, collator.pad_to_multiple_of))
        if images and (count := len(batch[0].tokens)) > 1:
            packed["image_repeats"] = count
    yield {**packed, **images}, [(piece.group, piece.members[index]) for piece, index in order]
