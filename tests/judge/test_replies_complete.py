"""Only a whole reply counts: what is cut, thoughts that never end, parts, refusals, and endpoints that say nothing."""

import json
import logging
import re
from collections import Counter

import pytest

from trl_dt2it.judge import (
    Endpoint,
    JudgeClient,
    JudgeError,
    JudgeRequest,
    ListwiseVerdict,
    PairwiseVerdict,
    listwise_messages,
    pairwise_messages,
)
from trl_dt2it.judge.client import request_key
from trl_dt2it.judge.replies import read_answer

from .server import Fault, JudgeServer, texts_of


GOOD = '{"analysis": "ok", "scores": [8, 3]}'
DRAFT = 'A first draft: {"analysis": "draft", "scores": [3, 8]}. But wait, there are three cups, so'
THINKING = [{"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]}]
TEXT = None  # in place of a schema: free text is asked for


def request_of(number: int = 0, schema=ListwiseVerdict) -> JudgeRequest:
    messages = listwise_messages(f"Question {number}?", [], ["Three.", "Two."])
    return JudgeRequest(messages, schema, None if schema is TEXT else 2)


def client_of(server: JudgeServer, tmp_path, **kwargs) -> JudgeClient:
    endpoint = {name: kwargs.pop(name) for name in list(kwargs) if name in Endpoint.__dataclass_fields__}
    options = {"show_progress": False, "retry_delay": 0.001, "max_retries": 3, **kwargs}
    return JudgeClient(Endpoint(server.base_url, "judge", **endpoint), tmp_path / "store.jsonl", **options)


def number_of(body: dict) -> int:
    return int(re.search(r"Question (\d+)\?", texts_of(body))[1])


def replies_to(answers: list, tmp_path, schema=ListwiseVerdict, **kwargs):
    """For each answer the reply to a question that always gets it, the calls that were made for it, and those that a
    second run makes."""
    requests = [request_of(number, schema) for number in range(len(answers))]
    with JudgeServer(lambda body: answers[number_of(body)]) as server:
        replies = client_of(server, tmp_path, **kwargs).ask(requests)
        calls = Counter(number_of(one.body) for one in server.requests)
        again = client_of(server, tmp_path, **kwargs).ask(requests)
        later = Counter(number_of(one.body) for one in server.requests) - calls
    for reply, one in zip(replies, again, strict=True):
        assert (one.status, one.text, one.error) == (reply.status, reply.text, reply.error)
    return [(reply, calls[number], later[number]) for number, reply in enumerate(replies)]


def reply_to(answer, tmp_path, schema=ListwiseVerdict, **kwargs):
    """The same for one answer."""
    return replies_to([answer], tmp_path, schema, **kwargs)[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),  # the template has opened the thoughts
        ("</think>a</think>b", "b"),
        ("<think>\n\n</think>\n\nb", "b"),
        ("<THINKING>a</Thinking>b", "b"),
        ("<thought>a</thought>b", "b"),
        ("<seed:think>a</seed:think>b", "b"),
        ("<mm:think>says </think> and <think></mm:think>b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("◁think▷a◁/think▷b", "b"),
        ("<|open|>think<|sep|>a<|close|>think<|sep|><|open|>response<|sep|>b<|close|>response<|sep|>", "b"),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>", "b"),
        ("<|channel>thought\na<channel|>b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "b"),
        ("analysisWe count.assistantfinalb", "b"),
        ("<think>a</think>\n<answer>\nb\n</answer>", "b"),
        ("<think>a</think><think>c</think>b", "b"),
        ('<think>a</think>{"analysis": "it leaks </think>"}', '{"analysis": "it leaks </think>"}'),
        ('{"analysis": "it says <think> and stops"}', '{"analysis": "it says <think> and stops"}'),
        ("Put it between `<think>` and `</think>`.", "Put it between `<think>` and `</think>`."),
        (" An analysis of <b>cups</b>. ", " An analysis of <b>cups</b>. "),
        ("<think>a</think>", ""),
        ("a <think>b</think>", ""),
    ],
)
def test_an_answer_is_what_follows_the_thoughts(text, answer):
    assert read_answer(text) == (answer, None)
    assert read_answer(answer) == (answer, None)


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("<think>a", "<think>"),
        (f"<think>{DRAFT}", "<think>"),
        ("b <thinking> a", "<thinking>"),
        ("<think>a</think>b<think>c", "<think>"),
        ("<mm:think>a</think>b", "<mm:think>"),
        ("[THINK]a", "[THINK]"),
        ("◁think▷a", "◁think▷"),
        ("<seed:think>a", "<seed:think>"),
        ("<|channel|>analysis<|message|>a<|end|>", "<|channel|>analysis"),
        ("<|channel>thought\na", "<|channel>thought"),
        ("analysisWe count", "analysis"),
    ],
)
def test_thoughts_that_never_end_leave_no_answer(text, marker):
    assert read_answer(text) == ("", marker)


