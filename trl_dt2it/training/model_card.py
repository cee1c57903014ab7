"""The model card, the Markdown of all cards and reports, and the push to the Hub."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData, upload_file, upload_folder
from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin, is_wandb_available
from trl import RewardTrainer
from trl.trainer.utils import get_trackio_space_url

from ..data.columns import column_of
from ..data.sources import SOURCES
from ..utils import on_main_process, printable, whole_file, without_secrets
from .config import MultimodalRewardConfig
from .losses import loss_name


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

# The files of a model on the Hub: weights, configuration, processor, tokenizer and card; no pickle.
MODEL_FILES = [
    *("README.md", "*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"),
    *("reward_statistics.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
]

_NESTED = ["checkpoint-*/*", "_*/*"]  # a pattern such as `*.safetensors` reaches into folders too


def cell(text: object) -> str:
    """Escape text from a data set as a cell of a Markdown table."""
    plain = printable(text, instead=" ")
    return "".join(f"\\{char}" if char in "\\`*_[]|<>#~$&" else char for char in plain)


def name_cell(text: object) -> str:
    """Escape a name such as `eval_accuracy` as a cell; an underscore within a word is no markup."""
    return re.sub(r"(?<=[^\W_])\\_(?=[^\W_])", "_", cell(text))


def paragraph(text: object) -> str:
    """Escape text from a data set at the beginning of a line of Markdown, where it could start a list or a rule."""
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", cell(text).strip())


def code_span(text: object) -> str:
    """Quote text from a data set as code within a line of Markdown, outside of tables."""
    plain = printable(text, instead=" ").strip()
    ticks = _fence(plain, 1)
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{plain}{space}{ticks}" if plain else ""


def code_block(text: str, language: str) -> str:
    """Quote lines as a code block of Markdown that none of them ends."""
    lines = "\n".join(printable(line, instead=" ") for line in text.splitlines())
    ticks = _fence(lines, 3)
    return f"{ticks}{language}\n{lines}\n{ticks}"


def _fence(text: str, least: int) -> str:
    return "`" * max([least, *(len(ticks) + 1 for ticks in re.findall("`+", text))])


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table of cells that are Markdown already."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def hub_link(repo_id: str, kind: str = "") -> str:
    """Link to a repository on the Hub; `kind` is `"datasets/"` for a data set."""
    return f"[{cell(repo_id)}](https://huggingface.co/{kind}{quote(repo_id, safe='/')})"


def metadata(value: Any) -> Any:
    """Replace in text for a card's metadata what YAML cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\x85", "\n")  # which YAML reads as a line break
    return list(map(metadata, value)) if isinstance(value, list) else value


def source_counts(dataset: Any) -> dict[str, int]:
    """Count the pairs of each source, most frequent first."""
    if not isinstance(dataset, Dataset) or len(dataset) == 0:
        return {}
    if "source" not in dataset.column_names:
        return {"": len(dataset)}
    names = column_of(dataset, "source").fill_null("").to_pylist()
    return dict(Counter(names).most_common())


def licence_of(source: str, licences: Mapping[str, str] | None = None) -> str:
    """Return the license of a source."""
    known = SOURCES[source].licence if source in SOURCES else "unknown"
    return (licences or {}).get(source, known)


def hub_ids(sources: Sequence[str]) -> list[str]:
    """Return the Hub ids of the public sets among some sources."""
    ids = (SOURCES[name].hub_id for name in sources if name in SOURCES)
    return list(dict.fromkeys(filter(None, ids)))


