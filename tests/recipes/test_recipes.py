"""The recipes: every YAML parses into its dataclasses, wrong ones fail at start, and a short run goes through."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trl_dt2it.cli import load_recipe

from ..families import example_images
from ..processes import ROOT, start_script


CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))


def recipe_of(path: Path) -> str:
    """The recipe that a YAML file is for: it may name others that have to run before."""
    own = re.findall(rf"recipes/(\w+)\.py --config recipes/configs/{path.name}", path.read_text())
    return (own or re.findall(r"recipes/(\w+)\.py --config", path.read_text()))[0]


RECIPES = {path: recipe_of(path) for path in CONFIGS}
TRAININGS = [path for path, name in RECIPES.items() if name == "train_reward_model"]
OTHERS = [path for path, name in RECIPES.items() if name in ("prepare_data", "construct_preferences")]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("train_reward_model")


def parse(recipe, path: Path, *extra: str):
    return recipe.make_parser().parse_args_and_config(["--config", str(path), "--use_cpu", "true", *extra])


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_every_yaml_parses(recipe, path):
    keys = yaml.safe_load(path.read_text())
    # A machine without a GPU refuses bf16, so that the switch is set off here and looked at in the file.
    script, training, model, _ = parse(recipe, path, "--bf16", "false")
    for name, value in keys.items():
        holder = next(part for part in (script, training, model) if name in part.__dataclass_fields__)
        if name not in ("bf16", "use_cpu", "report_to"):
            actual = getattr(holder, name)
            assert actual == value or str(actual) == str(value) or getattr(actual, "value", None) == value, name


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_yaml_of_data_parses_and_a_wrong_key_fails(path, tmp_path):
    keys = yaml.safe_load(path.read_text())
    parser = load_recipe(RECIPES[path]).make_parser()
    (arguments,) = parser.parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    assert {name: getattr(arguments, name) for name in keys} == keys
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**keys, "outputdir": "x"}))
    with pytest.raises(ValueError, match="outputdir"):
        parser.parse_args_and_config(["--config", str(tmp_path / "wrong.yaml")], fail_with_unknown_args=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_opens_with_what_it_is_and_how_to_run_it(path):
    head = path.read_text().split("\n\n")[0]
    lines = path.read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[0].startswith("# ") and head.startswith("# ")
    text = "\n".join(comment)
    launcher = "python" if path in OTHERS else "accelerate launch"
    command = f"{launcher} recipes/{RECIPES[path]}.py --config recipes/configs/{path.name}"
    assert command in re.sub(r"[\s#\\\\]+", " ", text) or "--config_file" in text
    assert "Memory" in text


def test_the_papers_setting(recipe):
    keys = yaml.safe_load((ROOT / "recipes/configs/qwen3_vl_8b.yaml").read_text())
    assert keys["learning_rate"] == 1e-5 and keys["lr_scheduler_type"] == "cosine" and keys["warmup_steps"] == 0.1
    assert keys["num_train_epochs"] == 1 and keys["max_pixels"] == 268324
    assert keys["freeze_vision_tower"] and keys["freeze_projector"] and keys["bf16"]
    gpus = yaml.safe_load((ROOT / "recipes/accelerate/deepspeed_zero2.yaml").read_text())["num_processes"]
    assert gpus * keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"] == 512


def test_wrong_keys_and_words_fail(recipe, tmp_path):
    digits = yaml.safe_load((ROOT / "recipes/configs/digits.yaml").read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**digits, "learningrate": 1.0}))
    with pytest.raises(ValueError, match="learningrate"):
        parse(recipe, tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({**digits, "loss_type": "hinge"}))
    with pytest.raises(ValueError, match="`loss_type` is 'hinge'; choose one of auto, bt"):
        parse(recipe, tmp_path / "b.yaml")


def test_a_misspelt_flag_is_not_taken_for_another(recipe):
    with pytest.raises(ValueError, match="--learning_rat"):
        parse(recipe, ROOT / "recipes/configs/digits.yaml", "--learning_rat", "1.0")


def test_data_from_a_file(recipe, tmp_path):
    path = tmp_path / "pairs.jsonl"
    arguments = ("--dataset_name", str(path))
    script, _, _, mixture = parse(recipe, ROOT / "recipes/configs/digits.yaml", *arguments)
    with pytest.raises(ValueError, match="but there is no such file"):
        recipe.load_data(script, mixture, 0)
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert recipe.load_data(script, mixture, 0)["train"][0] == {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_flash_attention_falls_back_with_a_warning(caplog):
    from trl_dt2it.models.shared_prefix import usable_attention

    assert usable_attention("flash_attention_2") == "sdpa"
    assert "no CUDA device" in caplog.text
    assert usable_attention("eager") == "eager" and usable_attention(None) is None


RECIPE = "recipes/train_reward_model.py"
ONE_PROCESS = ("--config_file", "recipes/accelerate/cpu.yaml")
TWO_PROCESSES = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")


def train(tmp_path: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> dict:
    """Trains by `accelerate launch` with the flags of `launcher`; without them, in a process that starts faster."""
    flags = ["--config", "recipes/configs/digits.yaml", "--output_dir", str(tmp_path)]
    flags += ["--num_train_pairs", "64", "--num_eval_pairs", "30", *arguments]
    if launcher:
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, RECIPE, *flags]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        printed = run.stdout
    else:
        printed = start_script(ROOT / RECIPE, *flags, ACCELERATE_USE_CPU="true").finish()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert str(tmp_path / "summary.json") in printed
    return summary


def test_a_short_run_of_the_digits_recipe(tmp_path):
    digits = '{"num_digits": [1, 2], "noise": 0.2}'
    summary = train(tmp_path, "--num_train_epochs", "1", "--digits", digits, launcher=ONE_PROCESS)
    assert summary["seed"] == 42 and summary["steps"] == 2 and summary["model_dir"] == str(tmp_path)
    assert 0 <= summary["eval_accuracy"] <= 1 and summary["train_seconds"] > 0
    assert summary["example"]["chosen"] != summary["example"]["rejected"]
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "README.md").is_file()


def test_a_run_on_ones_own_file_and_images(tmp_path):
    (tmp_path / "photos").mkdir()
    lines = []
    for index in range(8):
        example_images(1, seed=index)[0].save(tmp_path / "photos" / f"{index}.png")
        sides = {side: [{"role": "assistant", "content": f"It is {side}."}] for side in ("chosen", "rejected")}
        prompt = [{"role": "user", "content": "What is it?"}]
        lines.append(json.dumps({"images": [f"{index}.png"], "prompt": prompt, **sides}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    own = ("--dataset_name", str(tmp_path / "pairs.jsonl"), "--image_root", str(tmp_path / "photos"))
    summary = train(tmp_path / "out", *own, "--dataset_test_split", "train", "--num_train_epochs", "1")
    assert summary["steps"] == 1 and summary["example"]["chosen"] == "It is chosen."


def test_two_processes_by_accelerate_launch(tmp_path):
    one = train(tmp_path / "one", "--num_train_epochs", "1")
    halved = ("--num_train_epochs", "1", "--per_device_train_batch_size", "16")
    two = train(tmp_path / "two", *halved, launcher=(*TWO_PROCESSES, "--dynamo_backend", "no"))
    assert one["steps"] == two["steps"] == 2
    # 30 pairs do not divide by 2 x 100; every one counts once.
    assert one["eval_accuracy"] == pytest.approx(two["eval_accuracy"], abs=1e-9)
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-3)


def test_lora_by_flags(tmp_path):
    train(tmp_path, "--num_train_epochs", "1", "--use_peft", "true", "--lora_target_modules", "all-linear")
    assert (tmp_path / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "score" in config["modules_to_save"]
