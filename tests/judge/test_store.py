"""The store: nothing is lost that was written, nothing is read that was not, and one run writes at a time."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from PIL import Image

from trl_dt2it.judge import (
    DEFAULT_RUBRIC,
    Criterion,
    Endpoint,
    JudgeClient,
    JudgeError,
    JudgeRequest,
    ListwiseVerdict,
    Rubric,
    listwise_messages,
)
from trl_dt2it.judge.client import request_key
from trl_dt2it.judge.store import JudgeStore

from .server import JudgeServer


ENDPOINT = Endpoint("http://127.0.0.1:9/v1", "judge")


def request(question: str = "Q", answers=("a", "b"), image=None, **kwargs) -> JudgeRequest:
    images = [] if image is None else [image]
    return JudgeRequest(listwise_messages(question, images, answers), ListwiseVerdict, len(answers), **kwargs)


def test_the_key_follows_all_that_the_reply_depends_on():
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    keys = [
        request_key(ENDPOINT, request()),
        request_key(ENDPOINT, request("R")),
        request_key(ENDPOINT, request(answers=("b", "a"))),
        request_key(ENDPOINT, request(answers=("a", "b", "c"))),
        request_key(ENDPOINT, request(image=red)),
        request_key(ENDPOINT, request(image=blue)),
        request_key(ENDPOINT, request(sample=1)),
        request_key(ENDPOINT, request(rubric=DEFAULT_RUBRIC)),
        request_key(ENDPOINT, request(rubric=Rubric((Criterion("a", 1.0, {"en": "A"}),)))),
        request_key(ENDPOINT, JudgeRequest(request().messages)),
        request_key(Endpoint("http://127.0.0.1:9/v1", "other"), request()),
        request_key(Endpoint("http://127.0.0.1:8/v1", "judge"), request()),
        request_key(Endpoint("http://127.0.0.1:9/v2", "judge"), request()),
        request_key(Endpoint("http://127.0.0.1:9/v1", "judge", temperature=1.0), request()),
        request_key(Endpoint("http://127.0.0.1:9/v1", "judge", max_tokens=10), request()),
    ]
    assert len(set(keys)) == len(keys)
    for same in (
        Endpoint("https://127.0.0.1:9/v1/", "judge"),
        Endpoint("http://127.0.0.1:9/v1", "judge", api_key_env="KEY", timeout=1, input_price=3, output_price=4),
    ):
        assert request_key(same, request()) == keys[0]


def written(path, *events) -> None:
    common = {"key": "k", "endpoint": "e", "attempt": 0}
    with open(path, "ab") as file:
        for event in events:
            file.write(json.dumps({**common, **event}).encode() + b"\n")


SENT = {"event": "sent", "call": "1", "tokens": 100, "cost": 1.0}
REPLY = {
    "event": "reply", "call": "1", "status": "ok", "text": "hi", "error": None, "finish_reason": "stop",
    "input_tokens": 10, "output_tokens": 2, "tokens": 12, "cost": 0.25,
}  # fmt: skip


def test_a_sent_call_counts_at_its_most_until_its_price_is_known(tmp_path):
    path = tmp_path / "s.jsonl"
    store = JudgeStore(path)
    written(path, SENT)
    store.refresh()
    assert (store.spent.calls, store.spent.tokens, store.spent.cost) == (1, 100, 1.0)
    written(path, REPLY)
    store.refresh()
    assert (store.spent.calls, store.spent.tokens, store.spent.cost) == (1, 12, 0.25)
    written(path, {**SENT, "call": "2"}, {"event": "failed", "call": "2", "tokens": 0, "cost": 0.0})
    written(path, {**SENT, "call": "3"})
    written(path, {"event": "failed", "call": "3", "tokens": 0, "cost": 0.0, "is_unsettled": True})
    store.refresh()
    assert (store.spent.calls, store.spent.tokens, store.spent.cost) == (3, 112, 1.25)
    again = JudgeStore(path)
    again.refresh()
    assert again.spent == store.spent
    assert [reply["text"] for reply in again.replies("k")] == ["hi"]


@pytest.mark.parametrize("cut", [1, 20, -2, -1])
def test_a_torn_last_line_harms_no_other(tmp_path, cut):
    path = tmp_path / "s.jsonl"
    written(path, SENT, REPLY)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[1][:cut])
    store = JudgeStore(path)
    with store.opened():
        store.append({**SENT, "key": "k", "endpoint": "e", "call": "9"})
        # But for its line feed, the last record may be whole, and then it counts.
        assert len(store.replies("k")) == (2 if cut == -1 else 1)
        assert store.unreadable == (0 if cut == -1 else 1)
    again = JudgeStore(path)
    again.refresh()
    assert (again.spent, again.unreadable) == (store.spent, store.unreadable)
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    "line",
    [
        b"\0\0\0\0",
        b"{}",
        b"[]",
        b"null",
        b'{"event": "reply"}',
        b"\xff\xfe",
        b"{" * 9999,
        b'{"event": "x", "call": 1}',
    ],
)
def test_a_line_that_is_no_record_is_skipped_with_a_warning(tmp_path, line, caplog):
    path = tmp_path / "s.jsonl"
    written(path, SENT)
    with open(path, "ab") as file:
        file.write(line + b"\n")
    written(path, REPLY)
    store = JudgeStore(path)
    store.refresh()
    assert (store.unreadable, len(store.replies("k"))) == (1, 1)
    assert "torn" in caplog.text


def test_what_is_stored_is_what_came_back_and_no_question(tmp_path):
    with JudgeServer(lambda body: '{"scores": [7, 3]}') as server:
        client = JudgeClient(Endpoint(server.base_url, "judge"), tmp_path / "deep" / "s.jsonl", show_progress=False)
        client.ask([request("A private question", ["a private answer", "b"])])
    text = (tmp_path / "deep" / "s.jsonl").read_text()
    sent, reply = map(json.loads, text.splitlines())
    assert "private" not in text
    assert (sent["event"], reply["event"], reply["text"], reply["status"]) == (
        "sent",
        "reply",
        '{"scores": [7, 3]}',
        "ok",
    )
    assert (
        sent["key"]
        == reply["key"]
        == request_key(client.endpoint, request("A private question", ["a private answer", "b"]))
    )


def test_a_folder_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        JudgeStore(tmp_path)


HOLDER = """
    import sys, time
    from trl_dt2it.judge.store import JudgeStore
    with JudgeStore(sys.argv[1]).opened():
        print("open", flush=True)
        time.sleep(60)
