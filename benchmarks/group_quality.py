"""Does a reward model learn as much from pairs of one prompt that are read together as from the same pairs apart?

Read-outs of four handwritten digits, several answers to a picture, ranked by the number of wrong digits. As many pairs
of 2, 4 or 8 answers to a prompt each: the accuracy on held-out pairs of a model that reads the pairs of a prompt in
one batch (`group_pairs`), of one that learns their ranking there (`plackett_luce`), and of one that reads them in
random order, from the same start, in as many steps of as many pairs.

Prints a table and writes `benchmarks/results/group_quality.{json,md}`. Fails if the mean accuracy with four answers
differs by more than 0.01.

usage: python benchmarks/group_quality.py [SEED ...]
"""

import random
import sys
import tempfile
from statistics import mean

from datasets import Dataset
from lib.report import markdown, wall_seconds, write
from lib.tiny_training import OPTIMIZATION, tiny_trainer

from trl_dt2it.data import to_pairs
from trl_dt2it.data.mixing import with_columns
from trl_dt2it.demo import READER_DIR
from trl_dt2it.demo.digits import ANSWERS, WORDS, make_digits


SEEDS = (42, 43, 44)
NUM_ANSWERS, PAIRS, TEST_PAIRS, DIGITS = (2, 4, 8), 2400, 2000, [4]
SETTINGS = {**OPTIMIZATION, "max_steps": 150}
MOST_DIFFERENCE = 0.01
WAYS = {
    "apart": {"group_pairs": "false"},
    "together": {},
    "together, plackett_luce": {"loss_type": "plackett_luce"},
}


def ranked_digits(num_answers: int, seed: int) -> Dataset:
    """Pairs of prompts with so many answers, a few more than needed."""
    rng = random.Random(f"{num_answers}-{seed}")
    strips = make_digits("train", 2 * PAIRS // (num_answers - 1), num_digits=DIGITS, seed=seed)
    completions, scores = [], []
    for digits in strips["digits"]:
        answers: dict[str, int] = {}
        while len(answers) < num_answers:
            wrong = rng.choice(range(len(digits) + 1))
            places = rng.sample(range(len(digits)), wrong)
            read = [rng.choice("0123456789".replace(d, "")) if i in places else d for i, d in enumerate(digits)]
            answers[rng.choice(ANSWERS["plain"]).format(" ".join(WORDS[int(digit)] for digit in read))] = wrong
        completions.append(list(answers))
        scores.append([-float(wrong) for wrong in answers.values()])
    rows = with_columns(strips.select_columns(["prompt", "images"]), {"completions": completions, "scores": scores})
    pairs = to_pairs(rows).remove_columns("strength")
    return pairs.select(range(PAIRS))


def run(num_answers: int, way: str, seed: int) -> dict:
    train, test = ranked_digits(num_answers, seed), make_digits("test", TEST_PAIRS, num_digits=DIGITS, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_trainer(str(READER_DIR), train, None, folder, seed, {**SETTINGS, **WAYS[way]})
        seconds = wall_seconds(trainer.train)
        accuracy = trainer.evaluate(test)["eval_accuracy"]
    record = {"answers": num_answers, "way": way, "seed": seed, "prompts": len(set(train["group_id"]))}
    return {**record, "accuracy": accuracy, "seconds": round(seconds, 1)}


def main(seeds: list[int]) -> None:
    rows = []
    for seed in seeds:
        for num_answers in NUM_ANSWERS:
            # With two answers, a ranking is a pair.
            for way in WAYS if num_answers > 2 else list(WAYS)[:2]:
                rows.append(run(num_answers, way, seed))
                print(rows[-1], flush=True)
    table, differences = [], {}
    for num_answers in NUM_ANSWERS:
        own = [row for row in rows if row["answers"] == num_answers]
        cells = [str(num_answers), str(round(mean(row["prompts"] for row in own)))]
        means = {}
        for way in WAYS:
            if found := [row for row in own if row["way"] == way]:
                means[way] = mean(row["accuracy"] for row in found)
                each = ", ".join(f"{row['accuracy']:.3f}" for row in found)
                seconds = mean(row["seconds"] for row in found)
                cells.append(f"{means[way]:.4f} ({each}), {seconds:.0f} s")
            else:
                cells.append("")
        differences[num_answers] = means["together"] - means["apart"]
        table.append([*cells, f"{differences[num_answers]:+.4f}"])
    heads = ["answers to a prompt", "prompts", *WAYS, "together less apart"]
    about = (
        f"Accuracy on {TEST_PAIRS:,} held-out pairs, mean of {len(seeds)} seeds (each), and seconds of a training: "
        f"{PAIRS:,} training pairs, {SETTINGS['max_steps']} steps of {SETTINGS['per_device_train_batch_size']} pairs."
    )
    write("group_quality", f"{about}\n\n{markdown(heads, table)}", {"rows": rows, "settings": SETTINGS})
    if abs(differences[4]) > MOST_DIFFERENCE:
        sys.exit(f"With four answers, the accuracy differs by {differences[4]:+.4f}.")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or list(SEEDS))
