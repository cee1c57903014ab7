"""How fast are validation, reformulation and mixing, and does their memory grow with the number of rows?

Every stage runs in a process of its own on 10,000, 100,000 and 1,000,000 generated rows, whose images are small PNG
files in bytes, read from Arrow files on disk, with one process. Memory is the process's own (anonymous), without the
pages of files that the system caches as long as nobody else needs the room: with the imports done, with the set open
(`datasets` keeps some 15 kB for each 100 rows with images, whatever is done with them), and the peak of the stage.

Prints a table and writes `benchmarks/results/data_throughput.{json,md}`.

usage: python benchmarks/data_throughput.py [ROWS ...]
"""

import io
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from lib.report import markdown, write


STAGES = ("validate", "reformulate", "mix and split")
SIZES = (10_000, 100_000, 1_000_000)
SOURCES = ("alpha", "beta", "gamma")
PICTURES = 997  # different images; a prime, so that rows of a group differ in theirs


def pictures() -> list[bytes]:
    """Small PNG files."""
    import numpy as np
    from PIL import Image

    encoded = []
    for index in range(PICTURES):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((28, 28)).save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    return encoded


def canonical_rows(count: int):
    """Rows about every picture, 4 to a group; one in 50 has something wrong with it."""
    images, rng = pictures(), random.Random(0)
    for index in range(count):
        question = f"What is in picture {index // 4} of the album, and how many of them are there?"
        answers = [f"It shows {rng.randrange(10**6)} {thing}, seen from above." for thing in ("boats", "trees")]
        image = images[index % PICTURES]
        if index % 50 == 49:
            answers, image = [(["", answers[1]], image), ([answers[0]] * 2, image), (answers, image[:20])][
                rng.randrange(3)
            ]
        yield {
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": question}],
                }
            ],
            **{
                side: [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
                for side, answer in zip(("chosen", "rejected"), answers, strict=True)
            },
            "images": [{"bytes": image, "path": None}],
            "strength": rng.random(),
            "pair_id": f"row-{index}",
            "group_id": f"group-{index // 4}",
            "source": SOURCES[index % 3],
            "source_id": str(index),
        }


def t2i_rows(count: int):
    """Captions with two pictures."""
    images, rng = pictures(), random.Random(0)
    for index in range(count):
        yield {
            "caption": f"{rng.randrange(10**6)} boats on a lake, number {index}",
            "chosen_image": {"bytes": images[index % PICTURES], "path": None},
            "rejected_image": {"bytes": images[(index + 1) % PICTURES], "path": None},
            "strength": rng.random(),
            "pair_id": f"row-{index}",
            "group_id": f"group-{index // 4}",
            "source": SOURCES[index % 3],
            "source_id": str(index),
        }


def make(folder: Path, count: int) -> None:
    """Writes both kinds of rows."""
    from datasets import Dataset

    from trl_dt2it.data.messages import FEATURES, T2I_FEATURES

    for name, rows, features in (("rows", canonical_rows, FEATURES), ("t2i", t2i_rows, T2I_FEATURES)):
        made = Dataset.from_generator(
            rows, gen_kwargs={"count": count}, features=features, cache_dir=str(folder / "cache")
        )
        made.save_to_disk(folder / name)


def run(stage: str, folder: Path) -> dict:
    """Runs a stage in this process and says how long it took and how much memory it had."""
    import datasets
    from datasets import load_from_disk

    from trl_dt2it.data import mix, reformulate_t2i, split_by_group, validate

    datasets.disable_progress_bars()
    before = own_memory()
    given = load_from_disk(folder / ("t2i" if stage == "reformulate" else "rows"))
    memory = {"imported": before, "open": own_memory(), "peak": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            memory["peak"] = max(memory["peak"], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if stage == "validate":
        clean, quarantine = validate(given, show=False)
        rows_out = {"clean": len(clean), "quarantine": len(quarantine)}
    elif stage == "reformulate":
        rows_out = {"rows": len(reformulate_t2i(given))}
    else:
        import numpy as np

        from trl_dt2it.data.columns import column_of

        source = column_of(given, "source").to_numpy(zero_copy_only=False)
        parts = {name: given.select(np.flatnonzero(source == name)) for name in SOURCES}
        mixed = mix(parts, weights={"alpha": 2, "beta": 1, "gamma": 1}, max_per_group=1)
        rows_out = {name: len(rows) for name, rows in split_by_group(mixed, 0.01).items()}
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"seconds": seconds, "rows_in": len(given), "rows_out": rows_out, "memory": memory}


def own_memory() -> int:
    """Bytes of this process that are not pages of files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(sizes: list[int]) -> None:
    records = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            call = [sys.executable, __file__, "--folder", folder]
            subprocess.run([*call, "--make", str(size)], check=True)
            for stage in STAGES:
                out = subprocess.run([*call, "--stage", stage], check=True, capture_output=True, text=True).stdout
                records.append({"stage": stage, "rows": size, **json.loads(out.splitlines()[-1])})
                print(records[-1], flush=True)
    names = ["stage", "rows", "seconds", "rows/s", "MB imported", "MB open", "MB at the peak", "rows out"]
    cells = [
        [
            record["stage"],
            f"{record['rows']:,}",
            f"{record['seconds']:.1f}",
            f"{record['rows'] / record['seconds']:,.0f}",
            *(f"{record['memory'][when] / 2**20:.0f}" for when in ("imported", "open", "peak")),
            ", ".join(f"{count:,} {name}" for name, count in record["rows_out"].items()),
        ]
        for record in sorted(records, key=lambda record: (STAGES.index(record["stage"]), record["rows"]))
    ]
    write("data_throughput", markdown(names, cells) + "\n\nOne process, images as PNG bytes.", {"runs": records})


if __name__ == "__main__":
    if "--make" in sys.argv:
        make(Path(sys.argv[2]), int(sys.argv[4]))
    elif "--stage" in sys.argv:
        print(json.dumps(run(sys.argv[4], Path(sys.argv[2]))))
    else:
        main([int(size) for size in sys.argv[1:]] or list(SIZES))
