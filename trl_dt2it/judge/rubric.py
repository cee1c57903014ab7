"""Rubrics, and what goes to and comes from a judge: requests with fenced texts and images, and replies."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..data.rows import blocks
from ..utils import digest, digest_of, read_packaged


if TYPE_CHECKING:
    from pydantic import BaseModel

Status = Literal["ok", "malformed", "cut", "refused", "rejected", "transport", "over_budget"]

# Statuses without any answer: the next run asks again, and nothing may be concluded about what was asked.
UNANSWERED: tuple[Status, ...] = ("transport", "over_budget")

_MARK_LENGTH = 16  # hexadecimal digits in the mark of a fence: 64 bits
_FENCED = re.compile(
    rf"^<<<([^<>|\n]+) \| ([0-9a-f]{{{_MARK_LENGTH}}})>>>\n(.*?)\n<<<END OF \1 \| \2>>>$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Criterion:
    """
    A criterion of a rubric.

    Parameters:
        name, weight (`str` and `float`):
            Key of its score in a verdict, and its share of the total, above 0.
        description (`Mapping[str, str]`):
            Instruction to the judge, by language: `"en"` at least, and `"zh"` for questions in Chinese.
    """

    name: str
    weight: float
    description: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.name or not self.name.isidentifier():
            raise ValueError(f"The name of a criterion must be an identifier, got {self.name!r}.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"The weight of {self.name!r} must be a number above 0, got {self.weight}.")
        if "en" not in self.description:
            raise ValueError(f"The criterion {self.name!r} has no English description; add the key 'en'.")

    def text(self, language: str) -> str:
        """Return the description in a language, by default in English."""
        return self.description.get(language, self.description["en"])


@dataclass(frozen=True)
class Rubric:
    """
    Weighted criteria and the scale that they share.

    Parameters:
        criteria (`tuple[Criterion, ...]`):
            Criteria whose weights add up to 1.
        low, high (`int`, *optional*, defaults to `1` and `10`):
            Worst and best score.
    """

    criteria: tuple[Criterion, ...]
    low: int = 1
    high: int = 10

    def __post_init__(self) -> None:
        names = [criterion.name for criterion in self.criteria]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"A rubric needs criteria with different names, got {names}.")
        total = math.fsum(criterion.weight for criterion in self.criteria)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"The weights of a rubric must add up to 1, got {total:g}.")
        if self.low >= self.high:
            raise ValueError(f"`low` must be less than `high`, got {self.low} and {self.high}.")

    def total(self, scores: Mapping[str, float]) -> float:
        """Average a score per criterion, by name, by the weights; refuse scores off the scale `[low, high]`."""
        names = {criterion.name for criterion in self.criteria}
        if set(scores) != names:
            raise ValueError(f"The scores must be of {sorted(names)}, got {sorted(scores)}.")
        for name, score in scores.items():
            if not self.low <= score <= self.high:
                raise ValueError(f"The score of {name!r} must be in [{self.low}, {self.high}], got {score}.")
        total = math.fsum(criterion.weight * scores[criterion.name] for criterion in self.criteria)
        return min(max(total, float(self.low)), float(self.high))  # the weights add up to 1 but for rounding

    def digest(self) -> str:
        """Hash all that a judge reads of the rubric: names, weights, descriptions and the scale."""
        read = [[one.name, one.weight, dict(one.description)] for one in self.criteria]
        return digest_of([read, self.low, self.high])


DEFAULT_RUBRIC = Rubric(tuple(Criterion(name, **about) for name, about in read_packaged("judge/rubric.yaml").items()))


@dataclass(frozen=True)
class JudgeRequest:
    """
    A question to the judge.

    Parameters:
        messages (`list[dict]`):
            OpenAI chat messages, images as `data:` URIs.
        schema (`type[BaseModel]`, *optional*):
            [`ListwiseVerdict`], [`PointwiseVerdict`], [`PairwiseVerdict`] or a model of your own; or free text.
        num_scores (`int`, *optional*):
            Number of scores in a [`ListwiseVerdict`], which requires it.
        rubric ([`Rubric`], *optional*):
            Rubric of the messages, for the range and the names of the scores; by default `DEFAULT_RUBRIC`.
        sample (`int`, *optional*, defaults to `0`):
            Tells repetitions of the same messages apart.
    """

    messages: list[dict]
    schema: type[BaseModel] | None = None
    num_scores: int | None = None
    rubric: Rubric | None = None
    sample: int = 0


@dataclass(frozen=True)
class JudgeReply:
    """
    The outcome of a question.

    Parameters:
        status (`str`):
            `"ok"`; `"malformed"`: the reply holds no valid verdict; `"cut"`: the reply is incomplete; `"refused"`: the
            model or a filter declined; `"rejected"`: the endpoint does not take this question; `"transport"`: no
            reply; `"over_budget"`: not asked. The next run asks the last three again.
        verdict (`BaseModel`, *optional*):
            The verdict, if the status is `"ok"` and the request has a schema.
        text (`str`, *optional*):
            Text of the reply, without the model's thoughts if the status is `"ok"`.
        input_tokens, output_tokens (`int`):
            Tokens of the prompts of all calls for this question that got a reply, and of these replies.
        is_cached (`bool`):
            The reply came from the store.
        error (`str`, *optional*):
            Why the status is not `"ok"`, in one sentence.
    """

    status: Status
    verdict: BaseModel | None
    text: str | None
    input_tokens: int
    output_tokens: int
    is_cached: bool
    error: str | None


def mark_of(contents: Sequence[str]) -> str:
    """Hash texts to the mark of the fences around them, which none of them contains."""
    parts = [f"{len(content.encode())}:{content}" for content in contents]
    lowered = "\n".join(content.lower() for content in contents)  # no mark spans a line break
    while (mark := digest(parts)[:_MARK_LENGTH]) in lowered:
        parts.append("again")
    return mark


def fenced(name: str, content: str, mark: str) -> str:
    """Put a text between the two lines that fence it."""
    return f"<<<{name} | {mark}>>>\n{content}\n<<<END OF {name} | {mark}>>>"


def fenced_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Extract all fenced texts from chat messages."""
    texts = (part["text"] for message in messages for part in blocks(message) if part["type"] == "text")
    return [match[3] for text in texts for match in _FENCED.finditer(text)]


def data_uri_bytes(uri: str) -> bytes | None:
    """Decode a base64 `data:` URI; `None` for any other text."""
    head, comma, payload = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        return None
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError:
        return None
