"""Kills trainings with curation between their epochs at random moments, resumes them, and compares what comes out; for
`test_callback.py`, and with more kills for `benchmarks/callback_kills.py`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from trl_dt2it import MultimodalRewardTrainer
from trl_dt2it.curation import Flip, IterativeCurationCallback, Keep, flip_weakest_half, keep_confident

from ..processes import Run
from ..rows import make_dataset
from ..trainers import config


NUM_PAIRS = 24


def train(world_size: int, folder: Path, base: str, resume: str | None) -> None:
    """One process of a training; the first one writes a byte into `begun` when it begins, and one for each step."""
    rank = int(os.environ.get("RANK", 0))
    args = config(
        folder,
        per_device_train_batch_size=4 // world_size,
        per_device_eval_batch_size=4,
        num_train_epochs=4,
        gradient_checkpointing=False,
        neftune_noise_alpha=3.0,  # so that a step depends on the random state
        save_strategy="steps",
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
            tell_begun(folder)
        return compute_loss(model, inputs, *rest, **options)

    trainer.compute_loss = recording  # type: ignore[method-assign]
    if rank == 0:
        tell_begun(folder)
    trainer.train(resume_from_checkpoint=resume)
    if rank == 0:
        trainer.save_model(str(folder / "final"))
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    (folder / f"drawn_{rank}.json").write_text(json.dumps(drawn))
    trainer.end()


def tell_begun(folder: Path) -> None:
    with (folder / "begun").open("ab") as file:
        file.write(b".")


def num_begun(folder: Path) -> int:
    return (folder / "begun").stat().st_size if (folder / "begun").is_file() else 0


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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    started = Run(train, world_size, folder, base, resume, num_processes=world_size)

    def wait_for(number: int) -> None:
        while num_begun(folder) < number and None in started.exit_codes:
            time.sleep(0.0005)

    wait_for(1)
    start = time.perf_counter()
    if kill_at is not None:
        wait_for(1 + int(kill_at))
        time.sleep(kill_at % 1 * step_seconds)
        started.kill()
        if -signal.SIGKILL in started.exit_codes:
            return None
    started.finish()
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


def kill_runs(folder: Path, base: str, world_size: int, kills: int, seed: int) -> dict[str, Any]:
    """Figures of a run that nobody kills, and of each that was killed and resumed."""
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
        print(json.dumps(results[-1]), flush=True)  # noqa: T201 (the benchmark takes long)
    return {
        "seconds": seconds,
        "steps": steps,
        "kills": results,
        "log": expected["log"],
        "first_round": hashlib.sha256(expected["ledger"]["round-00001-epoch.parquet"]).hexdigest(),
        "drawn": [json.loads((whole / f"drawn_{rank}.json").read_text()) for rank in range(world_size)],
    }
