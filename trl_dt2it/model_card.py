"""The model card, filled from the run, and pushing the model without the rest of the output directory."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence, Sized
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData, upload_file, upload_folder
from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin
from trl import RewardTrainer

from .card_facts import (
    code_block,
    code_span,
    evaluation_entries,
    hub_ids,
    hub_link,
    metadata,
    name_cell,
    run_command,
    source_counts,
    source_lines,
)
from .losses import loss_name
from .reward_config import MultimodalRewardConfig
from .utils import on_main_process, whole_file


PROJECT_URL = "https://pypi.org/project/trl-dt2it"

PAPER: dict[str, str] = {
    "title": "DT2IT-MRM: Debiased Preference Construction and Iterative Training for Multimodal Reward Modeling",
    "id": "2604.19544",
    "citation": """\
@article{zhang2026dt2it,
    title         = {{DT2IT-MRM: Debiased Preference Construction and Iterative Training for Multimodal Reward
                     Modeling}},
    author        = {Zhang, Zhihong and Zhao, Jie and Huang, Xiaojian and Xu, Jin and Luo, Zhuodong and Liu, Xin and
                     Wei, Jiansheng and Chen, Xuejin},
    journal       = {arXiv preprint arXiv:2604.19544},
    year          = {2026},
}""",
}

TRL_CITATION = """\
@software{vonwerra2020trl,
    title   = {{TRL: Transformers Reinforcement Learning}},
    author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
               Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
    license = {Apache-2.0},
    url     = {https://github.com/huggingface/trl},
    year    = {2020},
}"""

# What makes up a model on the Hub: weights, configuration, processor, tokenizer and card. No pickle is among them.
MODEL_FILES = [
    "README.md",
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    "reward_statistics.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]
_NESTED = ["checkpoint-*/*", "_*/*"]  # a pattern such as `*.safetensors` reaches into folders too


def write_model_card(
    trainer: RewardTrainer,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """
    Writes the card of a trainer's model to `README.md` in its output directory.

    A callback of the trainer may have a method `model_card_section(trainer)` that gives a section of Markdown on the
    data, or `None`.

    Args:
        trainer ([`MultimodalRewardTrainer`]):
            The trainer, before, in or after training.
        model_name (`str`, *optional*):
            Heading of the card; by default the name of the output directory.
        dataset_name (`str`, *optional*):
            Hub id of the training set; by default those of the public sets among its sources.
        tags (`Sequence[str]`, *optional*):
            Tags of the card besides those of the trainer.
    """
    output_dir = Path(cast(str, trainer.args.output_dir))  # `__post_init__` replaces None
    model_name = model_name or output_dir.name
    name_or_path = cast(PreTrainedModel, trainer.model).config._name_or_path
    base_model = name_or_path if name_or_path and not os.path.isdir(name_or_path) else None
    metrics, counts = last_evaluation(trainer.state.log_history), source_counts(trainer.train_dataset)
    asked = [getattr(one, "model_card_section", None) for one in trainer.callback_handler.callbacks]
    sections = [ask(trainer) for ask in asked if ask is not None]
    hub_model_id = cast(str, trainer.hub_model_id or trainer.args.hub_model_id or trainer.args.output_dir)
    card_data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name or hub_ids(list(counts)) or None,
        library_name="peft" if is_peft_model(trainer.model) else "transformers",
        pipeline_tag="text-classification",
        tags=metadata(list(dict.fromkeys(["generated_from_trainer", *trainer._tag_names, *tags]))),
        model_name=metadata(model_name),
        eval_results=evaluation_entries(metrics, dataset_name, trainer.eval_dataset) or None,
    )
    command = run_command(trainer.accelerator.num_processes)
    card = ModelCard.from_template(
        card_data,
        template_path=str(files("trl_dt2it").joinpath("templates/model_card.md")),
        base_model=base_model and hub_link(base_model),
        citation=PAPER["citation"],
        command=command and code_block(command, "bash"),
        dataset_name=dataset_name and hub_link(dataset_name, "datasets/"),
        hub_model_id=hub_model_id,
        is_adapter=is_peft_model(trainer.model),
        is_multimodal=isinstance(trainer.processing_class, ProcessorMixin),
        metrics=[(name_cell(name), f"{value:.4g}") for name, value in metrics.items()],
        model_name=name_cell(model_name),
        project_url=PROJECT_URL,
        sections=[section for section in sections if section],
        serve=code_span(f"vllm serve {shlex.quote(hub_model_id)} --runner pooling"),
        sources=source_lines(counts),
        training=_training_figures(trainer),
        trl_citation=TRL_CITATION,
        versions=[(name, version(name)) for name in ("trl-dt2it", "trl", "transformers", "torch", "datasets")],
        **_tracker_urls(),
    )
    with whole_file(output_dir / "README.md") as part:
        card.save(part)


def last_evaluation(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The newest value of each evaluation metric in a trainer's log, without the timings."""
    metrics: dict[str, float] = {}
    for entry in log_history:
        metrics.update({name: value for name, value in entry.items() if name.startswith("eval_")})
    skipped = ("_runtime", "_per_second", "_num_tokens")
    return {name: value for name, value in metrics.items() if not name.endswith(skipped)}


def push_model(
    trainer: RewardTrainer,
    *,
    commit_message: str | None,
    blocking: bool,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    model_name: str | None = None,
    **card: Any,
) -> Any:
    """Saves a trainer's model, writes its card and uploads `MODEL_FILES`; see [`MultimodalRewardTrainer.push_to_hub`].

    Trainer's own uploads the whole output directory, pickled training arguments (with tokens in clear) included."""
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    token = token or trainer.args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    uploads: list[Any] = []

    def push() -> None:
        repo_id = cast(str, trainer.hub_model_id)  # set by `init_hf_repo`
        trainer.create_model_card(model_name=model_name or repo_id.split("/")[-1], **card)
        trainer._finish_current_push()
        upload = upload_folder(
            repo_id=repo_id,
            folder_path=cast(str, trainer.args.output_dir),
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


def push_checkpoint(trainer: RewardTrainer, checkpoint: str) -> list[Any]:
    """
    Uploads the model files of a checkpoint, and the card, without waiting.

    Args:
        trainer ([`MultimodalRewardTrainer`]):
            The trainer; its `hub_strategy` says whether the checkpoint itself goes up too.
        checkpoint (`str`):
            Folder of the checkpoint.

    Returns:
        `list`: a future for each upload.
    """
    hub: dict[str, Any] = {
        "repo_id": trainer.hub_model_id,
        "token": trainer.args.hub_token,
        "revision": trainer.args.hub_revision,
        "run_as_future": True,
        "commit_message": f"Training in progress, step {trainer.state.global_step}",
    }
    jobs = [upload_folder(folder_path=checkpoint, allow_patterns=MODEL_FILES, **hub)]
    card = Path(cast(str, trainer.args.output_dir)) / "README.md"
    if card.is_file():
        jobs.append(upload_file(path_or_fileobj=card, path_in_repo="README.md", **hub))
    if trainer.args.hub_strategy in ("checkpoint", "all_checkpoints"):
        # Asked for in so many words: optimizer and scheduler go up, to resume from. Secrets do not.
        path = "last-checkpoint" if trainer.args.hub_strategy == "checkpoint" else Path(checkpoint).name
        jobs.append(
            upload_folder(folder_path=checkpoint, path_in_repo=path, ignore_patterns=["training_args.bin"], **hub)
        )
    return jobs


def _training_figures(trainer: RewardTrainer) -> list[tuple[str, str]]:
    args = cast(MultimodalRewardConfig, trainer.args)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    figures = [
        ("loss", code_span(loss_name(getattr(trainer, "loss_type", args.loss_type)))),
        ("pairs a step", str(batch) if args.max_tokens_per_batch is None else "as many as fit the tokens of a batch"),
        ("epochs", f"{trainer.state.epoch or args.num_train_epochs:g}"),
        ("optimiser steps", str(trainer.state.global_step)),
        ("learning rate", f"{args.learning_rate:g}, {str(args.lr_scheduler_type).split('.')[-1].lower()}"),
        ("warm-up", f"{args.warmup_steps:g}" + (" of all steps" if 0 < args.warmup_steps < 1 else " steps")),
        ("weight decay", f"{args.weight_decay:g}"),
        ("precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"),
        ("seed", str(args.seed)),
    ]
    if is_peft_model(trainer.model):
        config = cast(PreTrainedModel, trainer.model).peft_config["default"]
        rank = f", rank {config.r}" if isinstance(config, LoraConfig) else ""
        figures.append(("adapters", config.peft_type.value + rank))
    limits = ("max_length", "max_pixels", "max_tokens_per_batch")
    figures += [(name.replace("_", " "), f"{getattr(args, name):,}") for name in limits if getattr(args, name)]
    try:
        figures.insert(1, ("pairs", f"{len(cast(Sized, trainer.train_dataset)):,}"))
    except TypeError:  # a streamed set
        pass
    last = next((entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), None)
    if last is not None:
        figures.append(("training loss, mean", f"{last['train_loss']:.4f}"))
        figures.append(("training time", f"{last['train_runtime']:.0f} s"))
    frozen = [part for part in ("vision_tower", "projector") if getattr(args, f"freeze_{part}")]
    if frozen:
        figures.append(("frozen", ", ".join(part.replace("_", " ") for part in frozen)))
    return figures


def _tracker_urls() -> dict[str, str | None]:
    from transformers import is_wandb_available
    from trl.trainer.utils import get_trackio_space_url

    wandb_url = None
    if is_wandb_available():
        import wandb

        wandb_url = wandb.run.url if wandb.run is not None else None
    return {"wandb_url": wandb_url, "trackio_url": get_trackio_space_url()}
