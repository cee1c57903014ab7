"""Blind audit: the share of labels that a cross-validated probe predicts from the text, without the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from scipy.sparse import csr_matrix, vstack
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from ..data.columns import select_rows
from ..data.controls import MEDIA
from ..data.mixing import with_columns
from ..evaluation.metrics import Interval, group_sums, wilson
from .audit import density_at_zero, folds, why_not_measured, wins
from .reports import BlindAccuracy, BlindNgram, BlindReport
from .style import answer_batches, parts_by, read_units


# Letters of scripts without spaces (Thai to Lao, Burmese, Khmer, kana, Han) stand alone.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKENS = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+(?:'[^\W\d_]+)?|[^\w\s]|_|\n")
_START, _END = "\x02", "\x03"

# Kinds of n-grams, and the block of each; every block has the mean square length 1, so that a penalty has no scale.
_WORD, _PAIR, _CHARACTERS, _CROSSED = range(4)
_BLOCK = np.array([0, 0, 1, 2], dtype=np.int8)

_ENDS = 32  # characters at the start, and at the end, of which three in a row are n-grams
_CROSSED_WORDS = 8  # most words of the question and, of each answer, first words that the other has not, to cross
_BITS = 22  # of the number of buckets
_FEWEST, _MOST_ENTRIES = 3, 25_000_000  # pairs that an n-gram must be in; beyond so many entries, more of them
_CACHED_WORDS = 500_000

_STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # inverse penalties, of which held-out pairs choose
_TUNED, _TUNED_FOLDS = 8000, 5  # most pairs to choose by, and the folds if there are more
_SOLVED, _MOST_DRAWS = 8000, 16  # pairs times random draws to take the covariance of folds from, and the most draws
_NAMED, _EXAMPLES, _SHOWN = 200, 3, 20  # buckets to name, pairs to read the names from, and n-grams to report


def audit_blind(
    dataset: Dataset,
    *,
    probe: str = "text",
    margins: npt.ArrayLike | None = None,
    by: str | None = "source",
    num_folds: int = 10,
    seed: int = 42,
    min_pairs: int = 200,
) -> BlindReport:
    """
    Measure blind accuracy: how often question and answers alone, without the image, tell which answer was chosen.

    The probe is a logistic regression on n-grams of which one answer has more than the other: words, two words in a
    row, characters at both ends, and words of the answer together with words of the question. It names the chosen
    answer of pairs whose `group_id` it has not seen. In 95 of 100 sets, the interval holds the accuracy that the probe
    of the whole set reaches on new pairs. A column `weight` counts, in fitting and in measuring.

    Args:
        dataset (`Dataset`):
            Preference rows; images are not read. Rows without image and video are left out, and counted: that their
            text tells the answer is no fault.
        probe (`str`, *optional*, defaults to `"text"`):
            `"text"`, the linear model of n-grams.
        margins (`np.ndarray` of shape `(N,)`, *optional*):
            Blind margins of another model, which has not seen the pairs, in place of a probe: such as those of
            [`model_blind_margins`]. No n-grams are named, and the interval is wide enough for folds that learn from
            each other.
        by (`str`, *optional*, defaults to `"source"`):
            Column whose values are also measured one by one, each by a probe of its own; `None`, or no column
            `source`, for the whole only.
        num_folds, seed (`int`, *optional*, default to `10` and `42`):
            Most folds of the cross-validation, each of at least two groups, and their seed.
        min_pairs (`int`, *optional*, defaults to `200`):
            Fewest pairs that are measured; smaller sources get a note.

    Returns:
        [`BlindReport`]

    Raises:
        `ValueError`: if a column is missing, a row has no answer, or an argument is out of range.
    """
    _check(probe, num_folds)
    weight, group = read_units(dataset, "Blind accuracy")
    seen = np.flatnonzero(has_image(dataset))
    left_out = len(dataset) - len(seen)
    score = None if margins is None else _held_out_margins(margins, seen, len(dataset))
    if len(seen) == 0:
        return BlindReport(BlindAccuracy(0, 0, note="no pair has an image"), {}, left_out)
    dataset, weight, group = select_rows(dataset, seen), weight[seen], group[seen]
    text = read_pair_text(dataset, weight, group) if score is None else None
    parts = parts_by(dataset, by, optional="source")

    def measure(rows: np.ndarray | None = None) -> BlindAccuracy:
        if text is not None:
            some = text if rows is None else text.take(rows)
            return blind_accuracy(some, dataset, num_folds=num_folds, seed=seed, min_pairs=min_pairs)
        some_rows = slice(None) if rows is None else rows
        return _margin_accuracy(cast(np.ndarray, score)[some_rows], weight[some_rows], group[some_rows], min_pairs)

    overall = measure()
    # A single source holds the same pairs once more.
    sources = {name: overall if len(parts) == 1 else measure(rows) for name, rows in parts.items()}
    return BlindReport(overall, sources, left_out)


def _held_out_margins(margins: npt.ArrayLike, seen: np.ndarray, count: int) -> np.ndarray:
    """Return the margins of the rows with an image."""
    found = np.asarray(margins, dtype=np.float64)
    if found.shape != (count,):
        raise ValueError(f"`margins` has shape {found.shape}; pass one number per row, ({count},).")
    if len(missing := np.flatnonzero(~np.isfinite(found[seen]))):
        raise ValueError(f"`margins` is {found[seen[missing[0]]]} for row {seen[missing[0]]}; pass a finite number.")
    return found[seen]


def _margin_accuracy(score: np.ndarray, weight: np.ndarray, group: np.ndarray, min_pairs: int) -> BlindAccuracy:
    """Blind accuracy of pairs whose held-out scores are known."""
    num_groups = len(np.unique(group))
    note = why_not_measured(weight, group, num_folds=2, min_pairs=min_pairs)
    if note is not None:
        return BlindAccuracy(len(score), num_groups, note=note)
    accuracy, between_groups, units = _outcomes(score, weight, group)
    # The covariance of folds where the model has learned nothing, as in [`measure_text`]; it is less where it has.
    low, high = _interval(accuracy, (1 + 2 / np.pi) * between_groups, units)
    return BlindAccuracy(len(score), num_groups, accuracy, Interval(low, max(high, 1 - accuracy)))


def blind_margins(dataset: Dataset, *, probe: str = "text", num_folds: int = 10, seed: int = 42) -> np.ndarray:
    """
    Compute for each pair the log odds, by a probe that sees no image, that the chosen answer is the better one.

    Each is by a probe of [`audit_blind`] that has not seen the pair's group. Trained with them as the column
    `blind_margin`, a pair counts the less, the surer the text alone is of it.

    Args:
        dataset, probe, num_folds, seed:
            As in [`audit_blind`], as are the errors.

    Returns:
        `np.ndarray` of shape `(N,)` and dtype `float64`: positive where text is for the chosen answer; 0, which is no
        evidence, for rows without image and video.

    Raises:
        `ValueError`: if there are fewer than four groups of pairs with images, or all their weights are 0.
    """
    _check(probe, num_folds)
    weight, group = read_units(dataset, "Blind accuracy")
    seen, margins = np.flatnonzero(has_image(dataset)), np.zeros(len(dataset))
    if len(seen) == 0:
        return margins
    if note := why_not_measured(weight[seen], group[seen], num_folds=2, min_pairs=0):
        raise ValueError(f"The pairs with images have no blind margin: {note}.")
    text = read_pair_text(select_rows(dataset, seen), weight[seen], group[seen])
    num_folds = min(num_folds, len(np.unique(text.group)) // 2)
    margins[seen] = held_out_scores(text, num_folds, seed).score
    return margins


def with_blind_margins(dataset: Dataset, *, probe: str = "text", num_folds: int = 10, seed: int = 42) -> Dataset:
    """
    Set the column `blind_margin`, which the trainer weighs pairs by.

    Args:
        dataset, probe, num_folds, seed:
            As in [`blind_margins`], as are the errors.

    Returns:
        `Dataset`: the rows in their order; null where a row has no image, which then counts as it is.
    """
    margins = blind_margins(dataset, probe=probe, num_folds=num_folds, seed=seed)
    return with_columns(dataset, {"blind_margin": pa.array(margins, mask=~has_image(dataset))})


def _check(probe: str, num_folds: int) -> None:
    if probe != "text":
        raise ValueError(f'`probe` is {probe!r}; pass "text", or use `model_blind_margins` with a model.')
    if num_folds < 2:
        raise ValueError(f"`num_folds` is {num_folds}; pass at least 2.")


def has_image(dataset: Dataset) -> np.ndarray:
    """Tell which rows have an image or a video, without reading any. Shapes: returns `(N,)` `bool`."""
    found = np.zeros(len(dataset), dtype=bool)
    for name in MEDIA:
        if name in dataset.column_names:
            column = dataset.data.column(name)
            is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
            has = pc.greater(pc.list_value_length(column), 0).fill_null(False) if is_list else pc.is_valid(column)
            has = has.to_numpy()
            found |= has if dataset._indices is None else has[dataset._indices.column(0).to_numpy()]
    return found


class Words(dict):
    """Hashes of words, each computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) > _CACHED_WORDS:
            self.clear()
        self[word] = value = _hash(word)
        return value


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(kind: int | np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hash of a kind and two hashes, by the finalizer of SplitMix64."""
    one, two, three = map(np.uint64, (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
    x = (a * one) ^ (b * two + np.asarray(kind, dtype=np.uint64) * three)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Ngrams(NamedTuple):
    """N-grams that one answer of a pair has and the other has not, in the order of the pairs; all `(M,)`."""

    pair: np.ndarray  # from 0
    is_chosen: np.ndarray  # whether the chosen answer has it
    kind: np.ndarray
    a: np.ndarray  # hash of its first word, or of that of the question, or three characters
    b: np.ndarray  # hash of its second word, or key of the answer's n-gram
    key: np.ndarray  # uint64


def read_ngrams(sides: Sequence[Sequence[tuple[str, str]]], words: Words) -> Ngrams:
    """Read the n-grams of at most 1024 pairs, given the chosen and the rejected answers with their questions."""
    count = len(sides[0])
    answers = [answer for pair in zip(*sides, strict=True) for answer, _ in pair]  # chosen and rejected in turn
    hashed = words.__getitem__
    start, end = words[_START], words[_END]
    tokens = [[start, *map(hashed, _TOKENS.findall(answer.lower())), end] for answer in answers]
    word = np.fromiter(chain.from_iterable(tokens), dtype=np.uint64)
    answer_of = np.repeat(np.arange(2 * count), list(map(len, tokens)))
    inside = np.flatnonzero(answer_of[1:] == answer_of[:-1])
    characters, ends_of = _characters(answers)
    sizes = len(word), len(inside), len(characters)
    kind = np.repeat([_WORD, _PAIR, _CHARACTERS], sizes)
    a = np.concatenate([word, word[inside], characters])
    b = np.concatenate([np.zeros(sizes[0], np.uint64), word[inside + 1], np.zeros(sizes[2], np.uint64)])
    answer = np.concatenate([answer_of, answer_of[inside], ends_of])
    key = _mixed(kind, a, b)
    # Pair, key and side in one number, which sorts: 10, 53 and 1 bits.
    packed = (answer >> 1).astype(np.uint64) << np.uint64(54) | key >> np.uint64(11) << np.uint64(1)
    packed, first = np.unique(packed | (answer & 1).astype(np.uint64), return_index=True)
    in_both = packed[1:] >> np.uint64(1) == packed[:-1] >> np.uint64(1)
    first = first[~(np.r_[False, in_both] | np.r_[in_both, False])]
    first = first[np.lexsort((first, answer[first]))]  # by answer, kind and position
    kind, a, b, key, answer = kind[first], a[first], b[first], key[first], answer[first]
    # Crossed with words of the question, and with the question itself.
    own = np.flatnonzero(kind <= _PAIR)
    rank = np.arange(len(own)) - np.searchsorted(answer[own], answer[own])
    own = own[rank < _CROSSED_WORDS]
    parts = [_question_parts(question, words) for _, question in sides[0]]
    lengths = np.array(list(map(len, parts)))
    times = lengths[answer[own] >> 1]
    crossed = np.repeat(own, times)
    within = np.arange(len(crossed)) - np.repeat(np.cumsum(times) - times, times)
    begin = np.cumsum(lengths) - lengths
    of_question = np.fromiter(chain.from_iterable(parts), dtype=np.uint64)[begin[answer[crossed] >> 1] + within]
    kind = np.concatenate([kind, np.full(len(crossed), _CROSSED)])
    a, b = np.concatenate([a, of_question]), np.concatenate([b, key[crossed]])
    key = np.concatenate([key, _mixed(_CROSSED, of_question, key[crossed])])
    answer = np.concatenate([answer, answer[crossed]])
    order = np.argsort(answer, kind="stable")
    return Ngrams(answer[order] >> 1, answer[order] % 2 == 0, kind[order], a[order], b[order], key[order])


def _characters(answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Three characters in a row, at both ends of the answers, of 21 bits each; and the answer of each."""
    ends: list[str] = []
    of: list[int] = []
    for index, answer in enumerate(answers):
        whole = f"{_START}{answer}{_END}"
        parts = [whole] if len(whole) <= 2 * _ENDS else [whole[:_ENDS], whole[-_ENDS:]]
        ends += parts
        of += [index] * len(parts)
    codes = np.frombuffer("".join(ends).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    part = np.repeat(np.arange(len(ends)), list(map(len, ends)))
    inside = np.flatnonzero(part[2:] == part[:-2])
    three = codes[inside] << np.uint64(42) | codes[inside + 1] << np.uint64(21) | codes[inside + 2]
    return three, np.array(of)[part[inside]]


def _question_parts(question: str, words: Words) -> list[int]:
    """Hashes of a question, and of some of its words."""
    different = list(dict.fromkeys(word for word in _TOKENS.findall(question.lower()) if word.isalnum()))
    if len(different) > _CROSSED_WORDS:
        different = different[: _CROSSED_WORDS // 2] + different[-_CROSSED_WORDS // 2 :]
    return [_hash(f"?{question}"), *map(words.__getitem__, different)]


def bucket_of(key: np.ndarray) -> np.ndarray:
    return (key >> np.uint64(64 - _BITS)).astype(np.int64)


@dataclass(frozen=True)
class PairText:
    """N-grams of N pairs, in D buckets: chosen minus rejected."""

    x: csr_matrix  # (N, D) float64, with random signs
    bucket: np.ndarray  # (D,): number of the bucket of each column
    weight: np.ndarray  # (N,) float64
    group: np.ndarray  # (N,) int64
    row: np.ndarray  # (N,): row of the data set

    def __len__(self) -> int:
        return self.x.shape[0]

    def take(self, rows: np.ndarray) -> PairText:
        """Some of the pairs, and the n-grams that enough of them have."""
        x = self.x[rows]
        used = np.bincount(x.indices, minlength=x.shape[1])
        kept = np.flatnonzero(used >= _FEWEST)
        x = _keep_columns(x.indices, x.data, np.diff(x.indptr), _numbers(kept, len(used)))
        return PairText(x, self.bucket[kept], self.weight[rows], self.group[rows], self.row[rows])


def _numbers(kept: np.ndarray, count: int) -> np.ndarray:
    """Number of each of so many columns among those kept, or -1."""
    numbers = np.full(count, -1, dtype=np.int32)
    numbers[kept] = np.arange(len(kept))
    return numbers


def _keep_columns(index: np.ndarray, data: np.ndarray, lengths: np.ndarray, numbers: np.ndarray) -> csr_matrix:
    """Sparse matrix of the columns kept, given all entries, and their number in each row."""
    number = numbers[index]
    stays = number >= 0
    before = np.append(np.cumsum(stays, dtype=np.int32), 0)  # so that index -1 is 0
    ends = before[np.r_[0, np.cumsum(lengths)] - 1]
    return csr_matrix((data[stays], number[stays], ends), shape=(len(lengths), int(numbers.max(initial=-1)) + 1))


def read_pair_text(dataset: Dataset, weight: np.ndarray, group: np.ndarray) -> PairText:
    """Read the n-grams of all pairs. Shapes: `weight` `(N,)`, `group` `(N,)`."""
    words, read = Words(), []
    for sides in answer_batches(dataset):
        ngrams = read_ngrams(sides, words)
        code = 2 * _BLOCK[ngrams.kind] + (_sign(ngrams) > 0)
        lengths = np.bincount(ngrams.pair, minlength=len(sides[0]))
        read.append((bucket_of(ngrams.key).astype(np.int32), code.astype(np.int8), lengths))
    used = np.bincount(np.concatenate([bucket for bucket, _, _ in read]), minlength=2**_BITS)
    entries = np.bincount(used, weights=used)[::-1].cumsum()[::-1]  # of the n-grams of so many pairs or more
    fewest = max(_FEWEST, int(np.argmax(np.append(entries, 0) <= _MOST_ENTRIES)))
    kept = np.flatnonzero(used >= fewest)
    numbers = _numbers(kept, len(used))
    scale = np.sqrt(len(dataset) / np.maximum(sum(np.bincount(code >> 1, minlength=3) for _, code, _ in read), 1))
    values = np.stack([-scale, scale], axis=1).ravel()
    x = vstack([_keep_columns(bucket, values[code], lengths, numbers) for bucket, code, lengths in read], format="csr")
    x.sum_duplicates()  # of two n-grams in a bucket; sorts too, once instead of for each fit
    return PairText(x, kept, weight, group, np.arange(len(dataset)))


def _sign(ngrams: Ngrams) -> np.ndarray:
    """Sign of each entry: that of its side, and a random one, so that n-grams that share a bucket do not add up."""
    return np.where(ngrams.is_chosen, 1, -1) * np.where(ngrams.key & np.uint64(1), 1, -1)


def fit_probe(x: csr_matrix, weight: np.ndarray, strength: float) -> np.ndarray:
    """Fit the probe `(D,)`; weights of mean 1."""
    # A pair and its mirror have the same loss, so either will do; scikit-learn wants both labels.
    sign = np.where(np.arange(x.shape[0]) % 2, 1.0, -1.0)
    options: dict[str, Any] = {"solver": "liblinear", "dual": True, "tol": 1e-2, "max_iter": 1000, "random_state": 0}
    signed = csr_matrix((x.data * np.repeat(sign, np.diff(x.indptr)), x.indices, x.indptr), shape=x.shape)
    probe = LogisticRegression(C=strength, fit_intercept=False, **options)
    return probe.fit(signed, sign > 0, sample_weight=weight).coef_[0]


class Fold(NamedTuple):
    """A probe that has not seen the pairs of a fold."""

    train: np.ndarray
    test: np.ndarray
    weight: np.ndarray  # of the training pairs, of mean 1
    probe: np.ndarray  # (D,)
    strength: float


@dataclass(frozen=True)
class TextScores:
    """Scores of N pairs by probes that have not seen their groups."""

    score: np.ndarray  # (N,): log odds that the chosen answer is the better one
    strength: float  # inverse penalty for a probe of all pairs
    folds: list[Fold]


def held_out_scores(text: PairText, num_folds: int, seed: int) -> TextScores:
    """Score every pair by a probe fitted on other folds, whose penalty all folds but that of the pair choose."""
    strengths: tuple[float, ...] = _STRENGTHS
    count = len(text)
    if count > _TUNED:
        codes = np.unique(text.group, return_inverse=True)[1]
        order = np.random.default_rng(seed).permutation(codes.max() + 1)
        some = np.flatnonzero(order[codes] < len(order) * _TUNED / count)
        strengths = (held_out_scores(text.take(some[:_TUNED]), min(num_folds, _TUNED_FOLDS), seed).strength,)
    scores, fitted = np.zeros((count, len(strengths))), []
    for train, test in folds(text.group, num_folds, seed):
        weight = text.weight[train]
        if not weight.any():
            continue
        x, weight = text.x[train], weight / weight.mean()
        probes = [fit_probe(x, weight, strength) for strength in strengths]
        scores[test] = text.x[test] @ np.stack(probes, axis=1)
        fitted.append((train, test, weight, probes))
    loss = text.weight[:, None] * np.logaddexp(0, -scores)
    score, total, chosen = np.zeros(count), loss.sum(0), []
    for train, test, weight, probes in fitted:
        best = int(np.argmin(total - loss[test].sum(0)))
        score[test] = scores[test, best]
        chosen.append(Fold(train, test, weight, probes[best], strengths[best]))
    return TextScores(score, strengths[int(np.argmin(total))], chosen)


def blind_accuracy(
    text: PairText, dataset: Dataset | None, *, num_folds: int = 10, seed: int = 42, min_pairs: int = 200
) -> BlindAccuracy:
    """Blind accuracy of some pairs, as [`audit_blind`] measures it, with the n-grams if their data set is passed."""
    num_groups = len(np.unique(text.group))
    note = why_not_measured(text.weight, text.group, num_folds=num_folds, min_pairs=min_pairs)
    if note is None and text.x.nnz == 0:
        note = "no n-gram differs in any pair"
    if note is not None:
        return BlindAccuracy(len(text), num_groups, note=note)
    accuracy, interval, strength = measure_text(text, min(num_folds, num_groups // 2), seed)
    ngrams = [] if dataset is None else _carriers(text, dataset, strength)
    return BlindAccuracy(len(text), num_groups, accuracy, interval, ngrams)


def measure_text(text: PairText, num_folds: int, seed: int) -> tuple[float, Interval, float]:
    """Accuracy of held-out probes, its interval, and the inverse penalty for a probe of all pairs."""
    scores = held_out_scores(text, num_folds, seed)
    accuracy, between_groups, units = _outcomes(scores.score, text.weight, text.group)
    covariance = covariance_of_folds(text, scores, text.weight / text.weight.sum(), seed)
    low, high = _interval(accuracy, between_groups + min(max(covariance, 0.0), between_groups), units)
    # Where text tells nothing, a score and its change by another pair are normal, whatever the n-grams: the covariance
    # adds 2/pi of the variance. One n-gram that leans by chance hides that, as then no score is near 0.
    if _interval(accuracy, (1 + 2 / np.pi) * between_groups, units).low < 0.5:
        low = min(low, 0.5)
    # In a set whose text is balanced, by chance or on purpose, the other folds lack what one has too much of, so that
    # probes are wrong more often than not. On new pairs, none is worse than chance.
    return accuracy, Interval(low, max(high, 1 - accuracy) if accuracy < 0.5 else high), scores.strength


def _outcomes(score: np.ndarray, weight: np.ndarray, group: np.ndarray) -> tuple[float, float, float]:
    """Accuracy of held-out scores, its variance between groups, and the number of groups that weights leave."""
    share, won = weight / weight.sum(), wins(score)
    accuracy = float(share @ won)
    between_groups = float((group_sums(share * (won - accuracy), group) ** 2).sum())
    return accuracy, between_groups, 1 / float((group_sums(share, group) ** 2).sum())


def _interval(accuracy: float, variance: float, units: float) -> Interval:
    # Without variance, all are won or all lost.
    count = accuracy * (1 - accuracy) / variance if variance > 0 else units
    return wilson(accuracy, count, freedom=max(units - 1, 1))


def covariance_of_folds(text: PairText, scores: TextScores, share: np.ndarray, seed: int) -> float:
    """Covariance of the outcomes of different folds, whose probes learn from each other."""
    # As of the audit of style: the sum over pairs of groups of a_g' H_g^-1 b_h times a_h' H_h^-1 b_g. With as many
    # features as here, that trace is the mean over random signs z of the groups of y'y*, where y_g is the sum over h
    # of a_g' H_g^-1 b_h z_h, and y*_g that of b_g' H_g^-1 a_h z_h, H being nearly the same in all folds.
    score, weight = scores.score, text.weight / text.weight.mean()
    turned, learned = share * density_at_zero(score, share > 0), weight * expit(-score)
    unit = np.unique(text.group, return_inverse=True)[1]
    draws = int(np.clip(_SOLVED // len(text), 1, _MOST_DRAWS))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (unit.max() + 1, draws))[unit]
    sides = np.stack([learned, turned], axis=1)
    measured = scores.folds[: 1 if len(text) > _SOLVED else None]
    total = pairs = 0.0
    for fold in measured:
        x, test = text.x[fold.train], fold.test
        chance = expit(x @ fold.probe)
        target = x.T @ (sides[fold.train, :, None] * signs[fold.train, None]).reshape(len(fold.train), -1)
        solved = solve(x, fold.weight * chance * (1 - chance), 1 / fold.strength, target)
        moved = (text.x[test] @ solved).reshape(len(test), 2, draws) * sides[test, ::-1, None]
        one, other = group_sums(moved, unit[test]).transpose(1, 0, 2)
        total, pairs = total + float((one * other).sum()) / draws, pairs + len(test)
    return total * len(text) / max(pairs, 1.0)


def solve(x: csr_matrix, curvature: np.ndarray, ridge: float, target: np.ndarray) -> np.ndarray:
    """Solve (X'VX + ridge I) U = `target` `(D, R)` for U by conjugate gradients."""
    solved, residual = np.zeros_like(target), target.copy()
    direction, size = target.copy(), (target**2).sum(0)
    least = 1e-4 * size  # an error of 1 %
    for _ in range(50):
        if (size <= least).all():
            break
        image = x.T @ (curvature[:, None] * (x @ direction)) + ridge * direction
        step = size / np.maximum((direction * image).sum(0), 1e-300)
        solved, residual = solved + step * direction, residual - step * image
        before, size = size, (residual**2).sum(0)
        direction = residual + size / np.maximum(before, 1e-300) * direction
    return solved


def _carriers(text: PairText, dataset: Dataset, strength: float) -> list[BlindNgram]:
    """N-grams that the probe of all pairs owes most to; those of the same pairs count as one, named by the longest."""
    weight = text.weight / text.weight.sum()
    probe = fit_probe(text.x, text.weight / text.weight.mean(), strength)
    columns = np.argsort(-probe * (text.x.T @ weight), kind="stable")[:_NAMED]
    part = text.x[:, columns].tocsc()
    part.sum_duplicates()
    entries = [slice(*part.indptr[index : index + 2]) for index in range(len(columns))]
    rows = [part.indices[entry] for entry in entries]
    names = name_buckets(dataset, text.bucket[columns], [text.row[some[:_EXAMPLES]] for some in rows])
    mark = np.random.default_rng(0).random(len(text))
    merged: dict[float, list[tuple[float, BlindNgram]]] = {}
    for column, entry, some, (name, sign) in zip(columns, entries, rows, names, strict=True):
        side, share = sign * np.sign(part.data[entry]), float(weight[some].sum())
        chosen = 0.5 + float(weight[some] @ side) / (2 * share) if share > 0 else 0.5
        log_odds = float(sign * probe[column] * np.abs(part.data[entry]).mean())
        ngram, where = BlindNgram(**name, share=share, chosen=chosen, log_odds=log_odds), float(mark[some] @ side)
        merged.setdefault(round(abs(where), 9), []).append((np.sign(where), ngram))
    found = []
    for same in merged.values():
        # Of n-grams of which one answer has the one and the other the other, that of the chosen answers.
        which, longest = max(same, key=lambda item: _rank(item[1]))
        found.append(replace(longest, log_odds=float(sum(which * sign * ngram.log_odds for sign, ngram in same))))
    return sorted(found, key=lambda ngram: -ngram.contribution)[:_SHOWN]


def _rank(ngram: BlindNgram) -> tuple:
    whole = (ngram.chosen > 0.5, ngram.question is None, ngram.kind == "words")
    return *whole, len(ngram.text), len(ngram.question or "")


def name_buckets(
    dataset: Dataset, buckets: np.ndarray, examples: list[np.ndarray]
) -> list[tuple[dict[str, Any], int]]:
    """The n-gram of each bucket, as some rows have it, and its random sign."""
    words = Words()
    (sides,) = answer_batches(dataset.select(np.unique(np.concatenate(examples))))
    ngrams = read_ngrams(sides, words)
    spelled = {value: word for word, value in words.items()}
    spelled |= {_hash(f"?{question}"): f'"{question.strip()}"' for _, question in sides[0]}
    bucket, names = bucket_of(ngrams.key), []

    def spell(kind: int, a: int, b: int) -> str:
        if kind == _CHARACTERS:
            return "".join(chr(a >> bits & 0x1FFFFF) for bits in (42, 21, 0))
        return spelled[a] if kind == _WORD else f"{spelled[a]} {spelled[b]}"

    for index in map(int, np.flatnonzero(ngrams.kind != _CROSSED)):
        spelled[int(ngrams.key[index])] = spell(*(int(part[index]) for part in (ngrams.kind, ngrams.a, ngrams.b)))
    for one in buckets:
        _, first, counts = np.unique(ngrams.key[bucket == one], return_index=True, return_counts=True)
        index = np.flatnonzero(bucket == one)[first[np.argmax(counts)]]
        kind, a, b = (int(part[index]) for part in (ngrams.kind, ngrams.a, ngrams.b))
        name = {"text": spelled[b if kind == _CROSSED else int(ngrams.key[index])]}
        name["question"] = spelled[a] if kind == _CROSSED else None
        name["kind"] = "characters" if kind == _CHARACTERS else "words"
        marks = str.maketrans({_START: "^", _END: "$", "\n": "\\n"})
        name["text"] = name["text"].translate(marks)
        names.append((name, 1 if int(ngrams.key[index]) & 1 else -1))
    return names
