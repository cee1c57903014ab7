"""Distillation of preference pairs from judged candidates: its plan, with the cost, and its run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from tqdm.auto import tqdm

from ...data.columns import leave_images_encoded
from ...data.images import ImageOptions, with_image_root
from ...data.messages import with_images
from ...data.rows import RowError
from ...judge.endpoint import Endpoint
from ...judge.rubric import DEFAULT_RUBRIC, Rubric
from ...judge.store import Spending, most_spending
from ...utils import screen_table
from ..reports import DistillReport
from .candidates import Pool, candidate_messages, generation_messages, read_pools, read_question
from .judging import Judging, JudgingSettings, listwise_request, pointwise_request
from .pairs import DISTILLED_FEATURES, agreed_pairs, count_drawn, fit_listwise, pair_row
from .position_bias import balanced_orders


if TYPE_CHECKING:
    from ...judge.client import JudgeClient


@dataclass
class DistillPlan:
    """
    Upper bound on the requests of a run, without repeated requests for replies that cannot be read.

    Parameters:
        prompts, left_out (`int` and `Counter[str]`):
            Number of rows, and rows that cannot be used, by reason.
        spending (`dict[str, Spending]`):
            For each stage, the most calls, tokens and USD.
    """

    prompts: int
    left_out: Counter[str] = field(default_factory=Counter)
    spending: dict[str, Spending] = field(default_factory=dict)

    @property
    def total(self) -> Spending:
        """Sum over all stages."""
        return sum(self.spending.values(), Spending())

    def show(self, console: Console | None = None) -> None:
        """Print the plan, on standard output by default."""
        console, stages = console or Console(), {**self.spending, "all": self.total}.items()
        rows = [(stage, f"{most.calls:,}", f"{most.tokens:,}", f"{most.cost:.2f}") for stage, most in stages]
        title = f"At most, for {self.prompts} prompts"
        console.print(screen_table(("stage", "calls", "tokens", "USD"), rows, title=title))
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            console.print(f"Rows that cannot be used: {reasons}", markup=False)

    def _add(
        self, stage: str, endpoint: Endpoint, messages: Sequence[Mapping[str, Any]], unknown: int, calls: int = 1
    ) -> None:
        """Add calls with these messages and as many tokens of text that is still to be written."""
        most = most_spending(endpoint, messages)
        tokens, cost = most.tokens + unknown, most.cost + endpoint.cost(unknown, 0)
        spending = Spending(most.calls * calls, tokens * calls, cost * calls)
        self.spending[stage] = self.spending.get(stage, Spending()) + spending

    def _add_pool(
        self, pool: Pool, settings: JudgingSettings, judge: Endpoint, generator: Endpoint | None, num_unwritten: int
    ) -> None:
        count, length = len(pool.candidates), generator.max_tokens if generator is not None else 0
        unknown = length if num_unwritten else 0
        listwise = listwise_request(pool, range(count), settings).messages if count else []
        if count > 1:
            orders = len(balanced_orders(count, settings.num_shuffles, ""))
            self._add("listwise", judge, listwise, num_unwritten * length, orders)
        pointwise = [pointwise_request(pool, candidate, settings).messages for candidate in range(count)]
        for messages in pointwise:
            self._add("pointwise", judge, messages, unknown)
        if generator is None or settings.min_spread <= 0 or not count:
            return
        # If the candidates of every pool were alike: one more for each, which is judged with the others.
        longest = max((candidate.text for candidate in pool.candidates), key=lambda text: len(text.encode()))
        self._add("diversity", generator, candidate_messages("rewritten", pool.question, longest), unknown)
        orders = len(balanced_orders(count + 1, settings.num_shuffles, ""))
        self._add("listwise again", judge, listwise, (num_unwritten + 1) * length + 128, orders)
        self._add("pointwise again", judge, pointwise[0], length)


def plan_distill(
    dataset: Dataset,
    *,
    judge: Endpoint,
    generator: Endpoint | None = None,
    num_candidates: int = 4,
    num_shuffles: int = 3,
    rubric: Rubric = DEFAULT_RUBRIC,
    min_spread: float = 2.0,
    language: str | None = None,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
) -> DistillPlan:
    """
    Compute the most that [`distill`] would ask for.

    A byte of text counts as a token, an image as many as its size costs with the most demanding models, and text that
    is still to be written as `max_tokens`. The real cost is several times lower.

    Args:
        dataset, num_candidates, num_shuffles, rubric, min_spread, language, image_root, image_options:
            As in [`distill`].
        judge, generator ([`~trl_dt2it.judge.Endpoint`]):
            Endpoints of the judge and of the generator, if any, with prices.

    Returns:
        [`DistillPlan`]
    """
    settings = JudgingSettings(num_candidates, num_shuffles, rubric, min_spread, language, 0)
    plan, options = DistillPlan(len(dataset)), with_image_root(image_options, image_root)
    for index, row in enumerate(leave_images_encoded(dataset)):
        try:
            question = read_question(row, index, source="", image_options=options)
            pools = read_pools(question, row.get("candidates"))
        except RowError as error:
            plan.left_out[error.reason] += 1
            continue
        for pool in pools:
            plan._add_pool(pool, settings, judge, generator, num_unwritten=0)
        if not pools and generator is None:
            plan.left_out["no_candidates"] += 1
        elif not pools and generator is not None:
            plan._add("generation", generator, generation_messages(question), 0, calls=num_candidates)
            stand_ins = Pool(question, generator.model, [str(number) for number in range(num_candidates)])
            plan._add_pool(stand_ins, settings, judge, generator, num_unwritten=num_candidates)
    return plan


def distill(
    dataset: Dataset,
    *,
    judge: JudgeClient,
    generator: JudgeClient | None = None,
    num_candidates: int = 4,
    num_shuffles: int = 3,
    rubric: Rubric = DEFAULT_RUBRIC,
    min_gap: float = 1.0,
    min_spread: float = 2.0,
    num_bins: int = 5,
    pairs_per_prompt: int | None = 2,
    max_pairs: int | None = None,
    language: str | None = None,
    source: str = "distilled",
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
    prompts_at_once: int = 32,
    seed: int = 42,
    show_progress: bool = True,
) -> tuple[Dataset, DistillReport]:
    """
    Build preference pairs out of prompts.

    A killed run, started again with the same arguments, goes on where it was: all requests depend on the rows and the
    seed alone, and the clients keep every reply. No row, candidate or pair is lost without a count in the report.

    Args:
        dataset (`Dataset`):
            Rows with `prompt` (messages) or `question` (a string), `images`, and optionally a `reference` answer and
            `candidates` (a list of dicts with `text` and `generator`).
        judge, generator ([`~trl_dt2it.judge.JudgeClient`]):
            Clients of the judge and, if any, of the model that writes candidates where a row has none, with a
            temperature above 0, and corrupted or rewritten answers where all candidates of a prompt are alike.
        num_candidates, num_shuffles (`int`, *optional*, default to `4` and `3`):
            Number of candidates to generate for a prompt, and of orders in which the judge sees them. Position bias
            needs at least 2; as many as there are candidates show each candidate in every position.
        rubric ([`~trl_dt2it.judge.Rubric`], *optional*):
            Criteria of the judge, and the scale.
        min_gap, min_spread (`float`, *optional*, default to `1.0` and `2.0`):
            Smallest gap, in points, by which both scores must tell two candidates apart; and least points from a
            prompt's worst candidate to its best: below, one more is made. 0 makes none.
        num_bins (`int`, *optional*, defaults to `5`):
            Number of bins of strength, from `min_gap` to the length of the scale.
        pairs_per_prompt, max_pairs (`int`, *optional*, default to `2` and no limit):
            Most pairs of one prompt (`group_id`) and in all; `None` for no limit.
        language (`str`, *optional*):
            Language of the instructions, `"en"` or `"zh"`; that of each question by default.
        source (`str`, *optional*, defaults to `"distilled"`):
            Value of the column `source`, and prefix of `pair_id`.
        image_root, image_options:
            As in [`~trl_dt2it.data.ImageOptions`].
        prompts_at_once (`int`, *optional*, defaults to `32`):
            Number of prompts held in memory, images included, and asked together, to keep more calls going.
        seed, show_progress (`int` and `bool`, *optional*, default to `42` and `True`):
            Seed of orders and of the draw, and a progress bar.

    Returns:
        `tuple[Dataset, DistillReport]`: pairs with the columns of [`DISTILLED_FEATURES`], and the report.

    Raises:
        `ValueError`: if an argument is out of range, or the generator's temperature is 0 and it has to write several
            candidates.
        [`~trl_dt2it.judge.JudgeError`]: if an endpoint cannot be used at all.
    """
    columns, scale = dataset.column_names, rubric.high - rubric.low
    if "prompt" not in columns and "question" not in columns:
        raise ValueError(f"The rows have neither `prompt` nor `question`; their columns are {', '.join(columns)}.")
    if "candidates" not in columns and generator is None:
        raise ValueError("The rows have no `candidates`, and there is no `generator` to write them; pass one of them.")
    if "candidates" not in columns and generator is not None and generator.endpoint.temperature == 0:
        raise ValueError("The generator's temperature is 0, so that all its candidates would be equal; raise it.")
    if num_candidates < 2 or num_shuffles < 1 or num_bins < 1:
        given = f"got {num_candidates}, {num_shuffles} and {num_bins}"
        raise ValueError(f"`num_candidates` must be at least 2, `num_shuffles` and `num_bins` at least 1; {given}.")
    if not 0 < min_gap < scale or not 0 <= min_spread <= scale:
        wanted = f"`min_gap` must be above 0 and below {scale}, the length of the scale, `min_spread` between 0 and it"
        raise ValueError(f"{wanted}; got {min_gap} and {min_spread}.")
    limits = {"pairs_per_prompt": pairs_per_prompt, "max_pairs": max_pairs}
    for name, value in {**limits, "prompts_at_once": prompts_at_once}.items():
        if value is not None and value < 1:
            none = ", or None for no limit" if name in limits else ""
            raise ValueError(f"`{name}` is {value}; it must be at least 1{none}.")
    rows, report = leave_images_encoded(dataset), DistillReport(prompts=len(dataset))
    settings = JudgingSettings(num_candidates, num_shuffles, rubric, min_spread, language, seed)
    judging, options = Judging(settings, judge, generator, report), with_image_root(image_options, image_root)
    by_key = dict[str, Pool]()
    with tqdm(total=len(rows), desc="prompts", unit="prompt", disable=None if show_progress else True) as bar:
        for start in range(0, len(rows), prompts_at_once):
            stop, batch = min(start + prompts_at_once, len(rows)), list[Pool]()
            for index in range(start, stop):
                for pool in judging.read(rows[index], index, source, options):
                    if by_key.setdefault(pool.key, pool) is pool:
                        batch.append(pool)
                    else:
                        report.settle("duplicate_prompt", pool.question.name)
            judging.judge_pools(batch)
            for pool in batch:
                pool.question.images.clear()  # the largest part of it, and no longer needed
            bar.update(stop - start)
    pools = list(by_key.values())
    report.position_bias = fit_listwise(pools, rubric)
    pairs = agreed_pairs(pools, rubric, min_gap, report)
    report.bin_edges = np.linspace(min_gap, scale, num_bins + 1).tolist()
    drawn = count_drawn(pools, pairs, report, **limits, seed=seed)
    report.usage = {"judge": judge.usage().as_dict()}
    if generator is not None and generator is not judge:
        report.usage["generator"] = generator.usage().as_dict()
    about = {"judge": judge.endpoint.model, "rubric": rubric.digest()[:16]}
    effects = {bias.num_candidates: bias.effects for bias in report.position_bias}
    made = [pair_row(pair, strength_bin, source, about, rubric, effects) for pair, strength_bin in drawn]
    positions = [pair.pool.question.row for pair, _ in drawn]
    return with_images(rows, positions, made, options, DISTILLED_FEATURES), report
