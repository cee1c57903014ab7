"""Wordings of questions about a caption and two images, with their two verdicts, written and recognized in rows of
others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


IMAGES, CAPTION = "{images}", "{caption}"

_PLACEHOLDERS = re.compile(f"({re.escape(IMAGES)}|{re.escape(CAPTION)})")
# Blocks of Han characters: radicals, iteration marks, ideographs and the planes of their extensions.
_HAN = re.compile(
    "[\u2e80-\u2fd5\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)

# Wordings of others, white space collapsed: DT2IT-MRM's own script and UnifiedReward put the caption into brackets.
_BRACKETED = re.compile(
    r"(?:image [12]: ?){0,2}(?:you are )?given a (?:text )?caption\b.*?\bcaption ?: ?\[(.*)\]", re.IGNORECASE
)
_BETTER = re.compile(r"image ([12]) is better(?: than image (?!\1)[12])?", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)


@dataclass(frozen=True)
class T2ITemplate:
    """
    Wording of a two-image question.

    Parameters:
        prompt (`str`):
            Question with `{images}` and `{caption}` once each, in either order. `{images}` becomes the two images,
            each after its label, and `{caption}` the caption as it is. All else is literal, further braces and
            `<image>` included.
        first_is_better (`str`, *optional*, defaults to `"Image 1 is better than Image 2."`):
            Answer that prefers the image shown first.
        second_is_better (`str`, *optional*, defaults to `"Image 2 is better than Image 1."`):
            Answer that prefers the image shown second.
        labels (`tuple[str, str]`, *optional*, defaults to `("Image 1: ", "\\nImage 2: ")`):
            Text ahead of the first and of the second image.

    Raises:
        `ValueError`: if a placeholder is not there exactly once, or if the two answers are empty or equal.
    """

    prompt: str
    first_is_better: str = "Image 1 is better than Image 2."
    second_is_better: str = "Image 2 is better than Image 1."
    labels: tuple[str, str] = ("Image 1: ", "\nImage 2: ")

    def __post_init__(self) -> None:
        counts = self.prompt.count(IMAGES), self.prompt.count(CAPTION)
        if counts != (1, 1):
            raise ValueError(
                f"A template must hold {IMAGES} once and {CAPTION} once; {self.prompt!r:.200} holds {IMAGES} "
                f"{counts[0]} times and {CAPTION} {counts[1]} times."
            )
        answers = self.first_is_better.strip(), self.second_is_better.strip()
        if not all(answers) or answers[0] == answers[1]:
            raise ValueError(
                f"The answers of a template must be two different texts, got {answers[0]!r} and {answers[1]!r}."
            )

    def question(self, caption: str) -> list[dict[str, Any]]:
        """
        Write the content of the question.

        Args:
            caption (`str`):
                Text that both images were to show.

        Returns:
            `list[dict]`: text blocks and two image blocks; the caption is whole in one text block.
        """
        blocks: list[dict[str, Any]] = []
        text = ""
        for piece in _PLACEHOLDERS.split(self.prompt):
            if piece == IMAGES:
                for label in self.labels:
                    blocks += [{"type": "text", "text": text + label}, {"type": "image", "text": None}]
                    text = ""
            else:
                text += caption if piece == CAPTION else piece
        blocks.append({"type": "text", "text": text})
        return [block for block in blocks if block["text"] != ""]


ENGLISH = (
    T2ITemplate(
        "{images}\n\nBoth images were made from the caption below. Which of them shows it better?\n\n"
        "Caption: {caption}"
    ),
    T2ITemplate(
        "{images}\n\nHold the two images against this description and say which one is closer to it.\n\n"
        "Description: {caption}",
        "Image 1 is closer to the description than Image 2.",
        "Image 2 is closer to the description than Image 1.",
    ),
    T2ITemplate(
        "{images}\n\nSomeone ordered the picture described here and was given two drafts. Pick the better draft.\n\n"
        "Order: {caption}",
        "The first image is the better draft.",
        "The second image is the better draft.",
    ),
)
_CHINESE_LABELS = ("图1:", "\n图2:")
CHINESE = (
    T2ITemplate(
        "{images}\n\n这两张图都是按下面的描述画的,哪一张画得更好?\n\n描述:{caption}",
        "图1比图2更好。",
        "图2比图1更好。",
        _CHINESE_LABELS,
    ),
    T2ITemplate(
        "{images}\n\n请拿两张图与下面这段文字对照,指出更贴合文字的一张。\n\n文字:{caption}",
        "图1比图2更贴合文字。",
        "图2比图1更贴合文字。",
        _CHINESE_LABELS,
    ),
    T2ITemplate(
        "{images}\n\n有人按下面的要求订了一幅画,收到两份画稿,请选出较好的一份。\n\n要求:{caption}",
        "第一张图是较好的画稿。",
        "第二张图是较好的画稿。",
        _CHINESE_LABELS,
    ),
)


def is_chinese(caption: str) -> bool:
    """Tell whether to ask about a caption in Chinese: it has a Han character."""
    return _HAN.search(caption) is not None


def as_templates(template: str | T2ITemplate | Sequence[str | T2ITemplate] | None) -> tuple[T2ITemplate, ...] | None:
    """Read the `template` argument; `None` stands for the built-in wordings."""
    if template is None:
        return None
    given = (template,) if isinstance(template, (str, T2ITemplate)) else tuple(template)
    if not given:
        raise ValueError("`template` is empty; pass at least one wording, or None for the built-in wordings.")
    return tuple(T2ITemplate(item) if isinstance(item, str) else item for item in given)


def collapse(text: str) -> str:
    """Collapse white space, so that texts are equal that differ in nothing else."""
    return " ".join(text.split())


def find_caption(text: str, clean: Callable[[str], str] = collapse, cleaned: str | None = None) -> str | None:
    """Find the caption in a question of a built-in wording, with or without the labels of its images, or in one of
    DT2IT-MRM's script or of UnifiedReward. `cleaned` is `clean(text)`, where the caller has it.
    """
    cleaned = clean(text) if cleaned is None else cleaned
    for before, after in _edges(clean):
        if cleaned.startswith(before) and cleaned.endswith(after) and len(before) + len(after) <= len(cleaned):
            return cleaned[len(before) : len(cleaned) - len(after)].strip()
    # The last character first: without it, the pattern would try every bracket of a text of any length.
    bracketed = _BRACKETED.fullmatch(collapse(text)) if text.rstrip().endswith("]") else None
    return bracketed and clean(bracketed[1])


def prefers_first(answer: str) -> bool | None:
    """Read the verdict in an answer to a two-image question."""
    verdict = _plain(_ANSWER_TAG.sub(" ", answer.rpartition("</think>")[2]))
    if verdict in _VERDICTS:
        return _VERDICTS[verdict]
    match = _BETTER.fullmatch(verdict)
    return None if match is None else match[1] == "1"


def _plain(verdict: str) -> str:
    return collapse(verdict).rstrip(".。").casefold()


_VERDICTS = {
    _plain(text): is_first
    for template in (*ENGLISH, *CHINESE)
    for text, is_first in ((template.first_is_better, True), (template.second_is_better, False))
}


@lru_cache
def _edges(clean: Callable[[str], str]) -> list[tuple[str, str]]:
    """List the texts before and after the caption in each built-in wording."""
    templates, edges = (*ENGLISH, *CHINESE), []
    for template in templates:
        for labels in {("", ""), *(other.labels for other in templates)}:
            before, after = template.prompt.replace(IMAGES, " ".join((*labels, ""))).split(CAPTION)
            edges.append((clean(before), clean(after)))
    return edges
