"""Kills trainings with curation between their epochs at random moments, resumes them, and compares what comes out.

Started by `test_callback.py`, and with more kills by `benchmarks/callback_kills.py`. Every training runs in processes
that are forked from this one, which has imported everything and computes nothing itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any


NUM_PAIRS = 24


def train(rank: int, world_size: int, folder: Path, base: str, resume: str | None, tell: int) -> None:
    """One process of a training; the first one writes a byte to `tell` when it begins, and one for each step."""
    import torch

    from tests.rows import make_dataset
    from trl_dt2it import MultimodalRewardConfig, MultimodalRewardTrainer
    from trl_dt2it.curation import Flip, IterativeCurationCallback, Keep, flip_weakest_half, keep_confident

    torch.set_num_threads(1)
    args = MultimodalRewardConfig(
        str(folder),
        per_device_train_batch_size=4 // world_size,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        num_train_epochs=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        neftune_noise_alpha=3.0,  # so that a step depends on the random state
        save_steps=2,
        save_total_limit=2,
    )
    data = make_dataset(
        NUM_PAIRS,
        strength=[float(i % 5) for i in range(NUM_PAIRS)],
        source=["a", "b", "b"] * (NUM_PAIRS // 3),
        pair_id=[f"pair-{i}" for i in range(NUM_PAIRS)],
        row_index=list(range(NUM_PAIRS)),
    )
    trainer = MultimodalRewardTrainer(base, args=args, train_dataset=data)
    rules = [Flip(flip_weakest_half), Keep(keep_confident)]
    trainer.add_callback(
        # With a round before the first step, in which one process and two have the same model.
        IterativeCurationCallback(trainer, start_epoch=0, rules=rules, ledger=folder / "ledger", refresh_strength=True)
    )
    drawn: list[int] = []
    compute_loss = trainer.compute_loss

    def recording(model: Any, inputs: dict, *rest: Any, **options: Any) -> Any:
        drawn.extend(inputs["pairs"]["row_index"].tolist())
        if rank == 0:
            os.write(tell, b".")
        return compute_loss(model, inputs, *rest, **options)

    trainer.compute_loss = recording  # type: ignore[method-assign]
    if rank == 0:
        os.write(tell, b".")
    trainer.train(resume_from_checkpoint=resume)
    if rank == 0:
        trainer.save_model(str(folder / "final"))
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    (folder / f"drawn_{rank}.json").write_text(json.dumps(drawn))
    trainer.end()


def run(
    world_size: int,
    folder: Path,
    base: str,
    resume: str | None = None,
    kill_at: float | None = None,
    step_seconds: float = 0.0,
) -> float | None:
    """
    Trains, and gives the seconds from beginning to end; or kills all processes, and gives `None`.

    `kill_at=3.4` kills 0.4 times `step_seconds` after the third step began.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    begun, tell = os.pipe()
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if world_size > 1:
                    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
                    os.environ |= {name: str(value) for name, value in settings.items()}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
                with (folder / f"output_{rank}.txt").open("a") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                train(rank, world_size, folder, base, resume, tell)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    os.close(tell)
    os.read(begun, 1)
    start = time.perf_counter()
    if kill_at is not None:
        for _ in range(int(kill_at)):
            os.read(begun, 1)  # nothing, if the process has ended
        time.sleep(kill_at % 1 * step_seconds)
        for child in children:
            os.kill(child, signal.SIGKILL)
    ends = [os.waitpid(child, 0)[1] for child in children]
    os.close(begun)
    if any(end == signal.SIGKILL for end in ends):
        return None
    if any(ends):
        raise RuntimeError((folder / "output_0.txt").read_text()[-3000:])
    return time.perf_counter() - start


def last_whole_checkpoint(folder: Path, world_size: int) -> Path | None:
    """The last checkpoint that was written to its end, by all processes."""
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        # The trainer writes nothing else beside and after the state but these, of the other processes.
        sizes = [path.stat().st_size for name in names if (path := checkpoint / name).is_file()]
        if len(sizes) == world_size and min(sizes) > 10_000:
            return checkpoint
    return None


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs have to agree in: weights, the ledger with the hash of each round, and the log."""
    log = json.loads((folder / "log.json").read_text())
    uncompared = {"num_tokens", "total_flos"}  # TRL counts tokens from where it resumes
    log = [{k: v for k, v in entry.items() if k not in uncompared} for entry in log if "train_runtime" not in entry]
    ledger = {path.name: path.read_bytes() for path in sorted((folder / "ledger").iterdir())}
    return {"weights": (folder / "final" / "model.safetensors").read_bytes(), "ledger": ledger, "log": log}


def main(folder: Path, base: str, world_size: int, kills: int, seed: int) -> None:
    import datasets  # noqa: F401  (before the processes are forked)
    import torch  # noqa: F401

    import trl_dt2it.curation.callback
    import trl_dt2it.reward_trainer  # noqa: F401

    whole = folder / "whole"
    seconds = run(world_size, whole, base)
    assert seconds is not None
    expected = outcome(whole)
    steps = max(entry["step"] for entry in expected["log"])
    rng, results = random.Random(seed), []
    for number in range(kills):
        one = folder / f"kill-{number}"
        kill_at = (steps + 1) * (number + rng.random()) / kills  # all over the run
        while run(world_size, one, base, kill_at=kill_at, step_seconds=seconds / steps) is not None:
            kill_at -= 0.25  # it came to its end before
        checkpoint = last_whole_checkpoint(one, world_size)
        rounds = len(list((one / "ledger").glob("round-*.parquet")))
        run(world_size, one, base, resume=None if checkpoint is None else str(checkpoint))
        actual = outcome(one)
        results.append(
            {
                "killed_at": kill_at,
                "resumed_from": 0 if checkpoint is None else int(checkpoint.name.split("-")[1]),
                "rounds_at_kill": rounds,
                **{f"same_{name}": actual[name] == expected[name] for name in expected},
            }
        )
        print(json.dumps(results[-1]), flush=True)
    (folder / "result.json").write_text(
        json.dumps(
            {
                "seconds": seconds,
                "steps": steps,
                "kills": results,
                "log": expected["log"],
                "first_round": hashlib.sha256(expected["ledger"]["round-00001-epoch.parquet"]).hexdigest(),
                "drawn": [json.loads((whole / f"drawn_{rank}.json").read_text()) for rank in range(world_size)],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]))
