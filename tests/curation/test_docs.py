"""The page about curation: every example runs, prints what it should, and every command exists."""

import re

import pytest

from tests.test_docs import ON_THE_CPU, ROOT, code_blocks, replaced
from trl_dt2it import curation


PAGE = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rules_and_ledger_of_the_page(folder, capsys):
    rules, ledger, _ = code_blocks("python", PAGE)
    names: dict = {}
    exec(compile(rules, "docs", "exec"), names)
    rate, counts = capsys.readouterr().out.strip().splitlines()
    assert float(rate) == pytest.approx(0.3, abs=0.04)
    assert "flipped by flip_mixture" in counts
    exec(compile(ledger, "docs", "exec"), names)
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.split()[1] in ("keep", "flip") and int(first.split()[0]) <= 1000
    assert int(second) == 999  # after undoing the round, all but the one that a person dropped


def test_the_callback_of_the_page(folder):
    block = code_blocks("python", PAGE)[2]
    block = replaced(block, 'make_digits("train", 2000, noise=0.2)', 'make_digits("train", 24, noise=0.2)')
    block = replaced(block, "num_train_epochs=4, ", f"num_train_epochs=2, {ON_THE_CPU}")
    names: dict = {}
    exec(compile(block, "docs", "exec"), names)
    logged = {key for entry in names["trainer"].state.log_history for key in entry}
    for name in re.findall(r"`(curation/\w+)`", PAGE):
        assert name in logged
    assert curation.CurationLedger("outputs/ledger").rounds


def test_every_rule_has_its_row():
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    assert rows == {name for name in curation.__all__ if name.startswith(("flip_", "keep_", "relabel_"))}


def test_every_command_names_a_file():
    for path in re.findall(r"recipes/[\w/.]+", PAGE):
        assert (ROOT / path.rstrip(".")).exists(), path
