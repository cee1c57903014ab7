"""Do looking tests tell a reward model that looks at the image from one that was trained blind?

With each seed two models are trained as `recipes/configs/digits.yaml` trains: one on its pairs, and one on pairs with
blank images, in 0.8 of which the better answer is the longer or the more decorated one, so that it is above chance.
Each is shown 1,000 held-out pairs of its own kind with their images, blank ones, those of other pairs, and with 1/2
and 1/4 of the pixels; the blind one, too, sees the true images.

Prints a table and writes `benchmarks/results/looking_controls.{json,md,png}`. Fails if a model that was trained right
keeps an accuracy above 0.55 with another pair's image, or is not said to look, and if that of a blind one changes by
more than 0.02, or it is not said not to look.

usage: python benchmarks/looking_controls.py [SEED ...]
"""

import sys
import tempfile

from lib.report import RESULTS, markdown, wall_seconds, write
from lib.tiny_training import DIGITS_SETTINGS, tiny_trainer
from matplotlib import pyplot

from trl_dt2it import RewardScorer
from trl_dt2it.data.controls import blank
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.demo.tiny import build_tiny_vlm
from trl_dt2it.evaluation import audit_looking
from trl_dt2it.evaluation.looking import OWN, SHOWN


TRAIN_PAIRS, EVAL_PAIRS, SHORTCUT = 3000, 1000, 0.8
MODELS = {"right": "trained right", "blind": "trained blind"}
MOST_SWAPPED, MOST_DIFFERENCE = 0.55, 0.02


def run(seed: int, model: str) -> dict:
    style_bias = SHORTCUT if model == "blind" else None
    train, test = (
        make_digits(split, count, seed=seed, style_bias=style_bias)
        for split, count in (("train", TRAIN_PAIRS), ("test", EVAL_PAIRS))
    )
    with tempfile.TemporaryDirectory() as folder:
        base = build_tiny_vlm(f"{folder}/base", seed=seed)
        rows = blank(train) if model == "blind" else train
        trainer = tiny_trainer(base, rows, None, f"{folder}/model", seed, DIGITS_SETTINGS)
        seconds = wall_seconds(trainer.train)
        trainer.save_model()
        trainer.end()
        report = audit_looking(RewardScorer.from_pretrained(f"{folder}/model"), test)
    return {"seed": seed, "model": model, "seconds": round(seconds, 1), **report.to_dict()}


def accuracies(row: dict) -> dict[str, float]:
    return {shown: metrics["overall"] for shown, metrics in row["metrics"].items()}


def is_wrong(row: dict) -> bool:
    if row["model"] == "right":
        return row["verdict"] != "looks" or accuracies(row)["swapped"] > MOST_SWAPPED
    return row["verdict"] != "does not look" or abs(row["gain"]["swapped"]) > MOST_DIFFERENCE


def draw(rows: list[dict]) -> None:
    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, (model, title) in zip(axes, MODELS.items(), strict=True):
        own = [row for row in rows if row["model"] == model]
        width = 0.8 / len(own)
        for index, row in enumerate(own):
            values = accuracies(row)
            ends = [row["bootstrap"][shown]["overall"] for shown in values]
            x = [place + (index - (len(own) - 1) / 2) * width for place in range(len(values))]
            axis.bar(x, list(values.values()), 0.9 * width, label=f"seed {row['seed']}")
            axis.vlines(x, *zip(*ends, strict=True), color="black", linewidth=1)
        axis.axhline(0.5, color="gray", linestyle=":")
        axis.set_xticks(range(len(SHOWN)), [name.replace(" ", "\n") for name in SHOWN.values()])
        axis.set(title=title, ylim=(0, 1.02))
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="upper right")
    figure.savefig(RESULTS / "looking_controls.png", dpi=150)


def main(seeds: list[int]) -> None:
    rows = [run(seed, model) for seed in seeds for model in MODELS]
    draw(rows)
    cells = []
    for row in rows:
        shares = [f"{value:.3f}" for value in accuracies(row).values()]
        low, high = row["gain_interval"]["swapped"]
        gain = f"{row['gain']['swapped']:+.3f} ({low:.3f} to {high:.3f})"
        cells.append(
            [MODELS[row["model"]], str(row["seed"]), *shares, gain, f"{row['needs_image']:.3f}", row["verdict"]]
        )
    names = [f"image: {SHOWN[shown]}" if shown == OWN else SHOWN[shown] for shown in SHOWN]
    heads = ["model", "seed", *names, "own less another row's (95 %)", "needs the image", "verdict"]
    seconds = sum(row["seconds"] for row in rows) / len(rows)
    text = [
        f"Accuracy on {EVAL_PAIRS:,} held-out pairs by the image shown. A training takes {seconds:.0f} s. All images "
        "in training have one size.",
        "",
        markdown(heads, cells),
        "",
        "![Accuracy by the image shown](looking_controls.png)",
    ]
    settings = {"train_pairs": TRAIN_PAIRS, "shortcut": SHORTCUT, **DIGITS_SETTINGS}
    write("looking_controls", "\n".join(text), {"rows": rows, "settings": settings})
    if wrong := [f"{MODELS[row['model']]}, seed {row['seed']}" for row in rows if is_wrong(row)]:
        sys.exit(f"The controls do not tell what they should: {'; '.join(wrong)}.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [42, 43, 44])
