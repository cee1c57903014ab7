"""Candidates of a prompt, in pools of one model each, none twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..data.rows import RowError
from ..judge.replies import read_answer
from ..utils import digest
from .questions import Question


Origin = Literal["given", "generated", "corrupted", "rewritten"]

# Stands for the generator of candidates that do not name theirs: they are taken as one pool.
UNKNOWN_GENERATOR = "unknown"


@dataclass(frozen=True)
class Candidate:
    """
    An answer that may become a side of a pair.

    Parameters:
        text (`str`):
            The answer.
        origin (`str`):
            `"given"` in the row, `"generated"` by the endpoint, `"corrupted"` from another candidate, or
            `"rewritten"` from the reference answer.
    """

    text: str
    origin: Origin


@dataclass
class Pool:
    """
    The candidates of one prompt by one model.

    Parameters:
        question ([`Question`]):
            The prompt.
        generator (`str`):
            Name of the model.
        candidates (`list[Candidate]`, *optional*):
            Its answers, no two alike.
        num_equal (`int`, *optional*, defaults to `0`):
            How many more were equal to one of them.
        num_empty (`int`, *optional*, defaults to `0`):
            How many more were empty.
        num_unfinished (`int`, *optional*, defaults to `0`):
            How many more were thoughts that never end.

    `key` is the same for the same prompt, images, model and given answers, wherever the row stands: all draws depend
    on it.
    """

    question: Question
    generator: str
    candidates: list[Candidate] = field(default_factory=list)
    num_equal: int = 0
    num_empty: int = 0
    num_unfinished: int = 0

    def __post_init__(self) -> None:
        self._rename()

    def _rename(self) -> None:
        content = [self.question.content, self.generator, *(one.text for one in self.candidates)]
        self.key = digest(json.dumps(content))[:16]

    @classmethod
    def of(cls, question: Question, generator: str, texts: Sequence[str]) -> Pool:
        """A pool with given answers."""
        pool = cls(question, generator)
        for text in texts:
            pool.add(text, "given")
        pool._rename()
        return pool

    def add(self, text: str, origin: Origin) -> bool:
        """Adds an answer without the model's thoughts, unless it is empty, unfinished, or equal to another but for
        white space, and says whether it did."""
        text, open_marker = read_answer(text)
        if open_marker is not None:
            self.num_unfinished += 1
            return False
        words = text.split()
        if not words:
            self.num_empty += 1
            return False
        if any(words == other.text.split() for other in self.candidates):
            self.num_equal += 1
            return False
        self.candidates.append(Candidate(text.strip(), origin))
        return True


def read_pools(question: Question, candidates: Sequence[Mapping[str, Any]] | None) -> list[Pool]:
    """
    The given candidates of a row by generator.

    Args:
        question ([`Question`]):
            The prompt.
        candidates (`Sequence[Mapping]`, *optional*):
            Answers, each with `text` and `generator`.

    Returns:
        `list[Pool]`: one for each generator, in the order of their names; empty without candidates.

    Raises:
        [`RowError`]: `not_conversational` if a candidate is something else.
    """
    texts: dict[str, list[str]] = {}
    for place, given in enumerate(candidates or []):
        text = given.get("text") if isinstance(given, Mapping) else None
        if not isinstance(given, Mapping) or not isinstance(text, str):
            raise RowError(
                "not_conversational", f'`candidates[{place}]` is no {{"text": ..., "generator": ...}}; give both.'
            )
        generator = str(given.get("generator") or UNKNOWN_GENERATOR)
        texts.setdefault(generator, []).append(text)
    return [Pool.of(question, generator, texts[generator]) for generator in sorted(texts)]
