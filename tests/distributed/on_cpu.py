"""Runs a script as `accelerate launch` starts it, with DeepSpeed and FSDP2 on CPUs: `on_cpu.py SCRIPT ...`."""

import os
import runpy
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402  (here and below: after the path is set, for `tests`)

from tests.distributed.launches import let_deepspeed_run_on_cpu, let_fsdp_run_on_cpu  # noqa: E402


torch.set_num_threads(1)
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    let_fsdp_run_on_cpu()
    torch.distributed.init_process_group("gloo")
elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    let_deepspeed_run_on_cpu()
    import deepspeed

    deepspeed.init_distributed("gloo")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
