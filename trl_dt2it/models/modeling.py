"""Reward models: any vision-language model of transformers with one linear `score` head.

The classes follow transformers' pattern, `XForSequenceClassification(GenericForSequenceClassification,
XPreTrainedModel)`, so that a saved directory loads with [`~transformers.AutoModelForSequenceClassification`] and in
stock vLLM (`--runner pooling`). They are made on demand from the family's native class.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import cached_file, find_adapter_config_file, logging

from ..processes import whole_weights
from ..utils import read_json, with_values, write_json
from .families import FAMILIES, PIXELS
from .rendering import ProcessingClass
from .shared_prefix import encode_once, last_hidden_states, use_shared_prefix


logger = logging.get_logger(__name__)

_NATIVE_SUFFIX = "ForConditionalGeneration"
_REWARD_SUFFIX = "ForSequenceClassification"

STATISTICS_FILE = "reward_statistics.json"  # beside an adapter, which has no configuration of the model
STATISTICS = ("reward_mean", "reward_std")

if TYPE_CHECKING:
    # Each class made from it has the family's pretrained model as its second base.
    class _Base(GenericForSequenceClassification, PreTrainedModel):
        model: nn.Module
else:
    _Base = GenericForSequenceClassification


def is_head(name: str) -> bool:
    """Tell whether a parameter or module belongs to the `score` head, in an adapter's wrapper too."""
    return "score" in name.split(".")


class RewardHead(nn.Linear):
    """A linear head that stays and computes in fp32, whatever the dtype of the body."""

    # bf16 has 8 bits: around 25, rewards would be an eighth apart, and a learning rate of 1e-5 would hardly move a
    # weight of the head. DeepSpeed in half precision takes weights of one dtype only, and keeps its own fp32 copy.
    keeps_fp32 = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map an `input` `(..., H)` to rewards `(..., 1)` fp32."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float(), bias)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # Called by `model.to(torch.bfloat16)` and `model.half()`, and by a move to another device.
        exact = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            if self.keeps_fp32 and parameter.is_floating_point() and parameter.dtype != torch.float32:
                source = parameter if parameter.is_meta else exact[name]
                parameter.data = source.to(parameter.device, torch.float32)
        return self


def keep_head_in_fp32(model: nn.Module) -> None:
    """Turn every `score` head of a model, an adapter's copies included, into a [`RewardHead`], in place."""
    for name, module in model.named_modules():
        # Changing the class keeps parameters, their names and hooks. Quantized heads have other classes.
        if type(module) is nn.Linear and is_head(name):
            module.__class__ = RewardHead
            module.float()


