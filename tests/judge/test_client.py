"""The client against a server on this machine: every kind of reply and refusal, in order, and nothing asked twice."""

import asyncio
import threading
import time
from email.utils import formatdate

import pytest

from trl_dt2it.judge import (
    Budget,
    Endpoint,
    JudgeClient,
    JudgeError,
    JudgeRequest,
    ListwiseVerdict,
    both_orders,
    combine_orders,
    listwise_messages,
)
from trl_dt2it.judge.endpoint import delay

from .server import Fault, JudgeServer, texts_of


GOOD = '{"scores": [7, 3]}'
BAD = "I would rather not."


def requests(number: int = 1, **kwargs) -> list[JudgeRequest]:
    return [
        JudgeRequest(listwise_messages(f"Question {n}?", [], ["yes", "no"]), ListwiseVerdict, 2, **kwargs)
        for n in range(number)
    ]


def client_of(server: JudgeServer, tmp_path, **kwargs) -> JudgeClient:
    endpoint = {name: kwargs.pop(name) for name in list(kwargs) if name in Endpoint.__dataclass_fields__}
    options = {"show_progress": False, "retry_delay": 0.001, "max_retries": 3, **kwargs}
    return JudgeClient(Endpoint(server.base_url, "judge", **endpoint), tmp_path / "store.jsonl", **options)


def replies_to(faults: list, tmp_path, number: int = 1, **kwargs):
    """Replies of a server that goes through a list of answers and stays with the last, and what it received."""
    left = list(faults)
    lock = threading.Lock()

    def answer(body):
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    with JudgeServer(answer) as server:
        replies = client_of(server, tmp_path, **kwargs).ask(requests(number))
        return replies, server.requests


def test_replies_come_in_order_and_only_once(tmp_path):
    def answer(body):
        number = int(texts_of(body).split("Question ")[1].split("?")[0])
        time.sleep(0.01 * (number % 3))
        return f'{{"scores": [{1 + number % 9}, 10]}}'

    with JudgeServer(answer) as server:
        client = client_of(server, tmp_path, input_price=1.0, output_price=10.0)
        asked = requests(20)
        replies = client.ask([*asked, asked[0], asked[5]])
        assert [reply.verdict.scores[0] for reply in replies] == [*(1 + n % 9 for n in range(20)), 1, 6]
        assert [reply.is_cached for reply in replies] == [False] * 20 + [True] * 2
        assert len(server.requests) == 20
        again = client_of(server, tmp_path).ask(asked[::-1])
        assert [reply.verdict for reply in again] == [reply.verdict for reply in replies[19::-1]]
        assert all(reply.is_cached for reply in again) and len(server.requests) == 20
        usage = client.usage()
        assert (usage.calls, usage.cached, usage.by_status) == (20, 2, {"ok": 22})
        assert usage.input_tokens + usage.output_tokens == server.charged
        assert usage.cost == pytest.approx((usage.input_tokens + 10 * usage.output_tokens) / 1e6)
        assert "22 ok (2 from the store); calls: 20" in str(usage) and usage.as_dict()["calls"] == 20


def test_no_more_calls_at_a_time_than_allowed(tmp_path):
    with JudgeServer(lambda body: Fault(text=GOOD, hang=0.05)) as server:
        most = []
        original = server.answer
        server.answer = lambda body: (most.append(server.num_open), original(body))[1]
        start = time.monotonic()
        client_of(server, tmp_path, max_concurrency=3).ask(requests(12))
        assert max(most) == 3
        assert time.monotonic() - start < 3


def test_samples_of_one_request_are_asked_apart(tmp_path):
    with JudgeServer(lambda body: GOOD) as server:
        client = client_of(server, tmp_path)
        client.ask([*requests(1, sample=0), *requests(1, sample=1)])
        assert len(server.requests) == 2
        client.ask(requests(1, sample=2))
        assert len(server.requests) == 3


