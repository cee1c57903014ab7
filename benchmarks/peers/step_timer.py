"""A callback that measures the optimisation steps of any trainer derived from transformers' Trainer.

It runs in the environment of each peer, so that it needs nothing but torch and transformers.
"""

import json
import os
import platform
import resource
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


PACKAGES = ("trl-dt2it", "ms-swift", "llamafactory", "trl", "transformers", "accelerate", "torch", "torchvision")


class StepTimer(TrainerCallback):
    """
    Measures the wall time from the end of one optimisation step to the end of the next, so that waiting for data
    counts and the first step does not, and notes what the model is given.

    Args:
        output (`str` or `Path`):
            JSON file that is written when training ends.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.step_ends: list[tuple[float, float]] = []
        self.batches: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.model = model
        # ms-swift has a hook that turns tokens and images into embeddings; this one has to see them before.
        model.register_forward_pre_hook(self._note_batch, prepend=True, with_kwargs=True)

    def _note_batch(self, model, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        is_padded = mask is not None and mask.shape == ids.shape
        self.batches.append(
            {
                "shape": list(ids.shape),
                "tokens": int(mask.sum()) if is_padded else ids.numel(),
                "image_patches": len(kwargs["pixel_values"]),
            }
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step_ends.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        times, cpu_times = (
            [end - start for start, end in zip(ends, ends[1:], strict=False)]
            for ends in zip(*self.step_ends, strict=True)
        )
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        record = {
            "step_seconds": times,
            # Of all threads together: much less than the seconds times the threads says that something else ran too.
            "step_cpu_seconds": cpu_times,
            "pairs_per_second_median": batch_size / statistics.median(times),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "batch_size": batch_size,
            "batches": self.batches,
            "trained_parameters": sum(p.numel() for p in parameters),
            "dtypes": sorted({str(p.dtype) for p in parameters}),
            "attention": attention_of(self.model),
            "optimizer": str(args.optim),
            "threads": torch.get_num_threads(),
            "versions": installed_versions(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        self.output.write_text(json.dumps(record, indent=2) + "\n")


def attention_of(model) -> dict[str, str]:
    """Attention implementation of the language model and of the vision tower."""
    # LLaMA-Factory's value-head model keeps the model in this attribute.
    config = getattr(model, "pretrained_model", model).config
    parts = {"text": config.get_text_config(), "vision": config.vision_config}
    return {name: str(part._attn_implementation) for name, part in parts.items()}


def installed_versions() -> dict[str, str]:
    """Versions of those of the packages that this environment has."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
