"""The recipe that evaluates: the numbers it writes are those of the scorer, and what is wrong fails at start."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from trl_dt2it.cli import load_recipe
from trl_dt2it.evaluation import ScoreFile, audit_looking, compute_metrics, evaluate, read_benchmark
from trl_dt2it.evaluation.looking import CONTROLS
from trl_dt2it.scoring.scorer import RewardScorer

from ..evaluation.benchmark_rows import paper_rows, vl_rows
from ..pairs import model_of, processor_of


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("evaluate")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "my-model"
    model_of("qwen3_vl").save_pretrained(directory)
    processor_of("qwen3_vl").save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    return directory


def run(recipe, *flags: object) -> None:
    recipe.main(*recipe.make_parser().parse_args_and_config(list(map(str, flags))))


def test_what_it_writes_is_what_the_scorer_says(recipe, model, tmp_path, capsys):
    rows = vl_rows(random.Random(0), 12)
    Dataset.from_list(rows).to_parquet(tmp_path / "vl.parquet")
    given = json.dumps({"vl-rewardbench": str(tmp_path / "vl.parquet")})
    flags = ["--model", model, "--benchmarks", "vl-rewardbench", "--rows", given]
    run(recipe, *flags, "--output_dir", tmp_path / "out", "--model_card", "true")
    content = json.loads((tmp_path / "out/evaluation.json").read_text())
    (result,) = content["results"]
    canonical = read_benchmark("vl-rewardbench", str(tmp_path / "vl.parquet"))
    scores = RewardScorer.from_pretrained(model).score_pairs(canonical)
    expected = compute_metrics("vl-rewardbench", canonical, scores[:, 0], scores[:, 1])
    assert result["metrics"] == pytest.approx(expected) and set(result["metrics"]) >= {"overall", "macro"}
    assert content["model"] == str(model) and content["pooled"] is None and content["dtype"] == "torch.float32"
    # The file of scores gives the same, matched by id.
    file = tmp_path / "out/vl-rewardbench.parquet"
    assert pq.read_table(file).num_rows == 12
    assert evaluate(ScoreFile(file), "vl-rewardbench", rows[::-1]).metrics == pytest.approx(expected)
    shown = capsys.readouterr().out
    assert "VL-RewardBench" in shown and "Beside published scores" in shown and "evaluation.json" in shown
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "mit" and "# Mine" in card.text
    entries = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    assert entries["overall"] == round(expected["overall"], 4)
    # A second time replaces the numbers of the first.
    run(recipe, *flags, "--output_dir", tmp_path / "out", "--model_card", "true")
    assert len(ModelCard.load(model / "README.md").data.eval_results) == len(entries)


def test_all_three_from_local_rows_with_the_papers_pooled_mean(recipe, model, tmp_path, capsys):
    rows = {}
    for name, some in paper_rows(random.Random(1), 9, tmp_path / "images").items():
        rows[name] = str(tmp_path / f"{name}.parquet")
        Dataset.from_list(some).to_parquet(rows[name])
    flags = ["--model", model, "--benchmarks", "all", "--rows", json.dumps(rows)]
    run(recipe, *flags, "--image_root", tmp_path / "images", "--output_dir", tmp_path / "out")
    correct, counts, shares, scorer = 0, [], [], RewardScorer.from_pretrained(model)
    for name, file in rows.items():
        canonical = read_benchmark(name, file, image_root=str(tmp_path / "images"))
        scores = scorer.score_pairs(canonical)
        right = scores[:, 0] > scores[:, 1]
        correct, counts, shares = correct + right.sum(), [*counts, len(right)], [*shares, right.mean()]
    assert len(set(counts)) > 1 and len(set(shares)) > 1  # otherwise the pooled mean would be that of the three
    content = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [result["name"] for result in content["results"]] == list(rows)
    pooled = {"micro": correct / sum(counts), "mean": sum(shares) / 3, "n": sum(counts)}
    assert content["pooled"] == pytest.approx(pooled)
    shown = " ".join(capsys.readouterr().out.split())
    expected = f"{correct} of {sum(counts)} pairs, the paper's mean overall accuracy: {correct / sum(counts):.2%}"
    assert expected in shown and "BaseReward 7B" in shown
    # Of two of them there is a pooled mean too, but it is not the paper's.
    two = {name: rows[name] for name in list(rows)[:2]}
    flags = ["--model", model, "--benchmarks", *two, "--rows", json.dumps(two), "--image_root", tmp_path / "images"]
    run(recipe, *flags, "--output_dir", tmp_path / "two")
    assert json.loads((tmp_path / "two/evaluation.json").read_text())["pooled"]["n"] == sum(counts[:2])
    assert "the paper's mean" not in capsys.readouterr().out


def test_controls_are_in_all_that_it_writes(recipe, model, tmp_path, capsys):
    rows = vl_rows(random.Random(0), 12)
    Dataset.from_list(rows).to_parquet(tmp_path / "vl.parquet")
    given = json.dumps({"vl-rewardbench": str(tmp_path / "vl.parquet")})
    flags = ["--model", model, "--benchmarks", "vl-rewardbench", "--rows", given, "--controls", *CONTROLS]
    run(recipe, *flags, "--dry_run")
    assert "blank, swapped, low_resolution: 5 times the scoring" in capsys.readouterr().out
    run(recipe, *flags, "--output_dir", tmp_path / "out", "--model_card", "true")
    (result,) = json.loads((tmp_path / "out/evaluation.json").read_text())["results"]
    scorer, looking = RewardScorer.from_pretrained(model, batch_tokens=300), result["looking"]
    dataset = read_benchmark("vl-rewardbench", str(tmp_path / "vl.parquet"))
    report = audit_looking(scorer, dataset)  # in other batches
    assert {name: one["overall"] for name, one in report.metrics.items()} == {
        name: one["overall"] for name, one in looking["metrics"].items()
    }
    assert report.text == looking["text"] and looking["n"] == 12
    shown = capsys.readouterr().out
    assert "Does it look at the image?" in shown and shown.count("this model, image:") == 4
    assert looking["text"] in " ".join(shown.split())
    files = {f"vl-rewardbench.{name}.{kind}" for name in looking["gain"] for kind in ("parquet", "json")}
    assert files <= {file.name for file in (tmp_path / "out").iterdir()}
    text = ModelCard.load(model / "README.md").text
    assert "#### Does it look at the image?" in text and looking["text"] in text and text.count("another row's |") == 1
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert '<section id="looking">' in page and looking["text"].split(":")[0] in page


def test_a_yaml_file_and_the_name_of_all(recipe, tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"model: some/model\nbenchmarks: [all, hpdv2-test]\nrows: {{hpdv2-test: a.json}}\nimage_root: {tmp_path}\n"
    )
    (args,) = recipe.make_parser().parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert recipe.resolve(args) == {
        "vl-rewardbench": (None, str(tmp_path)),
        "multimodal-rewardbench": (None, str(tmp_path)),
        "mm-rlhf-rewardbench": (None, str(tmp_path)),
        "hpdv2-test": ("a.json", str(tmp_path)),
    }
    (tmp_path / "config.yaml").write_text("model: some/model\nbenchmark: all\n")
    with pytest.raises(ValueError, match="--benchmark"):
        recipe.make_parser().parse_args_and_config(["--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmarks", "vlrb"], "`vlrb` is no known benchmark"),
        (
            ["--controls", "blank", "noise"],
            "`controls` has 'noise'; pass some of 'blank', 'swapped', 'low_resolution'",
        ),
        (["--rows", "a.json"], "`rows` has to be a mapping"),
        (["--rows", '{"hpdv2-test": "a.json"}'], "`rows` names hpdv2-test, which is not among"),
        (["--image_root", "nowhere"], "`image_root` of vl-rewardbench is nowhere, but there is no such folder"),
        (["--image_root", '{"hpdv2-test": "."}'], "`image_root` names hpdv2-test"),
        (["--model", "some/model", "--model_card", "true"], "some/model is no directory with a README.md"),
    ],
)
def test_what_is_wrong_fails_at_start(recipe, model, flags, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, "--model", model, *flags)
    with pytest.raises(ValueError, match="Give `model`"):
        run(recipe)
