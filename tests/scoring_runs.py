"""Runs of `score_dataset` in processes of their own, which write down what the model sees, and can be killed."""

import json
import time
from collections import Counter
from pathlib import Path

from accelerate import PartialState

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.scoring.scorer import RewardScorer

from .processes import Run
from .rows import make_dataset


ROWS_PER_SHARD = 2


def start(model: Path, output: Path, num_processes: int, num_pairs: int = 12) -> Run:
    """Starts to score pairs into a folder, two in a file; slowly, as long as there is a file `slow` in it."""
    return Run(score, str(model), output, num_pairs, num_processes=num_processes)


def scored_pairs(output: Path) -> Counter:
    """How often the model saw each pair, in all runs into the folder."""
    return Counter(line for log in output.glob("log-*") for line in log.read_text().split())


def score(model: str, folder: Path, num_pairs: int) -> None:
    state = PartialState(cpu=True)
    folder.mkdir(parents=True, exist_ok=True)
    scorer = RewardScorer.from_pretrained(model, device="cpu")
    data = make_dataset(num_pairs, pair_id=[f"pair{i}" for i in range(num_pairs)])
    collate = scorer.collator

    class Logging(MultimodalPreferenceCollator):
        def __call__(self, examples):
            with open(folder / f"log-{state.process_index}", "a") as log:
                log.writelines(f"{example['pair_id']}\n" for example in examples)
            if (folder / "slow").exists():
                time.sleep(0.3)
            return super().__call__(examples)

    scorer.collator = Logging(collate.processing_class, share_prefix=collate.share_prefix)
    table = scorer.score_dataset(data, folder, rows_per_shard=ROWS_PER_SHARD)
    if state.is_main_process:
        pairs = list(zip(table["chosen_reward"], table["rejected_reward"], strict=True))
        (folder / "table.json").write_text(json.dumps(pairs))
