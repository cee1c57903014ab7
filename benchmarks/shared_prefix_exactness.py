"""How far do rewards and gradients of one row per pair lie from those of two plain rows, for every family?

Tiny checkpoints of the tests' families, with random weights and real processors, in fp32: four pairs with no, one and
two images, as they are, with gradient checkpointing, with LoRA, under DDP and under torch's `fully_shard`; the last
two on two processes over gloo with two pairs each. Two plain rows are what everybody has: images encoded for both
answers, the family's own attention, one process.

Prints a table and writes `benchmarks/results/shared_prefix_exactness.{json,md}`. Fails where a reward is off by more
than 1e-5 or a gradient by more than 1e-4 of its norm.

usage: python benchmarks/shared_prefix_exactness.py [FAMILY ...]
"""

from pathlib import Path

import torch.distributed as dist
from lib.exactness import DUMMIES, TOGETHER, gradients_of, in_parallel, measure, new_model, with_lora
from torch.nn.functional import logsigmoid

from tests import pairs as layouts
from tests.rows import make_rows
from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.training.losses import pair_rewards


ALONE = ("plain", "checkpointing", "LoRA")


def rows() -> list[dict]:
    return make_rows(4, num_images=(1, 2, 0))


def compare_alone(family: str, directory: Path) -> dict[str, tuple[float, float]]:
    """Reward and gradient differences of the settings that need one process."""
    processor = layouts.AutoProcessor.from_pretrained(directory)
    one, two = (MultimodalPreferenceCollator(processor, share_prefix=share)(rows()) for share in (True, False))
    for batch in (one, two):
        del batch["pairs"]
    differences = {}
    for setting in ALONE:
        model = with_lora(new_model(directory), family) if setting == "LoRA" else new_model(directory)
        expected, expected_gradients = layouts.rewards_and_gradients(model, layouts.plain_two_rows(two))
        if setting == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rewards, gradients = layouts.rewards_and_gradients(model, one)
        difference = (rewards - expected).abs().max().item()
        differences[setting] = (difference, layouts.gradient_difference(gradients, expected_gradients))
    return differences


def compare_together(family: str, directory: Path) -> dict[str, tuple[float, float]]:
    """The settings that need two processes, each with half of the pairs."""
    rank = dist.get_rank()
    processor = layouts.AutoProcessor.from_pretrained(directory)
    two = MultimodalPreferenceCollator(processor)(rows())
    del two["pairs"]
    expected, expected_gradients = layouts.rewards_and_gradients(new_model(directory), layouts.plain_two_rows(two))
    mine = slice(2 * rank, 2 * rank + 2)
    one = MultimodalPreferenceCollator(processor, share_prefix=True, **DUMMIES)(rows()[mine])
    del one["pairs"]
    differences = {}
    for setting in TOGETHER:
        bare = new_model(directory)
        model = in_parallel(bare, setting)  # which has to live until the gradients are there
        rewards = pair_rewards(model, one, 2)  # of dummies too
        chosen, rejected = rewards[:, :2]
        (-logsigmoid(chosen - rejected).mean() + 0.0 * rewards.sum()).backward()
        difference = (rewards[:, :2].detach() - expected.view(2, -1)[:, mine]).abs().max()
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        gradients = {name: value for name, value in gradients_of(bare).items() if name in expected_gradients}
        differences[setting] = (difference.item(), layouts.gradient_difference(gradients, expected_gradients))
    return differences


if __name__ == "__main__":
    measure(
        "shared_prefix_exactness",
        "Largest difference of a reward / of a gradient, relative to its norm, from two plain rows; fp32.",
        layouts.SHARING_FAMILIES,
        [*ALONE, *TOGETHER],
        compare_alone,
        compare_together,
    )
