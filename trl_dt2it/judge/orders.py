"""One comparison asked in both orders, because judges favour a place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .prompts import pairwise_messages
from .requests import JudgeReply, JudgeRequest
from .rubric import DEFAULT_RUBRIC, Rubric
from .verdicts import PairwiseVerdict


Better = Literal["first", "second", "tie"]
_MIRRORED: dict[Better, Better] = {"first": "second", "second": "first", "tie": "tie"}


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
    The requests for one comparison, as it is and mirrored.

    Args:
        question, images, first, second, rubric:
            As in [`pairwise_messages`].
        swap (`"answers"` or `"images"`, *optional*, defaults to `"answers"`):
            What changes places. `"images"` is for a question about which of two images is better, whose answers name
            them by their place ("Image 1 is better.", "Image 2 is better."): then the images are shown the other way
            round, and the answers stay.
        sample (`int`, *optional*, defaults to `0`):
            As in [`JudgeRequest`].
        kwargs:
            Passed on to [`pairwise_messages`].

    Returns:
        `tuple[JudgeRequest, JudgeRequest]`

    Raises:
        `ValueError`: if images are to change places and there are not two of them.
    """
    if swap == "images" and len(images) != 2:
        raise ValueError(f"`swap='images'` needs two images, got {len(images)}.")
    mirrored = (first, second) if swap == "images" else (second, first)
    orders = [(images, (first, second)), (list(images)[::-1] if swap == "images" else images, mirrored)]
    one, two = (
        JudgeRequest(
            pairwise_messages(question, shown, *answers, rubric=rubric, **kwargs),
            PairwiseVerdict,
            rubric=rubric,
            sample=sample,
        )
        for shown, answers in orders
    )
    return one, two


def combine_orders(first: JudgeReply, second: JudgeReply) -> Better | None:
    """
    What two replies to the requests of [`both_orders`] say together.

    Args:
        first ([`JudgeReply`]):
            The reply to the request as it is.
        second ([`JudgeReply`]):
            The reply to the mirrored request.

    Returns:
        `str`, *optional*: `"first"` or `"second"` if both replies agree, `"tie"` if they do not or both say so, `None`
        if one of them has no verdict.
    """
    if not isinstance(first.verdict, PairwiseVerdict) or not isinstance(second.verdict, PairwiseVerdict):
        return None
    mirrored = _MIRRORED[second.verdict.better]
    return first.verdict.better if first.verdict.better == mirrored else "tie"
