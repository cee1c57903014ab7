"""The append-only store of replies, and the budget that calls are paid from."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from PIL import Image

from ..data.rows import blocks
from .endpoint import Endpoint, JudgeError
from .rubric import data_uri_bytes


logger = logging.getLogger(__name__)

SYNC_EVERY = 16  # records between two waits for the disk

# Keys of a configured endpoint that are no fields of it: limits by the name in `Budget`, and arguments of the client.
_BUDGET = {"max_calls": "max_calls", "budget_tokens": "max_tokens", "max_cost": "max_cost"}
_OTHERS = ("max_concurrency", "max_retries")


@dataclass(frozen=True)
class Budget:
    """
    Limits over the whole life of a store, earlier runs included.

    Parameters:
        max_calls, max_tokens (`int`, *optional*):
            Most calls, failures and repetitions included, and most tokens of prompts and replies together.
        max_cost (`float`, *optional*):
            Most USD, by the prices of the endpoint.
    """

    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")


@dataclass(frozen=True)
class Spending:
    """The price of calls, or its upper limit."""

    calls: int = 0
    tokens: int = 0  # of prompts and replies
    cost: float = 0.0  # USD

    def __add__(self, other: Spending) -> Spending:
        return Spending(self.calls + other.calls, self.tokens + other.tokens, self.cost + other.cost)

    def fits(self, budget: Budget) -> bool:
        """Compare with the limits of a budget."""
        limits = (budget.max_calls, budget.max_tokens, budget.max_cost)
        spent = (self.calls, self.tokens, self.cost * (1 - 1e-12))  # sums of floats are not exact
        return all(limit is None or value <= limit for limit, value in zip(limits, spent, strict=True))


def prompt_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """Bound the tokens of messages, at one for each byte of text, and more for images."""
    # The chat template has tokens of its own.
    return 64 + 32 * len(messages) + sum(_part_tokens(part) for one in messages for part in blocks(one))


def _part_tokens(part: Mapping[str, Any]) -> int:
    if part["type"] == "text":
        return len(part["text"].encode("utf-8", "surrogatepass"))
    content = data_uri_bytes(part["image_url"]["url"]) if part["type"] == "image_url" else None
    try:
        with Image.open(BytesIO(content or b"")) as image:
            width, height = image.size
    except Exception:  # on hostile bytes, Pillow's plugins raise nearly anything
        return 16384  # of unknown size
    # A token for 16 x 16 pixels, and a fixed part for models that cut every image into tiles.
    return 1600 + math.ceil(width / 16) * math.ceil(height / 16)


def most_spending(endpoint: Endpoint, messages: Sequence[Mapping[str, Any]], factor: float = 1.0) -> Spending:
    """Bound the price of a call, for a model that makes `factor` times the tokens of a prompt."""
    tokens = math.ceil(prompt_tokens(messages) * factor)
    return Spending(1, tokens + endpoint.max_tokens, endpoint.cost(tokens, endpoint.max_tokens))


def read_endpoint(role: str, given: Mapping[str, Any] | str) -> tuple[Endpoint, dict[str, Any]]:
    """Read an endpoint, and the other arguments of its client."""
    rest = dict(json.loads(given) if isinstance(given, str) else given)
    if unknown := sorted(set(rest) - {one.name for one in fields(Endpoint)} - set(_BUDGET) - set(_OTHERS)):
        raise ValueError(f"`{role}` has the unknown key `{unknown[0]}`.")
    if missing := [name for name in ("base_url", "model") if name not in rest]:
        raise ValueError(f"`{role}` has no `{missing[0]}`.")
    limits = {field: rest.pop(name) for name, field in _BUDGET.items() if name in rest}
    others = {name: rest.pop(name) for name in _OTHERS if name in rest}
    return Endpoint(**rest), {"budget": Budget(**limits), **others}


class JudgeStore:
    """An append-only file of calls and their replies."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"The store {str(self.path)!r} is a folder; pass the path of a file such as judge.jsonl.")
        self.settled = Spending()  # calls whose price is known
        self.unsettled: dict[str, Spending] = {}  # by call, sent without a price that came back
        self.input_tokens = self.output_tokens = 0
        self.answered: set[str] = set()  # addresses that gave a reply at least once
        self.unreadable = 0  # lines
        self._replies: dict[str, list[int]] = {}  # by key: where its replies begin in the file
        self._read = self._unsynced = 0  # bytes, records
        self._file: IO[bytes] | None = None

    @contextmanager
    def opened(self):
        """Lock the store, read it to its end and open it for writing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(f"{self.path}.lock").acquire(timeout=0)
        except Timeout:
            raise JudgeError(
                f"Another run is writing to the store {str(self.path)!r}; wait for it, or give each run its own."
            ) from None
        with lock, open(self.path, "ab+", buffering=0) as self._file:
            try:
                self._repair_end()
                self.refresh()
                yield self
                os.fsync(self._file.fileno())
            finally:
                self._file = None

    def refresh(self) -> None:
        """Read the records written since the last time."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn, or being written
                self._take(line)

    def __len__(self) -> int:
        return len(self._replies)

    def replies(self, key: str) -> list[dict[str, Any]]:
        """Read the replies to a request, in order."""
        records = []
        for offset in self._replies.get(key, ()):
            with open(self.path, "rb") as file:
                file.seek(offset)
                records.append(json.loads(file.readline()))
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, which only a failing disk or a power cut can lose afterward."""
        if self._file is None:
            raise JudgeError("The store is not open for writing.")
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                self._repair_end()
                raise OSError(f"{written} of {len(line)} bytes were written")
            self._unsynced += 1
            if self._unsynced >= SYNC_EVERY:
                os.fsync(self._file.fileno())
                self._unsynced = 0
        except OSError as error:
            raise JudgeError(f"The store {str(self.path)!r} cannot be written ({error}); free some space.") from None
        self._take(line)

    def _repair_end(self) -> None:
        """End a torn last line, so that the next record begins a line."""
        assert self._file is not None
        if size := self._file.seek(0, os.SEEK_END):
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def _take(self, line: bytes) -> None:
        """Count the next record; skip a torn line with a warning."""
        offset = self._read
        self._read += len(line)
        try:
            record = json.loads(line)
            event, call, key = record["event"], str(record["call"]), str(record["key"])
            spending = Spending(0, int(record["tokens"]), float(record["cost"]))
            if event not in ("sent", "reply", "failed"):
                raise ValueError(event)
            tokens = (int(record["input_tokens"]), int(record["output_tokens"])) if event == "reply" else (0, 0)
            endpoint = str(record["endpoint"])
        except (ValueError, KeyError, TypeError, RecursionError):
            if line.strip():
                self.unreadable += 1
                logger.warning("Line at byte %d of the store %s is torn and is skipped.", offset, self.path)
            return
        if event == "sent":
            self.settled += Spending(1)
            self.unsettled[call] = spending
            return
        if not record.get("is_unsettled"):
            self.unsettled.pop(call, None)
            self.settled += spending
        if event == "reply":
            self._replies.setdefault(key, []).append(offset)
            self.input_tokens += tokens[0]
            self.output_tokens += tokens[1]
            self.answered.add(endpoint)

    @property
    def spent(self) -> Spending:
        """Sum the price of all calls, without a known price their upper limit."""
        return sum(self.unsettled.values(), self.settled)
