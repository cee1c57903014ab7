"""Does a rounds run that is killed anywhere end like one that is not, on one process and on two?

Runs `recipes/dt2it.py` with few pairs and few steps, kills all its processes (SIGKILL) after a random time, runs it
again, and so on, until 20 kills have struck; whenever a run comes to its end, weights, scores, ledger and figures are
compared bit by bit with those of a run that nobody kills, and a new run begins. Prints a table and writes
`benchmarks/results/rounds_kills.{json,md}`. Fails if a run differs.

usage: python benchmarks/rounds_kills.py [KILLS]
"""

import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from lib.report import markdown, write

from tests.curation.runs import arguments, outcome, start


def struck_stage(printed: str) -> str:
    """The stage that was under way, without its numbers."""
    lines = re.findall(r"^\d+/\d+ (\S+)( \.\.\.| done)", printed, re.MULTILINE)
    if not lines:
        return "before the first stage"
    name, state = lines[-1]
    kind = next(word for word in ("base-model", "train", "score", "decide", "final", "test") if word in name)
    return kind if state == " ..." else "between stages"


def kill_often(folder: Path, num_processes: int, num_kills: int) -> dict:
    rng = random.Random(num_processes)
    options = {"per_device_train_batch_size": 8 // num_processes}
    begun = time.monotonic()
    start(arguments(folder / "calm", **options), num_processes).finish()
    seconds, expected = time.monotonic() - begun, outcome(folder / "calm")
    struck: Counter[str] = Counter()
    compared, differing, number = 0, 0, 0
    while struck.total() < num_kills or (folder / f"killed-{number}").exists():
        output = folder / f"killed-{number}"
        run = start(arguments(output, **options), num_processes)
        if struck.total() < num_kills:
            deadline = time.monotonic() + rng.uniform(0, seconds)
            while time.monotonic() < deadline and not (output / "summary.json").is_file():
                time.sleep(0.002)
            if not (output / "summary.json").is_file():
                run.kill()
                struck[struck_stage(run.output)] += 1
                continue
        run.finish()
        compared, number = compared + 1, number + 1
        found = outcome(output)
        differing += found != expected
        if found != expected:
            print(output, [name for name in {**expected, **found} if expected.get(name) != found.get(name)])
        print(f"{num_processes} processes: {struck.total()} kills, {compared} runs at their end, {differing} differ")
    return {
        "processes": num_processes,
        "seconds": round(seconds, 1),
        "kills": struck.total(),
        "struck": dict(struck.most_common()),
        "files": len(expected) - 2,
        "compared": compared,
        "differing": differing,
    }


def main(num_kills: int) -> None:
    rows = []
    for num_processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(kill_often(Path(folder), num_processes, num_kills))
    cells = [
        [
            *(str(row[name]) for name in ("processes", "kills")),
            ", ".join(f"{name} {count}" for name, count in row["struck"].items()),
            *(str(row[name]) for name in ("compared", "files", "differing")),
        ]
        for row in rows
    ]
    header = ["processes", "kills", "struck in", "runs compared", "files each", "runs that differ"]
    write("rounds_kills", markdown(header, cells), {"rows": rows})
    if any(row["differing"] for row in rows):
        sys.exit("A killed run ended unlike the one that was not killed.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
