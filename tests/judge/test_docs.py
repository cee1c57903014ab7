"""The page about the judge: its examples run, and what it says of statuses is true."""

import re
from pathlib import Path
from typing import get_args

from PIL import Image

from trl_dt2it.judge import Endpoint
from trl_dt2it.judge.rubric import Status

from .server import JudgeServer, texts_of


PAGE = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    def answer(body):
        text = texts_of(body)
        if '"better"' in text:
            return (
                '{"better": "first"}'
                if text.index("Three cups.") < text.index("There are **two**")
                else '{"better": "second"}'
            )
        return '{"scores": [9, 3, 1]}' if "3 answers" in text else f'{{"scores": {{{scores}}}}}'

    names = ("visual_accuracy", "instruction_following", "reasoning", "completeness", "safety", "clarity")
    scores = ", ".join(f'"{name}": 8' for name in names)
    asking, provider, rubric = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.new("RGB", (64, 48), "red").save("photos/cups.png")
    with JudgeServer(answer) as server:
        assert asking.count("http://localhost:8000/v1") == 1
        variables: dict = {}
        exec(compile(asking.replace("http://localhost:8000/v1", server.base_url), "docs", "exec"), variables)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:4]] == ["ok"] * 4
    assert printed[4] == "first" and printed[5].startswith("replies: 4 ok")
    assert isinstance(eval(provider, variables), Endpoint)
    exec(compile(rubric, "docs", "exec"), variables)
    assert variables["rubric"].total({"accuracy": 100, "brevity": 50}) == 90


def test_every_status_has_its_row():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE) == list(get_args(Status))
