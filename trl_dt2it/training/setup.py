"""Setup of a training: model, processor, collator and rows are prepared and checked before the first step; its end."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, Features, IterableDataset, Value
from peft import PeftConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, ProcessorMixin, set_seed
from transformers.integrations import is_wandb_available
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_liger_kernel_available, logging

from ..data.columns import (
    AnyDataset,
    as_python,
    column_names,
    column_of,
    has_transform,
    leave_images_encoded,
    look_at_rows,
    look_in_shares,
)
from ..data.controls import MEDIA
from ..data.images import ImageOptions
from ..data.rows import RowError, check_numbers, row_name
from ..data.validation import ImageCheck, RowChecks, take_out
from ..models import freezing, modeling
from ..models.rendering import ProcessingClass, equal_when_rendered, get_tokenizer
from .batching import count_pairs, count_tokens, counter_of, needs_lengths
from .collator import MultimodalPreferenceCollator
from .config import MultimodalRewardConfig, Trainer


logger = logging.get_logger(__name__)

# The columns that training and evaluation read; the trainer drops all others.
COLUMNS = [
    *("prompt", "chosen", "rejected", "image", "images", "videos", "tools", "chat_template_kwargs"),
    *("strength", "weight", "label_confidence", "margin", "blind_margin", "source", "pair_id", "group_id"),
    *("category", "row_index"),
    *("chosen_ids", "rejected_ids"),
]

_FAULTS = Features({"reason": Value("string"), "message": Value("string")})


def image_options(args: MultimodalRewardConfig) -> ImageOptions:
    """Return the allowed origins and sizes of images of a configuration."""
    return ImageOptions(args.image_root, args.max_image_pixels, tuple(args.allowed_image_hosts or ()))


def prepare_dataset(
    dataset: AnyDataset, *, name: str, collator: MultimodalPreferenceCollator, args: MultimodalRewardConfig
) -> tuple[AnyDataset, pa.Table | None]:
    """Check the rows of a data set, drop long pairs and leave images encoded; return token counts where needed."""
    dataset = rename_old_columns(leave_images_encoded(as_python(dataset)))
    columns = set(column_names(dataset))
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {name} set has no rows; check the split and the filters that it comes from.")
    if not {"chosen", "rejected"} <= columns and not {"chosen_ids", "rejected_ids"} <= columns:
        raise ValueError(
            f"The {name} set has the columns {', '.join(sorted(columns))}; it needs `chosen` and `rejected` (and "
            "`prompt`, unless both begin with it), or `completions` with `scores` or `ranks`."
        )
    for column in sorted(columns - set(COLUMNS)):
        # A slip costs a letter or two; `rejected_digits` is no misspelt `rejected_ids`.
        near = [name for name in COLUMNS if name not in columns and abs(len(name) - len(column)) <= 1]
        if close := get_close_matches(column, near, n=1, cutoff=0.8):
            unread = f"The {name} set has a column `{column}`, which is not read"
            logger.warning(f"{unread}; rename it if `{close[0]}` is meant.")
    if "chosen_ids" not in columns:
        if not isinstance(collator.processing_class, ProcessorMixin) and {"image", "images"} & columns:
            raise ValueError(
                f"The {name} set has images, but the model reads text only; use a vision-language model, or remove "
                "the column."
            )
        kind = (dataset.features or {}).get("chosen")  # a stream may not know
        if collator.processing_class.chat_template is None and not (kind is None or isinstance(kind, Value)):
            raise ValueError(
                f"The {name} set holds messages, and the model has no chat template to render them with; set "
                "`chat_template_path`."
            )
    dataset = quarantine_bad_rows(dataset, name, collator, args)
    counts = None
    needed = name == "train" and needs_lengths(args) and args.length_column_name not in columns
    if isinstance(dataset, Dataset) and (needed or args.max_length is not None):
        counts = count_pairs(dataset, name=name, collator=collator, num_proc=args.dataset_num_proc)
    if (most := args.max_length) is None:
        return dataset, counts
    if counts is None:  # of a stream
        is_checked = args.on_bad_row == "quarantine"
        return dataset.filter(lambda row: max(count_tokens(row, collator, is_checked)[:2]) <= most), None
    fitting = np.flatnonzero(np.maximum(counts["chosen"], counts["rejected"]) <= most)
    if len(fitting) == len(dataset):
        return dataset, counts
    num_long = len(dataset) - len(fitting)
    message = f"Dropped {num_long} of {len(dataset)} pairs of the {name} set: longer than {most} tokens."
    if len(fitting) == 0:
        raise ValueError(message + " None is left; raise `max_length`, or lower `max_pixels`.")
    logger.warning(message)
    return dataset.select(fitting), counts.take(fitting)


def token_fault(row: Mapping[str, Any]) -> RowError | None:
    """Return the first reason why a row of tokens cannot be used, or `None`."""
    for side in ("chosen_ids", "rejected_ids"):
        if not row[side]:
            return RowError("empty_answer", f"`{side}` holds no tokens; drop the row.")
    try:
        check_numbers(row)
    except RowError as error:
        return error
    return equal_when_rendered() if list(row["chosen_ids"]) == list(row["rejected_ids"]) else None


def rename_old_columns(dataset: AnyDataset) -> AnyDataset:
    """Rename the columns of tokens from TRL's old names, `chosen_input_ids` and `rejected_input_ids`."""
    columns = set(column_names(dataset))
    old = {f"{side}_input_ids": f"{side}_ids" for side in ("chosen", "rejected")}
    if not set(old) <= columns or set(old.values()) <= columns:  # with both, today's names count
        return dataset
    warnings.warn(
        "The column `chosen_input_ids` is read as `chosen_ids`, and `rejected_input_ids` as `rejected_ids`, the names "
        "that replaced them in TRL; rename them in the data set before the old names stop working, with "
        f"`dataset.rename_columns({old})`.",
        FutureWarning,
        stacklevel=2,
    )
    return dataset.rename_columns(old)