def test_free_text_is_given_as_it_is(tmp_path):
    message = [{"role": "user", "content": "Describe a cat."}]
    with JudgeServer(lambda body: " A cat is\nan animal. ") as server:
        (reply,) = client_of(server, tmp_path, temperature=0.7, max_tokens=9).ask([JudgeRequest(message)])
        assert (reply.status, reply.verdict, reply.text, reply.error) == ("ok", None, " A cat is\nan animal. ", None)
        body = server.requests[0].body
        assert body == {"model": "judge", "messages": message, "temperature": 0.7, "max_tokens": 9}


def test_both_orders_find_a_judge_that_prefers_the_first(tmp_path):
    with JudgeServer(lambda body: '{"better": "first"}') as server:
        first, second = client_of(server, tmp_path).ask(both_orders("Q", [], "a", "b"))
        assert (first.status, second.status) == ("ok", "ok")
        assert combine_orders(first, second) == "tie"


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_busy_or_broken_server_is_asked_again(tmp_path, status):
    (reply,), received = replies_to([Fault(status=status), Fault(status=status), GOOD], tmp_path)
    assert (reply.status, len(received)) == ("ok", 3)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(close=True),
        Fault(text=GOOD, cut=True),
        Fault(text=GOOD, hang=5),
        Fault(body="<html>busy</html>"),
        Fault(body={}),
        Fault(body={"choices": []}),
        Fault(body={"choices": None, "error": {"message": "overloaded"}}),
        Fault(body={"choices": [{"index": 0}]}),
        Fault(body='{"choices": [', headers={"Content-Type": "application/json"}),
    ],
    ids=["closed", "cut", "hangs", "html", "empty", "no choice", "error", "no message", "half a body"],
)
def test_a_reply_that_is_none_is_asked_for_again_and_may_have_been_paid(tmp_path, fault):
    (reply,), received = replies_to([fault, GOOD], tmp_path, timeout=0.5)
    assert (reply.status, len(received)) == ("ok", 2)
    usage = JudgeClient(Endpoint("http://127.0.0.1:1/v1", "judge"), tmp_path / "store.jsonl").usage()
    assert (usage.calls, usage.unsettled_calls) == (2, 1)


def test_a_server_that_drips_does_not_hold_the_run(tmp_path):
    class Dripping(JudgeServer):
        pass

    with Dripping(lambda body: Fault(text=GOOD, headers={"Content-Length": "100000"})) as server:
        start = time.monotonic()
        (reply,) = client_of(server, tmp_path, timeout=0.3, max_retries=1).ask(requests())
        assert (reply.status, reply.verdict) == ("transport", None)
        assert time.monotonic() - start < 3


def test_retry_after_is_waited_for_in_seconds_and_as_a_date(tmp_path):
    for value, least in (("1", 1.0), ("0.3", 0.3), ("date", 0.9)):
        # A date has whole seconds: two ahead are at least one.
        header = formatdate(time.time() + 2, usegmt=True) if value == "date" else value
        folder = tmp_path / value
        _, received = replies_to([Fault(status=429, headers={"Retry-After": header}), GOOD], folder)
        waited = received[1].time - received[0].time
        assert least - 0.01 <= waited < least + 1.2, header


def test_nonsense_in_retry_after_is_ignored(tmp_path):
    for header in ("soon", "-5", "nan", "Mon, 99 Foo 2020", "1e400"):
        (reply,), received = replies_to(
            [Fault(status=503, headers={"Retry-After": header}), GOOD], tmp_path / header[:3]
        )
        assert reply.status == "ok" and received[1].time - received[0].time < 1


def test_delays_double_are_spread_and_are_the_same_again():
    for tries in range(1, 12):
        delays = {delay(tries, f"key {n}", None, 1.0, 60.0) for n in range(100)}
        longest = min(2.0 ** (tries - 1), 60.0)
        assert len(delays) == 100 and longest / 2 <= min(delays) <= max(delays) <= longest
    assert delay(3, "k", None, 1.0, 60.0) == delay(3, "k", None, 1.0, 60.0)
    assert 10 <= delay(1, "k", 10.0, 1.0, 2.0) <= 11


