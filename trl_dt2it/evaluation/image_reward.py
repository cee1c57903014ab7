"""The test split of ImageRewardDB: pairs of images of a caption with different ranks, as questions about both."""

from __future__ import annotations

from ..data.sources.t2i import IMAGEREWARD
from .benchmark import Benchmark


IMAGE_REWARD = Benchmark(
    name="imagereward-test",
    title="ImageRewardDB, test split",
    source=IMAGEREWARD,
)
