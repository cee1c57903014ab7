"""The page about the report: its examples run, its keys work, and what it names is there."""

import json
import re
import shutil

from tests.test_docs import ROOT, code_blocks
from trl_dt2it.curation import CurationLedger


PAGE = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page(written_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written_run, tmp_path / "outputs/dt2it_digits")
    entry = {"pair_id": "pair-20", "verdict": "wrong", "flipped": True, "kept": True}
    content = {"format": "trl-dt2it corrections", "version": 1, "corrections": [entry]}
    (tmp_path / "corrections.json").write_text(json.dumps(content))
    write, correct = code_blocks("python", PAGE)
    for block in (write, correct):
        exec(compile(block, "docs", "exec"), {})
    assert (tmp_path / "report.html").is_file()
    assert CurationLedger("outputs/dt2it_digits/ledger").rounds[-1]["stage"] == "manual"


def test_what_the_page_names_is_there():
    for path in [
        *re.findall(r"recipes/\w+\.py", PAGE),
        *(f"docs/{one}" for one in re.findall(r"images/[\w.-]+", PAGE)),
    ]:
        assert (ROOT / path).is_file(), path
    flags = set(re.findall(r"--(\w+)", PAGE))
    assert flags and all(f"    {flag}: " in (ROOT / "recipes/report.py").read_text("utf-8") for flag in flags)
    script = (ROOT / "trl_dt2it/report/templates/report.js").read_text("utf-8")
    for key in re.findall(r"^\| `(\w)`", PAGE, flags=re.MULTILINE):
        assert f'"{key}"' in script or f" {key}: " in script, key
    assert "\nscreenshots: install-dev" in (ROOT / "Makefile").read_text("utf-8")
