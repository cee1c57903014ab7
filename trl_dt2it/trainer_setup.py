"""What a trainer makes ready before TRL's own begins: the model, its processor, the collator, and a few arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, cast

from datasets import IterableDataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, ProcessorMixin
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_liger_kernel_available

from .collator import MultimodalPreferenceCollator
from .freezing import freeze, with_reward_head
from .loading import load_for_training, load_processing_class, refuse_spoiled_weights, set_pixel_limits
from .modeling import mark_as_reward_model, read_last_real_token
from .preparation import image_options
from .rendering import ProcessingClass
from .reward_config import MultimodalRewardConfig
from .shared_forward import decide_share_prefix


def set_up_model(
    model: str | PreTrainedModel,
    processing_class: ProcessingClass | None,
    args: MultimodalRewardConfig,
    *,
    init_kwargs: dict[str, Any],
    quantization_config: BitsAndBytesConfig | None = None,
) -> tuple[PreTrainedModel, ProcessingClass]:
    """
    A reward model and its processor, loaded where they are not given, with frozen parts and limits of pixels.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id or directory, or a model that has one label, which is changed in place.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its processor or tokenizer, changed in place; by default the one that lies beside the model.
        args ([`MultimodalRewardConfig`]):
            What to freeze, the limits of pixels, `seed` and `trust_remote_code` are read.
        init_kwargs (`dict[str, Any]`):
            `args.model_init_kwargs`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantisation of a model that is loaded.

    Returns:
        `tuple`: the model and its processor or tokenizer.

    Raises:
        `ValueError`: if the model has other than one label, or lacks a part that is to be frozen, or if the processor
        has no limits of pixels and some are set, or as [`refuse_spoiled_weights`] says.
    """
    name_or_path = model if isinstance(model, str) else model.config._name_or_path
    if isinstance(model, str):
        model = load_for_training(model, args, init_kwargs, quantization_config)
    if model.config.num_labels != 1:
        raise ValueError(
            f"{type(model).__name__} has `num_labels={model.config.num_labels}`, but reward models require "
            "`num_labels=1`; load it with `trl_dt2it.load_reward_model`, or give its name or directory as `model`."
        )
    read_last_real_token(model)
    refuse_spoiled_weights(model)
    if processing_class is None:
        processing_class = load_processing_class(
            name_or_path, revision=init_kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    set_pixel_limits(processing_class, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    mark_as_reward_model(model.config)
    if args.freeze_vision_tower or args.freeze_projector:
        freeze(model, vision_tower=args.freeze_vision_tower, projector=args.freeze_projector)
    return model, processing_class


def use_liger_kernels(model: PreTrainedModel, args: MultimodalRewardConfig) -> None:
    """
    Puts Liger's kernels into the language model's layers, if `args.use_liger_kernel` is set.

    transformers would hand Liger the whole model, whose forward pass Liger replaces by that of a language model, or
    which it does not know. Norms, feed-forward layers and rotary embeddings are all that a reward model can use.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Changed in place.
        args ([`MultimodalRewardConfig`]):
            `use_liger_kernel`, `liger_kernel_config` and the device are read.

    Raises:
        `ValueError`: if there is no GPU for the kernels, Liger has none for the family, or `liger_kernel_config` asks
            for one that is not there.
        `ImportError`: if Liger is not installed.
    """
    if not args.use_liger_kernel:
        return
    if args.device.type in ("cpu", "mps"):
        raise ValueError(
            f"`use_liger_kernel=True` needs a GPU that Triton compiles for, and this training runs on "
            f"`{args.device.type}`; leave it out."
        )
    if not is_liger_kernel_available():
        raise ImportError(
            "`use_liger_kernel=True`, but Liger is not there; install it by `pip install liger-kernel`, or leave the "
            "setting out."
        )
    patch_backbone(model, cast("dict[str, bool] | None", args.liger_kernel_config) or {})


def patch_backbone(model: Any, kernels: dict[str, bool]) -> None:
    """
    Let Liger patch the language model of a reward model, and nothing else of the process.

    Besides the layers of the model that it is given, Liger replaces the classes that other models of the family are
    made of; these are put back. Its rotary embedding can only be had for all of them, so that it is off unless asked
    for.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    decoder = model.base_model.get_decoder()
    types = [config.model_type for config in (decoder.config, model.config)]
    # Liger lists some families by their language model, and some as a whole.
    patch = next((MODEL_TYPE_TO_APPLY_LIGER_FN[name] for name in types if name in MODEL_TYPE_TO_APPLY_LIGER_FN), None)
    if patch is None:
        raise ValueError(
            f"`use_liger_kernel=True`, but Liger {version('liger-kernel')} has no kernels for `{types[0]}`; leave it "
            "out."
        )
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    offered = inspect.signature(patch).parameters.keys() - {"model", *losses}
    for name, is_on in kernels.items():
        if name not in offered and is_on:
            reason = "is of the language head, which a reward model has not" if name in losses else "is not there"
            raise ValueError(
                f"`liger_kernel_config` asks for `{name}`, which {reason}; `{types[0]}` has "
                f"{', '.join(sorted(offered))}."
            )
    chosen = {"rope": False, **kernels}
    module = sys.modules[type(decoder).__module__]
    before = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    try:
        patch(model=decoder, **losses, **{name: is_on for name, is_on in chosen.items() if name in offered})
    except (AttributeError, ImportError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"`use_liger_kernel=True`, but Liger {version('liger-kernel')} does not fit `{types[0]}` of transformers "
            f"{version('transformers')} ({error}); install a release that does, or leave it out."
        ) from error
    finally:
        vars(module).update(before)