class PatchProjection(nn.Conv3d):
    """3-D convolution computed as one matrix product where its input is as large as its kernel."""

    # Image processors hand over patches already cut out, and the tower convolves each with a kernel of the same size.
    # torch does not notice that this is a matrix product: on a CPU it takes three times as long, and on a GPU in bf16
    # some releases of cuDNN take far longer.

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve an `input` `(N, C, T, H, W)` to `(N, D, 1, 1, 1)` if it is one kernel large."""
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        return nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def project_patches_by_matrix_product(model: nn.Module) -> None:
    """Turn every plain 3-D convolution of a model into a [`PatchProjection`], in place."""
    for module in model.modules():
        # Changing the class keeps the instance's `forward`, which offloading may have wrapped.
        if type(module) is nn.Conv3d and (module.groups, module.padding) == (1, (0, 0, 0)):
            module.__class__ = PatchProjection


class GenericRewardModel(_Base):
    """The common base of the reward models: rewards at the last real token by mask, and no missing weights."""

    # Read by `from_pretrained`: the head keeps its fp32 weights beside a body in another dtype.
    _keep_in_fp32_modules_strict = {"score"}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        # Towers name layers that they have in other models only, and accelerate looks for each of them to shard it.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present & set(self._no_split_modules or ()))
        keep_head_in_fp32(self)
        project_patches_by_matrix_product(self)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = False,
        return_dict: bool | None = None,
        pair_layout: torch.Tensor | None = None,
        image_repeats: int | torch.Tensor = 1,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Compute rewards `(R, 1)` of `input_ids` and `attention_mask` `(R, L)`, or of the one row `(1, T)` that
        `pair_layout` `(G, 1 + N)` describes: G prompts with up to N completions each, in R rewards. The R rows show
        all images and videos `image_repeats` times, one after the other, or as [`encode_once`] says."""
        if input_ids is not None:
            refuse_unseen(self.config, input_ids, kwargs, self.training)
        if pair_layout is not None:
            use_shared_prefix(self)
            last_hidden = last_hidden_states(self.model, cast(torch.Tensor, input_ids), pair_layout, **kwargs)
        else:
            if isinstance(image_repeats, torch.Tensor) or image_repeats > 1:
                kwargs = encode_once(cast(PreTrainedModel, self.model), kwargs, image_repeats, input_ids)
            kwargs |= {"attention_mask": attention_mask, "use_cache": use_cache}
            states = self.base_model(input_ids=input_ids, **kwargs).last_hidden_state  # (R, L, H)
            end: Any = -1 if attention_mask is None else last_real_token(attention_mask)
            last_hidden = states[torch.arange(len(states)), end]
        logits = self.score(last_hidden)  # (R, 1): the head runs on the last tokens alone
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        result = SequenceClassifierOutputWithPast(loss=loss, logits=logits)
        return result.to_tuple() if return_dict is False else result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As in [`~transformers.PreTrainedModel`], but raises on missing, surplus or misshapen weights, and on pickled
        ones unless `use_safetensors=None` is passed."""
        kwargs = {"use_safetensors": True, **kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
        _raise_on_incomplete(info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in [`~transformers.PreTrainedModel`], with the weights' names in the model."""
        # vLLM does not expect the names of a family's old checkpoints under a reward model, and a Trainer that resumes
        # from them goes on with other weights and only warns.
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})


def last_real_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the index `(R,)` of each row's last real token in an `attention_mask` `(R, L)`."""
    length = attention_mask.shape[1]
    return length - 1 - attention_mask.flip(1).to(torch.int8).argmax(1)


def refuse_unseen(config: PreTrainedConfig, input_ids: torch.Tensor, inputs: dict[str, Any], training: bool) -> None:
    """Refuse image or video placeholders without pixels, which a model would score as if they were words."""
    ready = inputs.get("mm_encoder_outputs") or {}
    has_pixels = {kind: inputs.get(name) is not None or ready.get(kind) is not None for kind, name in PIXELS.items()}
    is_costly = training and input_ids.device.type != "cpu" and any(has_pixels.values())  # a wait for the device
    if all(has_pixels.values()) or is_costly or torch.compiler.is_compiling():
        return
    is_shown = {}
    for kind in PIXELS:
        ids = [getattr(config, f"{kind}_token_{end}", None) for end in ("id", "index")]
        placeholders = input_ids.new_tensor([token_id for token_id in ids if token_id is not None])
        is_shown[kind] = bool(torch.isin(input_ids, placeholders).any())
    if has_pixels["video"] and not is_shown["video"]:  # a family that writes frames as images
        return
    for kind, name in PIXELS.items():
        if is_shown[kind] and not has_pixels[kind]:
            raise ValueError(
                f"The tokens hold placeholders of {kind}s without `{name}` to put in their place; pass all that the "
                "processor returns (in GRPO and RLOO, `RewardScorer(...).as_reward_func()` in place of the model)."
            )


