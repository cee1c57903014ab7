"""The page about evaluation: its examples run, and its table is true."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoProcessor

from tests.families import family_dir
from tests.rows import make_dataset
from tests.test_docs import ROOT, code_blocks
from trl_dt2it import load_reward_model
from trl_dt2it.evaluation import BENCHMARKS, compute_metrics, read_benchmark

from .benchmark_rows import mm_rlhf_rows, mm_rows, png, vl_rows


PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The model that the examples name, and files in place of the Hub, which is not there in tests."""
    monkeypatch.chdir(tmp_path)
    load_reward_model(family_dir("qwen3_vl"), dtype="float32").save_pretrained("outputs/my-reward-model")
    AutoProcessor.from_pretrained(family_dir("qwen3_vl")).save_pretrained("outputs/my-reward-model")
    rng = random.Random(0)
    rows = {"vl-rewardbench": vl_rows(rng, 6), "multimodal-rewardbench": mm_rows(rng, 6)}
    rows["mm-rlhf-rewardbench"] = [row for row in mm_rlhf_rows(rng, 4) if "image" in row]
    for name, given in rows.items():
        for row in given:
            image = "Image" if "Image" in row else "image"
            content = row[image] if isinstance(row[image], bytes) else png()
            row[image] = row[image] if isinstance(row[image], str) else f"{row['id']}.png"
            file = tmp_path / name / row[image]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (tmp_path / name / "rows.jsonl").write_text("\n".join(map(json.dumps, given)))
    return tmp_path


def test_the_examples_run(files, capsys):
    def local(block: str) -> str:
        for call, name in (
            ('(scorer, "vl-rewardbench")', "(scorer, 'vl-rewardbench', 'vl-rewardbench/rows.jsonl')"),
            ('(scorer, "vl-rewardbench", c', "(scorer, 'vl-rewardbench', 'vl-rewardbench/rows.jsonl', c"),
            ("(scorer, name)", "(scorer, name, f'{name}/rows.jsonl')"),
            ('read_benchmark("vl-rewardbench")', "read_benchmark('vl-rewardbench', 'vl-rewardbench/rows.jsonl')"),
            ('parquet"), "vl-rewardbench")', "parquet\"), 'vl-rewardbench', 'vl-rewardbench/rows.jsonl')"),
            ('eval_datasets(["vl-rewardbench"])', "eval_datasets({'vl-rewardbench': 'vl-rewardbench/rows.jsonl'})"),
        ):
            block = block.replace(call, name)
        return block

    first, three, controls, own, card, scores, lists, training = code_blocks("python", PAGE)
    names: dict = {"pairs": make_dataset(4)}
    exec(compile(local(first), "docs", "exec"), names)
    assert "VL-RewardBench, 6 rows: accuracy, %" in capsys.readouterr().out
    exec(compile(local(three), "docs", "exec"), names)
    n = sum(result.n[result.headline] for result in names["results"])
    assert f"of {n} pairs: " in capsys.readouterr().out.splitlines()[-1]
    assert names["results"][2].label.startswith("image-only")
    exec(compile(local(controls), "docs", "exec"), names)
    assert "with another row's image its accuracy is" in capsys.readouterr().out
    exec(compile(own, "docs", "exec"), names)
    assert "dropped: 1 without images" in capsys.readouterr().out
    exec(compile(card, "docs", "exec"), names)
    assert len(names["data"].to_dict()["model-index"][0]["results"]) == 3
    assert json.loads(Path("evaluation.json").read_text())["name"] == "vl-rewardbench"
    before = names["result"].metrics
    exec(compile(local(scores), "docs", "exec"), names)
    assert names["result"].metrics == before
    exec(compile(lists, "docs", "exec"), names)
    assert capsys.readouterr().out.splitlines()[-1] == "1.0"
    exec(compile(local(training), "docs", "exec"), names)
    assert list(names["eval_dataset"]) == ["vl-rewardbench", "held_out"]


def test_every_benchmark_has_its_row():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"]
    table = {row[0].strip("`"): row[1:] for row in rows}
    assert list(table) == list(BENCHMARKS)
    for name, (title, pairs, metrics, licence) in table.items():
        benchmark = BENCHMARKS[name]
        assert title == benchmark.title
        assert licence == benchmark.source.licence.replace("unknown", "not stated")
        assert not benchmark.sizes or any(f"{size:,}" in pairs for size in benchmark.sizes)
        assert f"`{benchmark.headline}`" in metrics


def test_the_metrics_of_the_table_are_those_that_are_computed():
    rng = random.Random(0)
    for name, rows in (("vl-rewardbench", vl_rows(rng, 40)), ("multimodal-rewardbench", mm_rows(rng, 80))):
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}`"))
        listed = line.split("|")[4].replace("`", "").strip().split(", ")
        assert listed == list(compute_metrics(name, rows, [1.0] * len(rows), [0.0] * len(rows)))
    assert len(read_benchmark("vl-rewardbench", vl_rows(rng, 2))) == 2
