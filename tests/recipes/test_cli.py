"""The command line: its examples parse, dry runs say what is there, misuse is one sentence, and it runs installed."""

import ast
import importlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from trl_dt2it import RewardScorer
from trl_dt2it.cli import RECIPES, VERBS, Misuse, load_recipe, main, parser_of, split_flags
from trl_dt2it.data import write_parquet
from trl_dt2it.debias import audit_blind, audit_style
from trl_dt2it.demo.digits import make_digits

from ..evaluation.benchmark_rows import vl_rows
from ..pairs import model_of, processor_of


ROOT = Path(__file__).parents[2]
ON_THE_CPU = ["--use_cpu", "true", "--bf16", "false"]
WIDTH = 110


def examples_of(name: str) -> list[tuple[str, str]]:
    """The purpose and the command of each example in the docstring of a verb's recipe."""
    text = ast.get_docstring(ast.parse((RECIPES / f"{VERBS[name].recipe}.py").read_text(encoding="utf-8")))
    return re.findall(r"^ *# (.+)\n *(trl-dt2it .+)$", re.sub(r" \\\n +", " ", text), flags=re.MULTILINE)


EXAMPLES = [(name, command) for name in VERBS for _, command in examples_of(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Real pairs, benchmark rows, prompts and a tiny model, as files."""
    folder = tmp_path_factory.mktemp("files")
    write_parquet(make_digits("train", 240, style_bias=0.9), folder / "pairs.parquet")
    Dataset.from_list(vl_rows(random.Random(0), 12)).to_parquet(folder / "vl.parquet")
    candidates = [{"text": text, "generator": "a"} for text in ("It is 4711.", "I read 4177.")]
    line = {"question": "What is written here?", "images": [], "reference": "It is 4711.", "candidates": candidates}
    (folder / "prompts.jsonl").write_text(json.dumps(line))
    model_of("qwen3_vl").save_pretrained(folder / "model")
    processor_of("qwen3_vl").save_pretrained(folder / "model")
    return folder


def cells(text: str) -> dict[str, list[str]]:
    """The rows of printed tables, by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def flags_of(name: str, command: str) -> list[str]:
    """The words of an example that reach the recipe, without those for the launcher."""
    words = shlex.split(command)
    assert words[:2] == ["trl-dt2it", name]
    words = words[2:]
    for option in ("--num_processes", "--accelerate_config"):
        if option in words:
            assert VERBS[name].is_launched
            del words[words.index(option) : words.index(option) + 2]
    return split_flags(words)[1]


@pytest.mark.parametrize(("name", "command"), EXAMPLES, ids=lambda text: text.split(" --", 1)[-1][:40])
def test_every_example_parses(name, command):
    parser = parser_of(load_recipe(VERBS[name].recipe), name)
    trains = any("use_cpu" in kind.__dataclass_fields__ for kind in parser.dataclass_types)
    flags = flags_of(name, command)
    parsed = parser.parse_args_and_config([*flags, *(ON_THE_CPU if trains else [])])
    values = {key: value for part in parsed for key, value in vars(part).items()}
    given = {flag[2:]: value for flag, value in zip(flags, flags[1:], strict=False) if flag[:2] == "--" != value[:2]}
    for key, value in given.items():
        if key not in ("config", "benchmarks", "controls", "evaluation"):
            assert str(values[key]) == value, key


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_every_example_and_fits(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    joined = " ".join(text.replace("\\\n", " ").split())
    assert len(examples_of(name)) >= 2
    for wanted, command in examples_of(name):
        assert f"# {wanted} {command}" in joined
    assert max(map(len, text.splitlines())) <= WIDTH + 2
    assert ("--num_processes N" in text) == VERBS[name].is_launched
    assert main([name, "--help_all"]) == 0
    assert len(capsys.readouterr().out) > 100


def test_the_overview_names_every_verb(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    text = capsys.readouterr().out
    assert all(f"  {name}" in text and verb.summary in text for name, verb in VERBS.items())


def test_a_dry_run_of_training_counts_pairs_and_steps(folder, tmp_path, capsys):
    flags = ["--dataset_name", folder / "pairs.parquet", "--model_name_or_path", folder / "model", *ON_THE_CPU]
    flags += ["--output_dir", tmp_path / "out", "--per_device_train_batch_size", 7, "--num_train_epochs", 3]
    assert main(["train", *map(str, flags), "--max_train_pairs", "100", "--dry_run"]) == 0
    found = cells(capsys.readouterr().out)
    assert found["rows, train"] == ["240"] and found["trains on"] == ["100"]
    assert found["steps at most"] == ["45"]  # three times 15, the last of which has two pairs
    assert not (tmp_path / "out").exists()


def test_dry_runs_of_the_other_verbs(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = str(folder / "pairs.parquet")
    assert main(["audit", "--dataset_name", pairs, "--max_rows", "50", "--dry_run"]) == 0
    assert cells(capsys.readouterr().out)["rows"] == ["50"]
    assert main(["score", "--model", "m", "--dataset_name", pairs, "--output_dir", "s", "--dry_run"]) == 0
    found = cells(capsys.readouterr().out)
    assert found["rows"] == ["240"] and found["processes"] == ["1"] and found["writes"] == ["s/scored.parquet"]
    rows = json.dumps({"vl-rewardbench": str(folder / "vl.parquet")})
    names = ["--benchmarks", "vl-rewardbench", "mm-rlhf-rewardbench"]
    assert main(["evaluate", "--model", "m", *names, "--rows", rows, "--dry_run"]) == 0
    found = cells(capsys.readouterr().out)
    assert found["mm-rlhf-rewardbench"] == ["yifanzhang114/MM-RLHF-RewardBench, 170 pairs"]
    assert "12 pairs" in found["vl-rewardbench"][0] or "12 pairs" in " ".join(sum(found.values(), []))
    flags = ["--reward_model", "m", "--num_answers", "3", "--output_dir", "b", "--dry_run"]
    for name, written in (("best-of-n", "b/best_of_n.jsonl"), ("dpo-pairs", "b/pairs/train.parquet")):
        assert main([name, "--config", name.replace("dpo-pairs", "build-dpo-pairs").replace("-", "_"), *flags]) == 0
        found = cells(capsys.readouterr().out)
        assert found["prompts"] == ["16"] and found["tokens to write at most"] == ["768"]  # 16 times 3 times 16
        assert found["writes"] == [written]
    endpoint = json.dumps({"base_url": "http://localhost:1/v1", "model": "judge"})
    flags = ["--dataset_name", str(folder / "prompts.jsonl"), "--output_dir", "c", "--judge", endpoint]
    assert main(["construct", *flags, "--num_shuffles", "2", "--dry_run"]) == 0
    assert cells(capsys.readouterr().out)["pointwise"][0] == "2"  # one call for each of two candidates
    sources = json.dumps({"rlaif_v": {"num_shards": 4}})
    assert main(["prepare", "--sources", sources, "--output_dir", "p", "--shard", "0/2", "--dry_run"]) == 0
    assert cells(capsys.readouterr().out)["rlaif_v"][2] == "2 of 4"
    assert main(["curate", "--config", "dt2it_digits", "--output_dir", "r", "--dry_run"]) == 0
    assert cells(capsys.readouterr().out)["round-1/train/model-0"] == ["to do", "650", "250", "12.3", "", ""]
    (tmp_path / "evaluation.json").write_text("{}")
    assert main(["report", "--evaluation", "evaluation.json", "--dry_run"]) == 0
    assert cells(capsys.readouterr().out)["writes"] == ["report.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_scores_are_the_scorers_and_the_audit_reads_them(folder, tmp_path, capsys):
    flags = ["--dataset_name", str(folder / "pairs.parquet"), "--max_rows", "220"]
    assert main(["score", "--model", str(folder / "model"), *flags, "--output_dir", str(tmp_path)]) == 0
    scored = load_dataset("parquet", data_files=str(tmp_path / "scored.parquet"), split="train")
    first = scored.select(range(5)).remove_columns(["chosen_reward", "rejected_reward"])
    rewards = RewardScorer.from_pretrained(folder / "model").score_pairs(first)
    assert scored["chosen_reward"][:5] == pytest.approx(rewards[:, 0], abs=1e-5)
    gap = [one - other for one, other in zip(scored["chosen_reward"], scored["rejected_reward"], strict=True)]
    (found,) = json.loads((tmp_path / "summary.json").read_text())["parts"].values()
    assert found["pairs"] == 220 and found["accuracy"] == pytest.approx(sum(one > 0 for one in gap) / 220)
    assert found["mean_gap"] == pytest.approx(sum(gap) / 220, abs=1e-6)
    capsys.readouterr()
    file = str(tmp_path / "audit.json")
    assert main(["audit", "--dataset_name", str(tmp_path / "scored.parquet"), "--output_file", file]) == 0
    out = capsys.readouterr().out
    assert "220 of 220 rows can be used" in out and "Does the reward follow style" in out
    expected = audit_style(scored, scorer=("chosen_reward", "rejected_reward")).to_json()
    assert json.loads(Path(file).read_text()) == json.loads(expected)
    assert main(["audit", "--dataset_name", str(tmp_path / "scored.parquet"), "--blind", "--output_file", file]) == 0
    assert "Blind accuracy: do question and answers alone" in capsys.readouterr().out
    blind = audit_blind(scored)
    assert blind.overall.num_pairs == 220
    assert json.loads(Path(file).read_text()) == json.loads(expected) | {"blind": json.loads(blind.to_json())}


@pytest.mark.parametrize("scores", [[2.0, 1.0, 1.0], None])
def test_ranked_prompts_are_scored_and_compared_where_they_have_scores(scores, folder, tmp_path, capsys):
    rows = load_dataset("parquet", data_files=str(folder / "pairs.parquet"), split="train[:4]")
    nothing = [{"role": "assistant", "content": [{"type": "text", "text": "Nothing."}]}]
    answers = [[row["chosen"], row["rejected"], nothing] for row in rows.select_columns(["chosen", "rejected"])]
    columns = {"completions": answers} | ({} if scores is None else {"scores": [scores] * 4})
    ranked = Dataset.from_dict({"prompt": rows["prompt"][:], **columns}).add_column("images", rows.data["images"])
    write_parquet(ranked, tmp_path / "ranked.parquet")
    flags = ["--dataset_name", str(tmp_path / "ranked.parquet"), "--output_dir", str(tmp_path)]
    assert main(["score", "--model", str(folder / "model"), *flags]) == 0
    scored = load_dataset("parquet", data_files=str(tmp_path / "scored.parquet"), split="train")
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    if scores is None:
        assert parts == {} and "The answers have no scores" in capsys.readouterr().out
        return
    gaps = [first - other for first, *others in scored["rewards"] for other in others]  # and the others are tied
    assert parts["all pairs"]["pairs"] == len(gaps) == 8
    assert parts["all pairs"]["mean_gap"] == pytest.approx(sum(gaps) / 8, abs=1e-5)
    assert parts["all pairs"]["accuracy"] == sum(gap > 0 for gap in gaps) / 8
    assert main(["audit", *flags[:2], "--output_file", str(tmp_path / "audit.json")]) == 0
    assert "8 of 8 rows can be used" in capsys.readouterr().out


MISUSE = {
    "trane": "There is no verb 'trane'; choose among prepare,",
    "audit --image_rot x": "There is no flag --image_rot; did you mean --image_root?",
    "train --learning_rate abc": "invalid float value: 'abc'",
    "train --config digitz": "There is no file digitz; configurations that come with the package are",
    "train --config": "`--config` needs a YAML file",
    "train --num_processes 0": "`--num_processes` is '0'; give a number from 1 on.",
    "train --accelerate_config zero9": "There is no file zero9; configurations that come with the package are cpu,",
    "prepare --num_processes 2": "prepare runs in one process.",
    "prepare": "The following arguments are required: --output_dir",
    "prepare --output_dir o": "Give `sources`, the preference sets by name.",
    "construct --dataset_name x --output_dir o": "Give `judge`, the endpoint of the judge.",
    "audit": "Give `dataset_name`, the file, folder or Hub id of the rows.",
    "audit --dataset_name no.jsonl": "`dataset_name` is no.jsonl, but there is no such file.",
    "audit --preferences rlaif": "rlaif",
    "score": "Give `model`, the directory or Hub id of a reward model.",
    "evaluate --model m --benchmarks x": "`x` is no known benchmark.",
    "best-of-n": "Give `reward_model`, the directory or Hub id of a reward model.",
    "dpo-pairs --reward_model m --min_gap -1": "`min_gap` is -1.0; it must be at least 0.",
    "report --run nowhere": "`run` is nowhere, but there is no such file or folder.",
}


@pytest.mark.parametrize("command", MISUSE)
def test_misuse_is_one_sentence(command, capsys):
    assert main(shlex.split(command)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-dt2it")]
    assert len(error) == 1 and MISUSE[command] in error[0] and error[0].endswith((".", "help."))


def test_a_wrong_yaml_file(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("outputdir: x", "There is no key in the YAML file outputdir; did you mean output_dir?"),
        ("a: [", "The configuration is no YAML"),
        ("- a", "must contain a YAML mapping"),
    ):
        path.write_text(text)
        assert main(["score", "--config", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_errors_that_no_sentence_explains_stay_what_they_are(folder, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):  # asked for
        main(["audit", "--dataset_name", "no.jsonl", "--traceback"])
    # A fault of another library, where the rows are read.
    monkeypatch.setattr("trl_dt2it.curation.rounds.config.load_dataset", lambda *args, **options: [].pop())
    with pytest.raises(IndexError):
        main(["audit", "--dataset_name", str(folder / "pairs.parquet")])


def test_a_configuration_of_ones_own_wins_over_one_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_flags(["--config=digits"]) == ([], ["--config", str(RECIPES / "configs/digits.yaml")])
    Path("digits").write_text("a: 1")
    assert split_flags(["--config", "digits"]) == ([], ["--config", "digits"])
    with pytest.raises(Misuse):
        split_flags(["--config", "--dry_run"])


def test_flags_of_the_launcher_are_split_off():
    words = ["--num-processes=2", "--model", "m", "--accelerate_config", "cpu", "--benchmarks", "a", "b", "--dry_run"]
    launcher = ["--config_file", str(RECIPES / "accelerate/cpu.yaml"), "--num_processes", "2"]
    assert split_flags(words) == (launcher, ["--model", "m", "--benchmarks", "a", "b", "--dry_run"])


def test_the_overview_loads_no_torch():
    code = "import sys; from trl_dt2it.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_verbs_leave_modules_of_other_packages_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/__init__.py").write_text("def load(name):\n    return name\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    package = importlib.import_module("evaluate")
    try:
        assert main(["evaluate", "--help"]) == 0 and main(["evaluate", "--model", "m", "--benchmarks", "x"]) == 2
        assert sys.modules["evaluate"] is package and package.load("accuracy") == "accuracy"
        before = set(sys.modules)
        for verb in VERBS.values():
            load_recipe(verb.recipe)
        assert all(name.startswith("trl_dt2it.") for name in set(sys.modules) - before if "recipe" in name)
        assert not {verb.recipe for verb in VERBS.values()} & (set(sys.modules) - before)
    finally:
        del sys.modules["evaluate"]


def test_the_recipes_are_part_of_an_installed_package_which_starts_two_processes(folder, tmp_path):
    build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py"]
    subprocess.run([*build, "--build-lib", str(tmp_path / "lib")], cwd=ROOT, check=True, capture_output=True)
    inside = tmp_path / "lib/trl_dt2it/recipes"
    for path in (*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes").glob("*/*.yaml")):
        assert (inside / path.relative_to(ROOT / "recipes")).read_text() == path.read_text()
    command = [sys.executable, "-m", "trl_dt2it.cli", "score", "--model", str(folder / "model"), "--dry_run"]
    command += ["--dataset_name", str(folder / "pairs.parquet"), "--num_processes", "2"]
    environment = {"PYTHONPATH": str(tmp_path / "lib"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert cells(run.stdout)["processes"] == ["2"] and cells(run.stdout)["rows"] == ["240"]
