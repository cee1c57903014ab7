"""How each trainer is started: the same training for all of them, in each one's own words.

Everything is trained, in fp32 and without gradient checkpointing, by fused AdamW, on batches in the order of the file,
so that step n is on the same pairs everywhere. Nothing is truncated or scaled down.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path


HERE = Path(__file__).parent
THREADS = 2
# LLaMA-Factory computes the logits of all tokens, and has no room for 4 of the longer pairs in 23 GB.
BATCH_SIZE, BATCH_SIZE_OF_4_ANSWERS = 4, 6
SMALLER_BATCH_SIZES = {(scenario, "llamafactory"): 2 for scenario in ("1100/100", "1100/400", "1100/100, 4 answers")}
MAX_TOKENS = 4096
MAX_PIXELS = 1024 * 1024
TRAINERS = ("ours", "one_row", "two_rows", "swift", "llamafactory")
# Requirements of the peers' environments. torch is the same in all.
TORCH = ("torch==2.14.1", "torchvision==0.29.1")
PEERS = {
    "swift": (*TORCH, "ms-swift==4.6.*", "qwen-vl-utils"),
    "llamafactory": (*TORCH, "llamafactory==0.9.5"),
}

# Names of `transformers.TrainingArguments`, which the peers' settings extend.
COMMON = {
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 1e-5,
    "optim": "adamw_torch_fused",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


def batch_size(scenario: str, trainer: str) -> int:
    usual = BATCH_SIZE_OF_4_ANSWERS if "4 answers" in scenario else BATCH_SIZE
    return SMALLER_BATCH_SIZES.get((scenario, trainer), usual)


@dataclass
class Run:
    """One training of one trainer; `folder` receives all that it writes, and `max_steps` includes the warm-up."""

    model: Path
    pairs: Path
    folder: Path
    batch_size: int
    max_steps: int

    @property
    def common(self) -> dict[str, object]:
        """Settings that all trainers name alike."""
        own = {
            "output_dir": str(self.folder / "output"),
            "per_device_train_batch_size": self.batch_size,
            "max_steps": self.max_steps,
        }
        return {**COMMON, **own}

    @property
    def output(self) -> Path:
        """Where the step timer writes."""
        return self.folder / "steps.json"


def environment(workdir: Path) -> dict[str, str]:
    """Variables of all runs: the same number of threads, no accelerator, no network, caches inside of the workdir."""
    caches = {name: str(workdir / "cache") for name in ("HF_HOME", "MODELSCOPE_CACHE", "TRITON_CACHE_DIR")}
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    switches = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**caches, **threads, **switches}


def command(trainer: str, run: Run, workdir: Path) -> list[str]:
    """The command of a trainer."""
    if trainer == "swift":
        return swift_command(run, peer_python(workdir, trainer))
    if trainer == "llamafactory":
        return llamafactory_command(run, peer_python(workdir, trainer))
    return our_command(trainer, run)


def peer_python(workdir: Path, peer: str) -> Path:
    return workdir / peer / "bin" / "python"


def our_command(rows: str, run: Run) -> list[str]:
    settings = {
        **run.common,
        "max_pixels": MAX_PIXELS,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
    }
    pairs = str(run.pairs / "trl.jsonl")
    return [
        sys.executable,
        str(HERE / "launch_ours.py"),
        rows,
        str(run.model),
        pairs,
        str(run.output),
        json.dumps(settings),
    ]


def swift_command(run: Run, python: Path) -> list[str]:
    settings = {
        **run.common,
        "rlhf_type": "rm",
        "model": run.model,
        "model_type": "qwen3_vl",
        "dataset": run.pairs / "swift.jsonl",
        "max_length": MAX_TOKENS,
        "max_pixels": MAX_PIXELS,
        "tuner_type": "full",
        "freeze_vit": False,
        "freeze_aligner": False,
        "torch_dtype": "float32",
        # By default true where the weights are fp32.
        "fp16": False,
        "bf16": False,
        "attn_impl": "sdpa",
        "gradient_checkpointing": False,
        "dataset_shuffle": False,
        # Its own `train_dataloader_shuffle` does not reach the reward trainer.
        "train_sampling_strategy": "sequential",
        "split_dataset_ratio": 0,
        "eval_strategy": "no",
        "dataset_num_proc": 1,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [str(python), str(HERE / "launch_peer.py"), "swift", str(run.output), "--", *flags]


def llamafactory_command(run: Run, python: Path) -> list[str]:
    settings = {
        **run.common,
        "stage": "rm",
        "do_train": True,
        "model_name_or_path": run.model,
        "template": "qwen3_vl_nothink",
        "dataset_dir": run.pairs,
        "dataset": "pairs",
        "cutoff_len": MAX_TOKENS,
        "image_max_pixels": MAX_PIXELS,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "bf16": False,
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
    }
    # JSON is YAML too; under its own suffix, version 0.9.5 cannot read it.
    config = run.folder / "config.yaml"
    config.write_text(json.dumps(settings, indent=2, default=str))
    return [str(python), str(HERE / "launch_peer.py"), "llamafactory", str(config), str(run.output)]
