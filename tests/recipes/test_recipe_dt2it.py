"""The recipe of rounds: its YAML files, what it refuses at start, its plan, and a launch that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from trl_dt2it.cli import load_recipe
from trl_dt2it.curation import CurationLedger
from trl_dt2it.curation.judging import read_judging
from trl_dt2it.curation.rounds.config import read_rounds
from trl_dt2it.data import SOURCES

from ..curation.runs import SETTINGS, arguments


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes/configs").glob("dt2it_*.yaml"))


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("dt2it")


def parse(recipe, path: Path, *extra: str):
    flags = ["--config", str(path), "--use_cpu", "true", "--bf16", "false", *extra]
    return recipe.make_parser().parse_args_and_config(flags)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_parses_and_a_wrong_key_fails(recipe, path, tmp_path):
    keys = yaml.safe_load(path.read_text())
    parts = parse(recipe, path)
    for name, value in keys.items():
        holder = next(part for part in parts if name in part.__dataclass_fields__)
        if name not in ("bf16", "use_cpu", "report_to"):
            actual = getattr(holder, name)
            assert actual == value or str(actual) == str(value) or getattr(actual, "value", None) == value, name
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**keys, "round": []}))
    with pytest.raises(ValueError, match="--round"):
        parse(recipe, tmp_path / "wrong.yaml")
    with pytest.raises(ValueError, match="--fold"):
        parse(recipe, path, "--fold", "3")


def test_the_papers_schedule():
    keys = yaml.safe_load((ROOT / "recipes/configs/dt2it_qwen3_vl_8b.yaml").read_text())
    rounds = read_rounds(keys["method"], keys.get("rounds"), folds=keys["folds"], judge="judge" in keys)
    rules = [[rule.get("flip") or rule.get("keep") for rule in step.rules] for steps in rounds for step in steps]
    assert rules == [["flip_weakest_half"], ["keep_consistent"]] * 2
    assert set(keys["pool"]) == {"rlaif_v", "vlfeedback", "povid", "wildvision_battle", "mm_rlhf"}
    for spec in [*keys["pool"].values(), *keys["base"].values()]:
        assert "dataset_name" in spec or spec["preferences"] in SOURCES
    assert read_judging(keys["judge"]).votes == "unanimous"
    gpus = yaml.safe_load((ROOT / "recipes/accelerate/deepspeed_zero2.yaml").read_text())["num_processes"]
    assert gpus * keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"] == 512
    training = yaml.safe_load((ROOT / "recipes/configs/qwen3_vl_8b.yaml").read_text())
    shared = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_pixels", "max_length")
    assert {name: keys[name] for name in shared} == {name: training[name] for name in shared}


def test_a_shard_is_one_of_several(recipe):
    assert recipe.parse_shard("1/4") == (1, 4) and recipe.parse_shard(None) == (0, 1)
    for text in ("4/4", "1", "a/b"):
        with pytest.raises(ValueError, match="it must be i/n"):
            recipe.parse_shard(text)


def test_the_plan_of_the_digits(recipe, tmp_path, capsys):
    # As accelerate's launcher would, and without a process of its own.
    recipe.main(
        *parse(recipe, ROOT / "recipes/configs/dt2it_digits.yaml", "--dry_run", "true", "--output_dir", str(tmp_path))
    )
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    plan = {row[0]: row[1:5] for row in rows}
    assert plan["balance-style"] == ["to do", "850", "", ""]
    # 250 steps of 32 pairs; of the 850, 200 are held out to tell how far the model can be believed.
    assert plan["round-1/train/model-0"] == ["to do", "650", "250", "12.3"]
    assert plan["final/unbalanced"] == plan["final/base"] == ["to do", "850", "250", "9.4"]
    assert plan["round-2/train/model-0-fold-1"] == ["to do", "2,150", "250", "3.7"]
    assert plan["round-2/score/model-0-fold-1"] == ["to do", "1,500", "", ""]
    assert plan["round-1/reference/model-0"] == ["to do", "200", "", ""]
    assert plan["final/uncurated"] == ["to do", "3,850", "250", "2.1"] and plan["test/base"][:2] == ["to do", "1,400"]
    assert plan["to do in all"][2:] == ["2,000", ""] and not list(tmp_path.iterdir())


def command(output_dir: Path) -> list[str]:
    rounds = [{"rules": [{"flip": "flip_negative"}], "train_on": "current"}]
    flags = arguments(output_dir, rounds=rounds, final=["uncurated", "curated"])
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *launcher, "recipes/dt2it.py", *flags]


def test_a_launch_on_two_processes_that_is_killed_and_started_again(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = {"cwd": ROOT, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command(tmp_path), start_new_session=True, **options) as killed:
        deadline = time.monotonic() + 200
        while not (tmp_path / "round-1/score/model-0-fold-1/stage.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(killed.pid, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "summary.json").exists()
    again = subprocess.run(command(tmp_path), timeout=300, **options)
    assert again.returncode == 0, again.stdout[-3000:]
    # What was done is not done again.
    assert "round-1/train/model-0-fold-1 ..." not in again.stdout and "final/curated done" in again.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    one = summary["rounds"]["round-1/decide"]
    assert one["pairs"] == summary["pool_pairs"] == 48 and one["kept"] == 48
    assert list(summary["final"]) == ["uncurated", "curated"]
    for name, model in summary["final"].items():
        assert model["pairs"] == 72 and model["steps"] == SETTINGS["max_steps"] and 0 <= model["accuracy"] <= 1
        assert (Path(model["model_dir"]) / "model.safetensors").is_file(), name
    state = CurationLedger(tmp_path / "ledger").state()
    assert len(state) == 48 and sum(state["flipped"].to_pylist()) == one["flipped"]
    record, report = json.loads((tmp_path / "run.json").read_text()), (tmp_path / "report.html").read_text("utf-8")
    assert record["pairs"] == {"base": {"clean": 24}, "pool": {"a": 32, "b": 16}, "test": {"clean": 8}}
    assert record["command"].startswith("accelerate launch recipes/dt2it.py --config ")
    assert "2 processes" in record["machine"] and "2 processes" in report and "+ curated" in report
    assert report.count('<p class="missing">Not here') == 1  # no benchmark was evaluated


WITHOUT_EXTRAS = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"openai", "pydantic", "json_repair"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.modules["deepspeed"] = None  # which needs pydantic, and which accelerate imports wherever it is installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_rounds_without_judges_need_no_extra(tmp_path):
    rounds = [{"rules": [{"flip": "flip_negative"}]}]
    flags = arguments(tmp_path, rounds=rounds, final=["curated"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_EXTRAS, "recipes/dt2it.py", *flags]
    run = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    assert list(json.loads((tmp_path / "summary.json").read_text())["final"]) == ["curated"]
