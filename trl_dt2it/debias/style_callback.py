"""The style of a train set as a training begins, in the log and in every tracker of `report_to`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from datasets import Dataset
from transformers import TrainerCallback

from ..data.columns import has_transform
from ..training.model_card import cell, table
from ..training.pair_scoring import evaluating
from ..training.trainer import MultimodalRewardTrainer
from ..utils import on_main_process
from .audit import audit_style


class StyleAuditCallback(TrainerCallback):
    """
    Audits the style of the train set of a [`MultimodalRewardTrainer`] when training begins, and logs the figures.

    They reach the trackers that `report_to` names, as in `train/style/leakage`, the log history and the model card.
    About 5000 pairs a second are read. A run that resumes does not measure again.

    Args:
        trainer ([`MultimodalRewardTrainer`]):
            The trainer that the callback is added to.
        audit:
            Options of [`audit_style`], such as `features`.

    Raises:
        `ValueError`: if the train set is streamed.

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
            raise ValueError(
                "Style is audited on the columns of the train set, and a transform makes its rows; apply the function "
                "with `map` instead."
            )
        self.trainer = trainer
        self.audit = audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any("style/leakage" in entry for entry in state.log_history):
            return
        train = cast(Dataset, self.trainer.train_dataset)
        metrics = on_main_process(lambda: audit_style(train, **self.audit).metrics())
        # In training, `log` would begin to gather the metrics of the steps.
        with evaluating(self.trainer.model):
            self.trainer.log(metrics)

    def model_card_section(self, trainer: MultimodalRewardTrainer) -> str | None:
        """Tell the model card what the last audit found."""
        return style_section(trainer.state.log_history)


def style_facts(log_history: Sequence[Mapping[str, Any]], count: int = 5) -> dict[str, Any] | None:
    """`leakage`, `sources` and the `count` `features` that tell most, of the last audit in a trainer's log, if any."""
    last = next((entry for entry in reversed(log_history) if "style/leakage" in entry), None)
    if last is None:
        return None
    parts: dict[str, dict[str, float]] = {"style/leakage/": {}, "style/feature/": {}}
    for prefix, values in parts.items():
        values |= {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}
    features = sorted(parts["style/feature/"].items(), key=lambda item: -abs(item[1] - 0.5))[:count]
    return {
        "leakage": f"{last['style/leakage']:.3f}",
        "sources": [(cell(name), f"{value:.3f}") for name, value in parts["style/leakage/"].items()],
        "features": [(cell(name), f"{value:.3f}") for name, value in features],
    }


def style_section(log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """The section of a model card on the style of its training set; see [`style_facts`]."""
    facts = style_facts(log_history)
    if facts is None:
        return None
    text = (
        "### Style\n\nStyle alone (length, lists, bold, hedges and the like) names the chosen answer with an AUC of "
        f"{facts['leakage']}; 0.5 is no style bias."
    )
    tables = {"source": facts["sources"], "most telling feature": facts["features"]}
    return "\n\n".join([text, *(table((name, "AUC"), lines) for name, lines in tables.items() if lines)])
