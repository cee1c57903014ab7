"""The tiny model after it has learned to see, which ships with the package as `tiny-qwen3-vl-reader`.

What people train reward models from has learned to see long before, and random weights have not: from these, two
images are compared after some 2,000 steps only. So this one has been trained on clean read-outs and on pairs of
images, all of the training split, and then lost its reward head. Made anew by

    python -m trl_dt2it.demo.reader OUTPUT_DIR
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from ..data.t2i import reformulate_t2i
from .digits import make_digits, make_digits_t2i
from .sets import two_image_texts
from .tiny import build_tiny_vlm


PAIRS = 3000
_COLUMNS = ["prompt", "chosen", "rejected", "images", "pair_id", "source"]


def train_tiny_reader(output_dir: str | Path, *, seed: int = 42, seeing_epochs: int = 4, epochs: int = 8) -> str:
    """
    Trains the tiny model to read a digit and to compare two images, and saves what is behind the reward head.

    Args:
        output_dir (`str` or `Path`):
            Where the checkpoint goes, a native Qwen3-VL in bfloat16 (2 MB) with its processor.
        seed (`int`, *optional*, defaults to `42`):
            Seed of data, weights and order.
        seeing_epochs (`int`, *optional*, defaults to `4`):
            Epochs on read-outs alone, without which comparing is not learned.
        epochs (`int`, *optional*, defaults to `8`):
            Epochs on read-outs and pairs of images.

    Returns:
        `str`: `output_dir`.
    """
    read_outs = make_digits("train", PAIRS, seed=seed).select_columns(_COLUMNS)
    images = make_digits_t2i("train", PAIRS, seed=seed)
    images = reformulate_t2i(images, seed=seed).select_columns(_COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        base = build_tiny_vlm(f"{folder}/base", seed=seed, extra_texts=two_image_texts())
        seeing = _train(base, read_outs, f"{folder}/seeing", seed, seeing_epochs)
        trained = _train(seeing, concatenate_datasets([images, read_outs]), f"{folder}/comparing", seed, epochs)
        reader = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        reader.model.load_state_dict(_backbone(trained))
        reader.bfloat16().save_pretrained(output_dir)
        AutoProcessor.from_pretrained(base).save_pretrained(output_dir)
    return str(output_dir)


def _train(model: str, rows: Dataset, output_dir: str, seed: int, epochs: int) -> str:
    from ..training.config import MultimodalRewardConfig
    from ..training.trainer import MultimodalRewardTrainer

    args = MultimodalRewardConfig(
        output_dir,
        seed=seed,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        warmup_steps=0.1,
        weight_decay=0.01,
        loss_type="bt",
        gradient_checkpointing=False,
        image_check="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        reward_statistics_pairs=0,
    )
    trainer = MultimodalRewardTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    return output_dir


def _backbone(directory: str) -> dict[str, torch.Tensor]:
    from ..models.modeling import load_reward_model

    return load_reward_model(directory, dtype="float32").model.state_dict()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir")
    train_tiny_reader(parser.parse_args().output_dir)
