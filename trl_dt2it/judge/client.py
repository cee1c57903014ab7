"""The judge's client: requests in, replies out, in order, and nothing is paid twice."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from ..utils import digest, digest_of
from .asking import Run
from .budget import Budget
from .endpoint import Endpoint
from .failures import JudgeError, import_error
from .logs import redacted_logs
from .replies import conclude
from .requests import UNANSWERED, JudgeReply, JudgeRequest, data_uri_bytes
from .store import JudgeStore
from .usage import UsageReport
from .verdicts import ListwiseVerdict, verdict_schema


logger = logging.getLogger(__name__)

__all__ = ["Budget", "Endpoint", "JudgeClient", "JudgeError", "JudgeReply", "JudgeRequest", "UsageReport"]


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
