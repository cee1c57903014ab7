"""The page about style: its examples run in their order on digits, print what it shows, and its tables are true."""

import inspect
import json
import os
import random
import re
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from rich.console import Console, ConsoleDimensions

from trl_dt2it.data import ImageOptions
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.messages import FEATURES
from trl_dt2it.debias import DISTILLED_FEATURES, STYLE_FEATURES, audit_style, balance_style, distill, match_style
from trl_dt2it.debias.audit import fit_probe
from trl_dt2it.debias.distillation.candidates import Origin, read_pools, read_question
from trl_dt2it.debias.reports import RewardStyle
from trl_dt2it.debias.style import read_pair_style
from trl_dt2it.judge import Endpoint
from trl_dt2it.judge.store import read_endpoint

from ..judge.server import JudgeServer, texts_of
from .digit_judge import BIAS, DigitJudge, corrupted, digit_prompts, image_hash, wrong_digits


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "debias.md").read_text(encoding="utf-8")
NUM_PROMPTS = 30
# What makes a training and an evaluation short, and where the endpoints are.
SHORTER = {
    "num_train_epochs=4": 'max_steps=12, report_to="none", save_strategy="no"',
    'make_digits("test", 1000': 'make_digits("test", 300',
    "pairs.select(range(400))": "pairs.select(range(40))",
    "max_steps=10,": 'max_steps=2, report_to="none",',
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def write_prompts(prompts) -> None:
    """`prompts.jsonl` and `images/`, as the page describes them; every sixth prompt has no candidates."""
    Path("images").mkdir()
    lines = []
    for number, row in enumerate(leave_images_encoded(prompts)):
        Path(f"images/{number}.png").write_bytes(row["images"][0]["bytes"])
        line = {"question": row["question"], "images": [f"{number}.png"], "reference": row["reference"]}
        if number % 6:
            line["candidates"] = row["candidates"]
        lines.append(json.dumps(line))
    Path("prompts.jsonl").write_text("\n".join(lines))


class Writer(DigitJudge):
    """A judge that also answers plain questions, with some digits wrong."""

    def __call__(self, body: dict) -> str:
        if "<<<" in texts_of(body):
            return super().__call__(body)
        rng = random.Random(json.dumps(body))
        return f"It is {corrupted(self.truth[image_hash(body['messages'][-1]['content'][0])], rng.randrange(5), rng)}."


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All blocks of the page, run in order in one folder: their names, what each printed, and what was asked."""
    prompts, truth = digit_prompts(NUM_PROMPTS, seed=5, alike=0.1)
    folder, names, printed = os.getcwd(), {"truth": truth}, {}
    with JudgeServer(Writer(truth, seed=5)) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        # As wide as on the page, whatever other tests have done to the terminal.
        patch.setattr(Console, "size", ConsoleDimensions(110, 25))
        patch.setenv("JUDGE_API_KEY", "sk-page")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as fast for so small a model, and far faster where cores are busy
        write_prompts(prompts)
        changes = {
            **SHORTER,
            "https://api.example.com/v1": server.base_url,
            "http://localhost:8000/v1": server.base_url,
        }
        assert all(PAGE.count(old) == 1 for old in changes)
        for block in blocks("python"):
            if "plan.show()" in block:
                names["asked_before"] = len(server.requests)
            short = block
            for old, new in changes.items():
                short = short.replace(old, new)
            with redirect_stdout(StringIO()) as out:
                exec(compile(short, "docs/debias.md", "exec"), names)
            printed[block] = out.getvalue()
            names |= {"training": short} if "trainer.train()" in block else {}
        names["asked"] = len(server.requests)
        names["again"] = {}
        changed = {"min_gap": 2.0, "num_bins": 1, "pairs_per_prompt": None, "max_pairs": 20}
        for name, options in {"same": {}, "changed": changed, "more orders": {"num_shuffles": 5}}.items():
            given = {"num_shuffles": 4, "image_options": names["options"], **options}
            pairs, _ = distill(names["prompts"], judge=names["judge"], generator=names["generator"], **given)
            names["again"][name] = (pairs, len(server.requests))
        # The same training without the weights.
        balanced = names["balanced"]
        exec(names["training"], {**names, "balanced": names["pairs"]}, biased := {})
        names["trainer"], names["balanced_trainer"] = biased["trainer"], names["trainer"]
        names["biased_found"] = audit_style(
            names["neutral"], scorer=names["scorer"], reference=names["pairs"]
        ).overall.reward
        assert names["balanced"] is balanced
        torch.set_num_threads(threads)
        yield names, printed
    assert os.getcwd() == folder


def tokens(line: str) -> list[str]:
    """Words and numbers of a line, without what draws tables."""
    return re.sub(r"[\u2500-\u257f]", " ", line).split()


def is_close(shown: str, printed: str) -> bool:
    if shown == printed:
        return True
    try:
        one, other = (float(text.replace(",", "").rstrip(".%")) for text in (shown, printed))
    except ValueError:
        return False
    return abs(one - other) < 1e-8 or one == pytest.approx(other, rel=1e-3, abs=1.5e-3)


def test_the_page_shows_what_is_printed(ran):
    _, printed = ran
    inside = r"((?:(?!```).*\n)+)```"
    shown = re.findall(rf"^```python\n{inside}\n\n```text\n{inside}$", PAGE, flags=re.MULTILINE)
    assert len(shown) == 6
    for block, text in shown:
        found = [tokens(line) for line in printed[block].splitlines()]
        for line in map(tokens, text.splitlines()):
            if line not in ([], ["..."]):
                assert any(len(one) == len(line) and all(map(is_close, line, one)) for one in found), (line, found)


def test_balancing_does_what_the_page_says(ran):
    names, _ = ran
    pairs, balanced = names["pairs"], names["balanced"]
    assert balanced.remove_columns("weight").to_dict() == pairs.to_dict()
    style = read_pair_style(balanced)
    assert np.abs(style.weight @ style.difference).max() / len(style) < 1e-8
    # "Where the bound does not allow balance": more effective pairs than without it.
    gentler = np.array(names["gentler"]["weight"])
    assert gentler.max() == pytest.approx(3.0)
    assert gentler.sum() ** 2 / (gentler**2).sum() > 1.5 * names["cost"].effective_size
    assert names["each"]["weight"][:] == pytest.approx(balanced["weight"][:])  # of one source
    assert len(names["drawn"]) == len(pairs) and "weight" not in names["drawn"].column_names
    assert any(name.endswith("#2") for name in names["drawn"]["pair_id"])


def test_the_formulas_of_the_page(ran):
    names, _ = ran
    pairs, weight = names["pairs"], names["weight"]
    style = read_pair_style(pairs)
    # log w is linear in f: the solution has the form of the page.
    columns = np.column_stack([style.difference, np.ones(len(style))])
    fitted = columns @ np.linalg.lstsq(columns, np.log(weight), rcond=None)[0]
    np.testing.assert_allclose(fitted, np.log(weight), atol=1e-6)
    assert weight.mean() == pytest.approx(1.0)
    assert names["cost"].effective_size == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    # The gradient of the probe's objective is 0 at its coefficients.
    scale = np.sqrt((style.difference**2).mean(0))
    scaled = style.difference / np.where(scale > 0, scale, 1.0)
    beta = fit_probe(style) * np.where(scale > 0, scale, 1.0)
    gradient = beta - (scaled / (1 + np.exp(scaled @ beta))[:, None]).sum(0)
    assert np.abs(gradient).max() < 1e-3
    assert f"{len(STYLE_FEATURES)} numbers" in PAGE


def test_training_with_the_weights_and_measuring_the_model(ran):
    names, _ = ran
    assert names["balanced_trainer"].state.global_step == 12
    # "A gap of 1.0 after a dozen steps"; without a shortcut, the model has learned nothing by then.
    assert names["biased_found"].accuracy_gap > 0.95 and names["biased_found"].follows > 0.8
    assert names["found"].accuracy_gap < names["biased_found"].accuracy_gap - 0.2
    # The scorer's rewards are the model's, row by row.
    rows = names["neutral"].select(range(3))
    batch = names["trainer"].data_collator([rows[index] for index in range(3)])
    batch.pop("pairs")
    with torch.no_grad():
        rewards = names["trainer"].model.eval()(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose(np.concatenate(names["scorer"](rows)), rewards, atol=1e-5)
    written = load_dataset("parquet", data_files="balanced/train.parquet", split="train", cache_dir="cache")
    assert written["weight"][:] == names["balanced"]["weight"][:]
    numbers = {name for row in rows_of("| number |") for name in re.findall(r"`(\w+)`", row[0])}
    assert numbers <= {one.name for one in fields(RewardStyle)} and "accuracy_gap" in numbers


def test_pairs_are_built_as_the_page_says(ran):
    names, _ = ran
    made, report, plan = names["made"], names["report"], names["plan"]
    assert len(made) > NUM_PROMPTS and report.prompts == NUM_PROMPTS
    wrong = np.array([wrong_on_disk(row, names["truth"]) for row in leave_images_encoded(made)])
    assert (wrong[:, 0] < wrong[:, 1]).mean() >= 0.97
    assert {"given", "generated"} <= set(made["chosen_origin"])
    # Planning asked nothing, and nothing went beyond the plan.
    assert names["asked_before"] == 0 and names["asked"] == sum(one["calls"] for one in report.usage.values())
    assert names["asked"] <= plan.total.calls
    assert 3 * report.usage["judge"]["cost"] < plan.total.cost  # "several times lower"
    bias = next(one for one in report.position_bias if one.num_candidates == 4)
    np.testing.assert_allclose(bias.effects, BIAS, atol=0.1)


def test_what_was_asked_is_not_asked_again(ran):
    names, _ = ran
    (same, asked_same), (changed, asked_changed), (_, asked_more) = names["again"].values()
    assert asked_same == asked_changed == names["asked"]
    assert same["pair_id"][:] == names["made"]["pair_id"][:]
    assert 0 < len(changed) <= 20 and min(changed["listwise_gap"]) >= 2.0 - 1e-9
    # One order more: a call for each prompt, and one for some of those that got company.
    assert NUM_PROMPTS * 0.8 <= asked_more - names["asked"] <= 2 * NUM_PROMPTS


def wrong_on_disk(row: dict, truth: dict) -> tuple[int, int]:
    given = {**row, "images": [{"bytes": Path(row["images"][0]["path"]).read_bytes()}]}
    return wrong_digits(given, truth)


def rows_of(head: str) -> list[list[str]]:
    """Cells of a table of the page, without its head."""
    lines = iter(PAGE[PAGE.index(head) :].splitlines()[2:])
    table = []
    for line in lines:
        if not line.startswith("|"):
            return table
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return table


def test_the_tables_of_columns_are_true():
    inside, outside = (
        {name for row in table for name in re.findall(r"`(\w+)`", row[0])}
        for table in (rows_of("| column | meaning |"), rows_of("| column | meaning |\n|---|---|\n| `generator`"))
    )
    assert outside == set(DISTILLED_FEATURES) - set(FEATURES)
    origins = next(row[1] for row in rows_of("| column | meaning |\n|---|---|\n| `generator`") if "origin" in row[0])
    assert set(re.findall(r"`(\w+)`", origins)) == set(Origin.__args__)
    (line,) = blocks("json")
    assert set(json.loads(line)) < inside
    assert inside - set(json.loads(line)) == {"prompt", "group_id", "source_id"}


def test_the_example_line_is_read(tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 32), "white").save(tmp_path / "strip.png")
    (tmp_path / "prompts.jsonl").write_text(blocks("json")[0])
    rows = load_dataset("json", data_files=str(tmp_path / "prompts.jsonl"), split="train", cache_dir=str(tmp_path))
    question = read_question(rows[0], 0, source="s", image_options=ImageOptions(image_root=str(tmp_path)))
    (pool,) = read_pools(question, rows[0]["candidates"])
    assert (question.reference, len(question.images)) == ("It is 4711.", 1)
    assert (pool.generator, [one.text for one in pool.candidates]) == ("model-a", ["It is 4711.", "I read 4177."])


def test_the_table_of_ways_is_the_committed_one():
    committed = json.loads((ROOT / "benchmarks/results/style_bias.json").read_text())["sets"]
    found = {row[0]: row[1:] for row in rows_of("| digits |")}
    assert set(found) == set(committed)
    for name, (pairs, effective, auc, interval) in found.items():
        one = committed[name]
        assert [pairs, effective] == [f"{one['pairs']:,}", f"{one['effective']:,.0f}"]
        assert auc == f"{one['auc']:.3f}" and interval == "{:.3f} to {:.3f}".format(*one["interval"])


def test_the_figures_of_the_blind_audit_are_the_committed_ones():
    committed = json.loads((ROOT / "benchmarks/results/blind_audit.json").read_text())
    found = [cell["coverage"] for cell in committed["coverage"]]
    assert f"in {np.mean(found):.1%} of {committed['sets'] * len(found):,} simulated sets".replace("%", " %") in PAGE
    assert f"in {100 * min(found):.1f} to {max(found):.1%} of the {committed['sets']} of a kind" in PAGE.replace(
        " %", "%"
    )
    planted = [one for one in committed["digits"] if one["strength"] > 0.5]
    assert max(abs(one["accuracy"] - one["planted"]) for one in planted) < 0.01
    assert all(run["seconds"] < 90 and run["memory"] < 2**31 for run in committed["runs"])


def test_every_argument_that_the_page_names_exists():
    named = {
        audit_style: ("by", "min_pairs", "features", "scorer", "reference"),
        balance_style: ("max_weight", "by", "method", "features", "one_sided"),
        match_style: ("caliper",),
        distill: ("num_shuffles", "num_candidates", "min_spread", "min_gap", "num_bins", "pairs_per_prompt"),
    }
    for function, names in named.items():
        for name in names:
            assert re.search(rf"`[^`]*\b{name}\b[^`]*`", PAGE) and name in inspect.signature(function).parameters, name
    assert f"`caliper` ({inspect.signature(match_style).parameters['caliper'].default})" in PAGE
    assert f"Fewer than {inspect.signature(audit_style).parameters['min_pairs'].default} pairs" in PAGE


def recipe(path: Path):
    if path.stem not in sys.modules:
        spec = spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def test_every_command_of_the_page_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[:1] == ["python"] or words[:2] == ["accelerate", "launch"]
        place = next(index for index, word in enumerate(words) if word.endswith(".py"))
        flags = words[place + 1 :]
        if "train_reward_model" in words[place]:
            flags += ["--use_cpu", "true", "--bf16", "false"]  # no GPU here
        parsed, *_ = (
            recipe(ROOT / words[place]).make_parser().parse_args_and_config(flags, fail_with_unknown_args=True)
        )
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        for flag in ("--dataset_name", "--max_prompts", "--dry_run"):
            if flag in given:
                assert str(getattr(parsed, flag[2:])).lower() == given[flag]
    config = yaml.safe_load((ROOT / "recipes/configs/construct_preferences.yaml").read_text())
    assert f"--dataset_name {config['output_dir']}/pairs" in PAGE
    keys = {"max_calls": 1, "budget_tokens": 1, "max_cost": 1.0, "max_concurrency": 1, "max_retries": 1}
    endpoint, _ = read_endpoint("judge", {**config["judge"], **keys})
    assert isinstance(endpoint, Endpoint) and all(f"`{key}`" in PAGE for key in keys)
