"""The documents: README's examples run, its links and commands exist, and every family has its row."""

import json
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from trl_dt2it import RewardScorer
from trl_dt2it.data.cards import PAPER
from trl_dt2it.models.families import FAMILIES
from trl_dt2it.models.modeling import load_processing_class, set_pixel_limits
from trl_dt2it.training.config import MultimodalRewardConfig
from trl_dt2it.training.losses import LOSSES

from .families import example_images, family_dir
from .models.test_rendering_videos import VIDEO_FAMILIES


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
    "benchmarks/README.md",
]
# What a machine without a GPU needs, and one pair a step.
ON_THE_CPU = 'use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2, save_strategy="no", '
TRAIN, DATA, SCORE = 0, 1, 2


def code_blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.fixture
def own_dataset(tmp_path, monkeypatch):
    """A folder with what the README describes: `pairs.jsonl`, ten lines of its kind, and `photos/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (line,) = code_blocks("json")
    row = json.loads(line)
    (tmp_path / "photos").mkdir()
    with open("pairs.jsonl", "w") as file:
        for index, image in enumerate(example_images(10)):
            name = row["images"][0] if index == 0 else f"{index}.png"
            image.save(tmp_path / "photos" / name)
            answer = {"role": "assistant", "content": f"{row['chosen'][0]['content']} {index}"}
            file.write(json.dumps({**row, "images": [name], "chosen": [answer]}) + "\n")
    return tmp_path


def test_the_training_and_the_scoring_example_run(own_dataset, capsys):
    blocks = code_blocks("python")
    assert len(blocks) == 3
    assert len(blocks[TRAIN].strip().splitlines()) <= 15
    training = replaced(blocks[TRAIN], "Qwen/Qwen3-VL-2B-Instruct", str(family_dir("qwen3_vl")))
    training = replaced(training, "MultimodalRewardConfig(", f"MultimodalRewardConfig({ON_THE_CPU}")
    names: dict = {}
    exec(compile(training, "README.md, training", "exec"), names)
    trainer = names["trainer"]
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (9, 1)
    assert trainer.state.global_step == 15  # three epochs of five steps
    assert trainer.state.log_history[-1]["eval_accuracy"] in (0.0, 1.0)

    capsys.readouterr()
    exec(compile(blocks[SCORE], "README.md, scoring", "exec"), names)
    reward = float(capsys.readouterr().out.splitlines()[-1])
    assert reward == pytest.approx(reward_by_the_trainer(trainer, own_dataset), rel=1e-4, abs=1e-5)

    # Images that are read in more than one way: the example reads them as training does.
    scorer = RewardScorer.from_pretrained("reward-model")
    for path in ambiguous_images(own_dataset):
        scoring = replaced(blocks[SCORE], "photos/cup.png", str(path))
        exec(compile(scoring, "README.md, scoring", "exec"), {})
        reward = float(capsys.readouterr().out.splitlines()[-1])
        (expected,) = scorer.score("What is on the table?", ["A red cup."], images=[path])
        assert reward == pytest.approx(expected, abs=1e-4), path
        (plain,) = scorer.score(
            "What is on the table?", ["A red cup."], images=[np.asarray(Image.open(path).convert("RGB"))]
        )
        assert abs(reward - plain) > 1e-3, path


def ambiguous_images(folder: Path) -> list[Path]:
    """A photograph that its EXIF data turns, grey of 16 bits, and an image that is half transparent."""
    (photo,) = (image.resize((48, 32)) for image in example_images(1))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "phone.jpg", exif=exif)
    Image.fromarray((np.arange(1536).reshape(32, 48) * 40).astype(np.uint16)).save(folder / "scan16.png")
    pixels = np.asarray(photo.convert("RGBA")).copy()
    pixels[:, 24:, 3] = 0
    Image.fromarray(pixels).save(folder / "clear.png")
    return [folder / name for name in ("phone.jpg", "scan16.png", "clear.png")]


def reward_by_the_trainer(trainer, folder: Path) -> float:
    """The reward of the README's chosen answer, through the collator that trained the model."""
    (line,) = code_blocks("json")
    batch = trainer.data_collator([json.loads(line)])
    del batch["pairs"]
    assert batch["pair_layout"].shape == (1, 3)
    return trainer.model.eval()(**batch).logits[0, 0].item()


