"""Strips of handwriting from scikit-learn's bundled `load_digits`, in splits that share no sample."""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as PILImage
from sklearn.datasets import load_digits


SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}
TILE = 32


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


@lru_cache(maxsize=3)
def split_samples(split: str) -> tuple[int, ...]:
    """
    The handwriting samples of a split: a fixed, class-stratified partition that no seed changes.

    Args:
        split (`str`):
            `"train"` (70 %), `"validation"` (10 %) or `"test"` (20 %).

    Returns:
        `tuple[int, ...]`: indices into `sklearn.datasets.load_digits`, ascending.
    """
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
    """The samples of a split that show a digit."""
    return [sample for sample in split_samples(split) if str(_handwriting()[1][sample]) == digit]


def render_strip(samples: Sequence[int]) -> PILImage.Image:
    """
    Place handwriting samples side by side, each enlarged from 8 x 8 to 32 x 32 pixels.

    Args:
        samples (`Sequence[int]`):
            Indices into `sklearn.datasets.load_digits`, from left to right.

    Returns:
        `PIL.Image.Image`: an RGB image, 32 pixels high.
    """
    strip = PILImage.new("RGB", (TILE * len(samples), TILE))
    for place, sample in enumerate(samples):
        tile = PILImage.fromarray(_handwriting()[0][sample])
        strip.paste(tile.resize((TILE, TILE), PILImage.Resampling.BICUBIC), (TILE * place, 0))
    return strip


def digits_of(samples: Sequence[int]) -> str:
    """The digits that samples show, such as `"37"`."""
    return "".join(str(_handwriting()[1][sample]) for sample in samples)


@lru_cache(maxsize=8192)
def encoded_strip(samples: tuple[int, ...]) -> dict[str, Any]:
    """
    A strip as `datasets` stores an image, as a PNG.

    Args:
        samples (`tuple[int, ...]`):
            Indices into `sklearn.datasets.load_digits`, from left to right.

    Returns:
        `dict`: `bytes` and `path`.
    """
    buffer = io.BytesIO()
    render_strip(samples).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
