"""Training the tiny VLM on a CPU, for benchmarks of what a reward model learns."""

import time

from datasets import Dataset

from trl_dt2it import MultimodalPreferenceCollator, MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.training.pair_scoring import score_pairs


# What `recipes/configs/digits.yaml` trains with, for as long as a benchmark says.
OPTIMIZATION = {
    "per_device_train_batch_size": 32,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "loss_type": "bt",
}
DIGITS_SETTINGS = {"num_train_epochs": 4, **OPTIMIZATION}


def remember_rendered() -> dict:
    """Render each pair once, a third of the time of a tiny model, and return the memory, to clear if names recur."""
    render, known = MultimodalPreferenceCollator.render, {}

    def remembered(self, example, *args, **kwargs):
        texts = [example[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
        key = example["pair_id"], example["source"], bool(example.get("images")), *texts
        if key not in known:
            known[key] = render(self, example, *args, **kwargs)
        return known[key]

    MultimodalPreferenceCollator.render = remembered
    return known


def tiny_config(output_dir: str, seed: int, settings: dict) -> MultimodalRewardConfig:
    """The configuration of a training on a CPU, of which nothing is saved."""
    return MultimodalRewardConfig(
        output_dir=output_dir,
        seed=seed,
        per_device_eval_batch_size=100,
        image_check="none",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
        report_to="none",
        **settings,
    )


def tiny_trainer(
    model: str,
    rows: Dataset,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    output_dir: str,
    seed: int,
    settings: dict,
) -> MultimodalRewardTrainer:
    """
    The trainer that [`fit`] uses.

    Args:
        model, rows, output_dir, seed, settings:
            As in [`fit`].
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Held-out rows.

    Returns:
        `MultimodalRewardTrainer`
    """
    args = tiny_config(output_dir, seed, settings)
    return MultimodalRewardTrainer(model=model, args=args, train_dataset=rows, eval_dataset=eval_dataset)


def fit(
    model: str,
    rows: Dataset,
    eval_sets: dict[str, Dataset],
    output_dir: str,
    seed: int,
    settings: dict,
    save: bool = False,
    scored: Dataset | None = None,
) -> dict:
    """
    Trains and evaluates.

    Args:
        model (`str`):
            Directory of the model.
        rows (`Dataset`):
            Rows to train on.
        eval_sets (`dict[str, Dataset]`):
            Held-out rows by name.
        output_dir (`str`):
            Folder to write into.
        seed (`int`):
            Seed of the training.
        settings (`dict`):
            Further arguments of `MultimodalRewardConfig`.
        save (`bool`, *optional*, defaults to `False`):
            Whether to save the model and its processor into the folder.
        scored (`Dataset`, *optional*):
            Rows to score with the trained model.

    Returns:
        `dict`: `accuracies` by name of the held-out set, `train_seconds`, `steps`, and `rewards` of scored rows, of
        shape `(N, 2)`.
    """
    trainer = tiny_trainer(model, rows, eval_sets or None, output_dir, seed, settings)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate() if eval_sets else {}
    if save:
        trainer.save_model()
    rewards = None
    if scored is not None:
        rewards = score_pairs(trainer.model, scored, trainer.data_collator, batch_size=100, show_progress=False)
    trainer.end()
    return {
        "rewards": rewards,
        "accuracies": {name: metrics[f"eval_{name}_accuracy"] for name in eval_sets},
        "train_seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
    }
