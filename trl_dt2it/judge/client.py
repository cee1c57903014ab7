"""The client that asks a judge: retries, budget, and no call paid twice."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from anyio.from_thread import start_blocking_portal
from tqdm.auto import tqdm

from ..utils import digest, digest_of
from .endpoint import Endpoint, Failure, JudgeError, UsageReport, classify, delay, import_error, redacted_logs
from .prompts import reminded
from .replies import ListwiseVerdict, conclude, read_completion, unanswered, verdict_schema
from .rubric import UNANSWERED, JudgeReply, JudgeRequest, Status, data_uri_bytes
from .store import Budget, JudgeStore, Spending, most_spending


logger = logging.getLogger(__name__)

# Limits after which the fault is the endpoint's, or the settings', and not the requests':
_REFUSED_IN_A_ROW = 5  # requests refused as malformed before any was answered
_SILENT_FROM_THE_START = 3  # requests that used up their tries before any was answered
_MOST_ALIKE = 64  # replies that are all cut, and paid; requests rejected in a row


class JudgeClient:
    """
    A client that asks a judge, and remembers every reply.

    A killed run resumes from its store: no request with a reply there is sent again. Clients may share a store, one
    after the other.

    Args:
        endpoint ([`Endpoint`]):
            Address and settings of the judge.
        store (`str` or `os.PathLike`):
            File of replies, `.jsonl`, created if it is missing.
        budget ([`Budget`], *optional*):
            Limits over the life of the store.
        max_concurrency, max_reasks (`int`, *optional*, default to `8` and `2`):
            Most calls at a time, and most repetitions of a question whose reply cannot be read.
        max_retries (`int`, *optional*, defaults to `6`):
            Most retries of a call after a busy or failing server, a timeout or a lost connection.
        retry_delay, max_retry_delay (`float`, *optional*, defaults to `1.0` and `60.0`):
            Seconds before the first retry, doubled with each one, and at most. `Retry-After` is honored.
        show_progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        store: str | os.PathLike,
        *,
        max_concurrency: int = 8,
        budget: Budget | None = None,
        max_retries: int = 6,
        max_reasks: int = 2,
        retry_delay: float = 1.0,
        max_retry_delay: float = 60.0,
        show_progress: bool = True,
    ) -> None:
        if max_concurrency < 1 or max_retries < 0 or max_reasks < 0:
            raise ValueError("`max_concurrency` must be at least 1, and `max_retries` and `max_reasks` at least 0.")
        self.endpoint, self.store, self.budget = endpoint, JudgeStore(store), budget or Budget()
        self.max_concurrency, self.max_retries, self.max_reasks = max_concurrency, max_retries, max_reasks
        self.retry_delay, self.max_retry_delay, self.show_progress = retry_delay, max_retry_delay, show_progress
        self._statuses: Counter[str] = Counter()
        self._cached, self._has_warned = 0, False
        self._silent = 0  # requests in a row, of the last runs, without an answer

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint!r}, {str(self.store.path)!r})"

    def ask(self, requests: Sequence[JudgeRequest], *, stop_early: bool = False) -> list[JudgeReply]:
        """
        Ask requests that have no reply in the store yet.

        Args:
            requests (`Sequence[JudgeRequest]`):
                Duplicates are asked once.
            stop_early (`bool`, *optional*, defaults to `False`):
                Raise if the endpoint answers none of them, stops answering on the way, cuts the first 64 replies or
                rejects 64 requests in a row. Otherwise the replies' statuses tell.

        Returns:
            `list[JudgeReply]`: a reply per request, in order.

        Raises:
            [`JudgeError`]: if the endpoint, its key or the store is at fault. Replies until then are kept.
            `ValueError`: if a request for a [`ListwiseVerdict`] has no `num_scores`.
        """
        for request in requests:
            if request.schema is ListwiseVerdict and request.num_scores is None:
                raise ValueError("A request for a `ListwiseVerdict` needs `num_scores`, the number of answers shown.")
        keys = [request_key(self.endpoint, request) for request in requests]
        replies: dict[str, JudgeReply] = {}
        with self.store.opened():
            pending: dict[str, JudgeRequest] = {}
            for key, request in dict(zip(keys, requests, strict=True)).items():
                reply = conclude(request, self.endpoint, self.store.replies(key), self.max_reasks)
                if reply is None:
                    pending[key] = request
                else:
                    replies[key] = reply
            if pending:
                self._ask_pending(pending, replies, len(requests), stop_early)
        answers = []
        for key in keys:
            answers.append(replies[key])
            if replies[key].status not in (*UNANSWERED, "rejected"):  # a duplicate was paid once
                replies[key] = replace(replies[key], is_cached=True)
        self._statuses.update(reply.status for reply in answers)
        self._cached += sum(reply.is_cached for reply in answers)
        cut = next((reply for reply in answers if reply.status == "cut"), None)
        if cut is not None and not self._has_warned:
            self._has_warned = True  # not for each of thousands
            logger.warning("%s Replies like this count as no answer.", cut.error)
        return answers

    def most_left(self, requests: Sequence[JudgeRequest]) -> Spending:
        """Bound the price of asking requests once, without those that have a reply in the store."""
        replies = [self.store.replies(request_key(self.endpoint, request)) for request in requests]
        open_ones = [
            request
            for request, records in zip(requests, replies, strict=True)
            if conclude(request, self.endpoint, records, self.max_reasks) is None
        ]
        return sum((most_spending(self.endpoint, request.messages) for request in open_ones), Spending())

    def usage(self) -> UsageReport:
        """Report the spending of the store, and the replies of this client."""
        self.store.refresh()
        settled, unsettled = self.store.settled, self.store.unsettled.values()
        return UsageReport(
            calls=settled.calls,
            cached=self._cached,
            by_status=dict(self._statuses),
            input_tokens=self.store.input_tokens,
            output_tokens=self.store.output_tokens,
            cost=settled.cost,
            unsettled_calls=len(unsettled),
            unsettled_cost=sum(spending.cost for spending in unsettled),
        )

    def _ask_pending(
        self, pending: dict[str, JudgeRequest], replies: dict[str, JudgeReply], total: int, stop_early: bool
    ) -> None:
        secret = self.endpoint.api_key()
        statuses: Counter[str] = Counter(reply.status for reply in replies.values())
        shown: dict[str, Any] = {"desc": "judge", "unit": "reply", "disable": None if self.show_progress else True}
        with tqdm(total=total, initial=total - len(pending), **shown) as bar, redacted_logs(secret):

            def on_reply(key: str, reply: JudgeReply) -> None:
                replies[key] = reply
                statuses[reply.status] += 1
                bar.set_postfix({**statuses, "usd": f"{self.store.spent.cost:.3f}"}, refresh=False)
                bar.update()

            run = _Run(self, secret, on_reply, stop_early, self._silent if stop_early else 0)
            self._silent = 0
            # In another thread, because a notebook's has a running loop already. An interrupt cancels all calls.
            with start_blocking_portal() as portal:
                portal.call(run.ask_all, pending)
            self._silent = run.silent


