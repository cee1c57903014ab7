"""The page about serving: its client against a server that reads requests as vLLM does, its merge, its line and JSON.

The server is a stand-in that tests can start in no time: it renders with the processor of the directory, and reads the
reward with transformers' Auto class. The real one is asked by `benchmarks/vllm_parity.py`, with the same blocks.
"""

import base64
import io
import json
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoProcessor

from trl_dt2it import RewardScorer

from .families import example_images
from .rows import make_dataset
from .test_docs import ROOT, code_blocks, replaced
from .trainers import trainer_for


PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
MODEL = "outputs/my-reward-model"


@contextmanager
def server(directory: str, requests: list[dict]) -> Iterator[str]:
    """Answers `POST /classify`, and keeps what it was sent."""
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, **body})
            probs = [reward_of(body, processor, model)]
            data = [{"index": 0, "label": "LABEL_0", "probs": probs, "num_classes": 1}]
            answer = json.dumps({"object": "list", "model": body["model"], "data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


@torch.no_grad()
def reward_of(body: dict, processor, model) -> float:
    images, messages = [], []
    for message in body["messages"]:
        blocks = []
        for block in message["content"]:
            if block["type"] == "image_url":
                kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", block["image_url"]["url"]).groups()
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                assert image.format.lower() == kind
                images.append(image.convert("RGB"))
                block = {"type": "image"}
            blocks.append(block)
        messages.append({**message, "content": blocks})
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=body["add_generation_prompt"])
    inputs = processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False)
    return model(**inputs).logits.item()


@pytest.fixture
def merged(tmp_path, monkeypatch) -> Path:
    """An adapter where the page has one, merged with the page's block."""
    monkeypatch.chdir(tmp_path)
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"], init_lora_weights=False)
    trainer = trainer_for("qwen3_vl", "run", make_dataset(2), args={"max_pixels": 1600}, peft_config=lora)
    trainer.save_model("outputs/my-adapter")
    (block,) = [block for block in code_blocks("python", PAGE) if "merge_and_unload" in block]
    exec(compile(block, "docs", "exec"), {})
    return tmp_path


def test_the_adapter_is_merged_and_the_client_gets_the_rewards_of_the_scorer(merged, capsys):
    (photo,) = example_images(1)
    photo.resize((90, 70)).save("photo.jpg")  # more than the limit of training
    (client,) = [block for block in code_blocks("python", PAGE) if "urlopen" in block]
    requests: list[dict] = []
    with server(MODEL, requests) as address:
        capsys.readouterr()
        exec(compile(replaced(client, "http://127.0.0.1:8000", address), "docs", "exec"), {})
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.strip().splitlines()]
    answers = [answer for _, answer in lines]
    assert answers == ["Two cats asleep on a sofa.", "A dog."]
    adapter = RewardScorer.from_pretrained("outputs/my-adapter", dtype="float32")
    expected = adapter.score("What do you see?", answers, [Path("photo.jpg").read_bytes()])
    assert abs(expected[0] - expected[1]) > 1e-3
    assert [float(reward) for reward, _ in lines] == pytest.approx(expected, abs=1e-4)

    # The body on the page is what the client sends.
    body, reply = map(json.loads, code_blocks("json", PAGE))
    sent = requests[0]
    assert sent.pop("path") == "/classify"
    url = sent["messages"][0]["content"][0]["image_url"].pop("url")
    assert url.startswith("data:image/jpeg;base64,")
    assert body["messages"][0]["content"][0]["image_url"].pop("url") == "data:image/png;base64,..."
    assert body == sent and body["add_generation_prompt"] is False
    assert isinstance(reply["data"][0]["probs"][0], float)


def test_the_line_that_serves():
    line, check = code_blocks("bash", PAGE)
    assert check.startswith("trl-dt2it score ") and check.endswith(" --server http://127.0.0.1:8000\n")
    assert shlex.split(line) == ["vllm", "serve", MODEL, "--runner", "pooling"]
    assert re.search(r"`vllm serve [^`]+ --runner pooling`, then `POST /classify`", (ROOT / "README.md").read_text())
    card = (ROOT / "trl_dt2it/templates/model_card.md").read_text()
    assert "Or serve it: {{ serve }}, then `POST /classify`." in card  # filled in as code
    assert (
        "vllm serve {shlex.quote(hub_model_id)} --runner pooling"
        in (ROOT / "trl_dt2it/training/model_card.py").read_text()
    )