@pytest.mark.parametrize("schema", [ListwiseVerdict, TEXT], ids=["verdict", "free text"])
def test_what_is_cut_at_the_limit_is_no_answer_and_paid_once(tmp_path, schema):
    empty, thinking = [None, "", []], [THINKING]
    texts = [*empty, *thinking, f"<think>\n{DRAFT}", DRAFT, GOOD, [*THINKING, {"type": "text", "text": GOOD}]]
    cases = [(text, reason) for text in texts for reason in ("length", "MAX_TOKENS", "FinishReason.MAX_TOKENS")]
    found = replies_to([Fault(text=text, finish_reason=reason) for text, reason in cases], tmp_path, schema)
    said = (
        "The reply of judge at 127.0.0.1:",
        "at `max_tokens` (1024)",
        "raise `max_tokens`, or turn",
        "thinking off",
    )
    for (text, _), (reply, calls, later) in zip(cases, found, strict=True):
        assert (reply.status, reply.verdict, calls, later) == ("cut", None, 1, 0)
        assert all(part in reply.error for part in said) and reply.error.count(". ") == 0
        assert ("is empty" in reply.error) == (text in empty)
        assert ("in the model's thoughts, and holds no answer" in reply.error) == (text in thinking)


def test_other_ends_are_no_whole_reply_either(tmp_path):
    reasons = ["tool_calls", "function_call", "something new", "time_limit"]
    context = ["model_length", "model_context_window_exceeded"]
    cases = [Fault(text=GOOD, finish_reason=reason) for reason in (*reasons, *context)]
    for reason, (reply, calls, later) in zip((*reasons, *context), replies_to(cases, tmp_path), strict=True):
        assert (reply.status, reply.verdict, calls, later) == ("cut", None, 1, 0)
        assert ("context is full" if reason in context else f"`finish_reason` {reason!r}") in reply.error


