"""What replies that are no answer do to building pairs: cut ones, thoughts, questions that nobody has answered yet."""

import json
import re
from collections import Counter

import pytest
from datasets import Dataset

from trl_dt2it.debias import distill
from trl_dt2it.judge import DEFAULT_RUBRIC, Budget, Endpoint, JudgeClient, JudgeError
from trl_dt2it.judge.rubric import fenced_texts

from ..judge.server import Fault, JudgeServer, texts_of


NAMES = [criterion.name for criterion in DEFAULT_RUBRIC.criteria]


class Cups:
    """A generator that goes through a list of answers for each question, and a judge that scores by the cups."""

    def __init__(self, written: list, judged=lambda body, answers: None) -> None:
        self.written, self.judged = written, judged
        self.given: Counter[str] = Counter()

    def __call__(self, body: dict) -> str | Fault:
        if body["model"] == "writer":
            question = texts_of(body)
            self.given[question] += 1
            return self.written[(self.given[question] - 1) % len(self.written)]
        answers = [text for text in fenced_texts(body["messages"]) if text.startswith("There are")]
        if (fault := self.judged(body, answers)) is not None:
            return fault
        scores = [int(re.search(r"\d", text)[0]) for text in answers]
        is_list = "array" in json.dumps(body["response_format"])
        return json.dumps({"scores": scores if is_list else dict.fromkeys(NAMES, scores[0])})


def go(server: JudgeServer, answer, folder, rows=None, *, budget=None, **options):
    """Pairs, report and requests."""
    rows = rows or [{"question": f"How many cups are on table {number}?"} for number in range(2)]
    server.answer, before = answer, len(server.requests)
    judge = JudgeClient(Endpoint(server.base_url, "judge"), folder / "judge.jsonl", max_retries=0, show_progress=False)
    generator = JudgeClient(
        Endpoint(server.base_url, "writer", temperature=1.0),
        folder / "generator.jsonl",
        budget=budget,
        max_concurrency=1,
        max_retries=0,
        max_reasks=0,
        show_progress=False,
    )
    options = {"num_candidates": 4, "num_shuffles": 2, "min_spread": 0.0, "show_progress": False, **options}
    pairs, report = distill(Dataset.from_list(rows), judge=judge, generator=generator, **options)
    return pairs, report, [request.body for request in server.requests[before:]]


@pytest.fixture
def server():
    with JudgeServer(lambda body: "") as server:
        yield server


def sides(pairs: Dataset) -> set[str]:
    return {row[side][0]["content"][0]["text"] for row in pairs for side in ("chosen", "rejected")}


def test_candidates_come_without_thoughts_and_what_is_cut_is_none(server, tmp_path):
    written = [
        "<think>\nLet me count: There are 9.\n</think>\n\nThere are 1 cups.",
        "hm</think>There are 5 cups.",
        Fault(text="There are 8 cups on the", finish_reason="length"),
        "<think>\nThere are 7 cups, or",
    ]
    pairs, report, requests = go(server, Cups(written), tmp_path)
    assert sides(pairs) == {"There are 1 cups.", "There are 5 cups."} and len(pairs) == 2
    assert report.calls["generation"] == {"ok": 4, "cut": 2, "malformed": 2}
    assert report.candidates == {
        **{"generation: cut": 2, "generation: malformed": 2, "judged": 4},
        **{"equal": 0, "empty": 0},
    }
    assert not any(word in json.dumps(requests) for word in ("Let me count", "or</", "hm</"))
    assert report.unanswered == 0 and json.loads(report.to_json())["unanswered"] == 0


def test_with_one_whole_candidate_left_the_reason_is_the_cut(server, tmp_path):
    cut = Fault(text="There are 8 cups on the", finish_reason="length")
    pairs, report, _ = go(server, Cups(["There are 1 cups.", cut, cut, cut]), tmp_path / "a")
    assert (len(pairs), report.outcomes) == (0, {"generation: cut": 2})
    pairs, report, requests = go(server, Cups([cut]), tmp_path / "b")
    assert (len(pairs), report.outcomes, report.candidates["generation: cut"]) == (0, {"generation: cut": 2}, 8)
    assert {body["model"] for body in requests} == {"writer"}


