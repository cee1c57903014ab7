"""Messages to a judge, in which answers are fenced as data, and both orders of a pair."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from PIL import ExifTags, Image

from ..data.images import ImageOptions, check_image, load_image, open_encoded, with_image_root
from ..data.rows import blocks, text_block
from ..utils import read_packaged
from .rubric import DEFAULT_RUBRIC, JudgeReply, JudgeRequest, Rubric, fenced, mark_of


_WORDINGS = read_packaged("judge/wordings.yaml")  # by language
_IMAGE_OPTIONS = ImageOptions()
_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")

# Wide forms count as well, because some tokenizers normalize them to ASCII before they look for special tokens.
_OPEN, _CLOSE = "[<\uff1c]", "[>\uff1e]"
_BAR = "[|\uff5c\u2223\u01c0]"
_SLASH = "[/\uff0f]"
_TAGS = (
    # ends of sequences and turns
    "s|bos|eos|eod|eop|sop|pad|unk|mask|sep|cls|start_of_turn|end_of_turn|end_of_utterance|end_of_text|endoftext|"
    "begin_of_text|start_header_id|end_header_id|eot_id|im_start|im_end|im_sep|turn|channel|message|return|call|"
    # images, videos and sounds
    r"images?|img|im_patch|im_col|imagehere|image_?\d+|image[-_]\d+|image_pad|image_soft_token|image_token|"
    "image_placeholder|image_newline|start_of_image|end_of_image|boi|eoi|begin_of_image|img_context|"
    r"global-img|row_\d+_col_\d+|fake_token_around_image|vision_start|vision_end|vision_pad|videos?|video_pad|"
    "video_soft_token|audios?|audio_soft_token|speech|point|box|quad|ref|patch|tile|"
    r"patch_index_\d+|loc_?\d+|seg_?\d+|extra_id_\d+|unused_?\d+|reserved_\d+|"
    # tools and thoughts
    "tools?|tool_calls?|tool_response|tool_result|tool_code|tool_output|function|function_calls?|function_results?|"
    "invoke|think|thinking|reflection|scratchpad|system|user|assistant|human|developer|instructions?"
)
_BRACKETS = (
    "inst|sys|system_prompt|tool_calls|tool_results|tool_content|available_tools|args|call_id|img|img_break|img_end|"
    "image|think|audio|begin_audio|prefix|middle|suffix|model_settings|gmask|smask|mask|cls|sep|pad|unk|bos|eos|"
    r"control_\d+"
)
_ROLES = (
    "system|user|assistant|human|developer|tool|instructions?|response|input|gpt|ai|bot|"
    "\u7cfb\u7edf|\u7528\u6237|\u52a9\u624b|\u52a9\u7406|\u6307\u4ee4|\u56de\u590d|\u8f93\u5165"
)
_LINE_START = r"(?:(?<=[\n\r\v\f\x85\u2028\u2029])|(?<![\s\S]))"

# The empty strings where a backslash goes.
_BREAKS = re.compile(
    rf"(?<={_OPEN})(?={_BAR}\S)"  # <|im_start|>, and with wide bars <|User|>
    rf"|(?<={_OPEN})(?={_SLASH}?[A-Za-z][\w-]*{_BAR}{_CLOSE})"  # <turn|>
    rf"|(?<={_OPEN})(?={_SLASH}?(?:{_TAGS})\s*{_SLASH}?{_CLOSE})"
    rf"|(?<={_OPEN})(?={_OPEN}{_SLASH}?SYS{_CLOSE})"  # <<SYS>>
    rf"|(?<=[\[\uff3b])(?={_SLASH}?(?:{_BRACKETS})[\]\uff3d])"  # [INST]
    rf"|(?<=<)(?=<<)"  # our own fences
    # "### System:", "ASSISTANT:", also as "**User**:" or "> user:"
    rf"|{_LINE_START}(?=[ \t]*#{{1,6}}[ \t]*(?:{_ROLES})\b)"
    rf"|{_LINE_START}(?=[ \t>]*[*_]{{0,3}}(?:{_ROLES})[*_]{{0,3}}[ \t]*[*_]{{0,3}}[:\uff1a])",
    re.IGNORECASE,
)

# Characters that models see and readers do not: controls other than line breaks and tabs, marks that reorder text, tag
# characters; and halves of surrogate pairs, which no encoding takes.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)


def neutralize(text: str) -> str:
    """Break control tokens, role headers and fences by a backslash; write invisible characters as `\\u{e0041}`."""
    text = _HIDDEN.sub(lambda match: f"\\u{{{ord(match[0]):x}}}", text)
    return _BREAKS.sub("\\\\", text)


def language_of(question: str) -> str:
    """Choose Chinese for a question with a Han character, and English for any other."""
    return "zh" if _HAN.search(question) else "en"


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
    Ask for a score per answer, with all answers seen at once.

    Args:
        question, images (`str` and `Sequence`):
            Text and images of the question, each image as in [`~trl_dt2it.data.images.load_image`].
        candidates (`Sequence[str]`):
            Answers, in the order in which the judge sees them.
        rubric ([`Rubric`], *optional*):
            Criteria and scale of the scores.
        reference (`str`, *optional*):
            An answer that is known to be right.
        language (`str`, *optional*):
            `"en"` or `"zh"`; by default `"zh"` for a question with a Han character.
        image_root, image_options:
            As in [`~trl_dt2it.data.ImageOptions`].

    Returns:
        `list[dict]`: a system and a user message, for a [`ListwiseVerdict`].

    Raises:
        [`~trl_dt2it.data.RowError`]: if an image is unfit.
        `ValueError`: if there is no answer or the language is unknown.
    """
    if not candidates:
        raise ValueError("`candidates` is empty; pass at least one answer.")
    return _compose("listwise", question, images, candidates, reference, rubric, language, image_root, image_options)


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
    Ask for a score per criterion of one answer.

    Args:
        question, images, reference, rubric, language, image_root, image_options:
            As in [`listwise_messages`], as are the errors.
        candidate (`str`):
            The answer.

    Returns:
        `list[dict]`: a system and a user message, for a [`PointwiseVerdict`].
    """
    return _compose("pointwise", question, images, [candidate], reference, rubric, language, image_root, image_options)


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
    Ask which of two answers is better. Judges favor a position, so ask in both orders, with [`both_orders`].

    Args:
        question, images, rubric, language, image_root, image_options:
            As in [`listwise_messages`], as are the errors.
        first, second (`str`):
            The answers, in the order in which they are shown.

    Returns:
        `list[dict]`: a system and a user message, for a [`PairwiseVerdict`].
    """
    return _compose("pairwise", question, images, [first, second], None, rubric, language, image_root, image_options)


