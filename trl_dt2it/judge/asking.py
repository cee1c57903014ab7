"""One run over the requests that have no reply yet: several calls at a time, tried again where that may help."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from .budget import Budget, Spending, most_spending
from .endpoint import Endpoint
from .failures import Failure, JudgeError, classify, delay
from .prompts import reminded
from .replies import conclude, read_completion, unanswered
from .requests import JudgeReply, JudgeRequest, Status
from .store import JudgeStore
from .verdicts import verdict_schema


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
    """
    The state of a run.

    Parameters:
        endpoint ([`Endpoint`]), store ([`JudgeStore`]), budget ([`Budget`]):
            As in [`JudgeClient`]. The store is open.
        create (`Callable`):
            Makes one call: `chat.completions.create` of the `openai` client.
        secret (`str`, *optional*):
            The key, to be kept out of all messages.
        max_concurrency, max_retries, max_reasks (`int`), retry_delay, max_retry_delay (`float`):
            As in [`JudgeClient`].
        on_reply (`Callable`):
            Is called with each key and its reply.
        stop_early (`bool`, *optional*, defaults to `False`):
            As in [`JudgeClient.ask`].
        silent (`int`, *optional*, defaults to `0`):
            Requests in a row whose tries all failed, those of the run before among them.
    """

    endpoint: Endpoint
    store: JudgeStore
    budget: Budget
    create: Callable[..., Any] = field(repr=False)
    secret: str | None = field(repr=False)
    max_concurrency: int
    max_retries: int
    max_reasks: int
    retry_delay: float
    max_retry_delay: float
    on_reply: Callable[[str, JudgeReply], None]
    stop_early: bool = False
    silent: int = 0
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
        """
        Asks all requests, or stops at the first error that concerns all of them.

        Args:
            pending (`dict[str, JudgeRequest]`):
                Requests by key.

        Raises:
            [`JudgeError`]: if the run cannot go on; calls under way are waited for and kept.
        """
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
