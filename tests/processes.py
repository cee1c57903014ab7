"""Starting scripts and recipes in processes of their own without paying for their imports again and again.

torch, transformers and TRL take some ten seconds of a core to import, longer than most of what the tests run. So the
standard library's fork server imports them once for each process of pytest, and forks the processes of each run: on
one process, or on several over gloo on the loopback interface, with what a launcher sets in the environment. They can
be watched, waited for and killed like any other. Real launchers are tested in `test_recipes.py`,
`test_recipe_dt2it.py`, `test_accelerate_configs.py` and `test_cli.py`.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Of all that is imported only when it is used, what is used most. Not trackio, which chooses its store on import.
IMPORTED_ONCE = [
    "torch.distributed.fsdp",
    "trl_dt2it.training.trainer",
    "trl_dt2it.scoring.scorer",
    "trl_dt2it.curation.callback",
    "trl_dt2it.curation.rounds.run",
    "trl_dt2it.judge.client",
    "openai.resources.chat",
    "anyio._backends._asyncio",
    "trl_dt2it.demo.digits",
    "trl_dt2it.evaluation",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "sklearn.datasets",
    "PIL.PngImagePlugin",
    "matplotlib.backends.backend_svg",
]


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


class Run:
    """A run that was started: `function(*arguments)` in each of its processes."""

    def __init__(self, function: Callable, *arguments: object, num_processes: int = 1, **environment: str) -> None:
        self._streams = [tempfile.NamedTemporaryFile(prefix="run-", suffix=suffix) for suffix in (".out", ".err")]
        streams = [file.name for file in self._streams]
        given = {"OMP_NUM_THREADS": "1", **environment}
        if num_processes > 1:  # what a launcher sets
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            given |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        self.processes = []
        for rank in range(num_processes):
            own = {**given, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else given
            process = server().Process(target=_call, args=(streams, own, function, arguments))
            process.start()
            self.processes.append(process)

    @property
    def output(self) -> str:
        """What all its processes have printed so far."""
        return Path(self._streams[0].name).read_text(errors="replace")

    @property
    def errors(self) -> str:
        """What they have written to the stream of errors so far."""
        return Path(self._streams[1].name).read_text(errors="replace")

    @property
    def exit_codes(self) -> list[int | None]:
        """`None` for a process that runs, negative for one that was killed by a signal."""
        return [process.exitcode for process in self.processes]

    def send(self, number: int) -> None:
        """Sends a signal to all its processes."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> bool:
        """Kills all its processes; says whether none had come to its end before."""
        for process in self.processes:
            process.kill()
        for process in self.processes:  # only now, because one whose partner is gone fails by itself
            process.join()
        return self.exit_codes == [-signal.SIGKILL] * len(self.processes)

    def kill_when(self, is_time: Callable[[], bool], timeout: float = 120.0) -> bool:
        """Kills it as soon as something is so; says whether it came to that before its end."""
        deadline = time.monotonic() + timeout
        while not (is_now := is_time()) and None in self.exit_codes and time.monotonic() < deadline:
            time.sleep(0.0005)
        return self.kill() and is_now

    def wait(self, timeout: float = 240.0) -> list[int]:
        """
        Waits for its end and gives the exit codes.

        When one process fails, the others are killed, as by a launcher; and when it is late, all are, after they have
        written what each thread is doing to `errors`.
        """
        deadline = time.monotonic() + timeout
        while None in self.exit_codes:
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            is_late = not wait(running, max(0.0, deadline - time.monotonic()))
            if is_late:
                self.send(signal.SIGUSR1)
                time.sleep(1.0)
            if is_late or any(self.exit_codes):
                self.kill()
        return self.exit_codes

    def finish(self, timeout: float = 240.0) -> str:
        """Waits for the end of a run that has to succeed, and gives its output."""
        codes = self.wait(timeout)
        assert not any(codes), f"exit codes {codes}: {self.errors[-4000:]}"
        return self.output


def start_script(path: str | Path, *arguments: object, num_processes: int = 1, **environment: str) -> Run:
    """Starts a script as `python path arguments...` would."""
    return Run(_run_script, str(path), list(map(str, arguments)), num_processes=num_processes, **environment)


def _run_script(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _call(streams: list[str], environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    """Runs in the process that was forked."""
    gc.freeze()  # so that no collection, of which each training makes several, looks at all that is imported
    import torch

    for number, name in enumerate(streams, 1):
        with open(name, "a") as file:
            os.dup2(file.fileno(), number)
    faulthandler.register(signal.SIGUSR1, file=2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if a shell started pytest in the background
    os.environ |= environment
    torch.set_num_threads(1)
    function(*arguments)