@functools.cache
def reward_model_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Make the reward model class of a vision-language family and register it with the Auto class."""
    model_type = config_class.model_type
    if config_class not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(_unsupported(model_type, "has no image-text-to-text model in transformers"))
    native = cast("type[PreTrainedModel]", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class])
    if not native.__name__.endswith(_NATIVE_SUFFIX):
        raise ValueError(_unsupported(model_type, f"has the model class `{native.__name__}`, which is not a decoder"))
    base = next(c for c in native.__mro__ if c.__name__.endswith("PreTrainedModel") and c is not PreTrainedModel)
    name = native.__name__.removesuffix(_NATIVE_SUFFIX) + _REWARD_SUFFIX
    attributes = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"[`~transformers.{native.__name__}`] with one linear `score` head in place of the language head.",
        "config_class": config_class,
        # transformers reads from the source of a class's module whether attention and experts can be switched; here
        # the native class's module counts.
        "_can_set_attn_implementation_cached_value": native._can_set_attn_implementation(),
        "_can_set_experts_implementation_cached_value": native._can_set_experts_implementation(),
    }
    cls = cast("type[PreTrainedModel]", type(name, (GenericRewardModel, base), attributes))
    # Without `exist_ok`, registering a class for one of transformers' own configurations does nothing at all.
    AutoModelForSequenceClassification.register(config_class, cls, exist_ok=True)
    globals()[name] = cls  # so that the class can be imported and pickled by name
    return cls


def load_reward_model(
    name_or_path: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | dict[str, str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_new_head: bool = True,
    is_trainable: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    Load a reward model, or make one of a vision-language (or text) model by adding a new `score` head.

    Every weight is accounted for: missing weights (but for the new head) and surplus ones (but for the language head)
    are an error.

    Args:
        name_or_path (`str` or `os.PathLike`):
            Hub id or directory of a reward model, of a native checkpoint, or of a PEFT adapter trained on one.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype of the weights; `"auto"` keeps the checkpoint's.
        allow_new_head (`bool`, *optional*, defaults to `True`):
            Whether to add a new `score` head to a checkpoint without one, which is an error otherwise.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether to load an adapter and its head for further training; other weights are trainable in any case.
        attn_implementation, revision, trust_remote_code, kwargs (*optional*):
            As in [`~transformers.PreTrainedModel.from_pretrained`]. `use_safetensors=None` allows pickled weights.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: the model with `config.num_labels == 1`, in
        evaluation mode and with the `score` head in fp32. A new head is drawn from torch's global generator: call
        [`~transformers.set_seed`] before.

    Raises:
        `ValueError`: if there is no such directory, if the family is not supported (the message lists those that
        are), if weights are missing or surplus, or if the checkpoint has more than one label.
    """
    is_path = os.path.isabs(name_or_path) or str(name_or_path).startswith((".", "~"))
    if is_path and not os.path.isdir(name_or_path):
        raise ValueError(f"There is no directory {name_or_path} to load a model from.")
    hub: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if find_adapter_config_file(str(name_or_path), revision=revision) is not None:
        kwargs |= {"dtype": dtype, "attn_implementation": attn_implementation}
        return _load_adapter(name_or_path, is_trainable=is_trainable, **hub, **kwargs)

    config = AutoConfig.from_pretrained(name_or_path, **hub)
    load_kwargs = {"use_safetensors": True, **hub, **kwargs, "dtype": dtype, "output_loading_info": True}
    if attn_implementation is not None:
        load_kwargs["attn_implementation"] = attn_implementation
    is_reward_model = (config.architectures or [""])[0].endswith(_REWARD_SUFFIX)
    if is_reward_model and config.num_labels != 1:
        raise ValueError(f"{name_or_path} has {config.num_labels} labels; a reward model has one.")
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise ValueError(_unsupported(config.model_type, "is an encoder-decoder"))
    ships_own_code = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    is_text = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or ships_own_code
    is_vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    cls = None if is_text and not is_vision else reward_model_class(config.__class__)
    if not (is_reward_model or allow_new_head):
        raise ValueError(
            f"{name_or_path} has no trained `score` head, so its rewards would be random; load a reward model, or "
            "pass `allow_new_head=True` to train one."
        )
    if cls is None:
        return _load_text_model(name_or_path, config, is_reward_model, load_kwargs)
    if config.model_type not in FAMILIES:
        logger.warning(
            f"No test of trl_dt2it covers `{config.model_type}`. It is tried all the same; reload what you save with "
            "`load_reward_model`."
        )
    if is_reward_model:
        return cls.from_pretrained(name_or_path, **{**load_kwargs, "output_loading_info": False})
    score = _new_head(config)
    loaded = AutoModelForImageTextToText.from_pretrained(name_or_path, **load_kwargs)
    native, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    _raise_on_incomplete(info, name_or_path, unexpected_allowed=("lm_head.weight",))
    return _replace_head(native, cls, score)


