"""How an answer is written, as numbers, and nothing of what it says about the image.

Counts enter as log(1 + count), so that a difference of two answers is a ratio: twice as long is as much at 50 words as
at 500. English and Chinese are counted alike: a Han character is a word, full-width marks are marks.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from math import log, log1p

import numpy as np

from .lexicon import (
    ENTHUSIASM_CHINESE,
    ENTHUSIASM_WORDS,
    FIRST_PERSON_CHINESE,
    FIRST_PERSON_WORDS,
    HEDGE_CHINESE,
    HEDGE_PHRASES,
    HEDGE_WORDS,
    OPENERS,
    REFUSAL_CHINESE,
    REFUSAL_PHRASES,
)


# What each feature is; `log` stands for log(1 + x), "share" for a number from 0 to 1.
DEFINITIONS = {
    "characters": "log number of characters, white space at the ends left out",
    "words": "log number of words: runs of letters and figures, and single Han characters",
    "sentences": "log number of pieces between full stops, other sentence ends and line breaks",
    "sentence_length": "log number of words per sentence",
    "paragraphs": "log number of pieces between empty lines",
    "headings": "log number of Markdown headings (`# ...`)",
    "list_items": "log number of lines that open with a bullet or a number",
    "bold": "log number of passages in bold or italics (`**...**`, `__...__`, `*...*`)",
    "code": "log number of code passages (`` `...` ``) and fences",
    "table_rows": "log number of lines of a Markdown table",
    "links": "log number of links and addresses",
    "emoji": "log number of emoji",
    "digit_share": "share of figures among the characters that are not white space",
    "punctuation_share": "share of punctuation marks among the same",
    "exclamation_marks": "log number of exclamation marks",
    "question_marks": "log number of question marks",
    "quotation_marks": "log number of double quotation marks and corner brackets",
    "hedges": "log number of words that leave room for doubt (perhaps, seems, 可能)",
    "refusals": "log number of refusals and apologies (I cannot, sorry, 抱歉)",
    "first_person": "log number of pronouns of the first person (I, we, 我)",
    "opener": "1 if it opens with agreement, thanks or praise (Sure, Great question, 当然), otherwise 0",
    "enthusiasm": "log number of words of enthusiasm (wonderful, amazing, 太棒)",
    "upper_case_share": "share of capitals among the Latin letters",
    "lexical_variety": "log of different words over log of words (Herdan's C, little swayed by length); 1 if short",
    "word_length": "characters per word that is not a Han character, cut at 20; 0 without any",
    "prompt_overlap": "share of the different words that are in the question too; 0 without a question",
    "json": "1 if it is one JSON object or list, or holds a JSON fence, otherwise 0",
}
STYLE_FEATURES: tuple[str, ...] = tuple(DEFINITIONS)

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS_ASCII = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_WORDS = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+(?:'[^\W\d_{_HAN}]+)?")
# Starting at the first mark of a run only keeps long runs from taking quadratic time.
_SENTENCE_ENDS = re.compile(r"(?<![.!?])[.!?]++(?=[\s\"')\]*”’]|$)|[。！？…]+|\n")
_EMPTY_LINES = re.compile(r"\n[ \t]*\n\s*")
_HEADINGS = re.compile(r"^ {0,3}#{1,6} ", re.MULTILINE)
_LIST_ITEMS = re.compile(r"^[ \t]*(?:[-*+•·] |\d{1,3}[.)、] ?(?!\d)|[（(]\d{1,3}[)）])", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__|(?<![*\w])\*[^*\s][^*\n]*\*(?![*\w])")
_CODE = re.compile(r"```|`[^`\n]+`")
_TABLE_ROWS = re.compile(r"^[ \t]*\|.*\|[ \t]*$", re.MULTILINE)
_LINKS = re.compile(r"\]\([^()\s]+\)|(?<!\()\bhttps?://|\bwww\.")
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b50\u2b55\u231a\u231b]")
_FULL_WIDTH_MARKS = re.compile("[。，、；：？！“”‘’（）《》〈〉【】「」『』〔〕…—～·]")  # noqa: RUF001
_JSON_FENCE = "```json"
_DIGITS = string.digits.encode()
_UPPER = string.ascii_uppercase.encode()
_LETTERS = string.ascii_letters.encode()
_PUNCTUATION = string.punctuation.encode()
_WHITE_SPACE = string.whitespace.encode()
_WORD_KINDS = HEDGE_WORDS | FIRST_PERSON_WORDS | ENTHUSIASM_WORDS


def style_features(texts: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
    """
    Style features of answers.

    Equal texts are looked at once. About 10,000 answers of 100 words take a second.

    Args:
        texts (`Sequence[str]` of length N):
            Answers.
        prompts (`Sequence[str]` of length N, *optional*):
            The question of each, for `prompt_overlap`.

    Returns:
        `np.ndarray` of shape `(N, K)` and dtype `float64`: finite numbers, columns as in `STYLE_FEATURES`;
        `DEFINITIONS` says what each is.

    Raises:
        `ValueError`: if there are not as many questions as answers.
    """
    if prompts is None:
        prompts = [""] * len(texts)
    if len(prompts) != len(texts):
        raise ValueError(f"There are {len(texts)} texts but {len(prompts)} prompts; give one for each.")
    places: dict[tuple[str, str], int] = {}
    index = [places.setdefault(pair, len(places)) for pair in zip(texts, prompts, strict=True)]
    table = np.empty((len(places), len(STYLE_FEATURES)))
    words_of_prompt: dict[str, frozenset[str]] = {}  # answers of one question share it
    for row, (text, prompt) in enumerate(places):
        if prompt not in words_of_prompt:
            words_of_prompt[prompt] = frozenset(_words(prompt.lower()))
        table[row] = _features(text.strip(), words_of_prompt[prompt])
    return table[np.array(index, dtype=np.int64)]


def _words(lower: str) -> list[str]:
    """Words of a text in lower case."""
    return (_WORDS_ASCII if lower.isascii() else _WORDS).findall(lower)


def _count(text: str, phrases: Sequence[str]) -> int:
    return sum(map(text.count, phrases))


def _features(text: str, prompt_words: frozenset[str]) -> tuple[float, ...]:
    lower, is_ascii = text.lower().replace("’", "'"), text.isascii()
    words = _words(lower)
    num_words, distinct = len(words), set(words)
    num_sentences = sum(map(bool, map(str.strip, _SENTENCE_ENDS.split(text))))
    ascii_text = text.encode("ascii", "ignore")
    # Deleting and comparing lengths counts characters of a class ten times faster than a regular expression.
    digits, capitals, letters, marks, spaces = (
        len(ascii_text) - len(ascii_text.translate(None, kind))
        for kind in (_DIGITS, _UPPER, _LETTERS, _PUNCTUATION, _WHITE_SPACE)
    )
    visible = len(text) - spaces
    questions, exclamations, quotes = text.count("?"), text.count("!"), text.count('"')
    hedges, refusals, persons, enthusiasm = _count(lower, HEDGE_PHRASES), _count(lower, REFUSAL_PHRASES), 0, 0
    for word in distinct & _WORD_KINDS:
        count = words.count(word)
        hedges += count * (word in HEDGE_WORDS)
        persons += count * (word in FIRST_PERSON_WORDS)
        enthusiasm += count * (word in ENTHUSIASM_WORDS)
    num_emoji, spelled = 0, words
    if not is_ascii:
        visible = len("".join(text.split()))
        num_emoji = len(_EMOJI.findall(text))
        marks += len(_FULL_WIDTH_MARKS.findall(text))
        questions, exclamations = questions + text.count("？"), exclamations + text.count("！")  # noqa: RUF001
        quotes += _count(text, "“”「」『』")
        spelled = [word for word in words if not _is_han(word)]
        hedges, refusals = hedges + _count(text, HEDGE_CHINESE), refusals + _count(text, REFUSAL_CHINESE)
        persons += _count(text, FIRST_PERSON_CHINESE)
        enthusiasm += _count(text, ENTHUSIASM_CHINESE)
    has_lines = "\n" in text
    return (
        log1p(len(text)),
        log1p(num_words),
        log1p(num_sentences),
        log1p(num_words / max(num_sentences, 1)),
        log1p((len(_EMPTY_LINES.findall(text)) + 1 if has_lines else 1) if text else 0),
        log1p(len(_HEADINGS.findall(text)) if "#" in text else 0),
        log1p(len(_LIST_ITEMS.findall(text)) if has_lines else bool(_LIST_ITEMS.match(text))),
        log1p(len(_BOLD.findall(text)) if "*" in text or "__" in text else 0),
        log1p(len(_CODE.findall(text)) if "`" in text else 0),
        log1p(len(_TABLE_ROWS.findall(text)) if "|" in text else 0),
        log1p(len(_LINKS.findall(text)) if "](" in text or "://" in text or "www." in text else 0),
        log1p(num_emoji),
        digits / max(visible, 1),
        marks / max(visible, 1),
        log1p(exclamations),
        log1p(questions),
        log1p(quotes),
        log1p(hedges),
        log1p(refusals),
        log1p(persons),
        float(lower.lstrip("*_# \"'“").startswith(OPENERS)),
        log1p(enthusiasm),
        capitals / max(letters, 1),
        log(len(distinct)) / log(num_words) if num_words > 1 else 1.0,
        min(len("".join(spelled)) / len(spelled), 20.0) if spelled else 0.0,
        len(distinct & prompt_words) / len(distinct) if distinct and prompt_words else 0.0,
        float((text[:1], text[-1:]) in (("{", "}"), ("[", "]")) or _JSON_FENCE in lower),
    )


def _is_han(word: str) -> bool:
    return len(word) == 1 and ("\u3400" <= word <= "\u9fff" or "\uf900" <= word <= "\ufaff")
