"""The shape of the repository: few files, each of one sitting, named once, and saying at its start what it is for."""

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDERS = ["trl_dt2it", "recipes", "benchmarks", "tests"]
NOT_WRITTEN_TO_READ = {".md", ".json", ".jsonl", ".png", ".svg", ".csv", ".parquet", ".safetensors"}  # prose, data
MOST_LINES, FEWEST_LINES = 700, 60
MOST_MODULES = 115
# Modules of the package below `FEWEST_LINES`, each with its reason.
SHORT = {"curation/corrections.py": "a file format, read by the ledger, which is long"}
# Basenames of several modules that are the same thing for another layer.
SHARED_NAMES = {"__init__", "config", "judging", "results", "run", "t2i"}
# An indirect question says nothing of what a thing is.
QUESTION = re.compile(r"(#:?\s*)?(What|How|Whether)\b")


def source_files() -> list[Path]:
    """Files of code and of configuration that git tracks, or the files of these folders where there is no git."""
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        files = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if "__pycache__" not in file.parts]
    return [file for file in files if file.is_file() and file.suffix not in NOT_WRITTEN_TO_READ]


def modules() -> dict[str, str]:
    """The text of every module of the package, by its path below the package."""
    package = ROOT / "trl_dt2it"
    paths = [file for file in source_files() if file.suffix == ".py" and file.is_relative_to(package)]
    return {str(path.relative_to(package)): path.read_text(encoding="utf-8") for path in paths}


def test_no_file_is_too_long_to_read():
    lengths = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8").count("\n") for file in source_files()}
    assert len(lengths) > 200
    too_long = {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
    assert not too_long, f"longer than {MOST_LINES} lines, so split by subject: {too_long}"


def test_no_module_is_too_short_to_stand_alone():
    lengths = {
        name: text.count("\n")
        for name, text in modules().items()
        if Path(name).name != "__init__.py" and Path(name).parent.name not in ("sources", "benchmarks")
    }
    too_short = {name: lines for name, lines in lengths.items() if lines < FEWEST_LINES}
    assert set(too_short) == set(SHORT), f"below {FEWEST_LINES} lines, so part of what imports it: {too_short}"


def test_the_package_has_few_modules():
    assert 0 < len(modules()) <= MOST_MODULES


def test_no_two_modules_have_one_name():
    counts = Counter(Path(name).stem for name in modules())
    assert {name for name, count in counts.items() if count > 1} == SHARED_NAMES


def test_the_command_line_is_short():
    assert modules()["cli.py"].count("\n") <= 200


def questions(text: str) -> list[str]:
    """Docstrings and comments that open with an indirect question."""
    nodes = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    openings = [
        *((ast.get_docstring(node) or "").partition("\n")[0] for node in nodes),
        *(token.string for token in tokens if token.type == tokenize.COMMENT),
    ]
    return [opening for opening in openings if QUESTION.match(opening)]


def test_no_docstring_or_comment_opens_with_an_indirect_question():
    code = '"""What it is."""\n# How it goes\nx = 1  #: Whether it is\n\n\ndef f():\n    """Show what it is."""\n'
    assert questions(code) == ["What it is.", "# How it goes", "#: Whether it is"]
    found = {name: openings for name, text in modules().items() if (openings := questions(text))}
    assert not found, f"{sum(map(len, found.values()))} open with an indirect question: {found}"


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_every_file_says_at_its_start_what_it_is_for(suffix):
    texts = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in source_files()}
    start = {".py": ('"""', 'r"""', "# "), ".yaml": ("# ",)}[suffix]
    found = [name for name, text in texts.items() if name.endswith(suffix) and text and not text.startswith(start)]
    assert not found
