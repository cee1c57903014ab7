"""What `distill` would ask for and what that may cost, without asking."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from ..data.columns import leave_images_encoded
from ..data.images import ImageOptions, with_image_root
from ..data.rows import RowError
from ..judge.endpoint import Endpoint
from ..judge.rubric import DEFAULT_RUBRIC, Rubric
from ..judge.store import Spending, most_spending
from .candidates import Pool, read_pools
from .diversity import candidate_messages
from .judging import JudgingSettings, listwise_request, pointwise_request
from .position_bias import balanced_orders
from .questions import Question, generation_messages, read_question


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