def test_given_candidates_are_read_the_same_way(server, tmp_path):
    texts = [
        "<think>a</think>There are 2 cups.",
        "There are 6 cups.",
        "[THINK]There are 9",
        "b</think>\nThere are 2 cups.",
    ]
    row = {"question": "How many?", "candidates": [{"text": text, "generator": "m"} for text in texts]}
    pairs, report, _ = go(server, Cups([]), tmp_path, [row])
    assert [row[side][0]["content"][0]["text"] for row in pairs for side in ("chosen", "rejected")] == [
        "There are 6 cups.",
        "There are 2 cups.",
    ]
    assert report.candidates == {"judged": 2, "equal": 1, "empty": 0, "unfinished": 1}
    only = {"question": "How many?", "candidates": [{"text": "<think>There are 9", "generator": "m"}]}
    _, report, requests = go(server, Cups(["There are 3 cups."]), tmp_path / "b", [only])
    assert report.outcomes == {"no_candidates": 1} and requests == []


def test_prompts_wait_for_candidates_that_nobody_has_written_yet(server, tmp_path):
    written = [f"There are {number} cups." for number in (1, 3, 5, 8)]
    whole, _, _ = go(server, Cups(written), tmp_path / "whole")
    pairs, report, requests = go(server, Cups(written), tmp_path / "part", budget=Budget(max_calls=6))
    assert report.outcomes == {"paired": 1, "generation: over_budget": 1} and report.unanswered == 2
    assert sum(body["model"] == "judge" for body in requests) == 2 + 4  # for the prompt that is complete
    later, report, requests = go(server, Cups(written[2:]), tmp_path / "part")
    assert report.unanswered == 0 and later.to_list() == whole.to_list() and len(whole) == 4
    assert Counter(body["model"] for body in requests) == {"writer": 2, "judge": 2 + 4}


def test_without_an_answer_nothing_is_concluded(server, tmp_path):
    """Of these, 5 and 6 alone are alike: nobody has said yet what the others are worth."""
    texts = [f"There are {number} cups." for number in (1, 5, 6, 9)]
    row = {"question": "How many?", "reference": "5", "candidates": [{"text": one, "generator": "m"} for one in texts]}

    def judged(body, answers):
        return Fault(status=503) if len(answers) == 1 and answers[0][10] in "19" else None

    pairs, report, requests = go(server, Cups([], judged), tmp_path, [row], min_spread=3.0, min_gap=2.0)
    assert report.outcomes == {"pointwise: transport": 1} and report.unanswered == 2
    assert report.diversity == {"unanswered": 1} and {body["model"] for body in requests} == {"judge"}
    pairs, report, requests = go(server, Cups([]), tmp_path, [row], min_spread=3.0, min_gap=2.0, pairs_per_prompt=None)
    assert len(requests) == 2 and report.outcomes == {"paired": 1} and report.diversity == {}


@pytest.mark.parametrize("role", ["judge", "writer"])
def test_an_endpoint_that_is_gone_stops_it_in_the_first_chunk(server, tmp_path, role):
    cups, written = Cups([f"There are {number} cups." for number in (1, 3, 5, 8)]), []

    def answer(body):
        written.append(body["model"])
        return Fault(status=502) if body["model"] == role else cups(body)

    rows = [{"question": f"How many cups are on table {number}?"} for number in range(40)]
    with pytest.raises(
        JudgeError, match=rf"^{role} at .* does not answer \(.*status 502.*\); see that it runs"
    ) as caught:
        go(server, answer, tmp_path, rows, prompts_at_once=4)
    assert "\n" not in str(caught.value) and written.count(role) <= 16
    assert written.count("writer") <= 16
