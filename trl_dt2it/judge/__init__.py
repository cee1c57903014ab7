"""A language model as the judge of answers: rubric, prompts, verdicts, and a client that pays for no call twice.

What needs `openai`, `pydantic` or `json-repair` loads on first use: they come with the extra `judge`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


_MODULES = {
    "DEFAULT_RUBRIC": "rubric",
    "Budget": "budget",
    "Criterion": "rubric",
    "Endpoint": "endpoint",
    "JudgeClient": "client",
    "JudgeError": "failures",
    "JudgeReply": "requests",
    "JudgeRequest": "requests",
    "ListwiseVerdict": "verdicts",
    "PairwiseVerdict": "verdicts",
    "PointwiseVerdict": "verdicts",
    "Rubric": "rubric",
    "UsageReport": "usage",
    "both_orders": "orders",
    "combine_orders": "orders",
    "image_block": "prompts",
    "listwise_messages": "prompts",
    "pairwise_messages": "prompts",
    "pointwise_messages": "prompts",
}

__all__ = [
    "DEFAULT_RUBRIC",
    "Budget",
    "Criterion",
    "Endpoint",
    "JudgeClient",
    "JudgeError",
    "JudgeReply",
    "JudgeRequest",
    "ListwiseVerdict",
    "PairwiseVerdict",
    "PointwiseVerdict",
    "Rubric",
    "UsageReport",
    "both_orders",
    "combine_orders",
    "image_block",
    "listwise_messages",
    "pairwise_messages",
    "pointwise_messages",
]

if TYPE_CHECKING:
    from .budget import Budget
    from .client import JudgeClient
    from .endpoint import Endpoint
    from .failures import JudgeError
    from .orders import both_orders, combine_orders
    from .prompts import image_block, listwise_messages, pairwise_messages, pointwise_messages
    from .requests import JudgeReply, JudgeRequest
    from .rubric import DEFAULT_RUBRIC, Criterion, Rubric
    from .usage import UsageReport
    from .verdicts import ListwiseVerdict, PairwiseVerdict, PointwiseVerdict

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
