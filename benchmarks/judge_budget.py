"""How many calls to a judge does each order need?

Labels are wrong with a known rate, a model's reward margins tell some of it, `flip_mixture` flips what is more likely
wrong than not, and a judge is asked about both orders of a pair at a time. It is right in a share of its clear
verdicts, and has none about some pairs; a `graded` judge errs most where the answers are alike, as the model does. All
verdicts are weighed against the posterior that the margins give, at the accuracy that they show themselves; no order
knows it.

`simulated` draws margins (4,000 pairs, 20 seeds). `digits` has the margins of the tiny VLM, trained on 200 clean
pairs, of a pool of 600, and a real client asks a real server on this machine: about all, and for each order with half
of these calls as its budget. What has arrived is counted.

Writes `benchmarks/results/judge_budget.{json,md}`, and fails if the best order needs more than half of the calls to
reach the label noise that the random order has after all of them, or a budget is exceeded.

usage: python benchmarks/judge_budget.py
"""

import sys
import tempfile
from collections.abc import Callable
from statistics import mean

import numpy as np
from lib.report import markdown, write
from lib.tiny_training import fit
from scipy.special import expit

from tests.curation.test_judging import TruthfulJudge, sha
from tests.judge.server import JudgeServer
from trl_dt2it.curation import estimate_noise, flip_mixture, relabel_by_vote
from trl_dt2it.curation.budget import (
    ORDERS,
    estimate_accuracy,
    expected_gain,
    fill_unknown,
    judge_curve,
    judge_order,
    weigh_votes,
)
from trl_dt2it.curation.judging import PairVotes, judge_pairs
from trl_dt2it.curation.rules import UNREADABLE
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.mixing import swap_pairs
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.demo.tiny import build_tiny_vlm
from trl_dt2it.judge import Budget, Endpoint, JudgeClient


PAIRS, SEEDS, TIES = 4000, 20, 0.15
NOISES, ACCURACIES = (0.2, 0.35), (0.75, 0.8, 0.9)
DIGITS, BASE_PAIRS, STEPS = 600, 200, 80
AT = (0.1, 0.25, 0.5)  # shares of all calls at which the noise is shown


def follow(
    margins: np.ndarray, wrong: np.ndarray, ask: Callable[[np.ndarray, str, Callable], np.ndarray]
) -> dict[str, dict[str, list[float]]]:
    """The curve of each order, for votes that `ask` gives about rows, and noise if clear verdicts are followed."""
    flipped, kept, estimate = flip_mixture(margins), np.ones(len(margins), dtype=bool), estimate_noise(margins)
    posterior = fill_unknown(estimate.posterior if estimate.is_identified else np.full(len(margins), np.nan))
    curves = {}
    for how in ORDERS:
        order = judge_order(
            posterior, np.where(flipped, -margins, margins), how=how, flipped=flipped, kept=kept, accuracy=1.0
        )

        def num_worth(votes: PairVotes, count: int, order: np.ndarray = order) -> int:
            done, rows = order[: len(votes.votes)], order[len(votes.votes) :][:count]
            accuracy = estimate_accuracy(relabel_by_vote(votes.votes[votes.answered]), posterior[done[votes.answered]])
            return int(
                (np.cumsum(expected_gain(posterior[rows], flipped[rows], kept[rows], accuracy) <= 0) == 0).sum()
            )

        votes = ask(order, how, num_worth if how == "gain" else None)
        rows = order[: len(votes)]
        asked = ~(votes == UNREADABLE).any(axis=(1, 2))
        rows, by_votes = rows[asked], relabel_by_vote(votes[asked])
        state = {"flipped": flipped[rows], "kept": kept[rows], "strength": np.abs(margins[rows])}
        accuracy = estimate_accuracy(by_votes, posterior[rows])
        decision = weigh_votes(by_votes, posterior[rows], accuracy=accuracy, **state)
        calls = np.full(len(rows), 2)
        curves[how] = judge_curve(decision, rows, calls, flipped=flipped, kept=kept, wrong=wrong)
        if how == "random":
            labels = np.where(by_votes.keep, by_votes.flip, flipped[rows])
            curves["followed"] = {"calls": [2 * len(rows)], "noise": [float((wrong[rows] ^ labels).mean())]}
    return curves


