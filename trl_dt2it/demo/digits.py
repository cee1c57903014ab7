"""Preference pairs about real handwriting, with known truth."""

import io
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from ..data.messages import MESSAGES, preference
from ..data.mixing import partner_column
from ..data.rows import SIDES
from ..data.t2i import ENGLISH, reformulate_t2i
from .label_noise import COPIES, NOISE_KINDS, check_noise, plant_noise


SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}
TILE = 32  # pixels of a digit's side
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# No wording holds a number, so that the read-out alone speaks about the image, whatever the style.
QUESTIONS = (
    "What is written here?",
    "Which digits are shown, from left to right?",
    "Read the handwriting in the image.",
    "Please tell me what you read.",
)

ANSWERS = {
    "plain": ("It is {}.", "The image shows {}.", "The answer is {}.", "I read {}."),
    "verbose": (
        "Looking closely at the strokes of the pen, and taking every curve into account, I would say it is {}.",
        "Thank you for the question. After a careful look at the whole image, what is written here is clearly {}.",
    ),
    "markdown": ("**Answer:** {}", "## Reading\n\n- {}"),
}

# Text that gives the better answer away, and that no style feature sees: the wordings differ in none of them.
# `wording`: the better answer opens with the first of these, the other with one of the rest. `question_answer`: the
# better answer has the first wording after one half of the questions, and the second after the other half. `number`:
# the better answer names a seven, where the other reads another digit of five letters; images are drawn to fit.
SHORTCUTS = ("wording", "number", "question_answer")
SHORTCUT_ANSWERS = ("The paper shows {}.", "The sheet shows {}.", "The strip shows {}.", "The panel shows {}.")
_FAVORED_DIGIT, _AS_LONG = "7", "38"
_OTHER_DIGITS = "0124569"

CAPTIONS = ("the digits {} in handwriting", "a handwritten {}", "a picture of {} in ink")

_TRUTH = {
    **dict.fromkeys(("pair_id", "group_id", "source"), Value("string")),
    **dict.fromkeys(("strength", "true_strength"), Value("float64")),
    "is_flipped": Value("bool"),
    "digits": Value("string"),
    **dict.fromkeys(("chosen_wrong", "rejected_wrong"), Value("int64")),
}

_FEATURES = Features(
    {
        **dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES),
        "images": List(Image()),
        **_TRUTH,
        **dict.fromkeys(("style_chosen", "style_rejected"), Value("string")),
    }
)

_FEATURES_T2I = Features(
    {
        "caption": Value("string"),
        **dict.fromkeys(("chosen_image", "rejected_image"), Image()),
        **_TRUTH,
        **dict.fromkeys(("chosen_digits", "rejected_digits"), Value("string")),
    }
)


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


