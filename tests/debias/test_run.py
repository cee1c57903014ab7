"""Building pairs with a judge that knows the truth, through a real HTTP server: order, strength, counts."""

import io
import json
import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from scipy.stats import spearmanr

from trl_dt2it.data import check_row, write_parquet
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.debias import distill, plan_distill
from trl_dt2it.judge import DEFAULT_RUBRIC, Budget, Endpoint, JudgeClient
from trl_dt2it.judge.rubric import fenced_texts

from ..judge.server import Fault, JudgeServer
from .digit_judge import BIAS, DigitJudge, digit_prompts, image_hash, wrong_digits


def run(rows, answer, folder, *, with_generator=True, budget=None, temperature=1.0, **options):
    """Pairs and report, and all requests that the server got."""
    with JudgeServer(answer) as server:
        judge = JudgeClient(
            Endpoint(server.base_url, "judge", input_price=1.0, output_price=2.0),
            folder / "judge.jsonl",
            budget=budget,
            max_retries=0,
            max_reasks=0,
            show_progress=False,
        )
        writer = Endpoint(server.base_url, "writer", temperature=temperature)
        generator = JudgeClient(writer, folder / "generator.jsonl", max_retries=0, show_progress=False)
        pairs, report = distill(
            rows, judge=judge, generator=generator if with_generator else None, show_progress=False, **options
        )
        return pairs, report, server.requests


@pytest.fixture(scope="module")
def digits():
    return digit_prompts(60, seed=3, alike=0.15)


@pytest.fixture(scope="module")
def distilled(digits, tmp_path_factory):
    rows, truth = digits
    folder = tmp_path_factory.mktemp("digits")
    return run(rows, DigitJudge(truth, seed=3), folder, num_shuffles=4, pairs_per_prompt=3)


def test_pairs_are_in_the_right_order_and_as_strong_as_they_are(digits, distilled):
    pairs, report, _ = distilled
    wrong = np.array([wrong_digits(row, digits[1]) for row in leave_images_encoded(pairs)])
    gaps = wrong[:, 1] - wrong[:, 0]
    assert len(pairs) >= 120
    assert (gaps > 0).mean() >= 0.97
    assert spearmanr(pairs["strength"][:], gaps).statistic >= 0.9
    bias = next(one for one in report.position_bias if one.num_candidates == 4)
    np.testing.assert_allclose(bias.effects, BIAS, atol=0.03)
    assert bias.noise_rate == pytest.approx(0.15, abs=0.04)


