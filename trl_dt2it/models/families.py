"""The table of supported model families, and their registration with the Auto classes.

To add a family:

1. Add its row to `FAMILIES`. `print(model)` shows the names of its parts. Leave `shares_prefix`, `uncounted_tokens`
   and `mixes_media` at their defaults; the tests say where one does not hold.
2. Add a tiny configuration with its processor to `tests/families_models.py`, keeping the family's peculiarities, and
   its chat template and special tokens to `tests/families_chat.py`.
3. Run `python -m pytest tests/models tests/training/test_collator.py tests/training/test_batching_counts.py`.
4. Add its row to the table of `docs/models.md`.

The table holds only what cannot be read off a model or a processor, as pixel limits, M-RoPE, video support and
placeholder ids can. Importing this module imports nothing of torch or transformers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Family:
    """The traits of one model family of transformers."""

    prefix: str  # of its classes: `{prefix}Config`, `{prefix}ForConditionalGeneration`
    processor: str  # class name
    vision_tower: str = "vision_tower"  # module name, one component of a parameter's path
    # Modules between the vision tower and the language model; they may lie inside the tower.
    projector: tuple[str, ...] = ("multi_modal_projector",)
    # One row per pair gives the rewards and gradients of two: each answer is read causally after its prompt.
    shares_prefix: bool = True
    # Special tokens around an image that the processor's count from the image's size misses; `None` where counting
    # takes the pixels.
    uncounted_tokens: int | None = 0
    mixes_media: bool = True  # one batch may hold images and videos: their tokens differ


_TILED = ("image_newline", "multi_modal_projector")

# By `model_type`. The tests load, save, score and train each of them (`docs/models.md`).
FAMILIES = {
    # Sliding layers.
    "aya_vision": Family("AyaVision", "AyaVisionProcessor", shares_prefix=False),
    # Image tokens see each other. The line breaks around an image become one token with those of the text.
    "gemma3": Family("Gemma3", "Gemma3Processor", shares_prefix=False, uncounted_tokens=None),
    "gemma4": Family(
        "Gemma4", "Gemma4Processor", projector=("embed_vision",), shares_prefix=False, uncounted_tokens=2
    ),
    # Images and videos have the same token, and transformers does not tell them apart.
    "glm4v": Family("Glm4v", "Glm4vProcessor", "visual", ("merger",), mixes_media=False),
    "idefics3": Family("Idefics3", "Idefics3Processor", "vision_model", ("connector",)),
    "internvl": Family("InternVL", "InternVLProcessor"),
    "llava": Family("Llava", "LlavaProcessor"),
    "llava_next": Family("LlavaNext", "LlavaNextProcessor", projector=_TILED),
    # The count ignores that several images are not tiled.
    "llava_onevision": Family("LlavaOnevision", "LlavaOnevisionProcessor", projector=_TILED, uncounted_tokens=None),
    "mistral3": Family("Mistral3", "PixtralProcessor"),
    "qwen2_5_vl": Family("Qwen2_5_VL", "Qwen2_5_VLProcessor", "visual", ("merger",)),
    "qwen2_vl": Family("Qwen2VL", "Qwen2VLProcessor", "visual", ("merger",)),
    # Linear attention.
    "qwen3_5": Family("Qwen3_5", "Qwen3VLProcessor", "visual", ("merger",), shares_prefix=False),
    "qwen3_vl": Family("Qwen3VL", "Qwen3VLProcessor", "visual", ("deepstack_merger_list", "merger")),
    "qwen3_vl_moe": Family("Qwen3VLMoe", "Qwen3VLProcessor", "visual", ("deepstack_merger_list", "merger")),
    # The processor has no count.
    "smolvlm": Family("SmolVLM", "SmolVLMProcessor", "vision_model", ("connector",), uncounted_tokens=None),
}

# The input that holds the pixels of each kind of media.
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}

# Besides tokens, the inputs of M-RoPE positions: one entry per image or video.
ROPE_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

_AUTO_MODULE = "transformers.models.auto.modeling_auto"


def register_auto_classes() -> None:
    """Register all reward model classes with `AutoModelForSequenceClassification`, now or once it is loaded."""
    # Loading the Auto classes here would take several times as long as `import trl`.
    if (module := sys.modules.get(_AUTO_MODULE)) is not None:
        _register(module)
    else:
        sys.meta_path.insert(0, _AutoModuleFinder())


def _register(auto_module: Any) -> None:
    """Add the classes to transformers' table of names and of the modules to look them up in."""
    for model_type, family in FAMILIES.items():
        name = f"{family.prefix}ForSequenceClassification"
        auto_module.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model_type] = name
        auto_module.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING._modules[model_type] = _OurModule()


class _OurModule:
    """Stand-in for the module of the classes, imported at the first lookup."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(".modeling", __package__), name)


class _AutoModuleFinder:
    """An import finder that registers the classes when the Auto classes are imported, and removes itself."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # on this one loader
        return spec