def read_off(curves: dict[str, dict], most: int) -> dict[str, float]:
    """For each order the noise after shares of all calls, and the share of them that reaches what all calls reach."""
    aim = curves["random"]["noise"][-1]
    found = {"before": curves["gain"]["noise"][0], "all": aim, "followed": curves["followed"]["noise"][0]}
    found |= {"gain asks": curves["gain"]["calls"][-1] / most, "gain ends": curves["gain"]["noise"][-1]}
    for how in ORDERS:
        calls, noise = np.array(curves[how]["calls"]), np.array(curves[how]["noise"])
        reached = np.flatnonzero(noise <= aim + 1e-9)
        found[f"{how} needs"] = float(calls[reached[0]] / most) if len(reached) else 1.0
        found |= {f"{how} at {share}": float(noise[calls <= share * most + 1e-9][-1]) for share in AT}
    return found


def simulate(noise: float, accuracy: float, is_graded: bool, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    gap = rng.gamma(1.5, 1.0, PAIRS)  # how far apart the two answers are
    reads = rng.random(PAIRS) < expit(1.5 * gap)
    wrong = rng.random(PAIRS) < noise
    margins = gap * np.where(reads, 1, -1) * np.where(wrong, -1, 1)
    right = np.full(PAIRS, accuracy)
    if is_graded:  # of the same mean, and a coin where the answers are alike
        shape = 1 - np.exp(-gap)
        right = np.clip(0.5 + (accuracy - 0.5) * shape / shape.mean(), 0.5, 1.0)
    verdict = np.where(wrong == (rng.random(PAIRS) < right), -1, 1)
    votes = np.stack([verdict, np.where(rng.random(PAIRS) < TIES, -verdict, verdict)], axis=1)[:, None]

    def ask(rows: np.ndarray, how: str, num_worth: Callable | None) -> np.ndarray:
        done = 0
        while num_worth is not None and done < len(rows):  # as `judge_pairs` does
            said = votes[rows[:done]]
            count = num_worth(PairVotes(said, np.full(said.shape, "ok", dtype=object)), min(64, len(rows) - done))
            if count == 0:
                return said
            done += count
        return votes[rows]

    return read_off(follow(margins, wrong, ask), 2 * PAIRS)


class ErringJudge(TruthfulJudge):
    """Errs about some pairs in both orders, and takes the first answer of others, the same at each time."""

    def __init__(self, truth: dict[str, str], accuracy: float) -> None:
        super().__init__(truth, moods=False, faults=False)
        self.accuracy = accuracy

    def better(self, body: dict) -> str:
        first = super().better(body)
        image = body["messages"][-1]["content"]
        draw = int(sha(str([part for part in image if part["type"] == "image_url"]).encode()), 16)
        if draw % 1000 < 1000 * TIES:
            return "first"
        is_right = draw // 1000 % 1000 < 1000 * self.accuracy
        return first if is_right else {"first": "second", "second": "first"}.get(first, first)


def digits_margins(seed: int) -> np.ndarray:
    """Reward margins of true labels by a model that has seen few pairs."""
    pool, test = make_digits("train", DIGITS, seed=seed, source="pool"), make_digits("test", 100, seed=seed)
    base = make_digits("train", BASE_PAIRS, seed=seed, source="base")
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 32, "learning_rate": 1.0e-3, "loss_type": "bt"}
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_vlm(f"{folder}/base", seed=seed)
        rewards = fit(model, base, {"test": test}, folder, seed, settings, scored=pool)["rewards"]
    return rewards[:, 0].astype(float) - rewards[:, 1]


def digits(true_margins: np.ndarray, noise: float, accuracy: float, seed: int) -> dict[str, float]:
    """A judge behind a server is asked about all pairs, and then in each order with half of the calls."""
    wrong = np.random.default_rng([seed, 1]).random(DIGITS) < noise
    margins = true_margins * np.where(wrong, -1, 1)
    rows = leave_images_encoded(swap_pairs(make_digits("train", DIGITS, seed=seed, source="pool"), wrong))
    judge = ErringJudge({sha(row["images"][0]["bytes"]): row["digits"] for row in rows}, accuracy)
    arrived = {}
    with tempfile.TemporaryDirectory() as folder, JudgeServer(judge) as server:

        def ask(order: np.ndarray, store: str, num_worth: Callable | None, limit: int | None) -> np.ndarray:
            before, endpoint = len(server.requests), Endpoint(server.base_url, "judge")
            budget = Budget(max_calls=limit)
            client = JudgeClient(endpoint, f"{folder}/{store}.jsonl", budget=budget, show_progress=False)
            about = {"within_budget": True, "num_worth": num_worth, "show_progress": False}
            found = judge_pairs(rows.select(order), [client], **about)
            arrived[store] = len(server.requests) - before
            return found.votes

        whole = follow(margins, wrong, lambda order, how, worth: ask(order, "all", worth, None))
        half = follow(margins, wrong, lambda order, how, worth: ask(order, how, worth, DIGITS))
    found = {**read_off(whole, 2 * DIGITS), "gain asked for all": whole["gain"]["calls"][-1]}
    found |= {f"{how} with half": half[how]["noise"][-1] for how in ORDERS}
    found |= {f"{how} asked": arrived[how] for how in ORDERS}
    return {**found, "model": float((true_margins > 0).mean())}