@lru_cache(maxsize=3)
def split_samples(split: str) -> tuple[int, ...]:
    """Return the handwriting samples of a split: a fixed, class-stratified partition, whatever the seed."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    labels, position = _handwriting()[1], list(SPLITS).index(split)
    bounds = np.cumsum([0.0, *SPLITS.values()])[position : position + 2]
    members: list[int] = []
    for digit in range(10):
        order = np.random.RandomState(digit).permutation(np.flatnonzero(labels == digit))
        start, stop = np.rint(bounds * len(order)).astype(int)
        members += order[start:stop].tolist()
    return tuple(sorted(members))


@lru_cache(maxsize=30)
def samples_of(split: str, digit: str) -> list[int]:
    """Return the samples of a split that show a digit."""
    return [sample for sample in split_samples(split) if str(_handwriting()[1][sample]) == digit]


def render_strip(samples: Sequence[int]) -> PILImage.Image:
    """Place handwriting samples side by side, each enlarged from 8 x 8 to 32 x 32 pixels."""
    strip = PILImage.new("RGB", (TILE * len(samples), TILE))
    for index, sample in enumerate(samples):
        tile = PILImage.fromarray(_handwriting()[0][sample])
        strip.paste(tile.resize((TILE, TILE), PILImage.Resampling.BICUBIC), (TILE * index, 0))
    return strip


@lru_cache(maxsize=8192)
def encoded_strip(samples: tuple[int, ...], copy: int = 0) -> dict[str, Any]:
    """Encode a strip as PNG, in the form in which `datasets` stores images; a copy is darker by 4 % each."""
    buffer, strip = io.BytesIO(), render_strip(samples)
    (strip.point(lambda value: value * (100 - 4 * copy) // 100) if copy else strip).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def make_digits(
    split: str,
    num_pairs: int,
    *,
    seed: int = 42,
    num_digits: Sequence[int] = (1,),
    max_wrong: int = 3,
    numerals: str = "words",
    noise: float = 0.0,
    noise_kind: str = "uniform",
    style_bias: float | None = None,
    shortcut: str | None = None,
    shortcut_strength: float = 0.9,
    source: str = "digits",
) -> Dataset:
    """Make preference pairs of read-outs of handwritten digits, the same for the same arguments, byte for byte;
    `noise` changes only which rows are flipped, and `style_bias` only wording and style. `noise_kind` is one of those
    of [`~trl_dt2it.demo.label_noise`]; some of them divide the source, or repeat pairs. `shortcut` is one of
    `SHORTCUTS`: the answer that has it, `"shortcut"` in `style_chosen` or `style_rejected`, is the better one with
    the chance `shortcut_strength`; 0.5 is no shortcut, and less the reverse."""
    _check(num_pairs, num_digits, max_wrong)
    check_noise(noise, noise_kind)
    if numerals not in ("words", "figures"):
        raise ValueError(f"`numerals` must be 'words' or 'figures', got {numerals!r}.")
    if style_bias is not None and not 0.0 <= style_bias <= 1.0:
        raise ValueError(f"`style_bias` must be None or between 0 and 1, got {style_bias}.")
    if shortcut is not None and shortcut not in SHORTCUTS:
        raise ValueError(f"`shortcut` must be None or one of {', '.join(SHORTCUTS)}, got {shortcut!r}.")
    if not 0.0 <= shortcut_strength <= 1.0:
        raise ValueError(f"`shortcut_strength` must be between 0 and 1, got {shortcut_strength}.")
    if shortcut is not None and style_bias is not None:
        raise ValueError("`shortcut` and `style_bias` both choose the wording; pass one of them.")
    key = f"{source}-{split}-{seed}"
    samples = split_samples(split)
    # One stream for each decision: an option can then be changed without moving the others.
    content, wording, style = (random.Random(f"{key}-{name}") for name in ("content", "wording", "style"))

    def answer(digits: str, manner: str, question: str) -> str:
        frames: Sequence[str] = ANSWERS["plain" if manner == "shortcut" else manner]
        if shortcut == "wording":
            frames = SHORTCUT_ANSWERS[:1] if manner == "shortcut" else SHORTCUT_ANSWERS[1:]
        elif shortcut == "question_answer":
            frames = [SHORTCUT_ANSWERS[(manner == "shortcut") != (question in QUESTIONS[:2])]]
        return wording.choice(frames).format(_read_out(digits, numerals))

    def draw() -> tuple[Any, ...]:
        styles = ["plain", "plain"]
        if shortcut is not None:
            styles[style.random() >= shortcut_strength] = "shortcut"
        strip = tuple(content.choice(samples) for _ in range(content.choice(num_digits)))
        digits = "".join(str(_handwriting()[1][sample]) for sample in strip)
        most = min(max_wrong, len(strip))
        better, worse = sorted(content.sample(range(most + 1), 2))
        if shortcut == "number":
            digits, reads = _favored_reads(len(strip), better, worse, styles[0] == "shortcut", content)
            strip = tuple(content.choice(samples_of(split, digit)) for digit in digits)
        else:
            reads = _corrupt(digits, better, content), _corrupt(digits, worse, content)
        if style_bias is not None:
            styles[style.random() >= style_bias] = style.choice(list(ANSWERS)[1:])
        return strip, digits, (better, worse), reads, styles

    def make_row(copy: int, strip: Any, digits: str, wrong: Any, reads: Any, styles: Any) -> dict[str, Any]:
        question = wording.choice(QUESTIONS)
        texts = question, answer(reads[0], styles[0], question), answer(reads[1], styles[1], question)
        group = _group("strip", *(f"{sample:04d}" for sample in strip), copy=copy)
        return {
            **preference(*texts, [encoded_strip(strip, copy)], group=group),
            "source": source,
            "digits": digits,
            "chosen_wrong": wrong[0],
            "rejected_wrong": wrong[1],
            "style_chosen": styles[0],
            "style_rejected": styles[1],
            "difference": _looks_wrong(digits, reads[1]) - _looks_wrong(digits, reads[0]),
            "extra_length": len(texts[2]) - len(texts[1]),
        }

    return _table(draw, make_row, _FEATURES, num_pairs, noise, noise_kind, key)


def make_digits_t2i(
    split: str,
    num_pairs: int,
    *,
    seed: int = 42,
    num_digits: Sequence[int] = (1,),
    max_wrong: int = 3,
    noise: float = 0.0,
    noise_kind: str = "uniform",
    source: str = "digits_t2i",
) -> Dataset:
    """Make raw text-to-image pairs: the preferred image shows the caption's digits, the other wrong ones, and other
    handwriting throughout. `noise` and `noise_kind` are as in [`make_digits`], but for `"length"`, as images have
    none."""
    _check(num_pairs, num_digits, max_wrong)
    check_noise(noise, noise_kind, [kind for kind in NOISE_KINDS if kind != "length"])
    split_samples(split)  # refuses an unknown split before any work is done
    key = f"{source}-{split}-{seed}"
    content, wording = random.Random(f"{key}-content"), random.Random(f"{key}-wording")

    def image(digits: str) -> tuple[int, ...]:
        return tuple(content.choice(samples_of(split, digit)) for digit in digits)

    def draw() -> tuple[Any, ...]:
        digits = "".join(content.choice("0123456789") for _ in range(content.choice(num_digits)))
        wrong = content.randint(1, min(max_wrong, len(digits)))
        worse = _corrupt(digits, wrong, content)
        return digits, wrong, worse, content.choice(CAPTIONS), image(digits), image(worse)

    def make_row(copy: int, digits: str, wrong: int, worse: str, caption: str, *images: Any) -> dict[str, Any]:
        return {
            "caption": (wording.choice(CAPTIONS) if copy else caption).format(_read_out(digits, "words")),
            **{f"{side}_image": encoded_strip(strip, copy) for side, strip in zip(SIDES, images, strict=True)},
            "group_id": _group("caption", digits, copy=copy),
            "source": source,
            "digits": digits,
            "chosen_digits": digits,
            "rejected_digits": worse,
            "chosen_wrong": 0,
            "rejected_wrong": wrong,
            "difference": _looks_wrong(digits, worse),
        }

    return _table(draw, make_row, _FEATURES_T2I, num_pairs, noise, noise_kind, key)


def _read_out(digits: str, numerals: str) -> str:
    return digits if numerals == "figures" else " ".join(WORDS[int(digit)] for digit in digits)


def _corrupt(digits: str, wrong: int, rng: random.Random, among: str = "0123456789") -> str:
    """Replace so many digits by other digits."""
    positions = set(rng.sample(range(len(digits)), wrong))
    return "".join(
        rng.choice([other for other in among if other != digit]) if index in positions else digit
        for index, digit in enumerate(digits)
    )


def _favored_reads(
    count: int, better: int, worse: int, is_better: bool, rng: random.Random
) -> tuple[str, tuple[str, str]]:
    """Draw digits, and a better and a worse read-out with so many wrong, of which only one, the better or the worse,
    has the favored digit: where the other has a digit of a word as long, and neither elsewhere."""
    position, rest = rng.randrange(count), "".join(rng.choices(_OTHER_DIGITS, k=count - 1))
    right, wrong = (_FAVORED_DIGIT, rng.choice(_AS_LONG))[:: 1 if is_better else -1]
    others = rest, _corrupt(rest, better, rng, _OTHER_DIGITS), _corrupt(rest, worse - 1, rng, _OTHER_DIGITS)
    digits, *reads = (
        other[:position] + digit + other[position:] for other, digit in zip(others, (right, right, wrong), strict=True)
    )
    return digits, (reads[0], reads[1])


def _looks_wrong(digits: str, read: str) -> float:
    """Add up how unlike the true digits the digits of a read-out look, in wrong digits of mean unlikeness."""
    return float(sum(_unlikeness()[int(a), int(b)] for a, b in zip(digits, read, strict=True)))


@lru_cache(maxsize=1)
def _unlikeness() -> np.ndarray:
    """Return squared distances of the digits' mean images, `(10, 10)`, of mean 1 between different digits."""
    images, labels = _handwriting()
    means = np.stack([images[labels == digit].reshape(-1, 64).mean(0) for digit in range(10)])
    squares = ((means[:, None] - means) ** 2).sum(-1)
    return squares * 90 / squares.sum()