def source_lines(counts: Mapping[str, int], licences: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Return a line for each source of a table: its linked name, its number of pairs and its license."""
    lines = []
    for name, pairs in counts.items():
        shown = cell(name) or "not named"
        if name in SOURCES and (hub_id := SOURCES[name].hub_id):
            shown = f"[{shown}](https://huggingface.co/datasets/{hub_id})"
        lines.append((shown, f"{pairs:,}", cell(licence_of(name, licences))))
    return lines


def evaluation_entries(
    metrics: Mapping[str, float], dataset_name: str | None, eval_dataset: object = None
) -> list[EvalResult]:
    """Make the metadata of each evaluation set's accuracy, from metrics under the trainer's names."""
    # A set may have `title` and `hub_id` in its `info`. A single set is taken for pairs held out of `dataset_name`.
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {}
    entries = []
    for key, value in metrics.items():
        if not key.endswith("_accuracy"):
            continue
        name = metadata(key.removeprefix("eval_").removesuffix("accuracy").rstrip("_"))
        info = getattr(sets.get(name), "info", None)
        entry = EvalResult(
            task_type="text-classification",
            task_name="Reward modeling",
            dataset_type=getattr(info, "hub_id", None) or name or dataset_name or "held-out-pairs",
            dataset_name=getattr(info, "title", None) or name or dataset_name or "held-out pairs",
            metric_type="accuracy",
            metric_name="pair accuracy",
            metric_value=round(value, 4),
        )
        entries.append(entry)
    return entries


def run_command(num_processes: int, argv: Sequence[str] | None = None) -> str | None:
    """Return the command that started this process, without secrets, or `None` if it is not reproducible."""
    script, *words = sys.argv if argv is None else argv
    path = Path(script)
    if path.name == "trl-dt2it":
        start = ["trl-dt2it"]
    elif path.suffix == ".py" and not path.name.startswith("__") and "site-packages" not in path.parts:
        place = f"recipes/{path.name}" if path.parent.name == "recipes" else path.name
        start = ["accelerate", "launch", place] if num_processes > 1 else ["python", place]
    else:
        return None
    return shlex.join([*start, *map(_without_root, without_secrets(words))])


def _without_root(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)


def write_model_card(
    trainer: RewardTrainer, *, model_name: str | None = None, dataset_name: str | None = None, tags: Sequence[str] = ()
) -> None:
    """Write the card of a trainer's model, with the `model_card_section(trainer)` of each callback that has one."""
    output_dir = Path(cast(str, trainer.args.output_dir))  # `__post_init__` replaces None
    model_name = model_name or output_dir.name
    name_or_path = cast(PreTrainedModel, trainer.model).config._name_or_path
    base_model = name_or_path if name_or_path and not os.path.isdir(name_or_path) else None
    logged = (item for entry in trainer.state.log_history for item in entry.items() if item[0].startswith("eval_"))
    timings = ("_runtime", "_per_second", "_num_tokens")
    metrics = {name: value for name, value in logged if not name.endswith(timings)}  # the newest value of each
    counts = source_counts(trainer.train_dataset)
    callbacks: list[Any] = trainer.callback_handler.callbacks
    sections = [one.model_card_section(trainer) for one in callbacks if hasattr(one, "model_card_section")]
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
    run = None
    if is_wandb_available():
        import wandb

        run = wandb.run
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
        sections=list(filter(None, sections)),
        serve=code_span(f"vllm serve {shlex.quote(hub_model_id)} --runner pooling"),
        sources=source_lines(counts),
        training=_training_figures(trainer),
        versions=[(name, version(name)) for name in ("trl-dt2it", "trl", "transformers", "torch", "datasets")],
        wandb_url=run and run.url,
        trackio_url=get_trackio_space_url(),
    )
    with whole_file(output_dir / "README.md") as part:
        card.save(part)


def push_model(
    trainer: RewardTrainer,
    *,
    commit_message: str | None,
    blocking: bool,
    token: str | None,
    revision: str | None,
    private: bool | None,
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
    """Upload the model files of a checkpoint, and the card, without waiting."""
    args = trainer.args
    hub: dict[str, Any] = {"repo_id": trainer.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
    hub |= {"run_as_future": True, "commit_message": f"Training in progress, step {trainer.state.global_step}"}
    jobs = [upload_folder(folder_path=checkpoint, allow_patterns=MODEL_FILES, **hub)]
    card = Path(cast(str, args.output_dir)) / "README.md"
    if card.is_file():
        jobs.append(upload_file(path_or_fileobj=card, path_in_repo="README.md", **hub))
    if args.hub_strategy in ("checkpoint", "all_checkpoints"):
        # Requested explicitly: optimizer and scheduler are uploaded, to resume from. Secrets are not.
        hub["path_in_repo"] = "last-checkpoint" if args.hub_strategy == "checkpoint" else Path(checkpoint).name
        jobs.append(upload_folder(folder_path=checkpoint, ignore_patterns=["training_args.bin"], **hub))
    return jobs


def _training_figures(trainer: RewardTrainer) -> list[tuple[str, str]]:
    args = cast(MultimodalRewardConfig, trainer.args)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    figures = [
        ("loss", code_span(loss_name(getattr(trainer, "loss_type", args.loss_type)))),
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
        config = cast(PreTrainedModel, trainer.model).peft_config["default"]
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
