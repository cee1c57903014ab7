"""Style features of answers in English and Chinese, and their differences per pair."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log, log1p
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers.utils import logging

from ..data.columns import arrow_rows, column_of, group_codes, group_rows, row_groups
from ..data.rows import SIDES, message_text, row_name
from ..utils import read_packaged


logger = logging.get_logger(__name__)

# Definitions of the features, and the words that they count.
LEXICON = read_packaged("debias/lexicon.yaml")

STYLE_FEATURES: tuple[str, ...] = tuple(LEXICON["features"])

_HEDGES, _FIRST_PERSON = frozenset(LEXICON["hedge_words"]), frozenset(LEXICON["first_person_words"])
_ENTHUSIASM, _OPENERS = frozenset(LEXICON["enthusiasm_words"]), tuple(LEXICON["openers"])
_COUNTED = _HEDGES | _FIRST_PERSON | _ENTHUSIASM

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HAN_WORD = re.compile(f"[{_HAN}]")
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

_KINDS = (string.digits, string.ascii_uppercase, string.ascii_letters, string.punctuation, string.whitespace)
_ASCII_KINDS = [kind.encode() for kind in _KINDS]

_BATCH = 1000


def style_features(texts: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
    """
    Compute style features of answers. Equal texts are read once; about 10,000 answers of 100 words take a second.

    Args:
        texts (`Sequence[str]` of length N):
            Answers.
        prompts (`Sequence[str]` of length N, *optional*):
            Question of each answer, for `prompt_overlap`.

    Returns:
        `np.ndarray` of shape `(N, K)` and dtype `float64`: finite numbers, columns as in `STYLE_FEATURES`, defined in
        `lexicon.yaml`.

    Raises:
        `ValueError`: if there are not as many questions as answers.
    """
    prompts = [""] * len(texts) if prompts is None else prompts
    if len(prompts) != len(texts):
        raise ValueError(f"There are {len(texts)} texts but {len(prompts)} prompts; pass one for each.")
    positions: dict[tuple[str, str], int] = {}
    index = [positions.setdefault(pair, len(positions)) for pair in zip(texts, prompts, strict=True)]
    words = {prompt: frozenset(_words(prompt.lower())) for prompt in {prompt for _, prompt in positions}}
    table = np.empty((len(positions), len(STYLE_FEATURES)))
    for row, (text, prompt) in enumerate(positions):
        table[row] = _features(text.strip(), words[prompt])
    return table[np.array(index, dtype=np.int64)]


def _words(lower: str) -> list[str]:
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
        len(ascii_text) - len(ascii_text.translate(None, kind)) for kind in _ASCII_KINDS
    )
    visible = len(text) - spaces
    questions, exclamations, quotes = text.count("?"), text.count("!"), text.count('"')
    hedges, refusals = _count(lower, LEXICON["hedge_phrases"]), _count(lower, LEXICON["refusal_phrases"])
    persons = enthusiasm = 0
    for word in distinct & _COUNTED:
        count = words.count(word)
        hedges += count * (word in _HEDGES)
        persons += count * (word in _FIRST_PERSON)
        enthusiasm += count * (word in _ENTHUSIASM)
    num_emoji, spelled = 0, words
    if not is_ascii:
        visible = len("".join(text.split()))
        num_emoji = len(_EMOJI.findall(text))
        marks += len(_FULL_WIDTH_MARKS.findall(text))
        questions, exclamations = questions + text.count("？"), exclamations + text.count("！")  # noqa: RUF001
        quotes += _count(text, "“”「」『』")
        spelled = [word for word in words if not _HAN_WORD.fullmatch(word)]
        hedges += _count(text, LEXICON["hedge_chinese"])
        refusals += _count(text, LEXICON["refusal_chinese"])
        persons += _count(text, LEXICON["first_person_chinese"])
        enthusiasm += _count(text, LEXICON["enthusiasm_chinese"])
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
        float(lower.lstrip("*_# \"'“").startswith(_OPENERS)),
        log1p(enthusiasm),
        capitals / max(letters, 1),
        log(len(distinct)) / log(num_words) if num_words > 1 else 1.0,
        min(len("".join(spelled)) / len(spelled), 20.0) if spelled else 0.0,
        len(distinct & prompt_words) / len(distinct) if distinct and prompt_words else 0.0,
        float((text[:1], text[-1:]) in (("{", "}"), ("[", "]")) or "```json" in lower),
    )


@dataclass(frozen=True)
class PairStyle:
    """Style of N pairs in K features."""

    features: tuple[str, ...]
    difference: np.ndarray  # (N, K) float64: chosen minus rejected
    spread: np.ndarray  # (K,): standard deviation of each feature among the answers, both sides pooled
    weight: np.ndarray  # (N,) float64: the column `weight`, with 1 where there is none
    group: np.ndarray  # (N,) int64: a number for each `group_id`; rows without one have a number of their own

    def __len__(self) -> int:
        return len(self.difference)

    def take(self, rows: np.ndarray) -> PairStyle:
        """Some of the pairs; `spread` stays that of all."""
        return PairStyle(self.features, self.difference[rows], self.spread, self.weight[rows], self.group[rows])


def read_pair_style(dataset: Dataset, features: Sequence[str] | None = None) -> PairStyle:
    """Read the style of all pairs. An answer is the text of the last message of a side."""
    weight, group = read_units(dataset, "Style")
    names = STYLE_FEATURES if features is None else tuple(features)
    if unknown := [name for name in names if name not in STYLE_FEATURES]:
        raise ValueError(f"`features` names {unknown[0]!r}; the style features are {', '.join(STYLE_FEATURES)}.")
    if not names:
        raise ValueError("`features` is empty; name at least one, or leave it out for all.")
    columns = [STYLE_FEATURES.index(name) for name in names]
    difference = np.empty((len(dataset), len(names)))
    total, squares, done = np.zeros(len(names)), np.zeros(len(names)), 0
    for sides in answer_batches(dataset):
        style = style_features(*zip(*(answer for side in sides for answer in side), strict=True))[:, columns]
        chosen, rejected = np.split(style, 2)
        difference[done : done + len(chosen)] = chosen - rejected
        total, squares = total + style.sum(0), squares + (style**2).sum(0)
        done += len(chosen)
    spread = np.sqrt(np.maximum(squares / (2 * done) - (total / (2 * done)) ** 2, 0.0))
    return PairStyle(names, difference, spread, weight, group)


def read_units(dataset: Dataset, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Read `weight` and `group`, as of [`PairStyle`], of a set of pairs of which something is measured."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{what} is measured on a whole set, not on a {type(dataset).__name__}; load it first.")
    if len(dataset) == 0:
        raise ValueError("The data set has no rows.")
    if missing := [side for side in SIDES if side not in dataset.column_names]:
        raise ValueError(f"The data set has no column `{missing[0]}`; see `trl_dt2it.data.load_preferences`.")
    if "label_confidence" in dataset.column_names:
        confidence = column_of(dataset, "label_confidence")
        is_number = pa.types.is_floating(confidence.type) or pa.types.is_integer(confidence.type)
        if is_number and pc.any(pc.less(confidence.cast("float64"), 1.0)).as_py():
            logger.warning(f"{what} is measured on the labels as they stand; `label_confidence` does not count in it.")
    return _read_weight(dataset), row_groups(dataset)


def answer_batches(dataset: Dataset) -> Iterator[list[list[tuple[str, str]]]]:
    """Yield the chosen and the rejected answers of some pairs, each with its question."""
    done, texts = 0, [name for name in ("prompt", *SIDES) if name in dataset.column_names]
    for batch in dataset.with_format(None).select_columns(texts).with_format("arrow").iter(_BATCH):
        rows = list(arrow_rows(batch))
        yield [[_answer(row, side, done + index) for index, row in enumerate(rows)] for side in SIDES]
        done += len(rows)


def _read_weight(dataset: Dataset) -> np.ndarray:
    """Read the column `weight` as float64, with 1 where there is none."""
    if "weight" not in dataset.column_names:
        return np.ones(len(dataset))
    weight = column_of(dataset, "weight").cast("float64").fill_null(1.0).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(bad):
        raise ValueError(f"Row {bad[0]} has the `weight` {weight[bad[0]]}; pass a finite number that is not negative.")
    if not weight.any():
        raise ValueError("The column `weight` is 0 in every row.")
    return weight


def parts_by(dataset: Dataset, column: str | None, *, optional: str | None = None) -> dict[str, np.ndarray]:
    """Divide rows by the values of a column; into no parts without one, as where the `optional` one is not there."""
    if column is None or (column == optional and column not in dataset.column_names):
        return {}
    if column not in dataset.column_names:
        raise ValueError(f"`by` is {column!r}, but the columns are {', '.join(dataset.column_names)}.")
    values = column_of(dataset, column)
    if pa.types.is_nested(values.type):  # which Arrow does not encode
        values = pa.array(map(str, values.to_pylist()))
    codes, values = group_codes(values)
    names = [*map(str, values), "None"]  # the last is that of all nulls
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    rows = group_rows(np.array([numbers[name] for name in names])[np.minimum(codes, len(values))])
    return {name: some for name, some in zip(numbers, rows, strict=False) if len(some)}


def _answer(row: Mapping[str, Any], side: str, index: int) -> tuple[str, str]:
    """Text of the answer, and of the last user message before it."""
    messages, prompt = row[side], row.get("prompt")
    if isinstance(messages, str):
        return messages, prompt if isinstance(prompt, str) else ""
    if not messages:
        raise ValueError(f"{row_name(row, index)}: `{side}` is missing; `trl_dt2it.data.validate` quarantines it.")
    earlier = prompt if isinstance(prompt, list) else messages[:-1]
    question = next((message for message in reversed(earlier) if message["role"] == "user"), None)
    return message_text(messages[-1]), "" if question is None else message_text(question)
