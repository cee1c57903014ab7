"""An OpenAI-compatible chat server on 127.0.0.1, with every way to fail that the client has to bear.

```python
with JudgeServer(lambda body: '{"scores": [7, 3]}') as server:
    client = JudgeClient(Endpoint(server.base_url, "judge"), "judge.jsonl")
```
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """
    A reply that is not a plain text.

    Parameters:
        status (`int`): Status of the HTTP reply.
        body (`dict`, `str` or `None`): What the reply holds; by default an error, or a chat completion at status 200.
        headers (`dict`): Headers of the reply.
        hang (`float`): Seconds before the reply.
        cut (`bool`): Whether the connection ends in the middle of the reply.
        close (`bool`): Whether it ends before the reply.
        text, refusal, finish_reason: Parts of the chat completion; the text may be a list of parts.
        message (`dict`): More fields of its message, such as `reasoning_content`.
        usage (`dict`, *optional*): Its token counts, if not the server's own; `{}` for none.
    """

    status: int = 200
    body: Any = None
    headers: dict = field(default_factory=dict)
    hang: float = 0.0
    cut: bool = False
    close: bool = False
    text: str | list | None = None
    refusal: str | None = None
    finish_reason: str | None = "stop"
    message: dict = field(default_factory=dict)
    usage: dict | None = None


@dataclass
class Received:
    """A request, when it came, and what the server has charged for it."""

    body: dict
    headers: dict
    time: float
    charged: int = 0  # tokens
    is_open: bool = True  # until the whole reply is handed to the system


def texts_of(body: dict) -> str:
    """All text of a request's messages."""
    contents = [message["content"] for message in body["messages"]]
    parts = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in contents]
    return "\n".join(part["text"] for content in parts for part in content if part["type"] == "text")


class JudgeServer:
    """
    The server, as a context manager.

    Args:
        answer (`Callable[[dict], str | Fault]`):
            Gets the body of a request and gives the text of the reply, or a [`Fault`]. It runs in several threads.
    """

    def __init__(self, answer: Callable[[dict], str | Fault]) -> None:
        self.answer = answer
        self.requests: list[Received] = []
        self.lock = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self) -> "JudgeServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def charged(self) -> int:
        """Tokens of all requests that the server would charge for."""
        with self.lock:
            return sum(request.charged for request in self.requests)

    @property
    def num_open(self) -> int:
        """Number of requests whose reply is not sent."""
        with self.lock:
            return sum(request.is_open for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: JudgeServer

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        received = Received(
            json.loads(content), {name.lower(): value for name, value in self.headers.items()}, time.monotonic()
        )
        with self.owner.lock:
            self.owner.requests.append(received)
        try:
            self._reply(received)
        except OSError:
            self.close_connection = True  # the client has gone
        finally:
            received.is_open = False

    def _reply(self, received: Received) -> None:
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": "no such page"}})
        answer = self.owner.answer(received.body)
        fault = Fault(text=answer) if isinstance(answer, str) else answer
        if fault.status == 200:
            completion = self._completion(received.body, fault)
            # As a provider does, who charges for what was made, whether it arrives or not.
            received.charged = sum((completion.get("usage") or {}).values())
        if fault.hang:
            self.owner._stopping.wait(fault.hang)
        if fault.close:
            self.close_connection = True
            return None
        if fault.body is not None:
            body = fault.body
        else:
            body = completion if fault.status == 200 else {"error": {"message": f"fault {fault.status}"}}
        return self._send(fault.status, body, fault.headers, fault.cut)

    def _completion(self, body: dict, fault: Fault) -> dict:
        message = {"role": "assistant", "content": fault.text, "refusal": fault.refusal, **fault.message}
        usage = {"prompt_tokens": len(texts_of(body)) // 3, "completion_tokens": len(fault.text or "") // 3 + 1}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": fault.finish_reason}],
            "usage": usage if fault.usage is None else fault.usage or None,
        }

    def _send(self, status: int, body: Any, headers: dict | None = None, cut: bool = False) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(body, str) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True
