"""Candidate answers of generators, the questions that they answer, and requests for more of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

import numpy as np

from ...data.images import ImageOptions
from ...data.messages import Prompt, read_prompt
from ...data.rows import RowError, text_block
from ...judge.prompts import image_block, language_of, neutralize
from ...judge.replies import read_answer
from ...judge.rubric import fenced, mark_of
from ...utils import digest, read_packaged
from ..reports import AgreementCounts


Need = Literal["corrupted", "rewritten"]

# From the row, from the endpoint, corrupted from another candidate, or rewritten from the reference answer.
Origin = Literal["given", "generated", "corrupted", "rewritten"]

# Generator of candidates that name none: they form one pool.
UNKNOWN_GENERATOR = "unknown"

INSTRUCTIONS: dict[Need, dict[str, str]] = read_packaged("debias/distillation/instructions.yaml")


@dataclass(frozen=True)
class Candidate:
    """An answer that may become a side of a pair."""

    text: str
    origin: Origin


@dataclass(frozen=True)
class ListScores:
    """One list as the judge scored it."""

    order: list[int]  # the candidates from the first position to the last
    scores: list[float]  # their scores, in this order


@dataclass
class Pool:
    """The candidates of one prompt by one generator, and their verdicts."""

    question: Question
    generator: str
    texts: InitVar[Sequence[str]] = ()  # the given answers
    candidates: list[Candidate] = field(default_factory=list)  # no two alike
    # answers that are no candidates: equal to another, empty, or "unfinished", with thoughts that never end
    dropped: Counter[str] = field(default_factory=lambda: Counter(equal=0, empty=0))
    # scored lists of each round of asking; the second round has one more candidate
    rounds: list[list[ListScores]] = field(default_factory=list)
    criteria: dict[int, dict[str, float]] = field(default_factory=dict)  # scores of each candidate by criterion
    listwise: dict[int, float] = field(default_factory=dict)  # scores of each candidate, without position bias
    agreement: AgreementCounts = field(default_factory=AgreementCounts)  # of all pairs that both ways scored
    generation_status: str | None = None  # of the last reply of the generator that was no candidate
    pointwise_status: str | None = None  # of the last reply about a single candidate that was not `"ok"`
    # stage and status of an open question about it, so that nothing may be concluded from the lack of a pair
    unanswered: str | None = None
    failure: str | None = None  # reason why no pair can be made of it

    def __post_init__(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.add(text, "given")
        # All draws depend on it, so that it must not depend on where the row stands.
        content = [self.question.content, self.generator, *(candidate.text for candidate in self.candidates)]
        self.key = digest(json.dumps(content))[:16]

    def add(self, text: str, origin: Origin) -> bool:
        """Add an answer unless it is empty, unfinished, or equal to another but for white space; tell if it was."""
        text, open_marker = read_answer(text)
        words = text.split()
        if open_marker is not None:
            self.dropped["unfinished"] += 1
        elif not words:
            self.dropped["empty"] += 1
        elif any(words == other.text.split() for other in self.candidates):
            self.dropped["equal"] += 1
        else:
            self.candidates.append(Candidate(text.strip(), origin))
            return True
        return False


@dataclass(frozen=True)
class Question(Prompt):
    """A prompt whose images are parts of a chat message, shared by all requests about it."""

    reference: str | None  # a correct answer

    @property
    def text(self) -> str:
        """The question for a judge: a single turn as it is, a conversation with the roles named."""
        turns, number = [], 0
        for message in self.messages:
            text = ""
            for block in message["content"]:
                number += block["type"] == "image"
                mark = f"[image {number}]" if text else ""  # where an image stands behind words
                text += mark if block["type"] == "image" else block["text"]
            turns.append((message["role"], text.strip()))
        if len(turns) == 1:
            return turns[0][1]
        return "\n\n".join(f"[{role}]\n{text}" for role, text in turns)


def read_question(row: Mapping[str, Any], index: int, *, source: str, image_options: ImageOptions) -> Question:
    """Read the question of a row, images included."""
    reference, prompt = row.get("reference"), read_prompt(row, index, source=source)
    if reference is not None and not isinstance(reference, str):
        kind = type(reference).__name__
        raise RowError("not_conversational", f"`reference` is of type {kind}; pass a string, or None.")
    images = [image_block(image, image_options) for image in prompt.images]
    return Question(**{**vars(prompt), "images": images}, reference=(reference or "").strip() or None)


def read_pools(question: Question, candidates: Sequence[Mapping[str, Any]] | None) -> list[Pool]:
    """Divide the given candidates of a row by generator."""
    texts: dict[str, list[str]] = {}
    for index, candidate in enumerate(candidates or []):
        if not isinstance(candidate, Mapping) or not isinstance(candidate.get("text"), str):
            problem = f'`candidates[{index}]` is no {{"text": ..., "generator": ...}}; pass both.'
            raise RowError("not_conversational", problem)
        texts.setdefault(str(candidate.get("generator") or UNKNOWN_GENERATOR), []).append(candidate["text"])
    return [Pool(question, generator, texts[generator]) for generator in sorted(texts)]


def generation_messages(question: Question) -> list[dict[str, Any]]:
    """The prompt as chat messages, images in their positions."""
    images, messages = iter(question.images), []
    for message in question.messages:
        parts = [
            next(images) if block["type"] == "image" else text_block(neutralize(block["text"]))
            for block in message["content"]
        ]
        # Servers want plain strings of all roles but the user's.
        is_plain = all(part["type"] == "text" for part in parts)
        content: Any = "".join(part["text"] for part in parts) if is_plain else parts
        messages.append({"role": message["role"], "content": content})
    return messages


def needed_candidate(scores: Sequence[float], *, min_spread: float, middle: float) -> Need | None:
    """The kind of candidate that a prompt lacks, if it has scores and its candidates are alike."""
    if not scores or np.ptp(scores) >= min_spread:
        return None
    return "corrupted" if np.mean(scores) >= middle else "rewritten"


def candidate_messages(
    need: Need, question: Question, candidate: str, *, language: str | None = None
) -> list[dict[str, Any]]:
    """Messages that ask a generator for one more candidate."""
    sections = {"QUESTION": question.text, "ANSWER": candidate}
    if need == "rewritten":
        sections = {"QUESTION": question.text, "REFERENCE": question.reference or "", "SAMPLE": candidate}
    sections = {name: neutralize(text) for name, text in sections.items()}
    mark = mark_of(list(sections.values()))
    text = "\n\n".join(fenced(name, content, mark) for name, content in sections.items())
    return [
        {"role": "system", "content": INSTRUCTIONS[need][language or language_of(question.text)]},
        {"role": "user", "content": [*question.images, text_block(text)]},
    ]
