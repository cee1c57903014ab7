"""The client that asks a judge: retries, budget, no call paid twice."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from tqdm.auto import tqdm

from ..utils import digest, digest_of
from .endpoint import Endpoint, Failure, JudgeError, UsageReport, classify, delay, import_error, redacted_logs
from .prompts import reminded
from .replies import conclude, read_completion, unanswered
from .rubric import UNANSWERED, JudgeReply, JudgeRequest, ListwiseVerdict, Status, data_uri_bytes, verdict_schema
from .store import Budget, JudgeStore, Spending, most_spending


# Requests in a row that the endpoint refuses as malformed, before it ever answered one, that show that it is not the
# requests' fault.
_REFUSED_IN_A_ROW = 5

# Requests that used up their tries, before any was answered, that show that nobody is there.
_SILENT_FROM_THE_START = 3

# Replies that are all cut, and paid, that show that the limit is too low for what is asked; and requests in a row that
# the endpoint rejects, that show that it is not only these.
_MOST_ALIKE = 64


@dataclass
class Run:
    """The state of a run."""

    endpoint: Endpoint  # As in `JudgeClient`. The store is open
    store: JudgeStore
    budget: Budget
    create: Callable[..., Any] = field(repr=False)  # Makes one call: `chat.completions.create` of the `openai` client
    secret: str | None = field(repr=False)  # The key, to be kept out of all messages
    max_concurrency: int  # As in `JudgeClient`
    max_retries: int  # As in `JudgeClient`
    max_reasks: int  # As in `JudgeClient`
    retry_delay: float
    max_retry_delay: float
    on_reply: Callable[[str, JudgeReply], None]  # Is called with each key and its reply
    stop_early: bool = False  # As in `ask`
    silent: int = 0  # Requests in a row whose tries all failed, those of the run before among them
    fatal: JudgeError | None = None
    _name: str = field(default_factory=lambda: secrets.token_hex(4))
    _calls: int = 0
    _in_flight: int = 0
    _silence: str = ""  # why the last of them did
    _replies: int = 0  # of this run
    _cut: int = 0  # of these
    _rejected: int = 0  # requests in a row
    _refused: int = 0
    _refusal: str = ""
    _underestimate: float = 1.0  # tokens of a prompt, as a multiple of the most that it should have
    _takes_schemas: bool = False
    _dropped: set[str] = field(default_factory=set)  # parameters that the endpoint does not take
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask_all(self, pending: dict[str, JudgeRequest]) -> None:
        """Asks all requests, or stops at the first error that concerns all of them."""
        queue = iter(pending.items())
        workers = [self._work(queue) for _ in range(min(self.max_concurrency, len(pending)))]
        await asyncio.gather(*workers)
        if self.fatal is None and self._refused and self._address not in self.store.answered:
            self.fatal = JudgeError(self._refusal)
        is_silent = self._silence and (self._is_gone or self._address not in self.store.answered)
        if self.fatal is None and self.stop_early and is_silent:
            self.fatal = JudgeError(
                f"{self.endpoint.model} at {self.endpoint.location} does not answer ({self._silence.rstrip('.')}); "
                f"see that it runs and start again: what it has replied is kept in {self.store.path}."
            )
        if self.fatal is not None:
            raise self.fatal

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
        """Asks one request until it has a reply, as often as allowed."""
        while True:
            records = self.store.replies(key)
            reply = conclude(request, self.endpoint, records, self.max_reasks)
            if reply is not None:
                return replace(reply, is_cached=False)
            messages = request.messages
            for record in records if request.schema is not None else ():
                if record["status"] == "malformed":
                    messages = reminded(messages)
            failure = await self._call_until_answered(key, request, messages, len(records))
            if failure is not None:
                statuses: dict[str, Status] = {"over_budget": "over_budget", "item": "rejected"}
                return unanswered(statuses.get(failure.kind, "transport"), records, failure.message)

    @property
    def _is_gone(self) -> bool:
        """Whether the endpoint has stopped answering, or never began."""
        has_answered = self._address in self.store.answered
        return self.silent >= (max(8, self.max_concurrency) if has_answered else _SILENT_FROM_THE_START)

    async def _call_until_answered(
        self, key: str, request: JudgeRequest, messages: list[dict], attempt: int
    ) -> Failure | None:
        """Makes calls until one has a reply, which goes into the store, or until none will."""
        failures = paid = 0
        without: set[str] = set()  # what this request alone is tried without
        while not self._is_gone:
            failure = await self._call(key, request, messages, attempt, self._dropped | without)
            if failure is None:
                self.silent = self._rejected = 0
                self._dropped |= without
                self._takes_schemas |= request.schema is not None and "response_format" not in self._dropped
                return None
            if failure.kind == "unsupported":
                self._dropped.add(str(failure.parameter))
                continue
            if failure.kind == "item" and request.schema is not None and not (self._takes_schemas or without):
                # It may be the schema, which not all endpoints take, or know how to name in an error.
                without.add("response_format")
                continue
            if failure.kind == "item" and self._address not in self.store.answered:
                self._refused, self._refusal = self._refused + 1, failure.message
            self._rejected = self._rejected + 1 if failure.kind == "item" else 0
            if self.stop_early and self._rejected >= _MOST_ALIKE:
                self.fatal = self.fatal or JudgeError(
                    f"{self._rejected} questions in a row were rejected, the last with: {failure.message}"
                )
            if failure.kind == "fatal" or self._refused >= _REFUSED_IN_A_ROW:
                self.fatal = self.fatal or JudgeError(failure.message)
            if failure.kind != "retry" or self.fatal is not None:
                return failure
            failures += 1
            paid += failure.most_tries is not None
            if failures > self.max_retries or paid == failure.most_tries:
                self.silent, self._silence = self.silent + 1, failure.message
                return failure
            await asyncio.sleep(delay(failures, key, failure.retry_after, self.retry_delay, self.max_retry_delay))
        reason = self._silence.rstrip(".")
        return Failure("retry", f"The endpoint has stopped answering ({reason}); this was not asked.")

    async def _call(
        self, key: str, request: JudgeRequest, messages: list[dict], attempt: int, without: set[str]
    ) -> Failure | None:
        """Makes one call, if the budget has room for it. Its reply goes into the store."""
        most = self._corrected(most_spending(self.endpoint, messages))
        if not await self._has_room(most):
            return Failure("over_budget", "The budget has no room for this call.")
        if self.fatal is not None:
            return Failure("retry", "The run was stopped.")
        self._calls += 1
        call = {
            "call": f"{self._name}-{self._calls}",
            "key": key,
            "attempt": attempt,
            "endpoint": self._address,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        # Before the call, so that the next run knows of it, whatever happens to this one.
        self.store.append({"event": "sent", **call, "tokens": most.tokens, "cost": most.cost})
        parameters = self._parameters(request, messages, without)
        self._in_flight += 1
        try:
            outcome = await self._send(parameters, request, most)
        finally:
            self._in_flight -= 1
        try:
            if isinstance(outcome, Failure):
                price = {"tokens": 0, "cost": 0.0, "is_unsettled": outcome.may_be_billed}
                if outcome.kind != "refused":
                    self.store.append({"event": "failed", **call, **price, "error": outcome.message})
                    return outcome
                refusal = {"status": "refused", "text": None, "error": outcome.message, "finish_reason": None}
                outcome = {**refusal, "input_tokens": 0, "output_tokens": 0, "tokens": 0, "cost": 0.0}
            self._learn(outcome, most)
            self.store.append({"event": "reply", **call, **outcome})
            self._replies += 1
            self._cut += outcome["status"] == "cut"
            if self.stop_early and self._cut == self._replies >= _MOST_ALIKE:
                self.fatal = self.fatal or JudgeError(
                    f"The first {self._cut} replies are all cut, and paid: {outcome['error']}"
                )
            return None
        finally:
            self._wake()

    async def _send(
        self, parameters: dict[str, Any], request: JudgeRequest, most: Spending
    ) -> dict[str, Any] | Failure:
        """What came of a call. Errors end here: they hold the key in their request's headers."""
        try:
            # The client's own limit is on each wait for data, and a server may drip for ever.
            completion = await asyncio.wait_for(self.create(**parameters), self.endpoint.timeout)
        except Exception as error:
            return classify(error, parameters, self.secret, self.endpoint.api_key_env)
        return read_completion(completion, request, self.endpoint, most, self.secret)

    async def _has_room(self, most: Spending) -> bool:
        """Whether the budget has room, if need be after calls under way have turned out cheaper than they might."""
        while not (self.store.spent + most).fits(self.budget):
            if not self._in_flight:
                return False
            await self._settled.wait()
        return True

    def _wake(self) -> None:
        self._settled.set()
        self._settled = asyncio.Event()

    def _corrected(self, most: Spending) -> Spending:
        """Room for a model that makes more tokens of an image than was thought possible."""
        if self._underestimate == 1.0:
            return most
        read = math.ceil((most.tokens - self.endpoint.max_tokens) * self._underestimate)
        cost = self.endpoint.cost(read, self.endpoint.max_tokens)
        return Spending(1, read + self.endpoint.max_tokens, cost)

    def _learn(self, outcome: dict[str, Any], most: Spending) -> None:
        expected = (most.tokens - self.endpoint.max_tokens) / self._underestimate
        self._underestimate = max(self._underestimate, outcome["input_tokens"] / expected)

    def _parameters(self, request: JudgeRequest, messages: list[dict], without: set[str]) -> dict[str, Any]:
        parameters: dict[str, Any] = {"model": self.endpoint.model, "messages": messages}
        # Models that think take the second name alone, and most other servers the first.
        name = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
        parameters[name] = self.endpoint.max_tokens
        if "temperature" not in without:
            parameters["temperature"] = self.endpoint.temperature
        if self.endpoint.extra_body:
            parameters["extra_body"] = dict(self.endpoint.extra_body)
        if request.schema is not None and "response_format" not in without:
            schema = verdict_schema(request.schema, request.num_scores, request.rubric)
            parameters["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            }
        return parameters

    @property
    def _address(self) -> str:
        return f"{self.endpoint.location} {self.endpoint.model}"


logger = logging.getLogger(__name__)


class JudgeClient:
    """
    Asks a judge, and remembers every reply.

    A run that was killed goes on where it was: replies in the store are not asked for again. Two clients may share a
    store, one after the other.

    Args:
        endpoint ([`Endpoint`]):
            Where the judge is.
        store (`str` or `os.PathLike`):
            The file of replies, `.jsonl`. It is made if it is not there.
        max_concurrency (`int`, *optional*, defaults to `8`):
            Most calls at a time.
        budget ([`Budget`], *optional*):
            Limits over the life of the store.
        max_retries (`int`, *optional*, defaults to `6`):
            How often a call is made again after a busy or failing server, a time limit or a lost connection.
        max_reasks (`int`, *optional*, defaults to `2`):
            How often a reply that cannot be read is asked for again.
        retry_delay (`float`, *optional*, defaults to `1.0`):
            Seconds before the first retry; they double with each one. `Retry-After` is honoured.
        max_retry_delay (`float`, *optional*, defaults to `60.0`):
            Most seconds before a retry.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
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
        self.endpoint = endpoint
        self.store = JudgeStore(store)
        self.budget = budget or Budget()
        self.max_concurrency = max_concurrency
        self.max_retries = max_retries
        self.max_reasks = max_reasks
        self.retry_delay = retry_delay
        self.max_retry_delay = max_retry_delay
        self.show_progress = show_progress
        self._statuses: Counter[str] = Counter()
        self._cached = 0
        self._has_warned = False
        self._silent = 0  # requests in a row, of the last runs, that nobody answered

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint!r}, {str(self.store.path)!r})"

    def ask(self, requests: Sequence[JudgeRequest], *, stop_early: bool = False) -> list[JudgeReply]:
        """
        Asks requests that have no reply in the store yet.

        Args:
            requests (`Sequence[JudgeRequest]`):
                The requests. Equal ones are asked once.
            stop_early (`bool`, *optional*, defaults to `False`):
                Whether to raise if the endpoint answers none of them or stops answering on the way, if it cuts the
                first 64 replies, or if it rejects 64 requests in a row. Otherwise the replies' statuses say so.

        Returns:
            `list[JudgeReply]`: one per request, in order.

        Raises:
            [`JudgeError`]: if the endpoint, its key or the store is at fault. What was replied until then is kept.
            `ValueError`: if a [`ListwiseVerdict`] is asked for without the number of its scores.
        """
        for request in requests:
            if request.schema is ListwiseVerdict and request.num_scores is None:
                raise ValueError("A request for a `ListwiseVerdict` needs `num_scores`, the number of answers shown.")
        keys = [request_key(self.endpoint, request) for request in requests]
        replies: dict[str, JudgeReply] = {}
        with self.store.opened():
            pending: dict[str, JudgeRequest] = {}
            for key, request in zip(keys, requests, strict=True):
                if key not in replies and key not in pending:
                    reply = conclude(request, self.endpoint, self.store.replies(key), self.max_reasks)
                    if reply is None:
                        pending[key] = request
                    else:
                        replies[key] = reply
            if pending:
                self._ask_pending(pending, replies, len(requests), stop_early)
        # Whatever is asked for twice in one list was paid once.
        seen: set[str] = set()
        answers = []
        for key in keys:
            is_again = key in seen and replies[key].status not in (*UNANSWERED, "rejected")
            answers.append(replace(replies[key], is_cached=True) if is_again else replies[key])
            seen.add(key)
        self._statuses.update(reply.status for reply in answers)
        self._cached += sum(reply.is_cached for reply in answers)
        cut = next((reply for reply in answers if reply.status == "cut"), None)
        if cut is not None and not self._has_warned:
            self._has_warned = True  # once, and not for each of maybe thousands
            logger.warning("%s Replies like this count as no answer.", cut.error)
        return answers

    def usage(self) -> UsageReport:
        """
        What was spent, from the store, and what this client replied.

        Returns:
            [`UsageReport`]
        """
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
        disable = None if self.show_progress else True
        with tqdm(total=total, initial=total - len(pending), desc="judge", unit="reply", disable=disable) as bar:

            def on_reply(key: str, reply: JudgeReply) -> None:
                replies[key] = reply
                statuses[reply.status] += 1
                bar.set_postfix({**statuses, "usd": f"{self.store.spent.cost:.3f}"}, refresh=False)
                bar.update()

            with redacted_logs(secret):
                _in_thread(lambda: self._run(pending, secret, on_reply, stop_early))

    async def _run(
        self, pending: dict[str, JudgeRequest], secret: str | None, on_reply: Any, stop_early: bool
    ) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise import_error("openai") from error
        async with AsyncOpenAI(
            base_url=self.endpoint.base_url,
            api_key=secret or "none",  # never the one that the client would find in the environment by itself
            timeout=self.endpoint.timeout,
            max_retries=0,
        ) as client:
            run = Run(
                endpoint=self.endpoint,
                store=self.store,
                budget=self.budget,
                create=client.chat.completions.create,
                secret=secret,
                max_concurrency=self.max_concurrency,
                max_retries=self.max_retries,
                max_reasks=self.max_reasks,
                retry_delay=self.retry_delay,
                max_retry_delay=self.max_retry_delay,
                on_reply=on_reply,
                stop_early=stop_early,
                silent=self._silent if stop_early else 0,
            )
            self._silent = 0
            await run.ask_all(pending)
            self._silent = run.silent


def _in_thread(make_coroutine: Any) -> None:
    """Runs a coroutine in a thread of its own, because a notebook's thread has a running loop already."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = Future()

    async def main() -> None:
        task = asyncio.ensure_future(make_coroutine())
        started.set_result((asyncio.get_running_loop(), task))
        await task

    with ThreadPoolExecutor(1, thread_name_prefix="judge") as pool:
        future = pool.submit(asyncio.run, main())
        try:
            future.result()
        except BaseException:
            if not future.done():  # an interrupt of this thread, which the other does not see
                loop, task = started.result()
                loop.call_soon_threadsafe(task.cancel)
            raise


def request_key(endpoint: Endpoint, request: JudgeRequest) -> str:
    """The SHA-256 of all that a reply depends on: requests with the same key are the same call."""
    schema = None
    if request.schema is not None:
        schema = verdict_schema(request.schema, request.num_scores, request.rubric)
    identity = {
        "endpoint": endpoint.location,
        "model": endpoint.model,
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
        "schema": schema,
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
    if isinstance(value, str) and value.startswith("data:") and (content := data_uri_bytes(value)) is not None:
        return "sha256:" + digest(content)
    return value
