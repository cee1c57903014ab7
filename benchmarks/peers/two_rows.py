"""A plain collator that gives two rows a pair, as all trainers did before: the baseline of one row a pair.

It calls the processor on all chosen and all rejected conversations and shares no code with the package.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin


@dataclass
class TwoRowCollator:
    """
    Makes a batch of B pairs with one image each: 2B padded rows, all chosen before all rejected, and 2B images.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of the model.
    """

    processor: ProcessorMixin

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [
            self.processor.apply_chat_template([*example["prompt"], *example[side]], tokenize=False)
            for side in ("chosen", "rejected")
            for example in examples
        ]
        images = [Image.open(path).convert("RGB") for example in examples for path in example["images"]]
        encoded = self.processor(text=texts, images=images * 2, padding=True, return_tensors="pt")
        chosen, rejected = encoded["attention_mask"].sum(1).chunk(2)
        pairs = {
            "weight": torch.ones(len(examples)),
            "source": [None] * len(examples),
            "num_tokens": chosen + rejected,
        }
        # `pairs` comes first: Trainer takes the batch size from the first tensor.
        return {"pairs": pairs, **encoded}
