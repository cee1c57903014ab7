r"""Train a multimodal reward model with TRL, from a command line or a YAML file.

    # Real handwriting, in two minutes on 2 cores
    trl-dt2it train --config digits

    # Your own pairs
    trl-dt2it train --model_name_or_path Qwen/Qwen3-VL-2B-Instruct --dataset_name pairs.jsonl \
        --image_root photos --output_dir reward-model

    # What that would do
    trl-dt2it train --model_name_or_path Qwen/Qwen3-VL-2B-Instruct --dataset_name pairs.jsonl \
        --image_root photos --output_dir reward-model --dry_run

    # LoRA on one GPU
    trl-dt2it train --config qwen3_vl_8b_lora

    # 8 GPUs
    trl-dt2it train --config qwen3_vl_8b --accelerate_config deepspeed_zero2

Flags of the command line override the YAML file. A key that no option has is an error.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from trl_dt2it import MultimodalRewardConfig
from trl_dt2it.processes import on_main_process, run_lock, whole_weights
from trl_dt2it.recipe import DIGITS, init_kwargs, show_dry_run, show_paths, with_tiny
from trl_dt2it.utils import from_json, write_json


# Flags that `trl-dt2it train --help` shows.
MAIN_FLAGS = (
    *("model_name_or_path", "dataset_name", "dataset_train_split", "dataset_test_split", "image_root"),
    *("output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "loss_type", "max_length", "max_pixels", "on_bad_row"),
    *("freeze_vision_tower", "use_peft", "resume_from_checkpoint", "max_train_pairs", "dry_run"),
)
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class RewardScriptArguments(ScriptArguments):
    """
    Arguments of this script, besides TRL's [`~trl.ScriptArguments`].

    Parameters:
        max_train_pairs (`int`, *optional*):
            Trains on the first so many rows only.
        digits (`dict`, *optional*):
            Options of [`trl_dt2it.demo.digits.make_digits`] for `dataset_name: digits`, such as
            `{num_digits: [1, 2], noise: 0.2, noise_kind: hard}`; of these, noise, style and shortcuts are planted in
            the train split only.
        audit_style (`bool`, *optional*, defaults to `False`):
            Whether to audit the style of the train set when training begins, for the trackers and the model card.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to say only what would be read, trained and written.
    """

    max_train_pairs: int | None = field(default=None, metadata={"help": "Train on the first so many rows only."})
    digits: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the digits set, as a mapping or as JSON."}
    )
    num_train_pairs: int = field(default=4000, metadata={"help": "Number of train pairs of the digits set."})
    num_eval_pairs: int = field(default=1000, metadata={"help": "Number of held-out pairs of the digits set."})
    audit_style: bool = field(default=False, metadata={"help": "Audit the style of the train set."})
    dry_run: bool = field(default=False, metadata={"help": "Say only what would be read, trained and written."})


def load_data(script_args, dataset_args, seed):
    """Load the splits, by name."""
    from datasets import load_dataset, load_from_disk
    from trl import get_dataset

    if script_args.dataset_name == DIGITS:
        from trl_dt2it.demo.digits import make_digits

        options = from_json(script_args.digits) or {}
        clean = {name: value for name, value in options.items() if name not in ("noise", "noise_kind", "style_bias")}
        clean |= {"shortcut_strength": 0.5} if "shortcut" in clean else {}
        return {
            script_args.dataset_train_split: make_digits("train", script_args.num_train_pairs, seed=seed, **options),
            script_args.dataset_test_split: make_digits("test", script_args.num_eval_pairs, seed=seed, **clean),
        }
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    if not name:
        raise ValueError("Give `dataset_name` (a Hub id, a directory or a file), or a mixture under `datasets`.")
    if (builder := FILE_BUILDERS.get(Path(name).suffix)) is not None:
        if not Path(name).is_file():
            raise ValueError(f"`dataset_name` is {name}, but there is no such file.")
        return load_dataset(builder, data_files=name, streaming=streaming)
    if (Path(name) / "dataset_dict.json").is_file():
        return load_from_disk(name)
    return load_dataset(name, name=script_args.dataset_config, streaming=streaming)


def main(script_args, training_args, model_args, dataset_args):
    if script_args.dry_run:
        if PartialState().is_main_process:  # which alone has to read for it
            plan(script_args, training_args, model_args, dataset_args)
        return
    with run_lock(training_args.output_dir):
        train(script_args, training_args, model_args, dataset_args)


def train(script_args, training_args, model_args, dataset_args):
    """Train, save, measure and report."""
    from trl import get_peft_config, get_quantization_config

    from trl_dt2it import MultimodalRewardTrainer
    from trl_dt2it.debias import StyleAuditCallback

    model = with_tiny(model_args.model_name_or_path, training_args.output_dir, training_args.seed)
    training_args.model_init_kwargs = init_kwargs(model_args, training_args)
    dataset = load_data(script_args, dataset_args, training_args.seed)
    train_dataset = dataset[script_args.dataset_train_split]
    if script_args.max_train_pairs is not None:
        train_dataset = train_dataset.take(script_args.max_train_pairs)
    # Held-out pairs are evaluated at the end in any case, and during training by `eval_strategy`.
    eval_dataset = dataset.get(script_args.dataset_test_split)

    trainer = MultimodalRewardTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.audit_style:
        trainer.add_callback(StyleAuditCallback(trainer))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    train_seconds = time.perf_counter() - start
    # First of all: what fails from here on does not cost the training. The push comes at the end.
    trainer.save_model(training_args.output_dir, _internal_call=True)
    metrics = trainer.evaluate() if eval_dataset is not None else {}

    # A card can link to a set on the Hub only.
    hub_dataset = script_args.dataset_name
    if hub_dataset is not None and ("/" not in hub_dataset or Path(hub_dataset).exists()):
        hub_dataset = None

    def finish():
        trainer.create_model_card(dataset_name=hub_dataset)
        summary = {
            "model_dir": training_args.output_dir,
            "base_model": model_args.model_name_or_path,
            "dataset": script_args.dataset_name,
            "seed": training_args.seed,
            "loss_type": trainer.loss_type,
            "train_seconds": round(train_seconds, 1),
            "steps": trainer.state.global_step,
            **{name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_per_second"))},
        }
        path = Path(training_args.output_dir) / "summary.json"
        write_json(path, summary)
        if eval_dataset is not None and not script_args.dataset_streaming and not model_args.use_peft:
            summary["example"] = score_again(trainer)
            write_json(path, summary)
        report(summary, path)

    on_main_process(finish)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_dataset)
    trainer.end()


def plan(script_args, training_args, model_args, dataset_args):
    """Show what would be done; the Hub is asked for the number of rows, and none is downloaded."""
    from datasets import get_dataset_config_info

    name, split = script_args.dataset_name, script_args.dataset_train_split
    if name and name != DIGITS and Path(name).suffix not in FILE_BUILDERS and not Path(name).exists():
        known = get_dataset_config_info(name, script_args.dataset_config).splits or {}
        splits = (split, script_args.dataset_test_split)
        counts = {key: known[key].num_examples if key in known else None for key in splits}
        columns = None
    else:
        dataset = load_data(script_args, dataset_args, training_args.seed)
        is_counted = not (script_args.dataset_streaming or dataset_args.streaming)
        counts = {key: len(rows) if is_counted else None for key, rows in dataset.items()}
        columns = ", ".join(dataset[split].column_names or ["not known before it streams"])
    pairs = counts[split]
    if script_args.max_train_pairs is not None and pairs is not None:
        pairs = min(pairs, script_args.max_train_pairs)
    batch = training_args.train_batch_size * training_args.world_size * training_args.gradient_accumulation_steps
    steps = training_args.max_steps if training_args.max_steps > 0 else None
    if steps is None and pairs is not None and training_args.max_tokens_per_batch is None:
        steps = math.ceil(math.ceil(pairs / batch) * training_args.num_train_epochs)
    show_dry_run(
        [
            ("base model", model_args.model_name_or_path),
            ("trains", "LoRA adapters and the head" if model_args.use_peft else "the weights"),
            ("reads", name or "a mixture"),
            *((f"rows, {key}", "not known" if count is None else count) for key, count in counts.items()),
            ("trains on", pairs),
            ("columns", columns),
            ("pairs a step", f"{batch:,} on {training_args.world_size} processes"),
            ("steps at most", steps),
            ("writes", training_args.output_dir),
        ]
    )


def score_again(trainer):
    """Reload the saved model as a user would, whole and on this process alone, and score one held-out pair."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoProcessor

    from trl_dt2it import MultimodalPreferenceCollator

    row, model_dir = trainer.eval_dataset[0], trainer.args.output_dir  # checked by the trainer, images still encoded
    with whole_weights():
        model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    processor = AutoProcessor.from_pretrained(model_dir)
    batch = MultimodalPreferenceCollator(processor, image_options=trainer.data_collator.image_options)([row])
    del batch["pairs"]
    with torch.no_grad():
        rewards = model(**batch).logits[:, 0].tolist()
    example = {}
    for side, reward in zip(("chosen", "rejected"), rewards, strict=True):
        answer = row[side] if isinstance(row[side], str) else row[side][-1]["content"]
        example |= {side: answer if isinstance(answer, str) else answer[0]["text"], f"{side}_reward": reward}
    return example


def report(summary, path):
    """Print how it went, and where everything is."""
    table = Table(title="Reward model trained", show_header=False)
    if "eval_accuracy" in summary:
        table.add_row("held-out pair accuracy", f"{summary['eval_accuracy']:.4f}")
    seconds, steps = f"{summary['train_seconds']:.0f} s", f"{summary['steps']} steps"
    table.add_row("training", f"{seconds}, {steps}, loss {summary['loss_type']}")
    if (example := summary.get("example")) is not None:
        for side in ("chosen", "rejected"):
            table.add_row(f"reloaded, {side}", f"{example[f'{side}_reward']:+.3f}  {example[side]}")
    Console().print(table)
    show_paths({"Model, processor and card": path.parent, "Figures": path}, Console())


def make_parser():
    # Without `allow_abbrev=False`, `--learning_rat` would be taken for `--learning_rate`.
    parts = (RewardScriptArguments, MultimodalRewardConfig, ModelConfig, DatasetMixtureConfig)
    return TrlParser(parts, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
