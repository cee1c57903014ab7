"""How far do rewards and gradients of one row per pair lie from those of two plain rows, for every family?

Tiny checkpoints of the tests' families, with random weights and real processors, in fp32: four pairs with no, one and
two images, as they are, with gradient checkpointing, with LoRA, under DDP and under torch's `fully_shard`; the last
two on two processes over gloo with two pairs each. Two plain rows are what everybody has: images encoded for both
answers, the family's own attention, one process.

Prints a table and writes `benchmarks/results/shared_prefix_exactness.{json,md}`. Fails where a reward is off by more
than 1e-5 or a gradient by more than 1e-4 of its norm.

usage: python benchmarks/shared_prefix_exactness.py [FAMILY ...]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from lib.report import markdown, write


sys.path.insert(0, str(Path(__file__).parents[1]))

from peft import LoraConfig, get_peft_model  # noqa: E402  (here and below: after the path is set, for `tests`)
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.functional import logsigmoid  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from tests import pairs as layouts  # noqa: E402
from tests.families import build_family  # noqa: E402
from tests.rows import make_rows  # noqa: E402
from trl_dt2it import MultimodalPreferenceCollator, load_reward_model  # noqa: E402


REWARD_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
SETTINGS = ("plain", "checkpointing", "LoRA", "DDP x 2", "fully_shard x 2")


def rows() -> list[dict]:
    return make_rows(4, num_images=(1, 2, 0))


def new_model(directory: Path):
    torch.manual_seed(0)
    return load_reward_model(directory, dtype="float32").train()


def compare_alone(directory: Path) -> dict[str, tuple[float, float]]:
    """Reward and gradient differences of the settings that need one process."""
    processor = layouts.AutoProcessor.from_pretrained(directory)
    one, two = (MultimodalPreferenceCollator(processor, share_prefix=share)(rows()) for share in (True, False))
    for batch in (one, two):
        del batch["pairs"]
    found = {}
    for setting in SETTINGS[:3]:
        model = new_model(directory)
        if setting == "LoRA":
            lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, modules_to_save=["score"])
            lora.task_type = "SEQ_CLS"
            model = get_peft_model(model, lora)
        expected, expected_gradients = layouts.rewards_and_gradients(model, layouts.plain_two_rows(two))
        if setting == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rewards, gradients = layouts.rewards_and_gradients(model, one)
        difference = (rewards - expected).abs().max().item()
        found[setting] = (difference, layouts.gradient_difference(gradients, expected_gradients))
    return found


def compare_together(directory: Path) -> dict[str, tuple[float, float]]:
    """The settings that need two processes, each with half of the pairs."""
    rank = dist.get_rank()
    processor = layouts.AutoProcessor.from_pretrained(directory)
    two = MultimodalPreferenceCollator(processor)(rows())
    del two["pairs"]
    expected, expected_gradients = layouts.rewards_and_gradients(new_model(directory), layouts.plain_two_rows(two))
    mine = slice(2 * rank, 2 * rank + 2)
    one = MultimodalPreferenceCollator(processor, share_prefix=True, add_dummy_image=True)(rows()[mine])
    del one["pairs"]
    found = {}
    for setting in SETTINGS[3:]:
        model = new_model(directory)
        bare = model
        if setting == "DDP x 2":
            model = DistributedDataParallel(model, find_unused_parameters=True)
        else:
            for module in model.modules():
                if type(module).__name__ in (model._no_split_modules or []):
                    fully_shard(module)
            fully_shard(model)
        rewards = model(**one).logits[:, 0]
        chosen, rejected = rewards[:4].chunk(2)
        (-logsigmoid(chosen - rejected).mean() + 0.0 * rewards.sum()).backward()
        chosen_and_rejected = torch.cat([expected[:4][mine], expected[4:][mine]])
        difference = (rewards[:4].detach() - chosen_and_rejected).abs().max()
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        gradients = {}
        for name, parameter in bare.named_parameters():
            if name in expected_gradients:
                gradient = parameter.grad
                gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[setting] = (difference.item(), layouts.gradient_difference(gradients, expected_gradients))
    return found


def run_two_processes(directories: dict[str, Path], script: str = __file__) -> dict[str, dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += ["--master_port=29517", script, "--rank", *(f"{name}={path}" for name, path in directories.items())]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"')))


def main(families: list[str]) -> None:
    results: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directories = {family: build_family(family, Path(folder) / family) for family in families}
        for family, directory in directories.items():
            results[family] = compare_alone(directory)
        for family, found in run_two_processes(directories).items():
            results[family] |= {setting: tuple(values) for setting, values in found.items()}
    table = [
        [family, *(f"{results[family][setting][0]:.0e} / {results[family][setting][1]:.0e}" for setting in SETTINGS)]
        for family in families
    ]
    worst = [max(values[index] for found in results.values() for values in found.values()) for index in (0, 1)]
    lines = ["Largest difference of a reward / of a gradient, relative to its norm, from two plain rows; fp32.", ""]
    lines += [markdown(["family", *SETTINGS], table), "", f"Worst: {worst[0]:.1e} / {worst[1]:.1e}."]
    write("shared_prefix_exactness", "\n".join(lines), {"results": results, "worst": worst})
    if worst[0] > REWARD_BOUND or worst[1] > GRADIENT_BOUND:
        sys.exit(f"Bounds are {REWARD_BOUND} and {GRADIENT_BOUND}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        compared = {
            name: compare_together(Path(path)) for name, path in (argument.split("=", 1) for argument in sys.argv[2:])
        }
        if dist.get_rank() == 0:
            print(json.dumps(compared))
        dist.destroy_process_group()
    else:
        torch.set_num_threads(2)
        main(sys.argv[1:] or layouts.SHARING_FAMILIES)