@dataclass
class _Run:
    """The state of a run of a client, whose store is open."""

    client: JudgeClient
    secret: str | None = field(repr=False)  # the key, which no message may hold
    on_reply: Callable[[str, JudgeReply], None]  # is called with each key and its reply
    stop_early: bool
    silent: int  # requests in a row whose tries all failed, including those of the previous run
    fatal: JudgeError | None = None
    create: Callable[..., Any] = field(init=False, repr=False)  # makes a call
    name: str = field(default_factory=lambda: secrets.token_hex(4))
    calls: int = 0
    in_flight: int = 0
    silence: str = ""  # last reason for silence
    replies: int = 0
    cut: int = 0  # replies
    rejected: int = 0  # requests in a row
    refused: int = 0
    refusal: str = ""
    underestimate: float = 1.0  # tokens of a prompt, as a multiple of the most that it should have
    takes_schemas: bool = False
    dropped: set[str] = field(default_factory=set)  # parameters that the endpoint does not take
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.endpoint, self.store = self.client.endpoint, self.client.store
        self.address = f"{self.endpoint.location} {self.endpoint.model}"

    async def ask_all(self, pending: dict[str, JudgeRequest]) -> None:
        """Ask all requests, or stop at the first error that concerns all of them."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise import_error("openai") from error
        queue, count = iter(pending.items()), min(self.client.max_concurrency, len(pending))
        key = self.secret or "none"  # never the key that the client would find in the environment
        options: dict[str, Any] = {"api_key": key, "timeout": self.endpoint.timeout, "max_retries": 0}
        async with AsyncOpenAI(base_url=self.endpoint.base_url, **options) as client:
            self.create = client.chat.completions.create
            await asyncio.gather(*(self._work(queue) for _ in range(count)))
        if self.refused and not self._has_answered:
            self._stop(self.refusal)
        if self.stop_early and self.silence and (self._is_gone or not self._has_answered):
            self._stop(
                f"{self.endpoint.model} at {self.endpoint.location} does not answer ({self.silence.rstrip('.')}); "
                f"see that it runs and start again: what it has replied is kept in {self.store.path}."
            )
        if self.fatal is not None:
            raise self.fatal

    def _stop(self, message: str) -> None:
        self.fatal = self.fatal or JudgeError(message)

    @property
    def _has_answered(self) -> bool:
        return self.address in self.store.answered

    @property
    def _is_gone(self) -> bool:
        return self.silent >= (max(8, self.client.max_concurrency) if self._has_answered else _SILENT_FROM_THE_START)

    async def _work(self, queue: Iterator[tuple[str, JudgeRequest]]) -> None:
        for key, request in queue:
            try:
                reply = await self._ask(key, request)
            except JudgeError as error:  # from the store
                self.fatal = self.fatal or error
            if self.fatal is not None:
                return
            self.on_reply(key, reply)

    async def _ask(self, key: str, request: JudgeRequest) -> JudgeReply:
        """Ask a request until it has a reply, as often as allowed."""
        while True:
            records = self.store.replies(key)
            reply = conclude(request, self.endpoint, records, self.client.max_reasks)
            if reply is not None:
                return replace(reply, is_cached=False)
            messages = request.messages
            for record in records if request.schema is not None else ():
                if record["status"] == "malformed":
                    messages = reminded(messages)
            if failure := await self._call_until_answered(key, request, messages, len(records)):
                statuses: dict[str, Status] = {"over_budget": "over_budget", "item": "rejected"}
                return unanswered(statuses.get(failure.kind, "transport"), records, failure.message)

    async def _call_until_answered(
        self, key: str, request: JudgeRequest, messages: list[dict], attempt: int
    ) -> Failure | None:
        """Make calls until one has a reply, which goes into the store, or until none will."""
        failures = paid = 0
        without: set[str] = set()  # parameters to try this request without
        while not self._is_gone:
            failure = await self._call(key, request, messages, attempt, self.dropped | without)
            if failure is None:
                self.silent = self.rejected = 0
                self.dropped |= without
                self.takes_schemas |= request.schema is not None and "response_format" not in self.dropped
                return None
            if failure.kind == "unsupported":
                self.dropped.add(str(failure.parameter))
                continue
            if failure.kind == "item" and request.schema is not None and not (self.takes_schemas or without):
                # It may be the schema, which not all endpoints take, or know how to name in an error.
                without.add("response_format")
                continue
            if failure.kind == "item" and not self._has_answered:
                self.refused, self.refusal = self.refused + 1, failure.message
            self.rejected = self.rejected + 1 if failure.kind == "item" else 0
            if self.stop_early and self.rejected >= _MOST_ALIKE:
                self._stop(f"{self.rejected} questions in a row were rejected, the last with: {failure.message}")
            if failure.kind == "fatal" or self.refused >= _REFUSED_IN_A_ROW:
                self._stop(failure.message)
            if failure.kind != "retry" or self.fatal is not None:
                return failure
            failures += 1
            paid += failure.most_tries is not None
            if failures > self.client.max_retries or paid == failure.most_tries:
                self.silent, self.silence = self.silent + 1, failure.message
                return failure
            limits = self.client.retry_delay, self.client.max_retry_delay
            await asyncio.sleep(delay(failures, key, failure.retry_after, *limits))
        reason = self.silence.rstrip(".")
        return Failure("retry", f"The endpoint has stopped answering ({reason}); this was not asked.")

    async def _call(
        self, key: str, request: JudgeRequest, messages: list[dict], attempt: int, without: set[str]
    ) -> Failure | None:
        """Make a call, if the budget has room for it, and put its reply into the store."""
        underestimate = self.underestimate  # calls under way may raise it in the meantime
        most = most_spending(self.endpoint, messages, underestimate)
        while not (self.store.spent + most).fits(self.client.budget):
            if not self.in_flight:
                return Failure("over_budget", "The budget has no room for this call.")
            await self.settled.wait()  # calls under way may turn out cheaper than they might
        if self.fatal is not None:
            return Failure("retry", "The run was stopped.")
        self.calls += 1
        call = {
            "call": f"{self.name}-{self.calls}",
            "key": key,
            "attempt": attempt,
            "endpoint": self.address,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        # Before the call, so that the next run knows of it, whatever happens to this one.
        self.store.append({"event": "sent", **call, "tokens": most.tokens, "cost": most.cost})
        self.in_flight += 1
        try:
            outcome = await self._send(self._parameters(request, messages, without), request, most)
            if isinstance(outcome, Failure):
                price = {"tokens": 0, "cost": 0.0, "is_unsettled": outcome.most_tries is not None}
                if outcome.kind != "refused":
                    self.store.append({"event": "failed", **call, **price, "error": outcome.message})
                    return outcome
                refusal = {"status": "refused", "text": None, "error": outcome.message, "finish_reason": None}
                outcome = {**refusal, "input_tokens": 0, "output_tokens": 0, "tokens": 0, "cost": 0.0}
            expected = (most.tokens - self.endpoint.max_tokens) / underestimate
            self.underestimate = max(self.underestimate, outcome["input_tokens"] / expected)
            self.store.append({"event": "reply", **call, **outcome})
            self.replies += 1
            self.cut += outcome["status"] == "cut"
            if self.stop_early and self.cut == self.replies >= _MOST_ALIKE:
                self._stop(f"The first {self.cut} replies are all cut, and paid: {outcome['error']}")
            return None
        finally:
            self.in_flight -= 1
            self.settled.set()
            self.settled = asyncio.Event()

    async def _send(
        self, parameters: dict[str, Any], request: JudgeRequest, most: Spending
    ) -> dict[str, Any] | Failure:
        """Send a call. Errors of the client end here: they hold the key in their request's headers."""
        try:
            # The client's own limit is on each wait for data, and a server may drip for ever.
            completion = await asyncio.wait_for(self.create(**parameters), self.endpoint.timeout)
        except Exception as error:
            return classify(error, parameters, self.secret, self.endpoint.api_key_env)
        return read_completion(completion, request, self.endpoint, most, self.secret)

    def _parameters(self, request: JudgeRequest, messages: list[dict], without: set[str]) -> dict[str, Any]:
        parameters: dict[str, Any] = {"model": self.endpoint.model, "messages": messages}
        # Reasoning models take the second name alone, and most other servers the first.
        name = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
        parameters[name] = self.endpoint.max_tokens
        if "temperature" not in without:
            parameters["temperature"] = self.endpoint.temperature
        if self.endpoint.extra_body:
            parameters["extra_body"] = dict(self.endpoint.extra_body)
        if request.schema is not None and "response_format" not in without:
            schema = verdict_schema(request.schema, request.num_scores, request.rubric)
            schema = {"name": "verdict", "strict": True, "schema": schema}
            parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
        return parameters


def request_key(endpoint: Endpoint, request: JudgeRequest) -> str:
    """Hash all that a reply depends on: requests with the same key are the same call."""
    schema, shown = request.schema, (request.num_scores, request.rubric)
    identity = {
        "endpoint": endpoint.location,
        "model": endpoint.model,
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
        "schema": None if schema is None else verdict_schema(schema, *shown),
        "rubric": None if request.rubric is None else request.rubric.digest(),
        "messages": _with_hashed_images(request.messages),
        "sample": request.sample,
    }
    if endpoint.extra_body:
        identity["extra_body"] = dict(endpoint.extra_body)
    return digest_of(identity)


def _with_hashed_images(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_hashed_images(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_with_hashed_images(part) for part in value]
    content = data_uri_bytes(value) if isinstance(value, str) and value.startswith("data:") else None
    return value if content is None else "sha256:" + digest(content)
