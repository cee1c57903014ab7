"""The check of a server: passed by one that serves the model, and failed, in a sentence, by those that err."""

import base64
import io
import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoProcessor

from trl_dt2it import RewardScorer, load_reward_model
from trl_dt2it.cli import main
from trl_dt2it.data import write_parquet
from trl_dt2it.demo import READER_DIR
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.scoring import check_server
from trl_dt2it.scoring.server import ServerCheck

from ..rows import make_dataset
from ..test_docs_serving import reward_of


PAIRS = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A reader of digits with a head of large weights, so that every image has its reward."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = load_reward_model(READER_DIR, dtype="float32")
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(READER_DIR).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(directory):
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    return AutoProcessor.from_pretrained(directory), model


@pytest.fixture(scope="module")
def scorer(directory) -> RewardScorer:
    return RewardScorer.from_pretrained(directory, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pairs():
    return make_digits("test", 20, num_digits=(1, 2))


@contextmanager
def serving(answer) -> Iterator[tuple[str, list]]:
    """Answers `POST /classify` with a status and a body, made of the body that was sent; keeps what it was sent."""
    requests: list[tuple[dict, dict]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((dict(self.headers), body))
            status, reply = answer(body) if self.path == "/classify" else (404, {"error": "no such page"})
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:9/classify")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", requests
    finally:
        http.shutdown()
        http.server_close()


def replies(probs: list) -> tuple[int, dict]:
    return 200, {"object": "list", "data": [{"index": 0, "label": "LABEL_0", "probs": probs, "num_classes": 1}]}


def without_pictures(body: dict) -> dict:
    """A request with one picture wherever there is any, as a server has it that loses them."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "white").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    for message in body["messages"]:
        message["content"] = [
            {**block, "image_url": {"url": url}} if "image_url" in block else block for block in message["content"]
        ]
    return body


def test_a_server_of_the_same_model_passes(model, scorer, pairs):
    with serving(lambda body: replies([reward_of(body, *model)])) as (address, requests):
        check = check_server(scorer, pairs, address + "/", num_pairs=PAIRS, tolerance=1e-3)
    assert check.problem is None and check.looks
    assert check.local.shape == check.served.shape == (PAIRS, 2, 2) and len(requests) == PAIRS * 4
    np.testing.assert_allclose(check.local, check.served, atol=1e-4)
    # The rewards of the rows themselves, and of their images made gray.
    np.testing.assert_allclose(check.local[..., 0], scorer.score_pairs(pairs.select(range(PAIRS))), atol=1e-4)
    assert np.abs(check.local[..., 0] - check.local[..., 1]).max() > 1
    assert check.names == pairs["pair_id"][:PAIRS]
    body = requests[0][1]
    assert set(body) == {"messages", "add_generation_prompt"} and not body["add_generation_prompt"]
    assert not {"Authorization"} & set(requests[0][0])
    assert check.table().row_count == 2 * PAIRS


def test_rewards_are_compared_as_they_are_though_the_scorer_normalizes(model, scorer, pairs):
    normalizing = RewardScorer(scorer.model, scorer.collator.processing_class)
    normalizing.normalization = [5.0, 3.0]
    with serving(lambda body: replies([reward_of(body, *model)])) as (address, _):
        check = check_server(normalizing, pairs, address, num_pairs=1, tolerance=1e-3)
    assert check.problem is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda reward: [1 / (1 + math.exp(-reward))], r"probabilities, the sigmoid .*regression.*use_activation"),
        (lambda reward: [1.0], r"probabilities, the softmax"),
        (
            lambda reward: [2 * reward],
            r"Rewards differ by up to [\d.]+, more than 0.01: of digits-test-\S+, `(chosen|rej)",
        ),
        (lambda reward: [reward + 0.02], r"Rewards differ by up to 0.02, more than 0.01"),
    ],
    ids=["sigmoid", "softmax", "scale", "shift"],
)
def test_a_server_of_other_rewards_is_told(model, scorer, pairs, change, told):
    with serving(lambda body: replies(change(reward_of(body, *model)))) as (address, _):
        check = check_server(scorer, pairs, address, num_pairs=PAIRS, tolerance=0.01)
    assert check.problem is not None
    assert re.search(told, check.problem), check.problem
    assert check.problem.count("\n") == 0


def test_a_server_that_loses_the_images_is_told(model, scorer, pairs):
    with serving(lambda body: replies([reward_of(without_pictures(body), *model)])) as (address, _):
        check = check_server(scorer, pairs, address, num_pairs=PAIRS)
    assert check.problem.startswith("The served reward does not change with the image (by 0 at most")


def made(local, served, tolerance=0.1) -> ServerCheck:
    return ServerCheck(["a"], np.array([local], float), np.array([served], float), tolerance)


def test_verdicts_by_hand():
    local = [[2.0, 1.0], [-1.0, 0.0]]
    assert made(local, local).problem is None and made(local, local).looks
    assert made(local, np.array(local) + 0.09).problem is None
    # Seen in part: not blind, but other rewards.
    assert "of a, `chosen` with its images, the server says 1.2000" in made(local, [[1.2, 1.0], [-1.0, -0.5]]).problem
    assert "`rejected` with blank images" in made(local, [[2.0, 1.0], [-1.0, 0.5]]).problem
    assert "does not change with the image" in made(local, [[1.0, 1.05], [0.0, 0.0]]).problem
    # A model that does not look tells nothing of the server.
    flat = [[0.6, 0.6], [0.5, 0.5]]
    assert made(flat, flat).problem is None and not made(flat, flat).looks
    # Rewards near the point where a sigmoid changes nothing are no probabilities.
    assert made([[0.66, 0.66], [0.65, 0.65]], [[0.66, 0.66], [0.65, 0.65]]).problem is None


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda body: (500, {"error": {"message": "out of memory"}}), "status 500: .*out of memory"),
        (lambda body: (404, b""), "status 404: Not Found; is the address that of `vllm serve"),
        (lambda body: (307, b""), "status 307"),
        (lambda body: (200, b"<html>"), "something else than a reward"),
        (lambda body: (200, {"data": []}), "something else than a reward"),
        (lambda body: (200, {"data": [{"embedding": [1.0]}]}), "something else than a reward"),
        (lambda body: replies([0.2, 0.8]), r"gives \[0.2, 0.8\] for an answer"),
        (lambda body: replies([float("nan")]), "not one finite reward"),
        (lambda body: time.sleep(3) or replies([0.0]), r"does not answer \(timed out\); start it, or correct"),
    ],
)
def test_a_server_that_does_not_answer_is_told_in_a_sentence(scorer, pairs, answer, told):
    with serving(answer) as (address, requests):
        with pytest.raises(RuntimeError, match=told) as found:
            check_server(scorer, pairs, address, num_pairs=1, timeout=1.0)
    assert address.removeprefix("http://") in str(found.value) and len(requests) == 1
    assert "\n" not in str(found.value)


def test_no_server(scorer, pairs):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(RuntimeError, match=r"does not answer \(.*refused.*\); start it"):
        check_server(scorer, pairs, address, num_pairs=1)


def test_key_model_and_misuse(scorer, pairs, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "sk-1")
    options = {"num_pairs": 1, "model": "mine", "api_key_env": "SERVER_KEY"}
    with serving(lambda body: replies([0.0])) as (address, requests):
        check_server(scorer, pairs, address, **options)
    headers, body = requests[0]
    assert headers["Authorization"] == "Bearer sk-1" and body["model"] == "mine"
    monkeypatch.delenv("SERVER_KEY")
    for changed, told in (
        ({}, "SERVER_KEY holds no key"),
        ({"api_key_env": "sk-secret"}, "must name an environment variable"),
        ({"api_key_env": None, "num_pairs": 0}, "`num_pairs` is 0"),
        ({"api_key_env": None, "tolerance": 0.0}, "`tolerance` is 0.0"),
    ):
        with pytest.raises(ValueError, match=told) as found:
            check_server(scorer, pairs, address, **{**options, **changed})
        assert "sk-secret" not in str(found.value)
    for wrong in ("localhost:8000", "ftp://a", "http://user:pw@a", "http://a?key=1"):
        with pytest.raises(ValueError, match="`server` must be an address") as found:
            check_server(scorer, pairs, wrong)
        assert "pw" not in str(found.value)
    with pytest.raises(ValueError, match="no row"):
        check_server(scorer, pairs.select([]), address)


def test_rows_with_images_are_taken_first(scorer):
    rows = make_dataset(6)  # of which some have no image, several, or several turns
    with serving(lambda body: replies([0.0])) as (address, requests):
        check = check_server(scorer, rows, address, num_pairs=4)
    has_image = [any("image_url" in str(message) for message in body["messages"]) for _, body in requests]
    assert all(has_image) and len(check.names) == min(4, sum(bool(images) for images in rows["images"]))


def test_by_command_line(model, directory, pairs, tmp_path, capsys):
    write_parquet(pairs, tmp_path / "pairs.parquet")
    flags = ["score", "--model", str(directory), "--dataset_name", str(tmp_path / "pairs.parquet")]
    flags += ["--server_pairs", "2", "--output_dir", str(tmp_path / "out"), "--server"]
    with serving(lambda body: replies([reward_of(body, *model)])) as (address, requests):
        assert main([*flags, address]) == 0
        out = capsys.readouterr().out
        assert "Rewards here and of the server" in out and "gives the rewards of this model, to 0.1." in out
        assert len(requests) == 8 and not (tmp_path / "out").exists()
        assert main([*flags, address, "--dry_run"]) == 0
        assert address in capsys.readouterr().out and len(requests) == 8
    with serving(lambda body: replies([reward_of(without_pictures(body), *model)])) as (address, _):
        with pytest.raises(SystemExit) as left:
            main([*flags, address])
    # A text as exit code is printed, and the code is 1.
    assert left.value.code.startswith("trl-dt2it score: The served reward does not change with the image")
    capsys.readouterr()
    assert main([*flags, "localhost"]) == 2
    assert main([*flags, address]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "score: " in line]
    assert len(error) == 2 and "`server` must be an address" in error[0] and "does not answer" in error[1]


def test_blank_images_have_the_size_of_the_images(scorer, pairs, monkeypatch):
    sizes: list = []
    new = Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *color: sizes.append(size) or new(mode, size, *color))
    with serving(lambda body: replies([0.0])) as (address, _):
        check_server(scorer, pairs, address, num_pairs=2)
    shown = [image.size for row in pairs.select(range(2)) for image in row["images"]]
    assert sizes[:2] == shown
