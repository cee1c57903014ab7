"""Counterfactual pairs: one question about two images, each answer right about one of them and wrong about the other.

Two rows A and B of one source ask the same question about different images, and what is right about A's image is wrong
about B's. Then (A's image: A's answer above B's) and (B's image: B's answer above A's) are a couple of new pairs that
share all their text. Whoever does not see the image is right about one of them and wrong about the other.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers.utils import logging

from ..data.columns import (
    arrow_rows,
    column_of,
    group_codes,
    has_transform,
    leave_images_encoded,
    map_tables,
    mark_checked,
)
from ..data.contents import media_hash, pair_ids
from ..data.controls import MEDIA
from ..data.mixing import concatenate, partner_column, with_canonical_columns, with_columns
from ..data.rows import SIDES, blocks, message_text, summarize, to_json, without_empty
from ..data.t2i import collapse, prefers_first
from ..utils import digest
from .style import LEXICON, parts_by


logger = logging.get_logger(__name__)

# Largest share of the content words of the answer with fewer of them that is in the other one too, and longest answer,
# in words, that numbers alone tell from another.
MAX_OVERLAP, SHORT_ANSWER = 0.5, 40

_NUM_WAITING = 32  # rows that the next one is compared with: enough to find an answer that one row in a hundred gives
_CONTEXT = ("tools", "chat_template_kwargs")
_OF = "counterfactual_of"

# Columns about both answers of a pair, which are null in new pairs, as are those about the rejected answer.
_ABOUT_THE_PAIR = re.compile("strength|margin|gap|flipped|provenance")

_ASKED = Features({"question": Value("string")})
_ANSWERED = Features(
    {
        **dict.fromkeys(("chosen", "rejected"), Value("uint64")),
        "media": Value("string"),
        "text": Value("large_string"),
        "reason": Value("string"),
    }
)

_WORD = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\d_]+(?:'[^\W\d_]+)?")
_LIST_MARKS = re.compile(r"^[ \t]*\d{1,3}[.)][ \t]", re.MULTILINE)
_CHOICE = re.compile(r"(?:^|\b(?i:answer|option|choice)\b[\s:*]*(?:is)?)[\s:*(\[]*([A-H])(?=[.:)\]*,]|\s*$|\n)")
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
)
_UNITS += ["seventeen", "eighteen", "nineteen"]
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBERS = {word: number for number, word in enumerate(_UNITS)}
_NUMBERS |= {word: 10 * number for number, word in enumerate(_TENS, 2)}
_POLARITY = {
    **dict.fromkeys(("yes", "yeah", "yep", "true", "correct"), True),
    **dict.fromkeys(("no", "nope", "not", "false", "incorrect"), False),
}
_HAN_POLARITY = (("是的", True), ("对的", True), ("正确", True), ("不", False), ("否", False), ("没有", False))
_FUNCTION_WORDS = ENGLISH_STOP_WORDS | set(LEXICON["hedge_words"]) | set("的了是在有和与中上下这那个一图像片")
_FUNCTION_WORDS |= set("answer appears displayed image picture photo photograph shown shows showing depicts".split())


class Claims(NamedTuple):
    """Features of an answer by which [`claims_differ`] compares it."""

    text: str
    length: int  # words
    numbers: frozenset[float]
    choice: str | None
    polarity: bool | None
    words: frozenset[str]  # without function words
    is_refusal: bool


def counterfactual_pairs(
    dataset: Dataset,
    *,
    share: float | int = 0.5,
    by: str | None = "source",
    seed: int = 42,
    differ: Callable[[str, str], bool] | None = None,
    with_originals: bool = False,
    image_root: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """
    Make extra training pairs that cannot be told without their image.

    Two rows A and B of one source, with one question (case and white space aside) and different images, make a couple:
    A's prompt and images with A's chosen above B's chosen answer, and B's images with the same prompt and answers, the
    other one chosen. All text of a couple is the same, so that any function of text is right about half of the new
    pairs. Rows are joined at random, each in one couple at most, and questions take turns. Images are read to compare
    them, but neither decoded nor copied.

    The groups (`group_id`) of A and B become one, and no group is joined with a third, so that folds stay small. Rows
    that compare two images in a verdict have their counterfactual in the other order: see `both_orders` of
    [`~trl_dt2it.data.reformulate_t2i`].

    Args:
        dataset (`Dataset`):
            Preference rows, whose chosen answers are taken to be right about their images.
        share (`float` or `int`, *optional*, defaults to `0.5`):
            Most new pairs from a source: a share of its rows in (0, 1], or a number of at least 2.
        by (`str`, *optional*, defaults to `"source"`):
            Column within whose values rows are joined, if there is one; `None` for no column.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw.
        differ (`Callable[[str, str], bool]`, *optional*):
            Function that tells whether two answers to one question exclude each other. By default answers differ that
            are no refusals and choose different options, or else name different numbers, or else say yes and no, or
            else have less than half of their content words in common (`MAX_OVERLAP`).
        with_originals (`bool`, *optional*, defaults to `False`):
            Whether to return the rows of `dataset` too, ahead of the new pairs and with the joined `group_id`: for
            folds and splits after the fact. Without them, split first.
        image_root, num_proc (*optional*):
            Folder of the images, as in [`~trl_dt2it.data.ImageOptions`], and number of processes that read rows.

    Returns:
        `Dataset`: canonical rows, couple by couple, with the columns of `dataset` and `counterfactual_of` and
        `counterfactual_with`, the names of A and B. `pair_id` is A's with `~counterfactual` behind it, `weight` the
        mean and `label_confidence` the product of both. `margin` is 0.0, as is `blind_margin` if that of A or B is
        known; `strength`, other columns about the two answers and those about the rejected one are null. A line of the
        log says why other rows have none.

    Raises:
        `ValueError`: if no pair can be made, or an argument is out of range.

    Example:

    ```python
    >>> from trl_dt2it.data import mix
    >>> from trl_dt2it.debias import counterfactual_pairs
    >>> from trl_dt2it.demo.digits import make_digits

    >>> pairs = make_digits("train", 1000)
    >>> extended = mix({"pairs": pairs, "counterfactuals": counterfactual_pairs(pairs)})
    ```
    """
    if not (0 < share <= 1 if isinstance(share, float) else share >= 2):
        raise ValueError(f"`share` is {share!r}; pass a share of the rows in (0, 1], or a number of at least 2.")
    if not isinstance(dataset, Dataset) or has_transform(dataset):
        kind = "one with a transform" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(f"Counterfactuals are made of a whole `Dataset`, not of {kind}; load or write it first.")
    if missing := [side for side in SIDES if side not in dataset.column_names]:
        raise ValueError(f"The data set has no column `{missing[0]}`; see `trl_dt2it.data.load_preferences`.")
    if by is not None and by != "source" and by not in dataset.column_names:
        raise ValueError(f"`by` is {by!r}, but the columns are {', '.join(dataset.column_names)}.")
    rows = with_canonical_columns(dataset, image_root=image_root)
    parts = list(parts_by(rows, by, optional="source").values()) or [np.arange(len(rows))]
    group_names = column_of(rows, "group_id") if "group_id" in rows.column_names else pa.nulls(len(rows), pa.string())
    groups = group_codes(group_names)[0]
    couples, reasons = _draw_couples(rows, parts, groups, share, np.random.default_rng(seed), differ, num_proc)
    counts = summarize(Counter(reasons[reasons != ""].tolist()))
    if not len(couples):
        message = f"No counterfactual pair can be made of the {len(rows):,} rows ({counts or 'empty set'})"
        raise ValueError(f"{message}; they need one question about several images, with answers that differ.")
    logger.info(f"{2 * len(couples):,} counterfactual pairs of {len(rows):,} rows; of the others: {counts or 'none'}.")

    own, other = couples.ravel(), couples[:, ::-1].ravel()
    ids = pair_ids(rows.select(own), num_proc=num_proc).to_pylist()
    joined: dict[int, str] = {}  # names of groups
    for (one, two), (first, second) in zip(couples.tolist(), zip(ids[::2], ids[1::2], strict=True), strict=True):
        pair = groups[one], groups[two]
        named = [group_names[row].as_py() or name for row, name in ((one, first), (two, second))]
        joined |= dict.fromkeys(pair, "+".join(dict.fromkeys(named))) if pair[0] not in joined else {}
    names = [joined.get(code, name) for code, name in zip(groups.tolist(), group_names.to_pylist(), strict=True)]
    made = mark_checked(_make_pairs(rows, own, other, ids, [names[row] for row in own]), dataset)
    if not with_originals:
        return made
    originals = mark_checked(with_columns(rows, {"group_id": pa.array(names, pa.string())}), dataset)
    return concatenate({"pairs": originals, "counterfactuals": made})


def _make_pairs(rows: Dataset, own: np.ndarray, other: np.ndarray, ids: list[str], groups: list[str]) -> Dataset:
    """Make a pair for each row of `own`, with the chosen answer of the row of `other` as the rejected one."""
    partners = np.arange(len(own)) ^ 1
    # One wording of the question, so that nothing in the text tells the two pairs of a couple apart.
    columns: dict[str, Any] = {"prompt": column_of(rows.select(np.repeat(own[::2], 2)), "prompt")}
    columns["rejected"] = column_of(rows.select(other), "chosen")
    for name, feature in rows.features.items():
        if name in ("weight", "label_confidence"):
            numbers = column_of(rows.select(own), name).cast(pa.float64()).fill_null(1.0).to_numpy()
            both = numbers, numbers[partners]
            columns[name] = np.mean(both, axis=0) if name == "weight" else np.prod(both, axis=0)
        elif name == "margin":
            columns[name] = np.zeros(len(own))
        elif name == "blind_margin":  # text is right about one of the two; null where neither row is weighed by it
            is_known = column_of(rows.select(own), name).is_valid().to_numpy(zero_copy_only=False)
            columns[name] = pa.array(np.zeros(len(own)), mask=~(is_known | is_known[partners]))
        elif _ABOUT_THE_PAIR.search(name) or ("rejected" in name and partner_column(name, rows.column_names)):
            columns.setdefault(name, pa.nulls(len(own), Features({name: feature}).arrow_schema.field(0).type))
    columns |= {"pair_id": [f"{name}~counterfactual" for name in ids], "group_id": groups, _OF: ids}
    columns["counterfactual_with"] = [ids[partner] for partner in partners]
    made = copy.deepcopy(with_columns(rows.select(own), columns))
    made.info.features = Features({name: rows.features.get(name, Value("string")) for name in made.column_names})
    return made


def _draw_couples(
    rows: Dataset,
    parts: list[np.ndarray],
    groups: np.ndarray,
    share: float | int,
    rng: np.random.Generator,
    differ: Callable[[str, str], bool] | None,
    num_proc: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw couples of rows, `(C, 2)`, and say of each row without one why, `(N,)`; `""` of the others."""
    reasons = np.full(len(rows), "", dtype=object)
    if _OF in rows.column_names:
        old = column_of(rows, _OF)
        reasons[old.is_valid().to_numpy(zero_copy_only=False)] = "counterfactual"
        if "pair_id" in rows.column_names:
            is_used = pc.is_in(column_of(rows, "pair_id"), value_set=old.drop_null())
            reasons[is_used.to_numpy(zero_copy_only=False)] = "has_counterfactual"
    texts = rows.select_columns([name for name in ("prompt", *_CONTEXT) if name in rows.column_names])
    questions = map_tables(texts, _questions, _ASKED, num_proc=num_proc, desc="Reading questions")["question"]
    reasons[questions.is_null().to_numpy() & (reasons == "")] = "no_image"
    part_of = np.zeros(len(rows), dtype=np.int64)
    for number, part in enumerate(parts):
        part_of[part] = number
    codes = group_codes(questions.combine_chunks())[0] * len(parts) + part_of
    codes = np.unique(codes, return_inverse=True)[1]
    count = np.bincount(codes[reasons == ""], minlength=len(rows) + 1)
    reasons[(count[codes] < 2) & (reasons == "")] = "question_asked_once"
    free = np.flatnonzero(reasons == "")
    read = leave_images_encoded(rows.select(free))
    read = read.select_columns([name for name in (*SIDES, *MEDIA) if name in rows.column_names])
    answered = map_tables(read, _answers, _ANSWERED, num_proc=num_proc, desc="Reading answers and images")
    reasons[free] = answered["reason"].to_pylist()
    free = free[answered["text"].is_valid().to_numpy()]
    matcher = _Matcher(answered.drop_null(), codes[free], groups[free], differ)
    couples = free[np.array(matcher.draw(rng), dtype=np.int64).reshape(-1, 2)]

    reasons[couples.ravel()] = "beyond_share"
    # Questions take turns: the first couple of each, then the second, ...
    couples = couples[rng.permutation(len(couples))]
    question = pd.Series(codes[couples[:, 0]])
    couples = couples[np.argsort(question.groupby(question).cumcount().to_numpy(), kind="stable")]
    taken = np.zeros(len(couples), dtype=bool)
    for number, part in enumerate(parts):
        most = int(share * len(part) + 1e-9) if isinstance(share, float) else share
        taken[np.flatnonzero(part_of[couples[:, 0]] == number)[: most // 2]] = True
    reasons[couples[taken].ravel()] = ""
    return couples[taken], reasons


def _questions(table: pa.Table) -> pa.Table:
    """Hash the question of each row, null without images or videos."""
    return pa.table({"question": list(map(_question, arrow_rows(table)))}, schema=_ASKED.arrow_schema)


def _question(row: Mapping[str, Any]) -> str | None:
    turns = [
        [message["role"], [[block["type"], _normalized(block.get("text") or "")] for block in blocks(message)]]
        for message in row.get("prompt") or []
    ]
    if all(kind == "text" for _, content in turns for kind, _ in content):
        return None
    return digest(to_json([turns, [without_empty(row.get(name)) for name in _CONTEXT]]), size=16)


def _normalized(text: str) -> str:
    return collapse(text).casefold()


def _answers(table: pa.Table) -> pa.Table:
    return pa.Table.from_pylist(list(map(_answer, arrow_rows(table))), schema=_ANSWERED.arrow_schema)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the chosen answer, with hashes of it, of the rejected one and of the images, or say why not."""
    texts = [message_text(row[side][-1]) if row[side] else "" for side in SIDES]
    if len(row.get("images") or ()) == 2 and None not in map(prefers_first, texts):
        return {"reason": "two_image_verdict"}
    media = media_hash(row)
    if media is None or not texts[0].strip():
        return {"reason": "unreadable"}
    chosen, rejected = (int(digest(_normalized(text), size=8), 16) for text in texts)
    return {"reason": "no_other_answer", "text": texts[0], "chosen": chosen, "rejected": rejected, "media": media}


class _Matcher:
    """
    Couples of N rows, found in one pass over each question: a row joins one of the last few that wait for a partner.

    Args:
        answered: Answers and hashes.
        questions, groups: Numbers of the question and of the group of each row, `(N,)`.
        differ: As in [`counterfactual_pairs`].
    """

    def __init__(self, answered: pa.Table, questions: np.ndarray, groups: np.ndarray, differ: Any) -> None:
        self.texts = answered["text"].combine_chunks()
        self.chosen, rejected, self.media = (answered[name].to_pylist() for name in ("chosen", "rejected", "media"))
        self.questions, self.groups = questions.tolist(), groups.tolist()
        self.read: Callable[[str], Any] = read_claims if differ is None else str
        self.differ: Callable[[Any, Any], bool] = claims_differ if differ is None else differ
        self.partners: dict[int, int] = {}  # groups that are joined
        # Pairs of a question, an image and two answers, whichever is chosen, and answers that are right.
        self.pairs = set(map(_pair, self.questions, self.media, self.chosen, rejected))
        self.right = set(map(_pair, self.questions, self.media, self.chosen, self.chosen))

    def draw(self, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Join groups by a couple each, then as many other rows of these groups as fit."""
        count = len(self.questions)
        priority, questions = rng.random(count), np.array(self.questions, dtype=np.int64)
        order = np.lexsort((priority, questions))
        couples = list(self._join(order, questions, is_new=True))
        joined = np.array([min(group, self.partners.get(group, -1)) for group in self.groups], dtype=np.int64)
        joined[np.array(couples, dtype=np.int64).ravel()] = -1
        runs = questions * (joined.max(initial=0) + 1) + joined
        left = order[joined[order] >= 0]
        return couples + list(self._join(left[np.argsort(runs[left], kind="stable")], runs, is_new=False))

    def _join(self, order: np.ndarray, runs: np.ndarray, *, is_new: bool) -> Iterator[tuple[int, int]]:
        """Join rows within each run of equal numbers, of groups that have no partner yet, or of partners."""
        waiting: deque[tuple[int, Any]] = deque(maxlen=_NUM_WAITING)
        run = None
        for row, claims in self._read(order):
            if runs[row] != run:
                run = runs[row]
                waiting.clear()
            if is_new and self.groups[row] in self.partners:
                continue
            for other, claimed in list(waiting):
                if is_new and self.groups[other] in self.partners:
                    waiting.remove((other, claimed))
                elif self._is_partner(row, other, is_new) and self.differ(claims, claimed):
                    waiting.remove((other, claimed))
                    self._add(row, other)
                    yield other, row
                    break
            else:
                waiting.append((row, claims))

    def _read(self, order: np.ndarray) -> Iterator[tuple[int, Any]]:
        for start in range(0, len(order), 1000):
            rows = order[start : start + 1000]
            yield from zip(rows.tolist(), map(self.read, self.texts.take(pa.array(rows)).to_pylist()), strict=True)

    def _is_partner(self, row: int, other: int, is_new: bool) -> bool:
        question, media, chosen = self.questions[row], self.media, self.chosen
        return (
            (is_new or self.partners[self.groups[row]] == self.groups[other])
            and media[row] != media[other]
            and self.pairs.isdisjoint(self._made(row, other))
            and _pair(question, media[row], chosen[other], chosen[other]) not in self.right
            and _pair(question, media[other], chosen[row], chosen[row]) not in self.right
        )

    def _made(self, row: int, other: int) -> list[int]:
        return [
            _pair(self.questions[row], self.media[one], self.chosen[row], self.chosen[other]) for one in (row, other)
        ]

    def _add(self, row: int, other: int) -> None:
        self.pairs.update(self._made(row, other))
        self.partners[self.groups[row]] = self.groups[other]
        self.partners[self.groups[other]] = self.groups[row]


def _pair(question: int, media: str, one: int, other: int) -> int:
    return hash((question, media, min(one, other), max(one, other)))


def read_claims(answer: str) -> Claims:
    """Read what an answer says that can be compared."""
    text = _normalized(answer).replace("\u2019", "'")
    words = _WORD.findall(_LIST_MARKS.sub("", answer.casefold().replace("\u2019", "'")))
    choice = _CHOICE.search(answer)
    return Claims(
        text=" ".join(words) or text,
        length=len(words),
        numbers=_read_numbers(words),
        choice=choice and choice[1],
        polarity=_read_polarity(words, text),
        words=frozenset(words) - _FUNCTION_WORDS,
        is_refusal=any(phrase in text for key in ("refusal_phrases", "refusal_chinese") for phrase in LEXICON[key]),
    )


def _read_numbers(words: list[str]) -> frozenset[float]:
    numbers: list[float] = []
    for before, word in zip(["", *words], words, strict=False):
        if word[0].isdecimal():
            numbers.append(float(word.replace(",", "")))
        elif word in _NUMBERS:
            is_rest = before in _TENS and 0 < _NUMBERS[word] < 10  # of forty-two
            numbers.append(_NUMBERS[word] + (numbers.pop() if is_rest else 0))
    return frozenset(numbers)


def _read_polarity(words: list[str], text: str) -> bool | None:
    """Read yes or no: the first word of an answer, or the only one of a short answer that says either."""
    if words and words[0] in _POLARITY:
        return _POLARITY[words[0]]
    if (said := next((said for word, said in _HAN_POLARITY if text.startswith(word)), None)) is not None:
        return said
    found = {_POLARITY[word] for word in words if word in _POLARITY}
    return found.pop() if len(found) == 1 and len(words) <= SHORT_ANSWER else None


def claims_differ(one: Claims, other: Claims) -> bool:
    """Tell whether two answers to one question exclude each other; see [`counterfactual_pairs`]."""
    if one.text == other.text or one.is_refusal or other.is_refusal:
        return False
    if one.choice and other.choice:
        return one.choice != other.choice
    most = MAX_OVERLAP * min(len(one.words), len(other.words))
    is_about_others = len(one.words & other.words) < most
    if one.numbers and other.numbers and (is_about_others or min(one.length, other.length) <= SHORT_ANSWER):
        # Each has one that the other has not: two dogs and a cat are also two dogs.
        return bool(one.numbers - other.numbers and other.numbers - one.numbers)
    if one.polarity is not None and other.polarity is not None:
        return one.polarity != other.polarity
    return is_about_others