def _load_text_model(
    name_or_path: str | os.PathLike, config: PreTrainedConfig, is_reward_model: bool, load_kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Load a text model, whose class transformers or the checkpoint has."""
    revision = load_kwargs["revision"]
    cls = _class_for(AutoModelForSequenceClassification, config, name_or_path, revision)
    # The head is loaded in fp32, without changing the class for others.
    with with_values(cls, _keep_in_fp32_modules_strict=[*(cls._keep_in_fp32_modules_strict or ()), "score"]):
        loaded = AutoModelForSequenceClassification.from_pretrained(name_or_path, num_labels=1, **load_kwargs)
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    keep_head_in_fp32(model)
    heads = language_head_weights(config, name_or_path, revision) if info["unexpected_keys"] else set()
    _raise_on_incomplete(info, name_or_path, () if is_reward_model else ("score.weight",), tuple(heads))
    mark_as_reward_model(model.config)
    read_last_real_token(model)
    return model


def mark_as_reward_model(config: PreTrainedConfig) -> None:
    """Set one label and a regression in a configuration and its text configuration, as vLLM needs it."""
    # Otherwise vLLM applies a sigmoid to the reward; older releases read the text configuration alone.
    for part in (config, config.get_text_config()):
        part.num_labels = 1
        part.problem_type = "regression"


def _new_head(config: PreTrainedConfig) -> RewardHead:
    """Draw a new head; before the base model is loaded, which draws more or less as its weights are distributed."""
    text_config = config.get_text_config()
    with torch.device("cpu"):
        score = RewardHead(text_config.hidden_size, 1, bias=False, dtype=torch.float32)
    nn.init.normal_(score.weight, std=getattr(text_config, "initializer_range", 0.02))
    return score


def _replace_head(native: PreTrainedModel, cls: type[PreTrainedModel], score: RewardHead) -> PreTrainedModel:
    """Move the base model of `native` under the reward class, its marks of quantization and dispatch included."""
    # Loading the native class needs no table of key renames: under a class of ours transformers applies none, and
    # Qwen2-VL and Qwen2.5-VL would keep a random language model.
    mark_as_reward_model(native.config)
    with whole_weights(), torch.device("meta"):
        model = cls(native.config)
    model.model = native.model
    project_patches_by_matrix_product(model)
    model.score = score.to(native.get_output_embeddings().weight.device)
    marks = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    vars(model).update({name: vars(native)[name] for name in (*marks, "hf_device_map") if name in vars(native)})
    return model.eval()


def _load_adapter(
    name_or_path: str | os.PathLike, *, revision: str, trust_remote_code: bool, is_trainable: bool, **kwargs: Any
):
    """Load a PEFT adapter on its base model; the head comes with the adapter or with the base."""
    peft_config = PeftConfig.from_pretrained(str(name_or_path), revision=revision)
    # PEFT would take a pickle if there were no safetensors, and only warn if the head were not among the weights.
    weights = cached_file(name_or_path, SAFETENSORS_WEIGHTS_NAME, revision=revision)
    with safe_open(weights, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    saves_head = "score" in (peft_config.modules_to_save or [])
    if saves_head and not any(map(is_head, shapes)):
        raise ValueError(
            f"The adapter {name_or_path} has no `score` head among its weights; its rewards would be random."
        )
    base = load_reward_model(
        peft_config.base_model_name_or_path,
        revision=peft_config.revision,
        trust_remote_code=trust_remote_code,
        allow_new_head=saves_head,
        **kwargs,
    )
    read_beside_adapter(base.config, name_or_path, revision)
    if (num_tokens := num_tokens_of_adapter(base, peft_config, shapes)) is not None:
        base.resize_token_embeddings(num_tokens, mean_resizing=False)  # the rows that are added come with the adapter
    return PeftModel.from_pretrained(base, name_or_path, revision=revision, is_trainable=is_trainable).eval()


def _raise_on_incomplete(
    info: dict[str, Any],
    name_or_path: str | os.PathLike,
    missing_allowed: tuple[str, ...] = (),
    unexpected_allowed: tuple[str, ...] = (),
) -> None:
    problems = {
        "missing": set(info["missing_keys"]) - set(missing_allowed),
        "unexpected": set(info["unexpected_keys"]) - set(unexpected_allowed),
        "of another shape": {key[0] for key in info["mismatched_keys"]},
    }
    for problem, keys in problems.items():
        if keys:
            shown = ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")
            if any(key.endswith("score.weight") for key in keys):
                shown += ". It has no trained head; start a new one with `trl_dt2it.load_reward_model`"
            raise ValueError(f"{len(keys)} weights of {name_or_path} are {problem}: {shown}.")


def _unsupported(model_type: str, why: str) -> str:
    return (
        f"`{model_type}` {why}, so no reward model can be made of it. Supported: {', '.join(FAMILIES)}, "
        "and text models that `AutoModelForSequenceClassification` knows."
    )


class _TextRewardModel(GenericRewardModel):
    """A text model of transformers that reads its reward by the attention mask and is saved in its own names."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):  # type: ignore[override]  # all else is passed on
        """As in [`GenericRewardModel`], with positions that count real tokens, behind left padding too."""
        counts = attention_mask is not None and attention_mask.ndim == 2 and kwargs.get("position_ids") is None
        if counts and _takes_positions(cast(Any, type(self.base_model))):
            kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return super().forward(input_ids, attention_mask, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in [`~transformers.PreTrainedModel`], without a pad id that is the end token's."""
        with pad_id_as_saved(self):
            # vLLM and the Auto class know transformers' own names for text models.
            super().save_pretrained(save_directory, *args, **{"save_original_format": True, **kwargs})

    def __reduce_ex__(self, protocol):
        _, _, *state = cast(tuple, super().__reduce_ex__(protocol))
        return (_new_by_mask, (type(self).__bases__[1],), *state)


@functools.cache
def _takes_positions(base: Any) -> bool:
    return "position_ids" in inspect.signature(base.forward).parameters


@contextmanager
def pad_id_as_saved(model: Any) -> Iterator[None]:
    """Remove a pad id that is the end token's from the configuration of a text model while it is saved."""
    # By such an id transformers would read every conversation one token early, without a warning. Without an id it
    # reads a single conversation right and refuses a batch.
    configs = [model.config, model.config.get_text_config()] if isinstance(model, _TextRewardModel) else []
    with ExitStack() as removed:
        for config in configs:
            ends, pad = getattr(config, "eos_token_id", None), config.pad_token_id
            if pad is not None and pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
                removed.enter_context(with_values(config, pad_token_id=None))
        yield


def read_last_real_token(model: Any) -> None:
    """Have a text model of transformers read rewards at the last real token by mask, as our classes and vLLM do."""
    # transformers finds the token by the pad id: one token early where the pad token is the end token, and not at all
    # in batches without a pad id.
    model = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    stock: Any = type(model)
    if isinstance(model, GenericRewardModel) or not isinstance(model, PreTrainedModel) or model.base_model is model:
        return
    if stock.forward is not GenericForSequenceClassification.forward:
        # Families older than the generic class find the token in the same way, in their own forward.
        score: Any = getattr(model, "score", None)
        is_linear = isinstance(getattr(score, "original_module", score), nn.Linear)
        if not is_linear or MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None) is not stock:
            return
    model.__class__ = _class_by_mask(stock)


@functools.cache
def _class_by_mask(stock: Any) -> type[PreTrainedModel]:
    # transformers reads from the module of a class what it can do, what its weights are called, and where the code of
    # a checkpoint lies: all of the stock class.
    names = ("__doc__", "__module__", "__qualname__", "base_model_prefix")
    attributes = {name: getattr(stock, name) for name in names}
    return cast("type[PreTrainedModel]", type(stock.__name__, (_TextRewardModel, stock), attributes))


def _new_by_mask(stock: Any) -> PreTrainedModel:
    """Make an empty model for pickle, which finds the stock class under the name."""
    cls = _class_by_mask(stock)
    return cls.__new__(cls)


def _class_for(auto: Any, config: PreTrainedConfig, name_or_path: str | os.PathLike, revision: str) -> Any:
    """Return the class that an Auto class loads, of transformers or of the checkpoint's own code, or `None`."""
    if type(config) in auto._model_mapping:
        return auto._model_mapping[type(config)]
    reference = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    return reference and get_class_from_dynamic_module(reference, name_or_path, revision=revision)


def language_head_weights(config: PreTrainedConfig, name_or_path: str | os.PathLike, revision: str) -> set[str]:
    """Return the names of the language head's weights of a text family, in the model and in the checkpoint."""
    # `lm_head` in most families, `embed_out` in GPT-NeoX, with or without bias, tied or not.
    if (native := _class_for(AutoModelForCausalLM, config, name_or_path, revision)) is None:
        return set()
    with whole_weights(), torch.device("meta"):
        model = native(config)
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{model.base_model_prefix}.")}
    return {*heads, *revert_weight_conversion(model, heads)}


if not TYPE_CHECKING:  # which would take every name for one of this module

    def __getattr__(name: str) -> Any:
        """Return the reward model class of a supported family by its name, as pickle needs it."""
        for model_type, family in FAMILIES.items():
            if name == family.prefix + _REWARD_SUFFIX:
                return reward_model_class(CONFIG_MAPPING[model_type])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def embedding_name(model: PreTrainedModel) -> str:
    """Return the dotted path of a model's token embeddings."""
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)


