"""Verdicts on pairs: judges asked about both orders, and the judges of a run."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.columns import leave_images_encoded
from ..data.images import ImageOptions, with_image_root
from ..data.messages import read_prompt
from ..data.rows import SIDES, RowError, check_row, message_text, row_images, row_name
from ..data.t2i import CHINESE, ENGLISH
from ..judge.prompts import both_orders
from ..judge.rubric import UNANSWERED, JudgeRequest
from ..judge.store import Spending, most_spending, read_endpoint
from ..utils import digest
from .budget import ORDERS, Order
from .rules import UNREADABLE


if TYPE_CHECKING:
    from ..judge.client import JudgeClient
    from ..judge.endpoint import Endpoint


Swap = Literal["auto", "answers", "images"]

# Status of a pair that nobody has answered yet, or that nobody can answer.
NO_ANSWER = (*UNANSWERED, "rejected", "not_asked")

_VERDICTS = [{template.first_is_better, template.second_is_better} for template in (*ENGLISH, *CHINESE)]


@dataclass
class PairVotes:
    """Votes of J judges on N pairs."""

    votes: np.ndarray  # (N, J, 2), int8: in both orders 1 if chosen is better, -1, 0 for a tie, or `UNREADABLE`
    status: np.ndarray  # (N, J, 2), of each reply; `"not_asked"` for a row that cannot be asked about
    problems: dict[int, str] = field(default_factory=dict)  # rows that cannot be asked about, with the reason

    @property
    def unanswered(self) -> np.ndarray:
        """Mask of pairs that the next run asks about again: a judge was not asked or has not answered, `(N,)`."""
        return np.asarray(np.isin(self.status.astype(str), UNANSWERED).any(axis=(1, 2)))

    @property
    def over_budget(self) -> np.ndarray:
        """Mask of pairs that were not asked about, or not to the end, for lack of budget, `(N,)`."""
        return np.asarray((self.status.astype(str) == "over_budget").any(axis=(1, 2)))

    @property
    def answered(self) -> np.ndarray:
        """Mask of pairs that every judge has answered in both orders, with a verdict or without, `(N,)`."""
        return ~np.asarray(np.isin(self.status.astype(str), NO_ANSWER).any(axis=(1, 2)))

    def counts(self) -> dict[str, int]:
        """Count the replies by status."""
        return dict(Counter(self.status.ravel().tolist()).most_common())


def judge_pairs(
    dataset: Dataset,
    judges: Sequence[JudgeClient],
    *,
    swap: Swap = "auto",
    language: str | None = None,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
    pairs_at_once: int = 64,
    within_budget: bool = False,
    num_worth: Callable[[PairVotes, int], int] | None = None,
    show_progress: bool = True,
) -> PairVotes:
    """
    Ask every judge about every pair, in both orders; replies that are in the clients' stores are not asked for.
    `within_budget` asks about the first pairs first, and of each pair only whole: where a judge has no room for both
    orders, no judge is asked. `num_worth` returns, for the votes so far, how many of a number of next pairs are worth
    asking about; votes end before the first that is not.
    """
    from ..judge.replies import PairwiseVerdict  # with `pydantic`, which rounds without judges lack

    rows, options = leave_images_encoded(dataset), with_image_root(image_options, image_root)
    words = {"first": 1, "tie": 0, "second": -1}
    shape = (len(rows), len(judges), 2)
    found = PairVotes(np.full(shape, UNREADABLE, dtype=np.int8), np.full(shape, "not_asked", dtype=object))
    if within_budget:
        for judge in judges:
            judge.store.refresh()
    stored, used = sum(len(judge.store) for judge in judges), 0

    def ask(pairs: list[_Asked]) -> None:
        asked = [(index, order, -sign if order else sign) for index, sign, _ in pairs for order in (0, 1)]
        requests = [request for *_, both in pairs for request in both]
        for number, judge in enumerate(judges):
            for (index, order, sign), reply in zip(asked, judge.ask(requests, stop_early=True), strict=True):
                if isinstance(reply.verdict, PairwiseVerdict):
                    found.votes[index, number, order] = sign * words[reply.verdict.better]
                found.status[index, number, order] = reply.status

    start, end = 0, len(rows)
    bar = tqdm(total=end, desc="judging", disable=None if show_progress else True)
    while start < end:
        stop, is_spent = min(start + pairs_at_once, end), within_budget and any(map(_is_spent, judges))
        if is_spent and used >= stored:
            stop = end
        if num_worth is not None:
            stop = start + num_worth(PairVotes(found.votes[:start], found.status[:start]), stop - start)
        if stop == start:
            end = start
            break
        if is_spent and used >= stored:
            found.status[start:stop] = "over_budget"  # without the work of writing all their requests
            end = stop
            break
        pairs = list[_Asked]()
        for index in range(start, stop):
            try:
                requests, sign = pair_requests(rows[index], index, swap, language, options)
            except RowError as error:
                found.problems[index] = f"{row_name(rows[index], index)}, {error.reason}: {error}"
                continue
            pairs.append((index, sign, requests))
        bar.update(stop - start)
        start = stop
        if not within_budget:
            ask(pairs)
            continue
        most = [[judge.most_left(requests) for judge in judges] for *_, requests in pairs]
        used += sum(2 - one.calls for each in most for one in each)
        while pairs:
            count = _num_affordable(judges, most)
            if not count:
                found.status[pairs[0][0]] = "over_budget"
                del pairs[0], most[0]
                continue
            ask(pairs[:count])
            del pairs[:count]
            # Copies of what has just been asked are in the store now.
            most = [[judge.most_left(requests) for judge in judges] for *_, requests in pairs]
    bar.close()
    return PairVotes(found.votes[:end], found.status[:end], found.problems)


_Asked = tuple[int, int, tuple[JudgeRequest, JudgeRequest]]  # row, 1 if the first answer is the chosen one, and both


def _num_affordable(judges: Sequence[JudgeClient], most: Sequence[Sequence[Spending]]) -> int:
    """Count the first pairs, of N pairs and J judges the `most` that they take, to ask about at once: those that leave
    each judge as much again for repetitions, or else a single pair."""
    counts = []
    for number, judge in enumerate(judges):
        spent, totals = judge.store.spent, list(accumulate(each[number] for each in most))
        fits = [not one.calls or (spent + one + one).fits(judge.budget) for one in totals]
        single = not totals[0].calls or (spent + totals[0]).fits(judge.budget)
        counts.append(max(int(single), fits.index(False) if False in fits else len(fits)))
    return min(counts)


def _is_spent(judge: JudgeClient) -> bool:
    """Tell that a judge has no room for both orders of the smallest pair."""
    least = Spending(1, judge.endpoint.max_tokens, judge.endpoint.cost(0, judge.endpoint.max_tokens))
    return not (judge.store.spent + least + least).fits(judge.budget)


def pair_requests(
    row: Mapping[str, Any], index: int, swap: Swap, language: str | None, options: ImageOptions
) -> tuple[tuple[JudgeRequest, JudgeRequest], int]:
    """Return the two requests about a row, the same for a flipped row, and 1 if the first answer is the chosen one."""
    check_row(row)
    from ..debias.distillation.candidates import Question  # with `pydantic` too

    question = Question(**vars(read_prompt(row, index, source="")), reference=None)
    images = row_images(row)
    chosen, rejected = (_answer(row[side]) for side in SIDES)
    if swap == "auto":
        # Swapped answers would leave the order of the images, and with it the judge's position bias.
        swap = "images" if len(images) == 2 and {chosen, rejected} in _VERDICTS else "answers"
    elif swap == "images" and len(images) != 2:
        swap = "answers"
    # Answers that stay in their positions have to be in the same ones before and after a flip.
    answers = sorted((chosen, rejected)) if swap == "images" else (chosen, rejected)
    wanted: dict[str, Any] = {"swap": swap, "language": language, "image_options": options}
    return both_orders(question.text, images, *answers, **wanted), 1 if answers[0] == chosen else -1


def _answer(side: Any) -> str:
    """Return the text of an answer; of several messages, the last is what was judged."""
    if isinstance(side, str):
        return side
    return message_text(side[-1])


def estimate_judging(
    dataset: Dataset,
    endpoints: Sequence[Endpoint],
    *,
    image_options: ImageOptions | None = None,
    sample: int = 32,
) -> Spending:
    """Return the most calls that all pairs of a set take without repetitions, and an estimate of tokens and price: the
    mean of the most that a `sample` of pairs may take, times all pairs."""
    rows, options = leave_images_encoded(dataset), image_options or ImageOptions()
    indices = np.unique(np.linspace(0, len(rows) - 1, min(sample, len(rows)), dtype=int)).tolist()
    asked = []
    for index in indices:
        with suppress(RowError):
            asked.append(pair_requests(rows[index], index, "auto", None, options)[0])
    requests = [one for pair in asked for one in pair]
    total = sum((most_spending(endpoint, one.messages) for endpoint in endpoints for one in requests), Spending())
    factor = len(rows) / max(1, len(asked))
    return Spending(2 * len(rows) * len(endpoints), round(total.tokens * factor), total.cost * factor)


@dataclass(frozen=True)
class Judging:
    """The judges, the pairs that they are asked about, and the votes that count."""

    endpoints: tuple[Endpoint, ...]
    client_kwargs: tuple[dict[str, Any], ...]  # other arguments of the `JudgeClient` of each
    votes: str = "unanimous"  # or `"majority"`, as in `relabel_by_vote`
    swap: Swap = "auto"  # as in `judge_pairs`
    language: str | None = None  # as in `judge_pairs`
    max_unanswered: float = 0.0  # share of pairs that may stay unanswered; with more, the run stops
    pairs: str = "dropped"  # or `"all"`: kept pairs too
    order: Order | None = None  # as in `judge_order`, until the budget is spent; `None` asks about all, or stops
    accuracy: float | None = None  # as in `judge_order`; `None` estimates it from the votes, once they are there

    def settings(self) -> dict[str, Any]:
        """Return all that votes depend on. A larger budget is part of it, so that pairs beyond it are asked about."""
        names = ("location", "model", "temperature", "max_tokens")
        judges = [{name: getattr(endpoint, name) for name in names} for endpoint in self.endpoints]
        for judge, endpoint in zip(judges, self.endpoints, strict=True):
            judge.update({"extra_body": dict(endpoint.extra_body)} if endpoint.extra_body else {})
        budgets = [dataclasses.asdict(kwargs["budget"]) for kwargs in self.client_kwargs]
        own: dict[str, Any] = {name: getattr(self, name) for name in ("votes", "swap", "language")}
        # Unless they are set, a run of an earlier release stays as it is.
        later = {"pairs": "dropped", "order": None, "accuracy": None}
        own |= {name: getattr(self, name) for name, usual in later.items() if getattr(self, name) != usual}
        return {"judges": judges, "budgets": budgets, **own}

    def clients(self, output_dir: Path) -> list[JudgeClient]:
        """Open the judges, each with a store of its own, which all rounds share."""
        from ..judge.client import JudgeClient

        clients = []
        for endpoint, kwargs in zip(self.endpoints, self.client_kwargs, strict=True):
            file = output_dir / f"judge-{digest(f'{endpoint.location} {endpoint.model}')[:8]}.jsonl"
            clients.append(JudgeClient(endpoint, file, **{"show_progress": False, **kwargs}))  # `judge_pairs` shows it
        return clients


def read_judging(given: Mapping[str, Any]) -> Judging:
    """Read the judges of a configuration: keys of one judge, or a list of judges as `endpoints`."""
    rest = dict(given)
    names = ("votes", "swap", "language", "max_unanswered", "pairs", "order", "accuracy")
    own: dict[str, Any] = {name: rest.pop(name) for name in names if name in rest}
    known: dict[str, tuple[str | None, ...]] = {
        "votes": ("unanimous", "majority"),
        "swap": ("auto", "answers", "images"),
        "pairs": ("dropped", "all"),
        "order": (*ORDERS, None),
    }
    for name, choices in known.items():
        if name in own and own[name] not in choices:
            told = ", ".join(filter(None, choices))
            raise ValueError(f"`{name}` of the judge is {own[name]!r}; choose one of {told}.")
    if not 0 <= own.get("max_unanswered", 0.0) <= 1:
        raise ValueError(f"`max_unanswered` of the judge is {own['max_unanswered']}; it is a share from 0 to 1.")
    accuracy = own.get("accuracy")
    if accuracy is not None and not (isinstance(accuracy, (int, float)) and 0.5 < accuracy <= 1):
        raise ValueError(f"`accuracy` of the judge is {accuracy!r}; it is a share above 0.5, and at most 1.")
    judges = rest.pop("endpoints", None)
    if judges is not None and rest:
        raise ValueError(f"`judge` has `endpoints`, and the key `{next(iter(rest))}` beside it; put it into these.")
    endpoints, clients = zip(*(read_endpoint("judge", one) for one in judges or [rest]), strict=True)
    return Judging(endpoints, clients, **own)
