"""HPDv2, HPDv3 and ImageReward: human preferences between two images of a caption."""

from __future__ import annotations

from ...data.sources.t2i import HPDV2_TEST, HPDV3, IMAGEREWARD
from .benchmark import Benchmark


HPDV2 = Benchmark(
    name="hpdv2-test",
    title="HPDv2, test split",
    source=HPDV2_TEST,
)

HPDV3_TEST = Benchmark(
    name="hpdv3-test",
    title="HPDv3, test split",
    source=HPDV3,
)

IMAGE_REWARD = Benchmark(
    name="imagereward-test",
    title="ImageRewardDB, test split",
    source=IMAGEREWARD,
)