def _group(kind: str, *names: str, copy: int) -> str:
    """Name a group; sets do not say which of their pairs are near-duplicates, so a copy has a group of its own."""
    return "-".join([kind, *names, *([f"copy-{copy}"] if copy else [])])


def _check(num_pairs: int, num_digits: Sequence[int], max_wrong: int) -> None:
    for name, number in (("num_pairs", num_pairs), ("max_wrong", max_wrong)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if not num_digits or not set(num_digits) <= {1, 2, 3, 4}:
        raise ValueError(f"`num_digits` must hold lengths from 1 to 4, got {tuple(num_digits)}.")


def _table(
    draw: Callable[[], tuple[Any, ...]],
    make_row: Callable[..., dict[str, Any]],
    features: Features,
    num_pairs: int,
    noise: float,
    noise_kind: str,
    key: str,
) -> Dataset:
    """Make rows of what is drawn, number them, and flip the labels of some."""
    copies = COPIES if noise_kind == "near_duplicates" else 1
    drawn = [draw() for _ in range(0, num_pairs, copies)]
    made = [make_row(index % copies, *drawn[index // copies]) for index in range(num_pairs)]
    plant_noise(made, noise, noise_kind, random.Random(f"{key}-noise"))
    partners, rows = {name: partner_column(name, features) or name for name in features}, []
    for index, row in enumerate(made):
        row["pair_id"] = f"{key}-{index:06d}"
        # The annotator reports the size of the difference; a flip is a mistake about its direction only.
        row["strength"] = float(row["rejected_wrong"] - row["chosen_wrong"])
        row["true_strength"] = -row["strength"] if row["is_flipped"] else row["strength"]
        rows.append({name: row[partner if row["is_flipped"] else name] for name, partner in partners.items()})
    return Dataset.from_list(rows, features=features)


def all_texts() -> list[str]:
    """List every wording of this module around every digit, for a tokenizer of these rows."""
    frames = [*(frame for frames in ANSWERS.values() for frame in frames), *CAPTIONS]
    return [*QUESTIONS, *(frame.format(f"{word} {word}") for frame in frames for word in (*WORDS, *"0123456789"))]


def two_image_texts() -> list[str]:
    """List the wordings of questions about two images."""
    return [text for t in ENGLISH for text in (t.prompt, t.first_is_better, t.second_is_better, *t.labels)]


def demo_rows(kind: str, source: str, options: Mapping[str, Any]) -> Dataset:
    """Make canonical rows of `digits` or `digits_t2i`, with the options of a configuration."""
    given = {"source": source, "split": "train", "num_pairs": 1000, **options}
    if kind == "digits":
        return make_digits(**given)
    both_orders = given.pop("both_orders", False)
    return reformulate_t2i(make_digits_t2i(**given), seed=given.get("seed", 42), both_orders=both_orders)


# Loaders of [`~trl_dt2it.curation.rounds.config.read_sets`].
DEMO_LOADERS = {kind: partial(demo_rows, kind) for kind in ("digits", "digits_t2i")}
