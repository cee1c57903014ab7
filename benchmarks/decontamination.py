"""How many benchmark rows does `decontaminate` find in a training set, disguised, and how many others does it take?

Photographs are those that scikit-learn, matplotlib and scikit-image bring, as far as they are installed, whole and in
pieces that do not overlap. Half of them make a benchmark. The training set holds them disguised, with their questions
and with others, and the other half, their neighbours in the same photographs, with the same questions. Then hashes of
several kinds and sizes are compared, and the speed is measured.

Prints tables and writes `benchmarks/results/decontamination.{json,md}`. Takes a minute on two cores.

usage: python benchmarks/decontamination.py
"""

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import imagehash
import numpy as np
from datasets import Dataset, disable_progress_bars
from lib.photographs import LEAST_CONTRAST, has_contrast, photographs, pieces
from lib.report import markdown, write
from PIL import Image

from trl_dt2it.data.decontamination import decontaminate
from trl_dt2it.data.messages import FEATURES, preference


TILE, SMALL_TILE = 128, 64
LARGEST_DISTANCE = 32  # the default of `decontaminate`
RECALLS = (0.99, 0.995, 0.999)
QUESTIONS = (
    "Describe this image in detail.",
    "What is shown here?",
    "What's unusual about the picture?",
    "How many objects are there: 2 or 3?",
    "图中有什么？",
)


def encode(image: Image.Image, quality: int | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if quality is None else "JPEG", **({} if quality is None else {"quality": quality}))
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


