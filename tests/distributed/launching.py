"""Starting a script in this folder on one process or on several, over gloo on the loopback interface."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from ..families import family_dir


ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def launch(script: str, num_processes: int, *arguments: str) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", str(HERE / script), *arguments]
    if num_processes == 1:
        command = [sys.executable, str(HERE / script), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def train(output: Path, num_processes: int, per_device: int, family: str, **options) -> dict:
    launch(
        "train_script.py", num_processes, str(output), str(family_dir(family)), str(per_device), json.dumps(options)
    )
    return json.loads((output / "result.json").read_text())
