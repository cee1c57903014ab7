"""Does a reward model know what it does not know, and are the best of n answers better if it does?

A reward model is trained on a tenth of the pairs of `digits.yaml`, with `reward_posterior=True`, and two more likewise
with other seeds, for an ensemble of three trainings. On held-out handwriting the posterior and the ensemble state how
sure they are that the answer with the higher reward is the better one, which is compared with how often it is.

Then answers are drawn by a machine that knows nothing: eight of ten are read-outs like those of the training, and two
read two to four digits where one is written, in wordings that no training pair has; these are all wrong. Best of n
picks by the mean reward, or by the reward less `K` standard deviations, of the posterior or of the ensemble. Then the
same with eight of ten answers strange, of many more and longer ones, to see the reward chosen against. All settings,
`K` among them, were chosen before the first run; the second part was added after it, and its settings before its own.

Prints tables and writes `benchmarks/results/reward_uncertainty.{json,md,png}`. Fails if the posterior is worse
calibrated than the reward alone; whether pessimism helps is for the table to say.

usage: python benchmarks/reward_uncertainty.py [SEED ...]
"""

import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from lib.report import RESULTS, markdown, wall_seconds, write
from lib.tiny_training import DIGITS_SETTINGS, tiny_trainer
from matplotlib import pyplot
from scipy.special import expit
from scipy.stats import norm
from sklearn.datasets import load_digits

from trl_dt2it import RewardScorer
from trl_dt2it.demo.digits import ANSWERS, QUESTIONS, WORDS, make_digits, render_strip, split_samples
from trl_dt2it.demo.tiny import build_tiny_vlm


SIZES = (1, 2, 4, 8, 16, 32, 64)
TRAIN_PAIRS, EVAL_PAIRS, MEMBERS, DRAWS = 300, 1000, 3, 50
# Number of answers of a kind that no training pair has, their share, their most digits, and images to answer about.
FEW, MANY = (60, 0.2, 4, 120), (480, 0.8, 6, 40)
K = 1.0
SETTINGS = {**DIGITS_SETTINGS, "num_train_epochs": 10, "reward_posterior": True}
READ_OUTS = [(digit, frame.format(word)) for digit, word in enumerate(WORDS) for frame in ANSWERS["plain"]]
EDGES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
WAYS = ("reward", "posterior", "ensemble")