def test_whole_replies_by_any_name(tmp_path):
    reasons = ["stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "COMPLETE", "", None, "null"]
    cases = [Fault(text=f"hm</think>{GOOD}", finish_reason=reason) for reason in reasons]
    for reply, calls, _ in replies_to(cases, tmp_path):
        assert (reply.status, reply.verdict.scores, reply.text, calls) == ("ok", [8, 3], GOOD, 1)


def test_without_a_reason_thoughts_and_length_tell_what_is_cut(tmp_path):
    reply, calls, _ = reply_to(Fault(text=f"<think>{DRAFT}", finish_reason=None), tmp_path / "a")
    assert (reply.status, calls) == ("cut", 1) and "thoughts (<think>) that never end" in reply.error
    usage = {"prompt_tokens": 9, "completion_tokens": 64}
    full = Fault(text=GOOD, finish_reason=None, usage=usage)
    reply, calls, _ = reply_to(full, tmp_path / "b", max_tokens=64)
    assert (reply.status, calls) == ("cut", 1) and "(64)" in reply.error
    assert reply_to(full, tmp_path / "c", max_tokens=65)[0].status == "ok"
    assert reply_to(Fault(text=GOOD, finish_reason=None, usage={}), tmp_path / "d")[0].status == "ok"


def test_what_a_filter_ended_is_refused(tmp_path):
    reasons = ["content_filter", "SAFETY", "content_filter: PROHIBITED_CONTENT", "refusal"]
    for reply, calls, later in replies_to([Fault(text=GOOD, finish_reason=reason) for reason in reasons], tmp_path):
        assert (reply.status, reply.verdict, calls, later) == ("refused", None, 1, 0)


def test_a_refusal_in_a_part_is_one(tmp_path):
    reply, calls, _ = reply_to(Fault(text=[{"type": "refusal", "refusal": "I will not."}]), tmp_path)
    assert (reply.status, reply.text, calls) == ("refused", "I will not.", 1)


def test_what_the_server_broke_off_is_asked_again_once_and_by_the_next_run(tmp_path):
    reasons = ["abort", "insufficient_system_resource"]
    found = replies_to([Fault(text=GOOD, finish_reason=reason) for reason in reasons], tmp_path)
    for reason, (reply, calls, later) in zip(reasons, found, strict=True):
        assert (reply.status, reply.verdict, calls, later) == ("transport", None, 2, 2)
        assert reason in reply.error


def test_parts_are_one_text(tmp_path):
    parts = [*THINKING, {"type": "text", "text": GOOD[:9]}, {"type": "reference", "reference_ids": [1]}]
    parts += [{"type": "text", "text": GOOD[9:]}]
    reply, calls, _ = reply_to(Fault(text=parts), tmp_path)
    assert (reply.status, reply.verdict.scores, reply.text, calls) == ("ok", [8, 3], GOOD, 1)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_beside_the_content_are_no_answer(tmp_path, name):
    whole = Fault(text=GOOD, message={name: DRAFT})
    assert reply_to(whole, tmp_path / "a")[0].verdict.scores == [8, 3]
    reply, calls, _ = reply_to(Fault(text=None, message={name: GOOD}), tmp_path / "b")
    assert (reply.status, calls) == ("malformed", 3) and "holds thoughts and no answer" in reply.error
    cut = Fault(text=None, message={name: GOOD}, finish_reason="length")
    reply, calls, _ = reply_to(cut, tmp_path / "c")
    assert (reply.status, calls) == ("cut", 1) and "in the model's thoughts" in reply.error


def test_the_same_words_are_asked_again_only_if_another_reply_may_come(tmp_path):
    for schema, temperature, expected in ((TEXT, 0.0, 1), (TEXT, 1.0, 3), (ListwiseVerdict, 0.0, 3)):
        folder = tmp_path / f"{expected}{temperature}"
        reply, calls, later = reply_to(f"<think>{DRAFT}", folder, schema, temperature=temperature)
        assert (reply.status, calls, later) == ("malformed", expected, 0)
        assert "thoughts (<think>) that never end" in reply.error


def test_free_text_comes_without_thoughts(tmp_path):
    reply, _, _ = reply_to("<think>\nThe user asks.\n</think>\n\nThree cups.", tmp_path, TEXT)
    assert (reply.status, reply.text) == ("ok", "Three cups.")


def test_more_fields_of_a_request_are_sent_and_make_another_question(tmp_path):
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    with JudgeServer(lambda body: GOOD) as server:
        for fields, calls in ((None, 1), ({}, 1), (off, 2), (off, 2)):
            client_of(server, tmp_path, extra_body=fields).ask([request_of()])
            assert len(server.requests) == calls
        assert server.requests[1].body["chat_template_kwargs"] == {"enable_thinking": False}


def test_keys_are_those_of_earlier_versions():
    endpoint = Endpoint("http://127.0.0.1:9/v1", "judge")
    request = JudgeRequest(listwise_messages("Q", [], ["a", "b"]), ListwiseVerdict, 2)
    assert request_key(endpoint, request) == "6956b0fcf97bf308e3848e0ad45ba2e49b60dd436e90a5d94dd79d95668245fb"
    text = JudgeRequest([{"role": "user", "content": "Describe a cat."}], sample=3)
    assert request_key(endpoint, text) == "a75b66e273a1287d606726445162abe11d73a9d75e4c4bf181dfe3631b01eb35"


def test_what_an_old_store_took_for_a_verdict_is_asked_again(tmp_path):
    cases = [
        (f"<think>{DRAFT}", "length", "ok", 1),
        (DRAFT, "length", "ok", 1),
        (f"<think>{DRAFT}", "stop", "ok", 1),
        (GOOD, "SAFETY", "ok", 1),
        ("", "stop", "malformed", 1),  # it may have come in parts
        (GOOD, "stop", "ok", 0),
        (GOOD, "None", "ok", 0),
        (f"hm</think>{GOOD}", "stop", "ok", 0),
    ]
    with JudgeServer(lambda body: GOOD) as server:
        client, lines = client_of(server, tmp_path), list[dict]()
        for number, (text, reason, status, _) in enumerate(cases):
            key, address = request_key(client.endpoint, request_of(number)), f"{client.endpoint.location} judge"
            common = {
                "call": str(number),
                "key": key,
                "attempt": 0,
                "endpoint": address,
                "time": "2026-01-01T00:00:00",
            }
            tokens = {"input_tokens": 9, "output_tokens": 9, "tokens": 18, "cost": 0.0, "is_estimate": False}
            said = {"text": text, "finish_reason": reason, "status": status, "error": None}
            lines += [{"event": "sent", **common, "tokens": 99, "cost": 0.0}]
            lines += [{"event": "reply", **common, **said, **tokens}]
        before = "".join(json.dumps(line) + "\n" for line in lines)
        client.store.path.write_text(before)
        for _ in range(2):
            replies = client_of(server, tmp_path).ask([request_of(number) for number in range(len(cases))])
            assert [(reply.status, reply.verdict.scores) for reply in replies] == [("ok", [8, 3])] * len(cases)
            calls = Counter(number_of(one.body) for one in server.requests)
            assert [calls[number] for number in range(len(cases))] == [case[-1] for case in cases]
        reminded = [number_of(one.body) for one in server.requests if "could not be read" in texts_of(one.body)]
        assert reminded == [4]
        assert client.store.path.read_text().startswith(before)


def pairwise(number: int) -> list[JudgeRequest]:
    return [JudgeRequest(pairwise_messages(f"Question {n}?", [], "a", "b"), PairwiseVerdict) for n in range(number)]


def test_a_stage_stops_with_one_sentence_where_nobody_is_there(tmp_path, caplog, capfd):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "judge")
    client = JudgeClient(endpoint, tmp_path / "s.jsonl", max_retries=1, retry_delay=0.001, show_progress=False)
    with pytest.raises(
        JudgeError, match="judge at 127.0.0.1:9/v1 does not answer .The connection .*; see that it runs"
    ):
        client.ask(pairwise(200), stop_early=True)
    assert client.usage().calls <= 24 and len(caplog.records) == 0 and capfd.readouterr().err == ""
    with pytest.raises(JudgeError, match="does not answer"):  # of two alone, too
        client.ask(pairwise(2), stop_early=True)


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(hang=3)], ids=["broken", "silent"])
def test_a_stage_stops_where_the_endpoint_stops_on_the_way_and_goes_on_later(tmp_path, fault):
    with JudgeServer(lambda body: '{"better": "tie"}') as server:
        client = client_of(server, tmp_path, max_concurrency=4, max_retries=1, timeout=0.2)
        assert {one.status for one in client.ask(pairwise(4), stop_early=True)} == {"ok"}
        server.answer = lambda body: fault
        with pytest.raises(JudgeError, match="does not answer"):
            client.ask(pairwise(40), stop_early=True)
        asked = len(server.requests)
        assert 4 + 2 * 8 <= asked <= 4 + 2 * 12
        server.answer = lambda body: '{"better": "tie"}'
        replies = client.ask(pairwise(40), stop_early=True)
        assert {one.status for one in replies} == {"ok"} and len(server.requests) - asked == 36


