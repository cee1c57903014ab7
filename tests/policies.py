"""A tiny vision-language model that writes, and a tiny reward model for what it writes."""

from pathlib import Path

import torch
from transformers import AutoProcessor

from trl_dt2it import load_reward_model
from trl_dt2it.demo.tiny import build_tiny_vlm


# Two steps of a trainer of TRL's that trains it.
ON_THE_CPU = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def policy_and_reward_model(folder: Path, **config: float) -> tuple[str, str]:
    """Directories of both; `config` goes into the configuration of the reward model."""
    policy = build_tiny_vlm(folder / "policy", num_layers=2, vision_depth=2)
    torch.manual_seed(0)
    model = load_reward_model(policy)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder / "reward")
    AutoProcessor.from_pretrained(policy).save_pretrained(folder / "reward")
    return policy, str(folder / "reward")