def test_pairs_are_canonical_and_of_one_style(digits, distilled):
    pairs, _, _ = distilled
    for row in leave_images_encoded(pairs):
        check_row(row)
        assert row["source"] == "distilled" and row["strength"] >= 1.0
        texts = [row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
        is_verbose = ["careful" in text or "account" in text for text in texts]
        assert is_verbose == [row["generator"] == "verbose-model"] * 2
    assert len(set(pairs["pair_id"][:])) == len(pairs)
    assert max(Counter(pairs["group_id"][:]).values()) <= 3


def test_every_score_is_in_the_provenance(distilled):
    pairs, report, _ = distilled
    effects = {one.num_candidates: one.effects for one in report.position_bias}
    for row in pairs.remove_columns("images"):
        assert row["strength"] == (row["listwise_gap"] + row["pointwise_gap"]) / 2
        found = json.loads(row["provenance"])
        chosen, rejected = found["chosen"], found["rejected"]
        assert chosen["listwise"] - rejected["listwise"] == pytest.approx(row["listwise_gap"])
        assert chosen["pointwise"] - rejected["pointwise"] == pytest.approx(row["pointwise_gap"])
        assert found["judge"] == "judge" and found["pairs_of_prompt"]["agreed"] >= 1
        for side in (chosen, rejected):
            assert DEFAULT_RUBRIC.total(side["criteria"]) == side["pointwise"]
            assert len(side["lists"]) in (2, 4)
            worth = effects[found["list_length"]]
            for one in side["lists"]:
                assert one["corrected"] == pytest.approx(one["score"] - worth[one["position"]])
            assert min(one["corrected"] for one in side["lists"]) - 0.01 <= side["listwise"]
            assert side["listwise"] <= max(one["corrected"] for one in side["lists"]) + 0.01


def test_nothing_is_lost(distilled):
    pairs, report, requests = distilled
    assert report.prompts == report.pools == 60 == report.outcomes.total()
    assert set(report.outcomes) <= {"paired", "not_drawn", "no_order", "opposed", "all_equal"}
    assert report.outcomes["paired"] == len(set(pairs["group_id"][:]))
    drawn, agreed = (sum(map(sum, one.values())) for one in (report.pairs_by_bin, report.agreed_by_bin))
    assert drawn == report.pairs == len(pairs) and agreed == report.agreement.agreed
    assert agreed - drawn == report.not_drawn.total()
    calls = sum(statuses.total() for statuses in report.calls.values())
    assert calls == len(requests) == sum(one["calls"] for one in report.usage.values())
    assert report.candidates["judged"] + report.candidates["equal"] == 4 * 60 + report.diversity.total()
    assert set(report.pairs_by_bin) == {"plain-model", "verbose-model"}


def test_report_as_json_and_on_screen(distilled):
    from rich.console import Console

    pairs, report, _ = distilled
    found = json.loads(report.to_json())
    assert found["pairs"] == len(pairs) and found["outcomes"]["paired"] == report.outcomes["paired"]
    assert found["agreement"]["rate"] == report.agreement.rate
    four = next(one for one in found["position_bias"] if one["num_candidates"] == 4)
    assert four["intervals"][0][0] < four["effects"][0] < four["intervals"][0][1]
    assert found["usage"]["judge"]["cost"] > 0
    console = Console(record=True, width=120, file=io.StringIO())
    report.show(console)
    text = console.export_text()
    assert f"{len(pairs)} pairs from 60 prompts" in text and "Position bias in lists of 4" in text
    assert f"{report.agreement.rate:.1%} agree" in text and "+0.600" in text


def test_a_second_run_asks_nothing_and_no_order_matters(digits, tmp_path):
    rows, truth = digits[0].select(range(12)), digits[1]
    judge = DigitJudge(truth, seed=3)
    with JudgeServer(judge) as server:
        found = []
        for shown, at_once in ((rows, 32), (rows, 32), (rows.select(range(11, -1, -1)), 5)):
            clients = {
                name: JudgeClient(
                    Endpoint(server.base_url, name, temperature=1.0), tmp_path / f"{name}.jsonl", show_progress=False
                )
                for name in ("judge", "generator")
            }
            pairs, _ = distill(shown, **clients, prompts_at_once=at_once, show_progress=False)
            found.append((leave_images_encoded(pairs).to_list(), len(server.requests)))
    assert found[0] == found[1]
    assert found[2][1] == found[0][1]
    without_fits = [
        sorted((row["pair_id"], row["generator"], row["images"][0]["bytes"]) for row in rows) for rows, _ in found
    ]
    assert without_fits[2] == without_fits[0]


def alike_rows(digits, texts, **columns):
    """A prompt whose candidates are all right, or all wrong."""
    row = leave_images_encoded(digits[0])[0]
    truth = digits[1][image_hash_of(row)]
    wrong = "".join(str((int(digit) + 5) % 10) for digit in truth)
    candidates = [{"text": text.format(right=truth, wrong=wrong), "generator": "m"} for text in texts]
    return Dataset.from_list([{**row, "candidates": candidates, **columns}], features=digits[0].features), truth


def image_hash_of(row):
    import hashlib

    return hashlib.sha256(row["images"][0]["bytes"]).hexdigest()


@pytest.mark.parametrize(
    ("texts", "origins"),
    [
        (["It is {right}.", "I read {right}."], ("given", "corrupted")),
        (["It is {wrong}.", "I read {wrong}."], ("rewritten", "given")),
        (["It is {right}."], ("given", "corrupted")),
    ],
)
def test_candidates_that_are_alike_get_company(digits, tmp_path, texts, origins):
    rows, truth = alike_rows(digits, texts)
    pairs, report, requests = run(rows, DigitJudge(digits[1], noise=0.0), tmp_path)
    added = "corrupted" if "corrupted" in origins else "rewritten"
    assert report.diversity == {added: 1}
    assert {(row["chosen_origin"], row["rejected_origin"]) for row in pairs} == {origins}
    for row in pairs:
        assert truth in row["chosen"][0]["content"][0]["text"]
        assert truth not in row["rejected"][0]["content"][0]["text"]
    # The new one is judged like the others: alone once, and in as many lists.
    with_three = [r for r in requests if len(fenced_texts(r.body["messages"])) == 2 + len(texts)]
    assert len([r for r in with_three if "scores" in json.dumps(r.body) and r.body["model"] == "judge"]) >= 2


@pytest.mark.parametrize(("reason", "options"), [("no_generator", {"with_generator": False}), ("no_reference", {})])
def test_company_that_cannot_be_made_is_counted(digits, tmp_path, reason, options):
    rows, _ = alike_rows(digits, ["It is {wrong}.", "I read {wrong}."], reference=None if options == {} else "x")
    pairs, report, _ = run(rows, DigitJudge(digits[1], noise=0.0), tmp_path, **options)
    assert len(pairs) == 0 and report.diversity == {reason: 1} and report.outcomes == {"no_order": 1}


def test_company_can_be_switched_off(digits, tmp_path):
    rows, _ = alike_rows(digits, ["It is {right}.", "I read {right}."])
    _, report, requests = run(rows, DigitJudge(digits[1], noise=0.0), tmp_path, min_spread=0.0)
    assert report.diversity == {} and {r.body["model"] for r in requests} == {"judge"}


def test_candidates_are_written_where_there_are_none(digits, tmp_path):
    rows, truth = digits
    judge = DigitJudge(truth, noise=0.0)
    asked = Counter()

    def answer(body):
        if body["model"] == "judge" or "<<<" in json.dumps(body["messages"]):
            return judge(body)
        user = body["messages"][-1]["content"]
        assert [part["type"] for part in user] == ["image_url", "text"]
        digits_of_image = truth[image_hash(user[0])]
        asked[digits_of_image] += 1
        count = asked[digits_of_image] % 4
        if count == 3:
            return f"  It is\n{digits_of_image}. "  # the same again
        return f"It is {digits_of_image[count:]}{'0123'[:count]}."

    pairs, report, requests = run(rows.select(range(6)).remove_columns("candidates"), answer, tmp_path)
    written = [r.body for r in requests if r.body["model"] == "writer" and "<<<" not in json.dumps(r.body)]
    assert len(written) == 24 and {body["temperature"] for body in written} == {1.0}
    assert report.calls["generation"] == {"ok": 24} and report.candidates["equal"] == 6
    assert set(pairs["generator"][:]) == {"writer"} and "generated" in set(pairs["chosen_origin"][:])


def test_replies_that_are_no_verdict_are_counted_and_cost_only_what_they_are_about(tmp_path):
    rows, truth = digit_prompts(8, seed=5)
    judge = DigitJudge(truth, noise=0.0)
    first, second, third = (image_hash_of(row) for row in leave_images_encoded(rows.select(range(3))))

    def answer(body):
        reply, user = judge(body), body["messages"][-1]["content"]
        is_list = isinstance(json.loads(reply)["scores"], list)
        if image_hash(user[0]) == first and is_list:
            return "I would rather not say."
        if image_hash(user[0]) == second and not is_list:
            return Fault(refusal="no")
        if image_hash(user[0]) == third and is_list:
            texts = fenced_texts(body["messages"])[1:]
            return reply if texts[0] != sorted(texts)[0] else Fault(status=500)
        return reply

    _, report, _ = run(rows, answer, tmp_path, with_generator=False, num_shuffles=4, min_spread=0.0)
    assert report.outcomes["listwise: malformed"] == 1 and report.calls["listwise"]["malformed"] == 4
    assert report.outcomes["pointwise: refused"] == 1 and report.candidates["pointwise: refused"] == 4
    # One list of four is missing; the others do.
    assert report.calls["listwise"]["transport"] == 1
    assert report.outcomes.total() == 8 and report.outcomes["paired"] + report.outcomes["not_drawn"] == 6
    assert report.examples["listwise: malformed"] == "row 0"


def test_over_budget_is_a_status_and_the_rest_follows(digits, tmp_path):
    rows, truth = digits[0].select(range(6)), digits[1]
    judge = DigitJudge(truth, noise=0.0)
    with JudgeServer(judge) as server:

        def go(budget, folder):
            endpoint = Endpoint(server.base_url, "judge")
            client = JudgeClient(endpoint, tmp_path / folder, budget=Budget(max_calls=budget), show_progress=False)
            return distill(rows, judge=client, min_spread=0.0, show_progress=False)

        _, report = go(20, "a.jsonl")
        assert len(server.requests) == 20
        assert sum(statuses["over_budget"] for statuses in report.calls.values()) == 6 * 7 - 20
        assert any("over_budget" in outcome for outcome in report.outcomes) and report.outcomes.total() == 6
        resumed, _ = go(42, "a.jsonl")
        assert len(server.requests) == 42
        whole, _ = go(42, "b.jsonl")
    assert leave_images_encoded(resumed).to_list() == leave_images_encoded(whole).to_list()


def test_rows_that_cannot_be_used_have_a_reason(digits, tmp_path):
    row = leave_images_encoded(digits[0])[0]
    rows = [
        row,
        row,
        {**row, "question": " "},
        {**row, "question": "<image> and <image>?"},
        {**row, "images": [{"bytes": b"no image", "path": None}]},
        {**row, "images": [{"bytes": None, "path": "nowhere.png"}]},
        {**row, "candidates": []},
        {**row, "candidates": [{"text": None, "generator": "m"}]},
        {**row, "question": "Another?", "candidates": [{"text": " ", "generator": "m"}]},
    ]
    data = Dataset.from_list(rows, features=digits[0].features)
    _, report, _ = run(data, DigitJudge(digits[1]), tmp_path, with_generator=False)
    assert report.outcomes == {
        **{"paired": 1, "duplicate_prompt": 1, "missing_column": 1, "placeholder_count": 1, "image_corrupt": 1},
        **{"image_missing": 1, "no_candidates": 2, "not_conversational": 1},
    }
    assert report.prompts == report.pools == 9
    assert report.examples["image_missing"].startswith("row 5: ")


def test_generators_are_never_mixed(digits, tmp_path):
    row = leave_images_encoded(digits[0])[0]
    truth = digits[1][image_hash_of(row)]
    wrong = "".join(str((int(digit) + 5) % 10) for digit in truth)
    candidates = [
        {"text": f"{words} {read}", "generator": name}
        for name, words in (("a", "Well:"), ("b", "Clearly"))
        for read in (truth, wrong)
    ]
    data = Dataset.from_list([{**row, "candidates": candidates}], features=digits[0].features)
    pairs, report, _ = run(data, DigitJudge(digits[1], noise=0.0), tmp_path)
    assert report.prompts == 1 and report.pools == 2 and sorted(pairs["generator"][:]) == ["a", "b"]
    for row in pairs:
        texts = {row[side][0]["content"][0]["text"].split()[0] for side in ("chosen", "rejected")}
        assert texts == {"Well:" if row["generator"] == "a" else "Clearly"}


def test_conversations_paths_and_names(digits, tmp_path):
    row = leave_images_encoded(digits[0])[0]
    (tmp_path / "strip.png").write_bytes(row["images"][0]["bytes"])
    truth = digits[1][image_hash_of(row)]
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look at this."},
        {"role": "assistant", "content": "I see it."},
        {"role": "user", "content": "What is it?"},
    ]
    candidates = [{"text": f"It is {read}.", "generator": "m"} for read in (truth, "0000" if truth != "0000" else "1")]
    given = {"prompt": prompt, "images": ["strip.png"], "candidates": candidates, "group_id": "g", "source_id": "s7"}
    features = Features(
        {
            "prompt": List({"role": Value("string"), "content": Value("string")}),
            "images": List(Value("string")),
            "candidates": List({"text": Value("string"), "generator": Value("string")}),
            "group_id": Value("string"),
            "source_id": Value("string"),
        }
    )
    from trl_dt2it.data import ImageOptions

    options = ImageOptions(image_root=str(tmp_path))
    data = Dataset.from_list([given], features=features)
    pairs, _, requests = run(data, DigitJudge(digits[1], noise=0.0), tmp_path, image_options=options)
    asked = fenced_texts(requests[0].body["messages"])[0]
    assert re.sub(r"\s+", " ", asked).replace("\\", "") == (
        "[system] Be brief. [user] Look at this. [assistant] I see it. [user] What is it?"
    )
    write_parquet(pairs, tmp_path / "pairs.parquet", image_options=options)  # embeds the image
    found = Dataset.from_parquet(str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path / "cache"))
    one = leave_images_encoded(found)[0]
    assert one["images"][0]["bytes"] == row["images"][0]["bytes"]
    assert (one["group_id"], one["source_id"]) == ("g", "s7")
    assert [block["type"] for block in one["prompt"][1]["content"]] == ["image", "text"]
    check_row(one)


