"""How far do the launch files that ship lie from plain training, for every tuning, layout and kind of data?

Tiny checkpoints with random weights and real processors, in fp32, on two processes over gloo: three optimizer steps of
two pairs a process, with weight decay. Plain training is DDP (`multi_gpu.yaml`). In mixed data one process sees images
or videos where the other sees text, and some steps have text alone. Then the settings of each recipe under each launch
file in bf16: how many of the trained fp32 weights a step of its learning rate moves.

Prints tables and writes `benchmarks/results/launches.{json,md}`. Fails where a loss is off by more than 1e-5 or a
weight by more than 1e-4.

usage: python benchmarks/launches.py
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from lib.report import markdown, write
from transformers import AutoProcessor

from tests.distributed import launches
from tests.distributed.launches import LAUNCHES, Case, largest_difference, saved_weights
from tests.families import family_dir
from tests.processes import Run
from trl_dt2it import load_reward_model


LOSS_BOUND, WEIGHT_BOUND = 1e-5, 1e-4
TUNINGS = {
    "full": "all weights, from a native checkpoint",
    "reward_model": "all weights, from a reward model",
    "lora": "LoRA",
}
FAMILIES = ("qwen3_vl", "qwen2_5_vl", "llava_onevision", "gemma3")


def make_bases(folder: Path) -> dict[str, str]:
    """Directories of the models to start from; the reward model is made of the first family."""
    torch.manual_seed(5)
    reward_model = folder / "reward_model"
    load_reward_model(family_dir("qwen3_vl"), dtype="float32").save_pretrained(reward_model)
    AutoProcessor.from_pretrained(family_dir("qwen3_vl")).save_pretrained(reward_model)
    return {**{name: str(family_dir(name)) for name in FAMILIES}, "reward_model": str(reward_model)}


def differences(folder: Path, plain: Path) -> tuple[float, float]:
    """Largest difference of a loss and of a saved weight."""
    found, expected = (json.loads((one / "result.json").read_text()) for one in (folder, plain))
    loss = float(np.abs(np.subtract(found["losses"], expected["losses"])).max())
    return loss, largest_difference(saved_weights(folder), saved_weights(plain))


def main() -> None:
    cases = launches.all_cases()
    recipes = [{"recipe": name, "bf16": bf16} for name in launches.RECIPES for bf16 in (False, True)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bases = make_bases(folder)
        settings = [*map(asdict, cases), *recipes]
        for launch in LAUNCHES:
            Run(launches.run_cases, launch, settings, bases, str(folder), num_processes=2).finish(timeout=3600)
        found = {
            (launch, case): differences(folder / f"{launch}-{index}", folder / f"multi_gpu-{index}")
            for launch in LAUNCHES[1:]
            for index, case in enumerate(cases)
        }
        moved = {
            (launch, settings["recipe"], settings["bf16"]): json.loads(
                (folder / f"{launch}-{len(cases) + index}" / "result.json").read_text()
            )
            for launch in LAUNCHES
            for index, settings in enumerate(recipes)
        }

    def cell(launch: str, chosen: list[Case]) -> str:
        pairs = [found[launch, case] for case in chosen]
        return " / ".join(f"{max(column):.0e}" for column in zip(*pairs, strict=True))

    rows = []
    for tuning, words in TUNINGS.items():
        for kind in launches.KINDS:
            chosen = [c for c in cases if (c.tuning, c.data, c.checkpointing) == (tuning, kind, "none")]
            chosen = [c for c in chosen if c.family == "qwen3_vl"]
            rows.append([words, kind, *(cell(launch, chosen) for launch in LAUNCHES[1:])])
        for kind in ("reentrant", "plain"):
            chosen = [c for c in cases if (c.tuning, c.checkpointing) == (tuning, kind)]
            name = f"{chosen[0].data}, {'reentrant' if kind == 'reentrant' else 'non-reentrant'} checkpointing"
            rows.append([words, name, *(cell(launch, chosen) for launch in LAUNCHES[1:])])
    for family in FAMILIES[1:]:
        chosen = [c for c in cases if c.family == family]
        words = f"{TUNINGS['full']}, {family}"
        rows.append([words, chosen[0].data, *(cell(launch, chosen) for launch in LAUNCHES[1:])])
    precision = [
        [name, *(f"{moved[launch, name, True]['moved']:.1%}" for launch in LAUNCHES)]
        + [f"{moved['multi_gpu', name, False]['moved']:.1%}"]
        for name in launches.RECIPES
    ]
    files = [f"`{launch}.yaml`" for launch in LAUNCHES]
    worst = [max(column) for column in zip(*found.values(), strict=True)]
    text = "\n\n".join(
        [
            "Largest difference of a loss / of a saved weight from plain training after three steps, over both "
            "layouts; fp32, two processes.",
            markdown(["tuning", "data", *files[1:]], rows),
            f"Worst: {worst[0]:.1e} / {worst[1]:.1e}.",
            f"Share of the trained fp32 weights that {launches.RECIPE_STEPS} steps with the settings of a recipe have "
            "moved in bf16, and in fp32:",
            markdown(["recipe", *files, "fp32"], precision),
        ]
    )
    record = {
        "differences": [
            {"launch": launch, **asdict(case), "loss": loss, "weight": weight}
            for (launch, case), (loss, weight) in found.items()
        ],
        "moved": [
            {"launch": launch, "recipe": recipe, "bf16": bf16, **values}
            for (launch, recipe, bf16), values in moved.items()
        ],
    }
    write("launches", text, record)
    if worst[0] > LOSS_BOUND or worst[1] > WEIGHT_BOUND:
        sys.exit(f"A launch differs from plain training by {worst[0]:.1e} in a loss or {worst[1]:.1e} in a weight.")


if __name__ == "__main__":
    main()
