"""Train the tiny model that ships in `trl_dt2it/demo/tiny_reader` anew: `python tools/tiny_reader.py OUTPUT_DIR`."""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer, load_reward_model
from trl_dt2it.data import reformulate_t2i
from trl_dt2it.demo.digits import make_digits, make_digits_t2i, two_image_texts
from trl_dt2it.demo.tiny import build_tiny_vlm


PAIRS = 3000  # of each kind, which the reader learns from

COLUMNS = ["prompt", "chosen", "rejected", "images", "pair_id", "source"]


def train_tiny_reader(output_dir: str | Path, *, seed: int = 42, seeing_epochs: int = 4, epochs: int = 8) -> str:
    """Train the tiny model to read a digit and to compare two images, and save it without the reward head."""
    read_outs = make_digits("train", PAIRS, seed=seed).select_columns(COLUMNS)
    images = reformulate_t2i(make_digits_t2i("train", PAIRS, seed=seed), seed=seed).select_columns(COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        base = build_tiny_vlm(f"{folder}/base", seed=seed, extra_texts=two_image_texts())
        seeing = train(base, read_outs, f"{folder}/seeing", seed, seeing_epochs)
        trained = train(seeing, concatenate_datasets([images, read_outs]), f"{folder}/comparing", seed, epochs)
        reader = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        reader.model.load_state_dict(backbone_of(trained))
        reader.bfloat16().save_pretrained(output_dir)
        AutoProcessor.from_pretrained(base).save_pretrained(output_dir)
    return str(output_dir)


def backbone_of(directory: str) -> dict[str, torch.Tensor]:
    return load_reward_model(directory, dtype="float32").model.state_dict()


def train(model: str, rows: Dataset, output_dir: str, seed: int, epochs: int) -> str:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir")
    train_tiny_reader(parser.parse_args().output_dir)
