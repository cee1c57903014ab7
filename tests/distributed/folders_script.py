"""Two processes of which the second is pointed at another folder, as on machines that share no file system; and four
on two such machines, which make what each machine needs. Started by `test_folders.py`."""

import json
import os
import sys
from pathlib import Path


def on_another_folder(here: Path, base: str) -> dict[str, str]:
    """Messages of each part that reads a shared folder, first where it is shared, then where it is not."""
    import numpy as np
    from datasets import Dataset

    from tests.rows import make_dataset
    from tests.trainers import config
    from trl_dt2it import MultimodalRewardTrainer, processes
    from trl_dt2it.curation.rounds.stages import Stage, run_stages
    from trl_dt2it.recipe import share_work
    from trl_dt2it.scoring.shards import add_rewards, make_records

    rank = share_work().process_index
    processes.check_shared_folder.__defaults__ = (0.5,)
    data, stage = make_dataset(4), Stage("one", lambda folder: {"pairs": 1}, {})

    def score(rows: Dataset, name: str) -> np.ndarray:
        return np.zeros((len(rows), 2), dtype=np.float32)

    def train(folder: Path) -> None:
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
        MultimodalRewardTrainer(base, args=config(folder, **best), train_dataset=data, eval_dataset=data)

    calls = {
        "rounds": lambda folder: run_stages([stage], folder),
        "scores": lambda folder: add_rewards(data, lambda: score, output_dir=folder, settings={}),
        "records": lambda folder: make_records(folder / "a.jsonl", ["x"], lambda rows: [{}], batch_size=1, desc="a"),
        "training": train,
    }
    said = {}
    for name, call in calls.items():
        call(here / name / "shared")
        try:
            call(here / name / str(rank))
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)

    def fail() -> None:
        raise ValueError("The folder holds something else.")

    try:
        processes.on_main_process(fail)
    except (RuntimeError, ValueError) as error:
        said["decided"] = str(error)
    return said


def once_per_machine(here: Path) -> list[str]:
    """Which processes made the tiny model, of four on two machines with a folder each."""
    from trl_dt2it.demo import tiny

    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    machine, build = here / str(rank // 2), tiny.build_tiny_vlm
    machine.mkdir(exist_ok=True)

    def building(folder, **kwargs):
        (machine / f"made-by-{rank}").touch()
        build(folder, hidden_size=32, num_layers=1, vision_hidden_size=32, vision_depth=1, **kwargs)

    tiny.build_tiny_vlm = building
    from trl_dt2it.recipe import share_work, with_tiny

    share_work()
    path = with_tiny("tiny-qwen3-vl", machine, 0)
    return sorted(file.name for file in Path(path).parent.glob("made-by-*"))


def main(folder: str, base: str) -> None:
    from accelerate import PartialState

    here, rank = Path(folder), os.environ["RANK"]
    found = on_another_folder(here, base) if os.environ["WORLD_SIZE"] == "2" else once_per_machine(here)
    (here / f"said-{rank}.json").write_text(json.dumps(found))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
