"""Trace the modules that a text-to-image pair crosses, from a raw file to the training set of the next epoch.

Runs the way once (read, validate, mix, train, score, decide, select anew) on pairs of handwriting with a tiny model,
and records each module of the package in which a function was called; what runs while a module is imported does not
count. `python tools/pair_way.py` prints the modules, and `--write` puts them into docs/architecture.md.
"""

import inspect
import json
import os
import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any


for variable, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}.items():
    os.environ.setdefault(variable, value)

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_dt2it"
PAGE = ROOT / "docs" / "architecture.md"
LISTING = re.compile(r"(?<=<!-- pair way -->\n).*?(?=<!-- end of pair way -->)", flags=re.DOTALL)


def write_raw_file(folder: Path) -> Path:
    """Write eight pairs as HPDv2 publishes them: a caption, two image files, and which of them people prefer."""
    from trl_dt2it.demo.digits import make_digits_t2i

    rows = []
    for index, row in enumerate(make_digits_t2i("train", 8)):
        names = [f"{index}-chosen.png", f"{index}-rejected.png"]
        row["chosen_image"].save(folder / names[0])
        row["rejected_image"].save(folder / names[1])
        rows.append({"prompt": row["caption"], "file_path": names, "human_preference": [1, 0]})
    file = folder / "train.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def curate_while_training(file: Path, model: str, output_dir: Path) -> None:
    """Take the pairs of a raw file to a second epoch, whose training set the curation callback selects."""
    from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer
    from trl_dt2it.curation import IterativeCurationCallback
    from trl_dt2it.data import load_preferences, mix, validate

    folder = file.parent
    pairs, _ = validate(load_preferences("hpdv2", file, image_root=folder), image_root=folder, show=False)
    args = MultimodalRewardConfig(
        output_dir=str(output_dir),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        image_root=str(folder),
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = MultimodalRewardTrainer(model=model, args=args, train_dataset=mix({"hpdv2": pairs}))
    trainer.add_callback(IterativeCurationCallback(trainer, ledger=output_dir / "ledger"))
    trainer.train()


def trace(file: Path, model: str, output_dir: Path) -> list[str]:
    """List the modules in which a function was called on the way, as paths below the package."""
    for path in PACKAGE.rglob("[a-z]*.py"):  # now, so that no import is taken for a step of the way
        import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    called: set[Path] = set()

    def record(frame: Any, event: str, _: Any) -> None:
        # The bodies of modules and classes have no optimized locals; those of functions have.
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            called.add(Path(frame.f_code.co_filename))

    sys.setprofile(record)
    try:
        curate_while_training(file, model, output_dir)
    finally:
        sys.setprofile(None)
    return sorted(str(path.relative_to(PACKAGE)) for path in called if path.is_relative_to(PACKAGE))


def as_text(modules: list[str]) -> str:
    """Write the modules as the page shows them: how many, and a line per folder."""
    folders: dict[str, list[str]] = {}
    for name in modules:
        folder, file = os.path.split(name)
        folders.setdefault(f"`{folder}/`" if folder else "top", []).append(f"`{file}`")
    lines = [f"- {folder}: {', '.join(files)}\n" for folder, files in folders.items()]
    return f"\n**{len(modules)} modules:**\n\n{''.join(lines)}\n"


def main() -> None:
    from trl_dt2it.demo.tiny import build_tiny_vlm

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        modules = trace(write_raw_file(folder), build_tiny_vlm(folder / "model"), folder / "output")
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(LISTING.sub(lambda _: as_text(modules), page), encoding="utf-8")
    print(*modules, f"{len(modules)} modules", sep="\n")


if __name__ == "__main__":
    main()