def check_blind_margins(dataset: AnyDataset, columns: set[str], args: MultimodalRewardConfig) -> None:
    """Refuse to count blind margins that are not there, and mention such as do not count."""
    has_any = "blind_margin" in columns
    if has_any and isinstance(dataset, Dataset) and not has_transform(dataset):
        margins = column_of(dataset, "blind_margin")
        has_any = margins.null_count < len(margins)
    if args.blind_model is not None:
        if has_any:
            raise ValueError(
                "The train set has a column `blind_margin`, which `blind_model` makes; leave one of them out."
            )
        if "chosen_ids" in columns or not columns.intersection(MEDIA):
            raise ValueError(
                "`blind_model` needs a train set of rows with images or videos, not of tokens or text alone."
            )
        return
    name = "blind_offset" if args.blind_offset else "blind_weighting" if args.blind_weighting else None
    if name is not None and not has_any:
        raise ValueError(
            f"`{name}` needs a column `blind_margin` in the train set, and it has none, or none with a value; add it: "
            "`dataset = trl_dt2it.debias.with_blind_margins(dataset)`."
        )
    if has_any and name is None:
        options = "`blind_offset=True` or `blind_weighting=True`"
        logger.info(f"The train set has a column `blind_margin`, which counts only with {options}.")


def quarantine_bad_rows(
    dataset: AnyDataset, name: str, collator: MultimodalPreferenceCollator, args: MultimodalRewardConfig
) -> AnyDataset:
    """Check every row of a data set, or of a stream as it streams, and raise on bad ones or drop them."""
    checks = RowChecks(collator.image_options, cast(ImageCheck, args.image_check), counter_of(collator))

    def check(row: Mapping[str, Any]) -> dict[str, str]:
        error = checks.fault(row) if "chosen_ids" not in row else token_fault(row)
        return {"reason": "", "message": ""} if error is None else {"reason": error.reason, "message": str(error)}

    if isinstance(dataset, IterableDataset):
        if args.on_bad_row == "raise":  # the collator does
            return dataset

        def keep(row: dict[str, Any]) -> bool:
            fault = check(row)
            if fault["reason"]:
                logger.warning(f"Dropped from the {name} set: {row_name(row)}, {fault['reason']}: {fault['message']}")
            return not fault["reason"]

        return dataset.filter(keep)

    look = partial(look_at_rows, function=check, features=_FAULTS, desc=f"Checking {name} dataset")
    # Without a cache: the file of an image may have changed since the last run.
    faults = look_in_shares(dataset, look, num_proc=args.dataset_num_proc)
    bad = np.flatnonzero(pc.not_equal(faults["reason"], "").to_numpy())
    # A message names the first; the file, which the main process writes, names all.
    named = bad if args.on_bad_row == "quarantine" and PartialState().is_main_process else bad[:1]
    shown = cast(Dataset, plain_columns(dataset.select(named), ("pair_id",)))
    names = shown["pair_id"][:] if "pair_id" in shown.column_names else []
    rows = zip_longest(bad.tolist(), names, faults.take(bad).to_pylist())
    return take_out(
        dataset,
        bad,
        Dataset.from_list([{"row": index, "pair_id": pair_id, **fault} for index, pair_id, fault in rows]),
        name=f"row of the {name} set",
        on_bad_row=args.on_bad_row,
        # The leading underscore keeps the file out of what is pushed to the Hub.
        file=Path(cast(str, args.output_dir)) / f"_quarantine_{name}.jsonl",
        advice=' Fix them, or set `on_bad_row="quarantine"` to drop them.',
        show=PartialState().is_main_process,
    )


