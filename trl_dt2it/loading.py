"""What a trainer loads by name, the model and its processor, and how many pixels that gives an image."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoProcessor, BitsAndBytesConfig, PreTrainedModel, ProcessorMixin, set_seed
from transformers.utils import cached_file, find_adapter_config_file, logging
from trl import RewardConfig

from .modeling import load_reward_model
from .rendering import ProcessingClass


logger = logging.get_logger(__name__)


def load_for_training(
    name_or_path: str,
    args: RewardConfig,
    init_kwargs: dict[str, Any],
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """
    Loads a model to train, in fp32 unless told otherwise, as TRL does.

    Args:
        name_or_path (`str`):
            Hub id or directory.
        args ([`~trl.RewardConfig`]):
            `seed`, which a new head depends on, and `trust_remote_code` are read.
        init_kwargs (`dict[str, Any]`):
            `args.model_init_kwargs`, passed on to [`load_reward_model`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantisation.

    Returns:
        [`~transformers.PreTrainedModel`]

    Raises:
        `ValueError`: if the quantisation is given twice, or as [`load_reward_model`] says.
    """
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, "is_trainable": True, **init_kwargs}
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError("Give `quantization_config` to the trainer or in `model_init_kwargs`, not both.")
        kwargs["quantization_config"] = quantization_config
    set_seed(args.seed)
    return load_reward_model(name_or_path, **kwargs)


def refuse_spoiled_weights(model: PreTrainedModel) -> None:
    """
    Refuses to train on 4-bit weights that bitsandbytes would spoil.

    On a CPU it packs them when an evaluation reads them and unpacks them when the model is saved, but does not put the
    scales of the blocks back unless these are quantised, too. The next step would go on with another model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to train, on its device.

    Raises:
        `ValueError`: if it is in 4 bits, on a CPU, without double quantisation.
    """
    found = getattr(model.config, "quantization_config", None)
    if not isinstance(found, BitsAndBytesConfig) or not found.load_in_4bit or found.bnb_4bit_use_double_quant:
        return
    if model.device.type == "cpu":
        raise ValueError(
            "On a CPU, 4-bit weights need double quantisation, because bitsandbytes spoils others when the model is "
            "saved after an evaluation; set `use_bnb_nested_quant`, or `bnb_4bit_use_double_quant=True` in the "
            "`BitsAndBytesConfig`."
        )


def agree_on_compute_dtype(model: PreTrainedModel, args: RewardConfig) -> None:
    """
    Let 4-bit weights compute in the half precision that the rest of the model computes in. They do not see autocast,
    and bitsandbytes' default is fp32, which is several times slower.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to train; changed in place. Another dtype than the default is left as it is.
        args ([`~trl.RewardConfig`]):
            `bf16` and `fp16` are read.
    """
    found = getattr(model.config, "quantization_config", None)
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if half is None or not isinstance(found, BitsAndBytesConfig) or not found.load_in_4bit:
        return
    if found.bnb_4bit_compute_dtype != torch.float32:
        return
    logger.warning(f"The 4-bit weights compute in {half}, as the model does, and not in their default of float32.")
    model.config.quantization_config = copy.deepcopy(found)  # the user's own stays as it is
    model.config.quantization_config.bnb_4bit_compute_dtype = half
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = half  # type: ignore[assignment]  # torch: only tensors and modules


def load_processing_class(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> ProcessingClass:
    """
    The processor of a vision-language model, or the tokenizer of a text model.

    Args:
        name_or_path (`str` or `os.PathLike`):
            Hub id or directory; of an adapter that lies alone, the base model's is taken.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that ships with the checkpoint may run.

    Returns:
        [`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]
    """
    if find_adapter_config_file(str(name_or_path), revision=revision) is not None and not cached_file(
        name_or_path, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    ):
        adapter = PeftConfig.from_pretrained(str(name_or_path), revision=revision)
        name_or_path, revision = adapter.base_model_name_or_path, adapter.revision
    return AutoProcessor.from_pretrained(
        name_or_path, revision=revision or "main", trust_remote_code=trust_remote_code
    )


def set_pixel_limits(
    processing_class: ProcessingClass, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> None:
    """
    Sets the smallest and largest number of pixels to which the processor scales an image. They are saved with it.

    Args:
        processing_class ([`~transformers.ProcessorMixin`]):
            Changed in place.
        min_pixels (`int`, *optional*):
            Smallest number of pixels; `None` leaves the processor's own.
        max_pixels (`int`, *optional*):
            Largest number of pixels.

    Raises:
        `ValueError`: if the processor has no such limits, as those that scale every image to one size.
    """
    if min_pixels is None and max_pixels is None:
        return
    # In the families with pixel limits the class's default size has these two keys, and they hold areas, not edges, in
    # spite of their names. The others name one edge, or height and width.
    image_processor = processing_class.image_processor if isinstance(processing_class, ProcessorMixin) else None
    if image_processor is None or set(type(image_processor).size or ()) != {"shortest_edge", "longest_edge"}:
        raise ValueError(
            f"`min_pixels` and `max_pixels` have no effect on {type(processing_class).__name__}, which has no pixel "
            "limits; leave them out."
        )
    current = image_processor.size
    image_processor.size = type(current)(
        shortest_edge=current["shortest_edge"] if min_pixels is None else min_pixels,
        longest_edge=current["longest_edge"] if max_pixels is None else max_pixels,
    )
