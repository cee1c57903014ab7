"""The style of a train set as a training begins, in the log and in every tracker of `report_to`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from transformers import TrainerCallback

from ..data.encoded import has_transform
from ..pair_scoring import evaluating
from ..processes import on_main_process
from .audit import audit_style


if TYPE_CHECKING:
    from ..reward_trainer import MultimodalRewardTrainer


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
