"""The shape of the repository: files small enough to read, each saying at its start what it is for."""

import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDERS = ["trl_dt2it", "recipes", "benchmarks", "tests"]
NOT_WRITTEN_TO_READ = {".md", ".json", ".jsonl", ".png", ".svg", ".csv", ".parquet", ".safetensors"}  # prose, data
MOST_LINES = 700


def source_files() -> list[Path]:
    """Files of code and of configuration that git tracks, or the files of these folders where there is no git."""
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        files = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if "__pycache__" not in file.parts]
    return [file for file in files if file.is_file() and file.suffix not in NOT_WRITTEN_TO_READ]


def test_no_file_is_too_long_to_read():
    lengths = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8").count("\n") for file in source_files()}
    assert len(lengths) > 200
    too_long = {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
    assert not too_long, f"longer than {MOST_LINES} lines, so split by subject: {too_long}"


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_every_file_says_at_its_start_what_it_is_for(suffix):
    texts = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in source_files()}
    start = {".py": ('"""', 'r"""', "# "), ".yaml": ("# ",)}[suffix]
    found = [name for name, text in texts.items() if name.endswith(suffix) and text and not text.startswith(start)]
    assert not found
