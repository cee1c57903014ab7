"""What is asked of a judge, and what comes of it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..printable import digest, digest_of
from .endpoint import Endpoint
from .rubric import Rubric
from .verdicts import verdict_schema


if TYPE_CHECKING:
    from pydantic import BaseModel


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


def request_key(endpoint: Endpoint, request: JudgeRequest) -> str:
    """
    What a reply depends on, as one SHA-256: two requests with the same key are the same call.

    Args:
        endpoint ([`Endpoint`]):
            Its address, model and decoding parameters count; the price, the time limit and the name of the key do not.
        request ([`JudgeRequest`]):
            All of it counts, images by their bytes.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    schema = None
    if request.schema is not None:
        schema = verdict_schema(request.schema, request.num_scores, request.rubric)
    identity = {
        "endpoint": endpoint.location,
        "model": endpoint.model,
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
        "schema": schema,
        "rubric": None if request.rubric is None else request.rubric.digest(),
        "messages": _with_hashed_images(request.messages),
        "sample": request.sample,
    }
    if endpoint.extra_body:
        identity["extra_body"] = dict(endpoint.extra_body)
    return digest_of(identity)


def _with_hashed_images(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_hashed_images(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_with_hashed_images(part) for part in value]
    if isinstance(value, str) and value.startswith("data:") and (content := data_uri_bytes(value)) is not None:
        return "sha256:" + digest(content)
    return value


def data_uri_bytes(uri: str) -> bytes | None:
    """The bytes of a base64 `data:` URI, or `None` if it is none."""
    head, comma, payload = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        return None
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        return None
