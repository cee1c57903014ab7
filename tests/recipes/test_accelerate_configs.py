"""The launch configurations of `recipes/accelerate`: accelerate reads each, each says how it is launched, and a recipe
trains with it. That they train as plain DDP does is tested in `distributed/test_launches.py`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


ROOT = Path(__file__).parents[2]
NAMES = ["cpu", "multi_gpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"]
SCRIPT = "recipes/train_reward_model.py --config recipes/configs/qwen3_vl_8b.yaml"


def path(name: str) -> Path:
    return ROOT / "recipes" / "accelerate" / f"{name}.yaml"


def test_every_configuration_is_tested():
    assert sorted(NAMES) == sorted(file.stem for file in path("cpu").parent.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_every_setting(name):
    """`load_config_from_file` refuses unknown settings at the top; below, a setting that is no option of
    `accelerate launch` would be ignored in silence."""
    config = load_config_from_file(str(path(name)))
    kinds = {"cpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == kinds.get(name, "DEEPSPEED")
    assert config.use_cpu is (name == "cpu")
    assert (config.num_processes, config.mixed_precision) == ((1, "no") if name == "cpu" else (8, "bf16"))
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= options
    lines = path(name).read_text().splitlines()
    assert any(f"accelerate launch --config_file recipes/accelerate/{name}.yaml {SCRIPT}" in line for line in lines)
    assert lines[0].startswith("# ") and any(" GB" in line for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", NAMES)
def test_launch_command_is_valid(name):
    """As far as `accelerate launch` goes before it starts processes."""
    args = launch_command_parser().parse_args(["--config_file", str(path(name)), "script.py"])
    args.nondefault = set()
    args, _, _ = _validate_launch_command(args)
    chosen = [kind for kind in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, kind)]
    assert chosen == {"cpu": [], "multi_gpu": ["multi_gpu"], "fsdp2": ["use_fsdp"]}.get(name, ["use_deepspeed"])
    if name == "fsdp2":
        assert (args.fsdp_version, args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
        assert args.fsdp_cpu_ram_efficient_loading is False


def test_checkpoints_can_be_loaded():
    """The Trainer writes weights that `from_pretrained` can load under FSDP and ZeRO-3 only with these settings."""
    assert yaml.safe_load(path("fsdp2").read_text())["fsdp_config"]["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert yaml.safe_load(path("deepspeed_zero3").read_text())["deepspeed_config"]["zero3_save_16bit_model"] is True


def test_cpu_configuration_launches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from accelerate import Accelerator\n"
        "a = Accelerator()\n"
        "print(a.device.type, a.num_processes, a.mixed_precision, *sys.argv[1:])\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path("cpu")]
    result = subprocess.run([*launcher, script, "--x", "1"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "cpu 1 no --x 1"


@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_the_8b_recipe_trains_with_the_file(name, tmp_path):
    """By a real `accelerate launch` of the file, in bf16 as it says; only its devices change to two CPU ranks."""
    pytest.importorskip("deepspeed")
    settings = yaml.safe_load(path(name).read_text()) | {"num_processes": 2}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings["main_process_port"] = probe.getsockname()[1]
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(settings))
    sizes = {"num_train_pairs": 16, "num_eval_pairs": 4, "max_steps": 2, "gradient_accumulation_steps": 2}
    flags = {
        "model_name_or_path": "tiny-qwen3-vl-reader",
        "dataset_name": "digits",
        "output_dir": tmp_path / "out",
        "use_cpu": "true",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "per_device_eval_batch_size": 1,
        "eval_steps": 1,
        "save_steps": 2,
        **sizes,
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "launch.yaml"]
    script = ["tests/distributed/on_cpu.py", "recipes/train_reward_model.py"]
    given = [str(text) for flag, value in flags.items() for text in (f"--{flag}", value)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, *script, "--config", "recipes/configs/qwen3_vl_8b.yaml", *given]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2 and 0 <= summary["eval_accuracy"] <= 1
    # Loaded again by the Auto class on one process while the others went on.
    assert summary["example"]["chosen_reward"] != summary["example"]["rejected_reward"]
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