def test_instructions_to_the_generator_are_in_the_language_of_the_question(digits, tmp_path):
    rows, _ = alike_rows(digits, ["It is {right}.", "I read {right}."], question="这里写的是什么？")
    _, _, requests = run(rows, DigitJudge(digits[1], noise=0.0), tmp_path)
    written = [r.body for r in requests if r.body["model"] == "writer"]
    assert len(written) == 1 and written[0]["messages"][0]["content"].startswith("下面给出一个问题")


def test_a_plan_is_what_is_asked_at_most(digits, tmp_path):
    rows, truth = digits[0].select(range(5)), digits[1]
    _, report, requests = run(rows, DigitJudge(truth), tmp_path, min_spread=0.0, num_shuffles=3)
    judge = Endpoint("http://localhost/v1", "judge", input_price=1.0, output_price=2.0)
    plan = plan_distill(rows, judge=judge, num_shuffles=3)
    assert plan.total.calls == len(requests) == 5 * (3 + 4)
    assert {stage: one.calls for stage, one in plan.spending.items()} == {"listwise": 15, "pointwise": 20}
    usage = report.usage["judge"]
    assert usage["cost"] < plan.total.cost and usage["input_tokens"] + usage["output_tokens"] < plan.total.tokens

    writer = Endpoint("http://localhost/v1", "writer", temperature=1.0)
    plan = plan_distill(rows.remove_columns("candidates"), judge=judge, generator=writer, num_shuffles=3)
    assert {stage: one.calls for stage, one in plan.spending.items()} == {
        **{"generation": 20, "listwise": 15, "pointwise": 20},
        **{"diversity": 5, "listwise again": 15, "pointwise again": 5},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shuffles": 0}, "`num_shuffles` and `num_bins` at least 1"),
        ({"min_gap": 0.0}, "`min_gap` must be above 0"),
        ({"min_spread": 10.0}, "`min_spread` between 0"),
        ({"pairs_per_prompt": 0}, "`pairs_per_prompt` is 0; it must be at least 1, or None for no limit"),
        ({"prompts_at_once": 0}, "`prompts_at_once` is 0; it must be at least 1[.]"),
    ],
)
def test_arguments_out_of_range(digits, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(digits[0], DigitJudge(digits[1]), tmp_path, **options)


def test_what_is_missing_is_said_before_any_call(digits, tmp_path):
    bare = digits[0].remove_columns("candidates")
    with pytest.raises(ValueError, match="no `candidates`, and there is no `generator`"):
        run(bare, DigitJudge(digits[1]), tmp_path, with_generator=False)
    with pytest.raises(ValueError, match="temperature is 0"):
        run(bare, DigitJudge(digits[1]), tmp_path, temperature=0.0)
    with pytest.raises(ValueError, match="neither `prompt` nor `question`"):
        run(bare.remove_columns("question"), DigitJudge(digits[1]), tmp_path)
