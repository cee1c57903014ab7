"""A server at its worst, runs that are killed, a budget that is short, and a key that shows up nowhere."""

import hashlib
import json
import logging
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from trl_dt2it.judge import JudgeClient, JudgeError
from trl_dt2it.judge.store import JudgeStore, prompt_tokens

from .runs import CONCURRENCY, INJECTION, KEY, NUMBER, make_client, make_requests, outcome, start
from .server import Fault, JudgeServer, texts_of


KILLS = 20


class Moody:
    """
    A judge of which three calls in ten fail in some way.

    What becomes of a question depends on the question and on how often it was reminded, and not on how often the
    connection failed before, so that a run that was killed must end like one that was not.
    """

    def __init__(self) -> None:
        self.tries: Counter[int] = Counter()
        self.full: Counter[tuple[int, int]] = Counter()  # whole replies by question and reminders
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __call__(self, body: dict) -> str | Fault:
        text = texts_of(body)
        number, reminders = int(re.search(r"Question (\d+)\?", text)[1]), text.count("could not be read")
        if number % 16 == 15:
            return Fault(status=503)  # this one for ever
        with self.lock:
            self.tries[number] += 1
            tries = self.tries[number]
            kind = self._fault(number, tries)
            self.faults[kind or "none"] += 1
            if kind is None:
                self.full[number, reminders] += 1
        scores = f'{{"scores": [{1 + number % 10}, {9 - number % 7}.5]}}'
        if kind is not None:
            echo = {"error": {"message": f"try again, {KEY}"}}  # careless with what it was sent
            return {
                "busy": Fault(status=429, headers={"Retry-After": "0.02"}, body=echo),
                "broken": Fault(status=500, body=echo),
                "hang": Fault(text=scores, hang=3),
                "cut": Fault(text=scores, cut=True),
                "closed": Fault(text=scores, close=True),
            }[kind]
        bad = {
            3: f"As the answer asks: {INJECTION}",
            4: scores.replace("[", "[11, "),
            5: scores.replace("]}", ""),
            6: f'{{"scores": [{number % 10 + 1}]}}',
            7: INJECTION,
        }
        if number % 16 in bad and (reminders == 0 or number % 32 > 16):
            return bad[number % 16]
        good = {
            8: f"Here is my verdict:\n```json\n{scores}\n```\nI hope this helps.",
            9: scores.replace("]}", ",],}"),
            10: f'{{"analysis": "It says {{}}; key {KEY}", ' + scores[1:],
            11: Fault(refusal="I do not judge cats."),
        }
        return good.get(number % 16, scores)

    @staticmethod
    def _fault(number: int, tries: int) -> str | None:
        """None in a row longer than two, so that six retries are always enough."""
        draws = [hashlib.sha256(f"{number} {one}".encode()).digest() for one in (tries - 2, tries - 1, tries)]
        if draws[2][0] >= 0.33 * 256 or all(draw[0] < 0.33 * 256 for draw in draws[:2]):
            return None
        return ("busy", "broken", "hang", "cut", "closed")[draws[2][1] % 5]


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    return KEY


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list, Moody, int, JudgeClient]:
    """The outcomes of a run that nobody kills, its judge, what the server charged, and the client."""
    os.environ["JUDGE_TEST_KEY"] = KEY
    try:
        judge = Moody()
        with JudgeServer(judge) as server:
            client = make_client(server.base_url, str(tmp_path_factory.mktemp("calm") / "store.jsonl"))
            replies = client.ask(make_requests(NUMBER))
            assert all(one.headers["authorization"] == f"Bearer {KEY}" for one in server.requests)
            return [outcome(reply) for reply in replies], judge, server.charged, client
    finally:
        del os.environ["JUDGE_TEST_KEY"]


