"""Style bias of preference pairs: measure it, remove it, and build pairs that have none.

What needs a judge loads on first use, because its libraries come with the extra `judge` alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .audit import audit_style
from .balance import balance_style, style_weights
from .balance_report import BalanceReport
from .match import match_style
from .style import STYLE_FEATURES, style_features
from .style_report import StyleReport


_MODULES = {
    "DISTILLED_FEATURES": "distilled_rows",
    "DistillPlan": "distill_plan",
    "DistillReport": "distill_report",
    "distill": "distill",
    "plan_distill": "distill_plan",
}

__all__ = [
    "DISTILLED_FEATURES",
    "STYLE_FEATURES",
    "BalanceReport",
    "DistillPlan",
    "DistillReport",
    "StyleReport",
    "audit_style",
    "balance_style",
    "distill",
    "match_style",
    "plan_distill",
    "style_features",
    "style_weights",
]

if TYPE_CHECKING:
    from .distill import distill
    from .distill_plan import DistillPlan, plan_distill
    from .distill_report import DistillReport
    from .distilled_rows import DISTILLED_FEATURES


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