class Disguises:
    """What happens to images and questions on their way into a training set, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def jpeg(self, image: Image.Image) -> Image.Image:
        return decode(encode(image, int(self.rng.integers(50, 96))))

    def scale(self, image: Image.Image) -> Image.Image:
        factor = 2 ** self.rng.uniform(-1, 1)
        return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)

    def crop(self, image: Image.Image) -> Image.Image:
        width, height = (side - max(1, round(0.02 * side)) for side in image.size)
        left, top = (
            self.rng.integers(0, full - part + 1) for full, part in zip(image.size, (width, height), strict=True)
        )
        return image.crop((left, top, left + width, top + height))

    def all(self, image: Image.Image) -> Image.Image:
        return self.jpeg(self.scale(self.crop(image)))

    def rewrite(self, question: str) -> str:
        case = [str.upper, str.lower, str.title][self.rng.integers(3)]
        return f" {case(question).rstrip('.?？')} {['!', '', ' ?', ' ...'][self.rng.integers(4)]}\n"


def row(kind: str, question: str, image: bytes) -> dict:
    return {**preference(question, "Yes.", "No.", [image]), "source": kind}


def planted(inside: list[Image.Image], outside: list[Image.Image]) -> Iterator[dict]:
    """Rows that are in the benchmark (their kind begins with +) and rows that are not (-)."""

    def same(value: Any) -> Any:
        return value

    disguise = Disguises(0)
    kinds = {
        "as it is": (same, same),
        "encoded again as JPEG, quality 50 to 95": (disguise.jpeg, same),
        "scaled by 0.5 to 2": (disguise.scale, same),
        "cropped by 2 %": (disguise.crop, same),
        "question in other case and punctuation": (same, disguise.rewrite),
        "cropped, scaled, JPEG": (disguise.all, same),
        "cropped, scaled, JPEG, question rewritten": (disguise.all, disguise.rewrite),
    }
    for place, image in enumerate(inside):
        question = QUESTIONS[place % len(QUESTIONS)]
        for kind, (change_image, change_question) in kinds.items():
            yield row(f"+ {kind}", change_question(question), encode(change_image(image)))
        for step in (1, 2):
            other = QUESTIONS[(place + step) % len(QUESTIONS)]
            yield row("- same image, another question of the benchmark", other, encode(disguise.jpeg(image)))
        yield row("- same image, a question of its own", "Is it raining?", encode(disguise.jpeg(image)))
    for image in outside:
        for question in QUESTIONS:
            yield row("- same question, another photograph", question, encode(image))


def count_found(inside: list[Image.Image], outside: list[Image.Image]) -> dict[str, tuple[int, int]]:
    """Rows and dropped rows of each kind."""
    benchmark = [
        {"question": QUESTIONS[place % len(QUESTIONS)], "image": encode(image)} for place, image in enumerate(inside)
    ]
    rows = list(planted(inside, outside))
    train = Dataset.from_dict({name: [one.get(name) for one in rows] for name in FEATURES}, features=FEATURES)
    _, dropped = decontaminate(train, benchmark)
    there, taken = Counter(train["source"][:]), Counter(dropped["source"][:])
    return {kind: (count, taken[kind]) for kind, count in there.items()}


HASHES: dict[str, Callable | None] = {
    "phash, 64 bits": lambda image: imagehash.phash(image),
    "dhash, 64 bits": lambda image: imagehash.dhash(image),
    "phash and dhash, 128 bits": None,  # of both, side by side
    "phash, 144 bits": lambda image: imagehash.phash(image, hash_size=12),
    "phash, 256 bits": lambda image: imagehash.phash(image, hash_size=16),
    "dhash, 256 bits": lambda image: imagehash.dhash(image, hash_size=16),
}


def bits_of(name: str, images: list[Image.Image]) -> np.ndarray:
    if name == "phash and dhash, 128 bits":
        return np.hstack([bits_of("phash, 64 bits", images), bits_of("dhash, 64 bits", images)])
    return np.array([HASHES[name](image).hash.ravel() for image in images])


def compare_hashes(pictures: list[Image.Image], small: list[Image.Image]) -> dict[str, dict[str, float]]:
    """For each hash the smallest distance that finds so many of the disguised images, and what else is within it."""
    disguise = Disguises(1)
    changes = (disguise.jpeg, disguise.scale, disguise.crop, disguise.all)
    changed = [[change(image) for image in pictures] for change in changes]
    found = {}
    for name in HASHES:
        originals, others = bits_of(name, pictures), bits_of(name, small)
        own = np.concatenate([(bits_of(name, images) != originals).sum(axis=1) for images in changed])
        pairs = np.concatenate([(others[:-step] != others[step:]).sum(axis=1) for step in range(1, len(others))])
        figures = {}
        for recall in RECALLS:
            distance = int(np.ceil(np.quantile(own, recall)))
            figures[f"distance_{recall}"] = distance
            figures[f"within_{recall}"] = float((pairs <= distance).mean())
        if name == "phash, 144 bits":
            figures["recall_at_default"] = float((own <= LARGEST_DISTANCE).mean())
            figures["within_default"] = float((pairs <= LARGEST_DISTANCE).mean())
        found[name] = {"bits": originals.shape[1], "pairs": len(pairs), **figures}
    return found


def measure_speed(inside: list[Image.Image], num_rows: int = 20_000) -> dict[str, float]:
    """Rows/s, one process: with questions of their own, and with the question of the benchmark."""
    images = [encode(image) for image in inside]
    benchmark = [{"question": QUESTIONS[0], "image": image} for image in images]
    speed = {}
    for name, count, ask in (("other", num_rows, "What is on picture {}?"), ("same", 1000, QUESTIONS[0])):
        rows = [row("", ask.format(n), images[n % len(images)]) for n in range(count)]
        train = Dataset.from_dict({key: [one.get(key) for one in rows] for key in FEATURES}, features=FEATURES)
        start = time.perf_counter()
        decontaminate(train, benchmark[:1])
        speed[name] = count / (time.perf_counter() - start)
    return speed


def main() -> None:
    disable_progress_bars()
    by_library = photographs()
    images = [image for found in by_library.values() for image in found.values()]
    tiles = pieces(images, TILE, whole=True)
    pictures = [image for image in tiles if has_contrast(image)]
    small = [image for image in pieces(images, SMALL_TILE, whole=False) if has_contrast(image)]

    found = count_found(pictures[::2], pictures[1::2])
    positives = {kind: counts for kind, counts in found.items() if kind.startswith("+")}
    hits, there = (sum(counts[place] for counts in positives.values()) for place in (1, 0))
    taken = sum(counts[1] for counts in found.values())
    recall, precision = hits / there, hits / taken
    flat = [image for image in tiles if not has_contrast(image)]
    of_flat = count_found(flat[::2], flat[1::2])
    flat_hits, flat_there = (sum(c[place] for kind, c in of_flat.items() if kind.startswith("+")) for place in (1, 0))
    flat_taken = sum(counts[1] for counts in of_flat.values())
    hashes = compare_hashes(pictures, small)
    speed = measure_speed(pictures[::2])

    libraries = ", ".join(f"{len(found)} of {library}" for library, found in by_library.items())
    rows = [
        [
            "in the benchmark" if kind.startswith("+") else "not in it",
            kind[2:],
            str(count),
            str(drop),
            f"{drop / count:.1%}",
        ]
        for kind, (count, drop) in found.items()
    ]
    ours = hashes["phash, 144 bits"]
    lines = [
        f"{len(images)} photographs ({libraries}), whole and in pieces of {TILE} x {TILE} pixels: {len(pictures)} "
        f"pictures, {len(pictures[::2])} of them in the benchmark. {len(flat)} pieces with little contrast (a "
        f"standard deviation of grey under {LEAST_CONTRAST}, such as plain sky) are left out and counted below.",
        "",
        f"**Recall {recall:.4f}, precision {precision:.4f}**: {hits} of {there} rows found, {taken - hits} others "
        "taken.",
        "",
        markdown(["row", "what", "rows", "dropped", "share"], rows),
        "",
        f"With the pieces of little contrast alone: recall {flat_hits / flat_there:.3f}, precision "
        f"{flat_hits / flat_taken:.3f}.",
        "",
        "Hashes: the smallest distance, in bits, at which so many of the encoded, scaled and cropped pictures are "
        f"found, and the share of {ours['pairs']} pairs of different pieces of {SMALL_TILE} x {SMALL_TILE} pixels "
        "that are within it.",
        "",
        markdown(
            ["hash", *(f"{recall:.1%} found: distance, others within" for recall in RECALLS)],
            [
                [name, *(f"{one[f'distance_{r}']}, {one[f'within_{r}']:.1e}" for r in RECALLS)]
                for name, one in hashes.items()
            ],
        ),
        "",
        f"`decontaminate` takes phash with 144 bits and a distance of {LARGEST_DISTANCE}: "
        f"{ours['recall_at_default']:.2%} found, {ours['within_default']:.1e} of the other pairs within it.",
        "",
        f"Speed, one process: {speed['other']:.0f} rows/s with questions of their own, {speed['same']:.0f} rows/s "
        "with a question of the benchmark, whose images have to be decoded.",
    ]
    record = {
        "recall": recall,
        "precision": precision,
        "kinds": {kind: {"rows": count, "dropped": drop} for kind, (count, drop) in found.items()},
        "little_contrast": {kind: {"rows": count, "dropped": drop} for kind, (count, drop) in of_flat.items()},
        "hashes": hashes,
        "rows_per_second": speed,
        "photographs": {library: len(found) for library, found in by_library.items()},
    }
    write("decontamination", "\n".join(lines), record)


if __name__ == "__main__":
    main()
