"""A real server in a process of its own on 127.0.0.1, for as long as a benchmark asks it something."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(
    command: Sequence[str], port: int, log: Path, *, within: float, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """
    Starts a server, waits until it answers, and stops it in the end with all its processes.

    Args:
        command (`Sequence[str]`):
            Program and arguments, with the host and the port.
        port (`int`):
            The port that it is told to listen on.
        log (`Path`):
            File for all that it prints.
        within (`float`):
            Seconds in which it has to answer `GET /health`; otherwise the benchmark ends with the end of the log.
        environment (`Mapping[str, str]`, *optional*):
            Variables that are set besides those of this process.
    """
    print("$", " ".join(command), flush=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + within
        while not _answers(port):
            if time.monotonic() > deadline or process.poll() is not None:
                sys.exit(f"The server did not start; the end of {log}:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        _stop(process)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
            return True
    except OSError:
        return False


def _stop(process: subprocess.Popen, patience: float = 30.0) -> None:
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        pass
    try:  # it may have workers that outlive it
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
