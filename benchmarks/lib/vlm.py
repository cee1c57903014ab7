"""The model, the pairs and the layouts that the benchmarks of one row per pair measure."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoProcessor

from trl_dt2it import MultimodalPreferenceCollator, load_reward_model


sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))

# After the path is set: that folder also runs by itself, for the peers. Two of these are for `published.py`.
from model_and_pairs import build_config, build_model, build_pairs, build_processor  # noqa: E402, F401


# Tokens of a prompt, its image included, and of an answer. A word is a token; the template and the question make 16
# tokens of a prompt, and 2 of an answer, besides the (image_side / 32)^2 ones of the image.
LENGTHS = {
    "300/60": {"image_side": 512, "prompt_words": 28, "answer_words": (40, 76)},
    "300/135": {"image_side": 512, "prompt_words": 40, "answer_words": (93, 173)},
    "1100/100": {"image_side": 1024, "prompt_words": 60, "answer_words": (68, 128)},
    "1100/400": {"image_side": 1024, "prompt_words": 60, "answer_words": (278, 518)},
    "100/300": {"image_side": 256, "prompt_words": 20, "answer_words": (208, 388)},
}


def load(directory: Path):
    """The random Qwen3-VL of the peer comparison as a reward model in fp32, and its processor."""
    if not (directory / "config.json").exists():
        build_model(directory)
    torch.manual_seed(0)
    model = load_reward_model(directory, dtype="float32").train()
    return model, AutoProcessor.from_pretrained(directory)


def rows_of(directory: Path, name: str, count: int) -> list[dict]:
    """Canonical rows of given lengths, their images as files."""
    folder = directory / name.replace("/", "-")
    if not (folder / "trl.jsonl").exists():
        build_pairs(folder, count=count, **LENGTHS[name])
    return [json.loads(line) for line in (folder / "trl.jsonl").read_text().splitlines()][:count]


def batches(processor, rows: list[dict]) -> dict[str, dict]:
    """The same pairs as one row per pair; as two rows with each image once; and as two rows as everybody has them."""
    one = MultimodalPreferenceCollator(processor, share_prefix=True)(rows)
    once = MultimodalPreferenceCollator(processor)(rows)
    for batch in (one, once):
        del batch["pairs"]
    plain = {name: value for name, value in once.items() if name != "image_repeats"}
    for name in ("pixel_values", "image_grid_thw"):
        plain[name] = torch.cat([once[name]] * 2)
    return {"one row": one, "two rows, image once": once, "two rows": plain}


def step(model, batch: dict) -> None:
    """Forward and backward pass, without an optimiser."""
    chosen, rejected = model(**batch).logits[:, 0].chunk(2)
    (-logsigmoid(chosen - rejected)).mean().backward()
    model.zero_grad()