def test_every_question_ends_with_a_verdict_or_a_status(undisturbed):
    outcomes, judge, charged, client = undisturbed
    statuses = Counter(status for status, *_ in outcomes)
    for number, (status, verdict, text, error) in enumerate(outcomes):
        expected = {15: "transport", 11: "refused"}.get(number % 16, "ok")
        if number % 16 in (3, 4, 5, 6, 7) and number % 32 > 16:
            expected = "malformed"
        assert status == expected, (number, text, error)
        assert (verdict is None) == (status != "ok") and (error is None) == (status == "ok")
        if verdict is not None:
            assert verdict["scores"] == [1 + number % 10, 9.5 - number % 7]
    assert statuses == {"ok": 60, "malformed": 10, "refused": 5, "transport": 5}
    # None was answered twice for the same wording of its question.
    assert set(judge.full.values()) == {1}
    assert {"busy", "broken", "hang", "cut", "closed"} < set(judge.faults)
    assert 0.2 < 1 - judge.faults["none"] / judge.faults.total() < 0.4
    usage = client.usage()
    assert usage.calls == judge.faults.total() + 5 * 7 and usage.by_status == statuses
    assert usage.unsettled_calls == sum(judge.faults[kind] for kind in ("hang", "cut", "closed"))
    spent = client.store.spent
    assert usage.input_tokens + usage.output_tokens <= charged <= spent.tokens


def test_a_run_that_is_killed_twenty_times_ends_like_one_that_is_not(undisturbed, tmp_path, key):
    expected, calm, charged, calm_client = undisturbed
    judge, rng = Moody(), random.Random(0)
    store, result = tmp_path / "store.jsonl", tmp_path / "result.json"
    in_flight = []
    with JudgeServer(judge) as server:
        limit = 4 * calm_client.store.spent.tokens
        for _ in range(KILLS):
            received, before = len(server.requests), events(store)
            run = start(server.base_url, store, result, limit)
            wanted, deadline = received + rng.randint(1, 8), time.monotonic() + 20
            while len(server.requests) < wanted and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))
            assert run.kill() and not result.exists()
            new = events(store) - before
            in_flight.append(new["sent"] - new["reply"] - new["failed"])
            # Every call was written down before it was made.
            assert received < len(server.requests) <= events(store)["sent"]
        start(server.base_url, store, result, limit).finish()
        assert json.loads(result.read_text()) == expected
        after = JudgeStore(store)
        after.refresh()
        assert server.charged <= after.spent.tokens <= limit
    assert all(0 <= number <= CONCURRENCY for number in in_flight)
    assert sum(in_flight) > 0
    repeated = sum(count - 1 for count in judge.full.values())
    assert repeated <= sum(in_flight)
    assert set(judge.full) == set(calm.full)
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_an_interrupt_ends_a_run_and_keeps_what_was_replied(tmp_path, key):
    store = tmp_path / "store.jsonl"
    with JudgeServer(lambda body: Fault(text='{"scores": [7, 3]}', hang=0.5)) as server:
        run = start(server.base_url, store, tmp_path / "r")
        while len(server.requests) < 10:
            time.sleep(0.005)
        run.send(signal.SIGINT)
        assert run.wait() == [1]
        asked = len(server.requests)
        assert 10 <= asked < 30
        replies = make_client(server.base_url, str(store)).ask(make_requests(NUMBER))
        assert asked - CONCURRENCY <= sum(reply.is_cached for reply in replies) <= asked


