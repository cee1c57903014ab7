"""Answers to prompts with images, sampled from a vision-language model by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
)

from .data.images import ImageOptions, load_image
from .data.messages import Prompt
from .data.rows import RowError
from .models.rendering import ProcessingClass, get_tokenizer, lacks_special_tokens, render_conversation
from .utils import whole_weights


@dataclass(frozen=True)
class Sampling:
    """
    How answers are sampled.

    Parameters:
        num_answers (`int`, *optional*, defaults to `8`):
            Answers to a prompt.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest answer, in tokens; what is longer is cut.
        temperature (`float`, *optional*, defaults to `1.0`):
            0 takes the likeliest token each time, so that all answers are one.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability that tokens are drawn from.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws.
    """

    num_answers: int = 8
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        allowed = {
            "num_answers": (self.num_answers >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (is_fine, condition) in allowed.items():
            if not is_fine:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be {condition}.")


@dataclass(frozen=True)
class Answer:
    """A sampled answer, and whether the model ended it before `max_new_tokens`."""

    text: str
    is_finished: bool


def sample_answers(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    image_options: ImageOptions,
) -> list[list[Answer]]:
    """
    Answers to several prompts, in one batch.

    The same prompts together give the same answers again. torch's global generators stay as they are.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Vision-language or language model, on its device.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Its processor, or the tokenizer of a language model.
        prompts (`Sequence[Prompt]` of length B):
            The prompts.
        sampling ([`Sampling`]):
            How. The draws depend on its seed and on the row of the first prompt.
        image_options ([`ImageOptions`]):
            Where images may come from and how large they may be.

    Returns:
        `list[list[Answer]]`: for each prompt `num_answers` answers. Special tokens are not part of their text.

    Raises:
        [`~trl_dt2it.data.RowError`]: if an image cannot be used; the message names the row.
    """
    tokenizer = get_tokenizer(processing_class)
    encoded = _encode(prompts, processing_class, sampling.num_answers, image_options)
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in encoded.items()
    }
    # A model says where an answer ends, and where it does not, its tokenizer does.
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        # `top_k=0`: without it some models come with one of their own, which is not what was asked for.
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"), torch.no_grad():
        torch.manual_seed(sampling.seed * 1_000_003 + prompts[0].row)
        output = cast(Any, model).generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            **drawn,
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    is_end = torch.isin(new, torch.tensor([ends] if isinstance(ends, int) else ends, device=new.device))
    finished = is_end.any(1).tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    answers = [Answer(text.strip(), is_finished) for text, is_finished in zip(texts, finished, strict=True)]
    count = sampling.num_answers
    return [answers[first : first + count] for first in range(0, len(answers), count)]


def load_generator(
    name_or_path: str,
    *,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    A vision-language model, or a language model, that writes, on this process's device.

    Args:
        name_or_path (`str`):
            Hub id or directory. Pickled weights are refused.
        dtype (`str`, *optional*):
            Dtype of the weights; by default the checkpoint's.
        attn_implementation (`str`, *optional*):
            Attention implementation.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that ships with the checkpoint may run.

    Returns:
        [`~transformers.PreTrainedModel`]
    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    is_vlm = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    with whole_weights():
        model = auto_class.from_pretrained(
            name_or_path,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    return model.to(PartialState().device).eval()


def _encode(prompts: Sequence[Prompt], processing_class: ProcessingClass, times: int, options: ImageOptions) -> Any:
    """All prompts, each so many times in turn: `num_return_sequences` would mix up the images of prompts that have
    several, in families whose `generate` does not know which image belongs to which row."""
    texts: list[str] = []
    images: list[list[Any]] = []
    for prompt in prompts:
        try:
            shown = [load_image(image, options) for image in prompt.images]
        except RowError as error:
            raise RowError(error.reason, f"{prompt.name}: {error}") from error
        if shown and not isinstance(processing_class, ProcessorMixin):
            raise ValueError(f"{prompt.name} has images, but the model reads text only; use a vision-language model.")
        text = render_conversation(prompt.messages, shown, processing_class, add_generation_prompt=True)
        texts += [text] * times
        images += [shown] * times
    # Rows without images among others are fine for processors, a batch with none at all is not.
    given = {"images": images} if any(images) else {}
    return processing_class(
        text=texts,
        **given,
        padding=True,
        padding_side="left",
        add_special_tokens=lacks_special_tokens(texts[0], processing_class),
        return_tensors="pt",
    )
