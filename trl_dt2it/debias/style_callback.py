"""Callback that audits the style of the train set; apart from the audit, which loads without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from transformers import TrainerCallback

from ..data.cards import cell, table
from ..data.columns import has_transform
from ..processes import on_main_process
from ..training.pair_scoring import evaluating
from .audit import audit_style


if TYPE_CHECKING:
    from ..training.trainer import MultimodalRewardTrainer


class StyleAuditCallback(TrainerCallback):
    """
    Audit the style of the train set of a [`MultimodalRewardTrainer`] when training begins, and log the metrics.

    They reach the trackers, as in `train/style/leakage`, the log history and the model card. The audit reads about
    5000 pairs a second. A resumed run does not repeat it.

    Args:
        trainer ([`MultimodalRewardTrainer`]):
            Trainer that the callback is added to.
        audit:
            Options of [`audit_style`], such as `features`.

    Raises:
        `ValueError`: if the train set is streamed, or a transform makes its rows.

    Example:

    ```python
    >>> from trl_dt2it.debias import StyleAuditCallback

    >>> trainer.add_callback(StyleAuditCallback(trainer))
    >>> trainer.train()
    ```
    """

    def __init__(self, trainer: MultimodalRewardTrainer, **audit: Any) -> None:
        if not isinstance(trainer.train_dataset, Dataset):
            raise ValueError("Style is audited on a whole train set, not on a streamed one; load it whole.")
        if has_transform(trainer.train_dataset):
            advice = "a transform makes its rows; apply the function with `map` instead"
            raise ValueError(f"Style is audited on the columns of the train set, and {advice}.")
        self.trainer, self.audit = trainer, audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any("style/leakage" in entry for entry in state.log_history):
            return
        train = cast(Dataset, self.trainer.train_dataset)
        metrics = on_main_process(lambda: audit_style(train, **self.audit).metrics())
        # In training, `log` would begin to gather the metrics of the steps.
        with evaluating(self.trainer.model):
            self.trainer.log(metrics)

    def model_card_section(self, trainer: MultimodalRewardTrainer) -> str | None:
        """Section of the model card on the last audit."""
        return style_section(trainer.state.log_history)


def style_section(log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """Section of a model card on the last audit in a trainer's log: leakage, also by source, and the top features."""
    last = next((entry for entry in reversed(log_history) if "style/leakage" in entry), None)
    if last is None:
        return None
    text = (
        "### Style\n\nStyle alone (length, lists, bold, hedges and the like) names the chosen answer with an AUC of "
        f"{last['style/leakage']:.3f}; 0.5 is no style bias."
    )

    def values(prefix: str) -> list[tuple[str, float]]:
        return [(cell(name.removeprefix(prefix)), value) for name, value in last.items() if name.startswith(prefix)]

    features = sorted(values("style/feature/"), key=lambda item: -abs(item[1] - 0.5))[:5]
    tables = {"source": values("style/leakage/"), "most telling feature": features}
    shown = {name: [(label, f"{value:.3f}") for label, value in lines] for name, lines in tables.items() if lines}
    return "\n\n".join([text, *(table((name, "AUC"), lines) for name, lines in shown.items())])
