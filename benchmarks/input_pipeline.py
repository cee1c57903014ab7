"""How fast does the collator make batches, against TRL's for images, and how long does a training step wait for data?

Pairs/s of `MultimodalPreferenceCollator` and of TRL's `DataCollatorForVisionPreference` on the same pairs with 512 x
512 images, from the same data set of encoded images, decoding included, and from images that are decoded already; one
thread, in turn. Then a short training with one worker: the time that a step spends waiting for its batch.

Prints tables and writes `benchmarks/results/input_pipeline.{json,md}`.

usage: python benchmarks/input_pipeline.py [RUNS]
"""

import copy
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset, Image, List
from lib.report import in_turn, markdown, ratio, write
from lib.vlm import load, rows_of
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from trl_dt2it import MultimodalPreferenceCollator, MultimodalRewardConfig, MultimodalRewardTrainer
from trl_dt2it.data.columns import leave_images_encoded


PAIRS, BATCH = 32, 4


def dataset_of(rows: list[dict]) -> Dataset:
    """Rows with their images as PNG bytes, to be decoded when they are read."""
    rows = [
        {**row, "images": [{"bytes": Path(path).read_bytes(), "path": None} for path in row["images"]]} for row in rows
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def measure_collators(processor, dataset: Dataset, runs: int) -> dict[str, dict[str, float]]:
    ours = MultimodalPreferenceCollator(processor, share_prefix=True)
    theirs = DataCollatorForVisionPreference(processor)
    decoded = list(dataset)
    for row in decoded:
        for image in row["images"]:
            image.load()

    def run(collator, rows) -> None:
        for start in range(0, PAIRS, BATCH):
            collator([rows[index] for index in range(start, start + BATCH)])

    class Copies(list):
        """Rows that a collator may write into, as TRL's does; copying them shares the images."""

        def __getitem__(self, index):
            return copy.copy(super().__getitem__(index))

    found = {}
    for source, our_rows, their_rows in (
        ("encoded", leave_images_encoded(dataset), dataset),
        ("decoded", Copies(decoded), Copies(decoded)),
    ):
        seconds = in_turn({"ours": lambda r=our_rows: run(ours, r), "TRL": lambda r=their_rows: run(theirs, r)}, runs)
        speed = {name: PAIRS / median(values) for name, values in seconds.items()}
        found[source] = {**speed, "faster_by": ratio(seconds["TRL"], seconds["ours"])}
    return found


class Waiting(MultimodalRewardTrainer):
    """Takes the time that steps wait for data."""

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.waited.append(time.perf_counter() - start)
        return batches


def measure_waiting(directory: Path, dataset: Dataset) -> dict[str, float]:
    args = MultimodalRewardConfig(
        str(directory / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=8,
        dataloader_num_workers=1,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Waiting(str(directory), args=args, train_dataset=dataset)
    trainer.waited = []
    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start
    # The first batch waits for the worker to start, which has nothing to do with a step.
    waited = sum(trainer.waited[1:])
    steps = len(trainer.waited)
    return {
        "share": waited / (total - trainer.waited[0]),
        "waited_ms_a_step": 1000 * waited / (steps - 1),
        "steps": steps,
    }


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        _, processor = load(directory)
        dataset = dataset_of(rows_of(directory, "300/135", PAIRS))
        torch.set_num_threads(1)
        collators = measure_collators(processor, dataset, runs)
        torch.set_num_threads(2)
        waiting = measure_waiting(directory, dataset)
    table = [
        [source, *(f"{found[name]:.0f}" for name in ("ours", "TRL")), f"{found['faster_by']:.2f}x"]
        for source, found in collators.items()
    ]
    lines = [f"Pairs with a 512 x 512 image, batches of {BATCH}, one thread, medians of {runs} runs in turn.", ""]
    lines += [markdown(["images", "ours, pairs/s", "TRL, pairs/s", "faster by"], table), ""]
    lines += [
        f"Training with one worker: a step waits {waiting['waited_ms_a_step']:.1f} ms for its batch, "
        f"{waiting['share']:.2%} of the time."
    ]
    write("input_pipeline", "\n".join(lines), {"collators": collators, "waiting": waiting, "runs": runs})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
