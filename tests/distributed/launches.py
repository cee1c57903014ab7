"""Train the same small cases under every launch file that ships, on two gloo ranks of a CPU, and write what came out.

A case is a model, a tuning, a layout and a kind of data. DeepSpeed runs on CPUs as it is; accelerate leaves FSDP out
on a CPU unless it is told otherwise (`let_fsdp_run_on_cpu`). `accelerate launch` would import everything once for each
case: here processes that have imported it get the environment that it sets (`launch_environment`), and train one case
after the other.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml


ROOT = Path(__file__).parents[2]
LAUNCHES = ("multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
STEPS = 3
RECIPE_STEPS = 20
KINDS = ("image", "images", "text", "video", "mixed", "ranked")
RECIPES = ("qwen3_vl_8b", "qwen3_vl_8b_lora")


@dataclass(frozen=True)
class Case:
    """A training: `tuning` is `full`, `reward_model` (full, from a trained head) or `lora`; `data` names a kind
    of rows; `checkpointing` is `none`, `reentrant` or `plain`."""

    tuning: str = "full"
    data: str = "mixed"
    one_row: bool = True
    checkpointing: str = "none"
    family: str = "qwen3_vl"
    bf16: bool = False

    @property
    def name(self) -> str:
        layout = "one row" if self.one_row else "two rows"
        parts = [self.tuning, self.data, layout]
        parts += [f"{self.checkpointing} checkpointing"] * (self.checkpointing != "none")
        parts += [self.family] * (self.family != "qwen3_vl") + ["bf16"] * self.bf16
        return ", ".join(parts)


def all_cases() -> list[Case]:
    """Every tuning with every kind of data in both layouts, both kinds of checkpointing, other families, bf16."""
    tunings = ("full", "reward_model", "lora")
    cases = [Case(t, data, one_row) for t in tunings for data in KINDS for one_row in (True, False)]
    cases += [Case(t, "images", checkpointing="reentrant") for t in tunings]
    # Adapters under ZeRO-3 have reentrant checkpoints in any case, which cannot train a tower on images and videos.
    cases += [Case(t, "images" if t == "lora" else "mixed", checkpointing="plain") for t in tunings]
    cases += [
        Case(family="llava_onevision"),
        Case(family="qwen2_5_vl"),
        Case("full", "images", False, family="gemma3"),
    ]
    return cases


def launch_environment(launch: str, *, mixed_precision: str = "no", **changes: Any) -> dict[str, str]:
    """Environment that `accelerate launch` sets for a shipped file whose devices are changed to two CPU ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    settings = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{launch}.yaml").read_text())
    settings |= {"num_processes": 2, "mixed_precision": mixed_precision, **changes}
    path = Path(os.environ["LAUNCH_DIR"]) / f"{launch}-{mixed_precision}-{os.environ.get('RANK', 0)}.yaml"
    path.write_text(yaml.safe_dump(settings))
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args.nondefault = set()
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as `launch_command` does
    prepare = prepare_deepspeed_cmd_env if args.use_deepspeed else prepare_multi_gpu_env
    found = prepare(args)
    environment = found[1] if isinstance(found, tuple) else found
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def let_fsdp_run_on_cpu() -> None:
    """accelerate falls back to DDP where there is no accelerator; with this it shards over gloo."""
    import accelerate.state
    from accelerate.utils import DistributedType

    prepare = accelerate.state.PartialState._prepare_backend

    def prepare_on_cpu(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> Any:
        backend, kind = prepare(self, cpu, sagemaker_dp, backend)
        return ("gloo", DistributedType.MULTI_XPU) if kind == DistributedType.MULTI_CPU else (backend, kind)

    accelerate.state.PartialState._prepare_backend = prepare_on_cpu
    accelerate.state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def let_deepspeed_run_on_cpu() -> None:
    """DeepSpeed compiles an operator for shared memory between CPU ranks, for half a minute; gloo will do."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm  # noqa: F401  (its submodule `torch` is hidden by a name of the package)

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def divide_small_parameters(args: Any) -> None:
    """ZeRO-3 keeps parameters of up to 100,000 numbers whole, which those of a tiny model all are."""
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 10


def make_rows_of(kind: str, seed: int = 0) -> list[dict]:
    """Twelve rows of a kind; `mixed`: of two ranks with two rows each, one sees images where the other sees text, then
    text where the other sees a video, and then both see nothing but text. `ranked`: two pairs of a prompt in a row."""
    from tests.rows import make_rows, video_rows

    if kind == "ranked":
        rows = make_rows_of("images", seed)
        for one, other in zip(rows[::2], rows[1::2], strict=True):
            other |= {name: one[name] for name in ("prompt", "images", "rejected")}
        return rows
    counts = {"image": (1,), "images": (1, 3, 2), "text": (0,)}
    if kind in counts:
        rows = make_rows(12, seed=seed, num_images=counts[kind])
    elif kind == "video":
        rows = video_rows((2,) * 12, seed=seed)
    else:
        text = make_rows(12, seed=seed, num_images=(0,))
        rows = [*make_rows(2, seed=seed + 1), *text[2:6], *video_rows((2, 2), seed=seed + 2), *text[8:12]]
    columns = {name for row in rows for name in row} - ({"images"} if kind == "text" else set())
    return [{name: row.get(name) for name in sorted(columns)} for row in rows]


def without_fps(rows: list[dict]) -> list[dict]:
    """Arrow wants videos of one type."""
    for row in rows:
        if row.get("videos"):
            row["videos"] = [one["frames"] if isinstance(one, dict) else one for one in row["videos"]]
    return rows


def train_case(case: Case, bases: dict[str, str], output_dir: Path, **options: Any) -> dict[str, Any]:
    """Trains a case for three steps, evaluates before and after, and saves the model."""
    from datasets import Dataset
    from peft import LoraConfig

    from tests.trainers import config
    from trl_dt2it import MultimodalRewardTrainer

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    if "blind_model" in options:
        options |= {"blind_model": bases[options["blind_model"]], "reward_posterior": False}
    resume = options.pop("resume", None)
    if case.checkpointing != "none":
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": case.checkpointing == "reentrant"}
    args = config(
        output_dir,
        **{
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "train_sampling_strategy": "sequential",
            "share_prefix": "true" if case.one_row else "false",
            "gradient_checkpointing": case.checkpointing != "none",
            "weight_decay": 0.1,
            "lr_scheduler_type": "constant",
            "reward_statistics_pairs": 4,
            "reward_posterior": True,
            "bf16": case.bf16,
            "model_init_kwargs": {"dtype": "bfloat16"} if case.bf16 else None,
            **options,
        },
    )
    divide_small_parameters(args)
    rows = without_fps(make_rows_of(case.data))
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if case.tuning == "lora" else None
    trainer = MultimodalRewardTrainer(
        bases["reward_model" if case.tuning == "reward_model" else case.family],
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:5]),
        peft_config=lora,
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()
    rewards = trainer.predict(trainer.eval_dataset).predictions
    trainer.save_model()
    kinds = {"DeepSpeedEngine", "DistributedDataParallel"}
    wrapped = type(trainer.model_wrapped).__name__
    result = {
        "wrapped": wrapped if wrapped in kinds or not wrapped.startswith("FSDP") else "FSDP",
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "blind": [entry["blind/weight"] for entry in trainer.state.log_history if "blind/weight" in entry],
        "before": before,
        "after": after,
        "rewards": np.asarray(rewards).tolist(),
        "statistics": [getattr(trainer.model.config, name, None) for name in ("reward_mean", "reward_std")],
        "evaluations": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
    }
    free_engine(trainer)
    return result


def train_recipe(name: str, launch: str, bf16: bool, bases: dict[str, str], output_dir: Path) -> dict[str, Any]:
    """
    Trains with the settings of a recipe's YAML file, in its precision or in fp32, and tells how far weights moved.

    Only sizes change: the model, the data, and the number of steps and of accumulated batches.
    """
    from datasets import Dataset
    from trl import get_peft_config

    from trl_dt2it import MultimodalRewardTrainer
    from trl_dt2it.cli import load_recipe
    from trl_dt2it.recipe import init_kwargs

    flags: dict[str, Any] = {
        "model_name_or_path": bases["qwen3_vl"],
        "output_dir": output_dir,
        "use_cpu": True,
        "bf16": bf16,
        "max_steps": RECIPE_STEPS,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 2,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "reward_statistics_pairs": 0,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "lora_dropout": 0.0,
        "disable_tqdm": True,
    }
    if not bf16:
        flags["dtype"] = "float32"
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    given = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    parser = load_recipe("train_reward_model").make_parser()
    _, args, model_args, _ = parser.parse_args_and_config(["--config", str(config), *given])
    args.model_init_kwargs = init_kwargs(model_args, args)
    divide_small_parameters(args)
    rows = without_fps(make_rows_of("images"))
    trainer = MultimodalRewardTrainer(
        flags["model_name_or_path"],
        args=args,
        train_dataset=Dataset.from_list(rows),
        peft_config=get_peft_config(model_args),
    )
    start = exact_weights(trainer)
    trainer.train()
    differences = [(weight - start[name]).abs().flatten() for name, weight in exact_weights(trainer).items()]
    change = torch.cat(differences)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    free_engine(trainer)
    return {"moved": float((change > 0).float().mean()), "change": float(change.mean()), "losses": losses}


def free_engine(trainer: Any) -> None:
    """Let DeepSpeed give its buffers back, which a process that trains many cases would run out of."""
    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()


def exact_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Trained weights in fp32, whole, on every process; of DeepSpeed's own copies where it has some."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if trainer.deepspeed is not None and parameter.dtype != torch.float32:
            from deepspeed.utils import safe_get_full_fp32_param

            weight = safe_get_full_fp32_param(parameter)
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                weight = parameter.detach().clone()
        else:
            weight = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = weight.detach().float().cpu().clone()
    return found


def reset_state() -> None:
    """Lets the next trainer find no accelerator and no DeepSpeed configuration of the one before."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    gc.collect()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def set_up_launch(launch: str, bf16: bool) -> None:
    """Put a process into the state in which `accelerate launch` starts it."""
    reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    if launch != "multi_gpu":
        os.environ.update(launch_environment(launch, mixed_precision="bf16" if bf16 else "no"))


def run_cases(launch: str, cases: list[dict[str, Any]], bases: dict[str, str], output: str) -> None:
    """Runs in each of two processes; `result.json` of a case lies in a folder of its number."""
    faulthandler.dump_traceback_later(int(os.environ.get("LAUNCH_TIMEOUT", "600")), exit=True)
    torch.set_num_threads(1)
    os.environ["LAUNCH_DIR"] = output
    if launch == "fsdp2":
        let_fsdp_run_on_cpu()
        torch.distributed.init_process_group("gloo")
    if launch.startswith("deepspeed"):
        let_deepspeed_run_on_cpu()
        import deepspeed

        deepspeed.init_distributed("gloo")
    for number, settings in enumerate(cases):
        options = dict(settings)
        folder = Path(output) / f"{launch}-{number}"
        recipe, resume = options.pop("recipe", None), options.pop("resume_at", None)
        case = Case(**{name: options.pop(name) for name in asdict(Case()) if name in options})
        set_up_launch(launch, case.bf16)
        if recipe is not None:
            result = train_recipe(recipe, launch, case.bf16, bases, folder)
        elif resume is None:
            result = train_case(case, bases, folder, **options)
        else:  # the first training goes through, the second goes on from its checkpoint
            steps = {"save_strategy": "steps", "save_steps": resume, **options}
            train_case(case, bases, folder / "whole", **steps)
            set_up_launch(launch, case.bf16)
            checkpoint = str(folder / "whole" / f"checkpoint-{resume}")
            result = train_case(case, bases, folder, resume=checkpoint, **{**options, "save_strategy": "no"})
        if os.environ["RANK"] == "0":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text(json.dumps(result))
        sys.stdout.write(f"{os.environ['RANK']} {launch} {case.name} done\n")
        sys.stdout.flush()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the safetensors files of a directory."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())[:6]
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


if __name__ == "__main__":
    run_cases(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
