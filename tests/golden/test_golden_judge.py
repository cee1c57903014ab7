"""Golden judges: the keys under which replies are kept, the lines of the store, and what judges are asked."""

import json
from dataclasses import asdict, fields

from tests.judge.server import JudgeServer
from trl_dt2it.curation.judging import pair_requests, read_judging
from trl_dt2it.data import ImageOptions
from trl_dt2it.debias.distillation.candidates import read_question
from trl_dt2it.judge import (
    DEFAULT_RUBRIC,
    Criterion,
    Endpoint,
    JudgeClient,
    JudgeRequest,
    ListwiseVerdict,
    PairwiseVerdict,
    PointwiseVerdict,
    Rubric,
    both_orders,
    listwise_messages,
    pairwise_messages,
    pointwise_messages,
)
from trl_dt2it.judge.client import request_key

from .golden import check
from .pairs_of_each_kind import PNG, datasets
from .tables import files


ENDPOINT = Endpoint("http://127.0.0.1:9/v1", "judge")
OTHER = Endpoint("https://example.org/v1/", "judge", temperature=0.5, max_tokens=10, extra_body={"top_k": 1})
RUBRIC = Rubric((Criterion("clear", 1.0, {"en": "Clear.", "zh": "清楚。"}),))


def requests() -> dict[str, JudgeRequest]:
    asked = {
        "listwise": (listwise_messages, (["A", "B"],), ListwiseVerdict),
        "pairwise": (pairwise_messages, ("A", "B"), PairwiseVerdict),
        "pointwise": (pointwise_messages, ("A",), PointwiseVerdict),
    }
    found = {}
    for kind, (messages, answers, verdict) in asked.items():
        more = {"num_scores": 2} if kind == "listwise" else {}
        for name, options in (("en", {}), ("zh", {"language": "zh"}), ("rubric", {"rubric": RUBRIC})):
            text = messages("Which square?", [PNG[0]], *answers, **options)
            found[f"{kind}, {name}"] = JudgeRequest(text, verdict, rubric=options.get("rubric"), **more)
    found["free text"] = JudgeRequest([{"role": "user", "content": "Which?"}], sample=3)
    for number, request in enumerate(both_orders("Which?", [PNG[0]], "A", "B")):
        found[f"both orders, {number}"] = request
    return found


def test_keys_of_questions():
    found = {name: [request_key(one, request) for one in (ENDPOINT, OTHER)] for name, request in requests().items()}
    messages = {name: request.messages for name, request in requests().items() if name.endswith(("en", "rubric"))}
    check("judge_keys", {"keys": found, "rubrics": [DEFAULT_RUBRIC.digest(), RUBRIC.digest()], "messages": messages})


def test_keys_of_questions_about_pairs():
    found = {}
    for kind in ("one image", "two images", "reformulated", "reformulated in both orders", "string messages"):
        for number, row in enumerate(datasets()[kind]):
            for swap in ("auto", "answers", "images"):
                asked, sign = pair_requests(_encoded(row), number, swap, None, ImageOptions())
                found[f"{kind}, {number}, {swap}"] = [sign, *(request_key(ENDPOINT, one) for one in asked)]
    question = read_question(
        {"question": "<image> Which?", "images": [PNG[0]], "reference": " Red. "},
        3,
        source="asked",
        image_options=ImageOptions(),
    )
    about = {name: value for name, value in asdict(question).items() if name != "images"}
    about["prompt"] = about.pop("messages")
    check("judged_pairs", {"keys": found, "question": about})


def _encoded(row: dict) -> dict:
    """Images as their files, which go to the judge as they are."""
    images = [PNG[index] for index in range(len(row.get("images") or []))]
    return {**row, "images": images} if images else row


def test_lines_of_the_store(tmp_path):
    replies = {"Which?": "Red.", "Nothing?": ""}
    with JudgeServer(lambda body: replies[body["messages"][0]["content"]]) as server:
        client = JudgeClient(
            Endpoint(server.base_url, "judge", input_price=1.0), tmp_path / "judge.jsonl", max_reasks=1
        )
        given = client.ask([JudgeRequest([{"role": "user", "content": text}]) for text in replies])
        keys = [request_key(client.endpoint, JudgeRequest([{"role": "user", "content": text}])) for text in replies]
        address = server.base_url.removeprefix("http://")
    text = (tmp_path / "judge.jsonl").read_text().replace(address, "HOST:PORT")
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["key"] for line in lines} == set(keys)
    for line in lines:
        line["key"] = keys.index(line["key"])
        assert line.pop("call") and line.pop("time")
        if line.get("error"):
            line["error"] = "a sentence"
    lines.sort(key=lambda line: (line["key"], line["attempt"], line["event"] != "sent"))
    statuses = [[reply.status, reply.is_cached, *(one.name for one in fields(reply))] for reply in given]
    check("judge_store", {"lines": lines, "replies": statuses, "files": files(tmp_path)})


def test_judges_of_a_configuration(tmp_path):
    given = {"model": "judge", "base_url": "http://127.0.0.1:9/v1", "max_tokens": 9, "extra_body": {"top_k": 1}}
    judging = read_judging({**given, "max_calls": 5, "budget_tokens": 6, "max_cost": 7.0, "votes": "majority"})
    stores = [client.store.path.name for client in judging.clients(tmp_path)]
    check("judging", {"settings": judging.settings(), "stores": stores, "options": list(judging.client_kwargs[0])})
