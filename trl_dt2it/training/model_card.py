"""The model card, the Markdown of all cards and reports, and the push to the Hub."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence, Sized
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard, ModelCardData, upload_file, upload_folder
from peft import LoraConfig
from transformers import ProcessorMixin, is_wandb_available
from trl.trainer.utils import get_trackio_space_url

from ..data import cards
from ..processes import on_main_process
from ..utils import whole_file
from .config import MultimodalRewardConfig, Trainer
from .losses import loss_name


# The files of a model on the Hub: weights, configuration, processor, tokenizer and card; no pickle.
MODEL_FILES = [
    *("README.md", "*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"),
    *("reward_statistics.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
]

_NESTED = ["checkpoint-*/*", "_*/*"]  # a pattern such as `*.safetensors` reaches into folders too


def evaluation_entries(
    metrics: Mapping[str, float], dataset_name: str | None, eval_dataset: object = None
) -> list[EvalResult]:
    """Make the metadata of each evaluation set's accuracy, from metrics under the trainer's names."""
    # A set may have `title` and `hub_id` in its `info`. A single set is taken for pairs held out of `dataset_name`.
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {}
    entries = []
    for key in (key for key in metrics if key.endswith("_accuracy")):
        name = cards.metadata(key.removeprefix("eval_").removesuffix("accuracy").rstrip("_"))
        info = getattr(sets.get(name), "info", None)
        entry = EvalResult(
            task_type="text-classification",
            task_name="Reward modeling",
            dataset_type=getattr(info, "hub_id", None) or name or dataset_name or "held-out-pairs",
            dataset_name=getattr(info, "title", None) or name or dataset_name or "held-out pairs",
            metric_type="accuracy",
            metric_name="pair accuracy",
            metric_value=round(metrics[key], 4),
        )
        entries.append(entry)
    return entries


def write_model_card(
    trainer: Trainer, *, model_name: str | None = None, dataset_name: str | None = None, tags: Sequence[str] = ()
) -> None:
    """Write the card of a trainer's model, with the `model_card_section(trainer)` of each callback that has one."""
    output_dir = Path(trainer.args.output_dir)  # `__post_init__` replaces None
    model_name = model_name or output_dir.name
    name_or_path = trainer.model.config._name_or_path
    base_model = name_or_path if name_or_path and not os.path.isdir(name_or_path) else None
    logged = (item for entry in trainer.state.log_history for item in entry.items() if item[0].startswith("eval_"))
    timings = ("_runtime", "_per_second", "_num_tokens")
    metrics = {name: value for name, value in logged if not name.endswith(timings)}  # the newest value of each
    counts = cards.source_counts(trainer.train_dataset)
    callbacks = trainer.callback_handler.callbacks
    sections = [one.model_card_section(trainer) for one in callbacks if hasattr(one, "model_card_section")]
    hub_model_id = trainer.hub_model_id or trainer.args.hub_model_id or trainer.args.output_dir
    card_data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name or cards.hub_ids(list(counts)) or None,
        library_name="peft" if is_peft_model(trainer.model) else "transformers",
        pipeline_tag="text-classification",
        tags=cards.metadata(list(dict.fromkeys(["generated_from_trainer", *trainer._tag_names, *tags]))),
        model_name=cards.metadata(model_name),
        eval_results=evaluation_entries(metrics, dataset_name, trainer.eval_dataset) or None,
    )
    command = cards.run_command(trainer.accelerator.num_processes)
    run = import_module("wandb").run if is_wandb_available() else None
    card = ModelCard.from_template(
        card_data,
        template_path=str(files("trl_dt2it").joinpath("templates/model_card.md")),
        base_model=base_model and cards.hub_link(base_model),
        citation=cards.PAPER["citation"],
        command=command and cards.code_block(command, "bash"),
        dataset_name=dataset_name and cards.hub_link(dataset_name, "datasets/"),
        hub_model_id=hub_model_id,
        is_adapter=is_peft_model(trainer.model),
        is_multimodal=isinstance(trainer.processing_class, ProcessorMixin),
        metrics=[(cards.name_cell(name), f"{value:.4g}") for name, value in metrics.items()],
        model_name=cards.name_cell(model_name),
        project_url=cards.PROJECT_URL,
        sections=list(filter(None, sections)),
        serve=cards.code_span(f"vllm serve {shlex.quote(hub_model_id)} --runner pooling"),
        sources=cards.source_lines(counts),
        training=_training_figures(trainer),
        versions=[(name, version(name)) for name in ("trl-dt2it", "trl", "transformers", "torch", "datasets")],
        wandb_url=run and run.url,
        trackio_url=get_trackio_space_url(),
    )
    with whole_file(output_dir / "README.md") as part:
        card.save(part)