def set_up_adapter(peft_config: PeftConfig | None, args: MultimodalRewardConfig) -> PeftConfig | None:
    """A copy of a PEFT configuration with the `score` head, and without the parts that `args` freezes."""
    if peft_config is None:
        return None
    return with_reward_head(
        peft_config,
        keep_out_of_vision_tower=args.freeze_vision_tower,
        keep_out_of_projector=args.freeze_projector,
    )


def make_collator(
    model: PreTrainedModel, processing_class: ProcessingClass, args: MultimodalRewardConfig
) -> MultimodalPreferenceCollator:
    """
    The collator that a trainer's arguments describe.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The reward model, which says whether one row per pair is possible.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Its processor or tokenizer.
        args ([`MultimodalRewardConfig`]):
            Where images may come from, `pad_to_multiple_of` and `share_prefix` are read.

    Returns:
        [`MultimodalPreferenceCollator`]
    """
    return MultimodalPreferenceCollator(
        processing_class,
        image_options=image_options(args),
        # The configuration's `__post_init__` has resolved strings and None, here and in the casts below.
        pad_to_multiple_of=cast("int | None", args.pad_to_multiple_of),
        media=(),  # what the sets can hold is not known yet
        share_prefix=decide_share_prefix(args.share_prefix, model),
    )


def set_up_arguments(
    args: MultimodalRewardConfig, processing_class: ProcessingClass, datasets: Iterable[object]
) -> None:
    """
    Sets what several processes need to train on rows with images, or on a stream.

    Args:
        args ([`MultimodalRewardConfig`]):
            Changed in place: `ddp_find_unused_parameters` and `accelerator_config`.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            The processor of the model, or the tokenizer of one that reads text only.
        datasets (`Iterable`):
            The sets to train and to evaluate on.
    """
    # TRL's DPO trainer does the same: rows without images leave the vision tower without gradients, and some towers
    # have layers that are never read. A tower that no process has used keeps its weights, as on one process.
    checkpointing = cast("dict[str, Any] | None", args.gradient_checkpointing_kwargs) or {}
    reentrant = checkpointing.get("use_reentrant")
    if isinstance(processing_class, ProcessorMixin) and args.ddp_find_unused_parameters is None:
        # A layer computed again by a reentrant checkpoint would be marked twice; there blank images take part instead.
        args.ddp_find_unused_parameters = not reentrant
    if any(isinstance(dataset, IterableDataset) for dataset in datasets):
        # Otherwise accelerate joins batches of several processes, which does not work with strings.
        cast(AcceleratorConfig, args.accelerator_config).dispatch_batches = False
