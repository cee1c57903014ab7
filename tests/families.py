"""Tiny checkpoints of many vision-language families, built in process: random weights, real processors.

`build_family` saves a native `...ForConditionalGeneration` model and its processor, as a Hub repository would hold
them; `family_dir` does so once per process. Weights are drawn wide (standard deviation 0.2), so that texts and images
change the hidden states clearly.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from .families_chat import CHATS, Chat
from .families_models import FAMILIES


__all__ = ["FAMILIES", "build_family", "build_tokenizer", "example_images", "family_dir"]


_CORPUS = (
    "Describe the picture in one sentence.",
    "Which of the two answers about the image is better, and why?",
    "The flower in the photograph is red and stands in front of green leaves.",
    "A temple with a curved roof rises above the trees under a blue sky.",
    "The first answer is more accurate than the second answer.",
)


def build_tokenizer(chat: Chat) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences, with the special tokens and template of `chat`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(chat.special_tokens)
    if chat.adds_bos:
        ids = [(chat.bos, tokenizer.token_to_id(chat.bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{chat.bos} $A", pair=f"{chat.bos} $A {chat.bos} $B", special_tokens=ids
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chat.bos,
        eos_token=chat.eos,
        pad_token=chat.pad,
        extra_special_tokens=dict(chat.named),
        chat_template=chat.template,
        model_max_length=4096,
    )


def build_family(name: str, directory: Path, *, seed: int = 0) -> Path:
    """
    Saves a tiny native checkpoint of a family, with its processor.

    Args:
        name (`str`):
            A key of `FAMILIES`.
        directory (`Path`):
            Where to save.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights; the global generator is left as it was.

    Returns:
        `Path`: `directory`.
    """
    chat = CHATS[name]
    config, processor = FAMILIES[name](build_tokenizer(chat))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    processor.chat_template = chat.template
    processor.save_pretrained(directory)
    return Path(directory)


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="families-")


@functools.cache
def family_dir(name: str, seed: int = 0) -> Path:
    """Directory of a family's checkpoint, built at the first call in a process and removed when it ends."""
    return build_family(name, Path(_root().name) / f"{name}-{seed}", seed=seed)


@functools.cache
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(np.asarray(image)) for image in load_sample_images().images]


def example_images(n: int, seed: int = 0) -> list[Image.Image]:
    """`n` pieces of real photographs, 28 to 60 pixels a side, no two of the same size."""
    generator = random.Random(seed)
    images: list[Image.Image] = []
    while len(images) < n:
        photograph = _photographs()[len(images) % 2]
        width, height = generator.randint(28, 60), generator.randint(28, 60)
        if (width, height) in {image.size for image in images}:
            continue
        left = generator.randint(0, photograph.width - 4 * width)
        top = generator.randint(0, photograph.height - 4 * height)
        images.append(photograph.crop((left, top, left + 4 * width, top + 4 * height)).reduce(4))
    return images
