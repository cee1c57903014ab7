"""How long do the decisions about millions of pairs take, and how much memory?

For 100,000, 1,000,000 and 10,000,000 pairs, scored by 3 models and from 5 sources, a process of its own reads names,
sources and rewards from a Parquet file, combines the models, fits the noise of each source, flips and filters, and
writes the decisions into a ledger. Then another one opens the ledger, with 4 such rounds, and gives the state of all
pairs. A third of the labels are wrong. Seconds are without imports, and so is what the imports alone take of the
memory given beside its peak, which is the process's largest resident size.

Prints a table and writes `benchmarks/results/curation_scale.{json,md}`.

usage: python benchmarks/curation_scale.py [PAIRS ...]
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.report import markdown, write


SIZES = (100_000, 1_000_000, 10_000_000)
NUM_MODELS, NUM_SOURCES, NUM_ROUNDS = 3, 5, 4
STAGES = ("read", "combine", "decide", "write")


def make(path: Path, count: int) -> None:
    """Writes scores of pairs, part by part."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    names = pa.array([f"source-{index}" for index in range(NUM_SOURCES)])
    writer = None
    for start in range(0, count, 1_000_000):
        size = min(1_000_000, count - start)
        sign = np.where(rng.random(size) < 0.33, -1.0, 1.0)
        truth = rng.normal(1.0, 0.8, size)
        columns = {
            "pair_id": pa.array([f"digits-train-{index:012d}" for index in range(start, start + size)]),
            "source": pa.DictionaryArray.from_arrays(rng.integers(0, NUM_SOURCES, size).astype("int8"), names),
        }
        for model in range(NUM_MODELS):
            difference = sign * (truth + rng.normal(0.0, 0.6, size)) * (1 + model)
            base = rng.normal(0.0, 1.0, size)
            columns[f"chosen_{model}"] = pa.array((base + difference / 2).astype(np.float32))
            columns[f"rejected_{model}"] = pa.array((base - difference / 2).astype(np.float32))
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def decisions(path: Path) -> dict:
    """Reads, combines, decides and writes, and says how long each took."""
    import numpy as np
    import pyarrow.parquet as pq

    from trl_dt2it.curation import CurationLedger
    from trl_dt2it.curation.noise import combine_scores, flip_mixture
    from trl_dt2it.curation.rules import Flip, Keep, decide, keep_consistent

    imported, cpu, marks = peak(), time.process_time(), [time.perf_counter()]
    table = pq.read_table(path)
    count = len(table)
    scores = np.empty((count, 2, NUM_MODELS), dtype=np.float32)
    for model in range(NUM_MODELS):
        for side, name in enumerate(("chosen", "rejected")):
            scores[:, side, model] = table[f"{name}_{model}"].to_numpy()
    table = table.select(["pair_id", "source"])
    marks.append(time.perf_counter())
    strength = combine_scores(scores, "zscore")
    marks.append(time.perf_counter())
    rules = [Flip(flip_mixture, by="source"), Keep(keep_consistent)]
    decision = decide(strength, rules, source=table["source"])
    marks.append(time.perf_counter())
    CurationLedger(path.parent / "ledger").append(
        1,
        "flip",
        pair_ids=table["pair_id"],
        sources=table["source"],
        scores=scores,
        models=[f"model-{model}" for model in range(NUM_MODELS)],
        decision=decision,
    )
    marks.append(time.perf_counter())
    seconds = dict(zip(STAGES, np.diff(marks).tolist(), strict=True))
    record = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "counts": decision.counts()}
    return {**record, "memory": {"imported": imported, "peak": peak()}}


def state(path: Path) -> dict:
    """Gives the state of all pairs after several rounds."""
    from trl_dt2it.curation import CurationLedger

    ledger = CurationLedger(path.parent / "ledger")
    imported, cpu, start = peak(), time.process_time(), time.perf_counter()
    found = ledger.state()
    assert len(found) > 0
    seconds = {"seconds": {"state": time.perf_counter() - start}, "cpu_seconds": time.process_time() - cpu}
    return {**seconds, "memory": {"imported": imported, "peak": peak()}}


def more_rounds(path: Path) -> None:
    """Rounds 2 to 4: the names of the first, in the same order, in another, and a part of them."""
    import numpy as np
    import pyarrow.parquet as pq

    from trl_dt2it.curation import CurationLedger
    from trl_dt2it.curation.rules import Keep, decide, keep_consistent

    ledger = CurationLedger(path.parent / "ledger")
    names = pq.read_table(path, columns=["pair_id"])["pair_id"]
    rng = np.random.default_rng(1)
    orders = [np.arange(len(names)), rng.permutation(len(names)), np.arange(0, len(names), 2)]
    for round_, order in enumerate(orders, 2):
        decision = decide(rng.normal(1.0, 1.0, len(order)), [Keep(keep_consistent)])
        ledger.append(round_, "filter", pair_ids=names.take(order), decision=decision)


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(sizes: list[int]) -> None:
    records = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            call = [sys.executable, __file__, "--file", str(Path(folder) / "scores.parquet")]
            subprocess.run([*call, "--make", str(size)], check=True)
            record = {"pairs": size}
            for part in ("decisions", "state"):
                out = subprocess.run([*call, f"--{part}"], check=True, capture_output=True, text=True).stdout
                record[part] = json.loads(out.splitlines()[-1])
                if part == "decisions":
                    subprocess.run([*call, "--more-rounds"], check=True)
            records.append(record)
            print(record, flush=True)
    names = ["pairs", *(f"{stage}, s" for stage in STAGES), "all, s", "CPU s", "MB imported", "MB at the peak"]
    names += [f"state of {NUM_ROUNDS} rounds, s", "its CPU s", "MB at its peak"]
    cells = []
    for record in records:
        made, found = record["decisions"], record["state"]
        cells.append(
            [
                f"{record['pairs']:,}",
                *(f"{made['seconds'][stage]:.2f}" for stage in STAGES),
                f"{sum(made['seconds'].values()):.2f}",
                f"{made['cpu_seconds']:.2f}",
                *(f"{made['memory'][when] / 2**20:.0f}" for when in ("imported", "peak")),
                f"{found['seconds']['state']:.2f}",
                f"{found['cpu_seconds']:.2f}",
                f"{found['memory']['peak'] / 2**20:.0f}",
            ]
        )
    note = f"\n\n{NUM_MODELS} models, {NUM_SOURCES} sources: z-scores, a noise rate per source, flips, filter, ledger."
    write("curation_scale", markdown(names, cells) + note, {"runs": records})


if __name__ == "__main__":
    if "--make" in sys.argv:
        make(Path(sys.argv[2]), int(sys.argv[4]))
    elif "--decisions" in sys.argv:
        print(json.dumps(decisions(Path(sys.argv[2]))))
    elif "--more-rounds" in sys.argv:
        more_rounds(Path(sys.argv[2]))
    elif "--state" in sys.argv:
        print(json.dumps(state(Path(sys.argv[2]))))
    else:
        main([int(size) for size in sys.argv[1:]] or list(SIZES))