def plain_columns(dataset: AnyDataset, names: Sequence[str]) -> AnyDataset:
    """Return a data set whose columns can be read; of one with a transform, its rows under these names."""
    if not has_transform(dataset):
        return dataset
    present = [name for name in names if name in column_names(dataset)]
    # This makes every row, images included.
    rows: Any = dataset if present else ()
    return Dataset.from_list([{name: row[name] for name in present} for row in rows])


def check_setup(args: MultimodalRewardConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse settings and sets that would fail later, before a model is loaded."""
    if not isinstance(args, MultimodalRewardConfig):
        raise TypeError(
            f"`args` is a {type(args).__name__}; pass a `MultimodalRewardConfig`, which has its fields too."
        )
    is_streamed = isinstance(train_dataset, IterableDataset)
    if needs_lengths(args) and is_streamed:
        raise ValueError(
            "Batches by length (`max_tokens_per_batch` or `train_sampling_strategy`) need the length of every pair, "
            "and the train set is streamed; load it whole, or leave the setting out."
        )
    if args.reward_posterior and is_streamed:
        raise ValueError(
            "`reward_posterior` reads every training pair once more, and the train set is streamed; load it whole, or "
            "leave the setting out."
        )
    if cast(AcceleratorConfig, args.accelerator_config).dispatch_batches and not is_streamed:
        raise ValueError(
            "`dispatch_batches` sends the tensors of one process's batches to the others, and batches of pairs hold "
            "text too; leave it out, so that each process reads its own."
        )
    if isinstance(eval_dataset, dict):
        if not eval_dataset:
            raise ValueError("`eval_dataset` is a dict without any set; pass `None`, or the sets to evaluate on.")
        sets = {f"eval set `{key}`": dataset for key, dataset in eval_dataset.items()}
    else:
        sets = {} if eval_dataset is None else {"eval set": eval_dataset}
    for name, dataset in sets.items():
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise TypeError(f"The {name} is a {type(dataset).__name__}; pass a `Dataset` or an `IterableDataset`.")
    for name, dataset in {"train set": train_dataset, **sets}.items():
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"The {name} has no rows; check the split and the filters that it comes from.")


def set_up_model(
    model: str | PreTrainedModel,
    processing_class: ProcessingClass | None,
    args: MultimodalRewardConfig,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
) -> tuple[PreTrainedModel, ProcessingClass, PeftConfig | None]:
    """Load a reward model, its processor and its adapter's configuration where not passed, and set them up."""
    name_or_path = model if isinstance(model, str) else model.config._name_or_path
    init_kwargs = cast("dict[str, Any] | None", args.model_init_kwargs) or {}  # `__post_init__` has resolved a string
    if isinstance(model, str):
        # In fp32 by default, as TRL does.
        kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, "is_trainable": True, **init_kwargs}
        if quantization_config is not None:
            if "quantization_config" in kwargs:
                raise ValueError("Pass `quantization_config` to the trainer or in `model_init_kwargs`, not both.")
            kwargs["quantization_config"] = quantization_config
        set_seed(args.seed)
        model = modeling.load_reward_model(name_or_path, **kwargs)
        if is_peft_model(model) and peft_config is not None:
            raise ValueError(
                f"{name_or_path} is an adapter, which training goes on with; leave `peft_config` out, or merge the "
                "adapter into its base model to train a new one."
            )
    if model.config.num_labels != 1:
        raise ValueError(
            f"{type(model).__name__} has `num_labels={model.config.num_labels}`, but reward models require "
            "`num_labels=1`; load it with `trl_dt2it.load_reward_model`, or pass its name or directory as `model`."
        )
    modeling.read_last_real_token(model)
    set_up_4bit_weights(model, args)
    if processing_class is None:
        processing_class = modeling.load_processing_class(
            name_or_path, revision=init_kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    modeling.set_pixel_limits(processing_class, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    modeling.mark_as_reward_model(model.config)
    new_tokens = []
    if args.chat_template_path is not None:
        new_tokens = use_chat_template(model, processing_class, args.chat_template_path)
    frozen = [part for part in ("vision_tower", "projector") if getattr(args, f"freeze_{part}")]
    for part in frozen:
        freezing.freeze(model, part)
    if isinstance(peft_config, PeftConfig):  # TRL refuses anything else
        peft_config = freezing.with_new_tokens(freezing.with_reward_head(peft_config, frozen), model, new_tokens)
    if not any(parameter.requires_grad for parameter in model.parameters()) and peft_config is None:
        advice = "load the adapter with `is_trainable=True`" if is_peft_model(model) else "let some require gradients"
        raise ValueError(f"No parameter of the {type(model).__name__} is trained; {advice}.")
    if is_peft_model(model):
        freezing.with_trained_head(model)
    use_liger_kernels(model, args)
    return model, processing_class, peft_config


def set_up_4bit_weights(model: PreTrainedModel, args: MultimodalRewardConfig) -> None:
    """Refuse 4-bit weights that bitsandbytes would spoil; have others compute in the model's half precision."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig) or not config.load_in_4bit:
        return
    if model.device.type == "cpu" and not config.bnb_4bit_use_double_quant:
        # bitsandbytes packs them when an evaluation reads them and unpacks them when the model is saved, but restores
        # the scales of the blocks only if these are quantized too. The next step would go on with another model.
        raise ValueError(
            "On a CPU, 4-bit weights need double quantization, because bitsandbytes spoils others when the model is "
            "saved after an evaluation; set `use_bnb_nested_quant`, or `bnb_4bit_use_double_quant=True` in the "
            "`BitsAndBytesConfig`."
        )
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if half is None or config.bnb_4bit_compute_dtype != torch.float32:
        return
    # They bypass autocast, and bitsandbytes' default of fp32 is several times slower.
    logger.warning(f"The 4-bit weights compute in {half}, as the model does, and not in their default of float32.")
    model.config.quantization_config = copy.deepcopy(config)  # the user's own stays as it is
    model.config.quantization_config.bnb_4bit_compute_dtype = half
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = half  # type: ignore[assignment]  # torch: only tensors and modules


def use_chat_template(model: PreTrainedModel, processing_class: ProcessingClass, path: str) -> list[int]:
    """Set the chat template of a processor and its tokenizer, and return the tokens that it adds."""
    # Unlike [`~trl.clone_chat_template`], this keeps the embeddings if they have room for the new tokens, so that an
    # adapter still fits its base model, and keeps the rows that a checkpoint holds in reserve.
    tokenizer = get_tokenizer(processing_class)
    new_tokens: list[int] = []
    if Path(path).is_file() and path.endswith((".jinja", ".j2")):
        template = Path(path).read_text(encoding="utf-8")
    else:
        source = AutoTokenizer.from_pretrained(path)
        template = source.get_chat_template()
        known = tokenizer.get_vocab()
        added = [token for token in source.added_tokens_decoder.values() if token.content not in known]
        adds = f"`chat_template_path` adds {len(added)} tokens, such as {added[0].content!r}," if added else ""
        if added and is_peft_model(model):
            advice = "merge them into the base model first, or start with `peft_config`"
            raise ValueError(f"{adds} which the adapters of the model do not train; {advice}.")
        tokenizer.add_tokens(added)
        new_tokens = [cast(int, tokenizer.convert_tokens_to_ids(token.content)) for token in added]
        tokenizer.eos_token = source.eos_token
        text_config = model.config.get_text_config()
        text_config.eos_token_id = tokenizer.eos_token_id
        if new_tokens and max(new_tokens) >= len(cast(torch.Tensor, model.get_input_embeddings().weight)):
            if getattr(text_config, "hidden_size_per_layer_input", 0):  # each layer has its own table
                kind = model.config.model_type
                advice = "take a template whose tokens it knows"
                raise ValueError(f"{adds} and the embeddings of `{kind}` cannot grow; {advice}.")
            model.resize_token_embeddings(max(new_tokens) + 1)
    processing_class.chat_template = tokenizer.chat_template = template
    return new_tokens


def use_liger_kernels(model: PreTrainedModel, args: MultimodalRewardConfig) -> None:
    """Have Liger patch the layers of the language model, if `args.use_liger_kernel` is set."""
    # transformers would hand Liger the whole model, whose forward pass Liger replaces by that of a language model, or
    # which it does not know. Norms, feed-forward layers and rotary embeddings are all that a reward model can use.
    if not args.use_liger_kernel:
        return
    if (kind := args.device.type) in ("cpu", "mps"):
        raise ValueError(
            f"`use_liger_kernel=True` needs a GPU that Triton compiles for, but training runs on `{kind}`; leave it "
            "out."
        )
    if not is_liger_kernel_available():
        raise ImportError(
            "`use_liger_kernel=True`, but Liger is not installed; run `pip install liger-kernel`, or leave it out."
        )
    patch_backbone(model, cast("dict[str, bool] | None", args.liger_kernel_config) or {})


def patch_backbone(model: Any, kernels: dict[str, bool]) -> None:
    """Have Liger patch the language model of a reward model, and nothing else of the process."""
    # Besides the layers of the model, Liger replaces the classes that other models of the family are made of; these
    # are restored. Its rotary embedding exists for all of them alone, so that it is off by default.
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    decoder = model.base_model.get_decoder()
    types = [config.model_type for config in (decoder.config, model.config)]
    # Liger lists some families by their language model, and some as a whole.
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(types[0]) or MODEL_TYPE_TO_APPLY_LIGER_FN.get(types[1])
    liger = f"`use_liger_kernel=True`, but Liger {version('liger-kernel')}"
    if patch is None:
        raise ValueError(f"{liger} has no kernels for `{types[0]}`; leave it out.")
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    offered = inspect.signature(patch).parameters.keys() - {"model", *losses}
    for name, is_on in kernels.items():
        if name not in offered and is_on:
            reason = "is for the language head, which a reward model lacks" if name in losses else "does not exist"
            has = ", ".join(sorted(offered))
            raise ValueError(f"`liger_kernel_config` asks for `{name}`, which {reason}; `{types[0]}` has {has}.")
    chosen = {"rope": False, **kernels}
    module = sys.modules[type(decoder).__module__]
    before = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    try:
        patch(model=decoder, **losses, **{name: is_on for name, is_on in chosen.items() if name in offered})
    except (AttributeError, ImportError, NotImplementedError, TypeError) as error:
        there = f"`{types[0]}` of transformers {version('transformers')} ({error})"
        raise ValueError(f"{liger} does not fit {there}; install a release that does, or leave it out.") from error
    finally:
        vars(module).update(before)


def as_trainers(
    given: MultimodalPreferenceCollator, own: MultimodalPreferenceCollator
) -> MultimodalPreferenceCollator:
    """Copy a user's collator, with the dummies and strengths of the trainer's own where it needs them."""
    # Without the dummies some processes would wait for others forever.
    collator = copy.copy(given)
    collator.add_dummy_image, collator.media = own.add_dummy_image, own.media
    collator.normalizer = given.normalizer or own.normalizer
    return collator


def set_up_arguments(
    args: MultimodalRewardConfig, processing_class: ProcessingClass, datasets: Iterable[object], *, has_adapters: bool
) -> None:
    """Set what several processes need to train on rows with images, or on a stream."""
    plugin: Any = args.deepspeed_plugin
    if has_adapters and args.gradient_checkpointing and plugin is not None and plugin.zero_stage == 3:
        # Otherwise torch finds frozen weights divided that were whole in the forward pass. TRL sets only the old name
        # of the setting, which transformers no longer reads.
        options = cast("dict[str, Any] | None", args.gradient_checkpointing_kwargs) or {}
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if name in args.__dataclass_fields__:
                setattr(args, name, {**options, "use_reentrant": True})
    # As in TRL's DPO trainer: rows without images leave the vision tower without gradients, and some towers have
    # layers that are never read. A tower that no process has used keeps its weights, as on one process.
    if isinstance(processing_class, ProcessorMixin) and args.ddp_find_unused_parameters is None:
        # A layer computed again by a reentrant checkpoint would be marked twice; there blank images take part instead.
        args.ddp_find_unused_parameters = not is_reentrant(args)
    accelerator_config = cast(AcceleratorConfig, args.accelerator_config)
    is_streamed = any(isinstance(dataset, IterableDataset) for dataset in datasets)
    if is_streamed and accelerator_config.dispatch_batches is None:  # TRL takes a given `True` back with a warning
        # Otherwise accelerate joins batches of several processes, which does not work with strings.
        accelerator_config.dispatch_batches = False


def is_reentrant(args: MultimodalRewardConfig) -> bool:
    """Tell whether gradient checkpoints are set to be reentrant."""
    options = cast("dict[str, Any] | None", args.gradient_checkpointing_kwargs) or {}  # `__post_init__` resolved it
    return bool(options.get("use_reentrant"))


def exact_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copy the trainable weights of a quantized model before TRL rounds them to bf16; empty for other models."""
    # An adapter that goes on training would otherwise start from other weights than it has.
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return {}
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def put_back_exact(trainer: Trainer, exact: dict[str, torch.Tensor]) -> None:
    """Undo TRL's rounding of quantized models with the copies of [`exact_weights`]; new adapters are in fp32."""
    # DeepSpeed, which takes weights of one dtype, keeps what TRL makes.
    if not exact or trainer.is_deepspeed_enabled:
        return
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            original = name.replace(".modules_to_save.default.", ".").removeprefix("base_model.model.")
            value = exact.get(name, exact.get(original))
            parameter.data = parameter.data.float() if value is None else value.to(parameter.device)


def refuse_no_batch(trainer: Trainer) -> None:
    """Refuse a train set of which `dataloader_drop_last` leaves nothing; the trainer would silently take no step."""
    args, dataset = trainer.args, trainer.train_dataset
    size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(dataset, Dataset) and len(dataset) < size:
        pairs = f"all {len(dataset)} pairs of the train set, which do not fill one batch of {size}"
        advice = "leave it out, or lower `per_device_train_batch_size`"
        raise ValueError(f"`dataloader_drop_last` drops {pairs}; {advice}.")


def refuse_uneven_batches(trainer: Trainer) -> None:
    """Refuse `even_batches: false` where some processes would train on fewer batches and wait forever."""
    # Evaluation does not need even batches.
    accelerator, args = trainer.accelerator, trainer.args
    if accelerator.even_batches or accelerator.num_processes == 1 or not isinstance(trainer.train_dataset, Dataset):
        return
    if args.max_tokens_per_batch is not None or args.dataloader_drop_last:  # as many batches on each process
        return
    pairs, size = len(trainer.train_dataset), args.train_batch_size
    if accelerator.split_batches:
        size = max(1, size // accelerator.num_processes)
    if -(-pairs // size) % accelerator.num_processes:
        raise ValueError(
            f"With `even_batches` false in `accelerator_config`, {pairs} train pairs in batches of {size} give "
            f"{accelerator.num_processes} processes different numbers of batches; leave it out, or set "
            "`dataloader_drop_last=True`."
        )


def end_training(trainer: Trainer) -> None:
    """End the trackers of a trainer and let go of its memory, but keep the process group for the next training."""
    for tracker in trainer.accelerator.trackers:  # not `trainer.end()`, which would close the group
        tracker.finish()
    close_trackers(trainer.args)
    trainer.accelerator.free_memory()


def close_trackers(args: MultimodalRewardConfig) -> None:
    """End the run that Weights & Biases keeps open after a training, so that the next training gets its own."""
    if "wandb" in (args.report_to or ()) and is_wandb_available():
        import wandb

        wandb.finish()