"""


def test_two_processes_do_not_share_a_store_and_a_killed_one_leaves_it_free(tmp_path):
    path = tmp_path / "s.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "open\n"
        try:
            with pytest.raises(JudgeError, match="Another run is writing to the store"):
                JudgeClient(ENDPOINT, path).ask([])
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    assert JudgeClient(ENDPOINT, path).ask([]) == []


def test_two_clients_take_turns_at_one_store(tmp_path):
    path = tmp_path / "s.jsonl"
    with JudgeServer(lambda body: '{"scores": [7, 3]}') as server:
        one = JudgeClient(Endpoint(server.base_url, "one"), path, show_progress=False)
        two = JudgeClient(Endpoint(server.base_url, "two"), path, show_progress=False)
        for client, cached in ((one, False), (two, False), (one, True), (two, True)):
            (reply,) = client.ask([request()])
            assert (reply.status, reply.is_cached) == ("ok", cached)
        assert len(server.requests) == one.usage().calls == two.usage().calls == 2


def test_a_full_disk_is_one_clear_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    store = JudgeStore(tmp_path / "s.jsonl")
    with store.opened():
        real = store._file
        store._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(JudgeError, match="cannot be written .* free some space"):
            store.append({**SENT, "key": "k", "endpoint": "e"})
        store._file.close()
        store._file = real


def test_reading_is_fast(tmp_path):
    path = tmp_path / "s.jsonl"
    lines = [json.dumps({**REPLY, "key": f"{n:064x}", "endpoint": "e", "call": str(n)}) for n in range(20_000)]
    path.write_text("\n".join(lines) + "\n")
    start = time.perf_counter()
    store = JudgeStore(path)
    store.refresh()
    assert len(store.replies(f"{19_999:064x}")) == 1 and store.spent.tokens == 240_000
    assert time.perf_counter() - start < 5