def real(name: str, cells: list[dict[str, float]]) -> list[str]:
    """The row of a case with a server."""
    average = {key: mean(cell[key] for cell in cells) for key in cells[0]}
    row = [f"{average[f'{how} asked']:,.0f}: {average[f'{how} with half']:.3f}" for how in ORDERS]
    return [f"{name}, model right in {average['model']:.3f}", *row, f"{average['gain asked for all']:,.0f}"]


def main() -> int:
    rows, record, problems = [], {}, []
    cases = [
        (f"simulated, noise {noise}, {'graded' if graded else 'even'} judge of {accuracy}", noise, accuracy, graded)
        for noise in NOISES
        for accuracy in ACCURACIES
        for graded in (False, True)
    ]
    for name, noise, accuracy, graded in cases:
        record[name] = [simulate(noise, accuracy, graded, seed) for seed in range(SEEDS)]
    margins = {seed: digits_margins(seed) for seed in (42, 43)}
    for noise in NOISES:
        cells = [digits(values, noise, 0.8, seed) for seed, values in margins.items()]
        record[f"digits, noise {noise}, even judge of 0.8"] = cells
    for name, cells in record.items():
        average = {key: mean(cell[key] for cell in cells) for key in cells[0]}
        row = [name, f"{average['before']:.3f}", f"{average['all']:.3f}", f"{average['followed']:.3f}"]
        row.append(f"{average['gain ends']:.3f} ({average['gain asks']:.0%})")
        row += [" ".join(f"{average[f'{how} at {share}']:.3f}" for share in AT) for how in ORDERS]
        rows.append([*row, *(f"{average[f'{how} needs']:.0%}" for how in ORDERS)])
        best = min(ORDERS, key=lambda how: average[f"{how} needs"])
        if average[f"{best} needs"] > 0.5:
            problems.append(f"{name}: the best order, {best}, needs {average[f'{best} needs']:.0%} of the calls")
        if any(cell.get(f"{how} asked", 0) > DIGITS for cell in cells for how in ORDERS):
            problems.append(f"{name}: more calls than the budget has")
    heads = ["pool", "before", "all calls", "followed", "gain alone"]
    heads += [f"{how}: noise at 10, 25, 50 %" for how in ORDERS] + [f"{how} needs" for how in ORDERS]
    served = [real(name, cells) for name, cells in record.items() if name.startswith("digits")]
    text = [
        markdown(heads, rows),
        "`before` is the label noise after `flip_mixture`, `all calls` that after all verdicts in the random order, "
        "and `followed` that if every clear verdict is taken as it is. `needs` is the share of all calls after which "
        "an order has the noise of `all calls`, or less, for the first time (all, if it never has). `gain alone` is "
        "the noise where the order of gain ends, and its share of the calls: no further verdict would change a label.",
        markdown(["half of the calls as the budget", *ORDERS, "gain, no budget"], served),
        f"Calls that arrived, and the label noise then, of {2 * DIGITS:,} calls for all pairs. The last column is "
        "the number of calls of the order of gain without a budget.",
        "Fell short: " + "; ".join(problems) + "."
        if problems
        else "The best order reaches the noise that the random order has after all calls with at most half of them in "
        "every row.",
    ]
    averages = {
        name: {key: round(mean(cell[key] for cell in cells), 5) for key in cells[0]} for name, cells in record.items()
    }
    write("judge_budget", "\n\n".join(text), {"means over seeds": averages})
    return len(problems)


if __name__ == "__main__":
    sys.exit(main())