def push_model(
    trainer: Trainer,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    *,
    model_name: str | None = None,
    **card: Any,
) -> Any:
    """Save a trainer's model, write its card and upload `MODEL_FILES`; see [`MultimodalRewardTrainer.push_to_hub`]."""
    # transformers uploads the whole output directory, pickled training arguments (with tokens in clear) included.
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    token = token or trainer.args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    uploads: list[Any] = []

    def push() -> None:
        repo_id = trainer.hub_model_id  # set by `init_hf_repo`
        trainer.create_model_card(model_name=model_name or repo_id.split("/")[-1], **card)
        trainer._finish_current_push()
        upload = upload_folder(
            repo_id=repo_id,
            folder_path=trainer.args.output_dir,
            commit_message=commit_message,
            token=token,
            revision=revision or trainer.args.hub_revision,
            run_as_future=cast(Any, not blocking),  # annotated for the two constants alone
            allow_patterns=MODEL_FILES,
            ignore_patterns=_NESTED,
        )
        uploads.append(upload)  # a future cannot be sent to the other processes

    on_main_process(push)
    return uploads[0] if uploads else None


def push_checkpoint(trainer: Trainer, checkpoint: str) -> list[Any]:
    """Upload the model files of a checkpoint, and the card, without waiting."""
    args = trainer.args
    hub: dict[str, Any] = {"repo_id": trainer.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
    hub |= {"run_as_future": True, "commit_message": f"Training in progress, step {trainer.state.global_step}"}
    jobs = [upload_folder(folder_path=checkpoint, allow_patterns=MODEL_FILES, **hub)]
    card = Path(args.output_dir) / "README.md"
    if card.is_file():
        jobs.append(upload_file(path_or_fileobj=card, path_in_repo="README.md", **hub))
    if args.hub_strategy in ("checkpoint", "all_checkpoints"):
        # Requested explicitly: optimizer and scheduler are uploaded, to resume from. Secrets are not.
        hub["path_in_repo"] = "last-checkpoint" if args.hub_strategy == "checkpoint" else Path(checkpoint).name
        jobs.append(upload_folder(folder_path=checkpoint, ignore_patterns=["training_args.bin"], **hub))
    return jobs


def _training_figures(trainer: Trainer) -> list[tuple[str, str]]:
    args: MultimodalRewardConfig = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    loss = cards.code_span(loss_name(getattr(trainer, "loss_type", args.loss_type)))
    if args.blind_offset or args.blind_weighting:
        loss += ", beside blind margins" if args.blind_offset else ", weighted by blind margins"
        if args.blind_model is not None:
            loss += f" of {cards.code_span(args.blind_model)}, which is trained beside without images"
    figures = [
        ("loss", loss),
        ("pairs a step", str(batch) if args.max_tokens_per_batch is None else "as many as fit the tokens of a batch"),
        ("epochs", f"{trainer.state.epoch or args.num_train_epochs:g}"),
        ("optimizer steps", str(trainer.state.global_step)),
        ("learning rate", f"{args.learning_rate:g}, {str(args.lr_scheduler_type).split('.')[-1].lower()}"),
        ("warm-up", f"{args.warmup_steps:g}" + (" of all steps" if 0 < args.warmup_steps < 1 else " steps")),
        ("weight decay", f"{args.weight_decay:g}"),
        ("precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"),
        ("seed", str(args.seed)),
    ]
    if is_peft_model(trainer.model):
        config = trainer.model.peft_config["default"]
        rank = f", rank {config.r}" if isinstance(config, LoraConfig) else ""
        figures.append(("adapters", config.peft_type.value + rank))
    limits = ("max_length", "max_pixels", "max_tokens_per_batch")
    figures += [(name.replace("_", " "), f"{getattr(args, name):,}") for name in limits if getattr(args, name)]
    if isinstance(trainer.train_dataset, Sized):  # not streamed
        figures.insert(1, ("pairs", f"{len(trainer.train_dataset):,}"))
    last = next((entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), None)
    if last is not None:
        figures.append(("training loss, mean", f"{last['train_loss']:.4f}"))
        figures.append(("training time", f"{last['train_runtime']:.0f} s"))
    if frozen := [part for part in ("vision_tower", "projector") if getattr(args, f"freeze_{part}")]:
        figures.append(("frozen", ", ".join(frozen).replace("_", " ")))
    return figures