def reminded(messages: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Ask for the form again, without the unread reply, which may repeat what an answer smuggled into it."""
    *head, last = messages
    parts = blocks(last)
    is_chinese = any(part["type"] == "text" and _WORDINGS["zh"]["request"] in part["text"] for part in parts)
    # One more part, not one more message: many chat templates want user and assistant in turns.
    parts.append(text_block(_WORDINGS["zh" if is_chinese else "en"]["reminder"]))
    return [*map(dict, head), {**last, "content": parts}]


def image_block(image: Any, options: ImageOptions = _IMAGE_OPTIONS) -> dict:
    """
    Convert an image to a part of a chat message: upright PNG, JPEG and WebP byte for byte, all else to PNG.

    Args:
        image (`PIL.Image.Image`, `bytes`, `dict`, `str`, `PathLike` or `np.ndarray`):
            As in [`~trl_dt2it.data.images.load_image`].
        options ([`~trl_dt2it.data.ImageOptions`], *optional*):
            Where images may come from, and their largest size.

    Returns:
        `dict`: `{"type": "image_url", "image_url": {"url": "data:..."}}`.

    Raises:
        [`~trl_dt2it.data.RowError`]: if the image is unfit.
    """
    check_image(image, options)
    media_type = None
    if isinstance(image, (bytes, bytearray, memoryview, str, Mapping, os.PathLike)):
        with open_encoded(image, options) as (stream, _):
            image = content = stream.read()
        media_type = _media_type(content)
    if media_type is None:
        buffer = io.BytesIO()
        load_image(image, options).save(buffer, "PNG")
        media_type, content = "image/png", buffer.getvalue()
    url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _media_type(content: bytes) -> str | None:
    """Return the media type of a file that every endpoint shows alike: upright, of one frame."""
    with Image.open(io.BytesIO(content)) as image:
        if image.format not in _MEDIA_TYPES or getattr(image, "n_frames", 1) > 1:
            return None
        upright = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) == 1
        return _MEDIA_TYPES[image.format] if upright else None


def _compose(
    kind: Literal["listwise", "pointwise", "pairwise"],
    question: str,
    images: Sequence[Any],
    answers: Sequence[str],
    reference: str | None,
    rubric: Rubric,
    language: str | None,
    image_root: str | os.PathLike | None,
    image_options: ImageOptions | None,
) -> list[dict]:
    language = language_of(question) if language is None else language
    if language not in _WORDINGS:
        raise ValueError(f"`language` must be one of {sorted(_WORDINGS)}, got {language!r}.")
    words, options = _WORDINGS[language], with_image_root(image_options, image_root)
    keys = ", ".join(f'"{one.name}": <>' for one in rubric.criteria)
    task = words[kind].format(count=len(answers), low=rubric.low, high=rubric.high, keys=keys)
    parts = [(words["question"], question)]
    if reference is not None:
        parts.append((words["reference"], reference))
        task = task.replace("\n", words["with_reference"] + "\n", 1)
    names = [words["answer"].format(number=n) for n in range(1, len(answers) + 1)]
    parts += zip([words["first"], words["second"]] if kind == "pairwise" else names, answers, strict=True)
    texts = [(name, neutralize(text)) for name, text in parts]
    mark = mark_of([text for _, text in texts])
    criteria = [
        words["criterion"].format(name=one.name, weight=f"{one.weight:.0%}", description=one.text(language))
        for one in rubric.criteria
    ]
    system = "\n".join([words["role"], *criteria, "", words["fences"].format(mark=mark), "", task])
    user = "\n\n".join([*(fenced(name, text, mark) for name, text in texts), words["request"]])
    content = [*(image_block(image, options) for image in images), text_block(user)]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def both_orders(
    question: str,
    images: Sequence[Any],
    first: str,
    second: str,
    *,
    swap: Literal["answers", "images"] = "answers",
    rubric: Rubric = DEFAULT_RUBRIC,
    sample: int = 0,
    **kwargs: Any,
) -> tuple[JudgeRequest, JudgeRequest]:
    """
    Make the requests for a comparison, as it is and swapped.

    Args:
        question, images, first, second, rubric:
            As in [`pairwise_messages`].
        swap (`"answers"` or `"images"`, *optional*, defaults to `"answers"`):
            What to swap. `"images"` is for a question about which of two images is better, whose answers name them by
            position ("Image 1 is better.", "Image 2 is better."), and stay.
        sample, kwargs:
            As in [`JudgeRequest`], and more arguments of [`pairwise_messages`].

    Returns:
        `tuple[JudgeRequest, JudgeRequest]`

    Raises:
        `ValueError`: if images are to be swapped and there are not two of them.
    """
    from .replies import PairwiseVerdict  # with `pydantic`, which messages do without

    if swap == "images" and len(images) != 2:
        raise ValueError(f"`swap='images'` needs two images, got {len(images)}.")
    swapped = (list(images)[::-1], first, second) if swap == "images" else (images, second, first)
    one, two = (
        pairwise_messages(question, *shown, rubric=rubric, **kwargs) for shown in ((images, first, second), swapped)
    )
    request = JudgeRequest(one, PairwiseVerdict, rubric=rubric, sample=sample)
    return request, replace(request, messages=two)


def combine_orders(first: JudgeReply, second: JudgeReply) -> Literal["first", "second", "tie"] | None:
    """
    Combine the replies to the requests of [`both_orders`].

    Args:
        first, second ([`JudgeReply`]):
            Replies to the request as it is and swapped.

    Returns:
        `str`, *optional*: `"first"` or `"second"` if both replies agree, `"tie"` if they do not or both say so, `None`
        if a verdict is missing.
    """
    from .replies import PairwiseVerdict  # with `pydantic`, which messages do without

    one, two = first.verdict, second.verdict
    if not isinstance(one, PairwiseVerdict) or not isinstance(two, PairwiseVerdict):
        return None
    # The better answer has the other position in the other order.
    return one.better if {one.better, two.better} == {"first", "second"} else "tie"
