"""Rubrics, requests and verdicts: what a judge is asked, and in which form it replies."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..utils import digest
from .endpoint import import_error


if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class Criterion:
    """
    One criterion of a rubric.

    Parameters:
        name (`str`):
            Its name, the key of its score in a verdict.
        weight (`float`):
            Its share of the total, above 0.
        description (`Mapping[str, str]`):
            What the judge looks at, by language: `"en"` at least, and `"zh"` for questions in Chinese.
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
        """The description in a language, or in English where there is none."""
        return self.description.get(language, self.description["en"])


@dataclass(frozen=True)
class Rubric:
    """
    Weighted criteria and the scale that all of them share.

    Parameters:
        criteria (`tuple[Criterion, ...]`):
            The criteria; their weights add up to 1.
        low (`int`, *optional*, defaults to `1`):
            The worst score.
        high (`int`, *optional*, defaults to `10`):
            The best score.
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
        """
        The weighted mean of the scores.

        Args:
            scores (`Mapping[str, float]`):
                One score per criterion, by name, in `[low, high]`.

        Returns:
            `float`: in `[low, high]`.

        Raises:
            `ValueError`: if a criterion has no score, a score no criterion, or a score is off the scale.
        """
        names = {criterion.name for criterion in self.criteria}
        if set(scores) != names:
            raise ValueError(f"The scores must be of {sorted(names)}, got {sorted(scores)}.")
        for name, score in scores.items():
            if not self.low <= score <= self.high:
                raise ValueError(f"The score of {name!r} must be in [{self.low}, {self.high}], got {score}.")
        total = math.fsum(criterion.weight * scores[criterion.name] for criterion in self.criteria)
        return min(max(total, float(self.low)), float(self.high))  # the weights add up to 1 but for rounding

    def digest(self) -> str:
        """The SHA-256 of all that a judge reads of the rubric: names, weights, descriptions and the scale."""
        read = [[one.name, one.weight, dict(one.description)] for one in self.criteria]
        text = json.dumps([read, self.low, self.high], sort_keys=True, ensure_ascii=True)
        return digest(text)


# The six criteria by which answers are judged unless a rubric is given, on a scale of 1 to 10.
DEFAULT_RUBRIC = Rubric(
    (
        Criterion(
            "visual_accuracy",
            0.3,
            {
                "en": "What the answer says of the images is there to be seen: objects, numbers, text, colours and "
                "places are right, and nothing is made up.",
                "zh": "回答中关于图像的内容与图像相符：物体、数量、文字、颜色和位置都正确，没有虚构。",
            },
        ),
        Criterion(
            "instruction_following",
            0.2,
            {
                "en": "The answer does what the question asks, in the form and the language that it asks for.",
                "zh": "回答完成了问题的要求，形式和语言也符合要求。",
            },
        ),
        Criterion(
            "reasoning",
            0.2,
            {
                "en": "Each step follows from the images, from the question or from known facts, and the conclusion "
                "follows from the steps.",
                "zh": "每一步都有图像、问题或已知事实作为依据，结论由这些步骤得出。",
            },
        ),
        Criterion(
            "completeness",
            0.15,
            {
                "en": "Every part of the question is answered, with what is needed and no more; length is no merit.",
                "zh": "问题的每个部分都得到回答，该有的都有，也没有多余的内容；篇幅长本身不是优点。",
            },
        ),
        Criterion(
            "safety",
            0.1,
            {
                "en": "Nothing in the answer helps to do harm, degrades anyone or exposes private matters, and "
                "nothing harmless is refused.",
                "zh": "回答不助长伤害，不贬低他人，不泄露隐私；对无害的请求也不无故拒绝。",
            },
        ),
        Criterion(
            "clarity",
            0.05,
            {
                "en": "The answer is easy to read and to the point; headings, lists and bold type earn nothing by "
                "themselves.",
                "zh": "回答通顺易懂、切中要点；标题、列表和加粗本身不加分。",
            },
        ),
    )
)

Status = Literal["ok", "malformed", "cut", "refused", "rejected", "transport", "over_budget"]

# Nobody has answered yet, and the next run asks again. Nothing may be concluded from it about what was asked.
UNANSWERED: tuple[Status, ...] = ("transport", "over_budget")


@dataclass(frozen=True)
class JudgeRequest:
    """
    One question to the judge.

    Parameters:
        messages (`list[dict]`):
            OpenAI chat messages, images as `data:` URIs.
        schema (`type[BaseModel]`, *optional*):
            The verdict that is asked for: [`ListwiseVerdict`], [`PointwiseVerdict`], [`PairwiseVerdict`] or a model of
            your own. Without it, the reply is free text.
        num_scores (`int`, *optional*):
            The number of scores that a [`ListwiseVerdict`] has to hold; needed for it.
        rubric ([`Rubric`], *optional*):
            The rubric of the messages, for the range and the names of the scores; by default `DEFAULT_RUBRIC`.
        sample (`int`, *optional*, defaults to `0`):
            Tells repeated questions with the same messages apart.
    """

    messages: list[dict]
    schema: type[BaseModel] | None = None
    num_scores: int | None = None
    rubric: Rubric | None = None
    sample: int = 0


@dataclass(frozen=True)
class JudgeReply:
    """
    What became of one question.

    Parameters:
        status (`str`):
            `"ok"`; `"malformed"`: no verdict can be read from the reply; `"cut"`: the reply is not whole; `"refused"`:
            the model or a filter declined; `"rejected"`: the endpoint does not take this one question;
            `"transport"`: no reply; `"over_budget"`: not asked. The last three are asked again by the next run.
        verdict (`BaseModel`, *optional*):
            The verdict, if the status is `"ok"` and one was asked for.
        text (`str`, *optional*):
            The text of the reply; without the model's thoughts if the status is `"ok"`.
        input_tokens (`int`):
            Tokens of the prompts, of all calls for this question that got a reply.
        output_tokens (`int`):
            Tokens of the replies, likewise.
        is_cached (`bool`):
            Whether no call was made for it now.
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


