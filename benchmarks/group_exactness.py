"""Are rewards and gradients of pairs that share their prompt those of the same pairs apart, for every family?

Tiny checkpoints of the tests' families, with random weights and real processors, in fp32: 19 pairs of five prompts of
two to four answers, with no, one and two images, some pairs twice, some with their answers swapped, all with weights.
As they are, with at most three answers together, with gradient checkpointing, with LoRA, in three batches with every
third pair dropped, under DDP and under torch's `fully_shard`; the last two on two processes over gloo, each with half
of the pairs. Apart is two plain rows a pair, images encoded for both, the family's own attention, one process.

Prints a table and writes `benchmarks/results/group_exactness.{json,md}`. Fails where a reward is off by more than 1e-5
or a gradient by more than 1e-4 of its norm.

usage: python benchmarks/group_exactness.py [FAMILY ...]
"""

from pathlib import Path

import torch
import torch.distributed as dist
from lib.exactness import DUMMIES, TOGETHER, gradients_of, in_parallel, measure, new_model, with_lora
from torch.nn.functional import logsigmoid

from tests import pairs as layouts
from tests.families import FAMILIES
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


def learn(model, batch: dict, plain: bool = False) -> torch.Tensor:
    """Rewards `(2, B)` of a batch, whose weighted loss is added to the gradients."""
    pairs = batch["pairs"]
    tensors = {name: value for name, value in batch.items() if name != "pairs"}
    tensors = layouts.plain_two_rows(tensors) if plain else tensors
    rewards = pair_rewards(model, tensors, len(pairs["weight"]), pairs.get("answers"))
    chosen, rejected = rewards[:, : len(pairs["weight"])]
    (-(pairs["weight"] * logsigmoid(chosen - rejected)).sum() + 0.0 * rewards.sum()).backward()
    return torch.stack([chosen, rejected]).detach()


def expected_of(model, processor, rows: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    # Some families refuse batches of rows with and without images, so that each pair is a batch.
    rewards = [learn(model, MultimodalPreferenceCollator(processor)([row]), plain=True) for row in rows]
    return torch.cat(rewards, dim=1), gradients_of(model)


def compare_alone(family: str, directory: Path) -> dict[str, tuple[float, float]]:
    processor = layouts.AutoProcessor.from_pretrained(directory)
    shares = families.FAMILIES[family].shares_prefix
    differences = {}
    for setting, options in ALONE.items():
        rows = grouped_rows()
        model = with_lora(new_model(directory), family) if setting == "LoRA" else new_model(directory)
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
        differences[setting] = (difference, layouts.gradient_difference(gradients_of(model), wanted))
    return differences


def compare_together(family: str, directory: Path) -> dict[str, tuple[float, float]]:
    rank, rows = dist.get_rank(), grouped_rows()
    processor = layouts.AutoProcessor.from_pretrained(directory)
    expected, wanted = expected_of(new_model(directory), processor, rows)
    shares = families.FAMILIES[family].shares_prefix
    collator = MultimodalPreferenceCollator(processor, share_prefix=shares, group_pairs=True, **DUMMIES)
    mine = slice(0, len(rows) // 2) if rank == 0 else slice(len(rows) // 2, None)
    differences = {}
    for setting in TOGETHER:
        bare = new_model(directory)
        model = in_parallel(bare, setting)
        difference = (learn(model, collator(rows[mine])) - expected[:, mine]).abs().max()
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        # Both average over the processes. Parts that only dummies reach have gradients of zeros.
        gradients = {name: 2 * value for name, value in gradients_of(bare).items() if name in wanted}
        differences[setting] = (difference.item(), layouts.gradient_difference(gradients, wanted))
    return differences


if __name__ == "__main__":
    measure(
        "group_exactness",
        "Largest difference of a reward / of a gradient, relative to its norm, from two plain rows a pair; fp32.",
        list(FAMILIES),
        [*ALONE, *TOGETHER],
        compare_alone,
        compare_together,
    )
