"""Rewards and gradients of tiny families in two layouts: the settings they are compared in, and the table."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.families import build_family
from trl_dt2it import load_reward_model

from .report import markdown, write


REWARD_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
TOGETHER = ("DDP x 2", "fully_shard x 2")
# Of a collator on several processes whose sets hold images alone, as a trainer makes it.
DUMMIES = {"add_dummy_image": True, "media": ("image",)}
# PEFT does not know all linear layers of Gemma 4's tower.
_LORA_LAYERS = {"gemma4": r".*language_model.*_proj"}

# Largest difference of a reward and of a gradient in each setting, of a family in a directory.
Compare = Callable[[str, Path], dict[str, tuple[float, float]]]


def new_model(directory: Path):
    torch.manual_seed(0)
    return load_reward_model(directory, dtype="float32").train()


def with_lora(model, family: str):
    lora = LoraConfig(
        r=4,
        target_modules=_LORA_LAYERS.get(family, "all-linear"),
        init_lora_weights=False,
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, lora)


def in_parallel(model, setting: str):
    """The model as two processes train it, by one of `TOGETHER`; its parameters stay those of `model`."""
    if setting == TOGETHER[0]:
        return DistributedDataParallel(model, find_unused_parameters=True)
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or []):
            fully_shard(module)
    fully_shard(model)
    return model


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Whole gradients of all parameters that have one."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in gradients.items()}


def measure(
    name: str, about: str, families: Sequence[str], settings: Sequence[str], alone: Compare, together: Compare
) -> None:
    """Compare families in all settings and write the table. The script is started anew on two processes, which call
    this with the same arguments, for the settings `TOGETHER`."""
    if sys.argv[1:2] == ["--rank"]:
        _compare_on_rank(together)
        return
    torch.set_num_threads(2)
    results: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directories = {family: build_family(family, Path(folder) / family) for family in sys.argv[1:] or families}
        for family, directory in directories.items():
            results[family] = alone(family, directory)
        for family, compared in _run_two_processes(directories).items():
            results[family] |= {setting: tuple(values) for setting, values in compared.items()}
    rows = [
        [family, *("{:.0e} / {:.0e}".format(*compared[setting]) for setting in settings)]
        for family, compared in results.items()
    ]
    worst = [max(values[index] for compared in results.values() for values in compared.values()) for index in (0, 1)]
    text = f"{about}\n\n{markdown(['family', *settings], rows)}\n\nWorst: {worst[0]:.1e} / {worst[1]:.1e}."
    write(name, text, {"results": results, "worst": worst})
    if worst[0] > REWARD_BOUND or worst[1] > GRADIENT_BOUND:
        sys.exit(f"Bounds are {REWARD_BOUND} and {GRADIENT_BOUND}.")


def _run_two_processes(directories: Mapping[str, Path]) -> dict[str, dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += ["--master_port=29517", sys.argv[0], "--rank"]
    command += [f"{family}={directory}" for family, directory in directories.items()]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"')))


def _compare_on_rank(together: Compare) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    directories = dict(argument.split("=", 1) for argument in sys.argv[2:])
    compared = {family: together(family, Path(directory)) for family, directory in directories.items()}
    if dist.get_rank() == 0:
        print(json.dumps(compared))
    dist.destroy_process_group()