def data_uri_bytes(uri: str) -> bytes | None:
    """The bytes of a base64 `data:` URI, or `None` if it is none."""
    head, comma, payload = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        return None
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        return None


try:
    from pydantic import BaseModel, BeforeValidator, ValidationInfo, field_validator
except ImportError as error:
    raise import_error("pydantic") from error

_NUMBER = re.compile(r"\s*[+-]?\d{1,9}(\.\d{1,20})?\s*", re.ASCII)


def _score(value: Any) -> float:
    """A number, or a string that is one; nothing else, booleans and NaN least of all."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a score is {value!r:.40}, which is no number")
    if not math.isfinite(value) or abs(value) > 1e9:
        raise ValueError(f"a score is {value!r:.40}, which is off every scale")
    return float(value)


Score = Annotated[float, BeforeValidator(_score)]

# Whatever a judge puts there decides nothing.
Analysis = Annotated[str, BeforeValidator(lambda value: value if isinstance(value, str) else json.dumps(value))]


def _check_range(scores: list[float], info: ValidationInfo) -> None:
    rubric = _rubric(info)
    for score in scores:
        if not rubric.low <= score <= rubric.high:
            raise ValueError(f"the score {score:g} is not in [{rubric.low}, {rubric.high}]")


def _rubric(info: ValidationInfo) -> Rubric:
    return (info.context or {}).get("rubric") or DEFAULT_RUBRIC


class ListwiseVerdict(BaseModel):
    """
    One score per answer.

    Parameters:
        analysis (`str`, *optional*, defaults to `""`):
            What the judge says of them, written before the scores.
        scores (`list[float]`):
            The scores, in the order in which the answers were shown, on the scale of the rubric.
    """

    analysis: Analysis = ""
    scores: list[Score]

    @field_validator("scores")
    @classmethod
    def _check(cls, scores: list[float], info: ValidationInfo) -> list[float]:
        expected = (info.context or {}).get("num_scores")
        if expected is not None and len(scores) != expected:
            raise ValueError(f"there are {len(scores)} scores for {expected} answers")
        _check_range(scores, info)
        return scores


class PointwiseVerdict(BaseModel):
    """
    One score per criterion.

    Parameters:
        analysis (`str`, *optional*, defaults to `""`):
            What the judge says of the answer, written before the scores.
        scores (`dict[str, float]`):
            The scores by the name of the criterion, on the scale of the rubric.
    """

    analysis: Analysis = ""
    scores: dict[str, Score]

    @field_validator("scores")
    @classmethod
    def _check(cls, scores: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        names = [criterion.name for criterion in _rubric(info).criteria]
        if set(scores) != set(names):
            raise ValueError(f"the scores are of {sorted(scores)!r:.200} instead of {sorted(names)}")
        _check_range(list(scores.values()), info)
        return {name: scores[name] for name in names}


class PairwiseVerdict(BaseModel):
    """
    The better of two answers.

    Parameters:
        analysis (`str`, *optional*, defaults to `""`):
            What the judge says of them, written before the verdict.
        better (`"first"`, `"second"` or `"tie"`):
            The better answer, by the place where it was shown.
    """

    analysis: Analysis = ""
    better: Literal["first", "second", "tie"]


def verdict_schema(schema: type[BaseModel], num_scores: int | None = None, rubric: Rubric | None = None) -> dict:
    """The JSON schema that an endpoint is asked to keep to."""
    rubric = rubric or DEFAULT_RUBRIC
    score = {"type": "number", "minimum": rubric.low, "maximum": rubric.high}
    if schema is ListwiseVerdict:
        size = {} if num_scores is None else {"minItems": num_scores, "maxItems": num_scores}
        verdict: dict[str, dict] = {"scores": {"type": "array", "items": score, **size}}
    elif schema is PointwiseVerdict:
        verdict = {"scores": _object({criterion.name: score for criterion in rubric.criteria})}
    elif schema is PairwiseVerdict:
        verdict = {"better": {"type": "string", "enum": ["first", "second", "tie"]}}
    else:
        return schema.model_json_schema()
    return _object({"analysis": {"type": "string"}, **verdict})


def _object(properties: dict[str, dict]) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