def test_a_server_that_never_recovers_is_a_status_and_is_asked_again_by_the_next_run(tmp_path):
    (reply,), received = replies_to([Fault(status=500)], tmp_path)
    assert (reply.status, reply.verdict, len(received)) == ("transport", None, 4)
    assert reply.error == "The endpoint answered with status 500: fault 500"
    with JudgeServer(lambda body: GOOD) as server:
        client = client_of(server, tmp_path)
        assert client.ask(requests())[0].status == "ok"
        assert len(server.requests) == 1


def test_a_server_that_is_gone_ends_the_run_soon_with_a_status_for_all(tmp_path):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "judge")
    client = JudgeClient(endpoint, tmp_path / "s.jsonl", max_retries=1, retry_delay=0.001, show_progress=False)
    replies = client.ask(requests(200))
    assert {reply.status for reply in replies} == {"transport"} and len(replies) == 200
    assert client.usage().calls < 60
    assert client.usage().unsettled_calls == 0  # nothing was sent, so nothing can have been charged
    assert "stopped answering" in replies[-1].error and "connection" in replies[0].error


def test_a_reply_that_cannot_be_read_is_asked_for_again_with_a_reminder(tmp_path):
    (reply,), received = replies_to([BAD, '{"scores": [11, 3]}', GOOD], tmp_path)
    assert (reply.status, reply.verdict.scores) == ("ok", [7, 3])
    assert [texts_of(one.body).count("could not be read") for one in received] == [0, 1, 2]
    assert all(len(one.body["messages"]) == 2 and BAD not in texts_of(one.body) for one in received)
    total = sum(one.charged for one in received)
    assert reply.input_tokens + reply.output_tokens == total


@pytest.mark.parametrize("text", [BAD, "", '{"scores": [7]}', '{"scores": [7, 1', '{"scores": [true, false]}'])
def test_after_two_reminders_it_is_malformed_for_good(tmp_path, text):
    (reply,), received = replies_to([text], tmp_path)
    assert (reply.status, reply.verdict, reply.text, len(received)) == ("malformed", None, text, 3)
    assert reply.error.endswith(".")
    with JudgeServer(lambda body: GOOD) as server:
        client = client_of(server, tmp_path)
        client.endpoint = Endpoint(str(_base_url(tmp_path)), "judge")
        (again,) = client.ask(requests())
        assert (again.status, again.is_cached, server.requests) == ("malformed", True, [])


def _base_url(tmp_path) -> str:
    import json

    record = json.loads((tmp_path / "store.jsonl").read_text().splitlines()[0])
    return "http://" + record["endpoint"].split()[0]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(refusal="I cannot help with that."),
        Fault(text="", finish_reason="content_filter"),
        Fault(status=400, body={"error": {"message": "blocked", "code": "content_filter"}}),
        Fault(status=400, body={"error": {"message": "data_inspection_failed: bad input"}}),
    ],
)
def test_a_refusal_is_a_status_and_final(tmp_path, fault):
    (reply,), received = replies_to([fault], tmp_path)
    assert (reply.status, reply.verdict, len(received)) == ("refused", None, 1)
    with JudgeServer(lambda body: GOOD) as server:
        client = client_of(server, tmp_path)
        client.endpoint = Endpoint(_base_url(tmp_path), "judge")
        (again,) = client.ask(requests())
        assert (again.status, again.is_cached, again.error) == ("refused", True, reply.error)


@pytest.mark.parametrize(
    "status, body, message",
    [
        (401, None, "refuses the key .status 401.; set `api_key_env`"),
        (403, None, "status 403.: fault 403"),
        (404, None, "status 404; check `base_url` and `model`.: fault 404"),
        (402, None, "out of money or quota .status 402."),
        (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "out of money"),
        (400, {"error": {"message": "Your credit balance is too low.", "type": "invalid_request_error"}}, "of money"),
        (400, {"error": {"message": "unknown field"}}, "cannot take the request .status 400.: unknown field"),
    ],
)
def test_what_no_request_can_pass_stops_the_run_at_once(tmp_path, status, body, message):
    with JudgeServer(lambda request: Fault(status=status, body=body)) as server:
        with pytest.raises(JudgeError, match=message) as caught:
            client_of(server, tmp_path, max_concurrency=4).ask(requests(100))
        assert "\n" not in str(caught.value)
        assert len(server.requests) <= 20


