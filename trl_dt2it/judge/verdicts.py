"""The three verdicts, with the checks that leave nothing to a default: number, range and names of scores."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

from .failures import import_error
from .rubric import DEFAULT_RUBRIC, Rubric


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
    """
    The JSON schema that an endpoint is asked to keep to.

    Args:
        schema (`type[BaseModel]`):
            A verdict of this module, or a model of the user's.
        num_scores (`int`, *optional*):
            The number of scores of a [`ListwiseVerdict`].
        rubric ([`Rubric`], *optional*):
            Scale and names of the scores; by default `DEFAULT_RUBRIC`.

    Returns:
        `dict`: without titles and docstrings, so that no rewording of ours makes a new request of an old one.
    """
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
