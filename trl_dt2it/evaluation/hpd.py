"""The test splits of HPDv2 and HPDv3: pairs of images of a caption, as questions about two images."""

from __future__ import annotations

from ..data.sources.t2i import HPDV2_TEST, HPDV3
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
