"""Runs of the rounds' recipe that can be killed. Run as a script, it is a process that has imported everything and
forks the processes of a run for every line it reads, because imports take longer than the runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
RULES = [{"flip": "flip_negative"}]
SETTINGS = {
    "base": {"clean": {"digits": {"num_pairs": 24}}},
    "pool": {"a": {"digits": {"num_pairs": 32, "noise": 0.35}}, "b": {"digits": {"num_pairs": 16, "noise": 0.2}}},
    "test": {"clean": {"digits": {"split": "test", "num_pairs": 8}}},
    "rounds": [
        {"rules": RULES},
        {"rules": [*RULES, {"keep": "keep_confident", "share": 0.8}], "orientation": "current"},
    ],
    "final": ["curated"],
    "balance_style": "false",  # of so few pairs it cannot be
    "max_steps": 4,
    "lr_scheduler_type": "constant",  # with rates that fall to 0, a step too many would not show
    "rows_per_shard": 16,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "per_device_train_batch_size": 4,
}


def arguments(output_dir: Path, **settings) -> list[str]:
    """The command line of a run of few pairs and few steps."""
    flags = ["--config", str(ROOT / "recipes/configs/dt2it_digits.yaml"), "--output_dir", str(output_dir)]
    for name, value in {**SETTINGS, **settings}.items():
        flags += [f"--{name}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return flags


def load_recipe(name: str = "dt2it"):
    spec = spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def outcome(output_dir: Path) -> dict[str, Any]:
    """What has to be the same, however often a run was killed: weights, scores, ledger, figures."""
    files = [*output_dir.rglob("*.safetensors"), *output_dir.rglob("*.parquet"), output_dir / "ledger/ledger.json"]
    digests = {str(file.relative_to(output_dir)): sha256(file.read_bytes()).hexdigest() for file in sorted(files)}
    summary = json.loads((output_dir / "summary.json").read_text())
    timeless = json.dumps({name: value for name, value in summary.items() if name != "seconds"})
    left = [str(one) for one in output_dir.rglob("checkpoint-*")]
    return {**digests, "summary": json.loads(timeless.replace(str(output_dir), "OUT")), "left": left}


class Forker:
    """The process that forks, as a context manager gives it."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.pids: list[int] = []

    def start(self, flags: list[str], num_processes: int, log: Path, **environment: str) -> None:
        """Starts a run; `finish` has to be called next."""
        task = {"flags": flags, "num_processes": num_processes, "log": str(log), "environment": environment}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.pids = json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        """Kills all processes of the run."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)

    def finish(self) -> list[int]:
        """Waits for the run's end and gives the exit codes, negative for a signal."""
        return json.loads(self.process.stdout.readline())

    def run(self, flags: list[str], num_processes: int, log: Path, **environment: str) -> None:
        """A run that nobody kills."""
        self.start(flags, num_processes, log, **environment)
        codes = self.finish()
        assert codes == [0] * num_processes, log.read_text()[-3000:]

    def kill_when(self, is_time: Callable[[], bool], timeout: float = 60.0) -> bool:
        """Kills the run as soon as something is so; says whether it came to that."""
        deadline = time.monotonic() + timeout
        while not is_time():
            if time.monotonic() > deadline:
                break
            time.sleep(0.0005)
        self.kill()
        return self.finish() == [-signal.SIGKILL] * len(self.pids)


@contextmanager
def forker() -> Iterator[Forker]:
    """Starts and ends the process that forks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    command = [sys.executable, "-m", "tests.curation.runs"]
    with subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield Forker(process)
        finally:
            process.stdin.close()


def fork(task: dict, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        count = task["num_processes"]
        if count > 1:  # what a launcher sets
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= task["environment"]
        recipe = load_recipe()
        recipe.main(*recipe.make_parser().parse_args_and_config(task["flags"]))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def say(word: object) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main() -> None:
    import openai  # noqa: F401
    import torch

    import trl_dt2it.curation.rounds  # noqa: F401
    import trl_dt2it.demo.digits
    import trl_dt2it.judge.client  # noqa: F401

    torch.set_num_threads(1)
    load_recipe()
    trl_dt2it.demo.digits.make_digits("train", 1)  # imports as it goes
    say("ready")
    for line in sys.stdin:
        task = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [fork(task, rank, port) for rank in range(task["num_processes"])]
        say(json.dumps(children))
        say(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    main()
