"""The judge's prompts, as OpenAI chat messages: one score per answer, one per criterion, or the better of two.

All that comes from data is fenced ([`~trl_dt2it.judge.fence`]). Images travel as `data:` URIs of their bytes: a path
would tell the endpoint about the machine, and a URL would make it fetch from a stranger.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..data.images import ImageOptions, check_image, load_image, open_encoded, with_image_root
from .fence import fenced, mark_of, neutralise
from .rubric import DEFAULT_RUBRIC, Rubric
from .wording import WORDINGS, Wording


_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_ORIENTATION_TAG = 0x0112
_IMAGE_OPTIONS = ImageOptions()


def listwise_messages(
    question: str,
    images: Sequence[Any],
    candidates: Sequence[str],
    *,
    rubric: Rubric = DEFAULT_RUBRIC,
    reference: str | None = None,
    language: str | None = None,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
) -> list[dict]:
    """
    Asks for one score per answer, all answers seen at once.

    Args:
        question (`str`):
            The question.
        images (`Sequence`):
            Its images, each as in [`~trl_dt2it.data.images.load_image`].
        candidates (`Sequence[str]`):
            The answers, in the order in which the judge sees them.
        rubric ([`Rubric`], *optional*):
            What they are judged by.
        reference (`str`, *optional*):
            An answer that is known to be right.
        language (`str`, *optional*):
            `"en"` or `"zh"`; by default Chinese if a Han character is in the question.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in
            [`~trl_dt2it.data.ImageOptions`].
        image_options ([`~trl_dt2it.data.ImageOptions`], *optional*):
            Where else images may come from, and how large they may be.

    Returns:
        `list[dict]`: a system and a user message, for a [`ListwiseVerdict`].

    Raises:
        [`~trl_dt2it.data.RowError`]: if an image is unfit.
        `ValueError`: if there is no answer or the language is unknown.
    """
    if not candidates:
        raise ValueError("`candidates` is empty; give at least one answer.")
    words = _wording(question, language)
    task = words.listwise.format(count=len(candidates), low=rubric.low, high=rubric.high)
    answers = [(words.answer.format(number=n), text) for n, text in enumerate(candidates, 1)]
    options = with_image_root(image_options, image_root)
    return _messages(words, rubric, task, question, images, reference, answers, options)


def pointwise_messages(
    question: str,
    images: Sequence[Any],
    candidate: str,
    *,
    reference: str | None = None,
    rubric: Rubric = DEFAULT_RUBRIC,
    language: str | None = None,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
) -> list[dict]:
    """
    Asks for one score per criterion for one answer.

    Args:
        question, images, rubric, language, image_root, image_options:
            As in [`listwise_messages`].
        candidate (`str`):
            The answer.
        reference (`str`, *optional*):
            An answer that is known to be right.

    Returns:
        `list[dict]`: a system and a user message, for a [`PointwiseVerdict`].

    Raises:
        [`~trl_dt2it.data.RowError`]: if an image is unfit.
        `ValueError`: if the language is unknown.
    """
    words = _wording(question, language)
    keys = ", ".join(f'"{criterion.name}": <>' for criterion in rubric.criteria)
    task = words.pointwise.format(low=rubric.low, high=rubric.high, keys=keys)
    answers = [(words.answer.format(number=1), candidate)]
    options = with_image_root(image_options, image_root)
    return _messages(words, rubric, task, question, images, reference, answers, options)


def pairwise_messages(
    question: str,
    images: Sequence[Any],
    first: str,
    second: str,
    *,
    rubric: Rubric = DEFAULT_RUBRIC,
    language: str | None = None,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
) -> list[dict]:
    """
    Asks which of two answers is better. Judges favour a place, so ask in both orders: [`both_orders`].

    Args:
        question, images, rubric, language, image_root, image_options:
            As in [`listwise_messages`].
        first (`str`):
            The answer shown first.
        second (`str`):
            The answer shown second.

    Returns:
        `list[dict]`: a system and a user message, for a [`PairwiseVerdict`].

    Raises:
        [`~trl_dt2it.data.RowError`]: if an image is unfit.
        `ValueError`: if the language is unknown.
    """
    words = _wording(question, language)
    answers = [(words.first, first), (words.second, second)]
    options = with_image_root(image_options, image_root)
    return _messages(words, rubric, words.pairwise.format(), question, images, None, answers, options)


def reminded(messages: Sequence[Mapping[str, Any]]) -> list[dict]:
    """
    The same messages with one more line that asks for the form of the verdict again.

    The unread reply is not quoted: it may repeat what an answer smuggled into it.

    Args:
        messages (`Sequence[Mapping]`):
            Chat messages, of which the last is the user's.

    Returns:
        `list[dict]`
    """
    *head, last = messages
    content = last["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    is_chinese = any(part["type"] == "text" and WORDINGS["zh"].request in part["text"] for part in parts)
    # One more part, not one more message: many chat templates want user and assistant in turns.
    parts.append({"type": "text", "text": WORDINGS["zh" if is_chinese else "en"].reminder})
    return [*map(dict, head), {**last, "content": parts}]


def image_block(image: Any, options: ImageOptions = _IMAGE_OPTIONS) -> dict:
    """
    An image as a part of a chat message.

    Upright PNG, JPEG and WebP files go out byte for byte, metadata included; all else becomes PNG.

    Args:
        image (`PIL.Image.Image`, `bytes`, `dict`, `str`, `PathLike` or `np.ndarray`):
            As in [`~trl_dt2it.data.images.load_image`].
        options ([`~trl_dt2it.data.images.ImageOptions`], *optional*):
            Where images may come from and how large they may be.

    Returns:
        `dict`: `{"type": "image_url", "image_url": {"url": "data:..."}}`.

    Raises:
        [`~trl_dt2it.data.RowError`]: if the image is unfit.
    """
    check_image(image, options)
    if isinstance(image, (bytes, bytearray, memoryview, str, Mapping, os.PathLike)):
        with open_encoded(image, options) as (stream, _):
            content = stream.read()
        media_type = _media_type(content)
        if media_type is not None:
            return _data_uri(media_type, content)
        image = content
    buffer = io.BytesIO()
    load_image(image, options).save(buffer, "PNG")
    return _data_uri("image/png", buffer.getvalue())


def _media_type(content: bytes) -> str | None:
    """The media type of a file that every endpoint shows alike: one frame, upright."""
    with Image.open(io.BytesIO(content)) as image:
        if image.format not in _MEDIA_TYPES or getattr(image, "n_frames", 1) > 1:
            return None
        upright = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1) == 1
        return _MEDIA_TYPES[image.format] if upright else None


def _data_uri(media_type: str, content: bytes) -> dict:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:{media_type};base64,{base64.b64encode(content).decode()}"},
    }


def _wording(question: str, language: str | None) -> Wording:
    if language is None:
        language = "zh" if _HAN.search(question) else "en"
    if language not in WORDINGS:
        raise ValueError(f"`language` must be one of {sorted(WORDINGS)}, got {language!r}.")
    return WORDINGS[language]


def _messages(
    words: Wording,
    rubric: Rubric,
    task: str,
    question: str,
    images: Sequence[Any],
    reference: str | None,
    answers: list[tuple[str, str]],
    image_options: ImageOptions,
) -> list[dict]:
    language = next(name for name, wording in WORDINGS.items() if wording is words)
    parts = [(words.question, question)]
    if reference is not None:
        parts.append((words.reference, reference))
        task = task.replace("\n", words.with_reference + "\n", 1)
    texts = [(name, neutralise(text)) for name, text in [*parts, *answers]]
    mark = mark_of([text for _, text in texts])
    criteria = [
        words.criterion.format(name=one.name, weight=f"{one.weight:.0%}", description=one.text(language))
        for one in rubric.criteria
    ]
    system = "\n".join([words.role, *criteria, "", words.fences.format(mark=mark), "", task])
    user = "\n\n".join([*(fenced(name, text, mark) for name, text in texts), words.request])
    blocks = [image_block(image, image_options) for image in images]
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": [*blocks, {"type": "text", "text": user}]},
    ]