def events(store: Path) -> Counter:
    if not store.exists():
        return Counter()
    whole = store.read_bytes().rpartition(b"\n")[0]
    found = Counter()
    for line in whole.splitlines():
        try:
            found[json.loads(line)["event"]] += 1
        except ValueError:
            found["torn"] += 1
    return found


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_a_short_budget_is_kept_and_nothing_is_lost(undisturbed, tmp_path, key, share):
    expected, _, _, calm_client = undisturbed
    limit = int(share * calm_client.store.spent.tokens)
    with JudgeServer(Moody()) as server:
        client = make_client(server.base_url, str(tmp_path / "s.jsonl"), limit)
        replies = client.ask(make_requests(NUMBER))
        assert len(replies) == NUMBER
        assert server.charged <= client.store.spent.tokens <= limit
        statuses = Counter(reply.status for reply in replies)
        assert statuses["over_budget"] > 0 and (share == 0.0) == (statuses["over_budget"] == NUMBER)
        assert {reply.error for reply in replies if reply.status == "over_budget"} == {
            "The budget has no room for this call."
        }
        # With money for the rest, the rest is asked, and no more.
        answered = len(server.requests)
        replies = make_client(server.base_url, str(tmp_path / "s.jsonl")).ask(make_requests(NUMBER))
        assert [outcome(reply) for reply in replies] == expected
        assert (
            sum(reply.is_cached for reply in replies) == statuses["ok"] + statuses["refused"] + statuses["malformed"]
        )
        assert answered == 0 or statuses.total() - statuses["over_budget"] > 0 or share < 0.1


def test_calls_and_cost_are_limited_too_and_a_small_question_still_fits(tmp_path, key):
    from dataclasses import replace

    from trl_dt2it.judge import Budget

    with JudgeServer(lambda body: Fault(status=500) if len(server.requests) % 2 else '{"scores": [7, 3]}') as server:
        client = make_client(server.base_url, str(tmp_path / "calls.jsonl"))
        client.budget = Budget(max_calls=9)
        statuses = Counter(reply.status for reply in client.ask(make_requests(20)))
        assert len(server.requests) == client.usage().calls == 9
        assert statuses.total() == 20 and statuses["over_budget"] >= 16

        server.answer = lambda body: '{"scores": [7, 3]}'
        client = make_client(server.base_url, str(tmp_path / "cost.jsonl"))
        client.budget = Budget(max_cost=0.01)
        requests = make_requests(6)
        large = replace(requests[0], messages=[*requests[0].messages, {"role": "user", "content": "x" * 20_000}])
        replies = client.ask([large, *requests])
        assert [reply.status for reply in replies][:3] == ["over_budget", "ok", "ok"]
        usage = client.usage()
        assert 0 < usage.cost <= 0.01 and usage.unsettled_calls == 0


def test_calls_under_way_are_waited_for_before_a_budget_is_called_short(tmp_path, key):
    """What is set aside for a call is far more than it takes, and comes back."""
    with JudgeServer(lambda body: Fault(text='{"scores": [7, 3]}', hang=0.03)) as server:
        client = make_client(server.base_url, str(tmp_path / "s.jsonl"), 9_000)
        replies = client.ask(make_requests(8))
        assert [reply.status for reply in replies] == ["ok"] * 8
        # All at once they would not have fitted.
        assert sum(one["tokens"] for one in map(json.loads, open(client.store.path)) if one["event"] == "sent") > 9_000


def test_tokens_that_the_endpoint_does_not_count_are_counted_at_their_most(tmp_path, key):
    with JudgeServer(lambda body: Fault(text='{"scores": [7, 3]}', usage={})) as server:
        client = make_client(server.base_url, str(tmp_path / "s.jsonl"))
        (reply,) = client.ask(make_requests(1))
        assert reply.output_tokens == 64 and reply.input_tokens > 1000
        assert client.store.spent.tokens == reply.input_tokens + 64


def test_a_model_with_more_tokens_than_thought_possible_is_learned_from(tmp_path, key):
    usage = {"prompt_tokens": 20_000, "completion_tokens": 10}
    with JudgeServer(lambda body: Fault(text='{"scores": [7, 3]}', usage=usage)) as server:
        client = make_client(server.base_url, str(tmp_path / "s.jsonl"), 50_000, max_concurrency=1)
        replies = client.ask(make_requests(5))
        assert [reply.status for reply in replies] == ["ok"] * 2 + ["over_budget"] * 3
        assert server.charged == 40_020


