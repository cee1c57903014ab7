"""The page about using a reward model: its examples run and print what it says."""

import re

from transformers import AutoProcessor

from trl_dt2it import load_reward_model

from .families import family_dir
from .test_docs import ROOT, code_blocks


PAGE = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    folder = family_dir("qwen3_vl")
    monkeypatch.chdir(tmp_path)
    load_reward_model(folder, dtype="float32").save_pretrained("outputs/my-reward-model")
    AutoProcessor.from_pretrained(folder).save_pretrained("outputs/my-reward-model")
    names: dict = {}
    for block in code_blocks("python", PAGE):
        exec(compile(block, "docs", "exec"), names)
    best, columns = capsys.readouterr().out.strip().splitlines()
    assert best == f"{names['answers'][names['rewards'].index(max(names['rewards']))]} True"
    assert columns == "['chosen_reward', 'rejected_reward']"
    rows = names["scored"]
    again = names["scorer"].score_pairs(names["pairs"])
    assert abs(again[:, 0] - rows["chosen_reward"][:]).max() < 1e-5


def test_the_recipe_exists():
    for path in re.findall(r"recipes/\w+\.py", PAGE):
        assert (ROOT / path).exists()
