"""Is planted style bias found and taken away, and what does it cost on many pairs?

First on digits, where the better answer has the richer style in 90 % of the pairs: the leakage before and after
balancing, on groups that the probe has not seen, and also on groups that the weights were not made for. Then on
generated answers of about 100 words with images, 10,000 and 100,000 pairs: seconds and peak of the process's own
memory, in a process of its own for each, for an audit and for balancing.

Prints tables and writes `benchmarks/results/style_bias.{json,md,png}`. Fails if leakage is under 0.85 before or
outside of 0.48 to 0.52 after, if a weighted style mean reaches 1e-8 or a coefficient of the refitted probe 1e-6, or if
the audit and balancing of 100,000 pairs take 60 seconds.

usage: python benchmarks/style_bias.py [PAIRS ...]
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, load_from_disk
from lib.report import RESULTS, markdown, write

from trl_dt2it.data.messages import FEATURES
from trl_dt2it.debias import audit_style, balance_style, match_style, style_weights
from trl_dt2it.debias.audit import fit_probe, folds, root_mean_square, wins
from trl_dt2it.debias.balance import balance, whiten
from trl_dt2it.debias.style import read_pair_style
from trl_dt2it.demo.digits import make_digits


BIAS, DIGITS_PAIRS = 0.9, 4000
SIZES = (10_000, 100_000)
WORDS = (
    "the picture shows a red flower among green leaves and one old temple beside still water under blue sky with two "
    "people who walk along narrow path near wall I think perhaps it seems great bright small large"
).split()


def held_out_weights(rows: Dataset, num_folds: int = 5) -> float:
    """Accuracy of the shortcut on groups that neither it nor the weights have seen: these are a function of style."""
    style = read_pair_style(rows)
    directions, won, weight = whiten(style.difference), np.zeros(len(style)), np.zeros(len(style))
    columns = np.column_stack([directions, np.ones(len(style))])
    for train, test in folds(style.group, num_folds, seed=42):
        made, _ = balance(directions[train], np.ones(len(train)))
        exponent = np.linalg.lstsq(columns[train], np.log(made), rcond=None)[0]
        weight[test] = np.exp(columns[test] @ exponent)
        won[test] = wins(style.difference[test] @ fit_probe(style.take(train)))
    return float(weight @ won / weight.sum())


def planted() -> dict:
    """Leakage of the biased digits before and after each way to mend them."""
    rows = make_digits("train", DIGITS_PAIRS, style_bias=BIAS)
    audit_style(rows).plot(RESULTS / "style_bias.png")
    weight, report = style_weights(rows)
    sets = {
        "as it is": rows,
        "weights": balance_style(rows),
        "weights up to 3": balance_style(rows, max_weight=3.0),
        "resampled": balance_style(rows, method="resample"),
        "matched": match_style(rows),
    }
    found = {}
    for name, one in sets.items():
        style, leakage = read_pair_style(one), audit_style(one).overall
        share = style.weight / style.weight.sum()
        found[name] = {
            "pairs": len(one),
            "effective": float(1 / (share**2).sum()),
            "auc": leakage.auc,
            "interval": leakage.interval,
            "mean": float(np.abs(share @ style.difference).max()),
            "coefficient": float(np.abs(fit_probe(style) * root_mean_square(style)).max()),
        }
    return {"sets": found, "held_out": held_out_weights(rows), "largest_weight": float(report.max_weight)}


def answers(count: int):
    """Rows whose chosen answer is longer, and in bold, more often than not."""
    rng = random.Random(0)
    picture = rng.randbytes(10_000)

    def answer(is_rich: bool) -> str:
        words = rng.choices(WORDS, k=rng.randint(60, 120) + 30 * is_rich)
        for place in rng.sample(range(len(words)), 3 * is_rich):
            words[place] = f"**{words[place]}**"
        for place in range(12, len(words), rng.randint(9, 15)):
            words[place] += rng.choice([".", ".", ",", "!", ".\n\n", "\n- "])
        return " ".join(words) + "."

    for index in range(count):
        is_rich = rng.random() < 0.7
        yield {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": f"What is in picture {index}?"},
                    ],
                }
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": answer(is_rich)}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": answer(not is_rich)}]}],
            "images": [{"bytes": picture, "path": None}],
            "strength": None,
            "pair_id": f"row-{index}",
            "group_id": f"group-{index // 3}",
            "source": ("alpha", "beta", "gamma")[index % 3],
            "source_id": str(index),
        }


def timed(stage: str, folder: str) -> dict:
    """Runs a stage in this process and says how long it took and how much memory it had."""
    rows = load_from_disk(folder)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if stage == "audit":
        outcome = f"AUC {audit_style(rows).overall.auc:.3f}"
    else:
        outcome = f"largest weight {max(balance_style(rows)['weight']):.1f}"
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"stage": stage, "pairs": len(rows), "seconds": seconds, "memory": peak, "outcome": outcome}


def main(sizes: list[int]) -> None:
    found, runs = planted(), []
    names = [
        "digits",
        "pairs",
        "effective",
        "leakage (AUC)",
        "95 % interval",
        "largest style mean",
        "largest coefficient",
    ]
    cells = [
        [
            name,
            f"{one['pairs']:,}",
            f"{one['effective']:,.0f}",
            f"{one['auc']:.3f}",
            f"{one['interval'][0]:.3f} to {one['interval'][1]:.3f}",
            f"{one['mean']:.1e}",
            f"{one['coefficient']:.1e}",
        ]
        for name, one in found["sets"].items()
    ]
    text = (
        f"The better answer has the richer style in {BIAS:.0%} of the pairs. Leakage: accuracy on unseen groups of a "
        f"probe that sees style alone. Means and coefficients are of the whole set, the probe fitted under its "
        f"weights; coefficients are log odds per root mean square of a difference.\n\n{markdown(names, cells)}\n\n"
        f"Of the shortcut in the biased set, {found['held_out']:.3f} is left on groups that the weights were not made "
        "for (five folds; 0.5 is none).\n\n![audit of the biased set](style_bias.png)\n\n"
    )
    print(text, flush=True)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            made = Dataset.from_generator(
                answers, gen_kwargs={"count": size}, features=FEATURES, cache_dir=f"{folder}/cache"
            )
            made.save_to_disk(f"{folder}/rows")
            for stage in ("audit", "balance"):
                call = [sys.executable, __file__, "--stage", stage, f"{folder}/rows"]
                out = subprocess.run(call, check=True, capture_output=True, text=True).stdout
                runs.append(json.loads(out.splitlines()[-1]))
                print(runs[-1], flush=True)
    cells = [
        [run["stage"], f"{run['pairs']:,}", f"{run['seconds']:.1f}", f"{run['memory'] / 2**20:.0f}", run["outcome"]]
        for run in sorted(runs, key=lambda run: (run["stage"], run["pairs"]))
    ]
    text += markdown(["stage", "pairs", "seconds", "own memory, MB", "outcome"], cells)
    text += "\n\nAnswers of about 100 words, images of 10 kB, three sources; the audit measures each of them too."
    write("style_bias", text, {**found, "runs": runs})
    before, after = found["sets"]["as it is"], found["sets"]["weights"]
    if before["auc"] < 0.85 or not 0.48 <= after["auc"] <= 0.52 or not 0.48 <= found["held_out"] <= 0.52:
        sys.exit("Leakage is not what it should be.")
    if after["mean"] >= 1e-8 or after["coefficient"] >= 1e-6:
        sys.exit("Balance is not exact.")
    if sum(run["seconds"] for run in runs if run["pairs"] == 100_000) >= 60:
        sys.exit("100,000 pairs took a minute or more.")


if __name__ == "__main__":
    if "--stage" in sys.argv:
        print(json.dumps(timed(sys.argv[2], sys.argv[3])))
    else:
        main([int(size) for size in sys.argv[1:]] or list(SIZES))
