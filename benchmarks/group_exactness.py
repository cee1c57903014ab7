"""How far do rewards and gradients of pairs that share their prompt lie from those of the same pairs apart, for every
family?

Tiny checkpoints of the tests' families, with random weights and real processors, in fp32: 19 pairs of five prompts of
two to four answers, with no, one and two images, some pairs twice, some with their answers swapped, all with weights.
As they are, with at most three answers together, with gradient checkpointing, with LoRA, in three batches with every
third pair dropped, under DDP and under torch's `fully_shard`; the last two on two processes over gloo, each with half
of the pairs. Apart is two plain rows a pair, images encoded for both, the family's own attention, one process.

Prints a table and writes `benchmarks/results/group_exactness.{json,md}`. Fails where a reward is off by more than 1e-5
or a gradient by more than 1e-4 of its norm.

usage: python benchmarks/group_exactness.py [FAMILY ...]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from lib.report import markdown, write
from peft import LoraConfig, get_peft_model
from shared_prefix_exactness import GRADIENT_BOUND, REWARD_BOUND, layouts, new_model, run_two_processes
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import logsigmoid
from torch.nn.parallel import DistributedDataParallel

from tests.families import FAMILIES, build_family
from tests.training.test_grouping import grouped_rows
from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.models import families
from trl_dt2it.training.losses import pair_rewards


ALONE = {
    "plain": {},
    "3 answers": {"max_answers_per_group": 3},
    "checkpointing": {},
    "LoRA": {},
    "3 batches, drops": {},
}
TOGETHER = ("DDP x 2", "fully_shard x 2")
# PEFT knows not all linear layers of Gemma 4's tower.
LAYERS = {"gemma4": r".*language_model.*_proj"}


def learn(model, batch: dict, plain: bool = False) -> torch.Tensor:
    """Rewards `(2, B)` of a batch, whose weighted loss is added to the gradients."""
    pairs = batch["pairs"]
    tensors = {name: value for name, value in batch.items() if name != "pairs"}
    tensors = layouts.plain_two_rows(tensors) if plain else tensors
    rewards = pair_rewards(model, tensors, len(pairs["weight"]), pairs.get("answers"))
    chosen, rejected = rewards[:, : len(pairs["weight"])]
    (-(pairs["weight"] * logsigmoid(chosen - rejected)).sum() + 0.0 * rewards.sum()).backward()
    return torch.stack([chosen, rejected]).detach()


def gradients_of(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in found.items()}


def expected_of(model, processor, rows: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    # Some families refuse batches of rows with and without images, so that each pair is a batch.
    rewards = [learn(model, MultimodalPreferenceCollator(processor)([row]), plain=True) for row in rows]
    return torch.cat(rewards, dim=1), gradients_of(model)


def compare_alone(family: str, directory: Path) -> dict[str, tuple[float, float]]:
    processor = layouts.AutoProcessor.from_pretrained(directory)
    shares = families.FAMILIES[family].shares_prefix
    found = {}
    for setting, options in ALONE.items():
        rows = grouped_rows()
        model = new_model(directory)
        if setting == "LoRA":
            layers = LAYERS.get(family, "all-linear")
            lora = LoraConfig(r=4, target_modules=layers, init_lora_weights=False, modules_to_save=["score"])
            lora.task_type = "SEQ_CLS"
            model = get_peft_model(model, lora)
        batches = [rows]
        if setting == "3 batches, drops":
            rows = [row for index, row in enumerate(rows) if index % 3]
            batches = [rows[start::3] for start in range(3)]
        expected, wanted = expected_of(model, processor, [row for batch in batches for row in batch])
        if setting == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        collator = MultimodalPreferenceCollator(processor, share_prefix=shares, group_pairs=True, **options)
        made = [collator(batch) for batch in batches]
        assert any("answers" in batch["pairs"] for batch in made)
        rewards = torch.cat([learn(model, batch) for batch in made], dim=1)
        difference = (rewards - expected).abs().max().item()
        found[setting] = (difference, layouts.gradient_difference(gradients_of(model), wanted))
    return found


def compare_together(family: str, directory: Path) -> dict[str, tuple[float, float]]:
    rank, rows = dist.get_rank(), grouped_rows()
    processor = layouts.AutoProcessor.from_pretrained(directory)
    expected, wanted = expected_of(new_model(directory), processor, rows)
    shares = families.FAMILIES[family].shares_prefix
    # Sets that hold no video, as a trainer finds.
    dummies = {"add_dummy_image": True, "media": ("image",)}
    collator = MultimodalPreferenceCollator(processor, share_prefix=shares, group_pairs=True, **dummies)
    mine = slice(0, len(rows) // 2) if rank == 0 else slice(len(rows) // 2, None)
    found = {}
    for setting in TOGETHER:
        bare = model = new_model(directory)
        if setting == "DDP x 2":
            model = DistributedDataParallel(model, find_unused_parameters=True)
        else:
            for module in model.modules():
                if type(module).__name__ in (model._no_split_modules or []):
                    fully_shard(module)
            fully_shard(model)
        difference = (learn(model, collator(rows[mine])) - expected[:, mine]).abs().max()
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        # Both average over the processes. Parts that only dummies reach have gradients of zeros.
        gradients = {name: 2 * value for name, value in gradients_of(bare).items() if name in wanted}
        found[setting] = (difference.item(), layouts.gradient_difference(gradients, wanted))
    return found


def main(names: list[str]) -> None:
    results: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directories = {family: build_family(family, Path(folder) / family) for family in names}
        for family, directory in directories.items():
            results[family] = compare_alone(family, directory)
            print(family, results[family], flush=True)
        for family, found in run_two_processes(directories, __file__).items():
            results[family] |= {setting: tuple(values) for setting, values in found.items()}
    settings = [*ALONE, *TOGETHER]
    table = [[f, *(f"{results[f][one][0]:.0e} / {results[f][one][1]:.0e}" for one in settings)] for f in names]
    worst = [max(values[index] for found in results.values() for values in found.values()) for index in (0, 1)]
    lines = ["Largest difference of a reward / of a gradient, relative to its norm, from two plain rows a pair; fp32."]
    lines += ["", markdown(["family", *settings], table), "", f"Worst: {worst[0]:.1e} / {worst[1]:.1e}."]
    write("group_exactness", "\n".join(lines), {"results": results, "worst": worst})
    if worst[0] > REWARD_BOUND or worst[1] > GRADIENT_BOUND:
        sys.exit(f"Bounds are {REWARD_BOUND} and {GRADIENT_BOUND}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        given = (argument.split("=", 1) for argument in sys.argv[2:])
        compared = {name: compare_together(name, Path(path)) for name, path in given}
        if dist.get_rank() == 0:
            print(json.dumps(compared))
        dist.destroy_process_group()
    else:
        torch.set_num_threads(2)
        main(sys.argv[1:] or list(FAMILIES))
