"""The recipe: its YAML, its dry run, and runs that are killed at random points and go on."""

import json
import random
from collections import Counter

import pytest
import yaml
from datasets import Dataset

from trl_dt2it.cli import load_recipe
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.debias import distill
from trl_dt2it.judge import Budget, Endpoint
from trl_dt2it.judge.store import read_endpoint

from ..judge.server import Fault, JudgeServer
from ..processes import ROOT, start_script
from .digit_judge import DigitJudge, digit_prompts


RECIPE = ROOT / "recipes" / "construct_preferences.py"
CONFIG = ROOT / "recipes" / "configs" / "construct_preferences.yaml"
CANARY = "sk-canary-5d0c1e"
CONCURRENCY = 4


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("construct_preferences")


def start(config):
    return start_script(RECIPE, "--config", config, DIGIT_KEY=CANARY)


def write_config(folder, name, base_url, **changes):
    endpoint = {"base_url": base_url, "api_key_env": "DIGIT_KEY", "max_concurrency": CONCURRENCY, "max_retries": 0}
    config = {
        "dataset_name": str(folder / "prompts.parquet"),
        "output_dir": str(folder / name),
        "judge": {**endpoint, "model": "judge", "input_price": 1.0, "output_price": 2.0, "max_cost": 1.0},
        "generator": {**endpoint, "model": "writer", "temperature": 1.0},
        "prompts_at_once": 8,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def call_of(received):
    return json.dumps(received.body, sort_keys=True)


def test_killed_runs_go_on_and_pay_for_nothing_twice(recipe, tmp_path, monkeypatch, capfd):
    prompts, truth = digit_prompts(24, seed=8, alike=0.2)
    prompts.to_parquet(tmp_path / "prompts.parquet")
    judge, rng = DigitJudge(truth, seed=8), random.Random(0)
    with JudgeServer(lambda body: Fault(text=judge(body), hang=0.02)) as server:
        config, kills, in_flight = write_config(tmp_path, "killed", server.base_url), 0, 0
        while True:
            run, stop = start(config), len(server.requests) + rng.randint(50, 70)
            if not run.kill_when(lambda stop=stop: len(server.requests) >= stop):
                break
            kills += 1
            in_flight += CONCURRENCY
        output = run.finish() + run.errors
        assert kills >= 2
        calls = Counter(map(call_of, server.requests))
        repeated = calls.total() - len(calls)
        assert repeated <= in_flight
        keys = {
            value for one in server.requests for key, value in one.headers.items() if key.lower() == "authorization"
        }
        assert keys == {f"Bearer {CANARY}"}

        monkeypatch.setenv("DIGIT_KEY", CANARY)
        path = write_config(tmp_path, "whole", server.base_url)
        recipe.main(*recipe.make_parser().parse_args_and_config(["--config", str(path)]))
        shown = capfd.readouterr()
        output += shown.out + shown.err
        assert Counter(map(call_of, server.requests)) - calls == Counter(dict.fromkeys(calls, 1))

    def pairs(name):
        path = tmp_path / name / "pairs" / "train.parquet"
        return leave_images_encoded(Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))).to_list()

    assert pairs("killed") == pairs("whole") and len(pairs("whole")) > 20
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "whole")]
    for report in reports:
        assert report.pop("usage")["judge"]["cost"] > 0
    assert reports[0] == reports[1] and reports[0]["prompts"] == 24
    assert "pairs from 24 prompts" in output and "Train on it with --dataset_name" in output
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file
    assert CANARY not in output


def test_dry_run_calls_nothing(tmp_path, recipe, capsys):
    digit_prompts(5, seed=1)[0].to_parquet(tmp_path / "prompts.parquet")
    with JudgeServer(lambda body: "") as server:
        path = write_config(tmp_path, "dry", server.base_url, dry_run=True, min_spread=0.0, max_prompts=3)
        (args,) = recipe.make_parser().parse_args_and_config(["--config", str(path)])
        recipe.main(args)
        assert server.requests == []
    text = capsys.readouterr().out
    assert "At most, for 3 prompts" in text
    rows = [line.split() for line in text.splitlines() if "wise" in line]
    assert [(row[1], row[3]) for row in rows] == [("listwise", "12"), ("pointwise", "12")]
    assert not (tmp_path / "dry").exists()


def test_the_yaml_parses_into_endpoints_and_arguments(recipe):
    (args,) = recipe.make_parser().parse_args_and_config(["--config", str(CONFIG)], fail_with_unknown_args=True)
    for name, value in yaml.safe_load(CONFIG.read_text()).items():
        assert getattr(args, name) == value
    endpoint, others = read_endpoint("judge", args.judge)
    assert isinstance(endpoint, Endpoint) and endpoint.api_key_env == "JUDGE_API_KEY" and endpoint.input_price == 2.5
    assert others == {"budget": Budget(max_cost=50.0), "max_concurrency": 16}
    endpoint, _ = read_endpoint("generator", args.generator)
    assert endpoint.temperature > 0
    keywords = distill.__kwdefaults__
    assert set(recipe.PASSED_ON_TO_DISTILL) < set(keywords)
    for name in set(recipe.PASSED_ON_TO_DISTILL) - {"num_shuffles"}:
        assert recipe.ConstructArguments.__dataclass_fields__[name].default == keywords[name], name


def test_mistakes_in_the_configuration_are_named(recipe, tmp_path):
    endpoint = {"base_url": "http://localhost/v1", "model": "m"}
    with pytest.raises(ValueError, match="`generator` has no `base_url`"):
        read_endpoint("generator", {"model": "m"})
    with pytest.raises(ValueError, match="`judge` has the unknown key `model_name`"):
        read_endpoint("judge", {**endpoint, "model_name": "x"})
    _, others = read_endpoint("judge", json.dumps({**endpoint, "budget_tokens": 7, "max_calls": 3}))
    assert others == {"budget": Budget(max_calls=3, max_tokens=7)}
    with pytest.raises(ValueError, match="There is no file or folder"):
        recipe.read_prompts(str(tmp_path / "nothing.jsonl"), "train")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match="is none of .parquet, .jsonl, .json"):
        recipe.read_prompts(str(tmp_path / "a.csv"), "train")
    with pytest.raises(ValueError, match="holds no Parquet file"):
        recipe.read_prompts(str(tmp_path), "train")


def test_prompts_from_json_lines(recipe, tmp_path):
    lines = [{"question": "What?", "images": ["a.png"], "candidates": [{"text": "x", "generator": "m"}]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert recipe.read_prompts(str(tmp_path / "prompts.jsonl"), "train").to_list() == lines