def run(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        base = build_tiny_vlm(f"{folder}/base", seed=seed)
        train, test = make_digits("train", TRAIN_PAIRS, seed=seed), make_digits("test", EVAL_PAIRS, seed=seed)
        scorers, seconds = [], []
        for member in range(MEMBERS):
            path = f"{folder}/{member}"
            trainer = tiny_trainer(base, train, None, path, seed + 1000 * member, SETTINGS)
            seconds.append(wall_seconds(trainer.train))
            trainer.save_model()
            scorers.append(RewardScorer.from_pretrained(path))
        pairs = np.array([scorer.score_pairs(test, show_progress=False) for scorer in scorers])
        margins = pairs[:, :, 0] - pairs[:, :, 1]
        std = scorers[0].margin_std(test, show_progress=False)
        picked = best_of_n(scorers, np.random.default_rng(seed), *FEW)
        among_many = best_of_n(scorers[:1], np.random.default_rng(seed), *MANY)
        about = scorers[0].posterior.about
    judgment = {**judged(margins, std), "best_of_n": picked, "among_many": among_many}
    return {"seed": seed, "posterior": about, "seconds": seconds, **judgment}


def judged(margins: np.ndarray, std: np.ndarray) -> dict:
    """Confidence of each way in each pair, its correctness, and the negative log likelihood of the labels."""
    one, many, spread = margins[0], margins.mean(0), margins.std(0, ddof=1)
    # The mean of a logistic function under a Gaussian, by MacKay's approximation.
    likely = {"reward": expit(one), "posterior": expit(one / np.sqrt(1 + np.pi / 8 * std**2))}
    likely["ensemble"] = expit(margins).mean(0)
    sure = {"reward": expit(np.abs(one)), "posterior": norm.cdf(np.abs(one) / std)}
    sure["ensemble"] = norm.cdf(np.abs(many) / spread)
    right = {"reward": one > 0, "posterior": one > 0, "ensemble": many > 0}
    return {
        "likelihood": {way: float(-np.log(np.maximum(likely[way], 1e-12)).mean()) for way in WAYS},
        "sure": {way: sure[way].tolist() for way in WAYS},
        "right": {way: right[way].tolist() for way in WAYS},
    }


def best_of_n(
    scorers: list[RewardScorer], generator: np.random.Generator, number: int, share: float, longest: int, count: int
) -> dict:
    """Shares of right picks and of strange ones by way and n, of the first model and of all together."""
    samples = generator.permutation(split_samples("test"))[:count].tolist()
    labels = load_digits().target[samples]
    strange = [
        generator.choice([frame for manner in ("verbose", "markdown") for frame in ANSWERS[manner]]).format(
            " ".join(generator.choice(WORDS, size=generator.integers(2, longest + 1)))
        )
        for _ in range(number)
    ]
    texts = [text for _, text in READ_OUTS] + strange
    digits = np.array([digit for digit, _ in READ_OUTS] + [-1] * number)
    chance = [(1 - share) / len(READ_OUTS)] * len(READ_OUTS) + [share / number] * number
    drawn = generator.choice(len(texts), p=chance, size=(count, DRAWS, max(SIZES)))
    questions = [QUESTIONS[index] for index in generator.integers(len(QUESTIONS), size=count)]
    images = [[render_strip([sample])] for sample in samples]
    groups = scorers[0]._groups(questions, [texts] * count, images)
    read = [[torch.empty(0)] * len(texts) for _ in groups]
    rewards = np.array([scorers[0]._score(groups, read), *(scorer._score(groups) for scorer in scorers[1:])])
    # Distances in these coordinates are standard deviations.
    spots = np.array([(torch.stack(one) @ scorers[0].posterior.factor).numpy() for one in read])
    found: dict[str, dict[int, list]] = {}
    for index, size in product(range(count), SIZES):
        some = drawn[index, :, :size]  # (draws, n)
        each = rewards[:, index][:, some]  # (members, draws, n)
        spot = spots[index][some]
        std = np.linalg.norm(spot - spot.mean(1, keepdims=True), axis=2)
        centered = each - each.mean(2, keepdims=True)
        values = {"reward": each[0], "posterior": each[0] - K * std}
        if len(scorers) > 1:
            values |= {"ensemble mean": each.mean(0), "ensemble": each.mean(0) - K * centered.std(0, ddof=1)}
        for way, value in values.items():
            pick = np.take_along_axis(some, value.argmax(1)[:, None], 1)[:, 0]
            found.setdefault(way, {}).setdefault(size, []).append(
                [np.mean(digits[pick] == labels[index]), np.mean(digits[pick] < 0)]
            )
        if index < 5 and size == 8:  # what users call picks the same
            answers = [texts[one] for one in some[0]]
            best = scorers[0].best_of_n(questions[index], answers, images[index], lower_confidence=K)
            if abs(best.reward - values["posterior"][0].max()) > 1e-3:
                sys.exit(f"`best_of_n` picks another answer to image {index}.")
    return {way: {size: np.mean(all_, 0).tolist() for size, all_ in sizes.items()} for way, sizes in found.items()}


def curve(rows: list[dict], way: str) -> list[tuple[float, float, int]]:
    """Stated and observed share of right orders, and the number of pairs, by how sure a way is."""
    sure, right = (np.concatenate([row[name][way] for row in rows]) for name in ("sure", "right"))
    place = np.clip(np.digitize(sure, EDGES) - 1, 0, len(EDGES) - 2)
    masks = [place == index for index in range(len(EDGES) - 1)]
    return [(float(sure[m].mean()), float(right[m].mean()), int(m.sum())) if m.any() else (0, 0, 0) for m in masks]


def error_of(rows: list[dict], way: str) -> float:
    """Expected calibration error."""
    bins = curve(rows, way)
    return sum(abs(stated - observed) * count for stated, observed, count in bins) / sum(b[2] for b in bins)


def draw(rows: list[dict], path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([0.5, 1], [0.5, 1], color="gray", linestyle=":")
    for way in WAYS:
        stated, observed, _ = zip(*(one for one in curve(rows, way) if one[2] >= 20), strict=True)
        left.plot(stated, observed, marker="o", label=way)
    left.set(xlabel="stated share of right orders", ylabel="observed", title="Held-out pairs")
    left.legend()
    for way in rows[0]["best_of_n"]:
        values = [np.mean([row["best_of_n"][way][size][0] for row in rows]) for size in SIZES]
        right.plot(
            SIZES, values, marker="o", label=way if way in ("reward", "ensemble mean") else f"{way}, less {K:g} std"
        )
    right.set(xscale="log", xlabel="n", ylabel="share of right picks", title="Best of n")
    right.set_xticks(SIZES, list(map(str, SIZES)))
    right.minorticks_off()
    right.legend()
    figure.savefig(path, dpi=150)


def picks(rows: list[dict], name: str, setting: tuple) -> list[str]:
    """A sentence and a table of one part."""
    number, share, longest, count = setting
    titles = {"reward": "reward", "posterior": f"less {K:g} std of the posterior", "ensemble mean": "ensemble's mean"}
    titles["ensemble"] = f"less {K:g} std of the ensemble"
    ways, cells = list(rows[0][name]), []
    for size in SIZES:
        found = [[row[name][way][size] for row in rows] for way in ways]
        right = [" / ".join(f"{one[0]:.3f}" for one in each) + f", mean {np.mean(each, 0)[0]:.3f}" for each in found]
        cells.append([str(size), *right, *(f"{np.mean(each, 0)[1]:.3f}" for each in found[:2])])
    heads = ["n", *(titles[way] for way in ways), "strange picks by reward", "by less std of the posterior"]
    return [
        f"Share of right picks by seed, {count} handwritten digits, {DRAWS} draws each; a share of {share:g} of the "
        f"answers is strange, of {number} that read 2 to {longest} digits.",
        "",
        markdown(heads, cells),
    ]


def main(seeds: list[int]) -> None:
    rows = [run(seed) for seed in seeds]
    draw(rows, RESULTS / "reward_uncertainty.png")
    bins = [f"{low:g} to {high:g}" for low, high in zip(EDGES, EDGES[1:], strict=False)]
    curves = {way: curve(rows, way) for way in WAYS}
    calibration = [
        [name, *(f"{o:.3f} ({s:.3f}; {count})" if count else "–" for s, o, count in (curves[w][i] for w in WAYS))]
        for i, name in enumerate(bins)
    ]
    calibration.append(["calibration error", *(f"{error_of(rows, way):.3f}" for way in WAYS)])
    likelihoods = [np.mean([row["likelihood"][way] for row in rows]) for way in WAYS]
    calibration.append(["negative log likelihood of the labels", *(f"{value:.3f}" for value in likelihoods)])
    accuracy = ", ".join(f"{np.mean(row['right']['reward']):.3f}" for row in rows)
    parameters = ", ".join(f"{row['posterior']['effective_parameters']:.1f}" for row in rows)
    seconds = np.mean([row["seconds"] for row in rows])
    text = [
        f"Reward models trained on {TRAIN_PAIRS} pairs with the seeds {', '.join(str(row['seed']) for row in rows)}: "
        f"held-out pair accuracy {accuracy}; the pairs determine {parameters} directions of the head's 128. A "
        f"training takes {seconds:.0f} s; an ensemble needs {MEMBERS}.",
        "",
        f"How often the answer with the higher reward is the better one, by how sure a way is of it (in parentheses: "
        f"stated on average; pairs of {EVAL_PAIRS} a seed). The reward alone is as sure as its loss says, the others "
        "as a Gaussian with their standard deviation of the margin.",
        "",
        markdown(["sure", "reward alone", "posterior", f"ensemble of {MEMBERS}"], calibration),
        "",
        *(picks(rows, "best_of_n", FEW), "", *picks(rows, "among_many", MANY), ""),
        "![Calibration, and share of right picks against n](reward_uncertainty.png)",
    ]
    for row in rows:  # the tables hold what they say
        del row["sure"], row["right"]
    settings = {"train_pairs": TRAIN_PAIRS, "k": K, "few": FEW, "many": MANY, "draws": DRAWS, **SETTINGS}
    record = {"rows": rows, "calibration": curves, "settings": settings}
    write("reward_uncertainty", "\n".join(text), record)
    if likelihoods[1] >= likelihoods[0]:
        sys.exit("The posterior explains the labels no better than the reward alone.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
