"""Golden training: what the trainer and its callbacks log, and what is in a checkpoint and in a saved adapter."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file

from tests.curation.trainings import Known, N, data
from tests.evaluation.benchmark_rows import VL_PREFIXES
from tests.trainers import trainer_for
from trl_dt2it import MultimodalRewardTrainer
from trl_dt2it.curation import Flip, IterativeCurationCallback, Keep, flip_mixture, flip_negative, keep_confident
from trl_dt2it.debias import StyleAuditCallback, audit_style
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.evaluation import eval_datasets

from .golden import check
from .pairs_of_each_kind import PNG
from .tables import files


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[MultimodalRewardTrainer, object]:
    """One short training with everything that logs and saves."""
    folder = tmp_path_factory.mktemp("golden")
    rows = data(num_images=(0,), source=["a"] * (N - 2) + ["b"] * 2)
    ids = [f"{prefix}{number}" for number, prefix in enumerate(VL_PREFIXES)]
    answers = {"query": "What?", "response": ["A cup.", "A hat."], "human_ranking": [0, 1], "image": PNG[0]}
    benchmarks = eval_datasets({"vl-rewardbench": [{"id": name, **answers} for name in ids]})
    args = {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch", "logging_steps": 3}
    trainer = trainer_for(
        "qwen3_vl",
        folder / "run",
        rows,
        args,
        eval_dataset={"held_out": rows, **benchmarks},
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    wrong = Flip(partial(flip_negative, margin=0.5))
    rules = [Flip(flip_mixture, by="source", min_pairs=5), wrong, Keep(keep_confident)]
    options = {"refresh_strength": True, "only_sources": ["a"], "ledger": folder / "ledger"}
    scorer = Known([float(i - 2) for i in range(N)])
    trainer.add_callback(IterativeCurationCallback(trainer, scorer=scorer, rules=rules, **options))
    trainer.add_callback(StyleAuditCallback(trainer))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so small a model, threads that wait for each other take most of the time
    trainer.train()
    torch.set_num_threads(threads)
    return trainer, folder


def test_names_of_metrics(trained):
    """Those that transformers adds to a log are left out."""
    times = ("_runtime", "_per_second", "epoch", "step", "total_flos", "train_loss")
    logged = [sorted(name for name in entry if not name.endswith(times)) for entry in trained[0].state.log_history]
    check("metrics", sorted(set(map(tuple, filter(None, logged)))))


def test_names_of_style_metrics():
    """Of which so few pairs as above have none."""
    rows = make_digits("train", 240, style_bias=0.9)
    rewards = {"chosen_reward": [1.0, 0.0] * 120, "rejected_reward": [0.0, 0.5] * 120}
    for name, values in rewards.items():
        rows = rows.add_column(name, values)
    check("style_metrics", list(audit_style(rows).metrics()))


def test_a_checkpoint(trained):
    trainer, folder = trained
    checkpoint = folder / "run" / f"checkpoint-{trainer.state.global_step}"
    arrays = load_file(checkpoint / "curation_state.safetensors")
    rounds = json.loads((folder / "ledger" / "ledger.json").read_text())["rounds"]
    adapter = json.loads((checkpoint / "adapter_config.json").read_text())
    weights = load_file(checkpoint / "adapter_model.safetensors")
    names = ("peft_type", "task_type", "modules_to_save", "auto_mapping")
    ours = ("curation_state.json", "curation_state.safetensors")
    found = {
        "files": [name for name in files(checkpoint) if name.startswith(("adapter", "curation", "training"))],
        ours[0]: json.loads((checkpoint / ours[0]).read_text()),
        ours[1]: {name: [str(array.dtype), array.tolist()] for name, array in sorted(arrays.items())},
        "rounds": [{name: value for name, value in entry.items() if name != "sha256"} for entry in rounds],
        "adapter": {name: adapter.get(name) for name in names},
        "weights": {name: [str(array.dtype), *array.shape] for name, array in sorted(weights.items())},
    }
    check("checkpoint", found)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".jinja", ".safetensors", ".parquet"):
            assert b"trl_dt2it." not in path.read_bytes(), path