def num_tokens_of_adapter(base: PreTrainedModel, peft_config: Any, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return the number of token embeddings that an adapter needs, or `None` if its base model has as many."""
    path, current = embedding_name(base), len(cast(torch.Tensor, base.get_input_embeddings().weight))
    saved = [shape[0] for key, shape in shapes.items() if f".{path}." in key and key.endswith("weight")]
    indices = getattr(peft_config, "trainable_token_indices", None) or {}
    if isinstance(indices, dict):
        indices = indices.get(path.rsplit(".", 1)[-1], [])
    needed = max(saved, default=max([current - 1, *indices]) + 1)
    return None if needed == current else needed


def set_reward_statistics(config: PreTrainedConfig, statistics: dict[str, float] | None) -> None:
    """Set `reward_mean` and `reward_std` of a configuration, or remove them."""
    for name in STATISTICS:
        vars(config).pop(name, None)
    vars(config).update(statistics or {})


def write_beside_adapter(config: PreTrainedConfig, folder: str | os.PathLike) -> None:
    """Write the mean and standard deviation of a configuration into an adapter's directory."""
    path = Path(folder) / STATISTICS_FILE
    if values := {name: vars(config)[name] for name in STATISTICS if name in vars(config)}:
        write_json(path, values)
    else:
        path.unlink(missing_ok=True)


def read_beside_adapter(config: PreTrainedConfig, name_or_path: str | os.PathLike, revision: str | None) -> None:
    """Set the mean and standard deviation of an adapter's rewards in its base model's configuration."""
    path = cached_file(name_or_path, STATISTICS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    values = None if path is None else read_json(path)
    if path is not None and not (
        isinstance(values, dict)
        and {*values} == {*STATISTICS}
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values.values())
    ):
        raise ValueError(f"{path} does not hold the finite numbers {' and '.join(STATISTICS)}; delete it.")
    set_reward_statistics(config, values)


def load_processing_class(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> ProcessingClass:
    """Load the processor of a vision-language model, or the tokenizer of a text model."""
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
    """Set the fewest and most pixels to which the processor scales an image; they are saved with it."""
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    given = {edge: area for edge, area in limits.items() if area is not None}
    if not given:
        return
    # With pixel limits the class's default size has these two keys, which hold areas in spite of their names. Other
    # families name one edge, or height and width.
    image_processor = processing_class.image_processor if isinstance(processing_class, ProcessorMixin) else None
    if image_processor is None or set(type(image_processor).size or ()) != {*limits}:
        name = type(processing_class).__name__
        raise ValueError(
            f"`min_pixels` and `max_pixels` have no effect on {name}, which has no pixel limits; leave them out."
        )
    image_processor.size = type(image_processor.size)(**{**dict(image_processor.size), **given})
