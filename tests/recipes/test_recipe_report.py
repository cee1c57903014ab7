"""The recipe of the report: it writes beside what it reports on, takes corrections, and refuses what is not there."""

import shutil
from pathlib import Path

import pytest

from trl_dt2it.cli import load_recipe
from trl_dt2it.curation import CurationLedger

from ..curation.test_ledger_corrections import entry, write
from ..report.run_folder import evaluation_file, write_run


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("report")


def run(recipe, *flags: object) -> None:
    recipe.main(*recipe.make_parser().parse_args_and_config(list(map(str, flags))))


def test_it_writes_beside_and_takes_corrections(recipe, tmp_path, capsys):
    folder = write_run(tmp_path)
    evaluation = evaluation_file(tmp_path)
    run(recipe, "--evaluation", evaluation, evaluation, "--title", "Mine")
    assert (tmp_path / "report.html").read_text("utf-8").count("VL-RewardBench: my-&lt;b&gt;model") == 2
    path = write(tmp_path / "corrections.json", [entry("pair-20", "wrong", True, True)], source_set=None)
    run(recipe, "--run", folder, "--corrections", path)
    assert "Corrections: flip 1" in capsys.readouterr().out
    state = {row["pair_id"]: row["flipped"] for row in CurationLedger(folder / "ledger").state().to_pylist()}
    assert state["pair-20"] is True
    assert "by hand" in (folder / "report.html").read_text("utf-8")
    shutil.rmtree(folder / "ledger")
    with pytest.raises(ValueError, match="`corrections` need the ledger of a run"):
        run(recipe, "--run", folder, "--corrections", path)
    with pytest.raises(ValueError, match="`evaluation` is nowhere.json, but there is no such file"):
        run(recipe, "--evaluation", "nowhere.json")
    with pytest.raises(ValueError, match="There is nothing to report on"):
        run(recipe)
