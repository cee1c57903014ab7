"""Runs the trainer of this package with the step timer in it, on one row or on two rows a pair; `ours` reads the pairs
of a prompt together.

usage: python launch_ours.py ours|one_row|two_rows MODEL PAIRS.jsonl OUT.json SETTINGS
       (SETTINGS: arguments of `MultimodalRewardConfig`, as JSON)
"""

import json
import sys

from datasets import load_dataset
from step_timer import StepTimer
from torch import nn
from transformers import AutoProcessor
from two_rows import TwoRowCollator

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.models.modeling import PatchProjection


def main(rows: str, model: str, pairs: str, output: str, settings: str) -> None:
    is_ours, shares = rows != "two_rows", {"group_pairs": "auto" if rows == "ours" else False}
    trainer = MultimodalRewardTrainer(
        model,
        args=MultimodalRewardConfig(**json.loads(settings), **shares, share_prefix="auto" if is_ours else False),
        data_collator=None if is_ours else TwoRowCollator(AutoProcessor.from_pretrained(model)),
        train_dataset=load_dataset("json", data_files=pairs, split="train"),
        callbacks=[StepTimer(output)],
    )
    if not is_ours:  # the baseline is what transformers makes of two rows, its convolution over patches included
        for module in trainer.model.modules():
            if type(module) is PatchProjection:
                module.__class__ = nn.Conv3d
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
