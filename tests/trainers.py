"""Trainers of tiny models on the CPU, and what came out of a training."""

import torch
from transformers import (
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer

from .families import family_dir


MAIN_FAMILIES = ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"]


def config(output_dir, **kwargs) -> MultimodalRewardConfig:
    return MultimodalRewardConfig(str(output_dir), **{**common(), **kwargs})


def common() -> dict:
    return {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def trainer_for(family: str, output_dir, train, args=None, **kwargs) -> MultimodalRewardTrainer:
    return MultimodalRewardTrainer(
        str(family_dir(family)), args=config(output_dir, **(args or {})), train_dataset=train, **kwargs
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def text_model(tokenizer) -> Qwen3ForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text_config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, num_labels=1, initializer_range=0.2, **sizes
    )
    text_config.pad_token_id = tokenizer.pad_token_id
    return Qwen3ForSequenceClassification(text_config)
