"""Pairs that are written into a judge's prompt and its reply: pure functions from texts to answers and verdicts.

A wrong label is worse than a lost row. So whatever is not plainly there gives `None`: headers that occur twice (an
answer may contain them), statements that contradict each other, and sentences that praise an answer for one thing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Comparison(NamedTuple):
    """A question and two answers to it, as a judge was shown them."""

    question: str
    first: str
    second: str


class Verdict(NamedTuple):
    """The better answer (1 or 2, 0 for a tie), and how much better it is, where the judge says so."""

    winner: int
    strength: float | None = None


# Names that the two answers have in prompts with `Question: [...]`.
_NAMES = (("The first response", "The second response"), ("Response 1", "Response 2"), ("Response A", "Response B"))
_BRACKETED = tuple((r"Question: \[", *(rf"\][ \t\r]*\n\s*{name}: \[" for name in names)) for names in _NAMES)
_ENCLOSED = tuple(
    tuple(map(re.escape, headers))
    for headers in (
        (
            "<|User Prompt|>",
            "<|The Start of Assistant A's Answer|>",
            "<|The End of Assistant A's Answer|>",
            "<|The Start of Assistant B's Answer|>",
            "<|The End of Assistant B's Answer|>",
        ),
        ("[Question]", "[Assistant 1]", "[End of Assistant 1]", "[Assistant 2]", "[End of Assistant 2]"),
    )
)
_HEADED = tuple(rf"(?m:^)[ \t]*#{{2,6}} \[{name}\]:" for name in ("Question", "Response 1", "Response 2"))
_OUTPUT_FORMAT = re.compile(r"^[ \t]*#{2,6} \*\*Output Format", re.MULTILINE)

# How a judge is told to reply. In an answer, it means that the instructions were taken for a part of it.
_FORM = re.compile(r"better response: ?\[|\[\[[AB][<>=]|<answer>", re.IGNORECASE)

_SIDES = {"1": 1, "first": 1, "a": 1, "2": 2, "second": 2, "b": 2}
_MARKS = {
    "A>>B": Verdict(1, 2.0),
    "A>B": Verdict(1, 1.0),
    "A=B": Verdict(0),
    "B>A": Verdict(2, 1.0),
    "B>>A": Verdict(2, 2.0),
}
_MARK = re.compile(r"\[\[([AB<>=\s]+)\]\]")
_BETTER = re.compile(r"\bbetter response:[ \t]*(?:\[(\w+)\])?", re.IGNORECASE)
_SCORES = re.compile(r"\s*(\d+(?:\.\d+)?)[ \t]+(\d+(?:\.\d+)?)[ \t\r]*(?:\n|$)")

_ANSWER = r"(?:the )?(?:(?:response|answer|assistant) (?:1|2|a|b)|(?:first|second) (?:response|answer))"
_CLAIM = re.compile(
    rf"\b(?P<answer>{_ANSWER})\b(?P<between>(?: is| was|'s| isn.t| wasn.t)(?: \w+){{0,3}}?) (?P<word>better|worse)\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(?:no|not|never|neither|hardly|barely|nowhere)\b|n.t\b", re.IGNORECASE)
_LEAD = (
    r"(?:(?:(?:final )?(?:verdict|judgement|judgment)|conclusion|overall|therefore|thus|hence|in conclusion)[,:]? )?"
)
_REASON = r"(?: overall)?(?:[.!]?$|,? (?:because|since)\b)"
# A whole sentence, so that nothing turns it round: no "if", no "not", no praise for one thing only.
_WINNER = re.compile(
    rf"{_LEAD}{_ANSWER} is (?:(?:clearly|slightly|significantly|much|overall|the) )?better"
    rf"(?: response| answer| one)?(?: than {_ANSWER})?{_REASON}",
    re.IGNORECASE,
)
_TIE = re.compile(
    rf"{_LEAD}(?:(?:the |these )?(?:two|both) (?:responses|answers)|both) are equally good{_REASON}", re.IGNORECASE
)
_QUOTED, _QUOTE = re.compile(r'"[^"]*"|“[^”]*”'), re.compile(r'["“”]')
_PARAGRAPH_END = re.compile(r"\n\s*\n")  # a single line break may be in the middle of a sentence
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


def parse_comparison(text: str) -> Comparison | None:
    """
    Finds a question and two answers in a judge's prompt.

    Args:
        text (`str`):
            The prompt, in one of the layouts of LLaVA-Critic-113k: `Question: [...]` with two bracketed responses,
            MT-bench's with `<|User Prompt|>`, or LLaVA-bench's with `[Assistant 1]`.

    Returns:
        [`Comparison`] or `None`: `None` if no layout fits, or if its headers occur more than once.
    """
    found = [parts for headers in (*_BRACKETED, *_ENCLOSED) if (parts := _between(text, headers)) is not None]
    if len(found) != 1:
        return None
    if len(found[0]) == len(_BRACKETED[0]):
        return _bracketed(*found[0])
    question, first, between, second, _ = (part.strip() for part in found[0])
    return None if between else Comparison(question, first, second)


def parse_headed_comparison(text: str) -> Comparison | None:
    """
    Finds a question and two answers under the headers `#### [Question]:`, `#### [Response 1]:`, `#### [Response 2]:`.

    Args:
        text (`str`):
            The prompt, in the layout of R1-Reward-RL. The instructions after the second answer are dropped.

    Returns:
        [`Comparison`] or `None`: `None` if a header is missing or occurs more than once.
    """
    parts = _between(text, _HEADED)
    if parts is None:
        return None
    second, *instructions = _OUTPUT_FORMAT.split(parts[2])
    if len(instructions) > 1 or _FORM.search(second):
        return None
    return Comparison(parts[0].strip(), parts[1].strip(), second.strip())


def parse_verdict(text: str) -> Verdict | None:
    """
    Reads which of two answers a judge prefers.

    Args:
        text (`str`):
            Its reply. It may hold `[[A>>B]]` or the like (strength 1, or 2 for `>>`), `The better response: [1]`, or
            two scores from 1 to 10 as its first line (strength is their difference). Without any of these, a whole
            sentence such as "The first response is better because ..." or "The two responses are equally good."
            counts, if nothing else in the text speaks against it.

    Returns:
        [`Verdict`] or `None`: `None` if nothing can be read, or if it is contradictory.
    """
    # What the judge cites from an answer is not what it says.
    paragraphs = [" ".join(_QUOTED.sub("it", part).split()) for part in _PARAGRAPH_END.split(text)]
    sentences = [sentence for paragraph in paragraphs for sentence in _SENTENCE_END.split(paragraph)]
    if formal := _formal_verdicts(text):
        # Praise in passing does not matter here. A whole sentence that calls it a tie does.
        ties = [Verdict(0) for sentence in sentences if _TIE.fullmatch(sentence)]
        return formal[0] if len({*formal, *ties}) == 1 else None
    claims = {_claimed(match) for paragraph in paragraphs for match in _CLAIM.finditer(paragraph)}
    if any(map(_QUOTE.search, paragraphs)):
        return None  # a quotation that does not end
    if any(map(_TIE.match, sentences)):
        return None if claims else Verdict(0)
    if len(claims) != 1 or "equally good" in text.lower() or not any(map(_WINNER.match, sentences)):
        return None
    winner = claims.pop()
    return Verdict(winner) if winner else None


def _formal_verdicts(text: str) -> list[Verdict | None]:
    """What the forms say that a judge is told to use; `None` for one that is not filled in as it should be."""
    verdicts = [_MARKS.get("".join(mark.split())) for mark in _MARK.findall(text)]
    verdicts += [
        Verdict(_SIDES[name]) if (name := found.lower()) in _SIDES else None for found in _BETTER.findall(text)
    ]
    if scores := _SCORES.match(text):
        first, second = map(float, scores.groups())
        gap = first - second
        is_scale = 1 <= min(first, second) and max(first, second) <= 10
        verdicts.append((Verdict(1 if gap > 0 else 2, abs(gap)) if gap else Verdict(0)) if is_scale else None)
    return verdicts


def _claimed(claim: re.Match[str]) -> int:
    """The answer that a claim calls better, or the one that it does not call worse; 0 if it is denied."""
    side = next(_SIDES[word] for word in claim["answer"].lower().split() if word in _SIDES)
    if _DENIAL.search(claim["between"]):
        return 0
    return side if claim["word"].lower() == "better" else 3 - side


def _bracketed(question: str, first: str, rest: str) -> Comparison | None:
    """The parts of a comparison, of which the last has the second answer, its closing bracket, and what follows."""
    second, bracket, tail = rest.rpartition("]")
    has_tail = bool(tail.strip()) and tail.strip() != "ASSISTANT:"
    # Behind further instructions, the last bracket may be any: it has to end its line and to close what was opened.
    is_closed = tail.lstrip(" \t\r").startswith("\n") and second.count("[") == second.count("]")
    if not bracket or (has_tail and ("[" in tail or not is_closed)) or _FORM.search(second) or _may_end(second):
        return None
    return Comparison(question.strip(), first.strip(), second.strip())


def _may_end(answer: str) -> bool:
    """Whether a bracket at the end of a line closes what was not opened in the answer: the answer may end there."""
    depth = 0
    for line in answer.splitlines():
        for character in line:
            depth += (character == "[") - (character == "]")
        if depth < 0 and line.rstrip().endswith("]"):
            return True
        depth = max(depth, 0)  # as in "(1, 2]"
    return False


def _between(text: str, headers: Sequence[str]) -> list[str] | None:
    """What stands behind each of the headers, if each occurs exactly once and in this order."""
    parts, end = [], None
    for header in headers:
        matches = list(re.finditer(header, text))
        if len(matches) != 1 or (end is not None and matches[0].start() < end):
            return None
        if end is not None:
            parts.append(text[end : matches[0].start()])
        end = matches[0].end()
    return [*parts, text[end:]]