def test_the_change_of_one_import_runs():
    (diff,) = code_blocks("diff")
    names: dict = {}
    for line in diff.splitlines():
        exec(line[1:], names)
        expected = "trl." if line[0] == "-" else "trl_dt2it."
        assert names["RewardTrainer"].__module__.startswith(expected)
        assert names["RewardConfig"].__module__.startswith(expected)


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        commands = re.findall(r"(?:`|^)make ((?:[a-z-]+ ?)+)", text, flags=re.MULTILINE)
        assert {name for command in commands for name in command.split()} <= targets, document
    assert "`make demo`" in README and "`make test`" in README


def test_every_relative_link_and_named_file_exists():
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"https?://", link):
                assert (path.parent / link.split("#")[0]).exists(), f"{document}: {link}"
        # But those of other people's repositories, each at a commit.
        own = re.sub(r"^\| [\w.-]+/[\w.-]+@\w{8} .*$", "", text, flags=re.MULTILINE)
        for place in re.findall(r"\b(?:recipes|tests|trl_dt2it)/[\w/]+(?:\.py|\.yaml)?\b", own):
            assert (ROOT / place).exists(), f"{document}: {place}"


def test_every_name_of_the_package_exists():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in re.findall(r"\btrl_dt2it(?:\.\w+)+", text):
            assert pydoc.locate(name) is not None, f"{document}: {name}"


def table_of_families() -> dict[str, list[str]]:
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_family_has_its_row():
    table = table_of_families()
    assert sorted(table) == sorted(FAMILIES)
    classes = {config.model_type: cls for config, cls in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.items()}
    for family, row in table.items():
        assert row[0].strip("`") == classes[family].__name__
        assert row[1] == ("yes" if FAMILIES[family].shares_prefix else "no")
        assert row[3] == ("yes" if family in VIDEO_FAMILIES else "no")
        assert [row[2], *row[4:6]] == ["yes"] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_column_of_pixel_limits_is_true(family):
    processor = load_processing_class(family_dir(family))
    if table_of_families()[family][6] == "yes":
        set_pixel_limits(processor, min_pixels=1024, max_pixels=4096)
        assert processor.image_processor.size["longest_edge"] == 4096
    else:
        with pytest.raises(ValueError):
            set_pixel_limits(processor, max_pixels=4096)


def test_the_readme_names_every_loss_and_every_setting_it_names_exists():
    for loss in LOSSES:
        assert f"`{loss}`" in README
    fields = MultimodalRewardConfig.__dataclass_fields__
    for name in (
        "image_root",
        "allowed_image_hosts",
        "share_prefix",
        "max_tokens_per_batch",
        "on_bad_row",
        "max_length",
        "freeze_vision_tower",
    ):
        assert name in README and name in fields
    assert PAPER["citation"] in README


def test_the_table_of_launches_is_the_measured_one():
    """Each launch file, tuning and kind of data: what `benchmarks/launches.py` has trained, within its bounds."""
    text = (ROOT / "benchmarks/results/launches.md").read_text()
    table = text[text.index("| tuning |") :].split("\n\n")[0]
    assert table in (ROOT / "docs/training.md").read_text()
    cells = [cell.strip() for line in table.splitlines()[2:] for cell in line.split("|")[3:-1]]
    differences = [tuple(map(float, cell.split(" / "))) for cell in cells]
    assert len(cells) == 24 * 3 and all(loss <= 1e-5 and weight <= 1e-4 for loss, weight in differences)
