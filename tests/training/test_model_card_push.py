"""The files that are saved and reach the Hub: the model, its processor and a card that works, and nothing else."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoProcessor

from trl_dt2it import RewardScorer, load_reward_model
from trl_dt2it.training.model_card import MODEL_FILES

from ..families import example_images, family_dir
from ..hub_server import LoopbackHub
from ..rows import make_dataset
from ..trainers import trainer_for


ROOT = Path(__file__).parents[2]
SECRET = "hf_canary0123456789"

# All of them in one process, whose imports take longer than its trainings.
PUSHES = {"end": "full", "every_save": "full", "checkpoint": "full", "adapter": "lora"}
PUSH = """
import json, sys
from pathlib import Path
from peft import LoraConfig
from tests.families import family_dir
from tests.rows import make_dataset
from tests.trainers import config
from trl_dt2it import MultimodalRewardTrainer

base, folder, pushes = sys.argv[1:]
for name, tuning in json.loads(pushes).items():
    output = Path(folder) / name
    args = config(
        output, push_to_hub=True, hub_model_id=f"somebody/{name}", hub_token="SECRET",
        hub_strategy="end" if tuning == "lora" else name,
        save_strategy="epoch", num_train_epochs=2, hub_always_push=True, on_bad_row="quarantine",
    )
    data = make_dataset(4)
    trainer = MultimodalRewardTrainer(
        base, args=args, train_dataset=data, eval_dataset=data,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if tuning == "lora" else None,
    )
    for private in ("summary.json", "_quarantine_train.jsonl", "notes.txt", "prompts.jsonl"):
        (output / private).write_text("private")
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(dataset_name="somebody/some-pairs")
    trainer._finish_current_push()
    trainer.end()
""".replace("SECRET", SECRET)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> tuple[Path, dict[str, dict[str, bytes]]]:
    """The folder of the trainings, and the files of each repository."""
    folder = tmp_path_factory.mktemp("pushes")
    with LoopbackHub() as hub:
        env = {**os.environ, **hub.env(), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "CI": "1"}
        command = [sys.executable, "-c", PUSH, str(family_dir("qwen3_vl")), str(folder), json.dumps(PUSHES)]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert run.returncode == 0, run.stderr[-3000:]
        assert SECRET not in run.stdout + run.stderr
        return folder, {name: hub.files(f"somebody/{name}") for name in PUSHES}


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_only_the_model_is_pushed(strategy, pushed, tmp_path):
    folder, repositories = pushed
    files = repositories[strategy]
    model = {name for name in files if "/" not in name}
    assert {"config.json", "model.safetensors", "README.md", "processor_config.json", "tokenizer.json"} <= model
    names = {name.removeprefix("last-checkpoint/") for name in files}
    leaked = {"training_args.bin", "summary.json", "notes.txt", "prompts.jsonl", "_quarantine_train.jsonl"}
    assert not names & leaked
    if strategy != "checkpoint":
        assert model == set(files)
        assert not [name for name in files if name.endswith((".pt", ".pth", ".bin"))]
    assert not [name for name, content in files.items() if SECRET.encode() in content]
    assert (folder / strategy / "notes.txt").read_text() == "private"
    for name in model:
        (tmp_path / name).write_bytes(files[name])
    config = load_reward_model(tmp_path, allow_new_head=False).config
    assert config.reward_std > 0 and abs(config.reward_mean) < float("inf")
    AutoProcessor.from_pretrained(tmp_path)


def test_an_adapter_is_pushed_with_its_head(pushed):
    files = pushed[1]["adapter"]
    wanted = {"adapter_config.json", "adapter_model.safetensors", "reward_statistics.json", "README.md"}
    assert wanted <= set(files)
    assert "model.safetensors" not in files and "training_args.bin" not in files
    assert b"score" in files["adapter_model.safetensors"][:20000]
    assert "load_reward_model(" in files["README.md"].decode()


def test_every_file_that_the_savers_write_is_among_the_model_files(tmp_path):
    """A new transformers may write a file that the list does not know."""
    from fnmatch import fnmatch

    trainer = trainer_for("gemma3", tmp_path, make_dataset(2))
    trainer.save_model(tmp_path)
    trainer.create_model_card()
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in written if not any(fnmatch(name, p) for p in MODEL_FILES)} == {"training_args.bin"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("card") / "my-model"
    data = make_dataset(4)
    args = {"freeze_vision_tower": True, "seed": 7}
    trainer = trainer_for("qwen3_vl", output, data, args, eval_dataset=data)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(output)
    trainer.create_model_card(dataset_name="somebody/some-pairs", tags="extra")
    return output, metrics


def test_card_tells_what_happened(trained):
    output, metrics = trained
    card = ModelCard.load(output / "README.md")
    assert {"trl", "reward-trainer", "trl-dt2it", "extra"} <= set(card.data.tags)
    assert card.data.datasets == "somebody/some-pairs"
    assert card.data.library_name == "transformers"
    assert card.data.eval_results[0].metric_value == round(metrics["eval_accuracy"], 4)
    text = card.text
    assert f"| eval_accuracy | {metrics['eval_accuracy']:.4g} |" in text
    for figure in ("- loss: `bt`", "- pairs: 4", "- optimizer steps: 6", "- seed: 7", "- frozen: vision tower"):
        assert figure in text, figure
    assert "2604.19544" in text and "vonwerra2020trl" in text
    assert "{%" not in text and "{{ " not in text and "None" not in text


def test_the_code_on_the_card_runs(trained, tmp_path):
    output, _ = trained
    code = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.S).group(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    example_images(1)[0].resize((48, 32)).save(tmp_path / "photo.jpg", exif=exif)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    asked = ("What do you see?", ["Two cats asleep on a sofa."], [tmp_path / "photo.jpg"])
    expected = RewardScorer.from_pretrained(output).score(*asked)
    assert float(run.stdout.strip().splitlines()[-1]) == pytest.approx(expected[0], abs=1e-4)


def test_no_secret_in_a_trackers_view_of_the_configuration(tmp_path):
    trainer = trainer_for("qwen3_vl", tmp_path, make_dataset(2), {"hub_token": SECRET})
    assert SECRET not in json.dumps(trainer.args.to_dict(), default=str)
    assert SECRET not in io.StringIO(str(trainer.args.to_json_string())).read()
