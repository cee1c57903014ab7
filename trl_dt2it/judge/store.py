"""Every call and every reply, in a file that only grows.

JSON lines, because a line that is written is safe, a line that is torn harms no other, and any tool can read them.
A line is written before a call (`sent`, with what it may cost at most) and after it (`reply` or `failed`), each with
one system call, so that a killed process loses at most the calls that were under way, and the next run knows that
they may have been paid. Questions and images are not stored, only their SHA-256.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from .budget import Spending
from .failures import JudgeError


logger = logging.getLogger(__name__)

SYNC_EVERY = 16  # records between two waits for the disk


class JudgeStore:
    """
    The file of a store.

    Args:
        path (`str` or `os.PathLike`):
            The file. It is made, with its folder, when the first call is.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"The store {str(self.path)!r} is a folder; give the path of a file such as judge.jsonl.")
        self.settled = Spending()  # calls whose price is known
        self.unsettled: dict[str, Spending] = {}  # by call: sent, and no price came back
        self.input_tokens = 0
        self.output_tokens = 0
        self.statuses: dict[str, int] = {}
        self.answered: set[str] = set()  # addresses that gave a reply at least once
        self.unreadable = 0  # lines
        self._replies: dict[str, list[int]] = {}  # by key: where its replies begin in the file
        self._read = 0  # bytes
        self._file: IO[bytes] | None = None
        self._unsynced = 0

    @contextmanager
    def opened(self):
        """The store, read to its end and open for writing, by no one else at the same time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise JudgeError(
                f"Another run is writing to the store {str(self.path)!r}; wait for it, or give each run its own."
            ) from None
        try:
            self._file = open(self.path, "ab+", buffering=0)
            self._repair_end()
            self.refresh()
            yield self
            os.fsync(self._file.fileno())
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
            lock.release()

    def refresh(self) -> None:
        """Reads what was written since the last time."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn, or being written
                self._take(line, self._read)
                self._read += len(line)

    def replies(self, key: str) -> list[dict[str, Any]]:
        """
        The replies to a request, in order.

        Args:
            key (`str`):
                The key of the request.

        Returns:
            `list[dict]`
        """
        offsets = self._replies.get(key, [])
        if not offsets:
            return []
        records = []
        with open(self.path, "rb") as file:
            for offset in offsets:
                file.seek(offset)
                records.append(json.loads(file.readline()))
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """
        Writes a record; once this returns, only a failing disk or a power cut can lose it.

        Args:
            record (`Mapping`):
                The record.

        Raises:
            [`JudgeError`]: if the disk does not take it.
        """
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
        self._take(line, self._read)
        self._read += len(line)

    def _repair_end(self) -> None:
        """Ends a torn last line, so that the next record has a line of its own."""
        assert self._file is not None
        size = self._file.seek(0, os.SEEK_END)
        if size == 0:
            return
        self._file.seek(size - 1)
        if self._file.read(1) != b"\n":
            self._file.write(b"\n")

    def _take(self, line: bytes, offset: int) -> None:
        """Counts a record in; a line that is none is skipped and said so."""
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
            status = str(record.get("status"))
            self.statuses[status] = self.statuses.get(status, 0) + 1
            self.answered.add(endpoint)

    @property
    def spent(self) -> Spending:
        """What all calls took, those without a known price at their most."""
        return sum(self.unsettled.values(), self.settled)
