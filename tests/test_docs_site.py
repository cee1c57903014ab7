"""The site: it builds without a warning, its pages tell the truth, and every block of code on them runs or parses."""

import ast
import json
import re
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from trl_dt2it.cli import VERBS, load_recipe, main, parser_of, split_flags
from trl_dt2it.data import load_preferences, validate
from trl_dt2it.training.config import MultimodalRewardConfig
from trl_dt2it.training.losses import LOSSES

from .data.fixtures_as_rows import fixture
from .families import example_images, family_dir
from .test_docs import ROOT, code_blocks, replaced


DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
# Pages whose blocks of Python are run by a test of their own, here or in the tests of their subject.
RUN_HERE = ("building_blocks.md", "migrating.md", "quickstart.md", "training.md")
RUN_ELSEWHERE = (
    *("curation.md", "data.md", "debias.md", "evaluation.md", "judge.md", "report.md", "scoring.md", "serving.md"),
)
NO_GPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture(scope="module")
def hooks():
    spec = spec_from_file_location("docs_hooks", ROOT / "tools" / "docs_hooks.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"[\w/]+\.md\b", text)) == sorted(PAGES)


def test_every_page_with_python_is_run_by_a_test():
    with_python = {name for name, text in PAGES.items() if code_blocks("python", text)}
    assert with_python <= {*RUN_HERE, *RUN_ELSEWHERE}


def test_every_table_is_on_the_page_of_measurements(hooks):
    assert hooks.RESULTS_MARKER in PAGES["measured.md"]
    page = hooks.all_results()
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
        assert rows and all(line in page for line in rows), path.name
        command, question = hooks.command_of(path.stem)
        assert question.rstrip().endswith(("?", ".")) or question, path.name
        script = re.fullmatch(r"python (benchmarks/\w+\.py)", command)
        assert (ROOT / script[1]).is_file() if script else command == "make bench-peers WORKDIR=path"
        assert f"{{ #{path.stem} }}" in page and command in page


def test_links_out_of_the_docs_lead_somewhere(hooks):
    text = "[a](../benchmarks/results/peers.md) [b](../trl_dt2it/training/losses.py) [c](data.md) [d](https://e.org)"
    assert hooks.with_links(text, "x.md") == "[a](measured.md#peers) b [c](data.md) [d](https://e.org)"
    assert hooks.with_links("[a](../../benchmarks/results/peers.md)", "api/x.md") == "[a](../measured.md#peers)"


def test_heads_of_yaml_files_are_those_of_the_repository(hooks):
    for page, folder in (("recipes.md", "recipes/configs"), ("multi_node.md", "recipes/accelerate")):
        assert hooks.HEADS_MARKER.findall(PAGES[page]) == [folder]
        shown = hooks.heads_of(folder)
        for path in (ROOT / folder).glob("*.yaml"):
            first = path.read_text(encoding="utf-8").splitlines()[0]
            assert f"### {path.stem}\n" in shown and first[2:] in shown, path.name


def own_messages() -> list[str]:
    """Every string of the code, with `...` where something is filled in."""
    found = []
    for folder in ("trl_dt2it", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_every_message_of_troubleshooting_is_in_the_code():
    quoted = re.findall(r"^> (.+)$", PAGES["troubleshooting.md"], flags=re.MULTILINE)
    assert len(quoted) > 25
    known = own_messages()
    for message in quoted:
        parts = [part for part in re.split(r"\s*\.\.\.\s*", message) if part.strip(" .;")]
        pattern = re.compile(r".*?".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in known), message


def bash_lines() -> list[tuple[str, str]]:
    lines = []
    for name, text in PAGES.items():
        for block in code_blocks("bash", text):
            joined = re.sub(r"\\\n\s*", " ", block)
            lines += [(name, line) for line in joined.splitlines() if "recipes/" in line or "trl-dt2it " in line]
    return [one for one in lines if one[1].split()[0] in ("trl-dt2it", "python", "accelerate")]


@pytest.mark.parametrize(("page", "line"), bash_lines(), ids=lambda text: text[:60])
def test_every_command_of_the_docs_parses(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "trl-dt2it" or "trl_dt2it.cli" in words:
        place = words.index("trl_dt2it.cli") + 1 if "trl_dt2it.cli" in words else 1
        recipe, flags = VERBS[words[place]].recipe, split_flags(words[place + 1 :])[1]
    else:
        place = next(index for index, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
        recipe, flags = Path(words[place]).stem, words[place + 1 :]
    if "--help" in flags:
        return
    parser = parser_of(load_recipe(recipe), recipe)
    trains = any("use_cpu" in kind.__dataclass_fields__ for kind in parser.dataclass_types)
    assert parser.parse_args_and_config([*flags, *(NO_GPU if trains else [])])


def test_the_quickstart_runs_from_the_file_to_the_answer(tmp_path, monkeypatch, capsys):
    """The commands of the page, in their order, on a tiny model in place of the one of the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    page = PAGES["quickstart.md"]
    (line,) = code_blocks("json", page)
    row = json.loads(line)
    Path("photos").mkdir()
    with open("pairs.jsonl", "w") as file:
        for index, image in enumerate(example_images(8)):
            name = row["images"][0] if index == 0 else f"{index}.png"
            image.save(Path("photos") / name)
            answer = {"role": "assistant", "content": f"{row['chosen'][0]['content']} {index}"}
            file.write(json.dumps({**row, "images": [name], "chosen": [answer]}) + "\n")
    done = []
    for _, command in [one for one in bash_lines() if one[0] == "quickstart.md"]:
        words = shlex.split(command)[1:]
        if words[0] == "train":
            words = [str(family_dir("qwen3_vl")) if word.startswith("Qwen/") else word for word in words]
            words += [*NO_GPU, "--report_to", "none", "--num_train_epochs", "1", "--save_strategy", "no"]
        assert main(words) == 0, (command, capsys.readouterr().err)
        out = capsys.readouterr().out
        done.append(words[0])
        if "--dry_run" in words:
            assert "Dry run: nothing is written" in out and not Path("reward-model").exists()
        elif words[0] == "audit":
            assert "8 of 8 rows can be used" in out
    assert done == ["audit", "train", "train", "score", "audit"]
    (use,) = code_blocks("python", page)
    exec(compile(use, "docs/quickstart.md", "exec"), names := {})
    assert capsys.readouterr().out.strip() in names["answers"]
    verbs = re.findall(r"^\| `trl-dt2it ([\w-]+)` \|.*\| `recipes/(\w+)\.py` \|$", page, flags=re.MULTILINE)
    assert dict(verbs) == {name: verb.recipe for name, verb in VERBS.items()}


def test_files_of_llamafactory_and_ms_swift_load_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dpo.json").write_text(json.dumps(fixture("llamafactory_sharegpt")))
    Path("rlhf.jsonl").write_text("\n".join(map(json.dumps, fixture("ms_swift_rlhf"))))
    Path("images").mkdir()
    for name in ("1.jpg", "2.jpg"):
        example_images(1)[0].save(f"images/{name}")
    names: dict = {}
    llamafactory, swift, write = code_blocks("python", PAGES["migrating.md"])
    exec(compile(llamafactory, "docs/migrating.md", "exec"), names)
    first = names["pairs"][0]
    assert [block["type"] for block in first["prompt"][-1]["content"]] == ["image", "text"]
    assert first["prompt"][0]["role"] == "system"
    exec(compile(swift, "docs/migrating.md", "exec"), names)
    row = names["pairs"][0]
    assert (row["chosen"][0]["content"][0]["text"], row["strength"]) == ("A red cup.", 0.5)
    clean, bad = validate(names["pairs"], show=False)
    assert (len(clean), len(bad)) == (1, 0)
    exec(compile(write, "docs/migrating.md", "exec"), names)
    assert load_preferences("trl", "pairs/train.parquet")[0]["strength"] == 0.5


def test_the_building_blocks_run_and_print_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page, names, printed = PAGES["building_blocks.md"], {}, []
    for block in code_blocks("python", page):
        capsys.readouterr()
        exec(compile(block, "docs/building_blocks.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    inside = r"((?:(?!```).*\n)+)```"
    shown = re.findall(rf"^```python\n{inside}\n\n```text\n{inside}$", page, flags=re.MULTILINE)
    assert len(shown) == 5
    for block, text in shown:
        assert text in printed[code_blocks("python", page).index(block)]
    rows, ids = printed[5].splitlines()[-2:]
    assert rows == "10" and ids == "{'rlaif_v': {'7'}}"
    assert printed[6].splitlines()[-2:] in (
        ["1 ['empty_caption']", "The first."],
        ["1 ['empty_caption']", "The second."],
    )
    flips, counts = printed[7].splitlines()
    assert flips == "[False False  True False] [False False  True False] [ True False False  True]"
    assert names["relabel_by_vote"](names["votes"]).counts()
    assert printed[8].splitlines()[:3] == ["True [False, True]", "['system', 'user']", "first"]


def test_the_settings_that_the_pages_name_exist():
    fields = {*MultimodalRewardConfig.__dataclass_fields__}
    table = PAGES["training.md"].split("## Settings that matter")[1]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) <= fields
    for page in ("training.md", "method.md"):
        named = set(re.findall(r"^\| `(\w+)` \| [-(]|^\| `(\w+)` \| (?:s\^|with)", PAGES[page], flags=re.MULTILINE))
        assert {one for pair in named for one in pair if one} == set(LOSSES), page


def test_the_training_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block, doubt, blind = code_blocks("python", PAGES["training.md"])
    for old, new in (
        ("max_steps=20", 'max_steps=2, report_to="none", save_strategy="no"'),
        ("per_device_train_batch_size=32", "per_device_train_batch_size=8"),
        ('make_digits("train", 600)', 'make_digits("train", 24)'),
        ('make_digits("test", 100)', 'make_digits("test", 10)'),
    ):
        block = replaced(block, old, new)
    exec(compile(block, "docs/training.md", "exec"), names := {})
    assert names["trainer"].state.global_step == 2 and Path("reward-model/model.safetensors").is_file()
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    exec(compile(doubt, "docs/training.md", "exec"), names)
    assert names["doubtful"]["label_confidence"][299:301] == [0.8, None]
    exec(compile(blind, "docs/training.md", "exec"), names)
    assert names["trainer"].args.blind_offset and names["told"]["blind_margin"][299:301] == [2.2, None]


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    measured = (tmp_path / "site/measured/index.html").read_text()
    assert measured.count("<table>") >= len(list((ROOT / "benchmarks/results").glob("*.md")))