def test_chunks_too_small_to_tell_add_up(tmp_path):
    with JudgeServer(lambda body: '{"better": "tie"}') as server:
        client = client_of(server, tmp_path, max_retries=0)
        client.ask(pairwise(1), stop_early=True)
        server.answer = lambda body: Fault(status=503)
        for number in (3, 5):
            assert client.ask(pairwise(number), stop_early=True)[-1].status == "transport"
        with pytest.raises(JudgeError, match="does not answer .*status 503"):
            client.ask(pairwise(6), stop_early=True)


def test_one_question_without_an_answer_does_not_stop_a_stage(tmp_path):
    def answer(body):
        return Fault(status=500) if "Question 3?" in json.dumps(body) else '{"better": "tie"}'

    with JudgeServer(answer) as server:
        for _ in range(2):  # in the second run it is alone
            replies = client_of(server, tmp_path, max_retries=1).ask(pairwise(6), stop_early=True)
            assert [reply.status for reply in replies] == ["ok"] * 3 + ["transport"] + ["ok"] * 2
        assert len(server.requests) == 5 + 2 * 2


def test_cut_replies_are_told_once_and_a_stage_of_nothing_else_stops(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with JudgeServer(lambda body: Fault(text=None, finish_reason="length")) as server:
        client = client_of(server, tmp_path, max_concurrency=4)
        assert {one.status for one in client.ask(pairwise(20), stop_early=True)} == {"cut"}
        client.ask(pairwise(30), stop_early=True)
        told = [record.getMessage() for record in caplog.records if record.name.startswith("trl_dt2it")]
        assert len(told) == 1 and "raise `max_tokens`" in told[0]
        with pytest.raises(JudgeError, match="The first 6. replies are all cut, and paid: .*raise `max_tokens`"):
            client.ask(pairwise(100), stop_early=True)
        assert len(server.requests) <= 30 + 64 + 4


def test_a_stage_stops_where_nothing_is_taken_any_more(tmp_path):
    with JudgeServer(lambda body: '{"better": "tie"}') as server:
        client = client_of(server, tmp_path, max_concurrency=4)
        client.ask(pairwise(1), stop_early=True)
        server.answer = lambda body: Fault(status=400, body={"error": {"message": "API key expired."}})
        assert [reply.status for reply in client.ask(pairwise(20), stop_early=True)] == ["ok"] + ["rejected"] * 19
        with pytest.raises(JudgeError, match="6. questions in a row were rejected, the last with: .*API key expired"):
            client.ask(pairwise(100), stop_early=True)
        assert len(server.requests) <= 1 + 2 * (19 + 68)
