"""Trainings of eleven pairs with the callback, a scorer that says what it is told, and what came out of them."""

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_dt2it.curation import Flip, IterativeCurationCallback, Keep, flip_negative

from ..rows import make_dataset
from ..trainers import trainer_for, weights


N = 11
BY_TOKENS = {"max_tokens_per_batch": 400}


def keep_all(strength):
    return np.ones(len(strength), dtype=bool)


def data(**columns) -> Dataset:
    return make_dataset(
        N,
        **{
            "strength": [float(i % 5) for i in range(N)],
            "pair_id": [f"pair-{i}" for i in range(N)],
            "row_index": list(range(N)),
            **columns,
        },
    )


class Known:
    """A scorer that says what it is told, by `row_index`, and counts how often it is asked."""

    def __init__(self, *strengths: list[float]):
        self.strengths = strengths
        self.asked: list[list[int]] = []

    def __call__(self, dataset: Dataset) -> np.ndarray:
        rows = dataset["row_index"][:]
        strength = self.strengths[min(len(self.asked), len(self.strengths) - 1)]
        self.asked.append(rows)
        torch.rand(3)  # a scorer that draws must not disturb the training
        np.random.rand(3)
        return np.array([[strength[row], 0.0] for row in rows])


def trained(folder, dataset=None, args=None, resume=None, record=None, lora=False, **curation):
    """A trainer after its training; with arguments for the callback, if there are any."""
    # TRL turns dropout off by default; with it, a step depends on the random state.
    args = {"num_train_epochs": 3, "gradient_checkpointing": False, "disable_dropout": not lora, **(args or {})}
    extra = {"peft_config": LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"])} if lora else {}
    trainer = trainer_for("qwen3_vl", folder, dataset or data(), args, **extra)
    if curation:
        trainer.add_callback(IterativeCurationCallback(trainer, **curation))
    if record is not None:
        compute_loss = trainer.compute_loss

        def recording(model, inputs, *rest, **options):
            record.append((inputs["pairs"]["row_index"].tolist(), inputs["pairs"]["weight"].tolist()))
            return compute_loss(model, inputs, *rest, **options)

        trainer.compute_loss = recording
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def callback_of(trainer) -> IterativeCurationCallback:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, IterativeCurationCallback))


def log_of(trainer) -> list[dict]:
    """All that was logged in training, but for curation and times."""
    kept = [e for e in trainer.state.log_history if "curation/kept" not in e and "train_runtime" not in e]
    assert kept
    return kept


def without_tokens(log: list[dict]) -> list[dict]:
    """TRL counts tokens from where it resumes."""
    return [{name: value for name, value in entry.items() if name != "num_tokens"} for entry in log]


def rounds_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "curation/kept" in entry]


def assert_same_weights(one, other):
    for name, value in weights(other).items():
        assert torch.equal(weights(one)[name], value), name


RULES = [Flip(flip_negative), Keep(lambda strength: strength > 0.02)]
