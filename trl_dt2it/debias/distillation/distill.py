"""Distillation of preference pairs from judged candidates: plan, cost and run."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from ...data.columns import leave_images_encoded
from ...data.images import ImageOptions, with_image_root
from ...data.messages import with_images
from ...data.rows import RowError, row_name
from ...judge.endpoint import Endpoint
from ...judge.rubric import DEFAULT_RUBRIC, Rubric
from ...judge.store import Spending, most_spending
from .candidates import Pool, Question, candidate_messages, generation_messages, read_pools, read_question
from .judging import DistillReport, JudgedPool, JudgingSettings, judge_pools, listwise_request, pointwise_request
from .pairs import (
    BIN_IS_FULL,
    DISTILLED_FEATURES,
    DRAWN,
    PROMPT_IS_FULL,
    JudgedPair,
    agreed_pairs,
    draw_pairs,
    listwise_scores,
    pair_row,
    strength_bins,
)
from .position_bias import balanced_orders


if TYPE_CHECKING:
    from ...judge.client import JudgeClient


@dataclass
class DistillPlan:
    """
    The most that a run may ask for. Replies that cannot be read are asked for again, which is not counted here.

    Parameters:
        prompts (`int`):
            Number of rows.
        left_out (`Counter[str]`):
            Rows that cannot be used, by reason.
        spending (`dict[str, Spending]`):
            For each stage, calls, tokens and USD at most.
    """

    prompts: int
    left_out: Counter[str] = field(default_factory=Counter)
    spending: dict[str, Spending] = field(default_factory=dict)

    @property
    def total(self) -> Spending:
        """All stages together."""
        return sum(self.spending.values(), Spending())

    def show(self, console: Console | None = None) -> None:
        """
        Prints the plan.

        Args:
            console (`rich.console.Console`, *optional*):
                Where to; standard output by default.
        """
        table = Table("stage", title=f"At most, for {self.prompts} prompts")
        for column in ("calls", "tokens", "USD"):
            table.add_column(column, justify="right")
        for stage, one in {**self.spending, "all": self.total}.items():
            table.add_row(stage, f"{one.calls:,}", f"{one.tokens:,}", f"{one.cost:.2f}")
        console = console or Console()
        console.print(table)
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            console.print(f"Rows that cannot be used: {reasons}", markup=False)


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
    Says what [`distill`] would ask for at most.

    A byte of text counts as a token, an image as many as its size gives the most demanding models, and what is still
    to be written as `max_tokens`. Real cost is several times lower.

    Args:
        dataset, num_candidates, num_shuffles, rubric, min_spread, language, image_root, image_options:
            As in [`distill`].
        judge ([`~trl_dt2it.judge.Endpoint`]):
            Where the judge is, with prices.
        generator ([`~trl_dt2it.judge.Endpoint`], *optional*):
            Where the generator is.

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
        if not pools and generator is None:
            plan.left_out["no_candidates"] += 1
        for pool in pools or ([_unwritten(question, settings, generator, plan)] if generator is not None else []):
            unknown = 0 if pools else num_candidates
            _add_judging(pool, settings, judge, generator, plan, unknown)
            if generator is not None and min_spread > 0:
                _add_diversity(pool, settings, judge, generator, plan, unknown)
    return plan


def _add(plan: DistillPlan, stage: str, one: Spending, count: int = 1) -> None:
    many = Spending(one.calls * count, one.tokens * count, one.cost * count)
    plan.spending[stage] = plan.spending.get(stage, Spending()) + many


def _with_text(one: Spending, endpoint: Endpoint, tokens: int) -> Spending:
    return Spending(one.calls, one.tokens + tokens, one.cost + endpoint.cost(tokens, 0))


def _unwritten(question: Question, settings: JudgingSettings, generator: Endpoint, plan: DistillPlan) -> Pool:
    """A pool with stand-ins for the candidates that are still to be written."""
    one = most_spending(generator, generation_messages(question))
    _add(plan, "generation", one, settings.num_candidates)
    return Pool.of(question, generator.model, [str(number) for number in range(settings.num_candidates)])


def _add_judging(
    pool: Pool,
    settings: JudgingSettings,
    judge: Endpoint,
    generator: Endpoint | None,
    plan: DistillPlan,
    unknown: int,
) -> None:
    count, length = len(pool.candidates), generator.max_tokens if generator is not None else 0
    if count > 1:
        one = most_spending(judge, listwise_request(pool, range(count), settings).messages)
        orders = len(balanced_orders(count, settings.num_shuffles, ""))
        _add(plan, "listwise", _with_text(one, judge, unknown * length), orders)
    for candidate in range(count):
        one = most_spending(judge, pointwise_request(pool, candidate, settings).messages)
        _add(plan, "pointwise", _with_text(one, judge, length if unknown else 0))


def _add_diversity(
    pool: Pool,
    settings: JudgingSettings,
    judge: Endpoint,
    generator: Endpoint,
    plan: DistillPlan,
    unknown: int,
) -> None:
    """If the candidates of every pool were alike: one more for each, which is judged with the others."""
    if not pool.candidates:
        return
    question, length = pool.question, generator.max_tokens
    longest = max((candidate.text for candidate in pool.candidates), key=lambda text: len(text.encode()))
    messages = candidate_messages(
        "rewritten", question.text, question.image_blocks, longest, reference=question.reference
    )
    _add(plan, "diversity", _with_text(most_spending(generator, messages), generator, length if unknown else 0))
    count = len(pool.candidates) + 1
    one = most_spending(judge, listwise_request(pool, range(count - 1), settings).messages)
    orders = len(balanced_orders(count, settings.num_shuffles, ""))
    _add(plan, "listwise again", _with_text(one, judge, (unknown + 1) * length + 128), orders)
    one = most_spending(judge, pointwise_request(pool, 0, settings).messages)
    _add(plan, "pointwise again", _with_text(one, judge, length))


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
    Builds preference pairs out of prompts.

    A killed run is run again with the same arguments and goes on where it was: all that is asked depends on the rows
    and the seed alone, and the clients keep every reply. No row, candidate or pair is lost without a count in the
    report.

    Args:
        dataset (`Dataset`):
            Rows with `prompt` (messages) or `question` (a string), `images`, and where there are such a `reference`
            answer and `candidates` (a list of dicts with `text` and `generator`). Without candidates, `generator`
            writes them.
        judge ([`~trl_dt2it.judge.JudgeClient`]):
            The judge.
        generator ([`~trl_dt2it.judge.JudgeClient`], *optional*):
            Writes candidates where a row has none, with a temperature above 0, and corrupted or rewritten ones where
            all candidates of a prompt are alike.
        num_candidates (`int`, *optional*, defaults to `4`):
            Number of candidates to generate for a prompt.
        num_shuffles (`int`, *optional*, defaults to `3`):
            Number of orders in which the judge sees the candidates of a prompt; position bias needs at least 2. As
            many as there are candidates show each candidate in every place.
        rubric ([`~trl_dt2it.judge.Rubric`], *optional*):
            What answers are judged by, and the scale.
        min_gap (`float`, *optional*, defaults to `1.0`):
            Smallest gap, in points, by which both scores must tell two candidates apart.
        min_spread (`float`, *optional*, defaults to `2.0`):
            Smallest distance of a prompt's best candidate from its worst, in points; below it, one more candidate is
            made. 0 makes none.
        num_bins (`int`, *optional*, defaults to `5`):
            Number of bins of strength, from `min_gap` to the length of the scale.
        pairs_per_prompt (`int`, *optional*, defaults to `2`):
            Most pairs of one prompt (`group_id`); `None` for no limit.
        max_pairs (`int`, *optional*):
            Most pairs in all.
        language (`str`, *optional*):
            Language of the instructions, `"en"` or `"zh"`; by default that of each question.
        source (`str`, *optional*, defaults to `"distilled"`):
            What the column `source` says, and the beginning of `pair_id`.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in [`ImageOptions`].
        image_options ([`ImageOptions`], *optional*):
            Where else images may come from, and how large they may be.
        prompts_at_once (`int`, *optional*, defaults to `32`):
            Number of prompts whose requests are held, images included, and asked together. More keep more calls
            going. It changes no result.
        seed (`int`, *optional*, defaults to `42`):
            Seed of orders and of the draw.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `tuple[Dataset, DistillReport]`: pairs with the columns of [`DISTILLED_FEATURES`], and what happened.

    Raises:
        `ValueError`: if an argument is out of range, or the generator's temperature is 0 and it has to write several
            candidates.
        [`~trl_dt2it.judge.JudgeError`]: if an endpoint cannot be used at all.
    """
    _check(dataset, generator, num_candidates, num_shuffles, rubric, min_gap, min_spread, num_bins)
    for name, value in (("pairs_per_prompt", pairs_per_prompt), ("max_pairs", max_pairs)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1, or None for no limit.")
    if prompts_at_once < 1:
        raise ValueError(f"`prompts_at_once` is {prompts_at_once}; it must be at least 1.")
    settings = JudgingSettings(num_candidates, num_shuffles, rubric, min_spread, language, seed)
    rows, report = leave_images_encoded(dataset), DistillReport(prompts=len(dataset))
    options, judged = with_image_root(image_options, image_root), list[JudgedPool]()
    seen: set[str] = set()
    with tqdm(total=len(rows), desc="prompts", unit="prompt", disable=None if show_progress else True) as bar:
        for start in range(0, len(rows), prompts_at_once):
            stop, pools = min(start + prompts_at_once, len(rows)), list[Pool]()
            for index in range(start, stop):
                pools += _read(rows[index], index, source, options, generator, report, seen)
            judged += judge_pools(pools, settings, judge=judge, generator=generator, report=report)
            for pool in pools:
                pool.question.image_blocks.clear()  # the largest part of it, and no longer needed
            bar.update(stop - start)
    listwise, report.position_bias = listwise_scores(judged, rubric)
    pairs = agreed_pairs(judged, listwise, rubric, min_gap, report)

    bins = strength_bins(
        np.array([pair.agreed.strength for pair in pairs]),
        num_bins=num_bins,
        low=min_gap,
        high=rubric.high - rubric.low,
    )
    found = draw_pairs(
        bins,
        [pair.one.pool.question.group_id for pair in pairs],
        [pair.one.pool.generator for pair in pairs],
        [pair.key for pair in pairs],
        pairs_per_prompt=pairs_per_prompt,
        max_pairs=max_pairs,
        seed=seed,
    )
    report.bin_edges = np.linspace(min_gap, rubric.high - rubric.low, num_bins + 1).tolist()
    _count(judged, pairs, bins, found, num_bins, report)
    report.usage = {"judge": judge.usage().as_dict()}
    if generator is not None and generator is not judge:
        report.usage["generator"] = generator.usage().as_dict()
    drawn = np.flatnonzero(found == DRAWN)
    about = {"judge": judge.endpoint.model, "rubric": rubric.digest()[:16]}
    effects = {bias.num_candidates: bias.effects for bias in report.position_bias}
    columns = [pair_row(pairs[place], int(bins[place]), source, about, rubric, effects) for place in drawn]
    positions = [pairs[place].one.pool.question.row for place in drawn]
    return with_images(rows, positions, columns, options, DISTILLED_FEATURES), report


def _check(
    dataset: Dataset,
    generator: JudgeClient | None,
    num_candidates: int,
    num_shuffles: int,
    rubric: Rubric,
    min_gap: float,
    min_spread: float,
    num_bins: int,
) -> None:
    columns = dataset.column_names
    if "prompt" not in columns and "question" not in columns:
        raise ValueError(f"The rows have neither `prompt` nor `question`; their columns are {', '.join(columns)}.")
    if "candidates" not in columns and generator is None:
        raise ValueError("The rows have no `candidates`, and there is no `generator` to write them; give one of them.")
    if num_candidates < 2 or num_shuffles < 1 or num_bins < 1:
        raise ValueError(
            f"`num_candidates` must be at least 2, `num_shuffles` and `num_bins` at least 1, got {num_candidates}, "
            f"{num_shuffles} and {num_bins}."
        )
    if not 0 < min_gap < rubric.high - rubric.low or not 0 <= min_spread <= rubric.high - rubric.low:
        raise ValueError(
            f"`min_gap` must be above 0 and below the length of the scale, {rubric.high - rubric.low}, and "
            f"`min_spread` between 0 and that length, got {min_gap} and {min_spread}."
        )
    if "candidates" not in columns and generator is not None and generator.endpoint.temperature == 0:
        raise ValueError(
            "The generator's temperature is 0, so that all its candidates would be equal; set it above 0, such as 1.0."
        )


def _read(
    row: dict[str, Any],
    index: int,
    source: str,
    options: ImageOptions,
    generator: JudgeClient | None,
    report: DistillReport,
    seen: set[str],
) -> list[Pool]:
    """The pools of a row; what cannot be used is settled at once."""
    try:
        question = read_question(row, index, source=source, image_options=options)
        pools = read_pools(question, row.get("candidates"))
    except RowError as error:
        report.pools += 1
        report.settle(error.reason, row_name(row, index), str(error))
        return []
    if not pools and generator is not None:
        pools = [Pool(question, generator.endpoint.model)]
    report.pools += max(1, len(pools))
    if not pools:
        report.settle("no_candidates", question.name)
    new = []
    for pool in pools:
        if pool.key in seen:
            report.settle("duplicate_prompt", question.name)
        else:
            seen.add(pool.key)
            new.append(pool)
    return new


def _count(
    judged: list[JudgedPool],
    pairs: list[JudgedPair],
    bins: np.ndarray,
    found: np.ndarray,
    num_bins: int,
    report: DistillReport,
) -> None:
    """Settles the pools that have pairs, and counts pairs by bin."""
    paired = {id(pairs[place].one) for place in np.flatnonzero(found == DRAWN)}
    for one in judged:
        if one.failure is None:
            report.settle("paired" if id(one) in paired else "not_drawn", one.pool.question.name)
    for generator in sorted({pair.one.pool.generator for pair in pairs}):
        own = np.array([pair.one.pool.generator == generator for pair in pairs])
        report.agreed_by_bin[generator] = np.bincount(bins[own], minlength=num_bins).tolist()
        report.pairs_by_bin[generator] = np.bincount(bins[own & (found == DRAWN)], minlength=num_bins).tolist()
    for name, status in (("prompt_is_full", PROMPT_IS_FULL), ("bin_is_full", BIN_IS_FULL)):
        report.not_drawn[name] = int((found == status).sum())
