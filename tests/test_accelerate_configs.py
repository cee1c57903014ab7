"""The launch configurations of `recipes/accelerate`: accelerate reads each, and each says how it is launched."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


ROOT = Path(__file__).parent.parent
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
