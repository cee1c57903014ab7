"""Style bias of preference pairs: measure it, remove it, and build pairs that have none."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


_MODULES = {
    "DISTILLED_FEATURES": "distilled_rows",
    "STYLE_FEATURES": "style",
    "BalanceReport": "balance_report",
    "DistillPlan": "distill_plan",
    "DistillReport": "distill_report",
    "StyleAuditCallback": "style_callback",
    "StyleReport": "style_report",
    "audit_style": "audit",
    "balance_style": "balance",
    "distill": "distillation",
    "match_style": "match",
    "plan_distill": "distill_plan",
    "style_features": "style",
    "style_weights": "balance",
}

__all__ = [
    "DISTILLED_FEATURES",
    "STYLE_FEATURES",
    "BalanceReport",
    "DistillPlan",
    "DistillReport",
    "StyleAuditCallback",
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
    from .audit import audit_style
    from .balance import balance_style, style_weights
    from .balance_report import BalanceReport
    from .distill_plan import DistillPlan, plan_distill
    from .distill_report import DistillReport
    from .distillation import distill
    from .distilled_rows import DISTILLED_FEATURES
    from .match import match_style
    from .style import STYLE_FEATURES, style_features
    from .style_callback import StyleAuditCallback
    from .style_report import StyleReport

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