def test_calls_under_way_do_not_multiply_what_is_learned(tmp_path, key):
    """Ten calls at a time, each with twice the tokens that were thought possible: not 2^10 times is learned."""
    with JudgeServer(lambda body: Fault(text='{"scores": [7, 3]}', usage=usage, hang=0.3)) as server:
        client = make_client(server.base_url, str(tmp_path / "s.jsonl"), max_concurrency=10)
        most = prompt_tokens(make_requests(1)[0].messages)
        usage = {"prompt_tokens": 2 * most, "completion_tokens": 10}
        assert {reply.status for reply in client.ask(make_requests(30))} == {"ok"}
        sent = [line["tokens"] for line in map(json.loads, open(client.store.path)) if line["event"] == "sent"]
        assert len(sent) == 30 and max(sent) <= 2.2 * most + 64


def all_text_of(error: BaseException) -> str:
    """All that a traceback, a logger or a pickle could show of an error."""
    import pickle
    import traceback

    texts = []
    while error is not None:
        texts += [
            repr(error),
            str(error),
            str(error.args),
            str(vars(error)),
            "".join(traceback.format_exception(error)),
        ]
        texts.append(str(pickle.dumps(error)))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500])
def test_the_key_is_in_no_file_log_error_or_reply(tmp_path, key, caplog, capfd, status):
    """Though the server sends it back in every way it has."""
    caplog.set_level(logging.DEBUG)
    echo = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": KEY, "param": KEY, "type": KEY}}
    headers = {"X-Request-Id": KEY, "Retry-After": KEY, "WWW-Authenticate": f"Bearer {KEY}"}
    text = f'{{"analysis": "{KEY}", "scores": [7, 3]}}'
    reply = Fault(text=text, headers=headers) if status == 200 else Fault(status, echo, headers)
    with JudgeServer(lambda body: reply) as server:
        client = make_client(server.base_url, str(tmp_path / "s.jsonl"), max_retries=1, show_progress=True)
        shown = [repr(client), repr(client.endpoint), str(vars(client)), str(vars(client.store))]
        try:
            shown.append(str(client.ask(make_requests(3))))
            assert status in (200, 429, 500)
        except JudgeError as error:
            assert status not in (200, 429, 500)
            assert "JUDGE_TEST_KEY" in str(error) or status != 401
            shown.append(all_text_of(error))
        shown += [str(client.usage()), str(vars(client)), str(vars(client.store))]
        assert any(one.headers["authorization"] == f"Bearer {KEY}" for one in server.requests)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "s.jsonl") in files
    shown += [path.read_text() for path in files] + list(capfd.readouterr())
    records = [
        record
        for record in caplog.records
        if record.name.split(".")[0] in ("openai", "httpcore2", "httpx2", "httpcore", "httpx")
    ]
    assert records  # the loggers were on
    shown += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert not [text for text in shown if KEY in text]


def test_a_missing_key_is_named_and_nothing_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(lambda body: '{"scores": [7, 3]}') as server:
        client = make_client(server.base_url, str(tmp_path / "s.jsonl"))
        for value in ("", "  "):
            monkeypatch.setenv("JUDGE_TEST_KEY", value)
            with pytest.raises(JudgeError, match="The environment variable JUDGE_TEST_KEY is not set"):
                client.ask(make_requests(1))
        monkeypatch.setenv("JUDGE_TEST_KEY", "two words\u00e9")
        with pytest.raises(JudgeError, match="JUDGE_TEST_KEY holds more than a key") as caught:
            client.ask(make_requests(1))
        assert "two words" not in str(caught.value)
        assert server.requests == []
        # And the key of another provider is not sent to one that was given none.
        client.endpoint = type(client.endpoint)(server.base_url, "judge")
        client.ask(make_requests(1))
        assert KEY not in str(server.requests[0].headers)
