"""Does the blind audit find text that gives the answer away, do its intervals hold, and how long does it take?

First on digits with planted shortcuts, which no style feature sees: the blind accuracy beside the share of pairs that
the shortcut is right in, and the leakage of style. Then on drawn texts: how often the interval holds the accuracy that
the probe of the whole set reaches on new pairs, of which about 19,000 are drawn. Short answers with a favored opening;
long ones; many words that each tell a little; four answers of one question, which make six pairs; and questions about
two images with a favored position, as drawn and with positions in exact balance. Then on 10,000 and 100,000 pairs with
answers of about 100 words: seconds and peak of the process's own memory, in a process of its own.

Prints tables and writes `benchmarks/results/blind_audit.{json,md,png}`. Fails if a blind accuracy is more than 0.02
from what was planted, if intervals of style do not hold 0.5 in more than 3 of 36 sets or blind ones in more than 1 of
the 9 without shortcut, if coverage is below 0.93 by more than twice what is chance, or if 100,000 pairs take more than
90 seconds or 2 GiB.

usage: python benchmarks/blind_audit.py [SETS]
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
from lib.report import RESULTS, interval_coverage, markdown, write
from scipy.special import expit

from trl_dt2it.data.messages import FEATURES, preference
from trl_dt2it.debias import audit_blind, audit_style
from trl_dt2it.debias.audit import wins
from trl_dt2it.debias.blind import fit_probe, measure_text, read_pair_text
from trl_dt2it.demo.digits import SHORTCUTS, make_digits


STRENGTHS, SEEDS, DIGITS_PAIRS = (0.5, 0.7, 0.8, 0.9), (1, 2, 3), 3000
POOL, WIDTH = 20_000, 0.02
# Design, strength, pairs of a set, and whether positions are in exact balance.
CELLS = [
    *(("short answers", strength, count, False) for strength in (0.5, 0.6, 0.75, 0.9) for count in (300, 1000)),
    *(("long answers", strength, 400, False) for strength in (0.5, 0.7)),
    *(("many words", strength, count, False) for strength in (0.1, 0.3) for count in (300, 1000)),
    *(("groups of 6", strength, 1200, False) for strength in (0.0, 0.3)),
    *(("two images", strength, 400, False) for strength in (0.5, 0.6)),
    ("two images", 0.5, 400, True),
]
QUESTIONS = [f"{one} is {two}?" for one in ("what", "where", "which", "whose") for two in "abcdefghij"]
SIZES = (10_000, 100_000)


def planted() -> list[dict]:
    """Audit digits with each shortcut."""
    found = []
    for kind in SHORTCUTS:
        for strength in STRENGTHS:
            for seed in SEEDS:
                rows = make_digits(
                    "train", DIGITS_PAIRS, seed=seed, num_digits=(1, 2), shortcut=kind, shortcut_strength=strength
                )
                report, style = audit_blind(rows), audit_style(rows).overall
                if (kind, strength, seed) == ("question_answer", 0.9, 1):
                    report.plot(RESULTS / "blind_audit.png")
                found.append(
                    {
                        "kind": kind,
                        "strength": strength,
                        "seed": seed,
                        "planted": float(np.mean([side == "shortcut" for side in rows["style_chosen"]])),
                        "accuracy": report.overall.accuracy,
                        "interval": report.overall.interval,
                        "top": report.overall.ngrams[0].label,
                        "style": style.auc,
                        "style_interval": style.interval,
                    }
                )
    return found


def drawn_words(rng: np.random.Generator, vocabulary: int, count: int, slope: float = 1.0) -> np.ndarray:
    """Words by a power law of their rank."""
    chance = np.arange(1, vocabulary + 1) ** -slope
    return rng.choice(vocabulary, count, p=chance / chance.sum())


def sentence(words: np.ndarray) -> str:
    return " ".join(f"w{word:x}" for word in words) + "."


def pool(design: str, strength: float, rng: np.random.Generator) -> tuple[list[tuple[str, str, str]], list[int]]:
    """Questions with the better and the worse answer, and their groups."""
    rows: list[tuple[str, str, str]] = []
    group: list[int] = []
    log_odds = rng.normal(size=2000) * strength
    while len(rows) < POOL:
        question, is_better = str(rng.choice(QUESTIONS)), rng.random() < strength
        if design == "groups of 6":
            answers = [drawn_words(rng, 200, 6, 0.5) for _ in range(4)]
            quality = [float(log_odds[words].sum() + rng.gumbel()) for words in answers]
            texts = [sentence(answers[index]) for index in np.argsort(quality)[::-1]]
            rows += [(question, texts[a], texts[b]) for b in range(4) for a in range(b)]
            group += [len(group)] * 6
            continue
        if design == "many words":
            pair = [drawn_words(rng, 2000, 12, 0.7) for _ in range(2)]
            is_better = rng.random() < expit(log_odds[pair[0]].sum() - log_odds[pair[1]].sum())
            texts = list(map(sentence, pair))
        elif design == "two images":
            question = f"Which image shows it better? {sentence(drawn_words(rng, 300, 5))}"
            texts = ["Image 1 is better than Image 2.", "Image 2 is better than Image 1."]
        else:
            vocabulary, low, high = (300, 3, 7) if design == "short answers" else (5000, 30, 80)
            texts = [
                f"{start} {sentence(drawn_words(rng, vocabulary, rng.integers(low, high)))}" for start in ("So", "As")
            ]
        rows.append((question, *(texts if is_better else texts[::-1])))
        group.append(len(group))
    return rows, group


def coverage(design: str, strength: float, count: int, is_balanced: bool, sets: int) -> dict:
    """Measure the intervals of sets drawn from a pool, whose other pairs are the new ones."""
    rows, group = pool(design, strength, np.random.default_rng(0))
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))
    numbers = np.unique(group, return_inverse=True)[1]
    text = read_pair_text(Dataset.from_dict(columns), np.ones(len(rows)), numbers)
    is_first = np.array([chosen.startswith("Image 1") for _, chosen, _ in rows])
    found = []
    for index in range(sets):
        order = np.random.default_rng([index, count]).permutation(numbers.max() + 1)[numbers]
        if is_balanced:
            sides = [np.flatnonzero(is_first == side) for side in (True, False)]
            inside = np.concatenate([side[np.argsort(order[side])[: count // 2]] for side in sides])
        else:
            inside = np.flatnonzero(order < count * (order.max() + 1) / len(order))
        inside, is_new = np.sort(inside), np.ones(len(rows), dtype=bool)
        is_new[inside] = False
        one = text.take(inside)
        accuracy, interval, penalty = measure_text(one, 10, seed=index)
        probe = np.zeros(text.x.shape[1])
        probe[np.searchsorted(text.bucket, one.bucket)] = fit_probe(one.x, one.weight, penalty)
        found.append([*interval, accuracy, wins(text.x @ probe)[is_new].mean()])
    about = {"design": design + (", in balance" if is_balanced else ""), "strength": strength, "pairs": count}
    return {**about, **interval_coverage(*np.array(found).T)}


def answers(count: int):
    """Rows of three sources with a favored opening, and words by a power law of their rank."""
    rng, np_rng = random.Random(0), np.random.default_rng(0)
    picture = rng.randbytes(10_000)
    for index in range(count):
        words = drawn_words(np_rng, 20_000, 240)
        length, other = rng.randint(60, 120), rng.randint(60, 120)
        texts = [f"Here {sentence(words[:length])}", f"Then {sentence(words[120 : 120 + other])}"]
        row = preference(
            f"What is {sentence(words[:3])} in picture {index % 1000}?",
            *(texts if rng.random() < 0.7 else texts[::-1]),
            [{"bytes": picture, "path": None}],
            group=f"group-{index // 3}",
        )
        yield {**row, "pair_id": f"row-{index}", "source": ("alpha", "beta", "gamma")[index % 3]}


def timed(folder: str) -> dict:
    """Audit in this process, and tell how long it took and how much memory it had."""
    rows = load_from_disk(folder)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
            peak = max(peak, int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, used = time.perf_counter(), time.process_time()
    accuracy = audit_blind(rows).overall.accuracy
    taken = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}
    done.set()
    watcher.join()
    return {"pairs": len(rows), **taken, "memory": peak, "accuracy": accuracy}


def scale() -> list[dict]:
    runs = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            made = Dataset.from_generator(
                answers, gen_kwargs={"count": size}, features=FEATURES, cache_dir=f"{folder}/cache"
            )
            made.save_to_disk(f"{folder}/rows")
            call = [sys.executable, __file__, "--timed", f"{folder}/rows"]
            runs.append(
                json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            )
            print(runs[-1], flush=True)
    return runs


def shown(interval: list[float]) -> str:
    return "{:.3f} to {:.3f}".format(*interval)


def main(sets: int) -> None:
    runs = scale()
    found = planted()
    cells = [
        [one["kind"], f"{one['strength']:.1f}", str(one["seed"]), f"{one['planted']:.3f}", f"{one['accuracy']:.3f}"]
        + [shown(one["interval"]), one["top"], f"{one['style']:.3f}", shown(one["style_interval"])]
        for one in found
    ]
    heads = ("shortcut", "strength", "seed", "planted", "blind accuracy", "95 % interval")
    text = f"{DIGITS_PAIRS:,} digits pairs. Planted: share of pairs whose chosen answer has the shortcut.\n\n"
    text += markdown((*heads, "top n-gram", "style (AUC)", "95 % interval of style"), cells)
    text += "\n\n![audit of a question-answer habit](blind_audit.png)\n\n"
    print(text, flush=True)
    record = []
    for cell in CELLS:
        record.append(coverage(*cell, sets))
        print(record[-1], flush=True)
    keys = ("reached", "estimate", "coverage", "below", "above", "width")
    cells = [
        [one["design"], f"{one['strength']:.2f}", f"{one['pairs']:,}", *(f"{one[key]:.3f}" for key in keys)]
        for one in record
    ]
    covered = [one["coverage"] for one in record]
    names = ("reached", "mean accuracy", "holds the truth", "below it", "above it", "width")
    text += (
        f'{sets} sets a line. Nominal: 0.950; chance alone is {np.sqrt(0.95 * 0.05 / sets):.3f}. "Reached" is the '
        "mean accuracy on new pairs of the probes fitted on the sets. Strength: chance of the favored opening or "
        "position, or standard deviation of the log odds of a word.\n\n"
        f"{markdown(('design', 'strength', 'pairs', *names), cells)}\n\n"
        f"Coverage is {np.mean(covered):.3f} in the mean, {min(covered):.3f} at least, {max(covered):.3f} at most.\n\n"
    )
    cells = [
        [f"{run['pairs']:,}", f"{run['seconds']:.0f}", f"{run['processor_seconds']:.0f}"]
        + [f"{run['memory'] / 2**20:,.0f}", f"{run['accuracy']:.3f}"]
        for run in runs
    ]
    text += markdown(("pairs", "seconds", "processor seconds", "own memory, MB", "accuracy (0.7 planted)"), cells)
    text += "\n\nAnswers of about 90 words, images of 10 kB, three sources, each measured too."
    write("blind_audit", text, {"digits": found, "sets": sets, "coverage": record, "runs": runs})
    wrong = [one for one in found if one["strength"] > 0.5 and abs(one["accuracy"] - one["planted"]) > WIDTH]
    styled = sum(not one["style_interval"][0] <= 0.5 <= one["style_interval"][1] for one in found)
    nulls = sum(not one["interval"][0] <= 0.5 <= one["interval"][1] for one in found if one["strength"] == 0.5)
    if wrong or styled > 3 or nulls > 1:
        sys.exit(f"Planted shortcuts are not found as they are: {wrong}, style {styled}, nulls {nulls}.")
    if min(covered) < 0.93 - 2 * np.sqrt(0.95 * 0.05 / sets):
        sys.exit(f"Coverage is {min(covered):.3f}.")
    if any(run["seconds"] > 90 or run["memory"] > 2**31 for run in runs):
        sys.exit("100,000 pairs took too long, or too much memory.")


if __name__ == "__main__":
    if "--timed" in sys.argv:
        print(json.dumps(timed(sys.argv[2])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
