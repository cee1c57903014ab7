"""One training and one scoring of a run, each of which frees its memory."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from datasets import Dataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ...debias.style_callback import StyleAuditCallback
from ...models.modeling import load_processing_class, load_reward_model
from ...models.shared_prefix import decide_share_prefix
from ...processes import on_main_process, wait_for_everyone, whole_weights
from ...scoring.shards import Score
from ...training.collator import MultimodalPreferenceCollator
from ...training.config import MultimodalRewardConfig
from ...training.pair_scoring import score_pairs
from ...training.setup import end_training, image_options
from ...training.trainer import MultimodalRewardTrainer
from ..ledger import CurationLedger
from ..publish import curation_section


# Arguments of a training that its result does not depend on.
_WITHOUT_EFFECT = (
    *("output_dir", "run_name", "seed", "data_seed", "report_to", "project", "trackio_space_id", "disable_tqdm"),
    *("logging_", "log_", "save_", "hub_", "push_to_hub", "eval_", "per_device_eval", "dataloader_", "do_"),
    *("resume_from_checkpoint", "dataset_num_proc", "restore_callback", "ddp_", "local_rank", "skip_memory"),
    *("include_num_input", "use_cpu", "gradient_checkpointing"),
)


@dataclass(frozen=True)
class RewardTraining:
    """The settings that all trainings of a run share."""

    args: MultimodalRewardConfig  # output directory and seed are replaced for each training
    init_kwargs: dict[str, Any] = field(default_factory=dict)  # of `load_reward_model`: `dtype`, `revision`, ...
    peft_config: PeftConfig | None = None
    quantization_config: BitsAndBytesConfig | None = None

    def settings(self) -> dict[str, Any]:
        """Return all settings that a trained model depends on, besides data, base model and seed."""
        given = {name: value for name, value in self.args.to_dict().items() if not name.startswith(_WITHOUT_EFFECT)}
        others = (self.peft_config, self.quantization_config)
        return {"args": given, "init": self.init_kwargs, "with": [one and one.to_dict() for one in others]}

    def num_steps(self, num_pairs: int) -> int:
        """Return the number of optimization steps on `num_pairs` pairs, on as many processes as there are now."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        # An estimate with `max_tokens_per_batch`, whose batches are not known before they are made.
        batch = self.args.train_batch_size * PartialState().num_processes
        batches = math.ceil(num_pairs / batch / self.args.gradient_accumulation_steps)
        return math.ceil(batches * self.args.num_train_epochs)

    def times_seen(self, num_pairs: int) -> float | None:
        """Return how often a fixed number of steps sees each of `num_pairs` pairs; `None` if epochs say it, or if
        batches are as large as their tokens allow."""
        if self.args.max_steps <= 0 or self.args.max_tokens_per_batch is not None or num_pairs == 0:
            return None
        batch = self.args.train_batch_size * PartialState().num_processes * self.args.gradient_accumulation_steps
        return self.args.max_steps * batch / num_pairs


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint that all processes have written; a killed run resumes from no other."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The model is saved after the last step anyway, and with `max_steps`, a run that resumes from a checkpoint of
        # the last step would take one more.
        if state.global_step >= state.max_steps:
            control.should_save = False

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        (folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / "complete").touch()
        checkpoints = sorted(_checkpoints(folder), key=lambda checkpoint: int(checkpoint.name.rsplit("-", 1)[1]))
        for checkpoint in checkpoints[: -(self.limit or len(checkpoints))]:
            _remove(checkpoint)


class LedgerSection(TrainerCallback):
    """Adds a section on the curation of the training set to the model card."""

    def __init__(self, ledger: CurationLedger) -> None:
        self.ledger = ledger

    def model_card_section(self, trainer: MultimodalRewardTrainer) -> str | None:
        return curation_section(self.ledger)


def train_model(
    folder: Path,
    dataset: Dataset,
    training: RewardTraining,
    *,
    model: str,
    seed: int,
    eval_dataset: Dataset | None = None,
    push_to_hub: bool = False,
    audit_style: bool = False,
    ledger: CurationLedger | None = None,
) -> dict[str, Any]:
    """Train a model from the start, or on from its newest whole checkpoint, and save it."""
    args = copy.deepcopy(training.args)
    args.output_dir, args.seed, args.run_name = str(folder), seed, folder.name
    args.push_to_hub = args.push_to_hub and push_to_hub
    limit, args.save_total_limit = args.save_total_limit, None
    args.max_length, args.on_bad_row, args.image_check = None, "raise", "none"  # validated once, for all trainings
    args.model_init_kwargs = {**cast("dict[str, Any]", args.model_init_kwargs or {}), **training.init_kwargs}
    checkpoint = on_main_process(lambda: newest_checkpoint(folder))
    trainer = MultimodalRewardTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=None if args.eval_strategy == "no" else eval_dataset,
        callbacks=[WholeCheckpoints(limit), *([] if ledger is None else [LedgerSection(ledger)])],
        peft_config=copy.deepcopy(training.peft_config),
        quantization_config=training.quantization_config,
    )
    if audit_style:
        trainer.add_callback(StyleAuditCallback(trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder))
    on_main_process(trainer.create_model_card)
    if args.push_to_hub:
        trainer.push_to_hub()
    counts = {"pairs": len(cast(Dataset, trainer.train_dataset)), "steps": trainer.state.global_step}
    end_training(trainer)
    del trainer
    release_memory()
    wait_for_everyone()
    if PartialState().is_main_process:
        for old in _checkpoints(folder):
            _remove(old)
    return counts


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint, and delete those that are not whole."""
    for checkpoint in _checkpoints(folder):
        if not (checkpoint / "complete").is_file():
            _remove(checkpoint)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def load_score(folder: Path, training: RewardTraining) -> Score:
    """Load a trained model onto this process's device, and score with it."""
    model, collator = _load_scorer(folder, training)
    args = training.args
    options: dict[str, Any] = {"num_workers": args.dataloader_num_workers, "show_progress": not args.disable_tqdm}
    options |= {"batch_size": args.per_device_eval_batch_size, "max_tokens_per_batch": args.max_tokens_per_batch}
    return lambda dataset, desc: score_pairs(model, dataset, collator, desc=desc, **options)


def _load_scorer(folder: Path, training: RewardTraining) -> tuple[torch.nn.Module, MultimodalPreferenceCollator]:
    args = training.args
    kwargs = {key: value for key, value in training.init_kwargs.items() if key in ("dtype", "attn_implementation")}
    with whole_weights():
        model = load_reward_model(folder, **kwargs, trust_remote_code=args.trust_remote_code, allow_new_head=False)
    collator = MultimodalPreferenceCollator(
        load_processing_class(folder, trust_remote_code=args.trust_remote_code),
        image_options=image_options(args),
        pad_to_multiple_of=cast("int | None", args.pad_to_multiple_of),
        share_prefix=decide_share_prefix(args.share_prefix, model),
    )
    return model.to(PartialState().device), collator


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def _remove(checkpoint: Path) -> None:
    (checkpoint / "complete").unlink(missing_ok=True)  # first, in case of a kill before the rest is gone
    shutil.rmtree(checkpoint)