def test_a_run_that_is_stopped_keeps_what_was_replied(tmp_path):
    def answer(body):
        return GOOD if "Question 0?" in texts_of(body) else Fault(status=401)

    with JudgeServer(answer) as server:
        with pytest.raises(JudgeError, match="401"):
            client_of(server, tmp_path, max_concurrency=1).ask(requests(5))
        server.answer = lambda body: GOOD
        replies = client_of(server, tmp_path).ask(requests(5))
        assert [reply.is_cached for reply in replies] == [True, False, False, False, False]


def test_one_request_that_the_server_cannot_take_does_not_stop_the_others(tmp_path):
    def answer(body):
        if "Question 3?" in texts_of(body):
            return Fault(status=400, body={"error": {"message": "This model's maximum context length is 8 tokens."}})
        return GOOD

    with JudgeServer(answer) as server:
        client = client_of(server, tmp_path)
        replies = client.ask(requests(6))
        assert [reply.status for reply in replies] == ["ok"] * 3 + ["rejected"] + ["ok"] * 2
        assert "maximum context length" in replies[3].error
        assert "response_format" in server.requests[-1].body or "response_format" in server.requests[0].body
        # The endpoint has answered before, so that a run with this one alone does not stop either.
        assert client_of(server, tmp_path).ask(requests(6))[3].status == "rejected"


@pytest.mark.parametrize(
    "message, parameter, left",
    [
        ("'response_format' of type 'json_schema' is not supported", "response_format", set()),
        ("extra fields not permitted", "response_format", set()),
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.", "max_tokens", {"max_completion_tokens"}),
        ("Unsupported value: 'temperature' does not support 0.0 with this model.", "temperature", set()),
    ],
)
def test_parameters_that_the_endpoint_does_not_take_are_left_out(tmp_path, message, parameter, left):
    def answer(body):
        return Fault(status=400, body={"error": {"message": message}}) if parameter in body else GOOD

    with JudgeServer(answer) as server:
        client = client_of(server, tmp_path, max_concurrency=1)
        assert [reply.status for reply in client.ask(requests(4))] == ["ok"] * 4
        assert len(server.requests) == 5  # learned with the first
        assert left <= set(server.requests[-1].body)


def test_it_runs_inside_a_running_loop(tmp_path):
    async def notebook():
        return client_of(server, tmp_path).ask(requests(3))

    with JudgeServer(lambda body: GOOD) as server:
        assert [reply.status for reply in asyncio.run(notebook())] == ["ok"] * 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"base_url": "localhost:8000"}, "must be an address"),
        ({"base_url": "file:///etc/passwd"}, "must be an address"),
        ({"base_url": "https://user:s3cret@host/v1"}, "must not hold a user"),
        ({"base_url": "https://host/v1?key=s3cret"}, "must not hold a user"),
        ({"api_key_env": "sk-s3cret"}, "not the key itself"),
        ({"api_key_env": "sk_s3cret"}, "not the key itself"),
        ({"max_tokens": 0}, "above 0"),
        ({"timeout": 0}, "above 0"),
        ({"temperature": float("nan")}, "at least 0"),
        ({"input_price": -1}, "at least 0"),
        ({"extra_body": {"stream": True}}, "`extra_body` holds `stream`, which the client sets itself"),
    ],
)
def test_an_endpoint_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(**{"base_url": "http://host/v1", "model": "m", **arguments})
    assert "s3cret" not in str(caught.value)


def test_wrong_arguments_are_refused(tmp_path):
    endpoint = Endpoint("http://host/v1", "m")
    with pytest.raises(ValueError, match="`max_concurrency` must be at least 1"):
        JudgeClient(endpoint, tmp_path / "s.jsonl", max_concurrency=0)
    with pytest.raises(ValueError, match="`max_tokens` must be at least 0"):
        Budget(max_tokens=-1)
    with pytest.raises(ValueError, match="needs `num_scores`"):
        JudgeClient(endpoint, tmp_path / "s.jsonl").ask([JudgeRequest([], ListwiseVerdict)])
    assert not (tmp_path / "s.jsonl").exists()
